"""Micro-conditioning: the conditioning vector of pooled text, then sizes and positions as sinusoidal embeddings. Their
order is defined here alone.

    SDXL base      pooled 1280 | original height, width | crop top, left | target height, width
                   1280 + 6 · 256 = 2816
    SDXL refiner   pooled 1280 | original height, width | crop top, left | aesthetic score
                   1280 + 5 · 256 = 2560

Podell et al. (arXiv:2307.01952), sections 2.2 and 2.3; the refiner's in sgm `configs/inference/sd_xl_refiner.yaml`. The
numbers stay integers until they are embedded in float32: bfloat16 would turn 333 into 332.
"""

import enum
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from sdxl_jax.arrays import MicroConditioning
from sdxl_jax.models.layers import sinusoidal_embedding


class Numbers(enum.Enum):
    """Which numbers a model is conditioned on."""

    SIZE_CROP_TARGET = "size_crop_target"
    """Original size, crop, target size: SDXL base."""
    SIZE_CROP_AESTHETIC = "size_crop_aesthetic"
    """Original size, crop, aesthetic score: SDXL refiner."""


@dataclass(frozen=True)
class MicroConfig:
    numbers: Numbers = Numbers.SIZE_CROP_TARGET
    """Which numbers, in which order."""
    embedding_dim: int = 256
    """Width of each number's embedding."""

    @property
    def vector_dim(self) -> int:
        """Width that the embeddings add to the pooled text."""
        return self.embedding_dim * (6 if self.numbers is Numbers.SIZE_CROP_TARGET else 5)


AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""The refiner's aesthetic scores for the prompt and the negative prompt, unless the user gives others."""


def vector(
    config: MicroConfig, pooled: Float[jax.Array, "batch projection"], micro: MicroConditioning
) -> Float[jax.Array, "batch vector"]:
    """The conditioning vector, float32."""
    numbers = [micro.original_size, micro.crop_top_left]
    if config.numbers is Numbers.SIZE_CROP_TARGET:
        numbers.append(micro.target_size)
    else:
        assert micro.aesthetic_score is not None, "this model is conditioned on an aesthetic score"
        numbers.append(micro.aesthetic_score[:, None])
    row = jnp.concatenate([jnp.asarray(number, jnp.float32) for number in numbers], axis=-1)
    embedded = sinusoidal_embedding(row, config.embedding_dim)
    return jnp.concatenate([pooled, rearrange(embedded, "batch numbers dim -> batch (numbers dim)")], axis=-1)
