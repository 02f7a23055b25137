"""The builder after `sdxl-jax data build SRC DST`: any source to a shard set, in parallel, finishing what it began.

The source is cut into pieces (records.units), always the same ones. Worker processes take one piece at a time, write it
to `DST/parts/NNNNN.partial`, and rename that when it is complete on the disk. When all are there, one process goes
through them in order, writes the index, and moves the shards to their place. `shards.json` comes last: a folder without
it is not finished. So

- a build that was killed, at any moment, goes on with the pieces that it lacks when the same command runs again;
- what comes out depends on the source alone, byte for byte: not on the number of workers, nor on interruptions;
- memory is that of one piece's captions a worker, and of one piece's columns at the end; looking for duplicates takes
  64 bytes for each of 4 million images, or of a sixteenth of all where that is more.

`build.json`, there until the build is complete, says what is being built: another source or option is refused.

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
from tqdm import tqdm

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

_AGAIN = "Nothing that was finished is lost: then run the same command again, it goes on from there."
_PARTS = "parts"
_COUNT_EVERY = 16  # images between two looks at what the processes share
_BLOCK = 1 << 20  # hashes looked through at a time

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
    """Another process failed: this one need not go on."""


class _Shared(NamedTuple):
    """What worker processes tell the first one, and it them."""

    images: Any
    """A shared integer with a lock: finished or being written."""
    stop: Any
    """A shared integer: 1 when all are to stop."""


_shared: _Shared | None = None  # of a worker process


def _worker_starts(shared: _Shared) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one stops us
    end_with_parent()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C, not even before `_worker_starts`; here it waits for the end."""
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
    """read(unit), with a source that fails told apart from a disk that does."""
    try:
        yield from read(unit)
    except OSError as problem:
        raise fault(problem)(
            f"The source cannot be read any more, at {unit.name}: {problem}. Restore it. {_AGAIN}"
        ) from problem


def _write_part(read: Read, unit: Unit, parts: Path, origin: Path | None, count: Callable[[int], Any]) -> None:
    """Writes one piece, whole or not at all; `count` hears how many images came since it was last called."""
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
            raise InputError(f"The source {origin} disappeared while {unit.name} was read. Restore it. {_AGAIN}")
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

    def show() -> None:
        bar.update(shared.images.value - shown[0])
        shown[0] = shared.images.value

    shown, to_do, running = [0], iter(missing), set[Future[None]]()
    with ProcessPoolExecutor(min(workers, len(missing)) or 1, context, _worker_starts, (shared,)) as pool:
        try:
            while True:
                with _without_interrupts():
                    for unit in itertools.islice(to_do, 2 * workers - len(running)):
                        running.add(pool.submit(_in_worker, read, unit, parts, origin))
                if not running:
                    return
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                show()
                for future in done:
                    future.result()
        except BrokenProcessPool as problem:
            raise MachineError(
                "A worker process died. Often the memory ran out: use fewer workers (they are as many as cores, if not "
                f'told otherwise). {_AGAIN} In a script, call build() below `if __name__ == "__main__":`, since the '
                "workers import it."
            ) from problem
        finally:
            shared.stop.value = 1
            pool.shutdown(cancel_futures=True)


