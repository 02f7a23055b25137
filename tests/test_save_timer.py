"""The promises of checkpoints by time: all processes save after the same step, and nobody waits at every step."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import killing
import pytest
import tiny
from test_processes import three, together  # noqa: F401 (a fixture)

from sdxl_jax.training import save_timer
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.save_timer import SaveTimer
from sdxl_jax.training.status import State, status


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def saved_after(minutes: float | None, step_seconds: float, steps: int, save_seconds: float = 0.0) -> list[int]:
    """The steps of one process after which a checkpoint is written."""
    now = Time()
    timer, saved = SaveTimer(minutes, Processes(1.0), now), []
    for step in range(1, steps + 1):
        now.now += step_seconds
        if timer.is_due(step):
            timer.restart()
            now.now += save_seconds
            saved.append(step)
    return saved


def test_one_process_saves_when_the_minutes_have_passed() -> None:
    assert saved_after(10.0, 60.0, 35) == [10, 20, 30]
    assert saved_after(10.0, 45.0, 35) == [14, 28]
    assert saved_after(10.0, 3600.0, 3) == [1, 2, 3], "slow steps: after each"
    assert saved_after(10.0, 60.0, 30, save_seconds=300) == [10, 15, 20, 25, 30], "saving counts"
    assert saved_after(None, 3600.0, 3) == []


def test_a_checkpoint_by_steps_restarts_the_minutes() -> None:
    now = Time()
    timer = SaveTimer(10.0, Processes(1.0), now)
    now.now += 599
    timer.restart()
    now.now += 599
    assert not timer.is_due(1)
    now.now += 1
    assert timer.is_due(2)


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "gather", lambda *_, **__: pytest.fail("one process waits for nobody"))
    assert saved_after(10.0, 60.0, 10) == [10]


def test_processes_with_other_clocks_save_after_the_same_steps_and_rarely_ask(
    three: list[Processes],  # noqa: F811 (the fixture)
) -> None:
    """200 steps of 1 s, 6 checkpoints of 30 s each by the first process's clock; the others' clocks run faster."""
    asked = [0, 0, 0]

    def program(process: Processes) -> list[int]:
        now = Time()
        timer, saved = SaveTimer(0.5, process, now), list[int]()
        gather: Any = process.gather

        def counted(text: str, *, stops: bool) -> list[str]:
            asked[process.index] += 1
            return gather(text, stops=stops)

        process.gather = counted  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(1, 201):
            now.now += 1.0 + process.index
            process.stop_point()
            if timer.is_due(step):
                timer.restart()
                saved.append(step)
        return saved

    first, *others = together(three, program)
    assert others == [first, first]
    assert 5 <= len(first) <= 6 and all(30 <= b - a <= 36 for a, b in itertools.pairwise(first))
    assert asked[0] < 200 / 2


def test_questions_are_about_ten_seconds_apart_and_a_slow_first_step_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = Time()
    process = Processes(1.0)
    process.count = 2
    asked_at = list[float]()
    monkeypatch.setattr(process, "gather", lambda text, stops: asked_at.append(now.now) or [text, text])
    timer = SaveTimer(60.0, process, now)
    now.now += 300  # compilation
    for step in range(1001, 2001):  # of a resumed run
        now.now += 0.5
        timer.is_due(step)
    apart = [b - a for a, b in itertools.pairwise(asked_at)]
    assert max(apart) <= save_timer._SECONDS_BETWEEN_QUESTIONS and apart[-1] >= 9


def test_a_step_costs_no_more_with_minutes_than_without() -> None:
    """Of one process: a look at a clock. A wait for another thread or process would take milliseconds."""
    timer, began = SaveTimer(10.0, Processes(1.0)), time.monotonic()
    for step in range(1000):
        timer.is_due(step)
    assert (time.monotonic() - began) / 1000 < 100e-6


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_with_checkpoints_by_time_alone_resumes_from_one(
    tmp_path: Path, processes: int, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are slowed down to 0.5 s; it is killed after a checkpoint, and finished by a second start."""
    (tmp_path / "compiled").symlink_to(compiled)
    config = killing.train_config(tiny.make_folder(tmp_path / "images"), 12)
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=1000, every_minutes=3 / 60)
    config = dataclasses.replace(
        config, checkpoint=checkpoint, validation=dataclasses.replace(config.validation, every_steps=None)
    )
    monkeypatch.setenv("SECONDS_PER_STEP", "0.5")
    started = killing.Processes.start(config, tmp_path / "run", tmp_path, processes)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "config.json").exists() or not status(tmp_path / "run").last_checkpoint:
        assert time.monotonic() < deadline and all(child.poll() is None for child in started.children)
        time.sleep(0.2)
    started.kill(list(range(processes)))
    started.end()
    found = status(tmp_path / "run")
    assert found.state is State.STOPPED and 0 < (found.last_checkpoint or 0) < 12
    monkeypatch.delenv("SECONDS_PER_STEP")
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(checkpoint, every_minutes=None))
    killing.uninterrupted(config, tmp_path / "run", tmp_path, processes)
    assert status(tmp_path / "run").state is State.FINISHED
