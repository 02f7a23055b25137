"""The settings of the data: what is trained on, and in which shapes and order."""

import dataclasses
import enum
import math

from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.data.transforms import CropMode


class SmallBuckets(enum.Enum):
    """What becomes of a bucket with fewer images than a batch."""

    PAD = "pad"
    """It collects those of several epochs until they fill one, which holds each image several times."""
    MERGE = "merge"
    """They go to the bucket of the nearest aspect ratio, cropped harder."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and in which shapes and order."""

    folder: str | None = None
    """Folder of images with captions, or a shard set of `sdxl-jax data build`."""
    sources: tuple[Source, ...] = ()
    """Several of them, with weights, in place of `folder`."""
    caption_lines: CaptionLines = CaptionLines.LINES
    """What the lines of a `.txt` beside an image are: captions, one each, or one caption together. Of shards it is said
    when they are built."""
    buckets: tuple[tuple[int, int], ...] = SDXL_BUCKETS
    """Sizes (height, width) that batches come in. More: less is cropped away, more is compiled and left over."""
    max_aspect_distance: float = math.log(2)
    """Images whose |ln aspect| is farther than this from the nearest bucket are refused: at ln 2 the crop would take
    half of them. Higher: stranger shapes are trained on, cropped harder."""
    small_buckets: SmallBuckets = SmallBuckets.PAD
    """What becomes of a bucket with fewer images than a batch: it collects those of several epochs until they fill one,
    which holds each image several times; or they go to the bucket of the nearest aspect ratio, cropped harder."""
    min_size: int = 1
    """Images whose shorter side has fewer pixels are left out, and counted. Higher: less is trained on, nothing
    blurred by enlarging; the model is told each image's size, so that it need not be high."""
    batch_size: int = 8
    """Images a step, over all processes. Higher: fewer, steadier, costlier steps, more left over in each bucket."""
    batch_pixels: int | None = None
    """Pixels a step: a bucket's batches have as many images as fit, in multiples of batch_size. None: batch_size."""
    crop: CropMode = CropMode.RANDOM
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
    on_refused: OnRefused = OnRefused.ERROR
    """Files that cannot be used: stop and name them, or skip them (counted and listed)."""
    verify_images: bool = True
    """Decode every image before the work starts, so that damaged ones are refused and not met during training. Costs a
    pass over all images: turn it off for a large folder that is known to be good."""
    max_bad_share: float = 0.01
    """Images that turn out to be damaged while training are named and replaced. A run with a larger share of them among
    its examples, of 1000 at least, stops; every process counts its own. 0: the first one stops it."""
    seed: int = 0
    """Order, crops and flips follow from it, 0 to 2³² − 1."""
    workers: int = 0
    """Processes that decode; 0 decodes in threads of this one. Higher: more images a second until the cores are busy,
    more memory."""
    read_ahead: int = 4
    """Batches decoded ahead, one thread each, in each process. Higher: more images a second, more memory."""
