"""Training batches of captioned pictures, of folders or shard sets, in an order that is a pure function of the step.

The order (order.Order) is laid out in global batches of image numbers; only then does a host take its rows and decode
them. So

- hosts agree on every step's bucket, and together they read what one host would;
- **the position is the step**: `iterate(step)` gives what an uninterrupted run would have had from there on, with any
  number of workers or hosts, and there is no iterator state to save;
- crop and flip draw from a generator seeded with (seed, step, row of the global batch), or, where each image has a
  fixed number of crops, with (seed, image, crop).

An image that turns out to be damaged is replaced by the one that follows it in its bucket's order, named once, and
counted in `Batch.replaced`; more of them than `max_bad_share` stop the run.

Not here: tokenizers (passed in), placing arrays on devices, normalisation, caption dropout.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Float32, Int32
from tqdm import tqdm

from sdxl_jax.arrays import Batch, Encoded, MicroConditioning
from sdxl_jax.data import grouping as groupings
from sdxl_jax.data.buckets import SDXL_BUCKETS, Bucket, check_buckets
from sdxl_jax.data.cache import Cache, Crop, Text
from sdxl_jax.data.mixture import Mixture, Share, Source
from sdxl_jax.data.opening import open_pictures
from sdxl_jax.data.order import LAST_STEP, Order
from sdxl_jax.data.processes import end_with_parent
from sdxl_jax.data.sources import OnRefused, Refused, stop_if_refused, summary
from sdxl_jax.data.transforms import CropMode, Example, cover_crop, cover_size
from sdxl_jax.errors import InputError

Tokenize = Callable[[list[str]], dict[str, Int32[np.ndarray, "batch 77"]]]
"""Captions to token numbers, one entry a tokenizer."""

_T = TypeVar("_T")
_IN_A_ROW = 100
"""Bad images that follow each other in a bucket's order: then it is the source that is bad."""
_FEW = 1000
"""Examples that bad ones are a share of, until as many were read."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and in which shapes and order."""

    folder: str | None = None
    """Folder of images with captions, or a shard set of `sdxl-jax data build`."""
    sources: tuple[Source, ...] = ()
    """Several of them, with weights, in place of `folder`."""
    buckets: tuple[tuple[int, int], ...] = SDXL_BUCKETS
    """Sizes (height, width) that batches come in. More: less is cropped away, more is compiled and left over."""
    max_aspect_distance: float = math.log(2)
    """Images whose |ln aspect| is farther than this from the nearest bucket are refused: at ln 2 the crop would take
    half of them. Higher: stranger shapes are trained on, cropped harder."""
    small_buckets: Literal["repeat", "merge"] = "repeat"
    """What becomes of a bucket with fewer images than a batch: they are repeated to fill one, or go to the bucket of
    the nearest aspect ratio, cropped harder."""
    min_size: int = 1
    """Images whose shorter side has fewer pixels are left out, and counted. Higher: less is trained on, nothing
    blurred by enlarging; the model is told each image's size, so that it need not be high."""
    batch_size: int = 8
    """Images a step, over all hosts. Higher: fewer, steadier, costlier steps, more left over in each bucket."""
    batch_pixels: int | None = None
    """Pixels a step: a bucket's batches have as many images as fit, in multiples of batch_size. None: batch_size."""
    crop: CropMode = "random"
    """Where the crop lies along the axis that the resize leaves too long."""
    crops_per_image: int | None = None
    """How many crops (with their flips) there are of an image, one of which is drawn each time, as from a cache. None:
    a new one each time. Higher: more variety, a larger cache."""
    flip_probability: float = 0.0
    """Share of images mirrored left to right, 0 to 1. Higher: more variety, wrong letters, left and right mixed up."""
    aesthetic: str | None = None
    """Name of the number that is each image's aesthetic score, which the refiner is told. Images without it are
    refused."""
    cache: str | None = None
    """Folder of `sdxl-jax data encode`: latents and text states are read from it, and no image is decoded."""
    cache_of_other_code: bool = False
    """Read a cache that another version of this code has written: after an update that changes nothing of it."""
    on_refused: OnRefused = "error"
    """Files that cannot be used: stop and name them, or skip them (counted and listed)."""
    verify_images: bool = True
    """Decode every image before the work starts, so that damaged ones are refused and not met during training. Costs a
    pass over all images: turn it off for a large folder that is known to be good."""
    max_bad_share: float = 0.01
    """Images that turn out to be damaged while training are named and replaced. A run with a larger share of them among
    its examples, of 1000 at least, stops. 0: the first one stops it."""
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
    batch_size: int
    batches: int
    """An epoch."""
    remainder: int
    """Places left out of each epoch, other ones each time; a place is an image, unless a weight says otherwise."""
    repeated: int
    """Places in the one batch of a small bucket that hold an image a second time or more."""
    merged_into: Bucket | None
    """The bucket that has its images, where it had too few."""


