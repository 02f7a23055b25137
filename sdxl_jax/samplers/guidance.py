"""Guidance: from what the network says in several ways to the one output that the sampler goes on with.

    guided = negative + w · (positive − negative)      away from what it says without the prompt
           + s · (positive − perturbed)                and from what it says without self-attention
    output = φ · guided · std(positive) / std(guided) + (1 − φ) · guided

The first line is classifier-free guidance (Ho & Salimans, arXiv:2207.12598, eq. 6), the second perturbed-attention
guidance (Ahn et al. 2024, arXiv:2403.17377; `models/unet.py` perturbs), the third the rescaling of Lin et al.
(arXiv:2305.08891, section 3.4). Which lines exist is static, how strong they are is traced.

Not here: evaluating the network, and strengths that depend on the timestep: the caller may give another one at each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import type_of_array

Array = jax.Array


class Conditioning(NamedTuple):
    """What the UNet is told besides latent and timestep."""

    context: Float[Array, "batch tokens features"]
    """Text states."""
    vector: Float[Array, "batch vector"] | None
    """Pooled text and micro-conditioning; None for models without it."""


def join(conditions: Sequence[Conditioning]) -> Conditioning:
    """One batch of them all, in turn."""
    return jax.tree.map(lambda *each: jnp.concatenate(each), *conditions)


class Outputs(NamedTuple):
    """What the network said of the same latents: ε, v or x₀, as it was trained."""

    positive: Float[Array, "batch height width channels"]
    """Of the prompt."""
    negative: Float[Array, "batch height width channels"] | None = None
    """Of the negative prompt; None: no classifier-free guidance."""
    perturbed: Float[Array, "batch height width channels"] | None = None
    """Of the prompt, self-attention perturbed; None: no perturbed-attention guidance."""


def combine(
    outputs: Outputs,
    guidance: Float[type_of_array, ""] | None = None,
    pag: Float[type_of_array, ""] | None = None,
    phi: Float[type_of_array, ""] | None = None,
) -> Float[Array, "batch height width channels"]:
    """The guided output, as diffusers has it in `pag_utils.py` and `rescale_noise_cfg`.

    guidance: strength w, read where there are negatives; 1 is the positive alone, 0 the negative, which is not what 0
    means to users (`sampling.options`). pag: strength s, read where there are
    perturbed ones; 0 is none, 3 diffusers' default. phi: 0..1, how much is rescaled; None: nothing is, and nothing is
    computed for it. diffusers leaves rescaling out where there are no negatives; this does what it is given.
    """
    positive, negative, perturbed = outputs
    guided = positive
    if negative is not None:
        assert guidance is not None, "there are negatives, and no strength of guidance"
        guided = negative + guidance * (positive - negative)
    if perturbed is not None:
        assert pag is not None, "there are perturbed outputs, and no strength of pag"
        guided = guided + pag * (positive - perturbed)
    return guided if phi is None else rescale(guided, positive, phi)


def rescale(
    guided: Float[Array, "batch height width channels"],
    positive: Float[Array, "batch height width channels"],
    phi: Float[type_of_array, ""],
) -> Float[Array, "batch height width channels"]:
    """Guided outputs with a share `phi` (0..1) of them brought to each positive's standard deviation.

    Strong guidance enlarges the output, which over-exposes the image. Lin et al., arXiv:2305.08891, section 3.4,
    eq. 15 and 16; diffusers' `rescale_noise_cfg`. An output without deviation, such as a fresh network's zeros, stays
    as it is; there it would be 0 / 0.
    """
    axes = tuple(range(1, guided.ndim))
    wanted, given = jnp.std(positive, axes, keepdims=True), jnp.std(guided, axes, keepdims=True)
    factor = jnp.where(given > 0, wanted / jnp.where(given > 0, given, 1), 1)
    phi = jnp.asarray(phi)
    return phi * (guided * factor) + (1 - phi) * guided
