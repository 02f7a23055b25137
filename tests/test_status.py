"""The promises of `sdxl-jax status`: the state of a run from what it left on disk, without jax, also while it runs."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import command
import pytest

from sdxl_jax.errors import InputError, Interrupted, MachineError
from sdxl_jax.files import locks
from sdxl_jax.training.observe.clock import Clock, TimeLog, TimePart, totals
from sdxl_jax.training.status import State, status


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def start(run_dir: Path, steps: range, error: BaseException | None = None, saved: int | None = None) -> None:
    """One start: 10 s of start-up, 2 s per step and 8 images, 4 s for the checkpoint."""
    time = Time()
    log = TimeLog(run_dir, clock := Clock(0.0, time)).__enter__()
    time.now += 10
    clock.switch_to(TimePart.STEP)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            time.now += 2
            log.count_step(step, recomputed=False)
            line = {"step": step, "loss": 1 / step, "step_seconds": 2.0, "images_per_second": 4.0}
            file.write(json.dumps(line) + "\n")
    if saved is not None:
        (run_dir / "checkpoints" / str(saved)).mkdir()
        with clock.during(TimePart.SAVE):
            time.now += 4
    log.__exit__(None if error is None else type(error), error, None)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"training": {"steps": 20}}}))
    return folder


def found(run_dir: Path) -> dict[str, Any]:
    outcome = command.call("status", run_dir, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def quiet(run_dir: Path) -> int:
    outcome = command.call("status", run_dir, "--quiet")
    assert (outcome.out, outcome.err) == ("", "")
    return outcome.code


def test_json_has_what_scripts_rely_on(run_dir: Path) -> None:
    start(run_dir, range(1, 11), Interrupted("SIGTERM"), saved=10)
    start(run_dir, range(11, 16))
    (run_dir / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()  # a save that was interrupted
    values = found(run_dir)
    assert {name: values[name] for name in ("step", "steps", "last_checkpoint", "loss", "images_per_second")} == {
        "step": 15,
        "steps": 20,
        "last_checkpoint": 10,
        "loss": 1 / 15,
        "images_per_second": 4.0,
    }
    assert values["seconds"].keys() == totals([]).keys()
    assert (values["seconds"]["start"], values["seconds"]["restart"], values["seconds"]["step"]) == (10, 10, 30)
    assert values["goodput"] == 30 / (10 + 10 + 30 + 4)


def test_a_new_run_is_stopped_without_steps(run_dir: Path) -> None:
    values = found(run_dir)
    assert (values["state"], values["step"], values["last_checkpoint"]) == ("stopped", 0, None)
    assert (values["loss"], values["images_per_second"], values["goodput"]) == (None, None, None)
    assert quiet(run_dir) == 143


def test_a_run_is_finished_when_its_last_step_is_saved(run_dir: Path) -> None:
    start(run_dir, range(1, 21), saved=20)
    assert found(run_dir)["state"] == "finished" and quiet(run_dir) == 0
    (run_dir / "config.json").write_text(json.dumps({"config": {"training": {"steps": 30}}}))  # it is to go further
    assert found(run_dir)["state"] == "stopped" and quiet(run_dir) == 143


def test_a_last_step_that_could_not_be_saved_is_not_finished(run_dir: Path) -> None:
    start(run_dir, range(1, 21), MachineError("The checkpoint of step 20 could not be written"))
    assert found(run_dir)["state"] == "failed" and quiet(run_dir) == 143


@pytest.mark.parametrize(
    ("error", "state", "code", "shown"),
    [
        (Interrupted("SIGTERM on process 1"), "stopped", 143, "stopped by SIGTERM on process 1"),
        (MachineError("no room"), "failed", 143, "failed with exit code 1: no room"),
        (InputError("the loss is nan"), "failed", 2, "failed with exit code 2: the loss is nan"),
    ],
)
def test_how_the_last_start_ended(run_dir: Path, error: BaseException, state: str, code: int, shown: str) -> None:
    start(run_dir, range(1, 6), error, saved=5)
    assert found(run_dir)["state"] == state
    assert quiet(run_dir) == code
    assert f"{run_dir}: {shown}" in command.call("status", run_dir).out


def test_a_killed_run_is_stopped(run_dir: Path) -> None:
    start(run_dir, range(1, 6), InputError("an earlier start's"), saved=5)
    TimeLog(run_dir, Clock()).__enter__()
    (run_dir / "lock").write_text(f"process 999999 on {socket.gethostname()} since then\n")
    assert found(run_dir)["state"] == "stopped" and quiet(run_dir) == 143
    assert "stopped (killed)" in command.call("status", run_dir).out


def test_a_run_is_running_while_its_lock_is_held_and_is_not_disturbed(run_dir: Path) -> None:
    start(run_dir, range(1, 6), InputError("an earlier start's"))
    with locks.locked_file(run_dir / "lock"):
        values = found(run_dir)
        assert (values["state"], values["exit_code"], values["error"]) == ("running", None, None)
        assert quiet(run_dir) == 143
        shown = command.call("status", run_dir).out
    assert f"running (process {Path('/proc/self').resolve().name} on {socket.gethostname()}" in shown
    assert not (run_dir / "lock").exists()
    before = sorted(run_dir.rglob("*"))
    with locks.locked_file(run_dir / "lock"):  # asking has not kept it
        pass
    assert sorted(run_dir.rglob("*")) == before


def test_a_lock_of_another_machine_that_seems_free_leaves_it_open(run_dir: Path) -> None:
    start(run_dir, range(1, 6))
    (run_dir / "lock").write_text("process 7 on another-machine since then\n")
    assert status(run_dir).state is State.UNKNOWN
    assert quiet(run_dir) == 143
    assert "process 7 on another-machine" in command.call("status", run_dir).out


def test_runs_without_how_their_starts_ended_are_stopped(run_dir: Path) -> None:
    """As version 0.1 wrote them."""
    line = {"start": 1, "step": 5, "steps_again": 0, "seconds": {"start": 10.0, "step": 30.0, "again": 0.0}}
    (run_dir / "time.jsonl").write_text(json.dumps(line) + "\n")
    values = found(run_dir)
    assert (values["state"], values["goodput"]) == ("stopped", 0.75)


def test_only_the_end_of_long_metrics_is_read_and_a_line_cut_off_is_left_out(run_dir: Path) -> None:
    start(run_dir, range(1, 5000))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5000, "lo')
    assert found(run_dir)["step"] == 4999


@pytest.mark.parametrize("content", [None, "{", "{}", '{"config": {"training": 3}}'])
def test_what_is_no_run_has_code_2(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    outcome = command.call("status", tmp_path)
    assert outcome.code == 2 and str(tmp_path) in outcome.err and "Traceback" not in outcome.err
    assert quiet(tmp_path) == 2


def test_status_imports_nothing_heavy(run_dir: Path) -> None:
    start(run_dir, range(1, 6))
    program = (
        f"import sys; sys.argv = ['sdxl-jax', 'status', {str(run_dir)!r}]\n"
        "from sdxl_jax.__main__ import main\nmain()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "step 5" not in done.stdout and "5 of 20" in done.stdout
    assert not set(done.stderr.split()) & {"jax", "flax", "numpy", "orbax", "grain", "transformers"}
