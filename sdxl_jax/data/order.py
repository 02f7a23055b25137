"""Which images make up which step: the order of training, a pure function of the step.

One epoch: the places of each bucket are shuffled and cut into batches, then all batches are shuffled. The next epoch
shuffles anew. An image of weight 1 has one place in its bucket, of weight 2 two; of weight 0.3, three in ten images
have one in each epoch, other ones each time, until all had theirs. A bucket smaller than one batch has its images
repeated to fill it; what is left over when a larger one is cut into batches waits, other images each epoch.

A large shuffle is Grain's, which gives any element of any epoch without making the rest; a small one is numpy's. So
a step far from the start costs what the first one costs, and memory is that of the image numbers: 4 bytes each.

Not here: which bucket an image belongs to (grouping), reading images.
"""

import bisect
import functools
import itertools
import math
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32


class SharedArray:
    """An array that worker processes map from a file, where else each would be sent a copy. The first pickle writes the
    file; it goes with this object, which must outlive the start of the workers."""

    def __init__(self, values: np.ndarray, path: str | None = None):
        self.values = values
        self._path = path
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:  # Grain pickles for several workers at a time: none may be told of a file that is half written
            if self._path is None:
                # Where the system lets it, without a name: nothing of it stays, however this process ends.
                nameless = os.path.isdir("/proc/self/fd")
                file = tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile()  # noqa: SIM115
                weakref.finalize(self, file.close)
                np.save(file, self.values)
                file.flush()
                self._path = f"/proc/{os.getpid()}/fd/{file.fileno()}" if nameless else file.name
        return _map, (self._path,)


def _map(path: str) -> SharedArray:
    return SharedArray(np.load(path, mmap_mode="r"), path)


@functools.lru_cache(maxsize=256)
def _permutation(count: int, *seed: int) -> Int32[np.ndarray, " count"]:
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


class _Shuffled:
    """Element i is element i % count of the shuffle of epoch i // count."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        self._large = grain.MapDataset.range(count).seed(seed).shuffle().repeat() if count > _LARGE else None

    def __getitem__(self, index: int) -> int:
        if self._large is None:
            epoch, place = divmod(index, self._count)
            return int(_permutation(self._count, self._seed, epoch)[place])
        element = self._large[index]
        assert element is not None  # Grain's type allows for filters; there are none
        return element


_LARGE = 1 << 14
"""Elements from which on Grain shuffles, which takes 4 µs an element; of 16 elements it takes 1 ms each."""


class _Bucket:
    """The images of one bucket, by source, and their places in an epoch."""

    def __init__(self, members: Sequence[tuple[int, int, float]], batch_size: int, seed: int):
        """members: (where its numbers begin, how many, weight) of each source that has any."""
        self._members = members
        # For each source: places that every image has, then places for a part of the images.
        self._whole = [math.floor(weight) * count for _, count, weight in members]
        # Of the decimal number: 2.2 − 2 is a bit more than 0.2, and 5 times that would be rounded up to 2.
        self._part = [math.ceil(Fraction(str(weight)) % 1 * count) for _, count, weight in members]
        self.lengths = [whole + part for whole, part in zip(self._whole, self._part, strict=True)]
        """Places of each of the members."""
        self._ends = list(itertools.accumulate(self.lengths))
        self._turns = [_Shuffled(count, seed) for _, count, _ in members]
        self.images = sum(count for _, count, _ in members)
        self.places = sum(self.lengths)
        """In an epoch, before they are repeated to fill one batch."""
        self.batch_size = batch_size
        filled = max(self.places, batch_size) if self.places else 0
        self.batches, self.remainder = divmod(filled, batch_size)
        self.repeated = filled - self.places
        self._filled = filled
        self._places = _Shuffled(filled, seed) if filled else None

    def place(self, epoch: int, batch: int, row: int) -> int:
        """The place that a row of a batch takes in that epoch."""
        assert self._places is not None
        return self._places[epoch * self._filled + batch * self.batch_size + row]

    def at(self, epoch: int, place: int) -> int:
        """Where the number of the image stands that has that place; places go round."""
        place %= self.places
        source = bisect.bisect_right(self._ends, place)
        first, count, _ = self._members[source]
        turn = place - (self._ends[source - 1] if source else 0)
        whole, part = self._whole[source], self._part[source]
        if turn < whole:
            return first + turn % count
        return first + self._turns[source][epoch * part + turn - whole]


class Order:
    """The endless sequence of global batches.

    Args:
        members: for each bucket, for each source, the numbers of its images.
        weights: one a source, above 0.
        batch_sizes: images a step of each bucket.
        seed: 0 to 2³² − 1.
    """

    def __init__(
        self,
        members: Sequence[Sequence[Int32[np.ndarray, " _"]]],
        weights: Sequence[float],
        batch_sizes: Sequence[int],
        seed: int,
    ):
        flat = [numbers for bucket in members for numbers in bucket]
        self._numbers = SharedArray(np.concatenate(flat).astype(np.int32, copy=False))
        first = 0
        self.buckets: list[_Bucket] = []
        self.source_images, self.source_places = [0] * len(weights), [0] * len(weights)
        """Of each source: images, and their places in an epoch, before buckets are cut into batches."""
        for bucket, batch_size in zip(members, batch_sizes, strict=True):
            of_sources = {}
            for source, (numbers, weight) in enumerate(zip(bucket, weights, strict=True)):
                if len(numbers):
                    of_sources[source] = (first, len(numbers), weight)
                first += len(numbers)
            self.buckets.append(_Bucket(list(of_sources.values()), batch_size, seed))
            for source, places in zip(of_sources, self.buckets[-1].lengths, strict=True):
                self.source_images[source] += len(bucket[source])
                self.source_places[source] += places
        self._ends = list(itertools.accumulate(bucket.batches for bucket in self.buckets))
        self.epoch_steps = self._ends[-1]
        """Steps an epoch."""
        self._batches = _Shuffled(self.epoch_steps, seed)

    def _batch(self, step: int) -> tuple[int, int, int]:
        """(epoch, number of the bucket, which of its batches) of a step."""
        batch = self._batches[step]
        bucket = bisect.bisect_right(self._ends, batch)
        return step // self.epoch_steps, bucket, batch - (self._ends[bucket - 1] if bucket else 0)

    def bucket(self, step: int) -> int:
        """The number of the bucket of one step."""
        return self._batch(step)[1]

    def position(self, step: int, row: int, *, instead: int = 0) -> int:
        """Where in `numbers` the image of one row of a global batch stands.

        instead: 1 for the image that takes its place where it is bad, 2 for the next one: those whose places follow in
        the bucket.
        """
        epoch, number, batch = self._batch(step)
        bucket = self.buckets[number]
        return bucket.at(epoch, bucket.place(epoch, batch, row) + instead)

    @property
    def numbers(self) -> Int32[np.ndarray, " _"]:
        """The images in use, bucket by bucket, in each source by source."""
        return self._numbers.values

    def run(self, bucket: int) -> range:
        """Where in `numbers` the images of one bucket stand."""
        first = sum(other.images for other in self.buckets[:bucket])
        return range(first, first + self.buckets[bucket].images)


LAST_STEP = sys.maxsize - 1
"""Of the endless sequence."""
