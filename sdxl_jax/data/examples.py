"""Examples of a data set, to show and to measure a model with: the same ones at every start, as centred crops."""

import numpy as np
from jaxtyping import Int, UInt8

from sdxl_jax.data.buckets import Bucket, assign
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.transforms import centred_crop


def images_of(dataset: BucketedDataset) -> Int[np.ndarray, " images"]:
    """The numbers of the images that the data set has, in order."""
    return np.unique(dataset.order.numbers)


def evenly_spread(numbers: Int[np.ndarray, " numbers"], count: int) -> Int[np.ndarray, " chosen"]:
    """`count` of the numbers, from the first to the last; all, if there are fewer."""
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)]


def buckets_of(dataset: BucketedDataset, numbers: Int[np.ndarray, " images"]) -> Int[np.ndarray, " images"]:
    """The bucket of each image, as its number in `dataset.buckets`."""
    return assign(dataset.source.sizes[numbers], dataset.buckets).bucket


def sizes_of(dataset: BucketedDataset, numbers: Int[np.ndarray, " images"]) -> list[Bucket]:
    """The bucket of each image."""
    return [dataset.buckets[int(bucket)] for bucket in buckets_of(dataset, numbers)]


def crop_of(dataset: BucketedDataset, image: int | np.integer, size: Bucket) -> UInt8[np.ndarray, "height width 3"]:
    """The centred crop of an image."""
    return centred_crop(dataset.source.pixels(int(image), size), size)
