"""A cache of encoded training data: what the autoencoder and the text towers make of every image and caption, in files.

    cache.json                    what it was made from, how many images and crops, the text towers; written first
    latents/00000.array_record …  K records an image, one a crop: the autoencoder's posterior, and the crop's geometry
    text/00000.array_record …     a record a caption: its tokens, the text context, the pooled projection

Images are numbered 0 … images − 1. Piece p, two files, holds the images from p · piece_images up to the next piece's.
A latents record is number (image − first image of the piece) · K + crop of its file, and says in its header which
records of the piece's text file are the image's captions: there is no other index. Arrays are bfloat16, or int32 where
they count pixels or tokens, little-endian, one after the other:

    latents   header (`_LATENTS`), mean, log-variance
    text      header (int32: image, tokens of each tower, context's tokens and features, pooled features or 0), tokens
              of each tower in the order of cache.json, context, pooled

An image that could not be encoded has K headers with the shape 0 0 0, each followed by the reason (UTF-8) alone.

A piece is written to `*.partial` files. When both are complete on the disk they are renamed, the text first. So a piece
is there when both files are, an interrupted run leaves nothing that is taken for finished, and what it left is removed
when the cache is complete. Records are not compressed, so that equal content makes equal files, and one record costs
one read.

Not here: encoding, and which crop and caption training takes of an image.
"""

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import BFloat16, Int32
from ml_dtypes import bfloat16

from sdxl_jax.data.record_files import RecordFiles, RecordWriter
from sdxl_jax.errors import InputError, check_ranges, fault
from sdxl_jax.files.atomic import PARTIAL, partial_path, sync, write_text
from sdxl_jax.files.paths import local
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
        ("first_caption", "<i4"),  # number of its record in the piece's text file; the others follow
        ("captions", "<i4"),
    ]
)
_SHOWN_CHARACTERS = 60  # of a value in a message


class Crop(NamedTuple):
    """One crop of an image as the autoencoder sees it, and what the model is told about it. (height, width) in pixels.

    As read, the arrays are views of the file's bytes, and read only.
    """

    mean: BFloat16[np.ndarray, "height width channels"]
    """Of the posterior, as the autoencoder gives it: not scaled."""
    log_variance: BFloat16[np.ndarray, "height width channels"]
    original_size: Int32[np.ndarray, "2"]
    """Before any resize."""
    crop_top_left: Int32[np.ndarray, "2"]
    """(top, left) of the crop in the image after resize and flip."""
    target_size: Int32[np.ndarray, "2"]
    """Of the bucket."""
    flipped: bool


class Text(NamedTuple):
    """One caption as the text towers see it. As read, the arrays are views of the file's bytes, and read only."""

    tokens: dict[str, Int32[np.ndarray, "77"]]
    """By the name of the text tower."""
    context: BFloat16[np.ndarray, "tokens features"]
    pooled: BFloat16[np.ndarray, " projection"] | None


class Unencoded(InputError):
    """This image could not be encoded; the message says why. The others can be used."""


