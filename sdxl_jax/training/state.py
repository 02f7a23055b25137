"""The training state: one tree with every array that a step changes. Frozen parameters are not in it."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError, nearest_first
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


def partition(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
    """(trainable, frozen): a parameter is trainable if one of the patterns is found in its path.

    Raises InputError for a pattern that matches nothing.
    """
    flat = flatten(params)
    for pattern in trainable:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f'training.trainable has "{pattern}", which is not a regular expression: {error}. Give patterns such '
                'as "^unet/"'
            ) from error
        if not any(re.search(pattern, path) for path in flat):
            raise InputError(
                f'training.trainable has "{pattern}", which matches no parameter. Give patterns of paths such as '
                f"{', '.join(nearest_first(pattern, flat)[:3])}"
            )
    chosen = {path for path in flat if any(re.search(pattern, path) for pattern in trainable)}
    return (
        unflatten({path: value for path, value in flat.items() if path in chosen}),
        unflatten({path: value for path, value in flat.items() if path not in chosen}),
    )


def merge(trained: Params, frozen: Params) -> Params:
    """The reverse of `partition`."""
    return unflatten(flatten(frozen) | flatten(trained))
