"""Captioned images of any source, one after the other, with their bytes unchanged: what a build packs into shards.

`units` detects the kind of a source and cuts it into pieces; `read` streams one piece, in any process, with a few
images in memory at a time (Parquet: a page, which may be up to 1024 rows or a row group, as its writer chose). The
order is the same every time.

| source | one piece | images and captions |
|---|---|---|
| folder of images | 1000 files | `metadata.jsonl` or `.csv` where there is one, else `.txt`, `.json` beside |
| `.tar` (also `.tar.gz`, `.tgz`), or a folder of them | one tar | WebDataset: members of one stem, close together |
| `.parquet`, or a folder of them | row groups | Hugging Face's `image` column, or img2dataset's `jpg` |
| a shard set | 10,000 images | as they are in it |
| `tfds:NAME[:SPLIT]` | one shard | tensorflow-datasets prepared as ArrayRecord; read without TensorFlow |

All but the last may be in a bucket (gs://…).

Each kind has its module, `folders`, `tars`, `parquet` and `tfds`; `captions` defines captions and numeric fields.
Whatever cannot be used becomes a `Refused` with its reason. Files that are neither images nor captions are ignored.

Not here: downloading URLs, resizing, finding duplicates; fields that are neither captions nor numbers.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from sdxl_jax.data import folders, formats
from sdxl_jax.data.build import parquet, tars, tfds
from sdxl_jax.data.captions import UNCAPTIONED, CaptionLines
from sdxl_jax.data.images import usable_size
from sdxl_jax.data.shards import is_shard_set, open_shards
from sdxl_jax.data.sources import Piece, RawExample, Refusals, Refused, Unusable
from sdxl_jax.errors import InputError
from sdxl_jax.files import buckets, objects
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.files.text import printable

_SHARD_SET_IMAGES = 10_000  # per piece of a shard set


class Record(NamedTuple):
    """One image that can be used."""

    name: str
    """Where it is in the source, unique: `00000.tar/000000123.jpg`, `train.parquet:17` (the row, from 0)."""
    image: bytes
    """The file's bytes, in one of the formats that are read (formats), whatever its suffix says."""
    size: tuple[int, int]
    """(height, width) in pixels, upright, that is after EXIF orientation."""
    captions: tuple[str, ...]
    """One or several, stripped, none empty."""
    numbers: dict[str, float]
    """The source's numeric fields, e.g. an aesthetic score; finite."""


class Unit(NamedTuple):
    """A numbered piece of a source, read independently of the others. It can be pickled."""

    number: int
    name: str
    """Unique in the source."""
    piece: Any
    """A `Piece`, which `read` reads."""


class ShardSetPiece(NamedTuple):
    """A range of images of an existing shard set."""

    path: str
    first: int
    last: int
    """The one after the last."""

    def samples(self) -> Iterator[RawExample | Refused]:
        shards = open_shards(self.path)
        for image in range(self.first, self.last):
            numbers = {name: float(column[image]) for name, column in shards.numbers.items()}
            numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
            yield RawExample(shards.name(image), shards.read(image), shards.captions(image), numbers)


def _shard_set_pieces(path: AnyPath) -> Iterator[tuple[str, Piece]]:
    count = len(open_shards(path))
    for first in range(0, count, _SHARD_SET_IMAGES):
        last = min(count, first + _SHARD_SET_IMAGES)
        yield f"images {first} to {last - 1}", ShardSetPiece(str(path), first, last)


def _pieces(path: AnyPath, captioned: bool, class_folders: bool) -> Iterator[tuple[str, Piece]]:
    expected = "Expected a folder of images, .tar or .parquet files, one such file, a shard set, or tfds:NAME"
    if is_shard_set(path):
        yield from _shard_set_pieces(path)
        return
    is_folder, names, refused = _list(path, expected)
    root = path if is_folder else path.parent
    archives = [name for name in names if name.lower().endswith(tars.TAR_SUFFIXES)]
    tables = [name for name in names if name.lower().endswith(".parquet")]
    images = folders.images_among(names) if is_folder else []
    if archives or tables:  # beside them an image of an unread format is refused, and is not a second kind
        others = [name for name in images if not formats.is_read_name(name)]
        images = [name for name in images if formats.is_read_name(name)]
        refused += [Refused(name, "an image beside tars or tables, in a format that is not read") for name in others]
    if tables and (archives or images) and not any(parquet.holds_images(root / name) for name in tables):
        tables = []  # img2dataset's metadata of the images that it wrote
    kinds = {"images": images, "tars": archives, "Parquet files": tables}
    present = [f"{len(found)} {kind} ({found[0]}, …)" for kind, found in kinds.items() if found]
    if not present:
        given = f"has no such files among its {len(names)}" if is_folder else "is a file of another kind"
        raise InputError(f"{path} {given}. {expected}")
    if len(present) > 1:
        raise InputError(f"{path} holds {' and '.join(present)}. {expected}, of one kind. Build a shard set of each")
    if refused:
        yield "refused when listed", Refusals(tuple(refused))
    if archives:
        for name in archives:
            yield name, tars.TarPiece(str(root / name), name)
    elif tables:
        yield from parquet.pieces([(root / name, name) for name in tables], captioned)
    else:
        yield from folders.pieces(root, names, captioned, class_folders)


