"""A folder of captioned images: what is in it, how large, what cannot be used and why; for training and for a build.

Captions and numbers stand

- in `metadata.jsonl` in the folder, `{"file_name": ..., "text": ...}` a line, or in `metadata.csv` with such columns
  (Hugging Face's imagefolder). Where there is one, it gives every caption, and nothing beside the images is read. In
  CSV a file may have several lines, a caption each;
- else in a `.txt` or `.json` beside each image, with the same stem.

What they may hold is in `captions`. A metadata file further below is not read, and is named (`FolderSource.notes`).
Whatever goes by the name of an image counts, in any format (formats). Listing reads names, the metadata file and the
beginnings of files that might be anything. The images, and what lies beside them, are then read by the same rules,
for training all at once in eight threads (`open_folder`), for a build a thousand at a time (`pieces`). Folders are read
recursively, without hidden files; links to folders are followed.

Not here: decoding (images), folders of tars or of Parquet files (build/records).
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from tqdm import tqdm

from sdxl_jax.data import formats
from sdxl_jax.data.captions import (
    CAPTION_FIELDS,
    CaptionLines,
    caption_field,
    captions_of,
    check_number_names,
    described,
    json_fields,
    numbers_of,
)
from sdxl_jax.data.images import read_image, usable_size
from sdxl_jax.data.sources import (
    BYTES_LIMIT,
    OnRefused,
    RawExample,
    Refusals,
    Refused,
    Unusable,
    gone,
    printable,
    stop_if_refused,
    summary,
)
from sdxl_jax.errors import InputError
from sdxl_jax.files import text as texts

_FILES = 1000  # a piece of a folder: enough that starting one costs nothing, few enough to share out
_THREADS = 8  # the wait is for the disk, and both decoders release the interpreter's lock
_METADATA = ("metadata.jsonl", "metadata.csv")


# Listing


class ListedImage(NamedTuple):
    """What listing a folder says of one image: its captions, or where they are."""

    name: str
    """Relative to the folder."""
    beside: tuple[str | None, str | None] = (None, None)
    """Its .txt and its .json, where no metadata file speaks."""
    captions: tuple[str, ...] = ()
    numbers: Mapping[str, float] = {}


def list_files(folder: Path) -> tuple[list[str], list[Refused]]:
    """Every file below the folder, as sorted relative names, hidden ones left out; links to folders are followed."""
    names, seen, refused = [], set(), []

    def unreadable(problem: OSError) -> None:
        refused.append(Refused(os.path.relpath(problem.filename, folder), f"cannot be listed ({problem.strerror})"))

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(root)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            names += [(Path(root) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(names), refused


def images_among(names: list[str]) -> list[str]:
    """The names that are those of image files, in formats that are read and in others."""
    return [name for name in names if formats.is_image_name(name)]


def _metadata_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, its fields or the reason why there are none) of `metadata.jsonl` or `metadata.csv`."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(texts.utf8_lines(path), start=1):
            if line.strip():
                try:
                    yield number, json_fields(line, "the line")
                except Unusable as problem:
                    yield number, str(problem)
        return
    with path.open("rb") as file:
        encoding = texts.encoding_of(file.read(4))
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "file_name" not in header or caption_field(header) is None:
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


def _images_of_metadata(path: Path, images: set[str]) -> tuple[dict[str, ListedImage], list[Refused]]:
    several = path.suffix == ".csv"  # it has no lists
    pictures: dict[str, ListedImage] = {}
    refused = []
    spoilt = set()
    for number, fields in _metadata_lines(path):
        where = f"{path.name} line {number}"
        if isinstance(fields, str):
            refused.append(Refused(where, fields))
        elif (column := caption_field(fields)) is None or not isinstance(fields.get("file_name"), str):
            refused.append(Refused(where, 'expected fields like {"file_name": ..., "text": ...}'))
        elif (name := posixpath.normpath(fields["file_name"])) not in images:
            refused.append(Refused(where, f"no image {fields['file_name']} in the folder ({formats.EXAMPLES})"))
        elif name in pictures and not several:
            refused.append(Refused(where, f"{name} has a caption from an earlier line, which stands"))
        else:
            try:
                captions = captions_of(fields[column])
            except Unusable as problem:
                refused.append(Refused(where, f"{name}: {problem}"))
                spoilt.add(name)
                continue
            earlier = pictures.get(name, ListedImage(name))
            pictures[name] = earlier._replace(
                captions=earlier.captions + captions, numbers={**numbers_of(fields), **earlier.numbers}
            )
    missing = images - set(pictures) - spoilt
    refused += [
        Refused(name, f"image without a caption: no usable line in {path.name} names it") for name in sorted(missing)
    ]
    return pictures, refused


def _images_with_files_beside(
    names: list[str], images: list[str], others: list[str]
) -> tuple[dict[str, ListedImage], list[Refused]]:
    """others: images that are refused already, whose captions are not alone."""
    beside: dict[str, list[str | None]] = {}
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in (".txt", ".json"):
            beside.setdefault(stem, [None, None])[suffix.lower() == ".json"] = name
    pictures = {}
    for name in images:
        text, fields = beside.get(posixpath.splitext(name)[0], (None, None))
        pictures[name] = ListedImage(name, (text, fields))
    stems = {posixpath.splitext(name)[0] for name in (*images, *others)}
    alone = [found[0] for stem, found in beside.items() if stem not in stems]  # a .json may be about anything
    return pictures, [Refused(name, "caption without an image of the same name") for name in alone if name]


class Listing(NamedTuple):
    """What names, metadata and the beginnings of odd files say of a folder."""

    pictures: list[ListedImage]
    """In the order of the names."""
    refused: list[Refused]
    found: int
    """Images, usable or not."""


def list_images(folder: Path, names: list[str]) -> Listing:
    """The images among the files of a folder, and what is refused already.

    Raises InputError: both kinds of metadata; a metadata.csv without the columns.
    """
    odd = _refused_by_name_or_beginning(folder, names)
    images = [name for name in images_among(names) if name not in odd]
    metadata = [name for name in _METADATA if name in names]
    if len(metadata) > 1:
        raise InputError(f"{folder} holds both {' and '.join(metadata)}. Expected one of them. Remove the other.")
    if metadata:
        pictures, refused = _images_of_metadata(folder / metadata[0], set(images))
    else:
        pictures, refused = _images_with_files_beside(names, images, list(odd))
    usable = [pictures[name] for name in images if name in pictures]
    return Listing(usable, [*refused, *odd.values()], len(images) + len(odd))


def _refused_by_name_or_beginning(folder: Path, names: list[str]) -> dict[str, Refused]:
    """By name: images of formats that are known not to be read, and files that are images though not by their name."""
    refused = {}
    for name in names:
        if formats.is_image_name(name):
            reason = formats.refused_by_name(name)
        elif formats.may_be_image(name):
            try:
                with _open(str(folder / name)) as file:
                    reason = formats.refused_all_the_same(file.peek())
            except (Unusable, InputError):  # what it is, nobody asked
                continue
        else:
            continue
        if reason:
            refused[name] = Refused(name, reason)
    return refused


def metadata_below(names: list[str]) -> list[str]:
    """Metadata files that are not read, since they are not in the folder itself."""
    return [name for name in names if "/" in name and posixpath.basename(name) in _METADATA]


# Reading one image


def _open(path: str) -> io.BufferedReader:
    """A file, its beginning read. Unusable where it never could be read, InputError where it no longer can."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not a regular file")
        if status.st_size > BYTES_LIMIT:
            raise Unusable(f"{status.st_size} bytes, the limit is {BYTES_LIMIT}")
        file: io.BufferedReader = io.BufferedReader(io.FileIO(path), 1 << 16)
    except PermissionError as problem:
        raise Unusable(f"cannot be opened ({problem.strerror})") from None
    except OSError as problem:
        if os.path.islink(path):
            raise Unusable("a link to nothing") from None
        raise gone(path, problem) from problem
    try:
        file.peek()
    except OSError as problem:
        file.close()
        raise gone(path, problem) from problem
    return file