class Drawn(NamedTuple):
    """One example, with where it is from."""

    image: int
    """Its number."""
    caption: str
    """The one of its captions that is told this time."""
    example: Example


class Read(NamedTuple):
    """One example of a cache."""

    image: int
    """Its number."""
    crop: Crop
    text: Text


class Loaded(NamedTuple):
    """What a worker makes of a step. Tokens come later: a tokenizer's imports would be each worker's own."""

    batch: Batch
    """Without tokens, unless a cache has them."""
    captions: tuple[str, ...]
    """One a row, unless a cache has their tokens."""
    bad: tuple[str, ...]
    """Why images were replaced."""


@dataclasses.dataclass(frozen=True)
class Loader:
    """Decodes one host's rows of a global batch. Sent to worker processes."""

    source: Mixture
    order: Order
    buckets: tuple[Bucket, ...]
    config: DataConfig
    host_index: int
    host_count: int
    cache: Cache | None = None
    """Read instead of the source's images and captions."""

    def example(self, image: int, bucket: Bucket, *seed: int) -> Example:
        """The image, resized, cropped and flipped as the seed says. InputError where it is damaged."""
        size = self.source.size(image)
        pixels = self.source.pixels(image, cover_size(*size, bucket))
        if not _same_picture(size, pixels.shape):
            raise InputError(
                f"{self.source.name(image)} has the shape {pixels.shape[:2]} now, and had {size} when it was listed"
            )
        return cover_crop(
            pixels,
            bucket,
            original_size=size,
            rng=np.random.default_rng((self.config.seed, *seed)),
            crop=self.config.crop,
            flip_probability=self.config.flip_probability,
        )

    def fixed(self, image: int, crop: int, bucket: Bucket) -> Example:
        """One of the crops that the image has where their number is fixed."""
        return self.example(image, bucket, image, crop, 2)

    def draw(self, step: int, row: int, position: int) -> Drawn:
        """The example of one row of a step: crop, flip and caption follow from the seed, the step and the row."""
        image, bucket = int(self.order.numbers[position]), self.buckets[self.order.bucket(step)]
        crops = self.config.crops_per_image
        if crops is None:
            example = self.example(image, bucket, step, row)
        else:
            example = self.fixed(image, self._choose(crops, step, row, 3), bucket)
        captions = self.source.captions(image)
        return Drawn(image, captions[self._choose(len(captions), step, row, 1)], example)

    def read(self, step: int, row: int, position: int) -> Read:
        """The same of the cache."""
        assert self.cache is not None
        crop, captions = self.cache.crop(position, self._choose(self.cache.crops, step, row, 3))
        text = captions[self._choose(len(captions), step, row, 1)]
        return Read(int(self.order.numbers[position]), crop, text)

    def _choose(self, count: int, *seed: int) -> int:
        return int(np.random.default_rng((self.config.seed, *seed)).integers(count))

    def good(self, step: int, row: int, bad: list[str], draw: Callable[[int, int, int], _T]) -> _T:
        """draw(step, row, position) of the first of the row's image, and those that follow it in the bucket's order,
        that is not bad; why the others are goes into `bad`."""
        bucket = self.order.bucket(step)
        before = len(bad)
        for instead in range(min(self.order.buckets[bucket].places, _IN_A_ROW)):
            position = self.order.position(step, row, instead=instead)
            try:
                return draw(step, row, position)
            except InputError as problem:
                bad.append(str(problem))
        height, width = self.buckets[bucket]
        raise InputError(
            f"{len(bad) - before} images of the bucket {height}×{width} in a row are bad. The last one: {bad[-1]}"
        )

    def rows(self, step: int) -> range:
        """This host's rows of a step's global batch."""
        share = self.order.buckets[self.order.bucket(step)].batch_size // self.host_count
        return range(self.host_index * share, (self.host_index + 1) * share)

    def __call__(self, step: int) -> Loaded:
        bad: list[str] = []
        replaced = []

        def all_rows(draw: Callable[[int, int, int], _T]) -> list[_T]:
            found = []
            for row in self.rows(step):
                before = len(bad)
                found.append(self.good(step, row, bad, draw))
                replaced.append(len(bad) > before)
            return found

        if self.cache is None:
            drawn = all_rows(self.draw)
            batch, captions = self._decoded(drawn), tuple(one.caption for one in drawn)
        else:
            batch, captions = self._encoded(all_rows(self.read)), ()
        return Loaded(batch._replace(replaced=np.array(replaced)), captions, tuple(bad))

    def _decoded(self, drawn: list[Drawn]) -> Batch:
        examples = [one.example for one in drawn]
        images = np.stack([example.image for example in examples])
        return Batch(image=images, tokens={}, **self._told([one.image for one in drawn], examples))

    def _encoded(self, read: list[Read]) -> Batch:
        crops, texts = [one.crop for one in read], [one.text for one in read]
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Batch(
            image=None,
            tokens={name: np.stack([text.tokens[name] for text in texts]) for name in texts[0].tokens},
            encoded=Encoded(
                mean=np.stack([crop.mean for crop in crops]),
                log_variance=np.stack([crop.log_variance for crop in crops]),
                context=np.stack([text.context for text in texts]),
                pooled=np.stack(pooled) if pooled else None,
            ),
            **self._told([one.image for one in read], crops),
        )

    def _told(self, images: list[int], examples: Sequence[Example | Crop]) -> dict[str, Any]:
        """What else a batch holds of its examples."""
        micro = MicroConditioning(
            original_size=np.stack([example.original_size for example in examples]),
            crop_top_left=np.stack([example.crop_top_left for example in examples]),
            target_size=np.stack([example.target_size for example in examples]),
            aesthetic_score=self._scores(images),
        )
        return {"micro": micro, "example": np.array(images, np.int32), "replaced": np.zeros(len(images), bool)}

    def _scores(self, images: list[int]) -> Float32[np.ndarray, " images"] | None:
        name = self.config.aesthetic
        return None if name is None else np.array([self.source.number(image, name) for image in images], np.float32)


