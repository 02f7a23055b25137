"""All crops of all images, once each, in the order of the cache: the input of `sdxl-jax data encode`.

The order is that of `Order.numbers`, bucket by bucket, so that an encoding batch has images of one size.

Not here: encoding, and the files of the cache.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.loader import Loader
from sdxl_jax.data.pipeline import BucketedDataset, prefetched
from sdxl_jax.data.transforms import Example
from sdxl_jax.errors import InputError


class Group(NamedTuple):
    """Consecutive images of one bucket, by their positions in `Order.numbers`."""

    bucket: int
    positions: range


class Crops(NamedTuple):
    """The decoded crops of a group, and its captions."""

    bucket: Bucket
    examples: list[list[Example]]
    """For each image, its crops; none where it is damaged."""
    reasons: list[str]
    """For each image, why it cannot be used; empty where it can."""
    captions: list[tuple[str, ...]]
    """For each image, all its captions; none where it is damaged."""

    def pixels(self, crop: int) -> UInt8[np.ndarray, "images height width 3"]:
        """Crop number `crop` of each image, 0..255; black for a damaged image."""
        black = np.zeros((*self.bucket, 3), np.uint8)
        return np.stack([examples[crop].image if examples else black for examples in self.examples])


def groups(dataset: BucketedDataset, positions: range, size: int) -> list[Group]:
    """The images at those positions, split into groups of at most `size`."""
    found = []
    for bucket in range(len(dataset.buckets)):
        run = dataset.order.run(bucket)
        first, last = max(run.start, positions.start), min(run.stop, positions.stop)
        found += [Group(bucket, range(start, min(start + size, last))) for start in range(first, last, size)]
    return found


@dataclasses.dataclass(frozen=True)
class _CropLoader:
    """Decodes a group. Sent to worker processes."""

    loader: Loader
    crops: int

    def __call__(self, group: Group) -> Crops:
        bucket = self.loader.buckets[group.bucket]
        crops = Crops(bucket, [], [], [])
        for image in self.loader.order.numbers[group.positions.start : group.positions.stop].tolist():
            try:
                examples, reason = self.loader.fixed_crops(image, range(self.crops), bucket), ""
                captions = self.loader.source.captions(image)
            except InputError as problem:
                examples, reason, captions = [], str(problem), ()
            crops.examples.append(examples)
            crops.reasons.append(reason)
            crops.captions.append(captions)
        return crops


def load_crops(dataset: BucketedDataset, positions: range, size: int) -> Iterator[Crops]:
    """The crops of the images at those positions, in order, in groups of at most `size`, prefetched."""
    assert dataset.config.crops_per_image is not None
    loader = _CropLoader(dataset.loader, dataset.config.crops_per_image)
    yield from prefetched(grain.MapDataset.source(groups(dataset, positions, size)).map(loader), dataset.config)