def _file_bytes(path: str) -> bytes:
    with _open(path) as file:
        try:
            return file.read()
        except OSError as problem:
            raise gone(path, problem) from problem


def _captions(
    folder: str, picture: ListedImage, caption_lines: CaptionLines
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Captions and numbers. Unusable where there is no caption."""
    if picture.captions:
        return picture.captions, dict(picture.numbers)
    text, fields = (None if name is None else _file_bytes(f"{folder}/{name}") for name in picture.beside)
    return described(text, fields, caption_lines)


# For a build


class FolderPiece(NamedTuple):
    """Some images of a folder."""

    folder: str
    pictures: tuple[ListedImage, ...]

    @property
    def reads_text_files(self) -> bool:
        """Whether `CaptionLines` concerns it."""
        return any(picture.beside[0] is not None for picture in self.pictures)

    def samples(self, caption_lines: CaptionLines = CaptionLines.LINES) -> Iterator[RawExample | Refused]:
        for picture in self.pictures:
            try:
                captions, numbers = _captions(self.folder, picture, caption_lines)
                yield RawExample(picture.name, _file_bytes(f"{self.folder}/{picture.name}"), captions, numbers)
            except Unusable as problem:
                yield Refused(picture.name, str(problem))


def pieces(folder: Path, names: list[str]) -> Iterator[tuple[str, FolderPiece | Refusals]]:
    """The pieces of a folder, each with its name. Raises InputError as `list_images`."""
    pictures, refused, _ = list_images(folder, names)
    if refused:
        yield "refused when listed", Refusals(tuple(refused))
    for start in range(0, len(pictures), _FILES):
        chosen = tuple(pictures[start : start + _FILES])
        yield f"images {start}-{start + len(chosen) - 1}", FolderPiece(str(folder), chosen)


# For training


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """The usable images of a folder as `Images`, sorted by name; made by `open_folder`."""

    path: Path
    found: int
    """Image files in the folder, usable or not."""
    paths: list[Path]
    """Of the usable ones: an image's number is its place here."""
    sizes: Int32[np.ndarray, "images 2"]
    """(height, width) in pixels, upright."""
    numbers: Mapping[str, Float32[np.ndarray, " images"]]
    """By name, of metadata or .json; NaN where an image has none."""
    reads_text_files: bool
    """Whether captions stand in .txt files, which `CaptionLines` concerns."""
    notes: tuple[str, ...]
    """What of the folder somebody may not expect."""
    _captions: list[tuple[str, ...]] = dataclasses.field(repr=False)
    _lengths: list[int] = dataclasses.field(repr=False)
    """Bytes of the image files."""
    _refused: list[Refused] = dataclasses.field(repr=False)

    def _file_name(self, image: int) -> str:
        return self.paths[image].relative_to(self.path).as_posix()

    def name(self, image: int) -> str:
        """Path of one image relative to the folder, what is not UTF-8 in it spelt out."""
        return printable(self._file_name(image))

    def captions(self, image: int) -> tuple[str, ...]:
        """One or several."""
        return self._captions[image]

    def pixels(self, image: int, at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """As `images.read_image`."""
        return read_image(self.paths[image], at_least)

    def refused(self) -> Iterator[Refused]:
        """All that is left out."""
        return iter(self._refused)

    @property
    def built(self) -> bool:
        """False: what is refused here was found just now."""
        return False

    @property
    def fingerprint(self) -> str:
        """A hash of names, captions, sizes, numbers and file lengths of all images; not of their pixels, which would
        have to be read."""
        rows: list[Any] = [
            [self._file_name(image), captions, *self.sizes[image].tolist(), length]
            for image, (captions, length) in enumerate(zip(self._captions, self._lengths, strict=True))
        ]
        rows.append({name: values.tolist() for name, values in self.numbers.items()})
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _notes(names: list[str], found: list["_Found"], caption_lines: CaptionLines) -> tuple[str, ...]:
    notes = []
    several = sum(picture.of_text_file and len(picture.captions) > 1 for picture in found)
    if several:
        assert caption_lines is CaptionLines.LINES
        notes.append(
            f"{several} of {len(found)} images have several captions, one for each line of their .txt, of which "
            "training is told one each time (data.caption_lines=whole makes one caption of a .txt)"
        )
    if below := metadata_below(names):
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        notes.append(
            f"{', '.join(map(printable, below[:3]))}{more} not read: metadata counts in the folder itself. To use it, "
            f"give the folder that it is in, or several in data.sources"
        )
    return tuple(notes)


class _Found(NamedTuple):
    """One image that can be used."""

    path: Path
    length: int
    """Bytes."""
    size: tuple[int, int]
    captions: tuple[str, ...]
    numbers: Mapping[str, float]
    of_text_file: bool
    """The captions stand in a .txt."""


def _in_threads(function: Callable[[ListedImage], Any], pictures: list[ListedImage], what: str) -> list[Any]:
    """function(image) of each, in order; a bar where it takes more than two seconds at a terminal."""
    with ThreadPool(_THREADS) as pool:
        return list(tqdm(pool.imap(function, pictures, chunksize=16), what, len(pictures), delay=2, disable=None))


def _columns(numbers: list[Mapping[str, float]]) -> dict[str, Float32[np.ndarray, " images"]]:
    """The numbers of all images by name, sorted; NaN where an image has none."""
    names = {name for of_image in numbers for name in of_image}
    check_number_names(names)
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        return {name: np.array([each.get(name, np.nan) for each in numbers], np.float32) for name in sorted(names)}


_EXPECTED = f"Expected a folder of images ({formats.EXAMPLES}) with captions"


def _listed(folder: Path) -> tuple[list[str], list[Refused], Listing]:
    """Names, what could not be listed, and what is known already. InputError where there is no folder or no image."""
    if not folder.exists():
        raise InputError(f"data.folder={folder} does not exist. {_EXPECTED}. Check the path, seen from {Path.cwd()}.")
    if not folder.is_dir():
        raise InputError(f"data.folder={folder} is not a folder. {_EXPECTED}. Give the folder that holds the images.")
    names, unlisted = list_files(folder)
    listed = list_images(folder, names)
    if not listed.found:
        raise InputError(
            f"data.folder={folder} holds no images among its {len(names)} files. {_EXPECTED}. "
            "Convert other formats, or give another folder."
        )
    return names, unlisted, listed


def _look(folder: Path, verify: bool, caption_lines: CaptionLines | None, picture: ListedImage) -> _Found | Refused:
    """What `open_folder` must know of one image. caption_lines: None where nobody wants captions."""
    path = folder / picture.name
    try:
        captions, numbers = (("",), {}) if caption_lines is None else _captions(str(folder), picture, caption_lines)
        with _open(str(path)) as file:
            length = os.fstat(file.fileno()).st_size
            size = usable_size(file, verify=verify)
        return _Found(path, length, size, captions, numbers, picture.beside[0] is not None)
    except Unusable as problem:
        return Refused(printable(picture.name), printable(str(problem)))


def open_folder(
    folder: str | Path,
    *,
    on_refused: OnRefused = OnRefused.ERROR,
    verify: bool = False,
    caption_lines: CaptionLines = CaptionLines.LINES,
    captioned: bool = True,
) -> FolderSource:
    """Lists a folder of captioned images, recursively, hidden files left out; captions stay in memory.

    Reads each image's header. With `verify` it decodes every image too, so that damaged pixels show now instead of
    during training; that costs one full pass over the images: reading them all, and some 15 ms of one core a megapixel
    of JPEG, in eight threads. captioned=False: nobody wants captions; every image has "".
    Refused are: an image that cannot be read or exceeds PIXEL_LIMIT, an image with an empty caption or without one, a
    caption without its image, a line of metadata that is not as expected, or of `metadata.jsonl` that repeats a file;
    an image by its name in a format that is not read, and a file that begins as an image though not named as one.

    Raises InputError: no such folder; no image in it; none usable; metadata as in `list_images`; numbers of too many
    names; an image that disappears meanwhile; any refusal where on_refused is ERROR.
    """
    folder = Path(folder)
    names, unlisted, listed = _listed(folder)
    look = functools.partial(_look, folder, verify, caption_lines if captioned else None)
    looked_at = _in_threads(
        look, listed.pictures, "Decoding every image" if verify else "Reading captions and image headers"
    )
    usable = [found for found in looked_at if isinstance(found, _Found)]
    refused = [Refused(*map(printable, entry)) for entry in (*unlisted, *listed.refused)]
    refused += [found for found in looked_at if isinstance(found, Refused)]
    if not usable:
        raise InputError(
            f"None of the {listed.found} images in data.folder={folder} can be used:\n"
            f"{summary(refused, len(refused))}\n"
            f'{_EXPECTED}: {_METADATA[0]} with {{"file_name": ..., "text": ...}} a line, or a .txt beside each image.'
        )
    stop_if_refused(folder, refused, len(refused), on_refused)
    return FolderSource(
        path=folder,
        found=listed.found,
        paths=[found.path for found in usable],
        sizes=np.array([found.size for found in usable], np.int32),
        numbers=_columns([found.numbers for found in usable]),
        reads_text_files=any(found.of_text_file for found in usable),
        notes=_notes(names, usable, caption_lines),
        _captions=[found.captions for found in usable],
        _lengths=[found.length for found in usable],
        _refused=refused,
    )
