"""The step of every bucket, compiled before it is needed: one program per shape, each of which takes minutes.

    order of need ── threads ── trace, lower, compile (or read from the cache) ── steps.of(bucket)

All processes compile the same programs in the same order, the order in which the data needs them. A program is, bit for
bit, what `jax.jit` would have compiled when called. It is read from the persistent compilation cache if it is there, or
from the AOT programs beside it (`programs`), which `sdxl-jax compile` wrote for such a machine.

A thread that compiles cannot be stopped, and a Python that exits meanwhile aborts. So the exit waits for the compiler,
a minute at most; a program that has to exit sooner, as the command line does, calls `leave`.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Generic, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from sdxl_jax.config import CompileAhead
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, out_of_memory
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import full, in_bucket, located
from sdxl_jax.progress import tqdm
from sdxl_jax.training.programs import Programs

_Program = TypeVar("_Program", bound=Callable[..., Any])

_LOOKAHEAD_STEPS = 100_000
"""Steps whose buckets are looked up, about a second's work: a bucket that none of them needs is compiled last."""
_POLL_SECONDS = 0.2
"""Between two checks whether a program is ready."""
_EXIT_TIMEOUT_SECONDS = 60.0
"""How long the exit of Python waits for the compiler."""
_MAPPINGS_LIMIT = 0.9
"""Share of the memory mappings that Linux allows a process, above which no further program is compiled for a CPU."""

REMEDIES = (
    "To need less memory: raise mesh.fsdp, set compute.remat to dots, then block, raise optimiser.accumulate, lower "
    "data.batch_size, store ema.dtype or optimiser.first_moment as bfloat16"
)


def explained(program: str, error: BaseException) -> BaseException:
    """The compiler's error, as an InputError if the configuration is at fault: an unknown compiler option, or a program
    that does not fit into memory."""
    lines = str(error).splitlines() or [""]
    if "No such compile option" in lines[0] or "into flag" in lines[0]:
        return InputError(
            f"compute.compiler_options: {lines[0].rstrip('.')}. Give XLA's flags in its spelling: NAME=VALUE"
        )
    if (line := out_of_memory(error)) is None:
        return error
    return InputError(f"{program} does not fit: {line}. {REMEDIES}")


def check_mappings(proc: Path = Path("/proc")) -> None:
    """Raises InputError when too few memory mappings are left to compile another program for a CPU: each takes about
    two thousand, and without any left XLA ends the process with a segmentation fault. Linux only."""
    try:
        limit = int((proc / "sys/vm/max_map_count").read_text())
        used = (proc / "self/maps").read_bytes().count(b"\n")
    except OSError:
        return
    if used > _MAPPINGS_LIMIT * limit:
        raise InputError(
            f"This process has {used} memory mappings of the {limit} that Linux allows, and each further program for "
            f"a CPU takes thousands. Raise the limit (sysctl -w vm.max_map_count={16 * limit}), or use fewer "
            "data.buckets"
        )


