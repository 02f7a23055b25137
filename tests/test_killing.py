"""A run that is killed at any moment ends like an undisturbed one: one kill by default, three and 200 with `-m slow`.

The environment variable KILLS sets the number. The harness, and how to run it by hand with a log, is killing.py.
"""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import killing
import pytest
import tiny

from sdxl_jax.config import CompileAhead, TrainConfig
from sdxl_jax.training.observe.clock import read_starts

KILLS = int(os.environ.get("KILLS", "200"))


class Whole(NamedTuple):
    """An undisturbed run."""

    config: TrainConfig
    scratch: Path
    folder: Path
    seconds: float


def whole_run(scratch: Path, processes: int, steps: int) -> Whole:
    config = killing.train_config(tiny.make_folder(scratch / "images"), steps)
    seconds = killing.uninterrupted(config, scratch / "whole", scratch, processes)
    # What is killed finds its programs compiled: a span with compilation in it would be twice as long as such a run.
    (start,) = read_starts(scratch / "whole")
    return Whole(config, scratch, scratch / "whole", seconds - start.seconds["compile"])


@pytest.fixture(scope="module")
def whole(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    scratch = tmp_path_factory.mktemp("alone")
    (scratch / "compiled").symlink_to(compiled)
    return whole_run(scratch, 1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 3])
def test_killed_run_is_the_undisturbed_run(whole: Whole, kills: int) -> None:
    counts = killing.campaign(whole.config, whole.folder, whole.scratch, 1, kills, whole.seconds, seed=1)
    assert counts.total() == kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_many_times_is_the_undisturbed_run(tmp_path: Path, processes: int) -> None:
    run = whole_run(tmp_path, processes, 18)
    counts = killing.campaign(run.config, run.folder, tmp_path, processes, KILLS, run.seconds, 0, print)
    assert counts.total() == KILLS


def stopped(whole: Whole, folder: Path, processes: int, phase: str, victim: int, number: int = signal.SIGTERM) -> float:
    """Signals one process when it is in that phase, waits until all have ended by themselves, and resumes until the run
    is finished. Returns the seconds from the signal to the end of the processes."""
    config = whole.config
    if phase == "compiling":  # neither from the cache nor in the background: the run has to wait for it
        programs = whole.scratch / "compiled"
        programs.unlink() if programs.is_symlink() else shutil.rmtree(programs)
        training = dataclasses.replace(config.training, compile_ahead=CompileAhead.ON_DEMAND)
        config = dataclasses.replace(config, training=training)
    started = killing.Processes.start(config, folder, whole.scratch, processes)
    try:
        deadline = time.monotonic() + 300
        while started.phases[victim].read_text() != phase:
            assert time.monotonic() < deadline
            assert started.children[victim].poll() is None
            time.sleep(0.01)
        started.children[victim].send_signal(number)
        signalled = time.monotonic()
        codes = started.wait(120)
        seconds = time.monotonic() - signalled
    finally:
        started.end()
    assert codes == [128 + number] * processes, (whole.scratch / f"log_{victim}").read_text()[-3000:]
    assert not (folder / "lock").exists()
    killing.uninterrupted(whole.config, folder, whole.scratch, processes)
    killing.assert_same_run(folder, whole.folder)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start-up", "compiling", "step", "evaluation"])
def test_sigterm_saves_and_ends_with_exit_code_143(whole: Whole, phase: str) -> None:
    assert stopped(whole, whole.scratch / f"stopped_in_{phase}", 1, phase, 0) < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase", ["compiling", "step", "evaluation"]
)  # before they have joined, no signal is broadcast
def test_sigterm_on_one_of_two_processes_stops_both_at_the_same_step(tmp_path: Path, phase: str) -> None:
    two = whole_run(tmp_path, 2, 7)
    assert stopped(two, tmp_path / "stopped", 2, phase, victim=1) < 30


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])  # process 0 hosts the coordination service
def test_survivor_of_a_killed_process_ends_with_1(tmp_path: Path, victim: int) -> None:
    config = killing.train_config(tiny.make_folder(tmp_path / "images"), 100_000)
    started = killing.Processes.start(config, tmp_path / "run", tmp_path, 2)
    survivor = 1 - victim
    try:
        while started.phases[victim].read_text() != "step":
            assert started.children[victim].poll() is None, (tmp_path / f"log_{victim}").read_text()[-3000:]
            time.sleep(0.05)
        started.kill([victim])
        codes = started.wait(90)  # jax's heartbeat is given up after 100 s
    finally:
        started.end()
    assert codes is not None
    assert codes[survivor] == 1, (tmp_path / f"log_{survivor}").read_text()[-3000:]
