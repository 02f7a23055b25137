"""Training batches of captioned images, of folders or shard sets, in an order that is a pure function of the step.

The order (order.Order) is laid out in global batches of image numbers; only then does a process take its rows and decode
them. So

- processes agree on every step's bucket, and together they read what one process would;
- **the position is the step**: `iterate(step)` gives what an uninterrupted run would have had from there on, with any
  number of workers or processes, and there is no iterator state to save.

An image that turned out to be damaged, and was replaced (loader), is named once and counted in `Batch.replaced`; more
of them than `max_bad_share` stop the run.

Not here: tokenizers (passed in), placing arrays on devices, normalisation, caption dropout.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32
from tqdm import tqdm

from sdxl_jax.arrays import Batch
from sdxl_jax.data import grouping as groupings
from sdxl_jax.data.buckets import Bucket, check_buckets
from sdxl_jax.data.cache import Cache
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.loader import DecodedExample, Loader
from sdxl_jax.data.mixture import Mixture, Share, Source
from sdxl_jax.data.order import LAST_STEP, Order
from sdxl_jax.data.processes import end_with_parent
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.data.shards import is_shard_set, open_shards
from sdxl_jax.data.sources import ImageSource, OnRefused, Refused, stop_if_refused, summary
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.files.paths import local

Tokenize = Callable[[list[str]], dict[str, Int32[np.ndarray, "batch 77"]]]
"""Captions to token numbers, one entry a tokenizer."""

FEW = 1000
"""Examples that bad ones are a share of, until as many were read."""


class BucketReport(NamedTuple):
    """What one epoch takes from one bucket."""

    height: int
    width: int
    images: int
    batch_size: int
    batches: float
    """An epoch, on average: a bucket smaller than a batch has one in several epochs."""
    remainder: int
    """Places left out of each epoch, other ones each time; a place is an image, unless a weight says otherwise."""
    repeated: int
    """Rows of each batch of a small bucket that hold an image of the same epoch, or of an earlier one, again."""
    merged_into: Bucket | None
    """The bucket that has its images, where it had too few."""

    @property
    def size(self) -> Bucket:
        return Bucket(self.height, self.width)


def _check(config: DataConfig, process_index: int, process_count: int) -> None:
    if config.batch_size < 1 or config.batch_size % process_count:
        raise InputError(
            f"data.batch_size={config.batch_size} cannot be split over {process_count} processes. Use a multiple of "
            f"{process_count}, e.g. {max(1, math.ceil(config.batch_size / process_count)) * process_count}."
        )
    check_ranges(
        [
            ("process_index", process_index, 0, process_count - 1),
            ("data.flip_probability", config.flip_probability, 0, 1),
            ("data.max_aspect_distance", config.max_aspect_distance, 0, math.inf),
            ("data.min_size", config.min_size, 1, math.inf),
            ("data.batch_pixels", config.batch_pixels, 1, math.inf),
            ("data.crops_per_image", config.crops_per_image, 1, math.inf),
            ("data.max_bad_share", config.max_bad_share, 0, 1),
            ("data.seed", config.seed, 0, 2**32 - 1),
            ("data.workers", config.workers, 0, math.inf),
            ("data.read_ahead", config.read_ahead, 1, math.inf),
        ]
    )
    if config.crop is CropMode.CENTRE and config.flip_probability in (0, 1) and (config.crops_per_image or 1) > 1:
        raise InputError(
            f"data.crops_per_image={config.crops_per_image} would be as many times the same crop: data.crop=centre and "
            f"data.flip_probability={config.flip_probability:g} leave nothing to chance. Set it to 1, or data.crop to "
            "random."
        )
    if config.cache_of_other_code and config.cache is None:
        raise InputError("data.cache_of_other_code has no effect without data.cache. Remove it, or give the cache.")


def batch_sizes(config: DataConfig, buckets: tuple[Bucket, ...]) -> list[int]:
    """Images a step of each bucket."""
    if config.batch_pixels is None:
        return [config.batch_size] * len(buckets)
    sizes = [
        config.batch_pixels // (bucket.height * bucket.width) // config.batch_size * config.batch_size
        for bucket in buckets
    ]
    if min(sizes) < 1:
        largest = max(buckets, key=math.prod)
        raise InputError(
            f"data.batch_pixels={config.batch_pixels} holds no batch of {config.batch_size} images of "
            f"{largest.height}×{largest.width}. Give {config.batch_size * math.prod(largest)} or more, or a smaller "
            "data.batch_size, of which batches are multiples then."
        )
    return sizes


def open_mixture(config: DataConfig, captioned: bool = True) -> Mixture:
    """The sources of a configuration. Raises InputError for none, for both a folder and sources, and as
    `open_images`; a bad weight; caption_lines where no caption stands in a .txt."""
    if (config.folder is None) == (not config.sources):
        given = "neither" if config.folder is None else "both"
        raise InputError(
            f"data.folder and data.sources: {given} given. Give one folder, or several sources with weights."
        )
    sources = config.sources or (Source(config.folder or ""),)
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise InputError(
                f"data.sources gives {source.folder} the weight {source.weight}. Expected more than 0; 1 is each image "
                "once an epoch. To leave a source out, remove it."
            )
    # What cannot be decoded is found when a cache is made, which says so itself.
    verify = config.verify_images and config.cache is None
    lines = config.caption_lines
    opened = [open_images(each.folder, verify=verify, caption_lines=lines, captioned=captioned) for each in sources]
    if config.caption_lines is not CaptionLines.LINES and not any(each.reads_text_files for each in opened):
        folders = ", ".join(each.folder for each in sources)
        raise InputError(
            f"data.caption_lines={config.caption_lines.value} has no effect on {folders}: no caption is read from a "
            ".txt. Build shards with `sdxl-jax data build --caption-lines whole`, or leave it out"
        )
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
            if bad > config.max_bad_share * max(examples, FEW):
                raise InputError(
                    f"{bad} of the {examples} examples since the start had a damaged image, more than "
                    f"data.max_bad_share={config.max_bad_share} allows. The last: {loaded.bad[-1]}\nTo go on with "
                    "this run, bring the files back as they were, or raise data.max_bad_share. A new run can do "
                    "without them: remove them, or build a shard set, which decodes every image once."
                )
            if loaded.captions and dataset.tokenize is not None:
                yield loaded.batch._replace(tokens=dict(dataset.tokenize(list(loaded.captions))))
            else:
                yield loaded.batch
    finally:
        source.clear()


def _worker_starts(worker: int, workers: int) -> None:
    """Grain's would wait for ever where the process that reads from them is killed. A terminal's Ctrl-C reaches them
    too, while the run still needs their batches to stop where it should."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ahead(dataset: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    """The elements in order, made ahead in threads, and in processes where the configuration has any."""
    grain.config.update("py_traceback_filtering", "off")  # which else rewrites the message of every error
    threads = grain.ReadOptions(num_threads=config.read_ahead, prefetch_buffer_size=config.read_ahead)
    elements = dataset.to_iter_dataset(threads)
    if not config.workers:
        return elements
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only absl's own programs parse
    return elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers), _worker_starts)


def _plain(number: Fraction | float) -> int | float:
    """An integer where it is one."""
    return int(number) if number == int(number) else float(number)


class BucketedDataset:
    """Batches for one process, and what an epoch of them takes.

    Opening a folder reads every image's header (folders.open_folder). All processes must see the same files.

    Args:
        config: what to read; batch sizes count all processes.
        tokenize: captions to token numbers, in this process. None: nobody wants captions; batches have no tokens, and
            images of a folder need no caption.
        host_index, host_count: this process takes rows host_index · n to (host_index + 1) · n of each global batch, with
            n = batch size / host_count.

    Raises InputError: a setting out of range, a batch that does not split over the processes, a bad folder, files refused
    while `config.on_refused` is ERROR, buckets that no image fits.
    """

    def __init__(
        self, config: DataConfig, tokenize: Tokenize | None, *, process_index: int = 0, process_count: int = 1
    ):
        _check(config, process_index, process_count)
        if config.cache is not None:
            local(config.cache, "data.cache")
        self.config = config
        self.tokenize = tokenize
        self.buckets = check_buckets(config.buckets)
        sizes = batch_sizes(config, self.buckets)
        # Refusals are settled below, so that one message names those of the sources and those of the buckets.
        self.source = open_mixture(config, captioned=tokenize is not None)
        self._grouping = groupings.group(
            self.source,
            self.buckets,
            max_aspect_distance=config.max_aspect_distance,
            min_size=config.min_size,
            score=config.aesthetic,
        )
        if not any(self._grouping.counts()):
            left_out = itertools.chain(self.refused(), self.too_small())
            count = self.refused_count() + self.too_small_count()
            raise InputError(
                f"None of the {len(self.source)} images in {self.where} fits a bucket of data.buckets:\n"
                f"{summary(left_out, count)}\nAdd buckets of such shapes, raise data.max_aspect_distance (now "
                f"{config.max_aspect_distance:.3g}; the nearest image is at {self._grouping.closest:.3g}), or lower "
                f"data.min_size (now {config.min_size})."
            )
        stop_if_refused(self.where, self.refused(), self.refused_count(), config.on_refused)
        self._merged: dict[int, int] = {}
        weights = self.source.weights
        if config.small_buckets is SmallBuckets.MERGE:
            self._grouping, self._merged = groupings.merge_small(self._grouping, self.buckets, sizes, weights)
        self.order = Order(self._grouping.members, weights, sizes, config.seed)
        self._grouping = dataclasses.replace(self._grouping, members=[])  # the order has them now
        self.epoch_steps = _plain(self.order.epoch_steps)
        """Steps an epoch, on average: buckets smaller than a batch have one in several epochs."""
        self.loader = Loader(self.source, self.order, self.buckets, config, process_index, process_count)

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
                batches=_plain(order.batches),
                remainder=order.remainder,
                repeated=order.batch_size - order.images if 0 < order.images < order.batch_size else 0,
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
        """Images of one step, over all processes."""
        return self.order.buckets[self.order.bucket(step)].batch_size

    def examples(self, start_step: int = 0) -> Iterator[DecodedExample]:
        """All processes' examples one by one, in training order. Without end; decodes lazily; says what it replaces."""
        for step in itertools.count(start_step):
            for row in range(self.batch_size_of(step)):
                bad: list[str] = []
                drawn = self.loader.good(step, row, bad, self.loader.draw)
                for reason in bad:
                    tqdm.write(f"  replaced: {reason}")
                yield drawn

    def iter_dataset(self, start_step: int = 0, stop_step: int = LAST_STEP) -> grain.IterDataset:
        """This process's batches of those steps as Grain's dataset, each as `Loaded`."""
        return ahead(grain.MapDataset.range(start_step, stop_step).map(self.loader), self.config)

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """This process's batches from `start_step` on, without end, decoded ahead.

        `close()` of what is returned ends the threads or processes; so does letting go of it.

        Raises InputError, at the batch that holds it, for more damaged images than `max_bad_share`.
        """
        source = [iter(self.iter_dataset(start_step))]
        generator = _name_and_count(self, source)
        # Grain's workers must end before the interpreter does, or they fail noisily and leak shared memory.
        weakref.finalize(generator, source.clear)
        return generator


def open_images(
    folder: str | Path,
    *,
    verify: bool = False,
    caption_lines: CaptionLines = CaptionLines.LINES,
    captioned: bool = True,
) -> ImageSource:
    """A folder of images, or a shard set. What is refused is left out and listed.

    verify: decode every image of a folder now; those of a shard set were, when it was built.
    caption_lines: what the lines of a `.txt` in a folder are; a shard set has its captions.
    captioned: whether captions are wanted.

    Raises InputError as `open_folder` and `open_shards`.
    """
    folder = local(folder, "data.folder")
    if is_shard_set(folder):
        return open_shards(folder)
    return open_folder(
        folder, on_refused=OnRefused.SKIP, verify=verify, caption_lines=caption_lines, captioned=captioned
    )
