"""The loop over a sampler's rows: one `lax.scan` over one compiled step, whatever sampler and number of steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, Key

from sdxl_jax.arrays import type_of_array
from sdxl_jax.diffusion.parameterisation import Denoised, Prediction, denoised
from sdxl_jax.samplers.steps import Plan

Array = jax.Array


class State(NamedTuple):
    """What is carried from row to row."""

    arrays: Float[Array, "memory batch height width channels"]
    """The state x_t, then what the sampler remembers."""
    x0: Float[Array, "batch height width channels"]
    """The image as the network last saw it."""
    finite_rows: Int32[Array, "batch 1 1 1"]
    """Rows after which the state was finite, up to the first after which it was not (NaN or inf). With the axes of the
    latent: of a vector, XLA would say otherwise after a step how it lies on a mesh, and the next be compiled again."""


class KnownImage(NamedTuple):
    """Inpainting: what stays as it is. Lugmayr et al. 2022, arXiv:2201.09865, eq. 8, without its resampling."""

    x0: Float[Array, "batch height width channels"]
    """The latent of the image that is there."""
    noise: Float[Array, "batch height width channels"]
    """The noise that it is given at every level, the same throughout, as in diffusers."""
    mask: Float[Array, "batch height width 1"]
    """1 where it is repainted, 0 where it is kept."""


def start(x: Float[Array, "batch height width channels"], plan: Plan) -> State:
    """Before the first row. x: the state at the first row's level."""
    others = jnp.zeros((plan.memory - 1, *x.shape), jnp.float32)
    arrays = jnp.concatenate([x[None].astype(jnp.float32), others])
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
    network: Callable[[Array, Array], Array],
    state: State,
    keys: Key[Array, " batch"],
    plan: Plan,
    prediction: Prediction,
    *,
    first: int | np.integer | Array = 0,
    stochastic: bool | None = None,
    kept: KnownImage | None = None,
) -> State:
    """Goes through the rows of a plan; the latent is `arrays[0]` of the result.

    Args:
        network: (x_t, timestep) -> its output, guidance included.
        keys: one an image, so that an image's fresh noise does not depend on its neighbours in the batch.
        first: number of the first row on the whole way: what noise is drawn depends on it, so that a way in parts is
            the way in one.
        stochastic: whether noise is drawn; None: if the plan has a use for it, which must then be numpy.
        kept: of inpainting.
    """
    stochastic = plan.stochastic if stochastic is None else stochastic
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), plan)

    def body(state: State, row_and_index: Any) -> tuple[State, None]:
        row, index = row_and_index
        x_t = state.arrays[0]
        result = denoised(prediction, network(x_t, row.timestep), x_t, row.alpha, row.sigma_t)
        fresh = jnp.zeros_like(x_t)
        if stochastic:
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x_t.shape[1:]))(keys)
        arrays = advance(row.weights, state.arrays, result, fresh)
        if kept is not None:
            there = row.next_alpha * kept.x0 + row.next_sigma_t * kept.noise
            arrays = arrays.at[0].set(kept.mask * arrays[0] + (1 - kept.mask) * there)
        # Once is for all: what is not finite stays in every sum, also with a weight of 0.
        finite = jnp.isfinite(arrays[0]).all(axis=(1, 2, 3), keepdims=True)
        return State(arrays, result.x0, state.finite_rows + finite), None

    numbers = first + jnp.arange(np.shape(plan.timestep)[0])
    state, _ = jax.lax.scan(body, state, (rows, numbers))
    return state