def _same_picture(size: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether an image of that size can have been decoded to that shape: whole, or shrunk to n/8, rounded up."""
    return any(shape[:2] == tuple(-(-side * eighths // 8) for side in size) for eighths in range(1, 9))


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
        ("min_size", 1, math.inf),
        ("crops_per_image", 1, math.inf),
        ("max_bad_share", 0, 1),
        ("seed", 0, 2**32 - 1),
        ("workers", 0, math.inf),
        ("read_ahead", 1, math.inf),
    ]
    for name, low, high in ranges:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"data.{name}={value} is out of range. Expected {low} to {high}.")


def _batch_sizes(config: DataConfig, buckets: tuple[Bucket, ...]) -> list[int]:
    """Images a step of each bucket."""
    if config.batch_pixels is None:
        return [config.batch_size] * len(buckets)
    sizes = [
        config.batch_pixels // (bucket.height * bucket.width) // config.batch_size * config.batch_size
        for bucket in buckets
    ]
    if not all(sizes):
        largest = max(buckets, key=math.prod)
        raise InputError(
            f"data.batch_pixels={config.batch_pixels} holds no batch of {config.batch_size} images of "
            f"{largest.height}×{largest.width}. Give {config.batch_size * math.prod(largest)} or more, or a smaller "
            "data.batch_size, of which batches are multiples then."
        )
    return sizes


def open_mixture(config: DataConfig) -> Mixture:
    """The sources of a configuration. Raises InputError for none, for both a folder and sources, and as
    `open_pictures`; a bad weight."""
    if (config.folder is None) == (not config.sources):
        given = "neither" if config.folder is None else "both"
        raise InputError(
            f"data.folder and data.sources: {given} given. Give one folder, or several sources with weights."
        )
    sources = config.sources or (Source(config.folder or ""),)
    opened = [open_pictures(source.folder, verify=config.verify_images) for source in sources]
    return Mixture(opened, [source.weight for source in sources])


def _name_and_count(dataset: "BucketedDataset", source: list[grain.DatasetIterator]) -> Generator[Batch, None, None]:
    """The batches; names what was replaced, once each, and stops at too many. Keeps the data set until it ends."""
    config = dataset.config
    examples = bad = 0
    named = set[str]()
    try:
        while source:
            loaded = next(source[0])
            examples, bad = examples + len(loaded.batch.example), bad + int(loaded.batch.replaced.sum())
            for reason in loaded.bad:
                if reason not in named:
                    tqdm.write(f"  replaced while training: {reason}")
                    named.add(reason)
            if bad > config.max_bad_share * max(examples, _FEW):
                raise InputError(
                    f"{bad} of the {examples} examples since the start had a damaged image, more than "
                    f"data.max_bad_share={config.max_bad_share} allows. The last: {loaded.bad[-1]}\nMend or remove "
                    "them (data.verify_images=true with data.on_refused=skip finds them in a folder before the work "
                    "starts), or raise data.max_bad_share."
                )
            if loaded.captions:
                yield loaded.batch._replace(tokens=dict(dataset.tokenize(list(loaded.captions))))
            else:
                yield loaded.batch
    finally:
        source.clear()


def _worker_starts(worker: int, workers: int) -> None:
    """Grain's would wait for ever where the process that reads from them is killed."""
    end_with_parent()


class BucketedDataset:
    """Batches for one host, and what an epoch of them takes.

    Opening a folder reads every image's header (folders.open_folder). All hosts must see the same files.

    Args:
        config: what to read; batch sizes count all hosts.
        tokenize: captions to token numbers, in this process.
        host_index, host_count: this host takes rows host_index · n to (host_index + 1) · n of each global batch, with
            n = batch size / host_count.

    Raises InputError: a setting out of range, a batch that does not split over the hosts, a bad folder, files refused
    while `config.on_refused` is "error", buckets that no image fits.
    """

    def __init__(self, config: DataConfig, tokenize: Tokenize, *, host_index: int = 0, host_count: int = 1):
        _check(config, host_index, host_count)
        self.config = config
        self.tokenize = tokenize
        self.buckets = check_buckets(config.buckets)
        batch_sizes = _batch_sizes(config, self.buckets)
        # Refusals are settled below, so that one message names those of the sources and those of the buckets.
        self.source = open_mixture(config)
        self._grouping = groupings.group(
            self.source,
            self.buckets,
            max_aspect_distance=config.max_aspect_distance,
            min_size=config.min_size,
            score=config.aesthetic,
        )
        if not any(self._grouping.counts()):
            some = itertools.islice(itertools.chain(self.refused(), self.too_small()), 6)
            raise InputError(
                f"None of the {len(self.source)} images in {self.where} fits a bucket of data.buckets:\n"
                f"{summary(list(some))}\nAdd buckets of such shapes, raise data.max_aspect_distance (now "
                f"{config.max_aspect_distance:.3g}; the nearest image is at {self._grouping.closest:.3g}), or lower "
                f"data.min_size (now {config.min_size})."
            )
        if config.on_refused == "error":
            stop_if_refused(self.where, list(self.refused()), "error")
        self._merged: dict[int, int] = {}
        if config.small_buckets == "merge":
            self._grouping, self._merged = groupings.merge_small(self._grouping, self.buckets, batch_sizes)
        self.order = Order(self._grouping.members, self.source.weights, batch_sizes, config.seed)
        self._grouping = dataclasses.replace(self._grouping, members=[])  # the order has them now
        self.epoch_steps = self.order.epoch_steps
        """Steps an epoch."""
        self.loader = Loader(self.source, self.order, self.buckets, config, host_index, host_count)

    @property
    def where(self) -> str:
        """The folders, for messages."""
        return ", ".join(str(source.path) for source in self.source.sources)

    def refused(self) -> Iterator[Refused]:
        """What cannot be used, and was not said before: when a shard set was built."""
        yield from self.source.refused(built=False)
        yield from groupings.refusals(self._grouping, self.source, self.buckets, self.config.aesthetic)

    def refused_count(self) -> int:
        sources = sum(1 for _ in self.source.refused(built=False))
        return sources + len(self._grouping.misfits) + len(self._grouping.unrated)

    def too_small(self) -> Iterator[Refused]:
        """What the minimum size leaves out."""
        return groupings.too_small(self._grouping, self.source, self.config.min_size)

    def too_small_count(self) -> int:
        return len(self._grouping.too_small)

    def reading(self, cache: Cache) -> "BucketedDataset":
        """The same, from a cache that was made from it."""
        assert len(cache) == len(self.order.numbers) and cache.crops == self.config.crops_per_image
        cached = copy.copy(self)
        cached.loader = dataclasses.replace(self.loader, cache=cache)
        return cached

    def report(self) -> list[BucketReport]:
        """What an epoch takes from each bucket, in the order of the buckets, empty ones included."""
        return [
            BucketReport(
                *bucket,
                images=order.images,
                batch_size=order.batch_size,
                batches=order.batches,
                remainder=order.remainder,
                repeated=order.repeated,
                merged_into=self.buckets[self._merged[number]] if number in self._merged else None,
            )
            for number, (bucket, order) in enumerate(zip(self.buckets, self.order.buckets, strict=True))
        ]

    def shares(self) -> list[Share]:
        """What each source gives to an epoch."""
        folders = [str(source.path) for source in self.source.sources]
        shares = [count / sum(self.order.source_places) for count in self.order.source_places]
        return list(map(Share, folders, self.source.weights, self.order.source_images, shares))

    @property
    def assignment(self) -> str:
        """Names which images are in which buckets, in which order."""
        named = hashlib.blake2b(json.dumps(self.buckets).encode(), digest_size=16)
        named.update(json.dumps([bucket.images for bucket in self.order.buckets]).encode())
        named.update(np.ascontiguousarray(self.order.numbers).data)
        return named.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Names what is trained on, and how many of it in which buckets; not the pixels."""
        content = [self.source.fingerprint, [bucket.images for bucket in self.order.buckets]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def bucket_of(self, step: int) -> Bucket:
        """The bucket of one step, without reading an image: which compiled step it needs."""
        return self.buckets[self.order.bucket(step)]

    def batch_size_of(self, step: int) -> int:
        """Images of one step, over all hosts."""
        return self.order.buckets[self.order.bucket(step)].batch_size

    def examples(self, start_step: int = 0) -> Iterator[Drawn]:
        """All hosts' examples one by one, in training order. Without end; decodes lazily; says what it replaces."""
        for step in itertools.count(start_step):
            for row in range(self.batch_size_of(step)):
                bad: list[str] = []
                yield self.loader.good(step, row, bad, self.loader.draw)
                for reason in bad:
                    tqdm.write(f"  replaced: {reason}")

    def iter_dataset(self, start_step: int = 0, stop_step: int = LAST_STEP) -> grain.IterDataset:
        """This host's batches of those steps as Grain's dataset, each as `Loaded`."""
        grain.config.update("py_traceback_filtering", "off")  # which else rewrites the message of every error
        steps = grain.MapDataset.range(start_step, stop_step)
        ahead = grain.ReadOptions(num_threads=self.config.read_ahead, prefetch_buffer_size=self.config.read_ahead)
        batches = steps.map(self.loader).to_iter_dataset(ahead)
        if not self.config.workers:
            return batches
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only absl's own programs parse
        return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.config.workers), _worker_starts)

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """This host's batches from `start_step` on, without end, decoded ahead.

        `close()` of what is returned ends the threads or processes; so does letting go of it.

        Raises InputError, at the batch that holds it, for more damaged images than `max_bad_share`.
        """
        source = [iter(self.iter_dataset(start_step))]
        generator = _name_and_count(self, source)
        # Grain's workers must end before the interpreter does, or they fail noisily and leak shared memory.
        weakref.finalize(generator, source.clear)
        return generator
