"""Loads one process's examples of a step: images are read, decoded and cropped; examples of a cache are read.

Every random choice has a generator of its own, seeded with the user's seed, its purpose (order.CROP and so on), and
(step, row of the global batch); fixed crops are seeded with (image, crop) instead. An image that turns out to be
damaged is replaced by the one that follows it in its bucket's order.

Not here: the order (order), prefetching in threads and processes (pipeline).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32

from sdxl_jax.arrays import Batch, EncodedBatch, MicroConditioning
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.cache import Cache, Crop, Text
from sdxl_jax.data.mixture import Mixture, Target
from sdxl_jax.data.order import CHOICE_OF_CAPTION, CHOICE_OF_CROP, CROP, FIXED_CROP, Order
from sdxl_jax.data.record_files import Unavailable
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.transforms import Example, cover_crop, cover_size
from sdxl_jax.errors import InputError, MachineError

_T = TypeVar("_T")
_MAX_CONSECUTIVE_BAD = 100
"""Damaged images in a row in a bucket's order: with that many, the source is to blame."""


class DecodedExample(NamedTuple):
    """One decoded training example, with its image's number and a caption."""

    image: int
    """Number of the image."""
    caption: str
    """The caption chosen from those of the image."""
    example: Example


class CachedExample(NamedTuple):
    """One training example read from a cache."""

    image: int
    """Number of the image."""
    crop: Crop
    text: Text | None
    """None: the cache is of a model without text encoders."""


