"""The implementation of `sdxl-jax data build SRC DST`: any source to a shard set, in parallel and resumable.

The source is cut into pieces (records.units), always the same ones. Worker processes take one piece at a time, write it
to `DST/parts/NNNNN.partial`, and rename that when it is complete on the disk. When all pieces are complete, one process
reads them in order, writes the index, and moves the shards to their place. `shards.json` is written last: a folder
without it is not finished. So

- a build that was killed, at any moment, resumes with the missing pieces when the same command runs again;
- the shard set depends on the source alone, byte for byte: not on the number of workers, nor on interruptions;
- memory holds the captions of one piece per worker, and the columns of one piece at the end; finding duplicates takes
  64 bytes per image, for 4 million images at a time, or for a sixteenth of all images where that is more.

`build.json`, which exists until the build is complete, records the source and the options: a build with others is
refused.

Not here: the files of a shard set (shards, shard_writing), what a source holds and which images of it are refused
(records).
"""

import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sdxl_jax.data.build.records import Record, Unit, check_caption_lines, read, units
from sdxl_jax.data.build.shard_writing import FinishedPart, IndexWriter, PartWriter, select, write_json
from sdxl_jax.data.captions import CaptionLines, check_number_names
from sdxl_jax.data.processes import end_with_parent
from sdxl_jax.data.shards import DESCRIPTION, FORMAT, REFUSED, SHARDS, UNFINISHED, read_description, shard_path
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError, MachineError, check_ranges, fault
from sdxl_jax.files.atomic import PARTIAL, partial_path, sync
from sdxl_jax.files.locks import Busy, locked_folder
from sdxl_jax.files.paths import local
from sdxl_jax.progress import tqdm

_RESUME = "Then run the same command again: it resumes, and no finished piece is lost"
_PARTS = "parts"
_COUNT_EVERY = 16  # images between two updates of the shared counter
_BLOCK = 1 << 20  # hashes compared at a time

Read = Callable[[Unit], Iterator[Record | Refused]]


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


def _in_worker(read: Read, unit: Unit, parts: Path, origin: Path | None) -> None:
    _write_part(read, unit, parts, origin, _worker_counts)


def _guarded(read: Read, unit: Unit) -> Iterator[Record | Refused]:
    """read(unit), with errors of the source as InputError or MachineError, apart from OSError of the destination."""
    try:
        yield from read(unit)
    except OSError as problem:
        raise fault(problem)(
            f"The source can no longer be read, at {unit.name} ({problem}). Restore it. {_RESUME}"
        ) from problem


