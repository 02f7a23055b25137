"""Training with image prompts: the image's embedding in the place of the pooled text. Podell et al. (arXiv:2307.01952),
section 2.6, tune the layer that reads it for 1000 steps.

    cache ── embedding of the crop, by CLIP's image tower ── in the place of the pooled text ── UNet(…)

The layer is `add_embedding`, two matrices (the paper: "a single network layer"). The first one's kernel has rows for
the pooled vector, then for sizes and crop: `pooled_rows_alone` trains the former, whatever the optimiser.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Key

from sdxl_jax.arrays import Batch, Params, flatten, unflatten
from sdxl_jax.conditioning.image import ImageConditioning, in_place_of_pooled
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.config import ImagePromptConfig, TrainConfig
from sdxl_jax.errors import InputError
from sdxl_jax.training.state import partition
from sdxl_jax.training.step import Metrics
from sdxl_jax.weights.lazy import abstract_leaves

KERNEL = "unet/add_embedding/linear_1/kernel"
"""[pooled vector and sizes, features]."""


def check(config: TrainConfig) -> None:
    """Raises InputError where `pooled_rows_alone` is set and another parameter is trainable."""
    if config.image_prompt is None or not config.image_prompt.pooled_rows_alone:
        return
    trained, _ = partition(unflatten(abstract_leaves(config.model)), config.training.trainable, config.training.layers)
    if set(flatten(trained)) != {KERNEL}:
        raise InputError(
            f"image_prompt.pooled_rows_alone trains rows of {KERNEL} and nothing else, but training.trainable="
            f'{",".join(config.training.trainable)}. Set training.trainable=("^{KERNEL}$",)'
        )


def conditioned(
    prompt: TextConditioning, batch: Batch, keys: Key[jax.Array, " batch"], config: ImagePromptConfig
) -> TextConditioning:
    """The text conditioning of a batch with its images' embeddings. keys: one per example."""
    assert batch.encoded is not None and batch.encoded.image_embedding is not None, "the cache holds the embeddings"
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, config.text_dropout))(keys)
    return in_place_of_pooled(prompt, ImageConditioning(batch.encoded.image_embedding, jnp.where(dropped, 0.0, 1.0)))


def norms(batch: Batch) -> Metrics:
    """Mean lengths of both embeddings: that they differ is a part of what is to be learnt."""
    encoded = batch.encoded
    assert encoded is not None and encoded.pooled is not None and encoded.image_embedding is not None

    def length(embedding: Float[jax.Array, "batch projection"]) -> Float[jax.Array, ""]:
        return jnp.linalg.norm(embedding, axis=-1).mean()

    both = [length(jnp.asarray(each, jnp.float32)) for each in (encoded.pooled, encoded.image_embedding)]
    return dict(zip(ImagePromptConfig.NORMS, both, strict=True))


def pooled_rows(params: Params, count: int) -> Params:
    """Parameters that are `KERNEL` alone, of which the first `count` rows have a gradient."""
    kernel = flatten(params)[KERNEL]
    return unflatten({KERNEL: jnp.where(_is_pooled(kernel, count), kernel, jax.lax.stop_gradient(kernel))})


def updating_pooled_rows(optimiser: optax.GradientTransformation, count: int) -> optax.GradientTransformation:
    """An optimiser of `KERNEL` alone that leaves all but its first `count` rows as they are, to the bit: weight decay
    would change them too."""

    def masked(updates: Params, _: Params | None) -> Params:
        # −0, not 0: 0 would turn a parameter of −0 into 0.
        return jax.tree.map(lambda update: jnp.where(_is_pooled(update, count), update, -0.0), updates)

    return optax.chain(optimiser, optax.stateless(cast(Any, masked)))


def _is_pooled(kernel: Float[jax.Array, "rows features"], count: int) -> Bool[jax.Array, "rows 1"]:
    return (jnp.arange(len(kernel)) < count)[:, None]
