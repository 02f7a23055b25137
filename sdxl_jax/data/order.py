"""The order of training: which images each batch holds, a pure function of the step.

In one epoch, the places of each bucket are shuffled and cut into batches, then all batches are shuffled. The next epoch
is shuffled differently. An image of weight 1 has one place in its bucket, of weight 2 two; of weight 0.3, three in ten
images have one in each epoch, different ones each time, until all had theirs. Places that are left over when a bucket
is cut into batches are dropped for that epoch, different ones each time. A bucket with fewer places than a batch
collects those of several epochs until they fill one, so that its images are seen no more often than others: with 3
images and batches of 8, its batches are in the epochs 3, 6, 8, 11, … and epochs differ in length by the batches of such
buckets.

Large permutations are Grain's, which computes any element of any epoch without the others; small ones are numpy's. So
random access to a step far from the start costs the same as the first one, and memory is 4 bytes per image number.

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
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Shaped


class SharedArray:
    """An array that worker processes map from a temporary file, so that none receives a copy. The first pickle writes
    the file; it is removed with this object, which must outlive the start of the workers."""

    def __init__(self, values: Shaped[np.ndarray, "..."], path: str | None = None):
        self.values = values
        self._path = path
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Grain pickles for several workers at a time: none may receive the path of a half-written file.
        with self._lock:
            if self._path is None:
                # Unnamed where the system allows it: it disappears however this process ends.
                unnamed = os.path.isdir("/proc/self/fd")
                file = tempfile.TemporaryFile() if unnamed else tempfile.NamedTemporaryFile()  # noqa: SIM115
                weakref.finalize(self, file.close)
                np.save(file, self.values)
                file.flush()
                self._path = f"/proc/{os.getpid()}/fd/{file.fileno()}" if unnamed else file.name
        return _map, (self._path,)


def _map(path: str) -> SharedArray:
    return SharedArray(np.load(path, mmap_mode="r"), path)


BATCHES, PLACES, TURNS, CROP, FIXED_CROP, CHOICE_OF_CROP, CHOICE_OF_CAPTION = range(1, 8)
"""Purposes of random numbers: the second number of every seed, after the user's, so that no two share a stream."""


@functools.lru_cache(maxsize=256)
def _permutation(count: int, *seed: int) -> Int32[np.ndarray, " count"]:
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


class _Shuffled:
    """An endless sequence: element i is element i % count of the permutation of epoch i // count."""

    def __init__(self, count: int, *seed: int):
        self._count, self._seed, self._large = count, seed, None
        if count > _LARGE:
            mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
            self._large = grain.MapDataset.range(count).seed(mixed).shuffle().repeat()

    def __getitem__(self, index: int) -> int:
        if self._large is None:
            epoch, place = divmod(index, self._count)
            return int(_permutation(self._count, *self._seed, epoch)[place])
        element = self._large[index]
        assert element is not None  # Grain's type allows for filters; there are none
        return element


_LARGE = 1 << 14
"""Number of elements above which Grain shuffles, at 4 µs per element; with 16 elements it would take 1 ms for each."""


def places(images: int, weight: float) -> int:
    """Places per epoch for that many images of one source and bucket; a fraction of a place is rounded up."""
    # From the decimal number: 2.2 − 2 is slightly more than 0.2, and 5 times that would be rounded up to 2.
    return math.ceil(Fraction(str(weight)) * images)