def _write_part(read: Read, unit: Unit, parts: Path, origin: Path | None, count: Callable[[int], Any]) -> None:
    """Writes one piece, whole or not at all; `count` receives the number of images since its last call."""
    final = parts / f"{unit.number:05d}"
    partial = partial_path(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    counted = 0
    with PartWriter(partial) as writer:
        for item in _guarded(read, unit):
            if isinstance(item, Refused):
                writer.refuse(item)
            else:
                writer.add(*item)
            if writer.images >= counted + _COUNT_EVERY:
                count(writer.images - counted)
                counted = writer.images
        if origin is not None and not origin.exists():  # else all its files would count as refused
            raise InputError(f"The source {origin} disappeared while {unit.name} was read. Restore it. {_RESUME}")
        count(writer.images - counted)
        writer.finish()
    os.rename(partial, final)
    sync(parts)


def _write_parts(read: Read, missing: list[Unit], parts: Path, origin: Path | None, workers: int, bar: tqdm) -> None:
    if not workers:
        for unit in missing:
            _write_part(read, unit, parts, origin, bar.update)
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
                        running.add(pool.submit(_in_worker, read, unit, parts, origin))
                if not running:
                    return
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                update_bar()
                for future in done:
                    future.result()
        except BrokenProcessPool as problem:
            raise MachineError(
                f"A worker process died, as when memory runs out. Use fewer than {workers} workers (--workers). "
                f'{_RESUME}. In a script, call build() below `if __name__ == "__main__":`, since the workers import it'
            ) from problem
        finally:
            shared.stop.value = 1
            pool.shutdown(cancel_futures=True)


def find_duplicates(hashes: UInt8[np.ndarray, "images 16"]) -> Bool[np.ndarray, " images"]:
    """Which images are duplicates: an earlier image has the same hash. In bounded memory: `hashes` may be mapped from a
    file."""
    duplicates = np.zeros(len(hashes), bool)
    keys = hashes.view(np.uint64)
    rounds = min(16, -(-len(keys) // (4 * _BLOCK)))
    for part in range(rounds):  # equal hashes are in the same round
        rows = np.concatenate(
            [
                start + np.flatnonzero(keys[start : start + _BLOCK, 0] % rounds == part)
                for start in range(0, len(keys), _BLOCK)
            ]
        )
        row_keys = keys[rows]
        order = np.lexsort(row_keys.T)  # stable: the first of equal ones stays first
        row_keys = row_keys[order]
        duplicates[rows[order[1:][(row_keys[1:] == row_keys[:-1]).all(axis=1)]]] = True
    return duplicates


def _all_hashes(parts: list[FinishedPart], path: Path, images: int) -> UInt8[np.ndarray, "images 16"]:
    """The hashes of all parts in order, in a file."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part.hashes().tobytes())
    return np.memmap(path, np.uint8, "r", shape=(images, 16))


def _assemble(destination: Path, parts: list[FinishedPart], keep_all: bool, hide: bool | None) -> dict[str, Any]:
    """Writes the index and refused.jsonl, moves the shards, and returns their entries of shards.json. May be
    interrupted.

    keep_all: duplicates stay in the index. hide: no progress bar.
    """
    counts = [part.count() for part in parts]
    if not sum(counts):
        return {"images": 0}
    names = {name for part in parts for name in part.number_names()}
    check_number_names(names)
    duplicates = find_duplicates(_all_hashes(parts, destination / _PARTS / "hashes", sum(counts)))
    (destination / SHARDS).mkdir(exist_ok=True)
    start = total = refused = 0
    with IndexWriter(destination, sorted(names)) as index, (destination / REFUSED).open("wb") as refusals:
        listed = tqdm(zip(parts, counts, strict=True), "Writing the index", len(parts), delay=2, disable=hide)
        for shard, (part, count) in enumerate(listed):
            final, size = shard_path(destination, shard), 0
            if count:
                if part.records.exists():  # else it was moved before an interruption
                    os.rename(part.records, final)
                size = final.stat().st_size
            keep = ~duplicates[start : start + count] | keep_all
            record = np.flatnonzero(keep).astype(np.uint32)
            index.append(select(part.columns(), keep), np.full_like(record, shard), record)
            index.append_shard(count, size)
            lines = part.refused()
            refusals.write(lines)
            start, total, refused = start + count, total + size, refused + lines.count(b"\n")
        described = index.finish()
    for path in (destination / REFUSED, destination / SHARDS, destination):
        sync(path)
    return described | {"refused": refused, "duplicates": int(duplicates.sum()), "bytes": total}


def _identity(all_units: list[Unit]) -> str:
    """A hash of the pieces: the same for the same source in another process."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=5)
    pickler.fast = True  # no memo: two equal objects are written as the same object twice is
    pickler.dump([tuple(unit) for unit in all_units])
    return hashlib.blake2b(stream.getbuffer(), digest_size=16).hexdigest()


@contextmanager
def _only_builder(destination: Path) -> Iterator[None]:
    """Holds a lock on the folder, which the system releases when the process ends. MachineError where another build
    holds it."""
    with ExitStack() as lock:
        try:
            lock.enter_context(locked_folder(destination))
        except Busy:
            raise MachineError(
                f"Another process is building in {destination}. Expected a folder with one build at a time. Wait until "
                "it ends, or give another folder"
            ) from None
        yield


def _clean(destination: Path) -> None:
    """Removes the build's temporary files."""
    if (destination / _PARTS).exists():
        shutil.rmtree(destination / _PARTS)
    (destination / UNFINISHED).unlink(missing_ok=True)
    partial_path(destination / UNFINISHED).unlink(missing_ok=True)


def _check_same(destination: Path, existing: dict[str, Any], options: dict[str, Any], state: str) -> None:
    """InputError unless the existing build has the same source and options.

    existing: content of build.json or shards.json. options: of this call. state: "a finished" or "an unfinished".
    """
    existing = {"caption_lines": CaptionLines.LINES.value} | existing  # builds before this option was added
    differs = next((key for key in options if existing.get(key) != options[key]), None)
    if differs == "pieces":
        raise InputError(
            f"{options['source']} has changed since {state} build of it in {destination} began. Restore it, remove "
            f"{destination} to build it again, or give another folder"
        )
    if differs:
        raise InputError(
            f"{destination} holds {state} build with {differs}={existing.get(differs)}, and now {options[differs]} is "
            "given. Give the same, give another folder, or remove this one to build it again"
        )


def _refuse_folder(destination: Path) -> InputError:
    return InputError(
        f"{destination} is a file, or a folder that holds other files and is not a shard set. Give a new or an empty "
        "folder"
    )


def _begin(destination: Path, options: dict[str, Any]) -> None:
    """Marks the folder as this unfinished build, with build.json. InputError where it is something else."""
    try:
        existing = json.loads((destination / UNFINISHED).read_bytes())
    except FileNotFoundError:
        if any(not file.name.endswith(PARTIAL) for file in destination.iterdir()):
            raise _refuse_folder(destination) from None
        write_json(destination / UNFINISHED, options)
    except ValueError as problem:
        raise InputError(
            f"{destination / UNFINISHED} is damaged ({problem}). Expected the record of an unfinished build, in JSON. "
            f"Remove {destination} to build it again"
        ) from problem
    else:
        _check_same(destination, existing, options, "an unfinished")
    (destination / _PARTS).mkdir(exist_ok=True)


def _finish(
    destination: Path, options: dict[str, Any], pieces: list[Unit], read: Read, workers: int, hide: bool | None
) -> dict[str, Any]:
    """Reads the missing pieces and assembles all of them; returns the content of shards.json, which is written last."""
    origin = Path(options["source"])
    parts = [FinishedPart(destination / _PARTS / f"{unit.number:05d}") for unit in pieces]
    done = [part.folder.exists() for part in parts]
    images = sum(part.count() for part, there in zip(parts, done, strict=True) if there)
    missing = [unit for unit, there in zip(pieces, done, strict=True) if not there]
    with tqdm(desc="Writing shards", unit=" images", initial=images, disable=hide) as bar:
        _write_parts(read, missing, destination / _PARTS, origin if origin.exists() else None, workers, bar)
    described = options | _assemble(destination, parts, not options["drop_duplicates"], hide)
    if not described["images"]:
        refused = itertools.chain.from_iterable(part.refused().decode().splitlines() for part in parts)
        examples = "\n".join(f"  {line}" for line in itertools.islice(refused, 5)) or "  (it is empty)"
        _clean(destination)  # so that the corrected source is read again
        raise InputError(
            f"The source {options['source']} has no usable image. The first that were refused:\n{examples}\nFix the "
            "source, or give another"
        )
    write_json(destination / DESCRIPTION, described)
    _clean(destination)
    return described


def _build(
    source: str,
    destination: Path,
    units: Callable[[str], list[Unit]],
    read: Read,
    *,
    workers: int | None,
    drop_duplicates: bool,
    progress: bool,
    caption_lines: CaptionLines = CaptionLines.LINES,
) -> Built:
    destination, hide = local(destination, "the destination"), None if progress else True
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    check_ranges([("workers", workers, 0, math.inf)])
    options: dict[str, Any] = {
        "format": FORMAT,
        "source": source.rstrip("/") or source,
        "drop_duplicates": drop_duplicates,
        "caption_lines": caption_lines.value,
    }
    if finished := (destination / DESCRIPTION).exists():
        described = read_description(destination)
        _check_same(destination, described, options, "a finished")
        with _only_builder(destination):
            _clean(destination)
    else:
        pieces = units(source)
        assert [unit.number for unit in pieces] == list(range(len(pieces)))
        options["pieces"] = _identity(pieces)
        try:
            destination.mkdir(parents=True, exist_ok=True)
            with _only_builder(destination):
                _begin(destination, options)
                described = _finish(destination, options, pieces, read, workers, hide)
        except FileExistsError as problem:
            raise _refuse_folder(destination) from problem
        except OSError as problem:  # what the source raises is an InputError already
            raise fault(problem)(
                f"Cannot write to {destination} ({problem}). Free space on that disk, or make the folder writable. "
                f"{_RESUME}"
            ) from problem
    return Built(*(described[name] for name in Built._fields[:-1]), was_finished=finished)


def build(
    source: str,
    destination: Path,
    *,
    workers: int | None = None,
    drop_duplicates: bool = False,
    progress: bool = True,
    caption_lines: CaptionLines = CaptionLines.LINES,
) -> Built:
    """Builds the shard set `destination` from a source, or resumes an interrupted build; `open_shards` opens it.

    Args:
        source: what `records.units` takes: a folder, tars, Parquet files, a TFDS name.
        destination: a new or an empty folder, or one in which the same build was interrupted.
        workers: processes that read the source, None for as many as there are cores; 0 reads in this process.
        drop_duplicates: leave images out of the index that have the bytes of an earlier one; else they are only
            counted.
        progress: a progress bar at a terminal, with images and images per second.
        caption_lines: what the lines of a `.txt` beside an image are.

    Where the shard set is complete already, nothing is done, the source is not read, and `was_finished` is True.

    Raises InputError: a source that cannot be used, disappears, or has no usable image; a destination that holds
    another build or other files, or that is not writable; caption_lines where the source has no `.txt` captions.
    MachineError: another process builds there; a full disk, or one that fails; a worker that died.
    """

    def checked_units(source: str) -> list[Unit]:
        pieces = units(source)
        check_caption_lines(source, pieces, caption_lines)
        return pieces

    return _build(
        source,
        destination,
        checked_units,
        functools.partial(read, caption_lines=caption_lines),
        workers=workers,
        drop_duplicates=drop_duplicates,
        progress=progress,
        caption_lines=caption_lines,
    )
