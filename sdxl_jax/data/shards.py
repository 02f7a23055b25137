"""A shard set: captioned images in a few large files, and a compact index of them that opens at once at any size.

    shards/00000.array_record …   the image files' bytes as they were, one shard for each piece of the source
    index/*.npy                   one column a file, a row an image (or a caption), in the order of the source
    captions.bin, names.bin       UTF-8, one after the other without separators; offsets stand in the index
    refused.jsonl                 {"file": …, "reason": …} a line
    shards.json                   counts, the source, and the fingerprint of the index; written last

Columns: `size` (height, width; upright, pixels), `shard` and `record` (where the bytes are), `first_caption` and
`caption_start` (image to captions, caption to bytes), `name_start`, `hash` (blake2b of the bytes, 128 bits), and
`number_000` … for what the source counts (shards.json has their names; NaN where an image has none).

`open_shards` maps the columns into memory and reads nothing but their ends. Each shard is an ArrayRecord file of
groups of one record, so that any image costs one read, and it is checked when it is first read from.

Not here: reading sources (records), the parallel build (build), decoding.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Float32, Int32, Int64, UInt8, UInt32

from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError

FORMAT = 1
"""Version of the layout, in shards.json."""
HASH_BYTES = 16
NUMBERS_LIMIT = 256
"""Most names of numbers that one shard set can have: each is a file of its own."""

DESCRIPTION, UNFINISHED = "shards.json", "build.json"  # a folder has the second alone until its build is complete
REFUSED, CAPTIONS, NAMES, INDEX, SHARDS = "refused.jsonl", "captions.bin", "names.bin", "index", "shards"

_RECORDS, _COLUMNS = "records.array_record", "columns.npz"
_OPEN_SHARDS = 256  # of 0.04 MB and one file each; to open one again takes 0.4 ms
_WRITER_OPTIONS = "group_size:1,uncompressed"  # image files are compressed already

_DTYPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "size": ("<i4", (2,)),
    "shard": ("<u4", ()),
    "record": ("<u4", ()),
    "first_caption": ("<i8", ()),
    "caption_start": ("<i8", ()),
    "name_start": ("<i8", ()),
    "hash": ("|u1", (HASH_BYTES,)),
    "shard_extent": ("<i8", (2,)),
}


def shard_path(folder: Path, shard: int) -> Path:
    """Where the shard of that number lies in the shard set `folder`."""
    return folder / SHARDS / f"{shard:05d}.array_record"


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk: what counts as finished survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


class Columns(NamedTuple):
    """What the index keeps of consecutive images, texts as bytes with their lengths."""

    size: Int32[np.ndarray, "images 2"]
    hash: UInt8[np.ndarray, "images 16"]
    name_lengths: Int64[np.ndarray, " images"]
    """Bytes."""
    name_bytes: UInt8[np.ndarray, " name_bytes"]
    caption_counts: Int64[np.ndarray, " images"]
    caption_lengths: Int64[np.ndarray, " captions"]
    """Bytes."""
    caption_bytes: UInt8[np.ndarray, " caption_bytes"]
    numbers: dict[str, Float32[np.ndarray, " images"]]
    """NaN where an image has none of that name."""


def select(columns: Columns, keep: Bool[np.ndarray, " images"]) -> Columns:
    """The columns of the images that `keep` marks."""
    captions = np.repeat(keep, columns.caption_counts)
    return Columns(
        size=columns.size[keep],
        hash=columns.hash[keep],
        name_lengths=columns.name_lengths[keep],
        name_bytes=columns.name_bytes[np.repeat(keep, columns.name_lengths)],
        caption_counts=columns.caption_counts[keep],
        caption_lengths=columns.caption_lengths[captions],
        caption_bytes=columns.caption_bytes[np.repeat(captions, columns.caption_lengths)],
        numbers={key: values[keep] for key, values in columns.numbers.items()},
    )


class PartWriter:
    """Writes one piece of a source into an empty folder: its records, its columns, what it refused.

    Holds the columns in memory and no image. To be used in a `with`; what is not finished is worth nothing.
    OSError where the disk does not take it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = 0
        self._records: Any = None
        self._refused = (folder / REFUSED).open("w", encoding="utf-8", errors="backslashreplace")
        self._sizes: list[tuple[int, int]] = []
        self._hashes, self._names, self._captions = bytearray(), bytearray(), bytearray()
        self._name_lengths: list[int] = []
        self._caption_counts: list[int] = []
        self._caption_lengths: list[int] = []
        self._numbers: dict[str, dict[int, float]] = {}

    def add(
        self, name: str, image: bytes, size: tuple[int, int], captions: tuple[str, ...], numbers: Mapping[str, float]
    ) -> None:
        """One image: its file's bytes, (height, width) upright. An unpaired surrogate in a caption refuses it."""
        try:
            texts = [caption.encode() for caption in captions]
        except UnicodeEncodeError:
            return self.refuse(Refused(name, "caption is not UTF-8 text"))
        try:
            if self._records is None:
                self._records = ArrayRecordWriter(str(self.folder / _RECORDS), _WRITER_OPTIONS)
            self._records.write(image)
        except RuntimeError as problem:
            raise OSError(str(problem)) from problem
        for key, value in numbers.items():
            self._numbers.setdefault(key, {})[self.images] = value
        check_number_names(self._numbers)
        encoded = name.encode(errors="surrogateescape")  # a file's name on Linux is any bytes
        self._names += encoded
        self._name_lengths.append(len(encoded))
        self._hashes += hashlib.blake2b(image, digest_size=HASH_BYTES).digest()
        self._sizes.append(size)
        self._caption_counts.append(len(texts))
        for text in texts:
            self._captions += text
            self._caption_lengths.append(len(text))
        self.images += 1

    def refuse(self, refused: Refused) -> None:
        """One entry of the source that is left out."""
        self._refused.write(json.dumps(refused._asdict(), ensure_ascii=False) + "\n")

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *problem: object) -> None:
        self._refused.close()

    def finish(self) -> None:
        """Closes the files and waits until they are on the disk."""
        self._refused.close()
        if self._records is not None:
            try:
                self._records.close()
            except RuntimeError as problem:
                raise OSError(str(problem)) from problem
        matrix = np.full((len(self._numbers), self.images), np.nan, np.float32)
        for row, values in zip(matrix, self._numbers.values(), strict=True):
            with np.errstate(over="ignore"):  # beyond float32 is infinite
                row[list(values)] = list(values.values())
        np.savez(
            self.folder / _COLUMNS,
            size=np.array(self._sizes, np.int32).reshape(-1, 2),
            hash=np.frombuffer(self._hashes, np.uint8).reshape(-1, HASH_BYTES),
            name_lengths=np.array(self._name_lengths, np.int64),
            name_bytes=np.frombuffer(self._names, np.uint8),
            caption_counts=np.array(self._caption_counts, np.int64),
            caption_lengths=np.array(self._caption_lengths, np.int64),
            caption_bytes=np.frombuffer(self._captions, np.uint8),
            number_names=np.frombuffer(json.dumps(list(self._numbers)).encode(), np.uint8),
            numbers=matrix,
        )
        for file in self.folder.iterdir():
            sync(file)
        sync(self.folder)


