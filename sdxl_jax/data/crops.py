"""All crops of all images, once each, in the order of a cache: what `sdxl-jax data encode` encodes.

The order is that of `Order.numbers`, bucket by bucket, so that what is encoded together has one size.

Not here: encoding, and the cache's files.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.loader import Loader
from sdxl_jax.data.pipeline import BucketedDataset, ahead
from sdxl_jax.data.transforms import Example
from sdxl_jax.errors import InputError


class Group(NamedTuple):
    """Images that follow each other in one bucket, by their places in `Order.numbers`."""

    bucket: int
    positions: range


class Crops(NamedTuple):
    """What is to be encoded of a group."""

    bucket: Bucket
    examples: list[list[Example]]
    """For each image, its crops; none where it is damaged."""
    reasons: list[str]
    """For each image, why it cannot be used; empty where it can."""
    captions: list[tuple[str, ...]]
    """For each image, all that it has; none where it is damaged."""

    def pixels(self, crop: int) -> UInt8[np.ndarray, "images height width 3"]:
        """That crop of each image; black for a damaged one."""
        black = np.zeros((*self.bucket, 3), np.uint8)
        return np.stack([examples[crop].image if examples else black for examples in self.examples])


def groups(dataset: BucketedDataset, positions: range, size: int) -> list[Group]:
    """The images at those places, cut into groups of at most `size`."""
    found = []
    for bucket in range(len(dataset.buckets)):
        run = dataset.order.run(bucket)
        first, last = max(run.start, positions.start), min(run.stop, positions.stop)
        found += [Group(bucket, range(start, min(start + size, last))) for start in range(first, last, size)]
    return found


@dataclasses.dataclass(frozen=True)
class _CropLoader:
    """Decodes a group. Sent to worker processes."""

    load: Loader
    crops: int

    def __call__(self, group: Group) -> Crops:
        bucket = self.load.buckets[group.bucket]
        crops = Crops(bucket, [], [], [])
        for image in self.load.order.numbers[group.positions.start : group.positions.stop].tolist():
            try:
                examples, reason = self.load.fixed(image, range(self.crops), bucket), ""
                captions = self.load.source.captions(image)
            except InputError as problem:
                examples, reason, captions = [], str(problem), ()
            crops.examples.append(examples)
            crops.reasons.append(reason)
            crops.captions.append(captions)
        return crops


def load(dataset: BucketedDataset, positions: range, size: int) -> Iterator[Crops]:
    """The crops at those places, in order, decoded ahead."""
    assert dataset.config.crops_per_image is not None
    loader = _CropLoader(dataset.loader, dataset.config.crops_per_image)
    yield from ahead(grain.MapDataset.source(groups(dataset, positions, size)).map(loader), dataset.config)
