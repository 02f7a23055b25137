"""The step of every bucket, compiled before it is needed: one program per shape, each of which takes minutes.

    order of need ── threads ── trace, lower, compile (or read from the cache) ── steps.of(bucket)

All processes need the same programs in the same order, the order of the data. A program is, bit for bit, what `jax.jit`
would have compiled when called. It is read from the persistent compilation cache if it is there, without tracing if its
trace is there too (`traces`), or from the AOT programs beside it (`programs`), which `sdxl-jax compile` wrote for such
a machine. Processes that see the same cache share the programs out: each compiles its part, and reads the others' when
they appear. A process that has waited for too long compiles for itself: nobody waits for ever for one that has failed.

On a CPU a program takes thousands of memory mappings, one or more for each of its kernels. When there are few left, the
programs that were not used for longest are dropped; they are read again when a step needs them.

A thread that compiles cannot be stopped, and a Python that exits meanwhile aborts. So the exit waits for the compiler,
a minute at most; a program that has to exit sooner, as the command line does, calls `leave`.
"""

import atexit
import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from jax.sharding import Mesh

from sdxl_jax.compilation.traces import Traces
from sdxl_jax.config import CompileAhead
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, out_of_memory
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
"""Share of the memory mappings that Linux allows a process, above which programs for a CPU make room for another."""
_PATIENCE_SECONDS = 60.0
"""Least time that a process, once its own programs are compiled, waits for the next one of another process."""

