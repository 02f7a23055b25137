"""Training batches of captioned images, from folders or shard sets, in an order that is a pure function of the step.

The order (order.Order) consists of global batches of image numbers; each process then decodes its rows of a batch. So

- processes agree on every step's bucket, and together they read what one process would;
- **the position is the step**: `iterate(step)` gives the batches of an uninterrupted run from that step on, with any
  number of workers or processes, and there is no iterator state to save.

An image that turns out to be damaged, and is replaced (loader), is reported once and counted in `Batch.replaced`; a
larger share than `max_bad_share` stops the run.

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

from sdxl_jax.arrays import Batch
from sdxl_jax.data.buckets import Bucket, check_buckets
from sdxl_jax.data.cache import Cache
from sdxl_jax.data.captions import CAPTION, TRIGGER, CaptionLines, with_trigger
from sdxl_jax.data.folders import FOLDER, open_folder, with_common_classes
from sdxl_jax.data.grouping import Grouping, group, merge_small, refusals, too_small
from sdxl_jax.data.loader import DecodedExample, Loader
from sdxl_jax.data.mixture import Mixture, Share, Source
from sdxl_jax.data.order import LAST_STEP, Order
from sdxl_jax.data.processes import end_with_parent
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.data.shards import DESCRIPTION, is_shard_set, open_shards
from sdxl_jax.data.sources import ImageSource, OnRefused, Refused, stop_if_refused, summary
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.progress import tqdm

Tokenize = Callable[[list[str]], dict[str, Int32[np.ndarray, "batch 77"]]]
"""Captions to token numbers, one entry per tokenizer."""

FEW = 1000
"""The share of damaged images is one of at least this many examples, so that the first few do not stop a run."""


class BucketReport(NamedTuple):
    """The images and batches of one bucket in an epoch."""

    height: int
    width: int
    images: int
    batch_size: int
    batches: float
    """Per epoch, on average: a bucket with fewer images than a batch has one batch in several epochs."""
    remainder: int
    """Places left out of each epoch, different ones each time; with weight 1, a place is an image."""
    repeated: int
    """Rows of each batch of a small bucket that repeat an image of the batch."""
    merged_into: Bucket | None
    """The bucket that its images were moved to, where it had too few."""

    @property
    def size(self) -> Bucket:
        return Bucket(self.height, self.width)


def _check(config: DataConfig, process_index: int, process_count: int) -> None:
    if config.batch_size < 1 or config.batch_size % process_count:
        raise InputError(
            f"data.batch_size={config.batch_size} cannot be split over {process_count} processes. Use a multiple of "
            f"{process_count}, e.g. {max(1, math.ceil(config.batch_size / process_count)) * process_count}"
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
            f"data.crops_per_image={config.crops_per_image} would be as many times the same crop, because "
            f"data.crop=centre and data.flip_probability={config.flip_probability:g} are deterministic. Set "
            "data.crops_per_image=1 or data.crop=random"
        )
    masked = [source.masks for source in config.every_source if source.masks is not None]
    if masked and config.cache is not None:
        raise InputError(
            f"data.masks={masked[0]} has no effect with data.cache, which holds latents without masks. Leave one of "
            "them out"
        )
    if config.cache_of_other_code and config.cache is None:
        raise InputError("data.cache_of_other_code has no effect without data.cache. Remove it, or set data.cache")


def batch_sizes(config: DataConfig, buckets: tuple[Bucket, ...]) -> list[int]:
    """Images per step of each bucket. Raises InputError where data.batch_pixels is below data.batch_size images."""
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
            "data.batch_size, which batch sizes are multiples of"
        )
    return sizes


def open_mixture(config: DataConfig, captioned: bool = True) -> Mixture:
    """Opens the sources of a configuration.

    captioned: whether training uses captions.

    Raises InputError: neither a folder nor sources, or both; one that does not exist; a weight that is not positive and
    finite; caption_lines where no caption is read from a .txt; settings of data.folder beside sources; as
    `with_trigger`, and a template or trigger words without effect; and as `open_images`.
    """
    if (config.folder is None) == (not config.sources):
        given = "neither" if config.folder is None else "both"
        raise InputError(
            f"data.folder and data.sources: {given} given. Give one folder, or several sources with weights"
        )
    for name in ("masks", "caption_template") if config.sources else ():
        if getattr(config, name) is not None:
            raise InputError(
                f"data.{name}={getattr(config, name)} is for data.folder. With data.sources, give it to each source: "
                f"Source(…, {name}=…)"
            )
    sources = _with_triggers(config, captioned)
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise InputError(
                f"data.sources gives {source.folder} the weight {source.weight}. Give a finite number above 0: with 1, "
                "each image is seen once per epoch. To leave a source out, remove it"
            )
        if not 0 <= source.loss_weight < math.inf:
            raise InputError(
                f"data.sources gives {source.folder} the loss_weight {source.loss_weight}. Give a finite number, 0 or "
                "more: 1 counts as the examples of other sources do"
            )
        where = located(source.folder, "data.sources")
        if config.sources and not in_bucket(where) and not where.exists():
            raise InputError(
                f"data.sources has {source.folder}, which does not exist. Check the path, seen from {Path.cwd()}. "
                f"Images of a class, for prior preservation: `sdxl-jax data class-images MODEL {source.folder}`"
            )
    # An image that cannot be decoded is found, and recorded, when the cache is made.
    verify = config.verify_images and config.cache is None
    opened = [
        open_images(
            each.folder,
            verify=verify,
            caption_lines=config.caption_lines,
            captioned=captioned and (each.caption_template is None or CAPTION in each.caption_template),
            label=config.label or config.aesthetic,
            masks=each.masks,
        )
        for each in sources
    ]
    if config.caption_lines is not CaptionLines.LINES and not any(each.reads_text_files for each in opened):
        folders = ", ".join(each.folder for each in sources)
        raise InputError(
            f"data.caption_lines={config.caption_lines.value} has no effect on {folders}: no caption is read from a "
            ".txt. Build shards with `sdxl-jax data build --caption-lines whole`, or leave it out"
        )
    return Mixture(with_common_classes(opened) if config.label == FOLDER else opened, sources)


def _with_triggers(config: DataConfig, captioned: bool) -> list[Source]:
    """The sources with the trigger words in their templates of captions."""
    templates = [source.caption_template for source in config.every_source if source.caption_template is not None]
    if templates and not captioned:
        raise InputError(
            f'caption_template="{templates[0]}" has no effect: this training uses no captions. Leave it out'
        )
    if config.trigger is not None and not any(TRIGGER in template for template in templates):
        raise InputError(
            f'data.trigger="{config.trigger}" has no effect: no caption_template has {TRIGGER}. Give one, e.g. '
            'data.caption_template="a photo of {trigger}, {caption}", or leave it out'
        )
    return [
        source
        if source.caption_template is None
        else dataclasses.replace(source, caption_template=with_trigger(source.caption_template, config.trigger))
        for source in config.every_source
    ]


def _tokenise_and_report_bad(
    dataset: "BucketedDataset", iterator: list[grain.DatasetIterator]
) -> Generator[Batch, None, None]:
    """Yields the batches of the iterator, whose captions it tokenises here, in the main process.

    Prints the reason for each damaged image that was replaced, once each, and raises InputError where their share
    exceeds `data.max_bad_share`. iterator: a list of one, which the generator empties when it ends, so that no
    reference to Grain's workers is left. The data set is referenced until then.
    """
    config = dataset.config
    examples = bad = 0
    reported = set[str]()
    try:
        while iterator:
            loaded = next(iterator[0])
            examples, bad = examples + len(loaded.batch.example), bad + int(loaded.batch.replaced.sum())
            for reason in loaded.bad:
                if reason not in reported:
                    tqdm.write(f"  replaced while training: {reason}")
                    reported.add(reason)
            if bad > config.max_bad_share * max(examples, FEW):
                raise InputError(
                    f"{bad} of the {examples} examples since the start had a damaged image, more than "
                    f"data.max_bad_share={config.max_bad_share} allows. The last one: {loaded.bad[-1]}\nTo resume "
                    "this run, bring the files back as they were, or raise data.max_bad_share. For a new run, remove "
                    "them, or build a shard set, which decodes every image once"
                )
            if loaded.captions and dataset.tokenize is not None:
                yield loaded.batch._replace(tokens=dict(dataset.tokenize(list(loaded.captions))))
            else:
                yield loaded.batch
    finally:
        iterator.clear()


def _init_worker(worker: int, workers: int) -> None:
    """Runs in each of Grain's workers. Without it they would wait forever when their parent process is killed; and
    Ctrl-C in a terminal would end them, while the run still needs their batches up to the step where it stops."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prefetched(dataset: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    """The elements in order, prefetched in threads, and in worker processes where data.workers is not 0."""
    grain.config.update("py_traceback_filtering", "off")  # otherwise it rewrites the message of every error
    threads = grain.ReadOptions(num_threads=config.read_ahead, prefetch_buffer_size=config.read_ahead)
    elements = dataset.to_iter_dataset(threads)
    if not config.workers:
        return elements
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only programs of absl parse
    return elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers), _init_worker)


def _integer_or_float(number: Fraction | float) -> int | float:
    """The number as an int where it is an integer, else as a float."""
    return int(number) if number == int(number) else float(number)


def _remedy(grouping: Grouping, config: DataConfig) -> str:
    """The remedy where no image fits a bucket."""
    if math.isinf(grouping.closest):  # all images were left out for other reasons than their aspect ratio
        options = (("data.aesthetic", config.aesthetic), ("data.label", config.label))
        fields = "".join(f", or use images with {name} ({option})" for option, name in options if name)
        return f"Lower data.min_size (now {config.min_size}){fields}"
    return (
        f"Add buckets of such aspect ratios, raise data.max_aspect_distance (now {config.max_aspect_distance:.3g}; the "
        f"nearest image is at {grouping.closest:.3g}), or lower data.min_size (now {config.min_size})"
    )


class BucketedDataset:
    """The training data as bucketed batches for one process, with counts per epoch.

    Opening a folder reads every image's header (folders.open_folder). All processes must see the same files.

    Args:
        config: what to read; batch sizes are over all processes.
        tokenize: captions to token numbers, called in the main process. None: captions are not used; batches have no
            tokens, and images of a folder need no caption.
        process_index, process_count: this process takes rows process_index · n to (process_index + 1) · n of each
            global batch, with n = batch size / process_count.

    Raises InputError: a setting out of range, a batch size that cannot be split over the processes, a bad folder, files
    refused while `config.on_refused` is ERROR, buckets that no image fits.
    """

    def __init__(
        self, config: DataConfig, tokenize: Tokenize | None, *, process_index: int = 0, process_count: int = 1
    ):
        _check(config, process_index, process_count)
        if config.cache is not None:
            located(config.cache, "data.cache")
        self.config = config
        self.tokenize = tokenize
        self.buckets = check_buckets(config.buckets)
        sizes = batch_sizes(config, self.buckets)
        # Refusals are reported below, so that one message has those of the sources and those of the buckets.
        self.source = open_mixture(config, captioned=tokenize is not None)
        self._grouping = group(
            self.source,
            self.buckets,
            max_aspect_distance=config.max_aspect_distance,
            min_size=config.min_size,
            score=config.aesthetic,
            label=config.label,
        )
        if not any(self._grouping.counts()):
            left_out = itertools.chain(self.refused(), self.too_small())
            count = self.refused_count() + self.too_small_count()
            raise InputError(
                f"None of the {len(self.source)} images in {self.where} fits a bucket of data.buckets:\n"
                f"{summary(left_out, count)}\n{_remedy(self._grouping, config)}"
            )
        stop_if_refused(self.where, self.refused(), self.refused_count(), config.on_refused)
        self._merged: dict[int, int] = {}
        weights = self.source.weights
        if config.small_buckets is SmallBuckets.MERGE:
            self._grouping, self._merged = merge_small(self._grouping, self.buckets, sizes, weights)
        self.order = Order(self._grouping.members, weights, sizes, config.seed)
        self._grouping = dataclasses.replace(self._grouping, members=[])  # the order holds them now
        self.epoch_steps = _integer_or_float(self.order.epoch_steps)
        """Steps per epoch, on average: buckets with fewer images than a batch have one batch in several epochs."""
        self.loader = Loader(self.source, self.order, self.buckets, config, process_index, process_count)

    @property
    def where(self) -> str:
        """The paths of the sources, for messages."""
        return ", ".join(str(source.path) for source in self.source.sources)

    def refused(self) -> Iterator[Refused]:
        """The images that cannot be used, except those that were reported when a shard set was built."""
        yield from self.source.refused(built=False)
        yield from refusals(self._grouping, self.source, self.buckets, self.config.aesthetic, self.config.label)

    def refused_count(self) -> int:
        """Length of `refused`."""
        sources = sum(1 for _ in self.source.refused(built=False))
        grouping = self._grouping
        return sources + len(grouping.misfits) + len(grouping.unrated) + len(grouping.unlabelled)

    def too_small(self) -> Iterator[Refused]:
        """The images that `data.min_size` leaves out."""
        return too_small(self._grouping, self.source, self.config.min_size)

    def too_small_count(self) -> int:
        """Length of `too_small`."""
        return len(self._grouping.too_small)

    def notes(self) -> Iterator[str]:
        """Warnings about the images, one sentence each, which `data inspect` and the start of a run print."""
        yield from self.source.notes()
        sources = self.source.sources
        if self.config.label == FOLDER and len(sources) > 1 and any(source.built for source in sources):
            yield (
                "the classes of shard sets are the numbers that they were built with: beside other sources they are "
                "right only if all were built from the same subfolders"
            )
        used = self.source.sizes[np.unique(self.order.numbers)]
        if len(used) > 1 and (used == used[0]).all():
            height, width = used[0]
            yield (
                f"all {len(used):,} images are {height}×{width}: a model that is conditioned on the original size "
                "learns nothing about it from them"
            )

    def reading(self, cache: Cache) -> "BucketedDataset":
        """The same data set, read from a cache that was made from it."""
        assert len(cache) == len(self.order.numbers) and cache.crops == self.config.crops_per_image
        cached = copy.copy(self)
        cached.loader = dataclasses.replace(self.loader, cache=cache)
        return cached

    def labels(self) -> Int32[np.ndarray, " images"]:
        """The classes of the images that are used, in no order. data.label must be given."""
        assert self.config.label is not None
        numbers = [source.numbers[self.config.label] for source in self.source.sources]
        return np.concatenate(numbers)[np.unique(self.order.numbers)].astype(np.int32)

    def captions(self) -> Iterator[str]:
        """All captions of the images that are used, read one after the other."""
        for image in np.unique(self.order.numbers):
            yield from self.source.captions(int(image))

    def report(self) -> list[BucketReport]:
        """The images and batches of each bucket in an epoch, in the order of the buckets, empty ones included."""
        return [
            BucketReport(
                *bucket,
                images=order.images,
                batch_size=order.batch_size,
                batches=_integer_or_float(order.batches),
                remainder=order.remainder,
                repeated=order.batch_size - order.images if 0 < order.images < order.batch_size else 0,
                merged_into=self.buckets[self._merged[number]] if number in self._merged else None,
            )
            for number, (bucket, order) in enumerate(zip(self.buckets, self.order.buckets, strict=True))
        ]

    def shares(self) -> list[Share]:
        """The share of each source in an epoch."""
        folders = [str(source.path) for source in self.source.sources]
        shares = [count / sum(self.order.source_places) for count in self.order.source_places]
        return list(map(Share, folders, self.source.weights, self.order.source_images, shares))

    @property
    def assignment(self) -> str:
        """A hash of which images are in which buckets, in which order."""
        digest = hashlib.blake2b(json.dumps(self.buckets).encode(), digest_size=16)
        digest.update(json.dumps([bucket.images for bucket in self.order.buckets]).encode())
        digest.update(np.ascontiguousarray(self.order.numbers).data)
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints and of the number of images in each bucket."""
        content = [self.source.fingerprint, [bucket.images for bucket in self.order.buckets]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def bucket_of(self, step: int) -> Bucket:
        """The bucket of one step, known without reading an image: it determines which compiled step is needed."""
        return self.buckets[self.order.bucket(step)]

    def batch_size_of(self, step: int) -> int:
        """Images per step in the bucket of that step, over all processes."""
        return self.order.buckets[self.order.bucket(step)].batch_size

    def examples(self, start_step: int = 0) -> Iterator[DecodedExample]:
        """The examples of all processes one by one, in training order, endless and decoded lazily. Prints the reason
        for each image that it replaces."""
        for step in itertools.count(start_step):
            for row in range(self.batch_size_of(step)):
                bad: list[str] = []
                example = self.loader.load_or_replace(step, row, bad, self.loader.decode_example)
                for reason in bad:
                    tqdm.write(f"  replaced: {reason}")
                yield example

    def iter_dataset(self, start_step: int = 0, stop_step: int = LAST_STEP) -> grain.IterDataset:
        """This process's batches of those steps as a Grain dataset of `Loaded`."""
        return prefetched(grain.MapDataset.range(start_step, stop_step).map(self.loader), self.config)

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """This process's batches from `start_step` on, endless and prefetched.

        The generator's `close()` ends the threads or worker processes; so does dropping the last reference to it.

        Raises InputError, at the batch where it happens, when the share of damaged images exceeds `max_bad_share`.
        """
        iterator = [iter(self.iter_dataset(start_step))]
        generator = _tokenise_and_report_bad(self, iterator)
        # Grain's workers must end before the interpreter does, or they fail noisily and leak shared memory.
        weakref.finalize(generator, iterator.clear)
        return generator


def open_images(
    folder: str | AnyPath,
    *,
    verify: bool = False,
    caption_lines: CaptionLines = CaptionLines.LINES,
    captioned: bool = True,
    label: str | None = None,
    masks: str | None = None,
) -> ImageSource:
    """Opens a folder of images, or a shard set, which may be in a bucket. Refused images are left out and listed.

    verify: decode every image of a folder now; those of a shard set were decoded when it was built.
    caption_lines: what the lines of a `.txt` in a folder are; a shard set already has its captions.
    captioned: whether captions are used. label: a numeric field that is used, as in `open_folder`; masks, too.

    Raises InputError as `open_folder` and `open_shards`, for a folder of images in a bucket, and for masks of a shard
    set.
    """
    folder = located(folder, "data.folder")
    if is_shard_set(folder):
        if masks is not None:
            raise InputError(
                f"data.masks={masks} is for folders of images, and {folder} is a shard set, which holds no masks. Give "
                "the folder that it was built from, or leave the masks out"
            )
        shards = open_shards(folder)
        if captioned and not shards.captioned:
            raise InputError(
                f"{folder} was built without captions (--no-captions), which this training needs. Build a shard set "
                "with captions"
            )
        return shards
    if in_bucket(folder):
        raise InputError(
            f"data.folder={folder} is not a shard set: it has no {DESCRIPTION}. Expected one, since a bucket serves "
            f"images one by one too slowly for training. Build it: `sdxl-jax data build {folder} gs://…/SHARDS`"
        )
    return open_folder(
        folder,
        on_refused=OnRefused.SKIP,
        verify=verify,
        caption_lines=caption_lines,
        captioned=captioned,
        label=label,
        masks=masks,
    )
