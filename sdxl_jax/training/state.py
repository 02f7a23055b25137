"""The training state: one tree of arrays, all that a step changes. What is frozen is not in it."""

import re
from typing import NamedTuple

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
    """Updates made so far: the position in the data, and what the next step's random keys derive from."""
    params: Params
    """The parameters that train."""
    ema: Params | None
    """Their moving average; None: there is none."""
    optimiser: optax.OptState
    """The optimiser's moments."""

    @property
    def sampled(self) -> Params:
        """What images are drawn with: the average if there is one."""
        return self.params if self.ema is None else self.ema


def create(params: Params, optimiser: optax.GradientTransformation, config: EmaConfig) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, ema.start(config, params), optimiser.init(params))


def partition(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
    """(what trains, what is frozen): a parameter trains if one of the patterns is found in its path.

    Raises InputError for a pattern that matches nothing.
    """
    flat = flatten(params)
    for pattern in trainable:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"training.trainable has {pattern!r}, which is no regular expression: {error}") from error
        if not any(re.search(pattern, path) for path in flat):
            raise InputError(
                f"training.trainable has {pattern!r}, which matches no parameter. Paths look like "
                f"{nearest_first(pattern, flat)[:3]}"
            )
    chosen = {path for path in flat if any(re.search(pattern, path) for pattern in trainable)}
    return (
        unflatten({path: value for path, value in flat.items() if path in chosen}),
        unflatten({path: value for path, value in flat.items() if path not in chosen}),
    )


def merge(trained: Params, frozen: Params) -> Params:
    """The reverse of `partition`."""
    return unflatten(flatten(frozen) | flatten(trained))