class Part:
    """A finished piece, as PartWriter left it. Each array is read when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.records = folder / _RECORDS
        """Exists where the piece has a usable image, until the build moves it."""

    def _read(self, *names: str) -> list[np.ndarray]:
        with np.load(self.folder / _COLUMNS) as arrays:
            return [arrays[name] for name in names]

    def count(self) -> int:
        """Images."""
        return len(self._read("size")[0])

    def hashes(self) -> UInt8[np.ndarray, "images 16"]:
        return self._read("hash")[0]

    def number_names(self) -> list[str]:
        return json.loads(self._read("number_names")[0].tobytes())

    def columns(self) -> Columns:
        numbers = dict(zip(self.number_names(), self._read("numbers")[0], strict=True))
        return Columns(*self._read(*Columns._fields[:-1]), numbers=numbers)

    def refused(self) -> bytes:
        """Lines of JSON."""
        return (self.folder / REFUSED).read_bytes()


def check_number_names(names: Mapping[str, Any] | set[str]) -> None:
    """InputError where there are too many for a column each."""
    if len(names) > NUMBERS_LIMIT:
        some = ", ".join(sorted(names)[:5])
        raise InputError(
            f"The source has numbers of more than {NUMBERS_LIMIT} names ({some}, …), and each would be a column of the "
            "index. Use the same few names for all images, or remove the numbers."
        )


class _Appended:
    """A file that grows at its end, hashed as it grows; with a dtype it is a .npy array that gains rows."""

    def __init__(self, path: Path, dtype: str = "|u1", row: tuple[int, ...] = (), *, npy: bool = True):
        self.path, self.rows, self._dtype, self._row, self._npy = path, 0, np.dtype(dtype), row, npy
        self._hash = hashlib.blake2b(digest_size=HASH_BYTES)
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        if self._npy:  # numpy leaves room for 21 digits of rows: the header keeps its length when it is written again
            descr = np.lib.format.dtype_to_descr(self._dtype)
            header = {"descr": descr, "fortran_order": False, "shape": (self.rows, *self._row)}
            np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        assert values.shape[1:] == self._row
        flat = values.reshape(-1).view(np.uint8).data
        self._file.write(flat)
        self._hash.update(flat)
        self.rows += len(values)

    def close(self) -> str:
        """Completes the file and waits until it is on the disk; a text that names its content."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        sync(self.path)
        return f"{self.path.name} {self.rows} {self._hash.hexdigest()}"

    def release(self) -> None:
        """Closes the file, complete or not."""
        with suppress(OSError):
            self._file.close()


