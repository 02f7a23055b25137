"""Several sources of images as one: their images numbered through, each source with its weight.

Not here: what a weight does to an epoch (order).
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from sdxl_jax.arrays import Size
from sdxl_jax.data.sources import ImageSource, Refused


@dataclasses.dataclass(frozen=True)
class Source:
    """One of several sources."""

    folder: str
    """As data.folder."""
    weight: float = 1.0
    """How often each of its images comes an epoch, on average, above 0: 2 is twice, 0.5 is once in two epochs. In each
    bucket the source has one place an epoch at least."""


class Share(NamedTuple):
    """What one source gives to an epoch."""

    folder: str
    weight: float
    images: int
    """Of it that are used."""
    share: float
    """Of all examples of an epoch, 0 to 1, before buckets are cut into batches."""


class Mixture:
    """Sources in a row. Pickles where they do."""

    def __init__(self, sources: Sequence[ImageSource], weights: Sequence[float]):
        self.sources, self.weights = tuple(sources), tuple(weights)
        ends = itertools.accumulate((len(source.sizes) for source in sources), initial=0)
        self.starts = list(ends)
        """Number of the first image of each source; after them, how many there are in all."""

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def sizes(self) -> Int32[np.ndarray, "images 2"]:
        """All sizes; a copy where there are several sources."""
        sizes = [source.sizes for source in self.sources]
        return sizes[0] if len(sizes) == 1 else np.concatenate(sizes)

    def _of(self, image: int) -> tuple[ImageSource, int]:
        source = bisect.bisect_right(self.starts, image) - 1
        return self.sources[source], image - self.starts[source]

    def size(self, image: int) -> Size:
        """In pixels, upright."""
        source, number = self._of(image)
        return Size(*source.sizes[number].tolist())

    def number(self, image: int, name: str) -> float:
        """What the source counts by that name."""
        source, own = self._of(image)
        return float(source.numbers[name][own])

    def name(self, image: int) -> str:
        """As the source has it, after its folder's path where there are several."""
        source, number = self._of(image)
        name = source.name(number)
        return name if len(self.sources) == 1 else f"{source.path}/{name}"

    def captions(self, image: int) -> tuple[str, ...]:
        source, number = self._of(image)
        return source.captions(number)

    def pixels(self, image: int, at_least: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
        """As Images.pixels."""
        source, number = self._of(image)
        return source.pixels(number, at_least)

    @property
    def found(self) -> int:
        """Images, usable or not."""
        return sum(source.found for source in self.sources)

    def refused(self, built: bool) -> Iterator[Refused]:
        """What sources that were built, or those that were not, leave out."""
        for source in self.sources:
            if source.built is built:
                folder = "" if len(self.sources) == 1 else f"{source.path}/"
                yield from (Refused(folder + refused.file, refused.reason) for refused in source.refused())

    def notes(self) -> Iterator[str]:
        """What of the sources somebody may not expect."""
        for source in self.sources:
            folder = "" if len(self.sources) == 1 else f"{source.path}: "
            yield from (folder + note for note in source.notes)

    @property
    def fingerprint(self) -> str:
        """Names the content of all sources and their weights."""
        if len(self.sources) == 1 and self.weights == (1.0,):
            return self.sources[0].fingerprint
        rows = [[source.fingerprint, weight] for source, weight in zip(self.sources, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
