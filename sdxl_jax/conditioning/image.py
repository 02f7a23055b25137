"""Images as prompts: the embedding of an image, by CLIP's image tower, in the place of the pooled text.

    images ── image tower ── embeddings ── [noise] ── × strength, summed ── pooled vector
    text ───────────────────────────────────────────── or zeros ─────────── context

The two towers of a CLIP share the space of their embeddings, so that the layer which reads the pooled text reads the
image's embedding too: zero-shot as in Stability's Revision, better after it was tuned to (Podell et al.,
arXiv:2307.01952, section 2.6). The embedding is not scaled to unit length, just as the pooled text is not.

Noise, strength and sum are those of ComfyUI's SDXL (`model_base.py`, `unclip_adm`), with two differences: noise 0 is no
noise, where ComfyUI adds that of level 0 (σ 0.006), to the sum as well; and the noise differs from image to image.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from sdxl_jax.arrays import type_of_array
from sdxl_jax.conditioning.text import TextConditioning

_LEVELS = 1000


class ImageConditioning(NamedTuple):
    """What takes the place of text conditioning, or of its pooled vector alone."""

    embedding: Float[type_of_array, "batch projection"]
    """In the place of the pooled text."""
    has_text: Float[type_of_array, " batch"]
    """1 where the context stays the text's, 0 where it is zeros: the image alone."""


def in_place_of_pooled(text: TextConditioning, image: ImageConditioning) -> TextConditioning:
    """The conditioning on an image, with or without text."""
    assert text.context is not None, "a model with pooled text has text encoders"
    return TextConditioning(text.context * image.has_text[:, None, None], jnp.asarray(image.embedding, jnp.float32))


def summed(
    embeddings: Float[type_of_array, "batch prompts projection"],
    strengths: Float[type_of_array, "batch prompts"],
    noise: float,
    keys: Key[jax.Array, " batch"],
) -> Float[jax.Array, "batch projection"]:
    """Image prompts as one vector per image: each with noise, times its strength, added up.

    noise: 0 to 1, the fraction of the noise schedule; 0: none. keys: one per image. Further prompts with strength 0
    change nothing, not even the others' noise.
    """

    def one(
        embeddings: Float[jax.Array, "prompts projection"],
        strengths: Float[jax.Array, " prompts"],
        key: Key[jax.Array, ""],
    ) -> Float[jax.Array, " projection"]:
        fresh = jax.random.normal(key, embeddings.shape)
        kept = alpha_bar(round(noise * (_LEVELS - 1)))
        noised = math.sqrt(kept) * embeddings + math.sqrt(1 - kept) * fresh if noise else embeddings
        return jnp.einsum("nd,n->d", noised, strengths, precision=jax.lax.Precision.HIGHEST)

    return jax.vmap(one)(jnp.asarray(embeddings, jnp.float32), jnp.asarray(strengths, jnp.float32), keys)


def alpha_bar(level: int) -> float:
    """ᾱ of a level of the cosine schedule, 0 to 999, each of whose β is at most 0.999. Nichol & Dhariwal,
    arXiv:2102.09672, eq. 17."""
    times = np.arange(_LEVELS + 1) / _LEVELS
    curve = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    return float(np.prod(1 - betas[: level + 1]))
