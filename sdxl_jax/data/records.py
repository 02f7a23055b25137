"""Captioned pictures of any source, one after the other, with their bytes as they are: what a build packs into shards.

`units` finds out what a source is and cuts it into pieces; `read` reads one piece, in a process of its own if need be,
holding a few pictures at a time; of Parquet a page, which may be up to 1024 rows or a row group, as the writer chose.
The order is the same every time.

| source | a piece | pictures and captions |
|---|---|---|
| folder of pictures | 1000 files | `metadata.jsonl` or `.csv` where there is one, else `.txt`, `.json` beside |
| `.tar` (also `.tar.gz`, `.tgz`), or a folder of them | a tar | WebDataset: members of the same stem, close together |
| `.parquet`, or a folder of them | row groups | Hugging Face's `image` column, or img2dataset's `jpg` |
| a shard set, built before | 10,000 pictures | as they are in it |
| `tfds:NAME[:SPLIT]` | a shard | tensorflow-datasets prepared as ArrayRecord; read without TensorFlow |

Captions: a `.txt` holds one, or one on each line that is not empty; a field named "text", "caption" or "captions" (the
first of them that is there) holds a text or a list of texts. In `metadata.csv` a file may have several lines, a caption
each. Numeric fields are kept as they are, whatever they mean; those that are not finite are left out.

Whatever cannot be used becomes a `Refused` with its reason. Files that are neither pictures nor captions are passed by.

Not here: addresses to download, resizing, looking for duplicates; fields that are neither captions nor numbers.

Formats: WebDataset, github.com/webdataset/webdataset; img2dataset, github.com/rom1504/img2dataset; imagefolder and the
Image feature, huggingface.co/docs/datasets/image_dataset; tensorflow.org/datasets/data_source.
"""

import csv
import json
import math
import numbers as abstract
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdxl_jax.data.shards import DESCRIPTION, UNFINISHED, open_shards
from sdxl_jax.data.sources import IMAGE_SUFFIXES, Refused, decode, list_files, measure, why_unreadable
from sdxl_jax.errors import InputError

MEMBER_LIMIT = 512 << 20
"""Bytes of one file, tar member or Parquet value; larger ones are refused before they are read."""
CAPTION_FIELDS = ("text", "caption", "captions")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")

_FILES = 1000  # a unit of a folder: enough that starting a unit costs nothing, few enough to share out
_UNIT_BYTES = 256 << 20  # a unit of a Parquet file, if its row groups are smaller
_ROWS = 16  # Parquet rows in memory at once
_OPEN_STEMS = 4  # pictures of a tar whose captions may still come
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_NOT_TEXT = "caption is not UTF-8 text"


class Record(NamedTuple):
    """One picture that can be used."""

    name: str
    """Where it is in the source, unique: `00000.tar/000000123.jpg`, `train.parquet:17` (the row, from 0)."""
    image: bytes
    """As in the source: JPEG, PNG, WebP or BMP, whatever its name says."""
    size: tuple[int, int]
    """(height, width) in pixels, upright, that is after EXIF orientation."""
    captions: tuple[str, ...]
    """One or several, stripped, none empty."""
    numbers: dict[str, float]
    """The source's numeric fields, e.g. an aesthetic score; finite."""


class Unit(NamedTuple):
    """A piece of a source that is read alone. It can be pickled."""

    number: int
    name: str
    """Unique in the source."""
    what: Any
    """For `read`."""


class _Sample(NamedTuple):
    """A picture with captions, before anyone has looked at the picture."""

    name: str
    image: bytes
    captions: tuple[str, ...]
    numbers: dict[str, float]


class _Unusable(Exception):
    """The reason why one sample is refused."""


# Fields, captions and numbers


def _captions_of(value: Any) -> tuple[str, ...]:
    """Captions of a text or a list of texts, as str or UTF-8 bytes."""
    if value is None:
        raise _Unusable("no caption")
    texts = [value] if isinstance(value, str | bytes) else value
    captions = []
    for text in texts if isinstance(texts, list | tuple) else [texts]:
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8-sig")
            if not isinstance(text, str):
                raise _Unusable(f"caption is not text but {type(text).__name__}")
            text.encode()  # half a surrogate pair, as JSON may spell it, is no text either
        except UnicodeError:
            raise _Unusable(_NOT_TEXT) from None
        if text := text.strip():
            captions.append(text)
    if not captions:
        raise _Unusable("empty caption")
    return tuple(captions)


