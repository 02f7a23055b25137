"""Training batches of captioned pictures, of a folder or a shard set, in an order that is a pure function of the step.

One epoch: each bucket's images are shuffled and cut into batches, then all batches are shuffled. The next epoch
shuffles anew. The order is laid out in global batches of image numbers (Grain, random access); only then does a host
take its rows and decode them. So

- hosts agree on every step's bucket, and together they read what one host would;
- **the position is the step**: `iterate(step)` gives what an uninterrupted run would have had from there on, with any
  number of workers or hosts, and there is no iterator state to save;
- crop and flip draw from a generator seeded with (seed, step, row of the global batch).

Every batched image comes once an epoch. What is left over when a bucket is cut into batches waits, other images each
epoch; a bucket smaller than one batch is repeated to fill it. `report` counts both.

Not here: tokenizers (passed in), placing arrays on devices, normalisation, caption dropout.
"""

import dataclasses
import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, Int32, UInt8

from sdxl_jax.arrays import Batch, MicroConditioning
from sdxl_jax.data.buckets import SDXL_BUCKETS, Bucket, aspect_distance, assign, check_buckets
from sdxl_jax.data.shards import DESCRIPTION, UNFINISHED, ShardSet, open_shards
from sdxl_jax.data.sources import (
    OnRefused,
    Pictures,
    Refused,
    decode,
    open_folder,
    stop_if_refused,
    summary,
    why_unreadable,
)
from sdxl_jax.data.transforms import CropMode, Example, cover_crop
from sdxl_jax.errors import InputError

Tokenize = Callable[[list[str]], dict[str, Int32[np.ndarray, "batch 77"]]]
"""Captions to token numbers, one entry a tokenizer. It is sent to worker processes, so it must pickle."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and in which shapes and order."""

    folder: str
    """Folder of images, with metadata.jsonl or a .txt beside each image; or a shard set of `sdxl-jax data build`."""
    buckets: tuple[tuple[int, int], ...] = SDXL_BUCKETS
    """Sizes (height, width) that batches come in. More: less is cropped away, more is compiled and left over."""
    max_aspect_distance: float = math.log(2)
    """Images whose |ln aspect| is farther than this from the nearest bucket are refused: at ln 2 the crop would take
    half of them. Higher: stranger shapes are trained on, cropped harder."""
    batch_size: int = 8
    """Images a step, over all hosts. Higher: fewer, steadier, costlier steps, more left over in each bucket."""
    crop: CropMode = "random"
    """Where the crop lies along the axis that the resize leaves too long."""
    flip_probability: float = 0.0
    """Share of images mirrored left to right, 0 to 1. Higher: more variety, wrong letters, left and right mixed up."""
    on_refused: OnRefused = "error"
    """Files that cannot be used: stop and name them, or skip them (counted and listed)."""
    verify_images: bool = True
    """Decode every image before the work starts, so that damaged ones are refused and not met during training. Costs a
    pass over all images: turn it off for a large folder that is known to be good."""
    seed: int = 0
    """Order, crops and flips follow from it, 0 to 2³² − 1."""
    workers: int = 0
    """Processes that decode; 0 decodes in threads of this one. Higher: more images a second until the cores are busy,
    more memory."""
    read_ahead: int = 4
    """Batches decoded ahead, one thread each, in each process. Higher: more images a second, more memory."""


class BucketReport(NamedTuple):
    """What one epoch takes from one bucket."""

    height: int
    width: int
    images: int
    batches: int
    """An epoch."""
    remainder: int
    """Images left out of each epoch, other ones each time."""
    repeated: int
    """Places in the one batch of a small bucket that hold an image a second time or more."""


@dataclasses.dataclass(frozen=True)
class _Shards:
    """A shard set as `Pictures`."""

    shards: ShardSet

    @property
    def folder(self) -> Path:
        return self.shards.path

    @property
    def found(self) -> int:
        return len(self.shards) + self.shards.refused_count

    @property
    def sizes(self) -> Int32[np.ndarray, "images 2"]:
        return self.shards.sizes

    @property
    def refused(self) -> list[Refused]:
        return []

    def refused_before(self) -> list[Refused]:
        return list(self.shards.refused())

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    def name(self, image: int) -> str:
        return self.shards.name(image)

    def captions_of(self, image: int) -> tuple[str, ...]:
        return self.shards.captions(image)

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        data = self.shards.read(image)
        try:
            return decode(data)
        except Exception as problem:  # decoders raise many types on damaged files; each means the same here
            raise InputError(
                f"The image {self.name(image)} in {self.folder} {why_unreadable(problem)}. Build the shard set anew"
            ) from problem


