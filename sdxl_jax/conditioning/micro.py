"""Micro-conditioning: the conditioning vector of pooled text, then sizes and positions as sinusoidal embeddings. Their
order is defined here alone.

    SDXL base      pooled 1280 | original height, width | crop top, left | target height, width
                   1280 + 6 · 256 = 2816
    SDXL refiner   pooled 1280 | original height, width | crop top, left | aesthetic score
                   1280 + 5 · 256 = 2560
    sgm, ImageNet  original height, width | crop top, left
                   4 · 256 = 1024

A condition is one of the columns between the bars. It is dropped by zeros in place of its embeddings, as in sgm; that
is not the embedding of the number 0.

Podell et al. (arXiv:2307.01952), sections 2.2 and 2.3; the refiner's in sgm `configs/inference/sd_xl_refiner.yaml`. The
numbers stay integers until they are embedded in float32: bfloat16 would turn 333 into 332.
"""

import enum
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Key

from sdxl_jax.arrays import MicroConditioning
from sdxl_jax.conditioning.dropout import dropped_rows
from sdxl_jax.models.layers import sinusoidal_embedding


class Numbers(enum.Enum):
    """Which numbers a model is conditioned on."""

    SIZE_CROP_TARGET = "size_crop_target"
    """Original size, crop, target size: SDXL base."""
    SIZE_CROP_AESTHETIC = "size_crop_aesthetic"
    """Original size, crop, aesthetic score: SDXL refiner."""
    SIZE_CROP = "size_crop"
    """Original size, crop: sgm's class-conditional ImageNet models."""

    @property
    def widths(self) -> tuple[int, ...]:
        """How many numbers each condition has."""
        return {Numbers.SIZE_CROP_TARGET: (2, 2, 2), Numbers.SIZE_CROP_AESTHETIC: (2, 2, 1), Numbers.SIZE_CROP: (2, 2)}[
            self
        ]


@dataclass(frozen=True)
class MicroConfig:
    numbers: Numbers = Numbers.SIZE_CROP_TARGET
    """Which numbers, in which order."""
    embedding_dim: int = 256
    """Width of each number's embedding."""

    @property
    def vector_dim(self) -> int:
        """Width that the embeddings add to the pooled text."""
        return self.embedding_dim * sum(self.numbers.widths)


AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""The refiner's aesthetic scores for the prompt and the negative prompt, unless the user gives others."""


def vector(
    config: MicroConfig, pooled: Float[jax.Array, "batch projection"] | None, micro: MicroConditioning
) -> Float[jax.Array, "batch vector"]:
    """The conditioning vector, float32. pooled: None for models without text."""
    numbers = [micro.original_size, micro.crop_top_left]
    if config.numbers is Numbers.SIZE_CROP_TARGET:
        numbers.append(micro.target_size)
    elif config.numbers is Numbers.SIZE_CROP_AESTHETIC:
        assert micro.aesthetic_score is not None, "this model is conditioned on an aesthetic score"
        numbers.append(micro.aesthetic_score[:, None])
    row = jnp.concatenate([jnp.asarray(number, jnp.float32) for number in numbers], axis=-1)
    embedded = sinusoidal_embedding(row, config.embedding_dim)
    if micro.kept is not None:
        kept = jnp.repeat(jnp.asarray(micro.kept), np.array(config.numbers.widths), axis=1)
        embedded = embedded * kept[..., None]
    flat = rearrange(embedded, "batch numbers dim -> batch (numbers dim)")
    return flat if pooled is None else jnp.concatenate([pooled, flat], axis=-1)


def drop(
    config: MicroConfig, micro: MicroConditioning, keys: Key[jax.Array, " batch"], probability: float
) -> MicroConditioning:
    """Conditioning dropout: every condition is dropped with the given probability, independently of the others. keys:
    one per example."""
    conditions = range(len(config.numbers.widths))
    each = (jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(keys) for number in conditions)
    dropped = jnp.stack([dropped_rows(own, probability) for own in each], axis=1)
    return micro._replace(kept=1.0 - dropped)
