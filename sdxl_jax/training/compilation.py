"""The step of every bucket, compiled before it is needed: a program for each shape, each of which takes minutes.

    order of need ── threads ── trace, lower, compile (or read from the cache) ── steps.of(bucket)

All processes compile the same programs in the same order, which is that of the data. What is compiled so is what `jax.jit`
would have compiled when called, bit for bit. Compiled programs come back from the persistent cache, if there is one;
what `sdxl-jax compile` made for such a machine is read from beside it.

A thread that compiles cannot be stopped, and a Python that ends meanwhile aborts. So its end waits for the compiler, a
minute at most; a program that must end in time, as the command line does, ends with `leave`.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax.config import CompileAhead
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, out_of_memory
from sdxl_jax.files.paths import local
from sdxl_jax.training.programs import Programs

_LOOKED_AHEAD = 100_000
"""Steps whose buckets are looked up, about a second's work: a bucket that none of them has is compiled last."""
_PATIENCE = 0.2
"""Seconds between looks at whether a program is there."""
_PATIENCE_AT_EXIT = 60.0
"""Seconds that the end of Python waits for the compiler."""
_MAPPINGS_TAKEN = 0.9
"""Share of the memory mappings that Linux allows a process; after it no further program is compiled for a CPU."""

REMEDIES = (
    "To need less memory: raise mesh.fsdp, set compute.remat to dots, then block, raise optimiser.accumulate, lower "
    "data.batch_size, store ema.dtype or optimiser.first_moment as bfloat16"
)


def explained(program: str, error: BaseException) -> BaseException:
    """What the compiler raised, as an InputError where it is about the configuration: an option that it does not know,
    or a program that does not fit into the memory."""
    lines = str(error).splitlines() or [""]
    if "No such compile option" in lines[0] or "into flag" in lines[0]:
        return InputError(f"compute.compiler_options: {lines[0]}. They are XLA's flags, in their spelling: NAME=VALUE")
    if (line := out_of_memory(error)) is None:
        return error
    return InputError(f"{program} does not fit: {line}. {REMEDIES}")


def check_mappings(proc: Path = Path("/proc")) -> None:
    """Raises InputError when too few memory mappings are left to compile another program for a CPU: each takes about
    two thousand, and XLA ends the process with a segmentation fault when there are none. Linux only."""
    try:
        limit = int((proc / "sys/vm/max_map_count").read_text())
        taken = (proc / "self/maps").read_bytes().count(b"\n")
    except OSError:
        return
    if taken > _MAPPINGS_TAKEN * limit:
        raise InputError(
            f"This process has {taken} memory mappings of the {limit} that Linux allows, and each further program for "
            f"a CPU takes thousands. Raise the limit, sysctl -w vm.max_map_count={16 * limit}, or train fewer buckets"
        )


