"""`--profile FIRST:LAST`: a trace of some steps in RUN/profile, which xprof shows (`xprof --logdir RUN/profile`, or
TensorBoard with its profile plugin). What is learnt is the same with it and without; the steps are a little slower.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from sdxl_jax.errors import InputError


class Profile:
    """Traces steps. A context manager: leaving it ends a trace that is not finished."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        """steps: the first and the last, as metrics.jsonl numbers them; None: no trace."""
        self._folder, self._steps = folder, steps
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def step(self, step: int, settle: Callable[[], None]) -> contextlib.AbstractContextManager[object]:
        """To be entered around a step. settle: waits until the devices have done what was started, so that the trace
        has whole steps and no others."""
        if self._steps is None:
            return contextlib.nullcontext()
        return self._traced(step, settle)

    @contextlib.contextmanager
    def _traced(self, step: int, settle: Callable[[], None]) -> Iterator[None]:
        assert self._steps is not None
        first, last = self._steps
        if step == first:
            settle()
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == last and self._running:
            settle()
            jax.profiler.stop_trace()
            self._running = False


def breaks() -> bool:
    """Whether a trace would end the process: jax 0.10.2 with libtpu 0.0.52 beside it does so without a TPU."""
    return importlib.util.find_spec("libtpu") is not None and jax.default_backend() != "tpu"


def check(steps: tuple[int, int] | None, first: int, stop: int) -> tuple[int, int] | None:
    """The steps, if they are among those that a run is about to make, first + 1 to stop. None, and said, where an
    earlier start has made the first of them: the same command goes on. Raises InputError otherwise."""
    if steps is None:
        return None
    begin, end = steps
    if 1 <= begin <= min(first, end):
        tqdm.write(f"  --profile {begin}:{end}: an earlier start has made step {begin}; nothing is traced")
        return None
    if not first < begin <= end <= stop:
        raise InputError(
            f"--profile {begin}:{end}: this start makes the steps {first + 1} to {stop}. Give FIRST:LAST among "
            f"them, e.g. {min(first + 10, stop)}:{min(first + 14, stop)}"
        )
    if breaks():
        raise InputError(
            f"--profile would end this process: libtpu is installed, and this is a {jax.default_backend()}, where "
            "jax's profiler then fails. Do: pip uninstall libtpu (the extra aot brings it), or leave --profile out"
        )
    return steps