def _caption_field(names: Iterable[str]) -> str | None:
    names = set(names)
    return next((name for name in CAPTION_FIELDS if name in names), None)


def _numbers_of(fields: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in fields.items():
        if isinstance(value, abstract.Real) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number):
                found[_printable(name)] = number
    return found


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Unusable(f"{what} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _Unusable(f"{what} is not a JSON object")
    return fields


def _described(text: bytes | None, fields: bytes | None) -> tuple[tuple[str, ...], dict[str, float]]:
    """Captions and numbers of the contents of a picture's `.txt` and `.json`."""
    found = {} if fields is None else _object(fields, "its .json")
    name = _caption_field(found)
    if text is not None:
        try:
            lines = text.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except UnicodeDecodeError:
            raise _Unusable(_NOT_TEXT) from None
        captions = _captions_of(lines)
    elif name is not None:
        captions = _captions_of(found[name])
    elif fields is not None:
        raise _Unusable(f"image without a caption: no .txt, and none of {', '.join(CAPTION_FIELDS)} in its .json")
    else:
        raise _Unusable("image without a caption: no .txt or .json of the same name")
    return captions, _numbers_of(found)


def _printable(name: str) -> str:
    """Names that are not UTF-8 reach Python as half surrogate pairs, which no file takes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _gone(path: str, problem: OSError) -> InputError:
    return InputError(
        f"{path} cannot be read any more ({problem.strerror or problem}); it was there when the source was listed. "
        "Bring it back, or leave it out of the source, and run the same command again."
    )


# Folder of pictures


class _Picture(NamedTuple):
    name: str
    beside: tuple[str | None, str | None] = (None, None)
    """Its .txt and its .json, where no metadata file speaks."""
    captions: tuple[str, ...] = ()
    numbers: Mapping[str, float] = {}


class _Pictures(NamedTuple):
    folder: str
    pictures: tuple[_Picture, ...]


class _Refusals(NamedTuple):
    """What listing the source found already."""

    refused: tuple[Refused, ...]


def _metadata_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, its fields or the reason why there are none) of `metadata.jsonl` or `metadata.csv`."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, _object(line, "the line")
                    except _Unusable as problem:
                        yield number, str(problem)
        return
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "file_name" not in header or _caption_field(header) is None:
            raise InputError(
                f"{path} has the columns {', '.join(header) or '(none)'}. Expected file_name and one of "
                f"{', '.join(CAPTION_FIELDS)}. Rename the columns in its first line."
            )
        while True:
            try:
                if (row := next(rows, None)) is None:
                    return
            except csv.Error as problem:  # a field too long, for one
                yield rows.line_num, f"the line is no CSV ({problem})"
                continue
            if len(row) != len(header):
                if row:
                    reason = f"{len(row)} fields where the first line has {len(header)}; quote texts with commas"
                    yield rows.line_num, reason
                continue
            fields: dict[str, Any] = dict(zip(header, row, strict=True))
            for name in set(fields) - {"file_name", *CAPTION_FIELDS}:
                try:
                    fields[name] = float(fields[name])
                except ValueError:
                    del fields[name]
            yield rows.line_num, fields


def _pictures_of_metadata(path: Path, images: set[str]) -> tuple[dict[str, _Picture], list[Refused]]:
    several = path.suffix == ".csv"  # it has no lists
    pictures: dict[str, _Picture] = {}
    refused = []
    spoilt = set()
    for number, fields in _metadata_lines(path):
        where = f"{path.name} line {number}"
        if isinstance(fields, str):
            refused.append(Refused(where, fields))
        elif (column := _caption_field(fields)) is None or not isinstance(fields.get("file_name"), str):
            refused.append(Refused(where, 'expected fields like {"file_name": ..., "text": ...}'))
        elif (name := posixpath.normpath(fields["file_name"])) not in images:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            refused.append(Refused(where, f"no image {fields['file_name']} in the folder ({suffixes})"))
        elif name in pictures and not several:
            refused.append(Refused(where, f"{name} has a caption from an earlier line, which stands"))
        else:
            try:
                captions = _captions_of(fields[column])
            except _Unusable as problem:
                refused.append(Refused(where, f"{name}: {problem}"))
                spoilt.add(name)
                continue
            earlier = pictures.get(name, _Picture(name))
            pictures[name] = earlier._replace(
                captions=earlier.captions + captions, numbers={**_numbers_of(fields), **earlier.numbers}
            )
    missing = images - set(pictures) - spoilt
    refused += [
        Refused(name, f"image without a caption: no usable line in {path.name} names it") for name in sorted(missing)
    ]
    return pictures, refused


def _pictures_with_files_beside(names: list[str], images: list[str]) -> tuple[dict[str, _Picture], list[Refused]]:
    beside: dict[str, list[str | None]] = {}
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in (".txt", ".json"):
            beside.setdefault(stem, [None, None])[suffix.lower() == ".json"] = name
    pictures = {}
    for name in images:
        text, fields = beside.get(posixpath.splitext(name)[0], (None, None))
        pictures[name] = _Picture(name, (text, fields))
    stems = {posixpath.splitext(name)[0] for name in images}
    alone = [found[0] for stem, found in beside.items() if stem not in stems]  # a .json may be about anything
    return pictures, [Refused(name, "caption without an image of the same name") for name in alone if name]


def _folder_units(folder: Path, names: list[str], images: list[str]) -> Iterator[tuple[str, Any]]:
    metadata = [name for name in ("metadata.jsonl", "metadata.csv") if name in names]
    if len(metadata) > 1:
        raise InputError(f"{folder} holds both {' and '.join(metadata)}. Expected one of them. Remove the other.")
    if metadata:
        pictures, refused = _pictures_of_metadata(folder / metadata[0], set(images))
    else:
        pictures, refused = _pictures_with_files_beside(names, images)
    if refused:
        yield "refused when listed", _Refusals(tuple(refused))
    usable = [pictures[name] for name in images if name in pictures]
    for start in range(0, len(usable), _FILES):
        chosen = tuple(usable[start : start + _FILES])
        yield f"pictures {start}-{start + len(chosen) - 1}", _Pictures(str(folder), chosen)


def _file_bytes(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _Unusable("not a regular file")
        if status.st_size > MEMBER_LIMIT:
            raise _Unusable(f"{status.st_size} bytes, the limit is {MEMBER_LIMIT}")
        with open(path, "rb") as file:
            return file.read()
    except PermissionError as problem:
        raise _Unusable(f"cannot be opened ({problem.strerror})") from None
    except OSError as problem:
        if os.path.islink(path):
            raise _Unusable("a link to nothing") from None
        raise _gone(path, problem) from problem


def _read_pictures(what: _Pictures) -> Iterator[_Sample | Refused]:
    for picture in what.pictures:
        try:
            captions, numbers = picture.captions, dict(picture.numbers)
            if not captions:
                contents = [None if name is None else _file_bytes(f"{what.folder}/{name}") for name in picture.beside]
                captions, numbers = _described(*contents)
            yield _Sample(picture.name, _file_bytes(f"{what.folder}/{picture.name}"), captions, numbers)
        except _Unusable as problem:
            yield Refused(picture.name, str(problem))


# Tars


class _Tar(NamedTuple):
    path: str
    name: str


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, and says nothing."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile)
        except _END:
            raise
        except _HEADER_ERROR as problem:
            raise _READ_ERROR(str(problem)) from None


_END: Any = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_HEADER_ERROR, _READ_ERROR = tarfile.HeaderError, tarfile.ReadError


class _Stem:
    """What has come of the members with one stem."""

    def __init__(self) -> None:
        self.image: tuple[str, bytes] | None = None
        self.captions: dict[str, tuple[str, bytes]] = {}  # by suffix
        self.refused = False  # one of them is, which says enough

    def close(self, used: set[str]) -> _Sample | Refused | None:
        if self.refused or (self.image is None and not self.captions):  # empty where the tar is cut off
            return None
        if self.image is None:
            name, _ = next(iter(self.captions.values()))
            return Refused(name, "caption without an image of the same name close to it in the tar")
        name, image = self.image
        if name in used:
            return Refused(name, "a second image of this name; the first stands")
        used.add(name)
        try:
            text, fields = (self.captions[suffix][1] if suffix in self.captions else None for suffix in _BESIDE)
            return _Sample(name, image, *_described(text, fields))
        except _Unusable as problem:
            far = ", close to it in the tar (`tar --sort=name` writes them so)"
            return Refused(name, f"{problem}{far if text is None and fields is None else ''}")


_BESIDE = (".txt", ".json")


def _read_tar(what: _Tar) -> Iterator[_Sample | Refused]:
    stems: dict[str, _Stem] = {}  # in the order of their first members
    used: set[str] = set()
    seen = pictures = 0
    last = "the beginning"

    def close(count: int) -> Iterator[_Sample | Refused]:
        while len(stems) > count:
            if (closed := stems.pop(next(iter(stems))).close(used)) is not None:
                yield closed

    try:
        with tarfile.open(what.path, "r|*", tarinfo=_Member) as opened:
            archive: Any = opened
            while (member := archive.next()) is not None:
                archive.members.clear()  # else it keeps every header of a tar of any length
                seen += 1
                path = posixpath.normpath(member.name)
                name = f"{what.name}/{path}"
                if path.startswith("/") or ".." in member.name.split("/"):
                    yield Refused(f"{what.name}/{member.name}", "its path leads out of the tar: absolute, or with ..")
                    continue
                stem, suffix = posixpath.splitext(path)
                suffix = suffix.lower()
                hidden = posixpath.basename(path).startswith(".")
                if member.isdir() or hidden or suffix not in (*IMAGE_SUFFIXES, *_BESIDE):
                    continue
                yield from close(_OPEN_STEMS if stem in stems else _OPEN_STEMS - 1)
                if stem not in stems:
                    stems[stem] = _Stem()
                group = stems[stem]
                pictures += suffix in IMAGE_SUFFIXES
                if not member.isfile():
                    yield Refused(name, "a link or a device, not a file")
                    group.refused = True
                elif member.size > MEMBER_LIMIT:
                    yield Refused(name, f"{member.size} bytes, the limit is {MEMBER_LIMIT}")
                    group.refused = True
                elif suffix in IMAGE_SUFFIXES and group.image is not None:
                    yield Refused(name, f"a second image of the same stem; {posixpath.basename(group.image[0])} stands")
                else:
                    data = archive.extractfile(member).read()
                    if suffix in IMAGE_SUFFIXES:
                        group.image = name, data
                    else:
                        group.captions.setdefault(suffix, (name, data))
                last = path
    except (tarfile.TarError, EOFError) as problem:
        yield from (closed for closed in close(0) if isinstance(closed, _Sample))  # others miss what the cut took
        yield Refused(what.name, f"cut off or damaged after {last} ({problem}); what comes behind is lost")
    except OSError as problem:
        raise _gone(what.path, problem) from problem
    else:
        yield from close(0)
        if not pictures:
            yield Refused(what.name, f"no image ({', '.join(IMAGE_SUFFIXES)}) among its {seen} members")


# Parquet


class _Parquet(NamedTuple):
    path: str
    name: str
    groups: tuple[int, int]
    """First row group, and the one after the last."""
    row: int
    """Number of its first row in the file."""
    image: str
    caption: str
    numbers: tuple[str, ...]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("Reading Parquet needs pyarrow, which is not installed. Run: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _is_image(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(arrow, field.type) for field in kind)
    tests = (arrow.types.is_binary, arrow.types.is_large_binary, arrow.types.is_binary_view)
    return any(test(kind) for test in tests)


def _parquet_columns(arrow: Any, schema: Any) -> tuple[str | None, str | None, tuple[str, ...]]:
    """The columns of images and captions, None where there is none, and those of numbers."""
    kinds = {field.name: field.type for field in schema}
    image = next((name for name in IMAGE_COLUMNS if name in kinds and _is_image(arrow, kinds[name])), None)
    numeric = (arrow.types.is_integer, arrow.types.is_floating)
    numbers = tuple(name for name, kind in kinds.items() if any(test(kind) for test in numeric))
    return image, _caption_field(kinds), numbers


def _holds_images(path: Path) -> bool:
    """Whether a Parquet file has a column of images; img2dataset writes one without beside each tar."""
    arrow, parquet = _pyarrow()
    try:
        return _parquet_columns(arrow, parquet.read_schema(path))[0] is not None
    except (OSError, arrow.ArrowException):
        return False


def _parquet_units(paths: list[tuple[Path, str]]) -> Iterator[tuple[str, Any]]:
    arrow, parquet = _pyarrow()
    damaged = []
    for path, name in paths:
        try:
            with parquet.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (arrow.ArrowException, OSError) as problem:
            damaged.append(Refused(name, f"cannot be read as Parquet ({' '.join(str(problem).split())})"))
            continue
        image, caption, numbers = _parquet_columns(arrow, schema)
        if image is None or caption is None:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(
                f"{path} has the columns {columns or '(none)'}. Expected an image column named one of "
                f"{', '.join(IMAGE_COLUMNS)} (binary, or a struct with binary bytes) and a caption column named one of "
                f"{', '.join(CAPTION_FIELDS)}. Rename the columns, or give another file."
            )
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        first = first_row = row = size = 0
        for number, group in enumerate(groups):
            row, size = row + group.num_rows, size + group.total_byte_size
            if size >= _UNIT_BYTES or number + 1 == len(groups):
                whole = (first, number + 1) == (0, len(groups))
                what = _Parquet(str(path), name, (first, number + 1), first_row, image, caption, numbers)
                yield (name if whole else f"{name}:{first_row}-{row - 1}"), what
                first, first_row, size = number + 1, row, 0
    if len(damaged) == len(paths):
        raise InputError(f"No Parquet file can be read: {damaged[0].file} {damaged[0].reason}. Copy it again.")
    if damaged:
        yield "refused when listed", _Refusals(tuple(damaged))


def _parquet_row(name: str, columns: Mapping[str, Any], row: int, what: _Parquet) -> _Sample | Refused:
    try:
        image = columns[what.image][row].as_py()
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise _Unusable("no image bytes in the row")
        if len(image) > MEMBER_LIMIT:
            raise _Unusable(f"{len(image)} bytes, the limit is {MEMBER_LIMIT}")
        try:
            captions = _captions_of(columns[what.caption][row].as_py())
        except UnicodeDecodeError:
            raise _Unusable(_NOT_TEXT) from None
        return _Sample(name, image, captions, _numbers_of({key: columns[key][row].as_py() for key in what.numbers}))
    except _Unusable as problem:
        return Refused(name, str(problem))


def _read_parquet(what: _Parquet) -> Iterator[_Sample | Refused]:
    arrow, parquet = _pyarrow()
    row = what.row
    try:
        # With a buffer size it reads page by page, without one a whole column of a row group.
        with parquet.ParquetFile(what.path, buffer_size=1 << 20, pre_buffer=False) as file:
            nested = arrow.types.is_struct(file.schema_arrow.field(what.image).type)
            columns = [f"{what.image}.bytes" if nested else what.image, what.caption, *what.numbers]
            for group in range(*what.groups):
                end = row + file.metadata.row_group(group).num_rows
                try:
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
                        found = {name: batch.column(name) for name in {what.image, what.caption, *what.numbers}}
                        for number in range(batch.num_rows):
                            yield _parquet_row(f"{what.name}:{row + number}", found, number, what)
                        row += batch.num_rows
                except (arrow.ArrowException, OSError) as problem:
                    if isinstance(problem, OSError) and problem.errno:  # the file system's; damage has no number
                        raise
                    reason = f"rows {row} to {end - 1} cannot be read ({' '.join(str(problem).split())})"
                    yield Refused(what.name, reason)
                row = end
    except OSError as problem:
        raise _gone(what.path, problem) from problem
    except arrow.ArrowException as problem:  # its end, which was read when the source was listed
        raise InputError(f"{what.path} has changed since it was listed ({problem}). Start again.") from problem


# tensorflow-datasets


class _Tfds(NamedTuple):
    directory: str
    shard: str
    records: tuple[int, int]
    """First record of the shard, and the one after the last."""
    image: str
    caption: str


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise InputError(
            "tfds:… needs tensorflow-datasets, which is not installed. Run: pip install tensorflow-datasets"
        ) from None
    return tensorflow_datasets


def _tfds_units(source: str) -> Iterator[tuple[str, Any]]:
    tfds = _tfds()
    version = r"(?::(?:\d+|\*)\.(?:\d+|\*)\.(?:\d+|\*))?"
    match = re.fullmatch(rf"tfds:([^:]+{version})(?::(.+))?", source)
    if match is None:
        raise InputError(
            f"{source} is not understood. Expected tfds:NAME[:SPLIT], e.g. tfds:coco_captions:train[:10%]."
        )
    name, split = match[1], match[2] or "train"
    prepare = (
        'Prepare it once, where TensorFlow is installed: python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"'{name}', file_format='array_record').download_and_prepare()\""
    )
    try:
        # From its files alone: the code of many data sets imports TensorFlow.
        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.core.read_only_builder.builder_from_files(name)
    except (tfds.core.DatasetNotFoundError, OSError) as problem:
        raise InputError(
            f"{source}: no prepared data set {name} found ({' '.join(str(problem).split())}). {prepare}. If it lies "
            "elsewhere, set TFDS_DATA_DIR, or give its folder: tfds:/path/to/NAME/VERSION."
        ) from None
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format and builder.info.file_format.value
        raise InputError(f"{source} is prepared as {found}, expected array_record. {prepare}.")
    features = builder.info.features
    images = [key for key in sorted(features) if type(features[key]) is tfds.features.Image]
    image = "image" if "image" in images else next(iter(images), None)
    caption = _caption_field(features)
    if image is None or caption is None:
        known = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise InputError(
            f"{source} has the features {known}. Expected an Image, and one of {', '.join(CAPTION_FIELDS)}. "
            "Give a data set with captions."
        )
    try:
        pieces = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as problem:
        known = ", ".join(builder.info.splits)
        raise InputError(
            f"{source} has no split {split} ({problem}). Expected one of {known}, or part of one."
        ) from None
    for piece in pieces:
        shard = os.path.basename(piece.filename)
        records = piece.skip, piece.skip + piece.take
        yield f"{shard}:{records[0]}-{records[1] - 1}", _Tfds(str(builder.data_path), shard, records, image, caption)


def _read_tfds(what: _Tfds) -> Iterator[_Sample | Refused]:
    tfds = _tfds()
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    start, end = what.records
    path = f"{what.directory}/{what.shard}"
    try:
        features = tfds.builder_from_directory(what.directory).info.features
        source = ArrayRecordDataSource([f"{path}[{start}:{end}]"])
        for number in range(end - start):
            record = source[number]
            name = f"{what.shard}:{start + number}"
            try:
                decoders = {what.image: tfds.decode.SkipDecoding()}
                fields = features.deserialize_example_np(record, decoders=decoders)
                captions = fields[what.caption]
                captions = captions.get("text") if isinstance(captions, dict) else captions  # coco_captions nests them
                captions = captions.tolist() if isinstance(captions, np.ndarray) else captions
                yield _Sample(name, fields[what.image], _captions_of(captions), _numbers_of(fields))
            except _Unusable as problem:
                yield Refused(name, str(problem))
    except OSError as problem:
        raise _gone(path, problem) from problem
    except (RuntimeError, ValueError, IndexError) as problem:  # array_record's, for a missing shard and for a cut one
        raise InputError(f"{path} cannot be read ({' '.join(str(problem).split())}). Prepare it again.") from problem


# Shard sets


class _ShardSet(NamedTuple):
    """Some images of a shard set that was built before."""

    path: str
    first: int
    last: int
    """The one behind the last."""


_SHARD_SET_IMAGES = 10_000
"""In a unit."""


def _shard_set_units(path: Path) -> Iterator[tuple[str, Any]]:
    count = len(open_shards(path))
    for first in range(0, count, _SHARD_SET_IMAGES):
        last = min(count, first + _SHARD_SET_IMAGES)
        yield f"images {first} to {last - 1}", _ShardSet(str(path), first, last)


def _read_shard_set(what: _ShardSet) -> Iterator[_Sample]:
    shards = open_shards(what.path)
    for image in range(what.first, what.last):
        numbers = {name: float(column[image]) for name, column in shards.numbers.items()}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        yield _Sample(shards.name(image), shards.read(image), shards.captions(image), numbers)


# Any source


def units(source: str | Path) -> list[Unit]:
    """The pieces of a source, always in the same order; their contents are not read yet.

    Of a folder the names are listed, with its metadata file; of Parquet files the footers are read.

    Raises InputError: no such source; not one of the known kinds, or several kinds in one folder; no column of images
    or of captions, a package that is missing, a TFDS data set that is not prepared.
    """
    found = list(_tfds_units(str(source)) if str(source).startswith("tfds:") else _path_units(Path(source)))
    if not found:
        raise InputError(f"{source} holds no records at all. Give another source.")
    return [Unit(number, _printable(name), what) for number, (name, what) in enumerate(found)]


def _path_units(path: Path) -> Iterator[tuple[str, Any]]:
    expected = "Expected a folder of pictures, .tar or .parquet files, one such file, a shard set, or tfds:NAME"
    if any((path / name).exists() for name in (DESCRIPTION, UNFINISHED)):
        yield from _shard_set_units(path)
        return
    if not path.exists():
        raise InputError(f"{path} does not exist. {expected}. Check the path, seen from {Path.cwd()}.")
    if path.is_dir():
        names, refused = list_files(path)
        root = path
    else:
        names, refused = [path.name], []
        root = path.parent
    tars = [name for name in names if name.lower().endswith(_TAR_SUFFIXES)]
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    images = [name for name in names if path.is_dir() and name.lower().endswith(IMAGE_SUFFIXES)]
    if parquet and (tars or images) and not any(_holds_images(root / name) for name in parquet):
        parquet = []  # img2dataset's notes on what it wrote
    kinds = {"pictures": images, "tars": tars, "Parquet files": parquet}
    present = [f"{len(found)} {kind} ({found[0]}, …)" for kind, found in kinds.items() if found]
    if not present:
        raise InputError(f"{path} holds none of these among its {len(names)} files. {expected}.")
    if len(present) > 1:
        raise InputError(f"{path} holds {' and '.join(present)}. {expected}, of one kind: give them one at a time.")
    if refused:
        yield "folders that cannot be listed", _Refusals(tuple(refused))
    if tars:
        for name in tars:
            yield name, _Tar(str(root / name), name)
    elif parquet:
        yield from _parquet_units([(root / name, name) for name in parquet])
    else:
        yield from _folder_units(root, names, images)


def _samples(what: Any) -> Iterator[_Sample | Refused]:
    match what:
        case _Refusals():
            yield from what.refused
        case _Pictures():
            yield from _read_pictures(what)
        case _Tar():
            yield from _read_tar(what)
        case _Parquet():
            yield from _read_parquet(what)
        case _Tfds():
            yield from _read_tfds(what)
        case _ShardSet():
            yield from _read_shard_set(what)
        case _:
            raise AssertionError(f"no unit of ours: {type(what)}")


def read(unit: Unit, *, verify: bool = True) -> Iterator[Record | Refused]:
    """The pictures of one piece in their order, and what cannot be used, where it stood.

    With `verify` every image is decoded, some 15 ms of one core a megapixel of JPEG: damage behind the header shows in
    no other way. Without, headers alone are read.

    Raises InputError where the source disappears, or its storage fails, while it is read.
    """
    for sample in _samples(unit.what):
        if isinstance(sample, Refused):
            yield Refused(_printable(sample.file), _printable(sample.reason))
            continue
        name = _printable(sample.name)
        try:
            if not sample.image:
                raise _Unusable("zero bytes")
            height, width = decode(sample.image).shape[:2] if verify else measure(sample.image)
        except _Unusable as problem:
            yield Refused(name, str(problem))
        except Exception as problem:  # decoders raise many types on damaged files; each means the same here
            yield Refused(name, why_unreadable(problem))
        else:
            yield Record(name, sample.image, (height, width), sample.captions, sample.numbers)
