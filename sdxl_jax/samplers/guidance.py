"""Guidance: several outputs of the network, combined into the one that the sampler uses.

    guided = negative + w · (positive − negative)      away from the negative or unconditional output
           + s · (positive − perturbed)                and from the output without self-attention
    output = φ · guided · std(positive) / std(guided) + (1 − φ) · guided

The first line is classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598, eq. 6. The guidance scale w is that of
diffusers and of most programs, where 1 is no guidance. The paper writes (1 + w) ε_c − w ε_u, where 0 is: its w is ours
minus 1.

The second line is perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377; `models/unet.py` perturbs), the
third guidance rescale, Lin et al. (arXiv:2305.08891, section 3.4). Which lines exist is static, their strengths are
traced.

Not here: evaluating the network, and strengths that depend on the timestep: the caller may give another one at each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import type_of_array

Array = jax.Array


class Conditioning(NamedTuple):
    """What the UNet is conditioned on, besides latent and timestep."""

    context: Float[Array, "batch tokens features"] | dict[str, Any] | None
    """Text states and class token, for cross-attention; or what its layers make of them (`models.unet.project_text`).
    None for models without either."""
    vector: Float[Array, "batch vector"] | None
    """Pooled text and micro-conditioning; None for models without it."""
    class_embedding: Float[Array, "batch embedding"] | None = None
    """Added to the embedding of the timestep; None for models without it."""


def join(conditions: Sequence[Conditioning]) -> Conditioning:
    """Concatenated along the batch."""
    return jax.tree.map(lambda *each: jnp.concatenate(each), *conditions)


class Outputs(NamedTuple):
    """Outputs of the network for the same latents: ε, v or x₀, as it was trained."""

    positive: Float[Array, "batch height width channels"]
    """Conditioned on the prompt."""
    negative: Float[Array, "batch height width channels"] | None = None
    """Conditioned on the negative prompt, or unconditional; None: no classifier-free guidance."""
    perturbed: Float[Array, "batch height width channels"] | None = None
    """Conditioned on the prompt, with perturbed self-attention; None: no perturbed-attention guidance."""


def combine(
    outputs: Outputs,
    guidance: Float[type_of_array, "..."] | None = None,
    pag: Float[type_of_array, ""] | None = None,
    phi: Float[type_of_array, ""] | None = None,
) -> Float[Array, "batch height width channels"]:
    """The guided output, as in diffusers' `pag_utils.py` and `rescale_noise_cfg`.

    Args:
        guidance: scale w, one or [batch, 1, 1, 1], used where there is a negative output; 1 is the positive output
            alone, 0 the negative one, which is not what 0 means to users (`sampling.options`).
        pag: scale s, used where there is a perturbed output; 0 is none, 3 is diffusers' default.
        phi: share of guidance rescale, 0..1; None: no rescale, and nothing is computed for it. diffusers leaves it out
            where there is no negative output; this does not.
    """
    positive, negative, perturbed = outputs
    guided = positive
    if negative is not None:
        assert guidance is not None, "a negative output needs a guidance scale"
        guided = negative + guidance * (positive - negative)
    if perturbed is not None:
        assert pag is not None, "a perturbed output needs a scale of pag"
        guided = guided + pag * (positive - perturbed)
    return guided if phi is None else rescale(guided, positive, phi)


def rescale(
    guided: Float[Array, "batch height width channels"],
    positive: Float[Array, "batch height width channels"],
    phi: Float[type_of_array, ""],
) -> Float[Array, "batch height width channels"]:
    """Guidance rescale: a share `phi` (0..1) of the guided output is brought to the standard deviation of the positive
    one, per image.

    Strong guidance enlarges the output, which over-exposes the image. Lin et al., arXiv:2305.08891, section 3.4,
    eq. 15 and 16; diffusers' `rescale_noise_cfg`. An output without deviation, such as the zeros of a fresh network, is
    left as it is; the equation has 0 / 0 there.
    """
    axes = tuple(range(1, guided.ndim))
    std_positive, std_guided = jnp.std(positive, axes, keepdims=True), jnp.std(guided, axes, keepdims=True)
    factor = jnp.where(std_guided > 0, std_positive / jnp.where(std_guided > 0, std_guided, 1), 1)
    phi = jnp.asarray(phi)
    return phi * (guided * factor) + (1 - phi) * guided
