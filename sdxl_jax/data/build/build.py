"""The implementation of `sdxl-jax data build SRC DST`: any source to a shard set, in parallel and resumable.

The source is cut into pieces (records.units), always the same ones. Worker processes take one piece at a time, write it
whole or not at all. When all pieces are complete, one process reads them in order and writes the index. `shards.json`
is written last: a folder without it is not finished. So

- a build that was killed, at any moment, resumes with the missing pieces when the same command runs again;
- the shard set depends on the source alone, byte for byte: not on the number of workers, nor on interruptions;
- memory holds the captions of one piece per worker, and the columns of one piece at the end; finding duplicates takes
  64 bytes per image, for 4 million images at a time, or for a sixteenth of all images where that is more.

Not here: the files of a shard set (shards, shard_writing), and where and in which order they are written
(destinations); what a source holds and which images of it are refused (records); other machines (beam).
"""

import functools
import hashlib
import importlib.util
import io
import itertools
import math
import multiprocessing
import multiprocessing.connection
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_jax import processors
from sdxl_jax.data.build.destinations import (
    RESUME,
    Destination,
    NothingUsable,
    Read,
    at,
    check_same,
    complete,
    refuse_folder,
)
from sdxl_jax.data.build.records import Unit, check_caption_lines, check_class_folders, read, units
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.processes import end_with_parent
from sdxl_jax.data.shards import FORMAT
from sdxl_jax.errors import InputError, MachineError, check_ranges, fault
from sdxl_jax.files.paths import AnyPath, located
from sdxl_jax.progress import tqdm


class Built(NamedTuple):
    """What a finished shard set holds."""

    images: int
    """In the index: without duplicates where they were dropped."""
    captions: int
    refused: int
    """Entries of the source that were left out; refused.jsonl names them."""
    duplicates: int
    """Images whose bytes an earlier one has too, dropped or not."""
    bytes: int
    """Of the shards' files; the bytes of dropped duplicates stay in them."""
    was_finished: bool = False
    """The shard set was complete already, and nothing was done."""


class _Stopped(Exception):
    """Raised in a worker to end it, since another process failed."""


class _Shared(NamedTuple):
    """Shared memory between the worker processes and the parent."""

    images: Any
    """A shared integer with a lock: images written so far, also of unfinished pieces."""
    stop: Any
    """A shared integer: 1 when all workers are to stop."""


_shared: _Shared | None = None  # of a worker process


def _worker_starts(shared: _Shared) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent stops us
    end_with_parent()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside never receive SIGINT, not even before `_worker_starts`; here it is pending until the
    end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_counts(images: int) -> None:
    assert _shared is not None
    with _shared.images.get_lock():
        _shared.images.value += images
    if _shared.stop.value:
        raise _Stopped


def _in_worker(read: Read, unit: Unit, destination: Destination, origin: Path | None) -> None:
    destination.write(read, unit, origin, _worker_counts)


def _write_parts(
    read: Read, missing: list[Unit], destination: Destination, origin: Path | None, workers: int, bar: tqdm
) -> None:
    if not workers:
        for unit in missing:
            destination.write(read, unit, origin, bar.update)
        return
    context = multiprocessing.get_context("spawn")  # threads of this process, jax's among them, do not survive a fork
    shared = _Shared(context.Value("q", 0), context.RawValue("b", 0))

    def update_bar() -> None:
        bar.update(shared.images.value - shown[0])
        shown[0] = shared.images.value

    shown, waiting, running = [0], iter(missing), set[Future[None]]()
    with ProcessPoolExecutor(min(workers, len(missing)) or 1, context, _worker_starts, (shared,)) as pool:
        try:
            while True:
                with _without_interrupts():
                    for unit in itertools.islice(waiting, 2 * workers - len(running)):
                        running.add(pool.submit(_in_worker, read, unit, destination, origin))
                if not running:
                    return
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                update_bar()
                for future in done:
                    future.result()
        except BrokenProcessPool as problem:
            raise MachineError(
                f"A worker process died, as when memory runs out. Use fewer than {workers} workers (--workers). "
                f'{RESUME}. In a script, call build() below `if __name__ == "__main__":`, since the workers import it'
            ) from problem
        finally:
            shared.stop.value = 1
            pool.shutdown(cancel_futures=True)