class IndexWriter:
    """Writes the index of a shard set from columns of consecutive images, in memory for one append.

    `number_names` are all that will come, sorted. Overwrites what an interrupted writer left. To be used in
    a `with`. OSError where the disk does not take it.
    """

    def __init__(self, folder: Path, number_names: list[str]):
        (folder / INDEX).mkdir(parents=True, exist_ok=True)
        self.number_names = number_names
        self._columns = {
            name: _Appended(folder / INDEX / f"{name}.npy", dtype, row) for name, (dtype, row) in _DTYPES.items()
        }
        self._numbers = {
            name: _Appended(folder / INDEX / f"number_{number:03d}.npy", "<f4")
            for number, name in enumerate(number_names)
        }
        self._texts = {name: _Appended(folder / name, npy=False) for name in (CAPTIONS, NAMES)}
        self._files = [*self._columns.values(), *self._numbers.values(), *self._texts.values()]
        for name in ("first_caption", "caption_start", "name_start"):
            self._columns[name].append(np.zeros(1, np.int64))
        self._captions = 0
        self.images = 0

    def append(
        self, columns: Columns, shard: UInt32[np.ndarray, " images"], record: UInt32[np.ndarray, " images"]
    ) -> None:
        """Images that follow those so far, with the number of each one's shard and of its record in the shard."""
        to = self._columns
        to["size"].append(columns.size)
        to["hash"].append(columns.hash)
        to["shard"].append(shard)
        to["record"].append(record)
        to["first_caption"].append(self._captions + np.cumsum(columns.caption_counts))
        to["caption_start"].append(self._texts[CAPTIONS].rows + np.cumsum(columns.caption_lengths))
        to["name_start"].append(self._texts[NAMES].rows + np.cumsum(columns.name_lengths))
        self._texts[CAPTIONS].append(columns.caption_bytes)
        self._texts[NAMES].append(columns.name_bytes)
        for name, file in self._numbers.items():
            missing = np.full(len(columns.size), np.nan, np.float32)
            file.append(columns.numbers.get(name, missing))
        self._captions += int(columns.caption_counts.sum())
        self.images += len(columns.size)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *problem: object) -> None:
        for file in self._files:
            file.release()

    def append_shard(self, records: int, size: int) -> None:
        """The next shard has that many records and is a file of `size` bytes; (0, 0) where there is none."""
        self._columns["shard_extent"].append(np.array([[records, size]]))

    def finish(self) -> dict[str, Any]:
        """Closes the files. What shards.json says of them: images, captions, shards, numbers, fingerprint."""
        content = [file.close() for file in self._files]
        identity = json.dumps([FORMAT, self.number_names, content])
        return {
            "images": self.images,
            "captions": self._captions,
            "shards": self._columns["shard_extent"].rows,
            "numbers": self.number_names,
            "fingerprint": hashlib.blake2b(identity.encode(), digest_size=HASH_BYTES).hexdigest(),
        }


