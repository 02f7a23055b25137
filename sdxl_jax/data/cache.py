"""The cache of encoded training data: latents of every image and text states of every caption, in files.

    cache.json                    what it was made from, the number of images and crops, the text towers; written first
    latents/00000.array_record …  K records per image, one per crop: the autoencoder's posterior, micro-conditioning
    text/00000.array_record …     one record per caption: its tokens, the text context, the pooled projection

Images are numbered 0 … images − 1. Piece p, two files, holds the images from p · piece_images up to the next piece's. A
latents record is number (image − first image of the piece) · K + crop of its file, and its header holds the numbers of
the image's captions in the piece's text file: there is no other index. Arrays are bfloat16, or int32 where they hold
pixels or tokens, little-endian, one after the other:

    latents   header (`_LATENTS`), mean, log-variance, and with image prompts the crop's embedding
    text      header (int32: image, tokens of each tower, context's tokens and features, pooled features or 0), tokens
              of each tower in the order of cache.json, context, pooled

An image that could not be encoded has K headers with the shape 0 0 0, each followed by the reason (UTF-8) alone.

Writes are atomic: a piece is written to `*.partial` files, and when both are complete on the disk they are renamed, the
text first. So a piece exists when both files do, an interrupted run leaves nothing that is taken for finished, and its
partial files are removed when the cache is complete. Records are not compressed, so that equal content makes equal
files, and one record costs one read.

A cache may be in a bucket (gs://…). It is read there; a piece is written on this machine's disk, and its two objects,
each of which appears whole, are uploaded, the text first.

Not here: encoding, and the choice of crop and caption in training.
"""

import dataclasses
import json
import math
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import BFloat16, Int32, Shaped
from ml_dtypes import bfloat16

from sdxl_jax.data.record_files import RecordFiles, RecordWriter
from sdxl_jax.errors import InputError, check_ranges, fault
from sdxl_jax.files import buckets, objects
from sdxl_jax.files.atomic import PARTIAL, partial_path, sync, write_text
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.files.trees import differences

FORMAT = 1
"""Version of the layout, in cache.json."""
DESCRIPTION, LATENTS, TEXT = "cache.json", "latents", "text"

_LATENTS = np.dtype(
    [
        ("image", "<i4"),
        ("shape", "<i4", 3),  # of mean and of log-variance: height, width, channels
        ("original_size", "<i4", 2),
        ("crop_top_left", "<i4", 2),
        ("target_size", "<i4", 2),
        ("flipped", "<i4"),
        ("first_caption", "<i4"),  # number of its record in the text file of the piece; the others follow
        ("captions", "<i4"),
    ]
)
_WHAT = "data.cache"
_SHOWN_CHARACTERS = 60  # of a value in an error message


class Crop(NamedTuple):
    """One crop of an image: the autoencoder's posterior and micro-conditioning. Sizes are (height, width) in pixels.

    Arrays that were read are views of the file's bytes, and read only.
    """

    mean: BFloat16[np.ndarray, "height width channels"]
    """Mean of the posterior, unscaled."""
    log_variance: BFloat16[np.ndarray, "height width channels"]
    original_size: Int32[np.ndarray, "2"]
    """(height, width) before any resize."""
    crop_top_left: Int32[np.ndarray, "2"]
    """(top, left) of the crop in the image after resize and flip."""
    target_size: Int32[np.ndarray, "2"]
    """(height, width) of the bucket."""
    flipped: bool
    embedding: BFloat16[np.ndarray, " projection"] | None = None
    """By CLIP's image tower; None in a cache without image prompts."""


class Text(NamedTuple):
    """One encoded caption. Arrays that were read are views of the file's bytes, and read only."""

    tokens: dict[str, Int32[np.ndarray, "77"]]
    """Token numbers by text tower."""
    context: BFloat16[np.ndarray, "tokens features"]
    pooled: BFloat16[np.ndarray, " projection"] | None


class Unencoded(InputError):
    """The image could not be encoded when the cache was made, for the reason in the message. Others can be used."""