def open_pictures(folder: str | Path, verify: bool = False) -> Pictures:
    """A folder of images, or a shard set: whichever is there. Refused files are left out and listed.

    verify: decode every image of a folder now; those of a shard set were, when it was built.

    Raises InputError as `open_folder` and `open_shards`.
    """
    if any((Path(folder) / name).exists() for name in (DESCRIPTION, UNFINISHED)):
        return _Shards(open_shards(folder))
    return open_folder(folder, on_refused="skip", verify=verify)


class Drawn(NamedTuple):
    """One example, with where it is from."""

    image: int
    """Its number."""
    caption: str
    """The one of its captions that is told this time."""
    example: Example


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Decodes one host's rows of a global batch. Sent to worker processes."""

    source: Pictures
    buckets: tuple[Bucket, ...]
    config: DataConfig
    tokenize: Tokenize
    rows: range

    def draw(self, step: int, row: int, image: int, bucket: Bucket) -> Drawn:
        """The example of one row of a step: crop, flip and caption follow from the seed, the step and the row."""
        example = cover_crop(
            self.source.pixels(image),
            bucket,
            rng=np.random.default_rng((self.config.seed, step, row)),
            crop=self.config.crop,
            flip_probability=self.config.flip_probability,
        )
        captions = self.source.captions_of(image)
        choice = np.random.default_rng((self.config.seed, step, row, 1)).integers(len(captions))
        return Drawn(image, captions[choice], example)

    def batch(self, step: int, images: list[int], rows: range) -> Iterator[Drawn]:
        """The examples of some rows of a global batch, which are all of one bucket."""
        (number,) = assign(self.source.sizes[images[:1]], self.buckets)
        for row, image in zip(rows, images, strict=True):
            yield self.draw(step, row, image, self.buckets[number])

    def __call__(self, step: int, images: Int[np.ndarray, " global_batch"]) -> Batch:
        mine = images[self.rows.start : self.rows.stop].tolist()
        drawn = list(self.batch(step, mine, self.rows))
        examples = [one.example for one in drawn]
        return Batch(
            image=np.stack([example.image for example in examples]),
            tokens=dict(self.tokenize([one.caption for one in drawn])),
            micro=MicroConditioning(
                original_size=np.stack([example.original_size for example in examples]),
                crop_top_left=np.stack([example.crop_top_left for example in examples]),
                target_size=np.stack([example.target_size for example in examples]),
            ),
            example=np.array(mine, np.int32),
        )


class _Numbers:
    """Numbers of images as a source for Grain, which would hold a list of Python integers."""

    def __init__(self, images: Int32[np.ndarray, " images"], length: int):
        self._images, self._length = images, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        """Beyond the last image it begins again."""
        return int(self._images[index % len(self._images)])


_CHUNK = 1 << 20
"""Images whose buckets are found at a time: fifty million at once would take gigabytes."""


def _check(config: DataConfig, host_index: int, host_count: int) -> None:
    if config.batch_size < 1 or config.batch_size % host_count:
        raise InputError(
            f"data.batch_size={config.batch_size} cannot be split over {host_count} hosts. Use a multiple of "
            f"{host_count}, e.g. {max(1, math.ceil(config.batch_size / host_count)) * host_count}."
        )
    if not 0 <= host_index < host_count:
        raise InputError(f"host_index={host_index} of {host_count} hosts. Expected 0 to {host_count - 1}.")
    ranges: list[tuple[str, float, float]] = [
        ("flip_probability", 0, 1),
        ("max_aspect_distance", 0, math.inf),
        ("seed", 0, 2**32 - 1),
        ("workers", 0, math.inf),
        ("read_ahead", 1, math.inf),
    ]
    for name, low, high in ranges:
        if not low <= (value := getattr(config, name)) <= high:
            raise InputError(f"data.{name}={value} is out of range. Expected {low} to {high}.")


def _draw(source: list[grain.DatasetIterator]) -> Generator[Batch, None, None]:
    try:
        while source:
            yield next(source[0])
    finally:
        source.clear()


