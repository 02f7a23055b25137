"""Writes a shard set: each piece of a source into its own folder (a part), then one index over all parts.

`PartWriter` writes a part, `FinishedPart` reads it, `IndexWriter` concatenates the columns of all parts. Whatever
counts as finished is synced to the disk before the next step begins.

Not here: the layout of a shard set and reading it (shards); the order of these steps (build).
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, UInt8, UInt32

from sdxl_jax.data.captions import check_number_names
from sdxl_jax.data.record_files import RecordWriter
from sdxl_jax.data.shards import CAPTIONS, COLUMN_TYPES, FORMAT, HASH_BYTES, INDEX, NAMES, REFUSED
from sdxl_jax.data.sources import Refused
from sdxl_jax.files.atomic import sync, write_text

_RECORDS, COLUMNS = "records.array_record", "columns.npz"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomic write of a JSON file."""
    write_text(path, json.dumps(content, indent=2) + "\n", durable=True)


class Columns(NamedTuple):
    """The columns of the index for consecutive images, strings as concatenated bytes with their lengths."""

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
    """The columns of the images for which `keep` is true."""
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
    """Writes one piece of a source into an empty folder: its records, its columns, its refusals.

    Holds the columns in memory and no image. A context manager; without `finish` the folder is not usable. OSError
    where the disk is full or fails.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = 0
        self.refusals = 0
        self._records: RecordWriter | None = None
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
        """Appends one image: its file's bytes, (height, width) upright. Refused where a caption has an unpaired
        surrogate."""
        try:
            texts = [caption.encode() for caption in captions]
        except UnicodeEncodeError:
            return self.refuse(Refused(name, "caption is not UTF-8 text"))
        if self._records is None:
            self._records = RecordWriter(self.folder / _RECORDS)
        self._records.write(image)
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
        """Records one entry of the source that is left out."""
        self.refusals += 1
        self._refused.write(json.dumps(refused._asdict(), ensure_ascii=False) + "\n")

    @property
    def captions(self) -> int:
        """Number of captions so far."""
        return len(self._caption_lengths)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *problem: object) -> None:
        self._refused.close()

    def finish(self) -> None:
        """Closes the files and waits until they are on the disk."""
        self._refused.close()
        if self._records is not None:
            self._records.close()
        matrix = np.full((len(self._numbers), self.images), np.nan, np.float32)
        for row, values in zip(matrix, self._numbers.values(), strict=True):
            with np.errstate(over="ignore"):  # beyond the range of float32 a number becomes infinite
                row[list(values)] = list(values.values())
        np.savez(
            self.folder / COLUMNS,
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


class FinishedPart:
    """A finished part, as PartWriter wrote it. Each array is read on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.records = folder / _RECORDS
        """Exists where the part has a usable image, until the build moves it."""

    def _read(self, *names: str) -> list[Shaped[np.ndarray, "..."]]:
        with np.load(self.folder / COLUMNS) as arrays:
            return [arrays[name] for name in names]

    def count(self) -> int:
        """The number of images."""
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


class _Appended:
    """An append-only file, hashed as it grows; with npy a .npy array of this dtype, with rows of shape `row`."""

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

    def append(self, values: Shaped[np.ndarray, "rows ..."]) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        assert values.shape[1:] == self._row
        flat = values.reshape(-1).view(np.uint8).data
        self._file.write(flat)
        self._hash.update(flat)
        self.rows += len(values)

    def close(self) -> str:
        """Completes the file and syncs it to the disk. Returns its name, rows and hash, which identify its content."""
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
    """Writes the index of a shard set from columns of consecutive images; memory holds those of one append.

    number_names: the names of all numeric columns of the set, sorted. Overwrites the files of an interrupted writer. A
    context manager. OSError where the disk is full or fails.
    """

    def __init__(self, folder: Path, number_names: list[str]):
        (folder / INDEX).mkdir(parents=True, exist_ok=True)
        self.number_names = number_names
        self._columns = {
            name: _Appended(folder / INDEX / f"{name}.npy", dtype, row) for name, (dtype, row) in COLUMN_TYPES.items()
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
        """Appends images, with the number of each one's shard and of its record in the shard."""
        files = self._columns
        files["size"].append(columns.size)
        files["hash"].append(columns.hash)
        files["shard"].append(shard)
        files["record"].append(record)
        files["first_caption"].append(self._captions + np.cumsum(columns.caption_counts))
        files["caption_start"].append(self._texts[CAPTIONS].rows + np.cumsum(columns.caption_lengths))
        files["name_start"].append(self._texts[NAMES].rows + np.cumsum(columns.name_lengths))
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
        """Appends a shard of `records` records whose file has `size` bytes; (0, 0) for a piece without images."""
        self._columns["shard_extent"].append(np.array([[records, size]]))

    def finish(self) -> dict[str, Any]:
        """Closes the files. Returns their entries of shards.json: images, captions, shards, numbers, fingerprint."""
        content = [file.close() for file in self._files]
        identity = json.dumps([FORMAT, self.number_names, content])
        return {
            "images": self.images,
            "captions": self._captions,
            "shards": self._columns["shard_extent"].rows,
            "numbers": self.number_names,
            "fingerprint": hashlib.blake2b(identity.encode(), digest_size=HASH_BYTES).hexdigest(),
        }