class _Readers:
    """Open shards of one process, those read last. Any number of threads may read."""

    def __init__(self, folder: Path, extents: Int64[np.ndarray, "shards 2"]):
        self._folder, self._extents = folder, extents
        self._open: OrderedDict[int, ArrayRecordDataSource] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _open_shard(self, shard: int) -> ArrayRecordDataSource:
        path = shard_path(self._folder, shard)
        records, size = self._extents[shard].tolist()
        remedy = "Copy it again from where the shard set was built, or build the shard set anew."
        try:
            found = path.stat().st_size
        except OSError as problem:
            raise InputError(f"The shard {path} cannot be read ({problem.strerror}). {remedy}") from problem
        if found != size:
            raise InputError(
                f"The shard {path} has {found} bytes where its index expects {size}: it was cut off or replaced. "
                f"{remedy}"
            )
        return ArrayRecordDataSource([f"{path}[0:{records}]"])  # with the count the file need not be opened for it

    def read(self, shard: int, record: int) -> bytes:
        with self._lock:
            if self._process != os.getpid():  # after a fork: a reader belongs to the process that opened it
                self._open, self._process = OrderedDict(), os.getpid()
            reader = self._open.get(shard)
        reader = reader or self._open_shard(shard)
        with self._lock:
            self._open[shard] = reader
            self._open.move_to_end(shard)
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # closes when the last thread has read
        try:
            return reader[record]
        except (RuntimeError, ValueError) as problem:
            raise InputError(
                f"Record {record} of the shard {shard_path(self._folder, shard)} is damaged ({problem}). Copy the "
                "shard again from where the shard set was built, or build the shard set anew."
            ) from problem


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSet:
    """An open shard set; an image's number is its row in the index. Made by `open_shards`.

    The index is mapped, not read. A pickle holds the path alone: a worker process opens the set again, and refuses one
    that was replaced in between. Methods raise IndexError for an image below 0 or beyond the last.
    """

    path: Path
    fingerprint: str
    """Names the content of the index, and with it that of every image: for caches and resuming."""
    source: str
    """What it was built from, as given."""
    captions_count: int
    refused_count: int
    duplicates: int
    """Images whose bytes an earlier one has too, whether they were dropped or not."""
    sizes: Int32[np.ndarray, "images 2"]
    """(height, width) in pixels, upright. Mapped, read only, as all arrays here."""
    hashes: UInt8[np.ndarray, "images 16"]
    """blake2b of each image file's bytes, 128 bits."""
    numbers: Mapping[str, Float32[np.ndarray, " images"]]
    """What the source counts, by name. NaN where an image has none."""
    _columns: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    _readers: _Readers = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self.fingerprint)

    def _texts(self, starts: np.ndarray, texts: str, first: int, last: int) -> list[bytes]:
        offsets = starts[first : last + 1].tolist()
        blob = self._columns[texts][offsets[0] : offsets[-1]].tobytes()
        return [blob[a - offsets[0] : b - offsets[0]] for a, b in itertools.pairwise(offsets)]

    def _check(self, image: int) -> None:
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} of {len(self)}")

    def captions(self, image: int) -> tuple[str, ...]:
        """All captions of one image, in the order of the source."""
        self._check(image)
        first, last = self._columns["first_caption"][image : image + 2].tolist()
        return tuple(text.decode() for text in self._texts(self._columns["caption_start"], CAPTIONS, first, last))

    def name(self, image: int) -> str:
        """The image's name in the source."""
        self._check(image)
        return self._texts(self._columns["name_start"], NAMES, image, image + 1)[0].decode(errors="surrogateescape")

    def read(self, image: int) -> bytes:
        """The image file, as the source had it.

        Raises InputError, naming the shard, where it is missing, cut off or damaged.
        """
        self._check(image)
        return self._readers.read(int(self._columns["shard"][image]), int(self._columns["record"][image]))

    def refused(self) -> Iterator[Refused]:
        """What the build left out, with the reasons."""
        with (self.path / REFUSED).open(encoding="utf-8") as lines:
            for line in lines:
                yield Refused(**json.loads(line))


