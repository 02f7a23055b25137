"""Classifier-free guidance: away from what the network says without the prompt. Ho & Salimans, arXiv:2207.12598,
eq. 6."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

Array = jax.Array


class Condition(NamedTuple):
    """What the UNet is told besides latent and timestep."""

    context: Float[Array, "batch tokens features"]
    """Text states."""
    vector: Float[Array, "batch vector"] | None
    """Pooled text and micro-conditioning; None for models without it."""


def both(negative: Condition, positive: Condition) -> Condition:
    """One batch of twice the size: negatives first."""
    return jax.tree.map(lambda no, yes: jnp.concatenate([no, yes]), negative, positive)


def guide(
    output: Float[Array, "twice_batch height width channels"], guidance: Float[Array, ""]
) -> Float[Array, "batch height width channels"]:
    """negative + guidance · (positive − negative), of a network output for `both`. Guidance 1 is the positive alone."""
    negative, positive = jnp.split(output, 2)
    return negative + guidance * (positive - negative)
