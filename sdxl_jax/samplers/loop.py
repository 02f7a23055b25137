"""The loop over a sampler's rows: one `lax.scan` over one compiled step, whatever sampler and number of steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int32, Key

from sdxl_jax.arrays import type_of_array
from sdxl_jax.diffusion.continuous import ContinuousConfig, predicted
from sdxl_jax.diffusion.parameterisation import Denoised, Prediction
from sdxl_jax.samplers.steps import Plan

Array = jax.Array

Network = Callable[
    [Float[Array, "batch height width channels"], Float[Array, ""]], Float[Array, "batch height width channels"]
]
"""(x_t, timestep) → the network's output, guidance included."""


class State(NamedTuple):
    """What is carried from row to row."""

    arrays: Float[Array, "memory batch height width channels"]
    """The state x_t, then what the sampler remembers."""
    x0: Float[Array, "batch height width channels"]
    """The network's last prediction of the finished latent."""
    finite_rows: Int32[Array, "batch 1 1 1"]
    """Rows after which the state was finite, up to the first after which it was not (NaN or inf). With the axes of the
    latent: the sharding of a vector would differ after a step, by XLA's choice, and the next step be compiled again."""


class KnownImage(NamedTuple):
    """Inpainting: the image outside of the mask. Lugmayr et al. 2022, arXiv:2201.09865, eq. 8, without resampling."""

    x0: Float[Array, "batch height width channels"]
    """Its latent."""
    noise: Float[Array, "batch height width channels"]
    """The noise that is added to it at every level, the same throughout, as in diffusers."""
    mask: Float[Array, "batch height width 1"]
    """1 where it is repainted, 0 where it is kept."""


def start(x: Float[Array, "batch height width channels"], plan: Plan) -> State:
    """The state before the first row. x: the latent at the first row's noise level."""
    memory = jnp.zeros((plan.memory - 1, *x.shape), jnp.float32)
    arrays = jnp.concatenate([x[None].astype(jnp.float32), memory])
    return State(arrays, jnp.zeros_like(x, jnp.float32), jnp.zeros((len(x), 1, 1, 1), jnp.int32))


def advance(
    weights: Float[type_of_array, "memory terms"],
    arrays: Float[Array, "memory batch height width channels"],
    prediction: Denoised,
    noise: Float[type_of_array, "batch height width channels"],
) -> Float[Array, "memory batch height width channels"]:
    """One row of a plan: every carried array becomes its sum of the terms.

    Sums of products, not a matrix product, which TPUs would round to bfloat16.
    """
    terms = jnp.concatenate([arrays, jnp.stack([*prediction, noise])])
    weights = jnp.asarray(weights)
    return (weights[:, :, None, None, None, None] * terms).sum(axis=1)


def sample(
    network: Network,
    state: State,
    keys: Key[Array, " batch"],
    plan: Plan,
    prediction: Prediction,
    *,
    first: int | np.integer | Int[Array, ""] = 0,
    stochastic: bool | None = None,
    known_image: KnownImage | None = None,
    law: ContinuousConfig | None = None,
) -> State:
    """Runs the rows of a plan; the latent is `arrays[0]` of the result.

    Args:
        keys: one per image, so that an image's fresh noise does not depend on its neighbours in the batch.
        first: number of the plan's first row within the whole denoising schedule. The fresh noise depends on it, so
            that a schedule run in segments gives what it gives in one.
        stochastic: whether noise is drawn; None: if the plan uses it, which must then be numpy.
        known_image: for inpainting.
        law: of continuous noise levels; None: the discrete schedule.
    """
    stochastic = plan.stochastic if stochastic is None else stochastic
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), plan)

    def body(state: State, row_and_index: Any) -> tuple[State, None]:
        row, index = row_and_index
        x_t = state.arrays[0]
        result = predicted(network, x_t, row.timestep, prediction, law, row.alpha, row.sigma_t)
        fresh = jnp.zeros_like(x_t)
        if stochastic:
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x_t.shape[1:]))(keys)
        arrays = advance(row.weights, state.arrays, result, fresh)
        if known_image is not None:
            noised = row.alpha_next * known_image.x0 + row.sigma_t_next * known_image.noise
            arrays = arrays.at[0].set(known_image.mask * arrays[0] + (1 - known_image.mask) * noised)
        # The count stops for good: NaN and inf stay in every later sum, also with a weight of 0.
        finite = jnp.isfinite(arrays[0]).all(axis=(1, 2, 3), keepdims=True)
        return State(arrays, result.x0, state.finite_rows + finite), None

    numbers = first + jnp.arange(np.shape(plan.timestep)[0])
    state, _ = jax.lax.scan(body, state, (rows, numbers))
    return state
