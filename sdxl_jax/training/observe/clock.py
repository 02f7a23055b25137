"""Time accounting, for goodput: every second of a process belongs to exactly one part, summed over a run's starts.

    with clock.during(TimePart.SAVE): ...

A part inside another takes its time from the outer one, so that the parts add up to the wall time. Nothing here waits
for a device: device time shows up as the time that logging waits for results, which belongs to `TimePart.STEP`.

RUN/time.jsonl has several lines per start, the last of which counts; it says how the start ended, unless it was killed.
After a kill, the time since the last line is missing; the time between two starts is never in it.
"""

import contextlib
import enum
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_jax.errors import Interrupted, exit_code
from sdxl_jax.progress import tqdm

_SECONDS_BETWEEN_LINES = 30.0
_LONGEST_ERROR = 1000


class TimePart(enum.Enum):
    START = "start"
    """From the start of the program to its first step: imports, data, weights or checkpoint."""
    COMPILE = "compile"
    """Waiting for a compiled step. Compilation in the background does not count."""
    DATA = "data"
    """Waiting for a batch, and transferring it to the devices."""
    STEP = "step"
    """Dispatching steps, and waiting for the metrics of earlier ones."""
    RECOMPUTED = "recomputed"
    """The same, for steps that an earlier start had done after its last checkpoint."""
    SAVE = "save"
    """Waiting for checkpoints."""
    EVALUATION = "evaluation"
    """Validation images."""
    OTHER = "other"


class Clock:
    """Seconds of this process by part."""

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.monotonic):
        """began: when the program started, on the clock `now`; None: now. The part is `TimePart.START` first."""
        self._now = now
        self._seconds = dict.fromkeys(TimePart, 0.0)
        self._part = TimePart.START
        self._since = now() if began is None else began
        self.position = TimePart.START, 0
        """(the present part, switches so far): the same twice if nothing has happened in between. Another thread may
        read it."""

    def switch_to(self, part: TimePart) -> TimePart:
        """Counts the time from now on as `part`. Returns the previous part."""
        now, previous = self._now(), self._part
        self._seconds[previous] += now - self._since
        self._since, self._part = now, part
        self.position = part, self.position[1] + 1
        return previous

    @contextlib.contextmanager
    def during(self, part: TimePart) -> Iterator[None]:
        """Counts the time inside the block as `part`, and afterwards as the previous part again."""
        previous = self.switch_to(part)
        try:
            yield
        finally:
            self.switch_to(previous)

    def seconds(self) -> dict[TimePart, float]:
        """Seconds of every part, up to now."""
        return {**self._seconds, self._part: self._seconds[self._part] + self._now() - self._since}


class TimeLog:
    """Writes RUN/time.jsonl: a line every 30 s, and a last one when the context is left."""

    def __init__(self, run_dir: Path, clock: Clock, writes: bool = True):
        """writes: False on all processes but the first."""
        self._path, self._clock = run_dir / "time.jsonl" if writes else Path(os.devnull), clock
        self._start = 1 + max((start.number for start in read_starts(run_dir)), default=0)
        self._step, self._recomputed = 0, 0
        self._written, self._ended = 0.0, False

    def __enter__(self) -> "TimeLog":
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Writes the last line, with the exit code and the error that ends the run. The first error counts: others
        follow from it."""
        if self._ended:
            return
        self._ended = True
        stopped = isinstance(error, Interrupted)
        reason = None if error is None else error.signal_name if stopped else f"{error}"[:_LONGEST_ERROR]
        self._write({"exit_code": 0 if error is None else exit_code(error), "error": reason})

    def count_step(self, step: int, recomputed: bool) -> None:
        """Counts a finished step. recomputed: an earlier start had done it. Writes a line if the last one is old."""
        self._step, self._recomputed = step, self._recomputed + recomputed
        if sum(self._clock.seconds().values()) >= self._written + _SECONDS_BETWEEN_LINES:
            self._write()

    def _write(self, ended: Mapping[str, Any] | None = None) -> None:
        seconds = {part.value: value for part, value in self._clock.seconds().items()}
        self._written = sum(seconds.values())
        line = {"start": self._start, "step": self._step, "recomputed_steps": self._recomputed, "seconds": seconds}
        line |= ended or {}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # the next line has the same totals
            tqdm.write(f"  {self._path} cannot be written: {error.strerror}")


class Start(NamedTuple):
    """The last line of one start."""

    number: int
    """1 is the first."""
    step: int
    """The last step that it did, 0 if none."""
    recomputed_steps: int
    """Its steps that an earlier start had done already."""
    seconds: Mapping[str, float]
    """By the values of `TimePart`."""
    exit_code: int | None = None
    """How it ended; None: it has not, or it was killed."""
    error: str | None = None
    """The error, or the signal, that ended it."""


def read_starts(run_dir: Any) -> list[Start]:
    """The starts of a run so far, in order. run_dir: a `pathlib.Path`, or an `epath.Path`."""
    path, starts = run_dir / "time.jsonl", dict[int, Start]()
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # a line that a crash cut off
        if "steps_again" in line:  # as version 0.1 wrote it
            line["recomputed_steps"] = line["steps_again"]
            line["seconds"][TimePart.RECOMPUTED.value] = line["seconds"].pop("again", 0.0)
        names = [name for name in Start._fields[1:] if name in line]
        starts[line["start"]] = Start(number=line["start"], **{name: line[name] for name in names})
    return [starts[number] for number in sorted(starts)]


def totals(starts: list[Start]) -> dict[str, float]:
    """Seconds by row of the table. `restart` is the cost of restarts, recomputed steps included."""
    rows = {"start": 0.0, "restart": 0.0, **dict.fromkeys((part.value for part in TimePart), 0.0)}
    for start in starts:
        for part, seconds in start.seconds.items():
            restart = part == TimePart.RECOMPUTED.value or (part == TimePart.START.value and start.number > 1)
            rows["restart" if restart else part] += seconds
    del rows[TimePart.RECOMPUTED.value]
    return rows


def time_table(starts: list[Start]) -> str:
    """The table of seconds and shares by part, over all starts, with the sum."""
    rows, recomputed = totals(starts), sum(start.recomputed_steps for start in starts)
    total = sum(rows.values())
    lines = [f"  {'':10}  {'seconds':>9}  {'share':>6}"]
    for name, seconds in (*rows.items(), ("all", total)):
        notes = f"  {len(starts) - 1} restarts, {recomputed} steps recomputed" if name == "restart" else ""
        lines.append(f"  {name:10}  {seconds:9.1f}  {seconds / max(total, 1e-9):6.1%}{notes}")
    return "\n".join(lines)
