"""A shard set: captioned images in a few large files, with a compact index that opens in constant time.

    shards/00000.array_record …   the image files' bytes, unchanged, one shard per piece of the source
    index/*.npy                   one column per file, one row per image (or caption), in the order of the source
    captions.bin, names.bin       UTF-8, one after the other without separators; offsets are in the index
    refused.jsonl                 {"file": …, "reason": …} per line
    shards.json                   counts, the source, and the fingerprint of the index; written last

Columns: `size` (height, width; upright, pixels), `shard` and `record` (where the bytes are), `first_caption` and
`caption_start` (image to captions, caption to bytes), `name_start`, `hash` (blake2b of the bytes, 128 bits), and
`number_000` … for numeric fields (shards.json has their names; NaN where an image has none).

`open_shards` memory-maps the columns and reads only their ends. Each shard is an ArrayRecord file of groups of one
record, so that reading an image costs one read, and is checked when it is first read.

A shard set may be in a bucket (gs://…): its shards are read there, everything else from a copy on this machine's disk.

Not here: writing one (build/shard_writing), reading sources (build/records), the parallel build (build/build), copies
of an index (index_copies).
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8

from sdxl_jax.data import index_copies
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.images import decode, why_unreadable
from sdxl_jax.data.record_files import RecordFiles
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError, fault
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, in_bucket, located

FORMAT = 1
"""Version of the layout, in shards.json."""
HASH_BYTES = 16

DESCRIPTION, UNFINISHED = "shards.json", "build.json"  # until its build is complete, a folder has only the second
REFUSED, CAPTIONS, NAMES, INDEX, SHARDS = "refused.jsonl", "captions.bin", "names.bin", "index", "shards"

COLUMN_TYPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "size": ("<i4", (2,)),
    "shard": ("<u4", ()),
    "record": ("<u4", ()),
    "first_caption": ("<i8", ()),
    "caption_start": ("<i8", ()),
    "name_start": ("<i8", ()),
    "hash": ("|u1", (HASH_BYTES,)),
    "shard_extent": ("<i8", (2,)),
}
"""For each column of the index, the dtype and the shape of a row."""


def shard_name(shard: int) -> str:
    """Path of the shard of that number in the folder of a shard set."""
    return f"{SHARDS}/{shard:05d}.array_record"


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSet:
    """An open shard set as an `ImageSource`; an image's number is its row in the index. Made by `open_shards`.

    The index is memory-mapped, not read. A pickle holds the path and the fingerprint: a worker process opens the set
    again, and refuses one that was replaced in the meantime. Methods raise IndexError for an image below 0 or beyond
    the last.
    """

    path: AnyPath
    """Its folder, which may be in a bucket."""
    fingerprint: str
    """A hash of the index, and so of the content of every image, which caches and resumed runs compare."""
    source: str
    """The source that it was built from, as given to the build."""
    whole_captions: bool
    """Built with `--caption-lines whole`: a `.txt` is one caption."""
    captioned: bool
    """Not built with `--no-captions`."""
    captions_count: int
    refused_count: int
    duplicates: int
    """Number of images with the same bytes as an earlier one, whether they were dropped or not."""
    sizes: Int32[np.ndarray, "images 2"]
    """(height, width) in pixels, upright. Memory-mapped, read only, as all arrays here."""
    hashes: UInt8[np.ndarray, "images 16"]
    """blake2b of each image file's bytes, 128 bits."""
    numbers: Mapping[str, Float32[np.ndarray, " images"]]
    """Numeric fields by name. NaN where an image has none."""
    _index: Path = dataclasses.field(repr=False)
    """The folder on this machine with everything but the shards: `path`, or the copy of it."""
    _columns: Mapping[str, Shaped[np.ndarray, "..."]] = dataclasses.field(repr=False)
    _files: RecordFiles = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def found(self) -> int:
        """Number of images, usable or not."""
        return len(self) + self.refused_count

    @property
    def built(self) -> bool:
        """True: the build reported and listed its refusals."""
        return True

    @property
    def reads_text_files(self) -> bool:
        """Whether it was built with whole captions, so that `data.caption_lines=whole` agrees with it."""
        return self.whole_captions

    @property
    def notes(self) -> tuple[str, ...]:
        """Empty: the build printed its warnings."""
        return ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self.fingerprint)

    def _texts(self, starts: Int64[np.ndarray, "_rows"], texts: str, first: int, last: int) -> list[bytes]:
        """Texts first to last − 1 of a file of texts. starts: where each of them begins there."""
        offsets = starts[first : last + 1].tolist()
        blob = self._columns[texts][offsets[0] : offsets[-1]].tobytes()
        return [blob[a - offsets[0] : b - offsets[0]] for a, b in itertools.pairwise(offsets)]

    def _check(self, image: int) -> None:
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} of {len(self)}")

    def captions(self, image: int) -> tuple[str, ...]:
        """All captions of one image, in the order of the source. Raises InputError where they are damaged."""
        self._check(image)
        first, last = self._columns["first_caption"][image : image + 2].tolist()
        texts = self._texts(self._columns["caption_start"], CAPTIONS, first, last)
        try:
            return tuple(text.decode() for text in texts)
        except UnicodeDecodeError as problem:
            raise InputError(
                f"The captions of {self.name(image)} in {self._index / CAPTIONS} are damaged ({problem}). "
                f"{_remedy(self.path, self._index)}"
            ) from problem

    def name(self, image: int) -> str:
        """Path or name of one image in the source."""
        self._check(image)
        return self._texts(self._columns["name_start"], NAMES, image, image + 1)[0].decode(errors="surrogateescape")

    def read(self, image: int) -> bytes:
        """The bytes of one image file, as in the source.

        Raises InputError, naming the shard, where it is missing, cut off or damaged.
        """
        self._check(image)
        shard = int(self._columns["shard"][image])
        size = int(self._columns["shard_extent"][shard, 1])
        return self._files.read(self.path / shard_name(shard), int(self._columns["record"][image]), size)

    def pixels(self, image: int, at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """RGB, 0..255, upright; with `at_least` it may be downscaled while decoding, as in `images.decode`.

        Raises InputError, naming the image, where it is damaged, and as `read` does.
        """
        data = self.read(image)
        try:
            return decode(data, at_least)
        except Exception as problem:  # decoders raise many types on damaged files; each means the same here
            raise InputError(
                f"The image {self.name(image)} of the shard set {self.path} {why_unreadable(problem)}. Build the shard "
                "set again, which leaves such images out"
            ) from problem

    def mask(self, image: int) -> None:
        """None: a shard set has no masks."""

    def refused(self) -> Iterator[Refused]:
        """The images that the build left out, with the reasons."""
        with (self._index / REFUSED).open(encoding="utf-8") as lines:
            for line in lines:
                yield Refused(**json.loads(line))


def _open_again(path: AnyPath, fingerprint: str) -> ShardSet:
    shards = open_shards(path)
    if shards.fingerprint != fingerprint:
        raise InputError(f"The shard set {path} was replaced while it was in use. Start again")
    return shards


def _read(path: AnyPath) -> bytes | None:
    """The content of a file of a shard set; None if there is none. Raises OSError, and for buckets as
    `buckets.reported`."""
    if in_bucket(path):
        return buckets.read_bytes(path, "the shard set")
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_shard_set(path: str | AnyPath) -> bool:
    """Whether a folder holds a shard set or an unfinished build of one."""
    path = located(path, "the shard set")
    return any(
        _read(path / name) is not None if in_bucket(path) else (path / name).exists()
        for name in (DESCRIPTION, UNFINISHED)
    )


def read_description(path: AnyPath) -> dict[str, Any]:
    """The content of shards.json of a complete shard set. Raises InputError as `open_shards`, except for the index."""
    return _description(path)[0]


def _description(path: AnyPath) -> tuple[dict[str, Any], bytes]:
    """As `read_description`, with the bytes of the file."""
    expected = "Expected a folder that `sdxl-jax data build SRC DST` has written"
    if not in_bucket(path) and not path.is_dir():
        raise InputError(f"There is no folder {path}. {expected}. Check the path, seen from {Path.cwd()}")
    try:
        content = _read(path / DESCRIPTION)
        description: Any = None if content is None else json.loads(content)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise fault(problem)(
            f"{path / DESCRIPTION} cannot be read ({problem}). Copy it again, or build the shard set again"
        ) from problem
    if content is None:
        if _read(path / UNFINISHED) is not None:
            raise InputError(
                f"The shard set {path} is not finished: run the same command again (`sdxl-jax data build SRC {path}`), "
                "it resumes where it stopped"
            )
        raise InputError(f"{path} is not a shard set: it has no {DESCRIPTION}. {expected}")
    version = description.get("format") if isinstance(description, dict) else None
    if version != FORMAT:
        given = "no format number" if version is None else f"format {version}"
        raise InputError(
            f"{path / DESCRIPTION} has {given}, this version of sdxl-jax reads format {FORMAT}. Build the shard set "
            "again, or use the version that wrote it"
        )
    return description, content


def _remedy(path: AnyPath, index: Path) -> str:
    if in_bucket(path):
        return f"Remove {index}, so that it is copied from the bucket again, or build the shard set again"
    return "Copy the whole folder again from where the shard set was built, or build the shard set again"


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """The array of a .npy file, memory-mapped. Raises ValueError where it is not of that dtype and shape."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ValueError(
            f"it has {_described(array.dtype, array.shape)}, expected {_described(np.dtype(dtype), shape)}"
        )
    return array


def _described(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype} of shape {'×'.join(map(str, shape))}"


def _map_text(path: Path, size: int) -> UInt8[np.ndarray, " size"]:
    """The bytes of a file, memory-mapped. Raises ValueError where it is not of that size."""
    if (found := path.stat().st_size) != size:
        raise ValueError(f"it has {found} bytes, expected {size}")
    return np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)


def open_shards(path: str | AnyPath) -> ShardSet:
    """Opens a shard set. The index is memory-mapped, so that this takes the same time for any number of images; that of
    a set in a bucket is copied to this machine's disk first, once.

    Raises InputError: no such folder; not a shard set; not finished; another format; an index that does not fit
    shards.json (a file of it is missing, cut off, or of another build). For buckets also as `index_copies.local_copy`.
    """
    path = located(path, "the shard set")
    description, content = _description(path)
    index = (
        index_copies.local_copy(path, path / DESCRIPTION, content, (INDEX, CAPTIONS, NAMES, REFUSED))
        if in_bucket(path)
        else path
    )
    file = index / DESCRIPTION
    try:
        images, captions = description["images"], description["captions"]
        rows: dict[str, int] = {name: images for name in COLUMN_TYPES} | {
            "first_caption": images + 1,
            "caption_start": captions + 1,
            "name_start": images + 1,
            "shard_extent": description["shards"],
        }
        columns: dict[str, np.ndarray] = {}
        for name, (dtype, row) in COLUMN_TYPES.items():
            file = index / INDEX / f"{name}.npy"
            columns[name] = _map(file, dtype, (rows[name], *row))
        numbers: dict[str, np.ndarray] = {}
        for number, name in enumerate(description["numbers"]):
            file = index / INDEX / f"number_{number:03d}.npy"
            numbers[name] = _map(file, "<f4", (images,))
        for name, starts in ((CAPTIONS, "caption_start"), (NAMES, "name_start")):
            file = index / name
            columns[name] = _map_text(file, int(columns[starts][-1]))
        file = index / INDEX / "first_caption.npy"
        if (last := int(columns["first_caption"][-1])) != captions:
            raise ValueError(f"it ends at caption {last}, expected {captions}")
        file = index / DESCRIPTION
        return ShardSet(
            path=path,
            fingerprint=description["fingerprint"],
            source=description["source"],
            whole_captions=description.get("caption_lines") == CaptionLines.WHOLE.value,
            captioned=description.get("captioned", True),
            captions_count=captions,
            refused_count=description["refused"],
            duplicates=description["duplicates"],
            sizes=columns["size"],
            hashes=columns["hash"],
            numbers=numbers,
            _index=index,
            _columns=columns,
            _files=RecordFiles("Copy it again from where the shard set was built, or build the shard set again"),
        )
    except (OSError, ValueError, EOFError, KeyError, TypeError) as problem:
        raise fault(problem)(
            f"The index of the shard set {path} does not fit its {DESCRIPTION}: {file} cannot be used "
            f"({type(problem).__name__}: {problem}). {_remedy(path, index)}"
        ) from problem
