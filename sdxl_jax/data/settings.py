"""The configuration section `data`: what is trained on, and in which sizes and order."""

import dataclasses
import enum
import math

from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.data.transforms import CropMode


class SmallBuckets(enum.Enum):
    """What to do with a bucket that has fewer images than a batch."""

    PAD = "pad"
    """Collect the images of several epochs until they fill a batch, which then holds each image several times."""
    MERGE = "merge"
    """Move its images to the bucket of the nearest aspect ratio, where they are cropped harder."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and in which sizes and order."""

    folder: str | None = None
    """Folder of captioned images, or a shard set of `sdxl-jax data build`, which may be in a bucket (gs://…)."""
    sources: tuple[Source, ...] = ()
    """Several folders or shard sets, each with a weight, in place of `folder`."""
    caption_lines: CaptionLines = CaptionLines.LINES
    """What the lines of a `.txt` beside an image are: one caption each, or together one caption. A shard set takes this
    from its build (`sdxl-jax data build --caption-lines`)."""
    buckets: tuple[tuple[int, int], ...] = SDXL_BUCKETS
    """Sizes (height, width) in pixels that batches come in. More buckets: less is cropped away, more is compiled, and
    more images are left over when buckets are cut into batches."""
    max_aspect_distance: float = math.log(2)
    """Images whose ln(aspect ratio) is farther than this from the nearest bucket's are refused: at ln 2 the crop would
    take half of the image. Higher: more extreme aspect ratios are trained on, cropped harder."""
    small_buckets: SmallBuckets = SmallBuckets.PAD
    """What to do with a bucket that has fewer images than a batch: collect the images of several epochs until they fill
    a batch, which then holds each image several times; or move them to the bucket of the nearest aspect ratio, where
    they are cropped harder."""
    min_size: int = 1
    """Images whose shorter side has fewer pixels are left out, and counted. Higher: fewer images, none blurred by
    upscaling. It need not be high: the UNet is conditioned on each image's original size."""
    batch_size: int = 8
    """Images per step, over all processes. Higher: fewer and costlier steps with less gradient noise, and more images
    left over in each bucket."""
    batch_pixels: int | None = None
    """Pixels per step: each bucket's batches have as many images as fit, in multiples of batch_size. None: batch_size
    images in every bucket. Higher: as for batch_size."""
    crop: CropMode = CropMode.RANDOM
    """Where the crop lies along the axis on which the resized image is longer than the bucket."""
    crops_per_image: int | None = None
    """Fixed crops (with their flips) per image, one of which is chosen at random each time, as a cache holds them.
    None: a new random crop each time. Higher: more variety, a larger cache."""
    flip_probability: float = 0.0
    """Probability that an image is mirrored left to right, 0 to 1. Higher: more variety, but mirrored letters, and left
    and right mixed up."""
    aesthetic: str | None = None
    """Name of the numeric field that holds each image's aesthetic score, on which the refiner is conditioned. Images
    without it are refused."""
    label: str | None = None
    """Name of the numeric field that holds the number of each image's class, 0, 1, …, on which a class-conditional
    model is conditioned; "folder": the classes are the subfolders, of all sources, in alphabetical order (in a shard
    set, if it was built with --class-folders). Images without a class are refused."""
    cache: str | None = None
    """Cache written by `sdxl-jax data encode`, which may be in a bucket (gs://…): latents and text states are read from
    it, and no image is decoded."""
    cache_of_other_code: bool = False
    """Read a cache that another version of this code wrote: after an update that does not change what is encoded."""
    on_refused: OnRefused = OnRefused.ERROR
    """What to do with files that cannot be used: stop and name them, or skip them (counted and listed)."""
    verify_images: bool = True
    """Decode every image before training starts, so that damaged ones are refused then, and not found during training.
    Costs one pass over all images: turn it off for a large folder that is known to be good."""
    max_bad_share: float = 0.01
    """Largest share of damaged images among the training examples, 0 to 1. Images that turn out damaged during training
    are named and replaced; beyond this share (of 1000 examples at least; every process counts its own) the run stops.
    0: the first damaged image stops it."""
    seed: int = 0
    """Seed of the order, crops, flips and choice of captions, 0 to 2³² − 1."""
    workers: int = 0
    """Worker processes that decode; 0: decode in threads of the training process. Higher: more images per second until
    the cores are busy, more memory."""
    read_ahead: int = 4
    """Batches prefetched by each process, decoded in one thread each. Higher: more images per second, more memory."""
    masks: str | None = None
    """How much each part of an image of `folder` counts in the loss: "alpha", its alpha channel; or a folder with one
    mask per image, of the same relative path (with any extension) and size, in which white counts wholly and black not
    at all. None: all of it counts. The loss of an image does not depend on how much of it does."""
    caption_template: str | None = None
    """What the captions of `folder` are made into: text with {caption}, the image's own, and {trigger}, e.g. "a photo
    of {trigger}, {caption}". Without {caption} it is the caption of every image, and images need none. None: captions
    as they are."""
    trigger: str | None = None
    """The words that {trigger} is in all templates, e.g. "sks dog"; also written to the file of an adapter."""

    @property
    def every_source(self) -> tuple[Source, ...]:
        """The sources; `folder` is one."""
        of_folder = Source(self.folder or "", masks=self.masks, caption_template=self.caption_template)
        return self.sources or (of_folder,)
