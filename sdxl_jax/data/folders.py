"""A folder of captioned images: its images and their sizes, captions and refusals; for training and for a shard build.

Captions and numeric fields come from

- `metadata.jsonl` in the folder, one `{"file_name": ..., "text": ...}` per line, or `metadata.csv` with such columns
  (Hugging Face's imagefolder). Where there is one, all captions come from it, and no other files beside the images are
  read. In CSV an image may have several lines, one caption each;
- otherwise a `.txt` or `.json` beside each image, with the same stem.

Where classes are asked for, the subfolders are numbered in alphabetical order, and the numeric field "folder" is that
of the subfolder that an image is in, as in ImageNet's train/n01440764/.

Their content is described in `captions`. A metadata file in a subfolder is not read, which a warning says
(`FolderSource.notes`). Every file with an image's extension counts as an image, in any format (formats). Listing reads
names, the metadata file, and the first bytes of files with unknown extensions. The images, and the files beside them,
are then read by the same rules: for training all at once in eight threads (`open_folder`), for a build a thousand at a
time (`pieces`). Folders are read recursively, without hidden files; links to folders are followed.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float32, Int32, UInt8

from sdxl_jax.data import formats
from sdxl_jax.data.captions import (
    CAPTION_FIELDS,
    UNCAPTIONED,
    CaptionLines,
    caption_field,
    captions_of,
    check_number_names,
    described,
    json_fields,
    numbers_of,
)
from sdxl_jax.data.images import WHITE, read_image, usable_size
from sdxl_jax.data.masks import ALPHA, Masks, list_masks, read_mask
from sdxl_jax.data.sources import (
    BYTES_LIMIT,
    ImageSource,
    OnRefused,
    RawExample,
    Refusals,
    Refused,
    Unusable,
    gone,
    stop_if_refused,
    summary,
)
from sdxl_jax.errors import InputError
from sdxl_jax.files import buckets, objects
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.files.text import encoding_of, printable, utf8_lines
from sdxl_jax.progress import tqdm

_PIECE_IMAGES = 1000  # enough that starting a piece costs nothing, few enough to balance workers
_READ_TOGETHER = 64  # images of a bucket in memory
_THREADS = 8  # they wait for the disk, and both decoders release the interpreter's lock
_PEEK_BYTES = 1 << 16
_METADATA = ("metadata.jsonl", "metadata.csv")
FOLDER = "folder"
"""Numeric field of the classes that subfolders are."""


# Listing


class ListedImage(NamedTuple):
    """One image found by listing a folder: its captions, or the files that hold them."""

    name: str
    """Relative to the folder."""
    beside: tuple[str | None, str | None] = (None, None)
    """Its .txt and its .json, where there is no metadata file."""
    captions: tuple[str, ...] = ()
    numbers: Mapping[str, float] = {}


def list_files(folder: AnyPath) -> tuple[list[str], list[Refused]]:
    """All files in the folder and its subfolders, as sorted relative names, without hidden ones, and refusals of
    folders that cannot be listed. Links to folders are followed. The folder may be in a bucket."""
    if in_bucket(folder):
        found = buckets.files(folder, "the source")
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/"))), []
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
    """The names with an image's extension, in formats that are read and in others."""
    return [name for name in names if formats.is_image_name(name)]


