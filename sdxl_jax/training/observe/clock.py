"""Where the time of a run goes: every second of a process belongs to exactly one part, and a run's starts are added up.

    with clock.during(Part.SAVE): ...

A part inside another takes its time from the outer one, so that the parts add up to the wall time. Nothing here waits
for a device: what the devices do shows as the waiting that logging does for them, which belongs to `Part.STEP`.

RUN/time.jsonl has lines of every start, the last of which counts. A killed process is missing what came after its last
line; machines that were gone in between are in no line.
"""

import contextlib
import enum
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class TimePart(enum.Enum):
    START = "start"
    """From the start of the program to its first step: imports, data, weights or checkpoint."""
    COMPILE = "compile"
    """Waiting for a compiled step. Compiling that goes on beside training is not waited for."""
    DATA = "data"
    """Waiting for a batch, and handing it to the devices."""
    STEP = "step"
    """Starting steps, and waiting for the numbers of those before."""
    RECOMPUTED = "recomputed"
    """The same, for steps that an earlier start had made beyond its last checkpoint."""
    SAVE = "save"
    """Waiting for checkpoints."""
    EVALUATION = "evaluation"
    """Validation images."""
    OTHER = "other"


class Clock:
    """Seconds of this process by part."""

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.monotonic):
        """began: when the program started, on the clock `now`; None: now. It is in `Part.START`."""
        self._now = now
        self._seconds = dict.fromkeys(TimePart, 0.0)
        self._part = TimePart.START
        self._since = now() if began is None else began

    def turn_to(self, part: TimePart) -> TimePart:
        """What follows belongs to that part. Returns the one that ends."""
        now, before = self._now(), self._part
        self._seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    @contextlib.contextmanager
    def during(self, part: TimePart) -> Iterator[None]:
        """What happens inside belongs to that part, and what follows to the one of before."""
        before = self.turn_to(part)
        try:
            yield
        finally:
            self.turn_to(before)

    def seconds(self) -> dict[TimePart, float]:
        """Of every part, up to now."""
        self.turn_to(self._part)
        return dict(self._seconds)


class TimeLog:
    """RUN/time.jsonl: one line now and then, and a last one. A context manager: leaving it writes that last one."""

    def __init__(self, run_dir: Path, clock: Clock, writes: bool = True):
        """writes: one process of several does."""
        self._path, self._clock = run_dir / "time.jsonl" if writes else Path(os.devnull), clock
        self._start = 1 + max((start.number for start in read(run_dir)), default=0)
        self._step, self._recomputed = 0, 0
        self._written = 0.0

    def __enter__(self) -> "TimeLog":
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def note(self, step: int, recomputed: bool) -> None:
        """A step was made; `recomputed`: an earlier start had made it before. Writes a line if the last one is old."""
        self._step, self._recomputed = step, self._recomputed + recomputed
        if sum(self._clock.seconds().values()) >= self._written + _SECONDS_BETWEEN_LINES:
            self._write()

    def _write(self) -> None:
        seconds = {part.value: value for part, value in self._clock.seconds().items()}
        self._written = sum(seconds.values())
        line = {"start": self._start, "step": self._step, "recomputed_steps": self._recomputed, "seconds": seconds}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # the next line says all of it again
            tqdm.write(f"  {self._path} takes no line: {error.strerror}")


class Start(NamedTuple):
    """What the last line of one start says."""

    number: int
    """1 is the first."""
    step: int
    """The last that it made, 0 if none."""
    recomputed_steps: int
    """Of them, those that an earlier start had made."""
    seconds: Mapping[str, float]
    """By the values of `Part`."""


def read(run_dir: Path) -> list[Start]:
    """The starts of a run so far, in order."""
    path, starts = run_dir / "time.jsonl", dict[int, Start]()
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # a line that a crash cut off
        if "steps_again" in line:  # as version 0.1 wrote it
            line["recomputed_steps"] = line["steps_again"]
            line["seconds"][TimePart.RECOMPUTED.value] = line["seconds"].pop("again", 0.0)
        starts[line["start"]] = Start(line["start"], line["step"], line["recomputed_steps"], line["seconds"])
    return [starts[number] for number in sorted(starts)]


def totals(starts: list[Start]) -> dict[str, float]:
    """Seconds by row of the table. What it cost to start again, recomputed steps included, is `restart`."""
    rows = {"start": 0.0, "restart": 0.0, **dict.fromkeys((part.value for part in TimePart), 0.0)}
    for start in starts:
        for part, seconds in start.seconds.items():
            restart = part == TimePart.RECOMPUTED.value or (part == TimePart.START.value and start.number > 1)
            rows["restart" if restart else part] += seconds
    del rows[TimePart.RECOMPUTED.value]
    return rows


def table(starts: list[Start]) -> str:
    """Where the time of all starts went, and the sum."""
    rows, recomputed = totals(starts), sum(start.recomputed_steps for start in starts)
    whole = sum(rows.values())
    lines = [f"  {'':10}  {'seconds':>9}  {'share':>6}"]
    for name, seconds in (*rows.items(), ("all", whole)):
        notes = f"  {len(starts) - 1} restarts, {recomputed} steps recomputed" if name == "restart" else ""
        lines.append(f"  {name:10}  {seconds:9.1f}  {seconds / max(whole, 1e-9):6.1%}{notes}")
    return "\n".join(lines)