def _list(path: AnyPath, expected: str) -> tuple[bool, list[str], list[Refused]]:
    """Whether a source is a folder, the names of its files, and what cannot be listed."""
    if in_bucket(path):
        if objects.size(path, "the source") is not None:
            return False, [path.name], []
        if not buckets.files(path, "the source"):
            raise InputError(f"{path} does not exist: the bucket has no object of that name, or below it. {expected}")
    elif not path.exists():
        raise InputError(f"{path} does not exist. {expected}. Check the path, relative to {Path.cwd()}")
    elif not path.is_dir():
        return False, [path.name], []
    return True, *folders.list_files(path)


def units(source: str | AnyPath, *, captioned: bool = True, class_folders: bool = False) -> list[Unit]:
    """The pieces of a source, always in the same order; images are not read yet.

    captioned: whether captions are used. class_folders: whether the subfolders of a folder of images are classes, the
    numeric field `folders.FOLDER`.

    Reads the file names of a folder and its metadata file, the footers of Parquet files.

    Raises InputError: no such source; not one of the known kinds, or several kinds in one folder; no image or caption
    column; a package that is missing; a TFDS data set that is not prepared; class folders without subfolders, or in a
    source that is not a folder of images.
    """
    found = list(
        tfds.pieces(str(source), captioned)
        if str(source).startswith(tfds.PREFIX)
        else _pieces(located(source, "the source"), captioned, class_folders)
    )
    if not found:
        raise InputError(f"{source} is empty. Expected a source with at least one image. Give another source")
    return [Unit(number, printable(name), piece) for number, (name, piece) in enumerate(found)]


def check_caption_lines(source: str | AnyPath, found: list[Unit], caption_lines: CaptionLines) -> None:
    """InputError where the setting would have no effect: no `.txt` is read."""
    if caption_lines is not CaptionLines.LINES and not any(_reads_text_files(unit.piece) for unit in found):
        raise InputError(
            f"--caption-lines {caption_lines.value} has no effect: {source} has no captions in .txt files. Omit the "
            "option"
        )


def check_class_folders(source: str | AnyPath, found: list[Unit]) -> None:
    """InputError where the classes of subfolders are asked for, and the source has no images in folders."""
    if not any(isinstance(unit.piece, folders.FolderPiece) for unit in found):
        raise InputError(
            f"--class-folders has no effect: {source} is not a folder of images. Omit the option; classes of tars are "
            "in .cls or .json members, those of tables in numeric columns"
        )


def _reads_text_files(piece: Any) -> TypeGuard[folders.FolderPiece | tars.TarPiece]:
    return isinstance(piece, folders.FolderPiece | tars.TarPiece) and piece.reads_text_files


def read(
    unit: Unit, *, verify: bool = True, caption_lines: CaptionLines | None = CaptionLines.LINES
) -> Iterator[Record | Refused]:
    """The images of one piece in their order, with a `Refused` in the place of each entry that cannot be used.

    `caption_lines`: what the lines of a `.txt` are; None: captions are not used, and every image has "". With `verify`
    every image is decoded, which takes one core about 15 ms per megapixel of JPEG and is the only way to find damage
    after the header. Without, only headers are read.

    Raises InputError where the source disappears while it is read, MachineError where its storage fails.
    """
    piece: Piece = unit.piece
    described = isinstance(piece, folders.FolderPiece | tars.TarPiece)
    samples = piece.samples(caption_lines) if described else piece.samples()
    for sample in samples:
        if isinstance(sample, Refused):
            yield Refused(*map(printable, sample))
            continue
        name = printable(sample.name)
        try:
            size = usable_size(sample.image, verify=verify)
        except Unusable as problem:
            yield Refused(name, str(problem))
        else:
            captions = UNCAPTIONED if caption_lines is None else sample.captions
            yield Record(name, sample.image, size, captions, sample.numbers)
