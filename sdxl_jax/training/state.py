"""The training state: one tree with every array that a step changes. Frozen parameters are not in it."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from sdxl_jax.adapters.targets import Layers, kernels_and_biases
from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError, check_pattern, nearest_first
from sdxl_jax.optim import ema
from sdxl_jax.optim.ema import EmaConfig


class TrainState(NamedTuple):
    step: Int[jax.Array, ""]
    """Steps done so far: the position in the data, and the seed of the next step's random keys."""
    params: Params
    """The trainable parameters."""
    ema: Params | None
    """Their moving average; None: no average is kept."""
    optimiser: optax.OptState
    """The optimiser's moments."""
    auxiliary: Any = None
    """What else the objective trains, which is neither sampled from nor exported: a discriminator with its optimiser,
    weights of the loss. None: nothing."""

    @property
    def sampled(self) -> Params:
        """The parameters to sample with: the average if there is one."""
        return self.params if self.ema is None else self.ema


def create(params: Params, optimiser: optax.GradientTransformation, config: EmaConfig) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, ema.start(config, params), optimiser.init(params))


def partition(params: Params, trainable: tuple[str, ...], layers: Layers | None = None) -> tuple[Params, Params]:
    """(trainable, frozen): a parameter is trainable if one of the patterns is found in its path, and it is of these
    layers.

    Raises InputError for a pattern that matches nothing.
    """
    flat = flatten(params)
    within = list(flat) if layers is None else kernels_and_biases(layers, flat)
    for pattern in trainable:
        check_pattern("training.trainable", pattern)
        if not any(re.search(pattern, path) for path in within):
            of_layers = "" if layers is None else f" of training.layers={layers.value}"
            raise InputError(
                f'training.trainable has "{pattern}", which matches no parameter{of_layers}. Give patterns of paths '
                f"such as {', '.join(nearest_first(pattern, within)[:3])}"
            )
    chosen = {path for path in within if any(re.search(pattern, path) for pattern in trainable)}
    return (
        unflatten({path: value for path, value in flat.items() if path in chosen}),
        unflatten({path: value for path, value in flat.items() if path not in chosen}),
    )


def merge(trained: Params, frozen: Params) -> Params:
    """The reverse of `partition`."""
    return unflatten(flatten(frozen) | flatten(trained))