def use_cache(folder: str | PurePath) -> None:
    """Sets jax's persistent compilation cache: programs are read from the folder, local or in a bucket, or compiled and
    written there. Runs and processes may share it. Raises InputError for a bucket that may not be written to,
    MachineError for one that does not answer."""
    path = located(folder, "the compilation cache")
    if in_bucket(path):
        buckets.check_writable(path, "the compilation cache")
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own are for local folders
    jax.config.update("jax_compilation_cache_dir", full(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # or jax keeps using the previous folder


def order_of_need(dataset: BucketedDataset, first: int, stop: int) -> dict[Bucket, int]:
    """The buckets of the steps `first` to `stop` − 1 (from 0), in the order of their first use, each with its batch
    size over all processes."""
    all_buckets = {bucket.size: bucket.batch_size for bucket in dataset.report() if bucket.batches}
    needed = dict[Bucket, int]()
    last = min(stop, first + _LOOKAHEAD_STEPS)
    for step in range(first, last):
        bucket = dataset.bucket_of(step)
        needed[bucket] = all_buckets[bucket]
        if len(needed) == len(all_buckets):
            break
    return needed if last == stop else needed | all_buckets


class CompiledSteps(Generic[_Program]):
    """Programs by bucket, compiled in background threads. A context manager: after it is left, no further program is
    started; those being compiled are not waited for."""

    def __init__(
        self,
        step: Any,
        arguments: Mapping[Bucket, tuple[Any, ...]],
        mesh: Mesh,
        ahead: CompileAhead = CompileAhead.BACKGROUND,
        threads: int = 1,
        aot_programs: Programs | None = None,
        then: Callable[[Bucket], None] | None = None,
    ):
        """step: the jitted function. arguments: the abstract arguments of each bucket, in the order of need.
        threads: programs compiled at once; each takes cores and, for large models, many GiB of this process's memory.
        aot_programs: programs compiled on another machine, which are read instead. then: called by a thread after each
        of its programs, which may be in use by then."""
        self._step, self._arguments, self._mesh, self._aot_programs = step, arguments, mesh, aot_programs
        self._then = then
        self._before = ahead is CompileAhead.BEFORE
        self._changed = threading.Condition()  # guards what follows
        self._queue = [] if ahead is CompileAhead.ON_DEMAND else list(arguments)
        self._started, self._closed = set[Bucket](), False
        self._programs = dict[Bucket, Any]()
        self._error: BaseException | None = None
        for number in range(min(threads, len(arguments))):
            threading.Thread(target=self._compile_queue, name=f"compile-{number}", daemon=True).start()

    def __enter__(self) -> "CompiledSteps":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def progress(self) -> tuple[int, int]:
        """(programs that are ready, programs that the run needs)."""
        return len(self._programs), len(self._arguments)

    def ready(self, bucket: Bucket) -> bool:
        """Whether `of` would return at once."""
        return len(self._programs) == len(self._arguments) if self._before else bucket in self._programs

    def of(self, bucket: Bucket, waiting: Callable[[], None] = lambda: None) -> _Program:
        """The program of one bucket. Waits until it is ready; with CompileAhead.BEFORE, until all are.

        waiting: called several times per second meanwhile; an exception in it ends the wait. Raises the error of any
        program's compilation, with its traceback, unless this program is ready.
        """
        with self._changed:
            if bucket not in self._started:  # it is needed now: to the front of the queue
                self._queue = [bucket, *(other for other in self._queue if other != bucket)]
                self._changed.notify_all()
        while not self.ready(bucket):
            waiting()
            with self._changed:
                # In short intervals, so that Python's signal handlers run.
                self._changed.wait_for(lambda: self._error is not None or self.ready(bucket), _POLL_SECONDS)
                if self._error is not None:
                    raise self._error
        return self._programs[bucket]

    def _compile_queue(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                bucket = self._queue.pop(0)
                self._started.add(bucket)
            try:
                with _in_flight.counted(), jax.set_mesh(self._mesh):  # a thread-local setting
                    program = self._program(bucket)
                    with self._changed:
                        self._programs[bucket] = program
                        self._changed.notify_all()
                    if self._then is not None:
                        self._then(bucket)
            except BaseException as problem:  # raised again by `of`
                error = explained(f"the train step of {bucket.height}×{bucket.width}", problem)
                error.add_note(f"(while the step of the bucket {bucket.height}×{bucket.width} was compiled)")
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()

    def _program(self, bucket: Bucket) -> Callable[..., Any]:
        if jax.default_backend() == "cpu":
            check_mappings()
        lowered = self._step.lower(*self._arguments[bucket])
        if (aot := self._aot_programs) is not None and aot.folder.is_dir():
            try:
                if (compiled := aot.read(lowered)) is not None:
                    return compiled
                why = f"is not among the {aot.count()} programs (of another configuration, slice or version)"
            except Exception as error:  # whatever jax and the file system raise
                why = f"could not be read: {(str(error) or type(error).__name__).splitlines()[0]}"
            tqdm.write(f"  the step of {bucket.height}×{bucket.width} in {aot.folder} {why}; compiling it")
        return lowered.compile()


class _InFlight:
    """The number of threads of this process that are compiling."""

    def __init__(self) -> None:
        self.count, self._changed = 0, threading.Condition()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._changed:
            self.count += 1
        try:
            yield
        finally:
            with self._changed:
                self.count -= 1
                self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.count, _EXIT_TIMEOUT_SECONDS)


_in_flight = _InFlight()
atexit.register(_in_flight.wait)


def leave(code: int) -> None:
    """Exits at once if something is being compiled; returns otherwise. Python would abort: the thread would return from
    the compiler to an interpreter that is finalised."""
    if _in_flight.count:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
