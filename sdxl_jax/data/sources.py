"""What all sources of captioned images share.

Two sides: `Images` is what training reads, a folder or a shard set, opened whole and numbered. `Sample`, out of a
`Piece`, is what a build reads, from any source, one after the other. On both, whatever cannot be used becomes a
`Refused` with its reason, so that nothing is left out in silence.

Not here: any source. A plain folder is in `folders`, a shard set in `shards`; what else a build reads is listed in
`build/records`. `pipeline` chooses between the two for training.
"""

import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from sdxl_jax.errors import InputError, MachineError, fault


class OnRefused(enum.Enum):
    """What to do about files that cannot be used."""

    ERROR = "error"
    """Stop with one message."""
    SKIP = "skip"
    """Go on without them."""


BYTES_LIMIT = 512 << 20
"""Bytes of one file, tar member or Parquet value; larger ones are refused before they are read."""

_LISTED = 5  # refusals spelt out in a message


class Refused(NamedTuple):
    """One image, caption or line of metadata that cannot be used."""

    file: str
    """Where it is in the source; in a folder, relative to it."""
    reason: str


class Unusable(Exception):
    """The reason why one image is refused."""


# What training reads


@runtime_checkable
class ImageSource(Protocol):
    """What is trained on: images that can be used, numbered from 0. Sent to worker processes, so it must pickle."""

    @property
    def path(self) -> Path:
        """The folder or the shard set."""
        ...

    @property
    def found(self) -> int:
        """Images, usable or not."""
        ...

    @property
    def sizes(self) -> Int32[np.ndarray, "images 2"]:
        """(height, width) in pixels, upright, of those that can be used."""
        ...

    @property
    def numbers(self) -> Mapping[str, Float32[np.ndarray, " images"]]:
        """What the source counts or measures, e.g. an aesthetic score, by name; NaN where an image has none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names the content, for resuming."""
        ...

    @property
    def built(self) -> bool:
        """Whether what is refused was said and listed when it was built, so that training need not stop for it."""
        ...

    @property
    def reads_text_files(self) -> bool:
        """Whether `data.caption_lines` has, or had, an effect on its captions."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What of it somebody may not expect, a sentence each; an inspection and the start of a run say it."""
        ...

    def name(self, image: int) -> str:
        """Where one image is in the source."""
        ...

    def captions(self, image: int) -> tuple[str, ...]:
        """One or several, in the order of the source."""
        ...

    def pixels(self, image: int, at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """RGB, 0..255, upright; with `at_least` perhaps shrunk, as in `images.decode`.

        Raises InputError where the image is damaged.
        """
        ...

    def refused(self) -> Iterator[Refused]:
        """All that is left out."""
        ...


def summary(refused: Iterable[Refused], count: int) -> str:
    """The first refusals, one a line, and how many more of the `count` there are."""
    lines = [f"  {file}: {reason}" for file, reason in itertools.islice(refused, _LISTED)]
    if count > _LISTED:
        lines.append(f"  and {count - _LISTED} more")
    return "\n".join(lines)


def stop_if_refused(folder: str | Path, refused: Iterable[Refused], count: int, on_refused: OnRefused) -> None:
    """Raises one InputError for all `count` refusals, of which it looks at some, unless they are to be skipped."""
    if count and on_refused is OnRefused.ERROR:
        raise InputError(
            f"{count} entries of {folder} cannot be used:\n{summary(refused, count)}\nFix or remove them, or set "
            "data.on_refused=skip to train without them (`sdxl-jax data inspect` counts and lists them)."
        )


# What a build reads


class RawExample(NamedTuple):
    """An image with captions, before anyone has looked at the image."""

    name: str
    image: bytes
    captions: tuple[str, ...]
    numbers: dict[str, float]


class Piece(Protocol):
    """A part of a source that is read alone. It can be pickled, and is equal to another that says the same."""

    def samples(self) -> Iterator[RawExample | Refused]:
        """Its images in their order. Raises InputError where the source disappears, or its storage fails."""
        ...


class Refusals(NamedTuple):
    """What listing the source found already, as a piece of it."""

    refused: tuple[Refused, ...]

    def samples(self) -> Iterator[RawExample | Refused]:
        yield from self.refused


def printable(name: str) -> str:
    """Names that are not UTF-8 reach Python as half surrogate pairs, which no file takes."""
    return name.encode("utf-8", "backslashreplace").decode()


def gone(path: str, problem: OSError) -> InputError | MachineError:
    """The error of a file that was there when the source was listed."""
    return fault(problem)(
        f"{path} cannot be read any more ({problem.strerror or problem}); it was there when the source was listed. "
        "Bring it back, or leave it out of the source, and run the same command again."
    )
