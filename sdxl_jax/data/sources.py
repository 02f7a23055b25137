"""The interfaces of all sources of captioned images, and their refusals.

Two interfaces: an `ImageSource` is what training reads, a folder or a shard set, opened as a whole, with numbered
images. A `Piece` yields `RawExample`s one after the other; it is what a shard build reads, from any source. In both,
whatever cannot be used becomes a `Refused` with its reason, so that nothing is left out silently.

Not here: any source. Folders of images are in `folders`, shard sets in `shards`; what else a build reads is listed in
`build/records`. `pipeline` chooses between the two for training.
"""

import enum
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import objects
from sdxl_jax.files.paths import AnyPath, in_bucket, located


class OnRefused(enum.Enum):
    """What to do with files that cannot be used."""

    ERROR = "error"
    """Stop with one error message."""
    SKIP = "skip"
    """Continue without them."""


BYTES_LIMIT = 512 << 20
"""Bytes of one file, tar member or Parquet value; larger ones are refused before they are read."""

_LISTED = 5  # refusals that an error message lists


class Refused(NamedTuple):
    """One image, caption or line of metadata that cannot be used."""

    file: str
    """Its path or name in the source; in a folder, relative to it."""
    reason: str


class Unusable(Exception):
    """The reason why one image is refused."""


# What training reads


@runtime_checkable
class ImageSource(Protocol):
    """Captioned images that training can use, numbered from 0. It is sent to worker processes, so it can be pickled."""

    @property
    def path(self) -> AnyPath:
        """The folder or the shard set, which may be in a bucket."""
        ...

    @property
    def found(self) -> int:
        """Number of images, usable or not."""
        ...

    @property
    def sizes(self) -> Int32[np.ndarray, "images 2"]:
        """(height, width) in pixels, upright, of the usable images."""
        ...

    @property
    def numbers(self) -> Mapping[str, Float32[np.ndarray, " images"]]:
        """Numeric fields by name, e.g. an aesthetic score; NaN where an image has none."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the content, which a resumed run compares."""
        ...

    @property
    def built(self) -> bool:
        """Whether its refusals were reported and listed when it was built, so that training need not stop for them."""
        ...

    @property
    def reads_text_files(self) -> bool:
        """Whether `data.caption_lines` has an effect on its captions, or had one when it was built."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the source, one sentence each, which `data inspect` and the start of a run print."""
        ...

    def name(self, image: int) -> str:
        """Path or name of one image in the source."""
        ...

    def captions(self, image: int) -> tuple[str, ...]:
        """Captions of one image, one or several, in the order of the source."""
        ...

    def pixels(self, image: int, at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """RGB, 0..255, upright; with `at_least` it may be downscaled while decoding, as in `images.decode`.

        Raises InputError where the image is damaged.
        """
        ...

    def mask(self, image: int) -> UInt8[np.ndarray, "height width"] | None:
        """How much each pixel of one image counts in the loss, 0..255, upright; None: the source has no masks.

        Raises InputError where the mask is damaged.
        """
        ...

    def refused(self) -> Iterator[Refused]:
        """Everything that is left out, with the reasons."""
        ...


def summary(refused: Iterable[Refused], count: int) -> str:
    """The first refusals, one per line, and how many more of the `count` there are."""
    lines = [f"  {file}: {reason}" for file, reason in itertools.islice(refused, _LISTED)]
    if count > _LISTED:
        lines.append(f"  and {count - _LISTED} more")
    return "\n".join(lines)


def stop_if_refused(folder: str | Path, refused: Iterable[Refused], count: int, on_refused: OnRefused) -> None:
    """Raises one InputError for all `count` refusals, of which it lists the first, unless they are to be skipped."""
    if count and on_refused is OnRefused.ERROR:
        raise InputError(
            f"{count} entries of {folder} cannot be used:\n{summary(refused, count)}\nFix or remove them, or set "
            "data.on_refused=skip to train without them (`sdxl-jax data inspect` counts and lists them)"
        )


# What a shard build reads


class RawExample(NamedTuple):
    """An encoded image with its captions and numeric fields, before the image is checked."""

    name: str
    image: bytes
    captions: tuple[str, ...]
    numbers: dict[str, float]


class Piece(Protocol):
    """A part of a source that is read on its own. It can be pickled, and two of equal content are equal."""

    def samples(self) -> Iterator[RawExample | Refused]:
        """Its images, in order. Raises InputError where the source disappears, MachineError where its storage fails."""
        ...


class Refusals(NamedTuple):
    """The refusals that listing a source found, as a piece of the source."""

    refused: tuple[Refused, ...]

    def samples(self) -> Iterator[RawExample | Refused]:
        yield from self.refused


def open_stream(path: str, chunk_bytes: int = objects.CHUNK_BYTES) -> io.BufferedReader:
    """Opens a file of a source, local or in a bucket, for reading and seeking. Raises OSError, and for buckets as
    `objects.open_object`, as do reads. chunk_bytes: of a request to a bucket, at least."""
    where = located(path, "the source")
    return objects.open_object(where, "the source", chunk_bytes) if in_bucket(where) else where.open("rb")


def gone(path: str, problem: OSError) -> InputError | MachineError:
    """The error for a file that was there when the source was listed, and cannot be read any more."""
    return fault(problem)(
        f"{path} cannot be read any more ({problem.strerror or problem}); it was there when the source was listed. "
        "Bring it back, or leave it out of the source, and run the same command again"
    )