REMEDIES = (
    "To need less memory: raise mesh.fsdp, set compute.remat to dots, then block, raise optimiser.accumulate, lower "
    "data.batch_size, store ema.dtype or optimiser.first_moment as bfloat16, use smaller data.buckets. Beside an "
    "adapter or a new token: set adapter.base_dtype or textual_inversion.base_dtype to bfloat16, then int8; lower "
    "adapter.rank, and give fewer layers an adapter (adapter.layers, training.trainable)"
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
            f"a CPU takes thousands. Raise the limit (sysctl -w vm.max_map_count={16 * limit}), use fewer "
            "data.buckets, or a training.compilation_cache, from which programs are read again"
        )


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
        traces: Traces | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        """step: the jitted function. arguments: the abstract arguments of each bucket, in the order of need.
        threads: programs compiled at once; each takes cores and, for large models, many GiB of this process's memory.
        aot_programs: programs compiled on another machine, which are read instead. then: called by a thread after each
        of its programs, which may be in use by then. traces: of earlier starts and of other processes. share: (this
        process, processes) that compile in turn and read each other's programs; needs traces that all of them see."""
        self._step, self._arguments, self._mesh, self._aot_programs = step, arguments, mesh, aot_programs
        self._then, self._traces = then, traces
        self._before = ahead is CompileAhead.BEFORE
        self._position = {bucket: number for number, bucket in enumerate(arguments)}
        self._changed = threading.Condition()  # guards what follows
        process, processes = share
        waiting = [] if ahead is CompileAhead.ON_DEMAND else list(arguments)
        self._queue = [bucket for bucket in waiting if self._position[bucket] % processes == process]
        self._others = [bucket for bucket in waiting if self._position[bucket] % processes != process]
        self._started, self._closed = set[Bucket](), False
        self._programs, self._used = dict[Bucket, Any](), dict[Bucket, float]()
        self._compiled = set[Bucket]()
        """Also those that made room."""
        self._lowered_here = set[Bucket]()
        self._compiling, self._longest_seconds, self._changed_at = 0, 0.0, time.monotonic()
        self._error: BaseException | None = None
        for number in range(min(threads, len(arguments))):
            threading.Thread(target=self._compile_queue, name=f"compile-{number}", daemon=True).start()
        if traces is not None:
            threading.Thread(target=self._read_others, name="read-programs", daemon=True).start()

    def __enter__(self) -> "CompiledSteps":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def progress(self) -> tuple[int, int]:
        """(programs that are ready, programs that the run needs)."""
        return len(self._compiled), len(self._arguments)

    def ready(self, bucket: Bucket) -> bool:
        """Whether `of` would return at once."""
        return bucket in self._programs and (not self._before or len(self._compiled) == len(self._arguments))

    def of(self, bucket: Bucket, waiting: Callable[[], None] = lambda: None) -> _Program:
        """The program of one bucket. Waits until it is ready; with CompileAhead.BEFORE, until all are.

        waiting: called several times per second meanwhile; an exception in it ends the wait. Raises the error of any
        program's compilation, with its traceback, unless this program is ready.
        """
        while True:
            with self._changed:
                self._used[bucket] = time.monotonic()
                if self.ready(bucket):
                    return self._programs[bucket]
                self._need(bucket)
            waiting()
            with self._changed:
                # In short intervals, so that Python's signal handlers run.
                self._changed.wait_for(lambda: self._error is not None or self.ready(bucket), _POLL_SECONDS)
                if self._error is not None and not self.ready(bucket):
                    raise self._error

    def _need(self, bucket: Bucket) -> None:
        """It is needed now: to the front of its queue."""
        if bucket in self._others:
            self._others.remove(bucket)
            self._others.insert(0, bucket)
        elif bucket not in self._started:
            self._queue = [bucket, *(other for other in self._queue if other != bucket)]
            self._changed.notify_all()

    def _compile_queue(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                bucket = self._queue.pop(0)
                self._started.add(bucket)
                self._compiling += 1
            began = time.monotonic()
            self._compile(bucket)
            with self._changed:
                self._compiling -= 1
                self._longest_seconds = max(self._longest_seconds, time.monotonic() - began)

    def _read_others(self) -> None:
        """Reads other processes' programs as they appear; compiles them if none appears for too long. Before, every
        second program of an earlier start: reading takes little memory, so it need not be done one at a time."""
        assert self._traces is not None
        with self._changed:
            queue = list(self._queue)
        known = [bucket for bucket in queue if self._traces.exists(self._arguments[bucket])][1::2]
        with self._changed:
            known = [bucket for bucket in known if bucket in self._queue]
            self._queue = [bucket for bucket in self._queue if bucket not in known]
            self._others = sorted([*known, *self._others], key=lambda bucket: self._position[bucket])
        while True:
            with self._changed:
                others, closed = list(self._others), self._closed
            if closed or not others:
                return
            ready = [bucket for bucket in others if self._traces.exists(self._arguments[bucket])]
            if ready or self._waited_enough():
                bucket = ready[0] if ready else others[0]
                with self._changed:
                    self._others.remove(bucket)
                    self._started.add(bucket)
                self._compile(bucket)
            else:
                time.sleep(_POLL_SECONDS)

    def _waited_enough(self) -> bool:
        """Whether this process has had nothing of its own to do for longer than another needs for one program."""
        with self._changed:
            busy = self._compiling or self._queue
            patience = max(_PATIENCE_SECONDS, 3 * self._longest_seconds)
            return not busy and time.monotonic() - self._changed_at > patience

    def _compile(self, bucket: Bucket) -> None:
        try:
            with _in_flight.counted(), jax.set_mesh(self._mesh):  # a thread-local setting
                if jax.default_backend() == "cpu":
                    self._make_room()
                program = self._program(bucket)
                with self._changed:
                    self._programs[bucket] = program
                    self._compiled.add(bucket)
                    self._changed_at = time.monotonic()
                    self._changed.notify_all()
                if self._then is not None:
                    self._then(bucket)
        except BaseException as problem:  # raised again by `of`
            error = explained(f"the train step of {bucket.height}×{bucket.width}", problem)
            error.add_note(f"(while the step of the bucket {bucket.height}×{bucket.width} was compiled)")
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _make_room(self) -> None:
        """Drops programs until there are mappings for another: first what is needed last and was not used yet, then
        what was not used for longest. Raises InputError where they could not be read again."""
        while True:
            try:
                return check_mappings()
            except InputError:
                with self._changed:
                    newest = max(self._used, key=lambda bucket: self._used[bucket], default=None)
                    droppable = [bucket for bucket in self._programs if bucket != newest]
                    if self._traces is None or not droppable:
                        raise
                    bucket = min(droppable, key=lambda one: self._used.get(one, -self._position[one]))
                    del self._programs[bucket]
                    self._started.discard(bucket)
                if bucket in self._lowered_here:
                    self._lowered_here.discard(bucket)
                    jax.clear_caches()  # which keep what was compiled, but not what was read with its trace
                gc.collect()

    def _program(self, bucket: Bucket) -> Callable[..., Any]:
        arguments = self._arguments[bucket]
        aot = self._aot_programs if self._aot_programs is not None and self._aot_programs.folder.is_dir() else None
        if self._traces is not None and aot is None and (compiled := self._traces.read(arguments)) is not None:
            return compiled
        lowered = self._step.lower(*arguments)
        self._lowered_here.add(bucket)
        if aot is not None:
            try:
                if (compiled := aot.read(lowered)) is not None:
                    return compiled
                why = f"is not among the {aot.count()} programs (of another configuration, slice or version)"
            except Exception as error:  # whatever jax and the file system raise
                why = f"could not be read: {(str(error) or type(error).__name__).splitlines()[0]}"
            tqdm.write(f"  the step of {bucket.height}×{bucket.width} in {aot.folder} {why}; compiling it")
        if self._traces is None:
            return lowered.compile()
        with self._traces.recorded(arguments) as programs:
            programs.append(compiled := lowered.compile())
        return compiled


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
