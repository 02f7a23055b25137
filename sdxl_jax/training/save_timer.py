"""Checkpoints by time: decides when `checkpoint.every_minutes` have passed since the last one.

Several processes save after the same step, but their clocks differ: the first one decides. They ask it at steps about
10 s apart, for which they wait for each other; between those, and with one process, nobody waits.
"""

import json
import time
from collections.abc import Callable

from sdxl_jax.training.processes import Processes

_SECONDS_BETWEEN_QUESTIONS = 10.0


class SaveTimer:
    """minutes: `checkpoint.every_minutes`; None: never due."""

    def __init__(self, minutes: float | None, processes: Processes, now: Callable[[], float] = time.monotonic):
        self._seconds = None if minutes is None else 60 * minutes
        self._processes, self._now = processes, now
        self._started = self._asked = now()
        self._asked_after, self._ask_after, self._steps_between = 0, 0, 1

    def restart(self) -> None:
        """A checkpoint is about to be written."""
        self._started = self._now()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. All processes call it after every step."""
        if self._seconds is None or step < self._ask_after:
            return False
        is_due = self._now() >= self._started + self._seconds
        if self._processes.count == 1:
            return is_due
        answer = json.dumps([is_due, self._steps_until_next(step, self._seconds)])
        # All get the answer or none: what follows is a save by all.
        is_due, steps = json.loads(self._processes.gather(answer, stops=False)[0])
        self._ask_after = step + steps
        return is_due

    def _steps_until_next(self, step: int, seconds: float) -> int:
        """Steps in about 10 s, or a tenth of the interval if that is shorter; at most twice as many as last time, since
        the first steps are dispatched faster than they are computed."""
        now = self._now()
        step_seconds = (now - self._asked) / max(step - self._asked_after, 1)
        wanted = min(_SECONDS_BETWEEN_QUESTIONS, seconds / 10) / max(step_seconds, 1e-6)
        self._steps_between = int(min(max(wanted, 1), 2 * self._steps_between))
        self._asked, self._asked_after = now, step
        return self._steps_between
