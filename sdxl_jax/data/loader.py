"""One step's examples of one process: read, decoded, cropped; or, of a cache, read.

Every choice has a generator of its own, seeded with the user's seed, what it is for (order.CROP and so on), and (step,
row of the global batch); where each image has a fixed number of crops, these with (image, crop). An image that turns
out to be damaged is replaced by the one that follows it in its bucket's order.

Not here: the order (order), running ahead in threads and processes (pipeline).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32

from sdxl_jax.arrays import Batch, EncodedBatch, MicroConditioning
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.cache import Cache, Crop, Text
from sdxl_jax.data.mixture import Mixture
from sdxl_jax.data.order import CHOICE_OF_CAPTION, CHOICE_OF_CROP, CROP, FIXED_CROP, Order
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.transforms import Example, cover_crop, cover_size
from sdxl_jax.errors import InputError, MachineError

_T = TypeVar("_T")
_IN_A_ROW = 100
"""Bad images that follow each other in a bucket's order: then it is the source that is bad."""


class DecodedExample(NamedTuple):
    """One example, with where it is from."""

    image: int
    """Its number."""
    caption: str
    """The one of its captions that is told this time."""
    example: Example


class CachedExample(NamedTuple):
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
    """Decodes one process's rows of a global batch. Sent to worker processes."""

    source: Mixture
    order: Order
    buckets: tuple[Bucket, ...]
    config: DataConfig
    process_index: int
    process_count: int
    cache: Cache | None = None
    """Read instead of the source's images and captions."""

    def _examples(self, image: int, bucket: Bucket, seeds: Iterable[tuple[int, ...]]) -> list[Example]:
        """The image, resized, cropped and flipped as each of the seeds says. InputError where it is damaged."""
        size = self.source.size(image)
        pixels = self.source.pixels(image, cover_size(*size, bucket))
        if not _same_image(size, pixels.shape):
            raise InputError(
                f"{self.source.name(image)} has the shape {pixels.shape[:2]} now, and had {tuple(size)} when it was "
                "listed"
            )
        return [
            cover_crop(
                pixels,
                bucket,
                original_size=size,
                rng=self._rng(*seed),
                crop=self.config.crop,
                flip_probability=self.config.flip_probability,
            )
            for seed in seeds
        ]

    def fixed(self, image: int, crops: Iterable[int], bucket: Bucket) -> list[Example]:
        """Some of the crops that the image has where their number is fixed."""
        return self._examples(image, bucket, [(FIXED_CROP, image, crop) for crop in crops])

    def draw(self, step: int, row: int, position: int) -> DecodedExample:
        """The example of one row of a step: crop, flip and caption follow from the seed, the step and the row."""
        image, bucket = int(self.order.numbers[position]), self.buckets[self.order.bucket(step)]
        crops = self.config.crops_per_image
        if crops is None:
            (example,) = self._examples(image, bucket, [(CROP, step, row)])
        else:
            (example,) = self.fixed(image, [self._choose(crops, CHOICE_OF_CROP, step, row)], bucket)
        captions = self.source.captions(image)
        return DecodedExample(image, captions[self._choose(len(captions), CHOICE_OF_CAPTION, step, row)], example)

    def read(self, step: int, row: int, position: int) -> CachedExample:
        """The same of the cache."""
        assert self.cache is not None
        crop, captions = self.cache.crop(position, self._choose(self.cache.crops, CHOICE_OF_CROP, step, row))
        text = captions[self._choose(len(captions), CHOICE_OF_CAPTION, step, row)]
        return CachedExample(int(self.order.numbers[position]), crop, text)

    def _rng(self, *seed: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, *seed))

    def _choose(self, count: int, *seed: int) -> int:
        return int(self._rng(*seed).integers(count))

    def good(self, step: int, row: int, bad: list[str], draw: Callable[[int, int, int], _T]) -> _T:
        """draw(step, row, position) of the first of the row's image, and those that follow it in the bucket's order,
        that is not bad; why the others are goes into `bad`."""
        bucket = self.order.bucket(step)
        before, kind = len(bad), InputError
        for instead in range(min(self.order.buckets[bucket].places, _IN_A_ROW)):
            position = self.order.position(step, row, instead=instead)
            try:
                return draw(step, row, position)
            except (InputError, MachineError) as problem:
                kind = type(problem)
                bad.append(str(problem))
        height, width = self.buckets[bucket]
        raise kind(
            f"{len(bad) - before} images of the bucket {height}×{width} in a row are bad. The last one: {bad[-1]}"
        )

    def rows(self, step: int) -> range:
        """This process's rows of a step's global batch."""
        share = self.order.buckets[self.order.bucket(step)].batch_size // self.process_count
        return range(self.process_index * share, (self.process_index + 1) * share)

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

    def _decoded(self, drawn: list[DecodedExample]) -> Batch:
        examples = [one.example for one in drawn]
        images = np.stack([example.image for example in examples])
        return Batch(image=images, tokens={}, **self._told([one.image for one in drawn], examples))

    def _encoded(self, read: list[CachedExample]) -> Batch:
        crops, texts = [one.crop for one in read], [one.text for one in read]
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Batch(
            image=None,
            tokens={name: np.stack([text.tokens[name] for text in texts]) for name in texts[0].tokens},
            encoded=EncodedBatch(
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


def _same_image(size: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether an image of that size can have been decoded to that shape: whole, or shrunk as `images.decode` does."""
    return any(shape[:2] == tuple(-(-side * eighths // 8) for side in size) for eighths in (8, 4, 3, 2, 1))