def _identity(all_units: list[Unit]) -> str:
    """A hash of the pieces: the same for the same source in another process."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=5)
    pickler.fast = True  # no memo: two equal objects are written as the same object twice is
    pickler.dump([tuple(unit) for unit in all_units])
    return hashlib.blake2b(stream.getbuffer(), digest_size=16).hexdigest()


def _write_missing(
    destination: Destination, options: dict[str, Any], pieces: list[Unit], read: Read, workers: int, hide: bool | None
) -> None:
    """Reads and writes the pieces that are not there yet."""
    done = destination.finished()
    missing = [unit for unit in pieces if unit.number not in done]
    with tqdm(desc="Writing shards", unit=" images", initial=destination.images(), disable=hide) as bar:
        _write_parts(read, missing, destination, _origin(options["source"]), workers, bar)


def _origin(source: str) -> Path | None:
    """The source, where it is a folder or file of this machine."""
    return Path(source) if Path(source).exists() else None


def _in_pipeline(
    destination: Destination, options: dict[str, Any], pieces: list[Unit], read: Read, arguments: Sequence[str]
) -> dict[str, Any]:
    """As `beam.run`. Raises InputError where Apache Beam is missing."""
    if importlib.util.find_spec("apache_beam") is None:
        raise InputError(
            "--runner beam needs the package apache-beam, which is not installed. Install it with pip install "
            "'sdxl_jax[beam]', on the workers too"
        )
    from sdxl_jax.data.build import beam

    return beam.run(destination, options, pieces, read, _origin(options["source"]), arguments)


def _build(
    source: str,
    destination: AnyPath,
    units: Callable[[str], list[Unit]],
    read: Read,
    *,
    workers: int | None,
    drop_duplicates: bool,
    progress: bool,
    caption_lines: CaptionLines = CaptionLines.LINES,
    pipeline: Sequence[str] | None = None,
    more: dict[str, Any] | None = None,
) -> Built:
    to, hide = at(located(destination, "the destination")), None if progress else True
    if workers is None:
        workers = processors.usable()
    check_ranges([("workers", workers, 0, math.inf)])
    options: dict[str, Any] = {
        "format": FORMAT,
        "source": source.rstrip("/") or source,
        "drop_duplicates": drop_duplicates,
        "caption_lines": caption_lines.value,
        **(more or {}),
    }
    described = to.description()
    if finished := described is not None:
        check_same(to.path, described, options, "a finished")
        with to.only_builder():
            to.clean()
    else:
        pieces = units(source)
        assert [unit.number for unit in pieces] == list(range(len(pieces)))
        options["pieces"] = _identity(pieces)
        try:
            with to.only_builder():
                to.begin(options)
                try:
                    if pipeline is None:
                        _write_missing(to, options, pieces, read, workers, hide)
                        described = complete(to, options, len(pieces), hide)
                    else:
                        described = _in_pipeline(to, options, pieces, read, pipeline)
                except NothingUsable:
                    to.clean()
                    raise
        except FileExistsError as problem:
            raise refuse_folder(to.path) from problem
        except OSError as problem:  # what the source raises is an InputError already
            raise fault(problem)(
                f"Cannot write to {to.path} ({problem}). Free space on that disk, or make the folder writable. {RESUME}"
            ) from problem
    return Built(*(described[name] for name in Built._fields[:-1]), was_finished=finished)


def build(
    source: str,
    destination: AnyPath,
    *,
    workers: int | None = None,
    drop_duplicates: bool = False,
    progress: bool = True,
    caption_lines: CaptionLines = CaptionLines.LINES,
    captions: bool = True,
    class_folders: bool = False,
    pipeline: Sequence[str] | None = None,
) -> Built:
    """Builds the shard set `destination` from a source, or resumes an interrupted build; `open_shards` opens it.

    Args:
        source: what `records.units` takes: a folder, tars, Parquet files, a TFDS name.
        destination: a new or an empty folder, local or in a bucket, or one in which the same build was interrupted.
        workers: processes that read the source, None for as many as there are cores; 0 reads in this process.
        drop_duplicates: leave images out of the index that have the bytes of an earlier one; else they are only
            counted.
        progress: a progress bar at a terminal, with images and images per second.
        caption_lines: what the lines of a `.txt` beside an image are.
        captions: whether images need one; False: captions are not read, and every image has "", for models without
            text and autoencoders.
        class_folders: number the subfolders of a folder of images as classes, the numeric field "folder".
        pipeline: options of an Apache Beam pipeline, whose workers then read the source, in place of `workers`.

    Where the shard set is complete already, nothing is done, the source is not read, and `was_finished` is True.

    Raises InputError: a source that cannot be used, disappears, or has no usable image; a destination that holds
    another build or other files, or that is not writable; caption_lines where the source has no `.txt` captions; a
    pipeline without Apache Beam.
    MachineError: another process builds there; a full disk, or one that fails; a worker that died.
    """

    def checked_units(source: str) -> list[Unit]:
        pieces = units(source, captioned=captions, class_folders=class_folders)
        check_caption_lines(source, pieces, caption_lines)
        if class_folders:
            check_class_folders(source, pieces)
        return pieces

    if not captions and caption_lines is not CaptionLines.LINES:
        raise InputError(
            f"--caption-lines {caption_lines.value} has no effect with --no-captions. Leave out one of them"
        )
    # Those at their defaults are not described, as in the builds before they were added.
    more = ({} if captions else {"captioned": False}) | ({"class_folders": True} if class_folders else {})
    return _build(
        source,
        destination,
        checked_units,
        functools.partial(read, caption_lines=caption_lines if captions else None),
        workers=workers,
        drop_duplicates=drop_duplicates,
        progress=progress,
        caption_lines=caption_lines,
        pipeline=pipeline,
        more=more,
    )