def _open_again(path: Path, fingerprint: str) -> ShardSet:
    shards = open_shards(path)
    if shards.fingerprint != fingerprint:
        raise InputError(f"The shard set {path} was replaced while it was in use. Start again.")
    return shards


def read_description(path: Path) -> dict[str, Any]:
    """shards.json of a complete shard set. Raises InputError as `open_shards` does, short of looking at the index."""
    expected = "Expected a folder that `sdxl-jax data build SRC DST` has written"
    if not path.is_dir():
        raise InputError(f"There is no folder {path}. {expected}. Check the path, seen from {Path.cwd()}.")
    try:
        description = json.loads((path / DESCRIPTION).read_bytes())
    except FileNotFoundError:
        if (path / UNFINISHED).exists():
            raise InputError(
                f"The shard set {path} is not finished: run the same command again (`sdxl-jax data build SRC {path}`), "
                "it goes on where it stopped."
            ) from None
        raise InputError(f"{path} is no shard set: it has no {DESCRIPTION}. {expected}.") from None
    except (OSError, ValueError) as problem:
        raise InputError(f"{path / DESCRIPTION} cannot be read ({problem}). Copy it again, or build anew.") from problem
    version = description.get("format") if isinstance(description, dict) else None
    if version != FORMAT:
        raise InputError(
            f"{path / DESCRIPTION} says format {version}, this version of sdxl-jax reads {FORMAT}. Build the shard set "
            "anew, or use the version that wrote it."
        )
    return description


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a .npy file, mapped. ValueError where it is not of that type and shape."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ValueError(f"it has {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    return array


def _map_text(path: Path, size: int) -> np.ndarray:
    """The bytes of a file, mapped. ValueError where it is not of that size."""
    if (found := path.stat().st_size) != size:
        raise ValueError(f"it has {found} bytes, expected {size}")
    return np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)


def open_shards(path: str | Path) -> ShardSet:
    """Opens a shard set. The index is mapped, so that this takes no longer for many images; no shard is touched.

    Raises InputError: no such folder; not a shard set; not finished; another format; an index that does not fit
    shards.json (a file of it is missing, cut off, or of another build).
    """
    path = Path(path)
    said = read_description(path)
    file = path / DESCRIPTION
    try:
        images, captions = said["images"], said["captions"]
        rows: dict[str, int] = {name: images for name in _DTYPES} | {
            "first_caption": images + 1,
            "caption_start": captions + 1,
            "name_start": images + 1,
            "shard_extent": said["shards"],
        }
        columns: dict[str, np.ndarray] = {}
        for name, (dtype, row) in _DTYPES.items():
            file = path / INDEX / f"{name}.npy"
            columns[name] = _map(file, dtype, (rows[name], *row))
        numbers: dict[str, np.ndarray] = {}
        for number, name in enumerate(said["numbers"]):
            file = path / INDEX / f"number_{number:03d}.npy"
            numbers[name] = _map(file, "<f4", (images,))
        for name, starts in ((CAPTIONS, "caption_start"), (NAMES, "name_start")):
            file = path / name
            columns[name] = _map_text(file, int(columns[starts][-1]))
        file = path / INDEX / "first_caption.npy"
        if (last := int(columns["first_caption"][-1])) != captions:
            raise ValueError(f"it ends at caption {last}, expected {captions}")
        file = path / DESCRIPTION
        return ShardSet(
            path=path,
            fingerprint=said["fingerprint"],
            source=said["source"],
            captions_count=captions,
            refused_count=said["refused"],
            duplicates=said["duplicates"],
            sizes=columns["size"],
            hashes=columns["hash"],
            numbers=numbers,
            _columns=columns,
            _readers=_Readers(path, columns["shard_extent"]),
        )
    except (OSError, ValueError, EOFError, KeyError, TypeError) as problem:
        raise InputError(
            f"The index of the shard set {path} does not fit its {DESCRIPTION}: {file} cannot be used "
            f"({type(problem).__name__}: {problem}). Copy the whole folder again, or build the shard set anew."
        ) from problem
