"""Assigns all images to buckets, and filters them by size, aspect ratio and score, from the index alone.

Left out are images with a shorter side below the minimum, those whose aspect ratio is too far from every bucket's, and,
where the model is conditioned on a score or a class, those without one. Each is counted, and can be listed.

Not here: their order (order), reading them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from sdxl_jax.data.buckets import Bucket, assign
from sdxl_jax.data.mixture import Mixture
from sdxl_jax.data.order import places
from sdxl_jax.data.sources import ImageSource, Refused
from sdxl_jax.errors import InputError, nearest_first

_THREADS = 8
_CHUNK = 1 << 20
"""Images per chunk: fifty million at once would take gigabytes."""


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The images of each bucket and those that are left out, by their numbers in the mixture."""

    members: list[list[Int32[np.ndarray, " _"]]]
    """For each bucket, for each source, its images."""
    misfits: Int32[np.ndarray, " _"]
    """Images too far from the aspect ratio of every bucket."""
    nearest: Int32[np.ndarray, " _"]
    """The nearest bucket of each of the misfits."""
    unrated: Int32[np.ndarray, " _"]
    """Images without the score that is required."""
    unlabelled: Int32[np.ndarray, " _"]
    """Images without the class that is required."""
    too_small: Int32[np.ndarray, " _"]
    """Images with a shorter side below the minimum."""
    closest: float
    """Smallest distance of any image to a bucket; infinite where there is no image."""

    def counts(self) -> list[int]:
        """Number of images in each bucket."""
        return [sum(map(len, bucket)) for bucket in self.members]


class _Chunk(NamedTuple):
    """The grouping of some consecutive images of one source."""

    members: list[Int32[np.ndarray, " _"]]
    """By bucket."""
    left_out: dict[str, Int32[np.ndarray, " _"]]
    """By field of Grouping."""
    closest: float


def _check_fields(mixture: Mixture, fields: Mapping[str, str | None]) -> None:
    """Raises InputError where a source lacks a numeric field. fields: by the option that names them."""
    for source, (option, name) in itertools.product(mixture.sources, fields.items()):
        if name is not None and name not in source.numbers:
            names = ", ".join(nearest_first(name, source.numbers))
            known = f"Give one that it has, nearest first: {names}" if names else "It has none. Use another source"
            raise InputError(f"{option}={name}: {source.path} has no numeric field of that name. {known}")


_MOST_CLASSES = 1 << 24
"""Numbers below it are exact in float32."""


def _is_class(values: Float32[np.ndarray, " images"]) -> Bool[np.ndarray, " images"]:
    """Whether each value is the number of a class: whole, from 0."""
    return (values >= 0) & (values < _MOST_CLASSES) & (values == np.floor(values))


def group(
    mixture: Mixture,
    buckets: Sequence[Bucket],
    *,
    max_aspect_distance: float = math.inf,
    min_size: int = 1,
    score: str | None = None,
    label: str | None = None,
) -> Grouping:
    """Assigns every image to the bucket of the nearest aspect ratio, or to those that are left out.

    max_aspect_distance: largest |ln(h/w) − ln(H/W)|. min_size: pixels of the shorter side. score, label: names of
    numeric fields that every image must have; a label is a whole number from 0.

    Raises InputError where a source has no numeric field of that name.
    """

    def group_chunk(chunk: tuple[ImageSource, int, int]) -> _Chunk:
        source, start, first = chunk
        sizes = source.sizes[first : first + _CHUNK]
        numbers = np.arange(start + first, start + first + len(sizes), dtype=np.int32)
        left_out = {}
        if min_size > 1:
            large = np.minimum(sizes[:, 0], sizes[:, 1]) >= min_size
            left_out["too_small"], sizes, numbers = numbers[~large], sizes[large], numbers[large]
        for name, field, usable in (("unrated", score, np.isfinite), ("unlabelled", label, _is_class)):
            if field is not None:
                has = usable(source.numbers[field][numbers - start])
                left_out[name], sizes, numbers = numbers[~has], sizes[has], numbers[has]
        nearest, distance = assign(sizes, buckets)
        closest = float(distance.min(initial=math.inf))
        fits = distance <= max_aspect_distance
        if not fits.all():
            left_out |= {"misfits": numbers[~fits], "nearest": nearest[~fits]}
            numbers, nearest = numbers[fits], nearest[fits]
        # uint16 is sorted by counting, which is faster.
        by_bucket = np.argsort(nearest.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(nearest, minlength=len(buckets)))[:-1]
        return _Chunk(np.split(numbers[by_bucket], ends), left_out, closest)

    _check_fields(mixture, {"data.aesthetic": score, "data.label": label})
    of_sources = []
    with ThreadPool(_THREADS) as pool:  # numpy releases the interpreter's lock
        for source, start in zip(mixture.sources, mixture.starts, strict=False):
            of_sources.append(
                pool.map(group_chunk, [(source, start, at) for at in range(0, len(source.sizes), _CHUNK)])
            )
    empty = np.zeros(0, np.int32)
    chunks = [chunk for of_source in of_sources for chunk in of_source]
    return Grouping(
        members=[
            [np.concatenate([empty, *(chunk.members[number] for chunk in of_source)]) for of_source in of_sources]
            for number in range(len(buckets))
        ],
        **{
            name: np.concatenate([empty, *(chunk.left_out.get(name, empty) for chunk in chunks)])
            for name in ("misfits", "nearest", "unrated", "unlabelled", "too_small")
        },
        closest=min((chunk.closest for chunk in chunks), default=math.inf),
    )