class Loaded(NamedTuple):
    """A worker's result for one step. The main process tokenises: every worker would import the tokenizers."""

    batch: Batch
    """Without tokens, unless they come from a cache."""
    captions: tuple[str, ...]
    """One per row; empty where the tokens come from a cache."""
    bad: tuple[str, ...]
    """The reasons why images were replaced."""


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads one process's rows of a global batch. It is sent to worker processes."""

    source: Mixture
    order: Order
    buckets: tuple[Bucket, ...]
    config: DataConfig
    process_index: int
    process_count: int
    cache: Cache | None = None
    """Where given, latents and text states are read from it instead of images and captions from the source."""

    def _examples(self, image: int, bucket: Bucket, seeds: Iterable[tuple[int, ...]]) -> list[Example]:
        """The image, resized, cropped and flipped once per seed. Raises InputError where it is damaged."""
        size = self.source.size(image)
        pixels, mask = self.source.pixels(image, cover_size(*size, bucket)), self.source.mask(image)
        if not _can_be_decoded_to(size, pixels.shape):
            raise InputError(
                f"{self.source.name(image)} is decoded to {pixels.shape[0]}×{pixels.shape[1]} (height × width), and "
                f"was {size.height}×{size.width} when it was listed. Bring that file back, or start a new run"
            )
        if mask is not None and mask.shape != size:
            raise InputError(
                f"The mask of {self.source.name(image)} has {mask.shape[0]}×{mask.shape[1]} pixels (height × width), "
                f"and the image {size.height}×{size.width}. Bring back the mask that was listed, or start a new run"
            )
        return [
            cover_crop(
                pixels,
                bucket,
                original_size=size,
                rng=self._rng(*seed),
                crop=self.config.crop,
                flip_probability=self.config.flip_probability,
                mask=mask,
            )
            for seed in seeds
        ]

    def fixed_crops(self, image: int, crops: Iterable[int], bucket: Bucket) -> list[Example]:
        """Those of the image's fixed crops (data.crops_per_image), by their numbers."""
        return self._examples(image, bucket, [(FIXED_CROP, image, crop) for crop in crops])

    def decode_example(self, step: int, row: int, position: int) -> DecodedExample:
        """The example of one row of a step: crop, flip and caption follow from the seed, the step and the row.

        position: of the image in `order.numbers`. Raises InputError where it is damaged.
        """
        image, bucket = int(self.order.numbers[position]), self.buckets[self.order.bucket(step)]
        crops = self.config.crops_per_image
        if crops is None:
            (example,) = self._examples(image, bucket, [(CROP, step, row)])
        else:
            (example,) = self.fixed_crops(image, [self._choose(crops, CHOICE_OF_CROP, step, row)], bucket)
        captions = self.source.captions(image)
        return DecodedExample(image, captions[self._choose(len(captions), CHOICE_OF_CAPTION, step, row)], example)

    def read_cached(self, step: int, row: int, position: int) -> CachedExample:
        """As `decode_example`, from the cache."""
        assert self.cache is not None
        crop, captions = self.cache.crop(position, self._choose(self.cache.crops, CHOICE_OF_CROP, step, row))
        text = captions[self._choose(len(captions), CHOICE_OF_CAPTION, step, row)] if self.cache.towers else None
        return CachedExample(int(self.order.numbers[position]), crop, text)

    def _rng(self, *seed: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, *seed))

    def _choose(self, count: int, *seed: int) -> int:
        return int(self._rng(*seed).integers(count))

    def load_or_replace(self, step: int, row: int, bad: list[str], load: Callable[[int, int, int], _T]) -> _T:
        """load(step, row, position) of the row's image or, where it is damaged, of the next usable one in its bucket's
        order. Appends the reason for each damaged image to `bad`.

        Raises InputError or MachineError, as the last image did, where too many in a row are damaged; Unavailable where
        the storage does not answer.
        """
        bucket = self.order.bucket(step)
        bad_before, kind = len(bad), InputError
        for instead in range(min(self.order.buckets[bucket].places, _MAX_CONSECUTIVE_BAD)):
            position = self.order.position(step, row, instead=instead)
            try:
                return load(step, row, position)
            except Unavailable:
                raise
            except (InputError, MachineError) as problem:
                kind = type(problem)
                bad.append(str(problem))
        height, width = self.buckets[bucket]
        raise kind(
            f"{len(bad) - bad_before} images of the bucket {height}×{width} in a row are damaged. The last one: "
            f"{bad[-1]}"
        )

    def rows(self, step: int) -> range:
        """The rows of a step's global batch that this process loads."""
        share = self.order.buckets[self.order.bucket(step)].batch_size // self.process_count
        return range(self.process_index * share, (self.process_index + 1) * share)

    def __call__(self, step: int) -> Loaded:
        bad: list[str] = []
        replaced = []

        def load_rows(load: Callable[[int, int, int], _T]) -> list[_T]:
            examples = []
            for row in self.rows(step):
                bad_before = len(bad)
                examples.append(self.load_or_replace(step, row, bad, load))
                replaced.append(len(bad) > bad_before)
            return examples

        if self.cache is None:
            decoded = load_rows(self.decode_example)
            batch, captions = self._decoded_batch(decoded), tuple(one.caption for one in decoded)
        else:
            batch, captions = self._cached_batch(load_rows(self.read_cached)), ()
        return Loaded(batch._replace(replaced=np.array(replaced)), captions, tuple(bad))

    def _decoded_batch(self, decoded: list[DecodedExample]) -> Batch:
        examples = [one.example for one in decoded]
        images = np.stack([example.image for example in examples])
        batch = self._empty_batch([one.image for one in decoded], examples)._replace(image=images)
        if not self.source.has_masks:
            return batch
        white = np.full(images.shape[1:3], 255, np.uint8)
        return batch._replace(mask=np.stack([white if each.mask is None else each.mask for each in examples]))

    def _cached_batch(self, cached: list[CachedExample]) -> Batch:
        crops, texts = [one.crop for one in cached], [one.text for one in cached if one.text is not None]
        pooled = [text.pooled for text in texts if text.pooled is not None]
        embeddings = [crop.embedding for crop in crops if crop.embedding is not None]
        return self._empty_batch([one.image for one in cached], crops)._replace(
            tokens={
                name: np.stack([text.tokens[name] for text in texts]) for name in (texts[0].tokens if texts else ())
            },
            encoded=EncodedBatch(
                mean=np.stack([crop.mean for crop in crops]),
                log_variance=np.stack([crop.log_variance for crop in crops]),
                context=np.stack([text.context for text in texts]) if texts else None,
                pooled=np.stack(pooled) if pooled else None,
                image_embedding=np.stack(embeddings) if embeddings else None,
            ),
        )

    def _empty_batch(self, images: list[int], examples: Sequence[Example | Crop]) -> Batch:
        """A batch with micro-conditioning and the images' numbers, without images, tokens and latents."""
        micro = MicroConditioning(
            original_size=np.stack([example.original_size for example in examples]),
            crop_top_left=np.stack([example.crop_top_left for example in examples]),
            target_size=np.stack([example.target_size for example in examples]),
            aesthetic_score=self._scores(images),
        )
        return Batch(
            image=None,
            tokens={},
            micro=micro,
            example=np.array(images, np.int32),
            replaced=np.zeros(len(images), bool),
            label=self._labels(images),
            loss_weight=self._loss_weights(images),
            base_target=self._base_targets(images),
        )

    def _scores(self, images: list[int]) -> Float32[np.ndarray, " images"] | None:
        name = self.config.aesthetic
        return None if name is None else np.array([self.source.number(image, name) for image in images], np.float32)

    def _loss_weights(self, images: list[int]) -> Float32[np.ndarray, " images"] | None:
        if self.source.loss_weights is None:
            return None
        return np.array([self.source.loss_weight(image) for image in images], np.float32)

    def _base_targets(self, images: list[int]) -> Bool[np.ndarray, " images"] | None:
        if self.source.targets is None:
            return None
        return np.array([self.source.target(image) is Target.BASE for image in images])

    def _labels(self, images: list[int]) -> Int32[np.ndarray, " images"] | None:
        name = self.config.label
        return None if name is None else np.array([self.source.number(image, name) for image in images], np.int32)


def _can_be_decoded_to(size: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether `images.decode` can give that shape for an image of that size, at full size or downscaled."""
    return any(shape[:2] == tuple(-(-side * eighths // 8) for side in size) for eighths in (8, 4, 3, 2, 1))
