"""The loop over a sampler's steps: one `lax.scan`, so that compile time does not grow with the number of steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from sdxl_jax.diffusion.parameterisation import Prediction, denoised
from sdxl_jax.samplers.steps import Plan, Sampler

Array = jax.Array


def sample(
    network: Callable[[Array, Array], Array],
    state: Float[Array, "batch height width channels"],
    keys: Key[Array, " batch"],
    sampler: Sampler,
    plan: Plan,
    prediction: Prediction,
) -> Float[Array, "batch height width channels"]:
    """Denoises to latents. state: standard normal noise × `sampler.initial_scale`.

    network(x_t, timestep) -> its output, guidance included. keys: one an image, so that an image's fresh noise does not
    depend on its neighbours in the batch.
    """
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), plan)

    def body(state: Array, row_and_index: Any) -> tuple[Array, None]:
        row, index = row_and_index
        x_t = state * row.input_scale
        result = denoised(prediction, network(x_t, row.timestep), x_t, row.alpha, row.sigma_t)
        fresh = state
        if sampler.stochastic:
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), state.shape[1:]))(keys)
        return sampler.step(state, result, row, fresh), None

    steps = jnp.arange(len(plan.timestep))
    latent, _ = jax.lax.scan(body, state, (rows, steps))
    return latent