class BucketedDataset:
    """Batches of one folder or shard set for one host, and what an epoch of them takes.

    Opening a folder reads every image's header (sources.open_folder). All hosts must see the same files.

    Args:
        config: what to read; `config.batch_size` counts all hosts.
        tokenize: captions to token numbers; picklable where `config.workers` is not 0.
        host_index, host_count: this host takes rows host_index · n to (host_index + 1) · n of each global batch, with
            n = batch_size / host_count.

    Raises InputError: a setting out of range, a batch that does not split over the hosts, a bad folder, files refused
    while `config.on_refused` is "error", buckets that no image fits.
    """

    def __init__(self, config: DataConfig, tokenize: Tokenize, *, host_index: int = 0, host_count: int = 1):
        _check(config, host_index, host_count)
        self.config = config
        self.buckets = check_buckets(config.buckets)
        # Refusals are settled below, so that one message names those of the folder and those of the buckets.
        self.source = open_pictures(config.folder, config.verify_images)
        targets = np.array(self.buckets, np.int32)
        images: list[list[np.ndarray]] = [[] for _ in self.buckets]
        self.refused, closest = list(self.source.refused), math.inf
        for first in range(0, len(self.source.sizes), _CHUNK):
            sizes = self.source.sizes[first : first + _CHUNK]
            nearest = assign(sizes, self.buckets)
            distance = aspect_distance(sizes, targets[nearest])
            fits, closest = distance <= config.max_aspect_distance, min(closest, distance.min())
            misfits = np.flatnonzero(~fits).tolist()
            self.refused += [self._misfit(first + image, self.buckets[nearest[image]]) for image in misfits]
            for number, found in enumerate(images):
                found.append((first + np.flatnonzero(fits & (nearest == number))).astype(np.int32))
        self._images = [np.concatenate(found) for found in images]
        if not any(map(len, self._images)):
            raise InputError(
                f"None of the {len(self.source.sizes)} images in {config.folder} fits a bucket of data.buckets:\n"
                f"{summary(self.refused)}\nAdd buckets of such shapes, or raise data.max_aspect_distance "
                f"(now {config.max_aspect_distance:.3g}; the nearest image is at {closest:.3g})."
            )
        stop_if_refused(self.source.folder, self.refused, config.on_refused)

        self._batches, self._bucket_numbers = self._lay_out()
        self.epoch_steps = sum(bucket.batches for bucket in self.report())
        """Steps an epoch."""
        share = config.batch_size // host_count
        rows = range(host_index * share, (host_index + 1) * share)
        self._load = _Loader(self.source, self.buckets, config, tokenize, rows)

    def _misfit(self, image: int, nearest: Bucket) -> Refused:
        height, width = self.source.sizes[image]
        return Refused(
            self.source.name(image),
            f"{height}×{width} (height × width) fits no bucket: the crop to the nearest, "
            f"{nearest.height}×{nearest.width}, would take more than data.max_aspect_distance allows",
        )

    def _lay_out(self) -> tuple[grain.MapDataset, grain.MapDataset]:
        """The endless sequence of global batches of image numbers, and that of their buckets' numbers."""
        size, seed = self.config.batch_size, self.config.seed
        batches, buckets = [], []
        for number, images in enumerate(self._images):
            if len(images):
                filled = _Numbers(images, max(size, len(images)))  # repeats what a small bucket has
                batches.append(grain.MapDataset.source(filled).seed(seed).shuffle().batch(size, drop_remainder=True))
                buckets += [number] * len(batches[-1])
        # The second, of equal length and seed, is shuffled alike: a bucket is known without touching its image numbers.
        return (
            grain.MapDataset.concatenate(batches).seed(seed).shuffle().repeat(),
            grain.MapDataset.source(buckets).seed(seed).shuffle().repeat(),
        )

    def report(self) -> list[BucketReport]:
        """What an epoch takes from each bucket, in the order of the buckets, empty ones included."""
        size, reports = self.config.batch_size, []
        for bucket, images in zip(self.buckets, map(len, self._images), strict=True):
            repeated = size - images if 0 < images < size else 0
            batches, remainder = divmod(images + repeated, size)
            reports.append(BucketReport(*bucket, images, batches, remainder, repeated))
        return reports

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained on, and in which buckets; not of the pixels."""
        numbers = hashlib.sha256(self.source.fingerprint.encode())
        for images in self._images:
            numbers.update(len(images).to_bytes(8, "little") + images.tobytes())
        return numbers.hexdigest()

    def bucket_of(self, step: int) -> Bucket:
        """The bucket of one step, without reading an image: which compiled step it needs."""
        number = self._bucket_numbers[step]
        assert number is not None  # Grain's type allows for filters; there are none
        return self.buckets[number]

    def examples(self, start_step: int = 0) -> Iterator[Drawn]:
        """All hosts' examples one by one, in training order. Without end; decodes lazily."""
        for step in itertools.count(start_step):
            images = self._batches[step]
            assert images is not None  # as in bucket_of
            yield from self._load.batch(step, images.tolist(), range(len(images)))

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """This host's batches from `start_step` on, without end, decoded ahead.

        `close()` of what is returned ends the threads or processes; so does letting go of it.

        Raises InputError, at the batch that holds it, for an image that turns out to be damaged.
        """
        ahead = grain.ReadOptions(num_threads=self.config.read_ahead, prefetch_buffer_size=self.config.read_ahead)
        batches = self._batches.map_with_index(self._load)[start_step:].to_iter_dataset(ahead)
        if self.config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only absl's own programs parse
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.config.workers))
        source = [iter(batches)]
        generator = _draw(source)
        # Grain's workers must end before the interpreter does, or they fail noisily and leak shared memory.
        weakref.finalize(generator, source.clear)
        return generator
