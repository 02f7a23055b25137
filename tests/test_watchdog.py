"""The promises of the watchdog: a run that hangs ends with exit code 1 and all stacks, one that works is left alone."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import killing
import pytest
import tiny

from sdxl_jax.config import CompileAhead, TrainConfig
from sdxl_jax.data.processes import end_with_parent
from sdxl_jax.errors import MachineError
from sdxl_jax.training.observe import watchdog
from sdxl_jax.training.observe.clock import Clock, TimePart, read_starts
from sdxl_jax.training.observe.watchdog import Watchdog
from sdxl_jax.training.status import State, status

LIMIT = 0.2
"""Seconds."""


def barked(part: TimePart, seconds: float, switches: int = 1) -> list[str]:
    """What is reported of a run that stays so long in a part, several times in turn with another."""
    reports, ended = list[str](), threading.Event()
    clock = Clock()
    with Watchdog(clock, LIMIT / 60, lambda error: reports.append(str(error)), lambda code: ended.set()):
        for _ in range(switches):
            with clock.during(part):
                ended.wait(seconds)
    return reports


def test_a_step_that_takes_too_long_is_reported_with_its_part_and_what_to_do() -> None:
    (report,) = barked(TimePart.DATA, 5)
    assert "data" in report and "training.watchdog_minutes" in report and "resume" in report


def test_steps_within_the_limit_are_not_however_many() -> None:
    assert barked(TimePart.STEP, LIMIT / 2, switches=6) == []


@pytest.mark.parametrize(
    "part",
    [TimePart.SAVE, *(pytest.param(part, marks=pytest.mark.slow) for part in (TimePart.COMPILE, TimePart.EVALUATION))],
)
def test_compilation_checkpoints_and_validation_have_an_allowance_of_their_own(part: TimePart) -> None:
    assert barked(part, 2 * LIMIT) == []
    assert len(barked(part, 10)) == 1


def test_a_suspended_process_has_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a process that Ctrl-Z has suspended for an hour jumps."""
    jump = [0.0]
    times = type("time", (), {"monotonic": lambda: time.monotonic() + jump[0], "sleep": time.sleep})
    monkeypatch.setattr(watchdog, "time", times)
    clock, reports = Clock(), list[MachineError]()
    with Watchdog(clock, 0.01, reports.append, lambda code: None), clock.during(TimePart.STEP):
        time.sleep(0.1)
        jump[0] = 3600
        time.sleep(0.2)
    assert reports == []


def test_without_minutes_nothing_is_watched() -> None:
    before = threading.active_count()
    with Watchdog(Clock(), None, lambda error: None):
        assert threading.active_count() == before


HANGING = """
import time
from sdxl_jax.training.observe.clock import Clock, TimePart
from sdxl_jax.training.observe.watchdog import Watchdog, _REPORT_SECONDS
from sdxl_jax.training.observe import watchdog

def storage_that_does_not_answer(*_):
    time.sleep(600)

clock = Clock()
watchdog._REPORT_SECONDS = 1.0
with Watchdog(clock, 0.01, {report}), clock.during(TimePart.STEP):
    storage_that_does_not_answer()
"""


@pytest.mark.parametrize("report", [pytest.param("print", marks=pytest.mark.slow), "storage_that_does_not_answer"])
def test_a_process_that_hangs_ends_with_1_and_its_stacks_even_if_reporting_hangs(report: str) -> None:
    program = HANGING.replace("{report}", report)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The run hangs: it has been in one part of a step, step")
    assert "in storage_that_does_not_answer" in done.stderr  # the main thread's stack


# SIGUSR1

WAITING = """
import sys
from sdxl_jax import __main__ as command_line

def wait_for_a_line(arguments):
    print("ready", flush=True)
    sys.stdin.readline()
    print("done", flush=True)

command_line._COMMANDS["train"] = (wait_for_a_line, "")
sys.argv[1:] = ["train"]
command_line.program()
"""


def test_sigusr1_prints_all_stacks_and_the_command_goes_on() -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WAITING], text=True, **pipes) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR1)
        stacks = [child.stderr.readline()]
        while "in program" not in stacks[-1]:
            stacks.append(child.stderr.readline())
            assert stacks[-1]
        out, _ = child.communicate("\n", timeout=60)
    assert "in wait_for_a_line" in "".join(stacks)
    assert (out, child.returncode) == ("done\n", 0)


def worker(connection: Any) -> None:
    end_with_parent()
    connection.send("ready")
    connection.recv()


def test_sigusr1_ends_no_worker() -> None:
    """A launcher signals all processes of a job."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=worker, args=[theirs])
    child.start()
    assert ours.recv() == "ready" and child.pid is not None
    os.kill(child.pid, signal.SIGUSR1)
    ours.send("end")
    child.join(60)
    assert child.exitcode == 0


# A whole run


def config_of(folder: Path, minutes: float) -> TrainConfig:
    config = killing.train_config(tiny.make_folder(folder / "images"), 7)
    training = dataclasses.replace(config.training, watchdog_minutes=minutes, compile_ahead=CompileAhead.BEFORE)
    return dataclasses.replace(config, training=training)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_run_that_hangs_ends_with_1_and_resumes(
    tmp_path: Path, processes: int, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last process hangs in its fifth step; with two, the other one waits for it in a collective."""
    (tmp_path / "compiled").symlink_to(compiled)
    config = config_of(tmp_path, 0.15)
    monkeypatch.setenv("HANG_IN_STEP", f"5 {processes - 1}")
    started = killing.Processes.start(config, tmp_path / "run", tmp_path, processes)
    codes = started.wait(300)
    started.end()
    log = (tmp_path / f"log_{processes - 1}").read_text()
    assert codes == [1] * processes, log[-3000:]
    assert "error: The run hangs" in log and "in hang" in log
    found = status(tmp_path / "run")
    assert (found.state, found.last_checkpoint, found.exit_code) == (State.FAILED, 3, 1)
    assert "The run hangs" in (found.error or "")
    monkeypatch.delenv("HANG_IN_STEP")
    killing.uninterrupted(config, tmp_path / "run", tmp_path, processes)
    assert status(tmp_path / "run").state is State.FINISHED
    assert len(read_starts(tmp_path / "run")) == 2