def _file_name(piece: int) -> str:
    return f"{piece:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The content of a complete cache and its files, and which of them are missing. Made by `begin`."""

    folder: AnyPath
    made_from: dict[str, Any]
    """All that determines the content, as JSON values by name."""
    images: int
    crops: int
    """K, crops per image."""
    piece_images: int
    """Images per piece; the last one may have fewer."""
    towers: tuple[str, ...]
    """Names of the text towers."""
    embedding_width: int = 0
    """Of the crops' embeddings; 0: there are none."""

    @property
    def pieces(self) -> int:
        return -(-self.images // self.piece_images)

    def images_of(self, piece: int) -> range:
        """The images of a piece."""
        assert 0 <= piece < self.pieces
        return range(piece * self.piece_images, min((piece + 1) * self.piece_images, self.images))

    def path(self, kind: str, piece: int) -> AnyPath:
        """Path of the piece's file of that kind, LATENTS or TEXT."""
        return self.folder / kind / _file_name(piece)

    def missing(self, share: int = 0, shares: int = 1) -> list[int]:
        """The pieces of this share that do not exist, by the names of the files alone.

        Shares 0 … shares − 1 may be written at the same time, by as many processes. Two processes that write the same
        piece do no harm: one of them works in vain.
        """
        assert 0 <= share < shares
        existing = _names(self.folder / LATENTS).intersection(_names(self.folder / TEXT))
        return [piece for piece in range(share, self.pieces, shares) if _file_name(piece) not in existing]

    def clean(self) -> None:
        """Removes the partial files of interrupted writers."""
        for kind in () if in_bucket(self.folder) else (LATENTS, TEXT):
            for file in (self.folder / kind).glob(f"*{PARTIAL}"):
                file.unlink(missing_ok=True)

    def done(self) -> int:
        """Number of pieces that exist."""
        return self.pieces - len(self.missing())


def _names(folder: AnyPath) -> set[str]:
    """The names of the files in a folder. FileNotFoundError where there is none; in a bucket it is empty then."""
    if in_bucket(folder):
        return set(buckets.files(folder, _WHAT))
    return set(os.listdir(folder))


class _AtomicRecordWriter:
    """Writes an ArrayRecord file atomically, for a bucket in the folder for temporary files first.

    Raises OSError where writing to the disk fails.
    """

    def __init__(self, path: AnyPath):
        # A unique name, so that another process that writes the same piece, by mistake, does no harm.
        folder = Path(tempfile.gettempdir()) if in_bucket(path) else path.parent
        self._path, self._partial = path, partial_path(folder / path.name, uuid.uuid4().hex)
        self._writer = RecordWriter(self._partial)
        self.records = 0

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self.records += 1

    def close(self) -> None:
        """Completes the partial file and waits until it is on the disk."""
        self._writer.close()
        sync(self._partial)

    def publish(self) -> None:
        """Renames the closed file to its final name, or uploads it."""
        if in_bucket(self._path):
            buckets.upload(self._partial, self._path, _WHAT)
            self._partial.unlink()
            return
        os.replace(self._partial, self._path)
        sync(self._path.parent)

    def release(self) -> None:
        """Closes the file, and removes it where it was not published."""
        self._partial.unlink(missing_ok=True)
        with suppress(OSError):
            self._writer.close()


def _bytes(array: Shaped[np.ndarray, "..."], dtype: type) -> bytes:
    assert array.dtype == dtype, f"{array.dtype}, expected {np.dtype(dtype)}"
    return array.tobytes()


def _pack_crop(image: int, crop: Crop, captions: range) -> bytes:
    """A latents record. captions: the numbers of their text records."""
    assert crop.mean.shape == crop.log_variance.shape and crop.mean.size
    header = np.zeros((), _LATENTS)
    header["image"], header["shape"] = image, crop.mean.shape
    for name in ("original_size", "crop_top_left", "target_size", "flipped"):
        header[name] = getattr(crop, name)
    header["first_caption"], header["captions"] = captions.start, len(captions)
    embedding = [] if crop.embedding is None else [crop.embedding]
    arrays = [crop.mean, crop.log_variance, *embedding]
    return b"".join([header.tobytes(), *(_bytes(array, bfloat16) for array in arrays)])


def _pack_refusal(image: int, reason: str) -> bytes:
    """A latents record for an image that could not be encoded."""
    header = np.zeros((), _LATENTS)
    header["image"] = image
    return header.tobytes() + reason.encode(errors="backslashreplace")


def _unpack_crop(record: bytes, image: int, embedding_width: int) -> tuple[Crop, range] | str:
    """The crop and the numbers of its text records, or the reason for a refusal. ValueError for any other record."""
    header = np.frombuffer(record, _LATENTS, 1)[0]
    _check_image(int(header["image"]), image)
    shape = tuple(header["shape"].tolist())
    if shape == (0, 0, 0):
        return record[_LATENTS.itemsize :].decode()
    if min(shape) < 1 or len(record) != _LATENTS.itemsize + 2 * (2 * math.prod(shape) + embedding_width):
        expected = "×".join(map(str, shape))
        more = f" and an embedding of {embedding_width}" if embedding_width else ""
        raise ValueError(f"its {len(record)} bytes do not hold a mean and a log-variance of {expected} values{more}")
    values = np.frombuffer(record, bfloat16, offset=_LATENTS.itemsize)
    mean, log_variance = values[: 2 * math.prod(shape)].reshape(2, *shape)
    crop = Crop(
        mean=mean,
        log_variance=log_variance,
        embedding=values[-embedding_width:] if embedding_width else None,
        original_size=header["original_size"],
        crop_top_left=header["crop_top_left"],
        target_size=header["target_size"],
        flipped=bool(header["flipped"]),
    )
    first = int(header["first_caption"])
    return crop, range(first, first + int(header["captions"]))


def _pack_text(image: int, text: Text, towers: tuple[str, ...]) -> bytes:
    """A text record."""
    assert text.tokens.keys() == set(towers)
    tokens = [text.tokens[tower] for tower in towers]
    pooled = np.zeros(0, bfloat16) if text.pooled is None else text.pooled
    header = np.array([image, *map(len, tokens), *text.context.shape, len(pooled)], np.int32)
    integers = [_bytes(array, np.int32) for array in (header, *tokens)]
    return b"".join([*integers, _bytes(text.context, bfloat16), _bytes(pooled, bfloat16)])


def _unpack_text(record: bytes, image: int, towers: tuple[str, ...]) -> Text:
    """The encoded caption of a text record. Raises ValueError for any other record."""
    start = len(towers) + 4
    of_image, *lengths, tokens, features, projection = np.frombuffer(record, np.int32, start).tolist()
    _check_image(of_image, image)
    sizes = [start, *lengths]
    integers, values = sum(sizes), tokens * features + projection
    if min(*sizes, tokens, features, projection) < 0 or len(record) != 4 * integers + 2 * values:
        raise ValueError(f"its {len(record)} bytes do not hold {integers} integers and {values} values")
    _, *of_towers = np.split(np.frombuffer(record, np.int32, integers), np.cumsum(sizes)[:-1])
    context, pooled = np.split(np.frombuffer(record, bfloat16, values, 4 * integers), [tokens * features])
    return Text(
        tokens=dict(zip(towers, of_towers, strict=True)),
        context=context.reshape(tokens, features),
        pooled=pooled if projection else None,
    )


def _check_image(found: int, image: int) -> None:
    if found != image:
        raise ValueError(f"it belongs to image {found}, not to image {image}")


class PieceWriter:
    """Writes one piece of a cache atomically: each of its images in order, with `add` or `refuse`, then `finish`.

    A context manager; a piece that is not finished is discarded. Raises OSError where writing to the disk fails.
    """

    def __init__(self, plan: CachePlan, piece: int):
        self._plan, self._images, self._added = plan, plan.images_of(piece), 0
        self._text = _AtomicRecordWriter(plan.path(TEXT, piece))
        self._latents = _AtomicRecordWriter(plan.path(LATENTS, piece))

    def _next(self) -> int:
        self._added += 1
        return self._images[self._added - 1]

    def add(self, crops: Sequence[Crop], texts: Sequence[Text]) -> None:
        """Writes the next image: as many crops as in the plan, and all captions."""
        assert len(crops) == self._plan.crops, f"{len(crops)} crops, expected {self._plan.crops}"
        image, first = self._next(), self._text.records
        for text in texts:
            self._text.write(_pack_text(image, text, self._plan.towers))
        for crop in crops:
            self._latents.write(_pack_crop(image, crop, range(first, first + len(texts))))

    def refuse(self, reason: str) -> None:
        """Records that the next image could not be encoded, with the reason."""
        image = self._next()
        for _ in range(self._plan.crops):
            self._latents.write(_pack_refusal(image, reason))

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, *problem: object) -> None:
        self._text.release()
        self._latents.release()

    def finish(self) -> None:
        """Waits until both files are on the disk, then renames them to their final names."""
        assert self._added == len(self._images), f"{self._added} images of {len(self._images)}"
        self._text.close()
        self._latents.close()
        self._text.publish()
        self._latents.publish()


