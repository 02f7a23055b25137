"""The train step with a loss of two parameters, for tests of everything but the networks."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jaxtyping import Float

from sdxl_jax.arrays import Batch, MicroConditioning, Params
from sdxl_jax.config import TrainConfig
from sdxl_jax.optim import optimiser
from sdxl_jax.training.state import TrainState, create
from sdxl_jax.training.step import Loss, Metrics, make_step

STEPS = 6
PARAMS = {"unet": {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array(3.0)}}


def loss(trained: Params, frozen: Params, batch: Any, keys: Any) -> tuple[Float[jax.Array, ""], Metrics]:
    """Mean squared error with noise of its own per example, as in the real loss."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    x = jnp.asarray(batch.example, jnp.float32)[:, None] + noise
    return jnp.mean((x * trained["unet"]["kernel"] + trained["unet"]["bias"] - 1) ** 2), {}


def batch() -> Batch:
    """Eight examples."""
    zeros = np.zeros((8, 2), np.int32)
    micro, example = MicroConditioning(zeros, zeros, zeros), np.arange(8, dtype=np.int32)
    return Batch(np.zeros((8, 1, 1, 3), np.uint8), {}, micro, example, np.zeros(8, bool))


def config(**options: Any) -> TrainConfig:
    """The configuration of `tiny`, with these options of the optimiser."""
    base = tiny.train_config(Path("unused"))
    return dataclasses.replace(base, optimiser=dataclasses.replace(base.optimiser, **options))


def stepped(config: TrainConfig, count: int = 1, loss: Loss = loss) -> tuple[list[TrainState], list[Metrics]]:
    """The states before and after each step, and the metrics of each."""
    update = optimiser.make_optimiser(config.optimiser, STEPS)
    step = jax.jit(make_step(config, update, loss))
    states, metrics = [create(PARAMS, update, config.ema)], []
    for _ in range(count):
        state, numbers = step(states[-1], {}, batch())
        states.append(state)
        metrics.append(numbers)
    return states, metrics


def steps(config: TrainConfig, count: int = 1) -> list[TrainState]:
    """The states before and after each step."""
    return stepped(config, count)[0]
