"""A watchdog: ends a run that hangs, in a collective that another process does not enter, or waiting for storage that
does not answer. A launcher can then start it again; a run that hangs costs as much as one that trains.

A run hangs if it stays in one part of a step (`clock.TimePart`) for longer than `training.watchdog_minutes`. Parts that
are long by nature have an allowance of their own, four times that: compilation, checkpoints, validation images. What
comes before the first step is not watched. A suspended process has not hung: only time in which it could run counts.
"""

import os
import threading
import time
from collections.abc import Callable

from sdxl_jax.errors import MachineError
from sdxl_jax.progress import print_stacks, report_error
from sdxl_jax.training.observe.clock import Clock, TimePart

_LONG_PARTS = (TimePart.COMPILE, TimePart.SAVE, TimePart.EVALUATION)
_ALLOWANCE = 4
"""How many times longer those may take."""
_REPORT_SECONDS = 60.0
"""Until the process is ended even if reporting hangs too: its disk, its stderr, the other processes."""


class Watchdog:
    """Watches a run, in a thread, until the context is left. Each process of a run has its own."""

    def __init__(
        self,
        clock: Clock,
        minutes: float | None,
        report: Callable[[MachineError], None],
        end_process: Callable[[int], None] = os._exit,
    ):
        """minutes: `training.watchdog_minutes`. report: called with the error before the process ends, in the
        watchdog's thread."""
        self._clock, self._minutes, self._report, self._end_process = clock, minutes, report, end_process
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._minutes is not None:
            threading.Thread(target=self._watch, args=[60 * self._minutes], daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self, limit: float) -> None:
        poll = min(1.0, limit / 10)
        position, waited, last = self._clock.position, 0.0, time.monotonic()
        while not self._over.wait(poll):
            now, present = time.monotonic(), self._clock.position
            waited = waited + min(now - last, 2 * poll) if present == position else 0.0
            position, last = present, now
            part, _ = present
            if waited > limit * (_ALLOWANCE if part in _LONG_PARTS else 1):
                self._end(part, waited)
                return

    def _end(self, part: TimePart, waited: float) -> None:
        threading.Thread(target=self._end_in_any_case, daemon=True).start()
        error = MachineError(
            f"The run hangs: it has been in one part of a step, {part.value}, for {waited / 60:.3g} minutes. The "
            "stacks of all threads show where. Run the same command to resume; if it may take so long, raise "
            f"training.watchdog_minutes={self._minutes:g}"
        )
        report_error(f"error: {error}")
        print_stacks()
        self._report(error)
        self._end_process(MachineError.code)

    def _end_in_any_case(self) -> None:
        time.sleep(_REPORT_SECONDS)
        self._end_process(MachineError.code)