def _read_description(folder: AnyPath) -> dict[str, Any]:
    """The content of cache.json. Raises FileNotFoundError where there is none, InputError where it cannot be used."""
    file = folder / DESCRIPTION
    try:
        content = objects.open_object(file, _WHAT).read() if in_bucket(file) else file.read_bytes()
        description = json.loads(content)
        if not isinstance(description, dict) or "format" not in description:
            raise ValueError("it has no format number")
    except (FileNotFoundError, InputError):
        raise
    except (OSError, ValueError) as problem:
        raise fault(problem)(
            f"{file} cannot be read ({problem}). Copy it again from where the cache was made, or remove {folder} and "
            "run `sdxl-jax data encode` again"
        ) from problem
    if description["format"] != FORMAT:
        raise InputError(
            f"{file} has format {description['format']}, this version of sdxl-jax reads format {FORMAT}. Run `sdxl-jax "
            "data encode` into a new folder, or use the version that wrote it"
        )
    return description


def begin(
    folder: str | AnyPath,
    *,
    made_from: dict[str, Any],
    images: int,
    crops: int,
    towers: Sequence[str],
    piece_images: int = 1024,
    embedding_width: int = 0,
) -> CachePlan:
    """Creates a cache in the folder, or resumes one that was begun there before.

    made_from: all that determines the content, as JSON values by name. Any number of processes may begin the same cache
    at the same time. Raises InputError: the folder cannot be made, holds other files, or a cache of something else.
    """
    folder = located(folder, _WHAT)
    counts = {"images": images, "crops": crops, "piece_images": piece_images}
    check_ranges((name, count, 1, math.inf) for name, count in counts.items())
    content = {"made_from": made_from, "images": images, "crops": crops, "piece_images": piece_images}
    if embedding_width:
        content["embedding_width"] = embedding_width
    text = json.dumps({"format": FORMAT, **content, "towers": list(towers)}, indent=2)
    if in_bucket(folder):
        _describe_in_bucket(folder, text + "\n")
    else:
        _describe(folder, text + "\n")
    description = _read_description(folder)
    if lines := differences(description, json.loads(text), longest=_SHOWN_CHARACTERS):
        raise InputError(
            "\n  ".join([f"{folder} holds a cache of something else, finished or not (in it -> given):", *lines])
            + "\nGive the same, or another folder, or remove this one to encode again"
        )
    for kind in () if in_bucket(folder) else (LATENTS, TEXT):
        (folder / kind).mkdir(exist_ok=True)
    return CachePlan(folder, description["made_from"], images, crops, piece_images, tuple(towers), embedding_width)


