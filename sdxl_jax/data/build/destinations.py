"""Where a shard set is built: a folder, or a bucket (gs://…). What both have in common is the order of the steps.

    begin      build.json records the source and the options: a build with others is refused
    write      each piece of the source on its own, by any process: its shard, its columns, its refusals
    complete   when all pieces are there: the index over all of them, in their order; then shards.json; then what only
               the build needs is removed

In a folder a piece is `parts/NNNNN`, renamed when it is complete, and its shard is moved to its place at the end. In a
bucket nothing is moved: a piece is written to the folder for temporary files, its shard is uploaded to its place, and
`parts/NNNNN/columns.npz` last of it. So everything that is finished is in the bucket, and any machine can resume.

Not here: which processes write the pieces (build, beam).
"""

import abc
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from sdxl_jax.data.build.records import Record, Unit
from sdxl_jax.data.build.shard_writing import COLUMNS, FinishedPart, IndexWriter, PartWriter, select, write_json
from sdxl_jax.data.captions import CaptionLines, check_number_names
from sdxl_jax.data.shards import (
    CAPTIONS,
    DESCRIPTION,
    INDEX,
    NAMES,
    REFUSED,
    SHARDS,
    UNFINISHED,
    read_description,
    shard_name,
)
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import buckets, objects
from sdxl_jax.files.atomic import PARTIAL, partial_path, sync, write_bytes
from sdxl_jax.files.locks import Busy, locked_folder
from sdxl_jax.files.paths import AnyPath, in_bucket
from sdxl_jax.progress import tqdm

RESUME = "Then run the same command again: it resumes, and no finished piece is lost"
_WHAT = "the destination"
_PARTS = "parts"
_LOCK = "build.lock"
_COUNT_EVERY = 16  # images between two updates of the shared counter
_BLOCK = 1 << 20  # hashes compared at a time
_THREADS = 16  # they wait for the bucket

Read = Callable[[Unit], Iterator[Record | Refused]]


class NothingUsable(InputError):
    """No image of the source can be used: the build is to be forgotten, so that the corrected source is read again."""


class Counts(NamedTuple):
    """What a piece of the source holds."""

    images: int
    captions: int
    refused: int


