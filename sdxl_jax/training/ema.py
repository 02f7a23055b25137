"""Exponential moving average of the parameters: what is sampled from.

average ← d · average + (1 − d) · parameters, with d = min(decay, (1 + n) / (10 + n)) at update n, so that the first
updates are not dominated by the initial parameters (the warm-up of TensorFlow's `ExponentialMovingAverage`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sdxl_jax.arrays import Params


@dataclass(frozen=True)
class EmaConfig:
    decay: float = 0.9999
    """Share of the average that an update keeps, 0 to below 1. Higher: smoother, slower to follow."""


def decay_at(config: EmaConfig, step: Int[jax.Array, ""]) -> Float[jax.Array, ""]:
    """The decay of the update after `step` updates."""
    return jnp.minimum(config.decay, (1.0 + step) / (10.0 + step))


def update(average: Params, params: Params, decay: Float[jax.Array, ""]) -> Params:
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)