def _metadata_lines(path: AnyPath, captioned: bool) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, fields or the reason for a refusal) for each line of `metadata.jsonl` or `metadata.csv`."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(utf8_lines(path), start=1):
            if line.strip():
                try:
                    yield number, json_fields(line, "the line")
                except Unusable as problem:
                    yield number, str(problem)
        return
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    with io.TextIOWrapper(path.open("rb"), encoding=encoding, errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "file_name" not in header or (captioned and caption_field(header) is None):
            raise InputError(
                f"{path} has the columns {', '.join(header) or '(none)'}. Expected file_name and one of "
                f"{', '.join(CAPTION_FIELDS)}. Rename the columns in its first line"
            )
        while True:
            try:
                if (row := next(rows, None)) is None:
                    return
            except csv.Error as problem:  # e.g. a field that is too long
                yield rows.line_num, f"the line is not CSV ({problem})"
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


def _images_in_metadata(
    path: AnyPath, images: set[str], captioned: bool
) -> tuple[dict[str, ListedImage], list[Refused]]:
    """The images of a metadata file by name, and refused lines and images. images: the names of those in the folder;
    where captions are not used, those without a line are images too."""
    several_lines = path.suffix == ".csv"  # which has no lists
    listed: dict[str, ListedImage] = {}
    refused = []
    bad_captions = set()
    for number, fields in _metadata_lines(path, captioned):
        where = f"{path.name} line {number}"
        if isinstance(fields, str):
            refused.append(Refused(where, fields))
        elif not isinstance(fields.get("file_name"), str) or (captioned and caption_field(fields) is None):
            refused.append(Refused(where, 'expected fields like {"file_name": ..., "text": ...}'))
        elif (name := posixpath.normpath(fields["file_name"])) not in images:
            refused.append(Refused(where, f"no image {fields['file_name']} in the folder ({formats.EXAMPLES})"))
        elif name in listed and not several_lines:
            refused.append(Refused(where, f"{name} has a caption from an earlier line, which stands"))
        else:
            try:
                captions = captions_of(fields[caption_field(fields) or ""]) if captioned else UNCAPTIONED
            except Unusable as problem:
                refused.append(Refused(where, f"{name}: {problem}"))
                bad_captions.add(name)
                continue
            earlier = listed.get(name, ListedImage(name))
            both = earlier.captions + captions if captioned else captions
            listed[name] = earlier._replace(captions=both, numbers={**numbers_of(fields), **earlier.numbers})
    missing = images - set(listed) - bad_captions
    if not captioned:
        return listed | {name: ListedImage(name, captions=UNCAPTIONED) for name in missing}, refused
    refused += [
        Refused(name, f"image without a caption: no usable line in {path.name} names it") for name in sorted(missing)
    ]
    return listed, refused


def _images_with_files_beside(
    names: list[str], images: list[str], others: list[str]
) -> tuple[dict[str, ListedImage], list[Refused]]:
    """The images by name, with their caption files, and refused captions.

    others: images that are refused already, whose captions are therefore not without an image.
    """
    beside: dict[str, list[str | None]] = {}
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in (".txt", ".json"):
            beside.setdefault(stem, [None, None])[suffix.lower() == ".json"] = name
    listed = {}
    for name in images:
        text, fields = beside.get(posixpath.splitext(name)[0], (None, None))
        listed[name] = ListedImage(name, (text, fields))
    stems = {posixpath.splitext(name)[0] for name in (*images, *others)}
    alone = [files[0] for stem, files in beside.items() if stem not in stems]  # .txt only: a .json may hold anything
    return listed, [Refused(name, "caption without an image of the same name") for name in alone if name]


class Listing(NamedTuple):
    """The images of a folder by names, metadata and first bytes, before any image is opened."""

    images: list[ListedImage]
    """Sorted by name."""
    refused: list[Refused]
    found: int
    """Number of images, usable or not."""
    classes: tuple[str, ...] = ()
    """The subfolders that are classes, by their numbers."""


def list_images(folder: AnyPath, names: list[str], captioned: bool = True, class_folders: bool = False) -> Listing:
    """The images among the files of a folder, and the refusals so far.

    captioned: whether captions are used. class_folders: whether the subfolders are classes (`FOLDER`).

    Raises InputError: both kinds of metadata; a metadata.csv without the columns; classes without subfolders.
    """
    refused_images = _refused_by_name_or_content(folder, names)
    images = [name for name in images_among(names) if name not in refused_images]
    metadata = [name for name in _METADATA if name in names]
    if len(metadata) > 1:
        raise InputError(f"{folder} holds both {' and '.join(metadata)}. Expected one of them. Remove the other")
    if metadata:
        listed, refused = _images_in_metadata(folder / metadata[0], set(images), captioned)
    else:
        listed, refused = _images_with_files_beside(names, images, list(refused_images))
    usable = [listed[name] for name in images if name in listed]
    classes = _subfolders(folder, [*images, *refused_images]) if class_folders else ()
    if class_folders:
        usable = _with_classes(classes, usable)
    return Listing(usable, [*refused, *refused_images.values()], len(images) + len(refused_images), classes)


def _subfolders(folder: AnyPath, images: list[str]) -> tuple[str, ...]:
    """The subfolders with images, usable or not, so that an image that is refused changes no number of a class."""
    found = tuple(sorted({name.split("/")[0] for name in images if "/" in name}))
    if not found:
        raise InputError(
            f"{folder} has no subfolders with images, which the classes would be. Put the images of each class into a "
            "subfolder, or name another field of the data"
        )
    return found


def _with_classes(classes: tuple[str, ...], images: list[ListedImage]) -> list[ListedImage]:
    """The images with the number of their subfolder; those in no subfolder have no class."""
    numbers = {name: float(number) for number, name in enumerate(classes)}
    return [
        image._replace(numbers={**image.numbers, FOLDER: numbers[top]})
        if (top := image.name.split("/")[0]) != image.name
        else image
        for image in images
    ]


def _refused_by_name_or_content(folder: AnyPath, names: list[str]) -> dict[str, Refused]:
    """Refusals by name: images whose extension is never read, and images by content without an image's extension."""
    refused = {}
    for name in names:
        if formats.is_image_name(name):
            reason = formats.refused_by_name(name)
        elif formats.may_be_image(name):
            try:
                with _open(str(folder / name)) as file:
                    reason = formats.refused_by_content(file.peek())
            except (Unusable, InputError):  # not an image by its name, so that it need not be readable
                continue
        else:
            continue
        if reason:
            refused[name] = Refused(name, reason)
    return refused


def metadata_below(names: list[str]) -> list[str]:
    """Metadata files in subfolders, which are not read."""
    return [name for name in names if "/" in name and posixpath.basename(name) in _METADATA]


# Reading one image


def _open(path: str) -> io.BufferedReader:
    """An open file, its first bytes buffered. Raises Unusable where it cannot be read, and InputError or MachineError
    where it disappeared or its storage failed since it was listed."""
    if in_bucket(where := located(path, "the source")):
        return _open_object(where)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not a regular file")
        if status.st_size > BYTES_LIMIT:
            raise Unusable(f"{status.st_size} bytes, the limit is {BYTES_LIMIT}")
        file: io.BufferedReader = io.BufferedReader(io.FileIO(path), _PEEK_BYTES)
    except PermissionError as problem:
        raise Unusable(f"cannot be opened ({problem.strerror})") from None
    except OSError as problem:
        if os.path.islink(path):
            raise Unusable("a broken link") from None
        raise gone(path, problem) from problem
    try:
        file.peek()
    except OSError as problem:
        file.close()
        raise gone(path, problem) from problem
    return file


def _open_object(path: epath.Path) -> io.BufferedReader:
    """As `_open`."""
    try:
        file = objects.open_object(path, "the source", _PEEK_BYTES)
    except OSError as problem:
        raise gone(str(path), problem) from problem
    if (length := file.seek(0, os.SEEK_END)) > BYTES_LIMIT:
        raise Unusable(f"{length} bytes, the limit is {BYTES_LIMIT}")
    file.seek(0)
    return file


def _file_bytes(path: str) -> bytes:
    with _open(path) as file:
        try:
            return file.read()
        except OSError as problem:
            raise gone(path, problem) from problem


def _captions(
    folder: str, image: ListedImage, caption_lines: CaptionLines | None
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Captions and numeric fields of one image. caption_lines: None where captions are not used. Raises Unusable where
    there is no caption."""
    if image.captions:
        return image.captions, dict(image.numbers)
    text, fields = (None if name is None else _file_bytes(f"{folder}/{name}") for name in image.beside)
    captions, numbers = described(text, fields, caption_lines)
    return captions, {**numbers, **image.numbers}


# For a shard build


class FolderPiece(NamedTuple):
    """Some images of a folder, read on their own."""

    folder: str
    images: tuple[ListedImage, ...]

    @property
    def reads_text_files(self) -> bool:
        """Whether `CaptionLines` has an effect on it."""
        return any(image.beside[0] is not None for image in self.images)

    def samples(self, caption_lines: CaptionLines | None = CaptionLines.LINES) -> Iterator[RawExample | Refused]:
        """The images with their captions, in order, or their refusals. Raises as `_open`."""
        read = functools.partial(_read_example, self.folder, caption_lines)
        if not in_bucket(located(self.folder, "the source")):
            yield from map(read, self.images)
            return
        with ThreadPool(_THREADS) as pool:  # every file is a request or two
            for start in range(0, len(self.images), _READ_TOGETHER):
                yield from pool.map(read, self.images[start : start + _READ_TOGETHER], chunksize=1)


def _read_example(folder: str, caption_lines: CaptionLines | None, image: ListedImage) -> RawExample | Refused:
    try:
        captions, numbers = _captions(folder, image, caption_lines)
        return RawExample(image.name, _file_bytes(f"{folder}/{image.name}"), captions, numbers)
    except Unusable as problem:
        return Refused(image.name, str(problem))


def pieces(
    folder: AnyPath, names: list[str], captioned: bool = True, class_folders: bool = False
) -> Iterator[tuple[str, FolderPiece | Refusals]]:
    """The pieces of a folder, each with its name; arguments and errors of `list_images`."""
    images, refused, *_ = list_images(folder, names, captioned, class_folders)
    if refused:
        yield "refused when listed", Refusals(tuple(refused))
    for start in range(0, len(images), _PIECE_IMAGES):
        piece = FolderPiece(str(folder), tuple(images[start : start + _PIECE_IMAGES]))
        yield f"images {start}-{start + len(piece.images) - 1}", piece


# For training


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """The usable images of a folder as an `ImageSource`, sorted by name. Made by `open_folder`."""

    path: Path
    found: int
    """Number of image files in the folder, usable or not."""
    paths: list[Path]
    """Paths of the usable images, indexed by an image's number."""
    sizes: Int32[np.ndarray, "images 2"]
    """(height, width) in pixels, upright."""
    numbers: Mapping[str, Float32[np.ndarray, " images"]]
    """Numeric fields of metadata or .json, by name; NaN where an image has none."""
    reads_text_files: bool
    """Whether captions come from .txt files, so that `CaptionLines` has an effect."""
    notes: tuple[str, ...]
    """Warnings about the folder, one sentence each."""
    classes: tuple[str, ...]
    """The subfolders that are classes, by their numbers; (): they are not."""
    _captions: list[tuple[str, ...]] = dataclasses.field(repr=False)
    _lengths: list[int] = dataclasses.field(repr=False)
    """Bytes of the image files."""
    _refused: list[Refused] = dataclasses.field(repr=False)
    masks: str | None = None
    """ALPHA, or the folder of the masks; None: there are none."""
    _masks: list[Path | None] = dataclasses.field(default_factory=list, repr=False)
    """The file with the mask of each image; None: all of the image counts."""

    def _file_name(self, image: int) -> str:
        return self.paths[image].relative_to(self.path).as_posix()

    def name(self, image: int) -> str:
        """Path of one image relative to the folder, with all that is not UTF-8 escaped."""
        return printable(self._file_name(image))

    def captions(self, image: int) -> tuple[str, ...]:
        """Captions of one image, one or several."""
        return self._captions[image]

    def pixels(self, image: int, at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """As `images.read_image`; with masks of alpha, the colours that are stored beneath."""
        return read_image(self.paths[image], at_least, None if self.masks == ALPHA else WHITE)

    def mask(self, image: int) -> UInt8[np.ndarray, "height width"] | None:
        """As `ImageSource.mask`."""
        if self.masks is None:
            return None
        file = self._masks[image]
        return np.full(self.sizes[image], 255, np.uint8) if file is None else read_mask(file, self.masks)

    def refused(self) -> Iterator[Refused]:
        """Everything that is left out, with the reasons."""
        return iter(self._refused)

    @property
    def built(self) -> bool:
        """False: refusals were found when the folder was opened, and nobody has reported them yet."""
        return False

    @property
    def fingerprint(self) -> str:
        """A hash of the names, captions, sizes, numeric fields and file lengths of all images, but not of their pixels,
        which would have to be read."""
        rows: list[Any] = [
            [self._file_name(image), captions, *self.sizes[image].tolist(), length]
            for image, (captions, length) in enumerate(zip(self._captions, self._lengths, strict=True))
        ]
        rows.append({name: values.tolist() for name, values in self.numbers.items()})
        if self.masks is not None:
            rows.append({"masks": [None if file is None else file.stat().st_size for file in self._masks]})
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def with_common_classes(sources: Sequence[ImageSource]) -> list[ImageSource]:
    """The sources with the classes of subfolders numbered over all folders among them, so that subfolders of one name
    are one class. Shard sets keep the numbers that they were built with."""
    names = sorted({name for source in sources if isinstance(source, FolderSource) for name in source.classes})

    def renumbered(source: ImageSource) -> ImageSource:
        if not isinstance(source, FolderSource):
            return source
        table = np.array([*map(names.index, source.classes), np.nan], np.float32)
        own = source.numbers[FOLDER]
        new = table[np.where(np.isnan(own), -1, own).astype(np.int32)]
        return dataclasses.replace(source, numbers={**source.numbers, FOLDER: new})

    return list(map(renumbered, sources))


def _notes(
    names: list[str], usable: list["_UsableImage"], caption_lines: CaptionLines, masks: Masks | None
) -> tuple[str, ...]:
    notes = []
    if masks is not None and (whole := sum(image.mask is None for image in usable)):
        notes.append(
            f"{whole} of {len(usable)} images have no alpha channel, and all of them counts (data.masks=alpha)"
        )
    several = sum(image.of_text_file and len(image.captions) > 1 for image in usable)
    if several:
        assert caption_lines is CaptionLines.LINES
        notes.append(
            f"{several} of {len(usable)} images have several captions, one for each line of their .txt, and each "
            "example takes one of them at random (data.caption_lines=whole makes one caption of a .txt)"
        )
    if below := metadata_below(names):
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        notes.append(
            f"{', '.join(map(printable, below[:3]))}{more} not read: metadata is read only in data.folder itself. To "
            "use it, give the folder that it is in, or several folders in data.sources"
        )
    return tuple(notes)


class _UsableImage(NamedTuple):
    """One image that can be used, with all that `FolderSource` stores of it."""

    path: Path
    length: int
    """Bytes."""
    size: tuple[int, int]
    captions: tuple[str, ...]
    numbers: Mapping[str, float]
    of_text_file: bool
    """Whether the captions come from a .txt."""
    mask: Path | None = None


def _in_threads(
    function: Callable[[ListedImage], "_UsableImage | Refused"], images: list[ListedImage], title: str
) -> list["_UsableImage | Refused"]:
    """function(image) for each image, in order; with a progress bar at a terminal after two seconds."""
    with ThreadPool(_THREADS) as pool:
        return list(tqdm(pool.imap(function, images, chunksize=16), title, len(images), delay=2, disable=None))


def _columns(numbers: list[Mapping[str, float]]) -> dict[str, Float32[np.ndarray, " images"]]:
    """The numeric fields of all images by name, sorted; NaN where an image has none."""
    names = {name for of_image in numbers for name in of_image}
    check_number_names(names)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return {name: np.array([each.get(name, np.nan) for each in numbers], np.float32) for name in sorted(names)}


_EXPECTED = f"Expected a folder of images ({formats.EXAMPLES}) with captions"


def _list_folder(folder: Path, captioned: bool, class_folders: bool) -> tuple[list[str], list[Refused], Listing]:
    """Names of all files, refusals of subfolders, and the images. Raises InputError where there are no images."""
    if not folder.exists():
        raise InputError(f"data.folder={folder} does not exist. {_EXPECTED}. Check the path, seen from {Path.cwd()}")
    if not folder.is_dir():
        raise InputError(f"data.folder={folder} is not a folder. {_EXPECTED}. Give the folder that holds the images")
    names, unlisted = list_files(folder)
    listing = list_images(folder, names, captioned, class_folders)
    if not listing.found:
        raise InputError(
            f"data.folder={folder} holds no images among its {len(names)} files. {_EXPECTED}. "
            "Convert other formats, or give another folder"
        )
    return names, unlisted, listing


def _read_header(
    folder: Path,
    verify: bool,
    caption_lines: CaptionLines | None,
    numeric: bool,
    masks: Masks | None,
    image: ListedImage,
) -> _UsableImage | Refused:
    """Captions, size and mask of one image. verify: decodes it too. caption_lines: None where captions are not used;
    numeric: whether numeric fields are then."""
    path = folder / image.name
    try:
        captions, numbers = UNCAPTIONED, {}
        if numeric or caption_lines is not None:
            captions, numbers = _captions(str(folder), image, caption_lines)
        with _open(str(path)) as file:
            length = os.fstat(file.fileno()).st_size
            size = usable_size(file, verify=verify)
        mask = None if masks is None else masks.file_of(path, image.name, size, verify=verify)
        return _UsableImage(path, length, size, captions, numbers, image.beside[0] is not None, mask)
    except Unusable as problem:
        return Refused(printable(image.name), printable(str(problem)))


def open_folder(
    folder: str | Path,
    *,
    on_refused: OnRefused = OnRefused.ERROR,
    verify: bool = False,
    caption_lines: CaptionLines = CaptionLines.LINES,
    captioned: bool = True,
    label: str | None = None,
    masks: str | None = None,
) -> FolderSource:
    """Opens a folder of captioned images, recursively, without hidden files; captions stay in memory.

    Reads each image's header. With `verify` it decodes every image too, so that damaged pixels are found now instead of
    during training; that costs one full pass over the images: reading them all, and some 15 ms of one core per
    megapixel of JPEG, in eight threads. captioned=False: captions are not used, every image has "", and there are
    numeric fields only where a label is one. label: a numeric field that is used; `FOLDER`: that of the subfolders.
    masks: `ALPHA`, or the folder of the masks. Refused are: an image that cannot be read or exceeds PIXEL_LIMIT, an
    image with an empty caption or without one, a caption without its image, a line of metadata that is not as expected,
    or of `metadata.jsonl` that repeats a file; an image by its extension in a format that is not read, and an image by
    its content without an image's extension; an image whose mask is missing, damaged or of another size.

    Raises InputError: no such folder; no image in it; none usable; metadata as in `list_images`; too many numeric
    fields; masks as in `list_masks`, or alpha channels that no image has; an image that disappears meanwhile; any
    refusal where on_refused is ERROR.
    """
    folder = Path(folder)
    names, unlisted, listing = _list_folder(folder, captioned, label == FOLDER)
    lines, listed = caption_lines if captioned else None, None if masks is None else list_masks(masks, folder)
    read = functools.partial(_read_header, folder, verify, lines, label is not None, listed)
    title = "Decoding every image" if verify else "Reading captions and image headers"
    images = _in_threads(read, listing.images, title)
    usable = [image for image in images if isinstance(image, _UsableImage)]
    refused = [Refused(*map(printable, entry)) for entry in (*unlisted, *listing.refused)]
    refused += [image for image in images if isinstance(image, Refused)]
    if not usable:
        raise InputError(
            f"None of the {listing.found} images in data.folder={folder} can be used:\n"
            f"{summary(refused, len(refused))}\n"
            f'{_EXPECTED}: {_METADATA[0]} with {{"file_name": ..., "text": ...}} per line, or a .txt beside each image'
        )
    stop_if_refused(folder, refused, len(refused), on_refused)
    if masks == ALPHA and not any(image.mask for image in usable):
        raise InputError(f"data.masks=alpha has no effect: no image in {folder} has an alpha channel. Leave it out")
    return FolderSource(
        path=folder,
        found=listing.found,
        paths=[image.path for image in usable],
        sizes=np.array([image.size for image in usable], np.int32),
        numbers=_columns([image.numbers for image in usable]),
        reads_text_files=any(image.of_text_file for image in usable),
        notes=_notes(names, usable, caption_lines, listed),
        classes=listing.classes,
        _captions=[image.captions for image in usable],
        _lengths=[image.length for image in usable],
        _refused=refused,
        masks=masks,
        _masks=[image.mask for image in usable],
    )