def use_cache(folder: str | Path) -> None:
    """Keeps every program that this process compiles from now on in a folder, or reads it from there. It may be shared
    by runs and processes. Raises InputError for a bucket's URL."""
    local(folder, "training.compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # or the folder of before is kept


def order_of_need(dataset: BucketedDataset, first: int, stop: int) -> dict[Bucket, int]:
    """The buckets of the steps `first` to `stop` − 1 (from 0), in the order of their first use, with the images of a
    batch over all processes."""
    all_buckets = {bucket.size: bucket.batch_size for bucket in dataset.report() if bucket.batches}
    found = dict[Bucket, int]()
    last = min(stop, first + _LOOKED_AHEAD)
    for step in range(first, last):
        bucket = dataset.bucket_of(step)
        found[bucket] = all_buckets[bucket]
        if len(found) == len(all_buckets):
            break
    return found if last == stop else found | all_buckets


class CompiledSteps:
    """Programs by bucket, compiled in threads. A context manager: leaving it begins no other program, and does not wait
    for those that are being compiled."""

    def __init__(
        self,
        step: Any,
        arguments: Mapping[Bucket, tuple[Any, ...]],
        mesh: Mesh,
        ahead: CompileAhead = CompileAhead.BACKGROUND,
        threads: int = 1,
        made_ahead: Programs | None = None,
        then: Callable[[Bucket], None] | None = None,
    ):
        """step: what `jax.jit` returned. arguments: for each bucket the abstract arguments, in the order of need.
        threads: programs compiled at once; each takes cores and, for large models, many GiB of this process's memory.
        made_ahead: where programs compiled on another machine may lie. then: what a thread does after each program,
        which may be in use by then."""
        self._step, self._arguments, self._mesh, self._made_ahead = step, arguments, mesh, made_ahead
        self._then = then
        self._before = ahead is CompileAhead.BEFORE
        self._changed = threading.Condition()  # guards what follows
        self._to_do = [] if ahead is CompileAhead.ON_DEMAND else list(arguments)
        self._begun, self._closed = set[Bucket](), False
        self._programs = dict[Bucket, Callable[..., Any]]()
        self._error: BaseException | None = None
        for number in range(min(threads, len(arguments))):
            threading.Thread(target=self._work, name=f"compile-{number}", daemon=True).start()

    def __enter__(self) -> "CompiledSteps":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def progress(self) -> tuple[int, int]:
        """(programs that are there, programs that the run needs)."""
        return len(self._programs), len(self._arguments)

    def ready(self, bucket: Bucket) -> bool:
        """Whether `of` would return at once."""
        return len(self._programs) == len(self._arguments) if self._before else bucket in self._programs

    def of(self, bucket: Bucket, waiting: Callable[[], None] = lambda: None) -> Callable[..., Any]:
        """The program of one bucket, waited for if need be; all of them, where they are compiled before training.

        waiting: called several times a second meanwhile; what it raises ends the waiting. Raises, with its traceback,
        what compiling any of the programs has raised, unless this one is there.
        """
        with self._changed:
            if bucket not in self._begun:  # it is needed now: before all others
                self._to_do = [bucket, *(other for other in self._to_do if other != bucket)]
                self._changed.notify_all()
        while not self.ready(bucket):
            waiting()
            with self._changed:
                # In short turns, so that Python's signal handlers run.
                self._changed.wait_for(lambda: self._error is not None or self.ready(bucket), _PATIENCE)
                if self._error is not None:
                    raise self._error
        return self._programs[bucket]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._to_do)
                if self._closed:
                    return
                bucket = self._to_do.pop(0)
                self._begun.add(bucket)
            try:
                with _in_flight.counted(), jax.set_mesh(self._mesh):  # a mesh is a thread's own
                    program = self._program(bucket)
                    with self._changed:
                        self._programs[bucket] = program
                        self._changed.notify_all()
                    if self._then is not None:
                        self._then(bucket)
            except BaseException as problem:  # raised again where a program is asked for
                error = explained(f"the train step of {bucket.height}×{bucket.width}", problem)
                error.add_note(f"(while the step of the bucket {bucket.height}×{bucket.width} was compiled)")
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()

    def _program(self, bucket: Bucket) -> Callable[..., Any]:
        if jax.default_backend() == "cpu":
            check_mappings()
        lowered = self._step.lower(*self._arguments[bucket])
        if self._made_ahead is not None and self._made_ahead.folder.is_dir():
            try:
                if (made := self._made_ahead.read(lowered)) is not None:
                    return made
                there = self._made_ahead.count()
                why = f"is none of the {there} there (of another configuration, slice or version)"
            except Exception as error:  # whatever jax and the file system raise
                why = f"could not be read: {str(error).splitlines()[0]}"
            tqdm.write(f"  the step of {bucket.height}×{bucket.width} in {self._made_ahead.folder} {why}; compiling it")
        return lowered.compile()


class _InFlight:
    """How many threads of this process are compiling."""

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
            self._changed.wait_for(lambda: not self.count, _PATIENCE_AT_EXIT)


_in_flight = _InFlight()
atexit.register(_in_flight.wait)


def leave(code: int) -> None:
    """Ends the process at once if something is being compiled; returns otherwise. Python would abort: its thread comes
    back from the compiler to an interpreter that is gone."""
    if _in_flight.count:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