def merge_small(
    grouping: Grouping, buckets: Sequence[Bucket], batch_sizes: Sequence[int], weights: Sequence[float]
) -> tuple[Grouping, dict[int, int]]:
    """Moves the images of each bucket with fewer places per epoch than a batch to the bucket of the nearest aspect
    ratio that has images, smallest bucket first, until every bucket fills a batch or only one is left.

    Returns the new grouping, and for each emptied bucket the one that its images were moved to.
    """
    members, moved = [list(bucket) for bucket in grouping.members], dict[int, int]()
    while True:
        counts = {number: sum(map(places, map(len, bucket), weights)) for number, bucket in enumerate(members)}
        filled = [number for number, count in counts.items() if count]
        small = [number for number in filled if counts[number] < batch_sizes[number]]
        if not small or len(filled) < 2:
            break
        least = min(small, key=counts.__getitem__)
        others = [number for number in filled if number != least]
        (into,) = assign(np.array([buckets[least]], np.int32), [buckets[number] for number in others]).bucket.tolist()
        into = others[into]
        pairs = zip(members[into], members[least], strict=True)
        members[into] = [np.sort(np.concatenate(pair)) for pair in pairs]
        members[least] = [numbers[:0] for numbers in members[least]]
        moved = {start: into if end == least else end for start, end in moved.items()} | {least: into}
    return dataclasses.replace(grouping, members=members), moved


def refusals(
    grouping: Grouping, mixture: Mixture, buckets: Sequence[Bucket], score: str | None, label: str | None
) -> Iterator[Refused]:
    """The misfits, the unrated and the unlabelled images, with the reasons."""
    for image, nearest in zip(grouping.misfits.tolist(), grouping.nearest.tolist(), strict=True):
        height, width = mixture.size(image)
        bucket = buckets[nearest]
        yield Refused(
            mixture.name(image),
            f"{height}×{width} (height × width) fits no bucket: the crop to the nearest, "
            f"{bucket.height}×{bucket.width}, would take more than data.max_aspect_distance allows",
        )
    for image in grouping.unrated.tolist():
        yield Refused(mixture.name(image), f"has no {score}, which data.aesthetic requires")
    for image in grouping.unlabelled.tolist():
        value = mixture.number(image, label or "")
        given = f"has no {label}" if math.isnan(value) else f"has {label}={value:g}"
        yield Refused(mixture.name(image), f"{given}; data.label requires the number of a class, 0, 1, …")


def too_small(grouping: Grouping, mixture: Mixture, min_size: int) -> Iterator[Refused]:
    """The images below the minimum size, with the reasons."""
    for image in grouping.too_small.tolist():
        height, width = mixture.size(image)
        yield Refused(mixture.name(image), f"{height}×{width} (height × width), below data.min_size={min_size}")