def _file_name(piece: int) -> str:
    return f"{piece:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What a cache holds once it is complete, and where. Made by `begin`, which knows who may write."""

    folder: Path
    made_from: dict[str, Any]
    """What decides the content, as JSON values by name."""
    images: int
    crops: int
    """K, of each image."""
    piece_images: int
    """Images a piece; the last one may have fewer."""
    towers: tuple[str, ...]
    """Names of the text towers."""

    @property
    def pieces(self) -> int:
        return -(-self.images // self.piece_images)

    def images_of(self, piece: int) -> range:
        """The images that the piece holds."""
        assert 0 <= piece < self.pieces
        return range(piece * self.piece_images, min((piece + 1) * self.piece_images, self.images))

    def path(self, kind: str, piece: int) -> Path:
        """Where the piece's file of that kind lies: LATENTS or TEXT."""
        return self.folder / kind / _file_name(piece)

    def missing(self, share: int = 0, shares: int = 1) -> list[int]:
        """Pieces that are not there, of those that fall to this share. Looks at the names of the files alone.

        Shares 0 … shares − 1 may be written at the same time, by as many processes; two that write the same piece
        work for nothing.
        """
        assert 0 <= share < shares
        there = set(os.listdir(self.folder / LATENTS)).intersection(os.listdir(self.folder / TEXT))
        return [piece for piece in range(share, self.pieces, shares) if _file_name(piece) not in there]

    def clean(self) -> None:
        """Removes what interrupted writers left."""
        for kind in (LATENTS, TEXT):
            for file in (self.folder / kind).glob(f"*{PARTIAL}"):
                file.unlink(missing_ok=True)

    def done(self) -> int:
        """How many pieces are there."""
        return self.pieces - len(self.missing())


class _RecordWriter:
    """Writes a file of records beside its place. OSError where the disk does not take it."""

    def __init__(self, path: Path):
        # A name of its own: another process that writes the same piece, by mistake, spoils nothing.
        self._path, self._partial = path, partial_path(path, uuid.uuid4().hex)
        self._writer = RecordWriter(self._partial)
        self.records = 0

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self.records += 1

    def close(self) -> None:
        """Completes the file and waits until it is on the disk."""
        self._writer.close()
        sync(self._partial)

    def publish(self) -> None:
        """Moves the closed file to its place."""
        os.replace(self._partial, self._path)
        sync(self._path.parent)

    def release(self) -> None:
        """Lets go of the file, and removes it where it was not published."""
        self._partial.unlink(missing_ok=True)
        with suppress(OSError):
            self._writer.close()


def _bytes(array: np.ndarray, dtype: type) -> bytes:
    assert array.dtype == dtype, f"{array.dtype}, expected {np.dtype(dtype)}"
    return array.tobytes()


def _pack_crop(image: int, crop: Crop, captions: range) -> bytes:
    """A latents record; `captions` are the numbers of their records."""
    assert crop.mean.shape == crop.log_variance.shape and crop.mean.size
    header = np.zeros((), _LATENTS)
    header["image"], header["shape"] = image, crop.mean.shape
    for name in ("original_size", "crop_top_left", "target_size", "flipped"):
        header[name] = getattr(crop, name)
    header["first_caption"], header["captions"] = captions.start, len(captions)
    return b"".join([header.tobytes(), _bytes(crop.mean, bfloat16), _bytes(crop.log_variance, bfloat16)])


def _pack_refusal(image: int, reason: str) -> bytes:
    """A latents record of an image that could not be encoded."""
    header = np.zeros((), _LATENTS)
    header["image"] = image
    return header.tobytes() + reason.encode(errors="backslashreplace")


def _unpack_crop(record: bytes, image: int) -> tuple[Crop, range] | str:
    """What was packed, or the refusal's reason. ValueError where the record is no such thing."""
    header = np.frombuffer(record, _LATENTS, 1)[0]
    _check_image(int(header["image"]), image)
    shape = tuple(header["shape"].tolist())
    if shape == (0, 0, 0):
        return record[_LATENTS.itemsize :].decode()
    if min(shape) < 1 or len(record) != _LATENTS.itemsize + 2 * 2 * math.prod(shape):
        raise ValueError(f"its {len(record)} bytes do not hold a mean and a log-variance of {shape}")
    mean, log_variance = np.frombuffer(record, bfloat16, offset=_LATENTS.itemsize).reshape(2, *shape)
    crop = Crop(
        mean=mean,
        log_variance=log_variance,
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
    """What was packed. ValueError where the record is no such thing."""
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
        raise ValueError(f"it is of image {found}, not of image {image}")


class PieceWriter:
    """Writes one piece of a cache: each of its images in order, with `add` or `refuse`, then `finish`.

    To be used in a `with`; what is not finished is worth nothing. OSError where the disk does not take it.
    """

    def __init__(self, plan: CachePlan, piece: int):
        self._plan, self._images, self._added = plan, plan.images_of(piece), 0
        self._text = _RecordWriter(plan.path(TEXT, piece))
        self._latents = _RecordWriter(plan.path(LATENTS, piece))

    def _next(self) -> int:
        self._added += 1
        return self._images[self._added - 1]

    def add(self, crops: Sequence[Crop], texts: Sequence[Text]) -> None:
        """The next image: as many crops as the plan says, and all captions."""
        assert len(crops) == self._plan.crops, f"{len(crops)} crops, expected {self._plan.crops}"
        image, first = self._next(), self._text.records
        for text in texts:
            self._text.write(_pack_text(image, text, self._plan.towers))
        for crop in crops:
            self._latents.write(_pack_crop(image, crop, range(first, first + len(texts))))

    def refuse(self, reason: str) -> None:
        """The next image, which could not be encoded."""
        image = self._next()
        for _ in range(self._plan.crops):
            self._latents.write(_pack_refusal(image, reason))

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, *problem: object) -> None:
        self._text.release()
        self._latents.release()

    def finish(self) -> None:
        """Waits until both files are on the disk, then moves them to their place."""
        assert self._added == len(self._images), f"{self._added} images of {len(self._images)}"
        self._text.close()
        self._latents.close()
        self._text.publish()
        self._latents.publish()


def _read_description(folder: Path) -> dict[str, Any]:
    """cache.json. FileNotFoundError where there is none, InputError where it cannot be used."""
    file = folder / DESCRIPTION
    try:
        said = json.loads(file.read_bytes())
        if not isinstance(said, dict) or "format" not in said:
            raise ValueError("it does not say its format")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:
        raise fault(problem)(
            f"{file} cannot be read ({problem}). Copy it again from where the cache was made, or remove {folder} and "
            "run `sdxl-jax data encode` again."
        ) from problem
    if said["format"] != FORMAT:
        raise InputError(
            f"{file} says format {said['format']}, this version of sdxl-jax reads {FORMAT}. Run `sdxl-jax data encode` "
            "into a new folder, or use the version that wrote it."
        )
    return said


def begin(
    folder: str | Path,
    *,
    made_from: dict[str, Any],
    images: int,
    crops: int,
    towers: Sequence[str],
    piece_images: int = 1024,
) -> CachePlan:
    """Makes the folder one in which this cache is to be written, or goes on with it where it was begun before.

    `made_from` is what decides the content, as JSON values by name. Any number of processes may begin the same cache
    at the same time. Raises InputError: the folder cannot be made, holds other files, or a cache of something else.
    """
    folder = local(folder, "data.cache")
    counts = {"images": images, "crops": crops, "piece_images": piece_images}
    check_ranges((name, count, 1, math.inf) for name, count in counts.items())
    content = {"made_from": made_from, "images": images, "crops": crops, "piece_images": piece_images}
    text = json.dumps({"format": FORMAT, **content, "towers": list(towers)}, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(folder) if not name.endswith(PARTIAL)]
    except OSError as problem:
        raise fault(problem)(f"The folder {folder} cannot be made ({problem.strerror}). Give another one.") from problem
    if not (folder / DESCRIPTION).exists():  # looked at after the names: another process that begins writes it first
        if others:
            raise InputError(f"{folder} holds other files and is no cache. Give a new or an empty folder.")
        # The tag: any number of processes may begin at the same time.
        write_text(folder / DESCRIPTION, text + "\n", tag=uuid.uuid4().hex, durable=True)
    said = _read_description(folder)
    if lines := differences(said, json.loads(text), longest=_SHOWN_CHARACTERS):
        raise InputError(
            "\n  ".join([f"{folder} holds a cache of something else, finished or not (in it -> given):", *lines])
            + "\nGive the same, or another folder, or remove this one to encode again"
        )
    for kind in (LATENTS, TEXT):
        (folder / kind).mkdir(exist_ok=True)
    return CachePlan(folder, said["made_from"], images, crops, piece_images, tuple(towers))


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """The captions of one image. Each is read when it is asked for: `captions[2]`.

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
    """An open cache that is complete. Made by `open_cache`.

    A pickle holds the path and `made_from` alone: a worker process opens the cache again, and refuses one that was
    replaced by another in between. Any number of threads may read, also after a fork.
    """

    def __init__(self, plan: CachePlan):
        self.folder = plan.folder
        self.made_from = plan.made_from
        """What it was made from, as given to `begin`."""
        self.images = plan.images
        self.crops = plan.crops
        """K, of each image."""
        self.towers = plan.towers
        """Names of the text towers."""
        self._plan = plan
        self._files = RecordFiles(
            "Copy it again from where the cache was made, or remove it and run the same `sdxl-jax data encode` again, "
            "which makes what is missing."
        )

    def __len__(self) -> int:
        """Images."""
        return self.images

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.folder, self.made_from)

    def crop(self, image: int, crop: int) -> tuple[Crop, Captions]:
        """One crop of an image, and its captions, of which none is read yet.

        Raises IndexError for an image or crop below 0 or beyond the last, Unencoded where the image could not be
        encoded, and InputError, naming the file, where that is missing, cut off or damaged.
        """
        if not (0 <= image < self.images and 0 <= crop < self.crops):
            raise IndexError(f"crop {crop} of {self.crops}, image {image} of {self.images}")
        piece, place = divmod(image, self._plan.piece_images)
        path, number = self._plan.path(LATENTS, piece), place * self.crops + crop
        record = self._files.read(path, number)
        try:
            found = _unpack_crop(record, image)
        except ValueError as problem:
            raise self._files.damaged(path, number, problem) from problem
        if isinstance(found, str):
            raise Unencoded(
                f"Image {image} of the cache {self.folder} could not be encoded: {found}. Train without it, or correct "
                "it and run `sdxl-jax data encode` into a new folder."
            )
        read, captions = found
        return read, Captions(self, image, captions)

    def _text(self, image: int, number: int) -> Text:
        path = self._plan.path(TEXT, image // self._plan.piece_images)
        record = self._files.read(path, number)
        try:
            return _unpack_text(record, image, self.towers)
        except ValueError as problem:
            raise self._files.damaged(path, number, problem) from problem


def open_cache(folder: str | Path, made_from: dict[str, Any], *, ignore: Collection[str] = ()) -> Cache:
    """Opens a cache that must have been made from that. Looks at cache.json and the files' names, and opens no piece.

    ignore: keys of `made_from` that may differ.

    Raises InputError: no such folder; no cache; another format; made from something else, with all that differs;
    pieces that are missing.
    """
    folder = Path(folder)
    expected = "Expected a folder that `sdxl-jax data encode` has written"
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. {expected}. Check the path, seen from {Path.cwd()}.")
    try:
        said = _read_description(folder)
        images, crops, piece_images = said["images"], said["crops"], said["piece_images"]
        plan = CachePlan(folder, said["made_from"], images, crops, piece_images, tuple(said["towers"]))
    except FileNotFoundError:
        raise InputError(f"{folder} is no cache: it has no {DESCRIPTION}. {expected}.") from None
    except (KeyError, TypeError) as problem:
        raise InputError(
            f"{folder / DESCRIPTION} is damaged ({type(problem).__name__}: {problem}). Copy it again from where the "
            "cache was made."
        ) from problem
    there, given = (
        {key: value for key, value in made.items() if key not in ignore}
        for made in (plan.made_from, json.loads(json.dumps(made_from)))
    )
    if lines := differences(there, given, longest=_SHOWN_CHARACTERS):
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
            "`sdxl-jax data encode` again, it goes on where it stopped."
        )
    return Cache(plan)
