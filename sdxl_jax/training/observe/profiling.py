"""`--profile FIRST:LAST`: a profiler trace of some steps in RUN/profile, to be viewed with xprof (`xprof --logdir
RUN/profile`) or TensorBoard's profile plugin. Tracing changes no result; the traced steps are a little slower.
"""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from sdxl_jax.errors import InputError
from sdxl_jax.progress import tqdm


class Profile:
    """Traces steps. A context manager: leaving it stops an unfinished trace."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        """steps: the first and the last, numbered as in metrics.jsonl; None: no trace."""
        self._folder, self._steps = folder, steps
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def step(self, step: int, settle: Callable[[], None]) -> contextlib.AbstractContextManager[object]:
        """The context to run a step in. settle: waits until the devices have finished all dispatched work, so that the
        trace contains exactly these steps."""
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


_HARMLESS = "0.0.42"
_MAPS = Path("/proc/self/maps")


def crashes() -> bool:
    """Whether tracing would crash the process. It does if jax has loaded libtpu and found no TPU: seen with jax 0.10.2
    and libtpu 0.0.50 and 0.0.52, not with 0.0.42. JAX_PLATFORMS=cpu, or cuda, keeps jax from loading it."""
    if importlib.util.find_spec("libtpu") is None or jax.default_backend() == "tpu":
        return False
    if _MAPS.exists() and "libtpu.so" not in _MAPS.read_text():
        return False
    try:
        return not importlib.metadata.version("libtpu").startswith(_HARMLESS)
    except importlib.metadata.PackageNotFoundError:
        return True


def check(steps: tuple[int, int] | None, first: int, stop: int) -> tuple[int, int] | None:
    """The steps to trace, if this start will run them: it runs first + 1 to stop. None, with a note, if an earlier
    start has run the first of them, so that the same command resumes. Raises InputError otherwise."""
    if steps is None:
        return None
    begin, end = steps
    if 1 <= begin <= min(first, end):
        tqdm.write(f"  --profile {begin}:{end}: an earlier start has run step {begin}; nothing is traced")
        return None
    if not first < begin <= end <= stop:
        raise InputError(
            f"--profile {begin}:{end} is out of range: this start runs the steps {first + 1} to {stop}. Give "
            f"FIRST:LAST among them, e.g. {min(first + 10, stop)}:{min(first + 14, stop)}"
        )
    if crashes():
        raise InputError(
            f"--profile {begin}:{end} would crash this process: libtpu is installed, and the backend is "
            f"{jax.default_backend()}, where jax's profiler then fails. Set the environment variable JAX_PLATFORMS to "
            "cpu, or to cuda on NVIDIA GPUs, so that jax does not load it, or leave out --profile"
        )
    return steps
