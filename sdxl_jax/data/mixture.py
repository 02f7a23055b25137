"""A weighted mixture of image sources, as one source: images are numbered consecutively over all of them.

Not here: the effect of a weight on an epoch (order).
"""

import bisect
import dataclasses
import enum
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from sdxl_jax.data.captions import filled
from sdxl_jax.data.sources import ImageSource, Refused
from sdxl_jax.sizes import Size


class Target(enum.Enum):
    """What the model's prediction for an example is compared with."""

    DATA = "data"
    """What it should have predicted: the noise that was added, or what the model predicts in its place."""
    BASE = "base"
    """The prediction of the frozen model without the adapter that is trained, for the same example."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One of several sources of training images."""

    folder: str
    """Folder of captioned images or shard set, as data.folder."""
    weight: float = 1.0
    """How often each of its images is seen per epoch, on average, above 0: 2 is twice per epoch, 0.5 once in two
    epochs. In each bucket the source has at least one place per epoch."""
    loss_weight: float = 1.0
    """Factor of the loss of its examples, 0 or more: prior preservation has images of the class as a source, with 1 or
    less. Higher: they count for more."""
    target: Target = Target.DATA
    """What the model's prediction for its examples is compared with. BASE, with an adapter: what the model predicts for
    them without the adapter, which prior preservation needs no images of the class for; one more forward pass."""
    masks: str | None = None
    """Masks of its images, as data.masks."""
    caption_template: str | None = None
    """What its captions are made into, as data.caption_template."""


class Share(NamedTuple):
    """The share of one source in an epoch."""

    folder: str
    weight: float
    images: int
    """Number of its images that are used."""
    share: float
    """Fraction of an epoch's examples, 0 to 1, before buckets are cut into batches."""


class Mixture:
    """Sources one after the other. It can be pickled where they can."""

    def __init__(self, sources: Sequence[ImageSource], settings: Sequence[Source]):
        """settings: of each source; templates of captions without trigger words (`captions.with_trigger`)."""
        self.sources, self.weights = tuple(sources), tuple(each.weight for each in settings)
        weights, targets = [each.loss_weight for each in settings], [each.target for each in settings]
        self.loss_weights = tuple(weights) if any(weight != 1 for weight in weights) else None
        """One per source; None: all examples count alike."""
        self.targets = tuple(targets) if any(target is not Target.DATA for target in targets) else None
        """One per source; None: DATA for all."""
        self.templates = [each.caption_template for each in settings]
        self.has_masks = any(each.masks is not None for each in settings)
        self.starts = list(itertools.accumulate((len(source.sizes) for source in sources), initial=0))
        """Number of the first image of each source, then the number of all images."""

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def sizes(self) -> Int32[np.ndarray, "images 2"]:
        """(height, width) of all images, in pixels, upright; a copy where there are several sources."""
        sizes = [source.sizes for source in self.sources]
        return sizes[0] if len(sizes) == 1 else np.concatenate(sizes)

    def _source(self, image: int) -> int:
        """The number of an image's source."""
        return bisect.bisect_right(self.starts, image) - 1

    def _locate(self, image: int) -> tuple[ImageSource, int]:
        """The source of an image, and the image's number there."""
        source = self._source(image)
        return self.sources[source], image - self.starts[source]

    def size(self, image: int) -> Size:
        """(height, width) of one image, in pixels, upright."""
        source, number = self._locate(image)
        return Size(*source.sizes[number].tolist())

    def number(self, image: int, name: str) -> float:
        """The value of one image's numeric field."""
        source, number = self._locate(image)
        return float(source.numbers[name][number])

    def loss_weight(self, image: int) -> float:
        """The factor of the loss of one image's examples."""
        return 1.0 if self.loss_weights is None else self.loss_weights[self._source(image)]

    def target(self, image: int) -> Target:
        """What one image's examples are compared with."""
        return Target.DATA if self.targets is None else self.targets[self._source(image)]

    def name(self, image: int) -> str:
        """Path or name of one image in its source, after the source's path where there are several."""
        source, number = self._locate(image)
        name = source.name(number)
        return name if len(self.sources) == 1 else f"{source.path}/{name}"

    def captions(self, image: int) -> tuple[str, ...]:
        source, number = self._locate(image)
        template, captions = self.templates[self._source(image)], source.captions(number)
        return captions if template is None else filled(template, captions)

    def pixels(self, image: int, at_least: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
        """As `ImageSource.pixels`."""
        source, number = self._locate(image)
        return source.pixels(number, at_least)

    def mask(self, image: int) -> UInt8[np.ndarray, "height width"] | None:
        """As `ImageSource.mask`."""
        source, number = self._locate(image)
        return source.mask(number)

    @property
    def found(self) -> int:
        """Number of images, usable or not."""
        return sum(source.found for source in self.sources)

    def refused(self, built: bool) -> Iterator[Refused]:
        """The refusals of the sources that were built (shard sets), or of those that were not (folders)."""
        for source in self.sources:
            if source.built is built:
                folder = "" if len(self.sources) == 1 else f"{source.path}/"
                yield from (Refused(folder + refused.file, refused.reason) for refused in source.refused())

    def notes(self) -> Iterator[str]:
        """The warnings of all sources."""
        for source in self.sources:
            folder = "" if len(self.sources) == 1 else f"{source.path}: "
            yield from (folder + note for note in source.notes)

    @property
    def fingerprints(self) -> list[str]:
        """A hash of the content of each source, with its template of captions."""
        return [
            source.fingerprint
            if template is None
            else hashlib.sha256(json.dumps([source.fingerprint, template]).encode()).hexdigest()
            for source, template in zip(self.sources, self.templates, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all sources and their settings."""
        settings = (self.loss_weights, self.targets)
        if len(self.sources) == 1 and self.weights == (1.0,) and settings == (None, None):
            return self.fingerprints[0]
        rows: list[list[Any]] = [list(row) for row in zip(self.fingerprints, self.weights, strict=True)]
        if self.loss_weights is not None:
            rows = [[*row, weight] for row, weight in zip(rows, self.loss_weights, strict=True)]
        if self.targets is not None:
            rows = [[*row, target.value] for row, target in zip(rows, self.targets, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