def _describe(folder: Path, text: str) -> None:
    """Makes the folder, and writes cache.json if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(folder) if not name.endswith(PARTIAL)]
    except OSError as problem:
        raise fault(problem)(f"The folder {folder} cannot be made ({problem.strerror}). Give another one") from problem
    if not (folder / DESCRIPTION).exists():  # checked after the names: another process that begins writes it first
        _refuse_others(folder, bool(others))
        # A unique tag: any number of processes may begin at the same time.
        write_text(folder / DESCRIPTION, text, tag=uuid.uuid4().hex, durable=True)


def _describe_in_bucket(folder: epath.Path, text: str) -> None:
    """As `_describe`."""
    buckets.check_writable(folder, _WHAT)
    others = [name for name in buckets.files(folder, _WHAT) if not name.startswith(".probe-")]
    if objects.size(folder / DESCRIPTION, _WHAT) is None:
        _refuse_others(folder, bool(others))
        objects.write_bytes(folder / DESCRIPTION, text.encode(), _WHAT)


def _refuse_others(folder: AnyPath, others: bool) -> None:
    if others:
        raise InputError(f"{folder} holds other files and is not a cache. Give a new or an empty folder")


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """The encoded captions of one image, each of which is read when it is indexed: `captions[2]`.

    Raises IndexError below 0 or beyond the last, and InputError as `Cache.crop` does.
    """

    cache: "Cache" = dataclasses.field(repr=False)
    image: int
    _records: range

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, caption: int) -> Text:
        if not 0 <= caption < len(self):
            raise IndexError(f"caption {caption} of {len(self)}, image {self.image}")
        return self.cache._text(self.image, self._records[caption])

    def __iter__(self) -> Iterator[Text]:
        return map(self.__getitem__, range(len(self)))


class Cache:
    """An open, complete cache. Made by `open_cache`.

    A pickle holds the path and `made_from` alone: a worker process opens the cache again, and refuses one that was
    replaced in the meantime. Any number of threads may read, also after a fork.
    """

    def __init__(self, plan: CachePlan):
        self.folder = plan.folder
        self.made_from = plan.made_from
        """All that determines the content, as given to `begin`."""
        self.images = plan.images
        self.crops = plan.crops
        """K, crops per image."""
        self.towers = plan.towers
        """Names of the text towers."""
        self._plan = plan
        self._files = RecordFiles(
            "Copy it again from where the cache was made, or remove it and run the same `sdxl-jax data encode` again, "
            "which encodes what is missing"
        )

    def __len__(self) -> int:
        """Number of images."""
        return self.images

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.folder, self.made_from)

    def crop(self, image: int, crop: int) -> tuple[Crop, Captions]:
        """One crop of an image, and the image's captions, none of them read yet.

        Raises IndexError for an image or crop below 0 or beyond the last, Unencoded where the image could not be
        encoded, and InputError, naming the file, where a file is missing, cut off or damaged.
        """
        if not (0 <= image < self.images and 0 <= crop < self.crops):
            raise IndexError(f"crop {crop} of {self.crops}, image {image} of {self.images}")
        piece, place = divmod(image, self._plan.piece_images)
        path, number = self._plan.path(LATENTS, piece), place * self.crops + crop
        record = self._files.read(path, number)
        try:
            unpacked = _unpack_crop(record, image, self._plan.embedding_width)
        except ValueError as problem:
            raise self._files.damaged(path, number, problem) from problem
        if isinstance(unpacked, str):
            raise Unencoded(
                f"Image {image} of the cache {self.folder} could not be encoded: {unpacked}. Train without it, or "
                "fix it and run `sdxl-jax data encode` into a new folder"
            )
        found, captions = unpacked
        return found, Captions(self, image, captions)

    def _text(self, image: int, number: int) -> Text:
        path = self._plan.path(TEXT, image // self._plan.piece_images)
        record = self._files.read(path, number)
        try:
            return _unpack_text(record, image, self.towers)
        except ValueError as problem:
            raise self._files.damaged(path, number, problem) from problem


def open_cache(folder: str | AnyPath, made_from: dict[str, Any], *, ignore: Collection[str] = ()) -> Cache:
    """Opens a cache that must have been made from `made_from`. Reads cache.json and the names of the files, no piece.

    ignore: keys of `made_from` that may differ.

    Raises InputError: no such folder; not a cache; another format; made from something else, with all differences;
    pieces that are missing.
    """
    folder = located(folder, _WHAT)
    expected = "Expected a folder that `sdxl-jax data encode` has written"
    if not in_bucket(folder) and not folder.is_dir():
        raise InputError(f"There is no folder {folder}. {expected}. Check the path, seen from {Path.cwd()}")
    try:
        description = _read_description(folder)
        images, crops, piece_images = (description[name] for name in ("images", "crops", "piece_images"))
        towers = tuple(description["towers"])
        width = description.get("embedding_width", 0)
        plan = CachePlan(folder, description["made_from"], images, crops, piece_images, towers, width)
    except FileNotFoundError:
        raise InputError(f"{folder} is not a cache: it has no {DESCRIPTION}. {expected}") from None
    except (KeyError, TypeError) as problem:
        raise InputError(
            f"{folder / DESCRIPTION} is damaged ({type(problem).__name__}: {problem}). Copy it again from where the "
            "cache was made"
        ) from problem
    found, given = (
        {key: value for key, value in made.items() if key not in ignore}
        for made in (plan.made_from, json.loads(json.dumps(made_from)))
    )
    if lines := differences(found, given, longest=_SHOWN_CHARACTERS):
        raise InputError(
            "\n  ".join([f"The cache {folder} was made from something else (in it -> given):", *lines])
            + "\nRun `sdxl-jax data encode` into a new folder, or train with what the cache was made from"
        )
    try:
        missing = len(plan.missing())
    except FileNotFoundError:
        missing = plan.pieces
    if missing:
        raise InputError(
            f"The cache {folder} is not finished: {missing} of its {plan.pieces} pieces are missing. Run the same "
            "`sdxl-jax data encode` again, it resumes where it stopped"
        )
    return Cache(plan)