class _BucketOrder:
    """The order of one bucket: its images, by source, and their places in an epoch."""

    def __init__(self, members: Sequence[tuple[int, int, float]], batch_size: int, seed: int, number: int):
        """members: (position of its first image, images, weight) of each source that has any. number: the bucket's."""
        self._members = members
        # For each source: first the places that every image has, then places that the images take in turns.
        self._whole = [math.floor(weight) * count for _, count, weight in members]
        self.lengths = [places(count, weight) for _, count, weight in members]
        """Places per epoch of each member."""
        self._ends = list(itertools.accumulate(self.lengths))
        self._turns = [_Shuffled(count, seed, TURNS, number, n) for n, (_, count, _) in enumerate(members)]
        self.images = sum(count for _, count, _ in members)
        self.places = sum(self.lengths)
        """Places per epoch."""
        self.batch_size = batch_size
        self.small = self.places < batch_size
        """Whether a batch holds the places of several epochs."""
        self.batches = Fraction(self.places, batch_size) if self.small else Fraction(self.places // batch_size)
        """Batches per epoch, on average."""
        self.remainder = 0 if self.small else self.places % batch_size
        """Places that are left out of each epoch."""
        self._places = _Shuffled(self.places, seed, PLACES, number) if self.places else None

    def batches_before(self, epoch: int) -> int:
        """Number of its batches in all epochs before that one."""
        return epoch * self.places // self.batch_size if self.small else epoch * (self.places // self.batch_size)

    def position(self, epoch: int, batch: int, row: int, instead: int) -> int:
        """The position, in `Order.numbers`, of the image for one row of one of the epoch's batches; with `instead`, of
        the image that many places later."""
        assert self._places is not None
        if self.small:  # the places of all epochs, one after the other
            index = (self.batches_before(epoch) + batch) * self.batch_size + row
            epoch = index // self.places
        else:
            index = epoch * self.places + batch * self.batch_size + row
        return self._at(epoch, (self._places[index] + instead) % self.places)

    def _at(self, epoch: int, place: int) -> int:
        source = bisect.bisect_right(self._ends, place)
        first, count, _ = self._members[source]
        turn = place - (self._ends[source - 1] if source else 0)
        whole = self._whole[source]
        if turn < whole:
            return first + turn % count
        return first + self._turns[source][epoch * (self.lengths[source] - whole) + turn - whole]


_CACHED_STEPS = 64
"""Steps that are remembered, more than are prefetched at a time."""


class _Step(NamedTuple):
    epoch: int
    bucket: int
    batch: int
    """Number among the bucket's batches of that epoch."""


class Order:
    """The endless sequence of global batches.

    Args:
        members: for each bucket, for each source, the numbers of its images.
        weights: one per source, above 0.
        batch_sizes: images per step of each bucket.
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
        self._seed = seed
        first = 0
        self.buckets: list[_BucketOrder] = []
        self.source_images, self.source_places = [0] * len(weights), [0] * len(weights)
        """For each source, its images and their places per epoch, before buckets are cut into batches."""
        for number, (bucket, batch_size) in enumerate(zip(members, batch_sizes, strict=True)):
            of_sources = {}
            for source, (numbers, weight) in enumerate(zip(bucket, weights, strict=True)):
                if len(numbers):
                    of_sources[source] = (first, len(numbers), weight)
                first += len(numbers)
            self.buckets.append(_BucketOrder(list(of_sources.values()), batch_size, seed, number))
            for source, length in zip(of_sources, self.buckets[-1].lengths, strict=True):
                self.source_images[source] += len(bucket[source])
                self.source_places[source] += length
        self._batches: dict[int, _Shuffled] = {}
        self._steps: dict[int, _Step] = {}  # the last steps: every row of a batch needs the same one
        self._epoch_steps = sum((bucket.batches for bucket in self.buckets), Fraction())

    @property
    def epoch_steps(self) -> float:
        """Steps per epoch, on average."""
        return float(self._epoch_steps)

    def steps_before(self, epoch: int) -> int:
        """Number of steps in all epochs before that one."""
        return sum(bucket.batches_before(epoch) for bucket in self.buckets)

    def _step(self, step: int) -> _Step:
        if (found := self._steps.get(step)) is None:
            if len(self._steps) >= _CACHED_STEPS:
                self._steps.clear()
            found = self._steps[step] = self._find(step)
        return found

    def _find(self, step: int) -> _Step:
        # Each small bucket may be up to one batch short of its average.
        first, missing = int(step / self._epoch_steps), sum(bucket.small for bucket in self.buckets)
        epochs = range(first, int((step + missing) / self._epoch_steps) + 2)
        epoch = first + bisect.bisect_right(epochs, step, key=self.steps_before) - 1
        counts = [bucket.batches_before(epoch + 1) - bucket.batches_before(epoch) for bucket in self.buckets]
        ends = list(itertools.accumulate(counts))
        if (shuffled := self._batches.get(ends[-1])) is None:  # one permutation for each length of an epoch
            shuffled = self._batches[ends[-1]] = _Shuffled(ends[-1], self._seed, BATCHES, ends[-1])
        batch = shuffled[epoch * ends[-1] + step - self.steps_before(epoch)]
        bucket = bisect.bisect_right(ends, batch)
        return _Step(epoch, bucket, batch - (ends[bucket - 1] if bucket else 0))

    def bucket(self, step: int) -> int:
        """The number of the bucket of one step."""
        return self._step(step).bucket

    def position(self, step: int, row: int, *, instead: int = 0) -> int:
        """The position, in `numbers`, of the image for one row of a global batch.

        instead: 1 for the image that replaces it where it is damaged, 2 for the next one, and so on: those in the next
        places of the bucket.
        """
        epoch, bucket, batch = self._step(step)
        return self.buckets[bucket].position(epoch, batch, row, instead)

    @property
    def numbers(self) -> Int32[np.ndarray, " _"]:
        """Numbers of the images in use, bucket by bucket, and within a bucket source by source."""
        return self._numbers.values

    def run(self, bucket: int) -> range:
        """The positions, in `numbers`, of the images of one bucket."""
        first = sum(other.images for other in self.buckets[:bucket])
        return range(first, first + self.buckets[bucket].images)


LAST_STEP = sys.maxsize - 1
"""The largest step of the endless sequence."""