def find_repeats(hashes: UInt8[np.ndarray, "images 16"]) -> Bool[np.ndarray, " images"]:
    """Which images have a hash that an earlier one has. In bounded memory: `hashes` may be mapped from a file."""
    repeats = np.zeros(len(hashes), bool)
    keys = hashes.view(np.uint64)
    rounds = min(16, -(-len(keys) // (4 * _BLOCK)))
    for part in range(rounds):  # equal hashes fall into the same one
        rows = np.concatenate(
            [
                start + np.flatnonzero(keys[start : start + _BLOCK, 0] % rounds == part)
                for start in range(0, len(keys), _BLOCK)
            ]
        )
        of_rows = keys[rows]
        order = np.lexsort(of_rows.T)  # stable: the first of equal ones stays first
        of_rows = of_rows[order]
        repeats[rows[order[1:][(of_rows[1:] == of_rows[:-1]).all(axis=1)]]] = True
    return repeats


def _all_hashes(parts: list[FinishedPart], path: Path, images: int) -> UInt8[np.ndarray, "images 16"]:
    """The hashes of all parts in order, in a file."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part.hashes().tobytes())
    return np.memmap(path, np.uint8, "r", shape=(images, 16))


def _assemble(destination: Path, parts: list[FinishedPart], drop_nothing: bool, bar: bool | None) -> dict[str, Any]:
    """Writes the index and refused.jsonl and moves the shards; what shards.json says of them. May be interrupted."""
    counts = [part.count() for part in parts]
    if not sum(counts):
        return {"images": 0}
    names = {name for part in parts for name in part.number_names()}
    check_number_names(names)
    repeats = find_repeats(_all_hashes(parts, destination / _PARTS / "hashes", sum(counts)))
    (destination / SHARDS).mkdir(exist_ok=True)
    start = total = refused = 0
    with IndexWriter(destination, sorted(names)) as index, (destination / REFUSED).open("wb") as refusals:
        listed = tqdm(zip(parts, counts, strict=True), "Writing the index", len(parts), delay=2, disable=bar)
        for shard, (part, count) in enumerate(listed):
            final, size = shard_path(destination, shard), 0
            if count:
                if part.records.exists():  # else it was moved before an interruption
                    os.rename(part.records, final)
                size = final.stat().st_size
            keep = ~repeats[start : start + count] | drop_nothing
            record = np.flatnonzero(keep).astype(np.uint32)
            index.append(select(part.columns(), keep), np.full_like(record, shard), record)
            index.append_shard(count, size)
            lines = part.refused()
            refusals.write(lines)
            start, total, refused = start + count, total + size, refused + lines.count(b"\n")
        described = index.finish()
    for path in (destination / REFUSED, destination / SHARDS, destination):
        sync(path)
    return described | {"refused": refused, "duplicates": int(repeats.sum()), "bytes": total}


def _identity(all_units: list[Unit]) -> str:
    """A hash of the pieces: the same for the same source in another process."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=5)
    pickler.fast = True  # equal objects and the same object twice look alike
    pickler.dump([tuple(unit) for unit in all_units])
    return hashlib.blake2b(stream.getbuffer(), digest_size=16).hexdigest()


@contextmanager
def _only_builder(destination: Path) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process. MachineError where another build has it."""
    with ExitStack() as lock:
        try:
            lock.enter_context(locked_folder(destination))
        except Busy:
            raise MachineError(
                f"Another process is building in {destination}. Wait until it is done, or give another folder"
            ) from None
        yield


def _clean(destination: Path) -> None:
    """Removes what only the build needed."""
    if (destination / _PARTS).exists():
        shutil.rmtree(destination / _PARTS)
    (destination / UNFINISHED).unlink(missing_ok=True)
    partial_path(destination / UNFINISHED).unlink(missing_ok=True)


def _check_same(destination: Path, begun: dict[str, Any], asked: dict[str, Any], state: str) -> None:
    """InputError unless what was begun there is what is asked for."""
    begun = {"caption_lines": CaptionLines.LINES.value} | begun  # which was all that there was
    differs = next((key for key in asked if begun.get(key) != asked[key]), None)
    if differs == "pieces":
        raise InputError(
            f"{asked['source']} has changed since {state} build of it in {destination} began. Restore it, or remove "
            f"{destination} to build again, or give another folder."
        )
    if differs:
        raise InputError(
            f"{destination} holds {state} build with {differs}={begun.get(differs)!r}, and now {asked[differs]!r} is "
            "given. Give the same, or another folder, or remove this one to build again."
        )


def _refuse_folder(destination: Path) -> InputError:
    return InputError(
        f"{destination} is a file, or holds other files and is no shard set. Give a new or an empty folder."
    )


def _begin(destination: Path, asked: dict[str, Any]) -> None:
    """Makes the folder one in which this build is unfinished. InputError where it is something else."""
    try:
        begun = json.loads((destination / UNFINISHED).read_bytes())
    except FileNotFoundError:
        if any(not file.name.endswith(PARTIAL) for file in destination.iterdir()):
            raise _refuse_folder(destination) from None
        write_json(destination / UNFINISHED, asked)
    except ValueError as problem:
        raise InputError(f"{destination / UNFINISHED} is damaged ({problem}). Remove {destination}.") from problem
    else:
        _check_same(destination, begun, asked, "an unfinished")
    (destination / _PARTS).mkdir(exist_ok=True)


def _finish(
    destination: Path, asked: dict[str, Any], pieces: list[Unit], read: Read, workers: int, hide: bool | None
) -> dict[str, Any]:
    """Reads the pieces that are missing and puts all together; the content of shards.json, written last."""
    origin = Path(asked["source"])
    parts = [FinishedPart(destination / _PARTS / f"{unit.number:05d}") for unit in pieces]
    done = [part.folder.exists() for part in parts]
    images = sum(part.count() for part, there in zip(parts, done, strict=True) if there)
    missing = [unit for unit, there in zip(pieces, done, strict=True) if not there]
    with tqdm(desc="Writing shards", unit=" images", initial=images, disable=hide) as bar:
        _write_parts(read, missing, destination / _PARTS, origin if origin.exists() else None, workers, bar)
    described = asked | _assemble(destination, parts, not asked["drop_duplicates"], hide)
    if not described["images"]:
        refused = itertools.chain.from_iterable(part.refused().decode().splitlines() for part in parts)
        some = "\n".join(f"  {line}" for line in itertools.islice(refused, 5)) or "  It is empty."
        _clean(destination)  # so that the corrected source is read again
        raise InputError(f"The source {asked['source']} has no image that can be used:\n{some}\nCorrect it.")
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
    asked: dict[str, Any] = {
        "format": FORMAT,
        "source": source.rstrip("/") or source,
        "drop_duplicates": drop_duplicates,
        "caption_lines": caption_lines.value,
    }
    if finished := (destination / DESCRIPTION).exists():
        described = read_description(destination)
        _check_same(destination, described, asked, "a finished")
        with _only_builder(destination):
            _clean(destination)
    else:
        pieces = units(source)
        assert [unit.number for unit in pieces] == list(range(len(pieces)))
        asked["pieces"] = _identity(pieces)
        try:
            destination.mkdir(parents=True, exist_ok=True)
            with _only_builder(destination):
                _begin(destination, asked)
                described = _finish(destination, asked, pieces, read, workers, hide)
        except FileExistsError as problem:
            raise _refuse_folder(destination) from problem
        except OSError as problem:  # what the source raises is an InputError already
            raise fault(problem)(
                f"Cannot write to {destination} ({problem}). Free some space, or fix it. {_AGAIN}"
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
    """Builds the shard set `destination` from a source, or finishes it; `open_shards` opens what comes out.

    Args:
        source: what `records.units` takes: a folder, tars, Parquet files, a TFDS name.
        destination: a new or an empty folder, or one in which the same build was interrupted.
        workers: processes that read the source, None for as many as there are cores; 0 reads in this process.
        drop_duplicates: leave out of the index what has the bytes of an earlier image; else they are only counted.
        progress: show images and images a second at a terminal.
        caption_lines: what the lines of a `.txt` beside an image are.

    Where the shard set is complete already, nothing is done, the source is not looked at, and `was_finished` is True.

    Raises InputError: a source that cannot be used, disappears, or has no usable image; a destination that holds
    another build or other files, or that may not be written to; caption_lines where no caption stands in a `.txt`.
    MachineError: another process builds there; a full disk, or one that fails; a worker that died.
    """

    def found(source: str) -> list[Unit]:
        pieces = units(source)
        check_caption_lines(source, pieces, caption_lines)
        return pieces

    return _build(
        source,
        destination,
        found,
        functools.partial(read, caption_lines=caption_lines),
        workers=workers,
        drop_duplicates=drop_duplicates,
        progress=progress,
        caption_lines=caption_lines,
    )