@dataclasses.dataclass(frozen=True)
class Destination(abc.ABC):
    """A shard set that is being built. It can be pickled."""

    path: AnyPath

    @abc.abstractmethod
    def description(self) -> dict[str, Any] | None:
        """The content of shards.json; None while it is not finished."""

    @abc.abstractmethod
    def only_builder(self) -> AbstractContextManager[None]:
        """A context manager: no other process builds here meanwhile. Raises MachineError where one does."""

    @abc.abstractmethod
    def begin(self, options: dict[str, Any]) -> None:
        """Marks the place as this unfinished build, with build.json. Raises InputError where it is something else."""

    @abc.abstractmethod
    def finished(self) -> set[int]:
        """The numbers of the pieces that are complete."""

    @abc.abstractmethod
    def images(self) -> int:
        """Number of images in the complete pieces, for the progress bar; 0 where counting them would take long."""

    @abc.abstractmethod
    def write(self, read: Read, unit: Unit, origin: Path | None, count: Callable[[int], Any]) -> Counts:
        """Writes one piece, whole or not at all. `count` receives the number of images since its last call.

        origin: the source, where it is one folder or file of this machine.
        """

    @abc.abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Writes a file that only the build needs."""

    @abc.abstractmethod
    def get(self, name: str) -> bytes | None:
        """The content of a file that `put` wrote; None if there is none."""

    @abc.abstractmethod
    def assemble(self, pieces: int, keep_all: bool, hide: bool | None) -> dict[str, Any]:
        """Writes the index and refused.jsonl, and returns their entries of shards.json. May be interrupted.

        keep_all: duplicates stay in the index. hide: no progress bar.
        """

    @abc.abstractmethod
    def publish(self, described: dict[str, Any]) -> None:
        """Writes shards.json."""

    @abc.abstractmethod
    def clean(self) -> None:
        """Removes what only the build needs."""


def at(path: AnyPath) -> Destination:
    """The destination of that path."""
    return _Bucket(path) if in_bucket(path) else _Folder(path)


def complete(destination: Destination, options: dict[str, Any], pieces: int, hide: bool | None) -> dict[str, Any]:
    """Assembles the pieces, all of which are there, and returns the content of shards.json, which is written last.

    Raises NothingUsable, and leaves what only the build needs.
    """
    try:
        described = options | destination.assemble(pieces, not options["drop_duplicates"], hide)
    except _NoImage as problem:
        raise NothingUsable(
            f"The source {options['source']} has no usable image. The first that were refused:\n{problem}\nFix the "
            "source, or give another"
        ) from None
    destination.publish(described)
    destination.clean()
    return described


def check_same(destination: AnyPath, existing: dict[str, Any], options: dict[str, Any], state: str) -> None:
    """InputError unless the existing build has the same source and options.

    existing: content of build.json or shards.json. options: of this call. state: "a finished" or "an unfinished".
    """
    defaults = {"caption_lines": CaptionLines.LINES.value, "captioned": True, "class_folders": False}
    existing, options = defaults | existing, defaults | options
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


def refuse_folder(destination: AnyPath) -> InputError:
    """The error for a destination that is something else."""
    return InputError(
        f"{destination} is a file, or a folder that holds other files and is not a shard set. Give a new or an empty "
        "folder"
    )


def _check_unfinished(destination: AnyPath, content: bytes, options: dict[str, Any]) -> None:
    """content: of build.json."""
    try:
        existing = json.loads(content)
    except ValueError as problem:
        raise InputError(
            f"{destination / UNFINISHED} is damaged ({problem}). Expected the record of an unfinished build, in JSON. "
            f"Remove {destination} to build it again"
        ) from problem
    check_same(destination, existing, options, "an unfinished")


# Pieces


def _guarded(read: Read, unit: Unit) -> Iterator[Record | Refused]:
    """read(unit), with errors of the source as InputError or MachineError, apart from OSError of the destination."""
    try:
        yield from read(unit)
    except OSError as problem:
        raise fault(problem)(
            f"The source can no longer be read, at {unit.name} ({problem}). Restore it. {RESUME}"
        ) from problem


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"


def _write_part(read: Read, unit: Unit, parts: Path, origin: Path | None, count: Callable[[int], Any]) -> Counts:
    """As `Destination.write`, to a folder in `parts`."""
    final = _part(parts, unit.number)
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
            raise InputError(f"The source {origin} disappeared while {unit.name} was read. Restore it. {RESUME}")
        count(writer.images - counted)
        writer.finish()
    os.rename(partial, final)
    sync(parts)
    return Counts(writer.images, writer.captions, writer.refusals)


# All pieces as one set


class _NoImage(Exception):
    """No image of the source can be used; the message lists refusals."""


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


def _assemble(
    folder: Path, pieces: int, keep_all: bool, hide: bool | None, place: Callable[[int, FinishedPart], int]
) -> dict[str, Any]:
    """As `Destination.assemble`, with the parts and the result in a folder.

    place: brings the shard of that number to its place, if it is not there, and returns its size in bytes.
    """
    parts = [FinishedPart(_part(folder / _PARTS, number)) for number in range(pieces)]
    counts = [part.count() for part in parts]
    if not sum(counts):
        refused = itertools.chain.from_iterable(part.refused().decode().splitlines() for part in parts)
        raise _NoImage("\n".join(f"  {line}" for line in itertools.islice(refused, 5)) or "  (it is empty)")
    names = {name for part in parts for name in part.number_names()}
    check_number_names(names)
    duplicates = find_duplicates(_all_hashes(parts, folder / _PARTS / "hashes", sum(counts)))
    start = total = refusals_count = 0
    with IndexWriter(folder, sorted(names)) as index, (folder / REFUSED).open("wb") as refusals:
        listed = tqdm(zip(parts, counts, strict=True), "Writing the index", len(parts), delay=2, disable=hide)
        for shard, (part, count) in enumerate(listed):
            size = place(shard, part) if count else 0
            keep = ~duplicates[start : start + count] | keep_all
            record = np.flatnonzero(keep).astype(np.uint32)
            index.append(select(part.columns(), keep), np.full_like(record, shard), record)
            index.append_shard(count, size)
            lines = part.refused()
            refusals.write(lines)
            start, total, refusals_count = start + count, total + size, refusals_count + lines.count(b"\n")
        described = index.finish()
    sync(folder / REFUSED)
    return described | {"refused": refusals_count, "duplicates": int(duplicates.sum()), "bytes": total}


# In a folder


@dataclasses.dataclass(frozen=True)
class _Folder(Destination):
    path: Path

    def description(self) -> dict[str, Any] | None:
        return read_description(self.path) if (self.path / DESCRIPTION).exists() else None

    @contextmanager
    def only_builder(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as lock:
            try:
                lock.enter_context(locked_folder(self.path))
            except Busy:
                raise MachineError(
                    f"Another process is building in {self.path}. Expected a folder with one build at a time. Wait "
                    "until it ends, or give another folder"
                ) from None
            yield

    def begin(self, options: dict[str, Any]) -> None:
        try:
            content = (self.path / UNFINISHED).read_bytes()
        except FileNotFoundError:
            if any(not file.name.endswith(PARTIAL) for file in self.path.iterdir()):
                raise refuse_folder(self.path) from None
            write_json(self.path / UNFINISHED, options)
        else:
            _check_unfinished(self.path, content, options)
        (self.path / _PARTS).mkdir(exist_ok=True)

    def finished(self) -> set[int]:
        return {int(part.name) for part in (self.path / _PARTS).iterdir() if part.name.isdecimal()}

    def images(self) -> int:
        return sum(FinishedPart(_part(self.path / _PARTS, number)).count() for number in self.finished())

    def write(self, read: Read, unit: Unit, origin: Path | None, count: Callable[[int], Any]) -> Counts:
        return _write_part(read, unit, self.path / _PARTS, origin, count)

    def put(self, name: str, content: bytes) -> None:
        write_bytes(self.path / _PARTS / name, content)

    def get(self, name: str) -> bytes | None:
        path = self.path / _PARTS / name
        return path.read_bytes() if path.exists() else None

    def assemble(self, pieces: int, keep_all: bool, hide: bool | None) -> dict[str, Any]:
        def place(shard: int, part: FinishedPart) -> int:
            final = self.path / shard_name(shard)
            if part.records.exists():  # else it was moved before an interruption
                final.parent.mkdir(exist_ok=True)
                os.rename(part.records, final)
            return final.stat().st_size

        described = _assemble(self.path, pieces, keep_all, hide, place)
        for path in (self.path / SHARDS, self.path):
            sync(path)
        return described

    def publish(self, described: dict[str, Any]) -> None:
        write_json(self.path / DESCRIPTION, described)

    def clean(self) -> None:
        if (self.path / _PARTS).exists():
            shutil.rmtree(self.path / _PARTS)
        (self.path / UNFINISHED).unlink(missing_ok=True)
        partial_path(self.path / UNFINISHED).unlink(missing_ok=True)


# In a bucket


@dataclasses.dataclass(frozen=True)
class _Bucket(Destination):
    path: epath.Path

    def description(self) -> dict[str, Any] | None:
        return None if objects.size(self.path / DESCRIPTION, _WHAT) is None else read_description(self.path)

    @contextmanager
    def only_builder(self) -> Iterator[None]:
        buckets.check_writable(self.path, _WHAT)
        lock = buckets.Lock(self.path / _LOCK, _WHAT)
        try:
            replaced = lock.acquire()
        except Busy as other:
            raise MachineError(
                f"Another process is building in {self.path}: {other}. Expected one build at a time. Wait until it "
                "ends, or give another place"
            ) from None
        if replaced:
            tqdm.write(f"  {replaced} is gone: its build is resumed")
        with lock:
            yield

    def begin(self, options: dict[str, Any]) -> None:
        content = buckets.read_bytes(self.path / UNFINISHED, _WHAT)
        if content is not None:
            _check_unfinished(self.path, content, options)
            return
        if any(not name.startswith(".") and name != _LOCK for name in buckets.files(self.path, _WHAT)):
            raise refuse_folder(self.path)
        objects.write_bytes(self.path / UNFINISHED, _json(options), _WHAT)

    def finished(self) -> set[int]:
        names = buckets.files(self.path / _PARTS, _WHAT)
        return {int(name.split("/")[0]) for name in names if name.endswith(f"/{COLUMNS}")}

    def images(self) -> int:
        return 0

    def write(self, read: Read, unit: Unit, origin: Path | None, count: Callable[[int], Any]) -> Counts:
        with _temporary_folder() as folder:
            counts = _write_part(read, unit, folder, origin, count)
            part = FinishedPart(_part(folder, unit.number))
            if part.records.exists():
                buckets.upload(part.records, self.path / shard_name(unit.number), _WHAT)
            for name in (REFUSED, COLUMNS):
                buckets.upload(part.folder / name, self.path / _PARTS / part.folder.name / name, _WHAT)
        return counts

    def put(self, name: str, content: bytes) -> None:
        objects.write_bytes(self.path / _PARTS / name, content, _WHAT)

    def get(self, name: str) -> bytes | None:
        return buckets.read_bytes(self.path / _PARTS / name, _WHAT)

    def assemble(self, pieces: int, keep_all: bool, hide: bool | None) -> dict[str, Any]:
        sizes = buckets.files(self.path, _WHAT)
        of_parts = {name: size for name, size in sizes.items() if name.startswith(f"{_PARTS}/")}
        with _temporary_folder() as folder:
            if shutil.disk_usage(folder).free < (needed := 2 * sum(of_parts.values())):
                raise MachineError(
                    f"Writing the index takes {needed / 1e9:.1f} GB in {folder.parent}, and there is less room. Free "
                    f"space there, or set TMPDIR to a folder on another disk. {RESUME}"
                )
            _for_each(of_parts, lambda name: buckets.download(self.path / name, folder / name, _WHAT))
            described = _assemble(folder, pieces, keep_all, hide, lambda shard, _: sizes[shard_name(shard)])
            index = [path.relative_to(folder).as_posix() for path in (folder / INDEX).iterdir()]
            names = [CAPTIONS, NAMES, REFUSED, *index]
            _for_each(names, lambda name: buckets.upload(folder / name, self.path / name, _WHAT))
        return described

    def publish(self, described: dict[str, Any]) -> None:
        objects.write_bytes(self.path / DESCRIPTION, _json(described), _WHAT)

    def clean(self) -> None:
        names = buckets.files(self.path / _PARTS, _WHAT)
        _for_each(names, lambda name: buckets.delete(self.path / _PARTS / name, _WHAT))
        buckets.delete(self.path / UNFINISHED, _WHAT)


def _for_each(names: Iterable[str], call: Callable[[str], object]) -> None:
    """call(name) for each name, in threads, all of which have ended when it returns or raises."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(call, names))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Raises InputError or MachineError where writing to it fails."""
    try:
        with tempfile.TemporaryDirectory(prefix="sdxl_jax-") as folder:
            yield Path(folder)
    except OSError as problem:
        raise fault(problem)(
            f"Cannot write to {tempfile.gettempdir()} ({problem}), where a piece lies until it is uploaded. Free space "
            f"there, or set TMPDIR to a folder on another disk. {RESUME}"
        ) from problem
