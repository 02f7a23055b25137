"""The optimiser and its learning rate, from optax.

Gradients are clipped by their global norm, over all parameters at once. Weight decay applies to kernels and embeddings,
not to biases and norms.
"""

import enum
from dataclasses import dataclass

import jax
import optax

from sdxl_jax.arrays import Params


class Decay(enum.Enum):
    """The learning rate after the warm-up."""

    CONSTANT = "constant"
    """Stays."""
    COSINE = "cosine"
    """Falls to zero at the last step, along half a cosine."""


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW. Loshchilov & Hutter, arXiv:1711.05101."""

    learning_rate: float = 1e-4
    """The rate after the warm-up. Higher: faster, until the loss jumps."""
    warmup_steps: int = 1000
    """Steps over which the rate rises from 0. Higher: calmer start."""
    decay: Decay = Decay.CONSTANT
    """The rate after the warm-up."""
    beta1: float = 0.9
    """Decay of the gradient's moving average. Higher: smoother direction."""
    beta2: float = 0.999
    """Decay of the squared gradient's moving average. Higher: steadier step sizes."""
    epsilon: float = 1e-8
    """Added to the root of the second moment. Higher: smaller steps where gradients are tiny."""
    weight_decay: float = 1e-2
    """Share of each kernel taken off at a learning rate of 1. Higher: smaller weights."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping. Lower: outliers count less."""
    accumulate: int = 1
    """Micro-batches a step. Higher: less memory for the same batch, a little slower."""


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Rate at each step. `steps`: the run's length, which COSINE needs."""
    match config.decay:
        case Decay.CONSTANT:
            after = optax.constant_schedule(config.learning_rate)
        case Decay.COSINE:
            after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - config.warmup_steps))
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    # Update n uses rate n + 1: the first update of a warm-up would otherwise do nothing.
    return optax.join_schedules([lambda step: warmup(step + 1), after], [config.warmup_steps])


def make(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    def decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
