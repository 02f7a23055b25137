"""One training step: a pure function of the state, the frozen parameters and a batch.

    image ── encode, sample ── latent ── add noise ── UNet(…, text, sizes) ── weighted error ── gradient ── update, EMA

A batch of a cache begins at "sample": it has the posterior and the text states, and both encoders are left out.

Every random number of an example comes from one key: fold(seed, step), split over the rows of the batch. So a resumed
run repeats, and an example draws the same however the batch is spread over devices or cut into micro-batches.
"""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Float, Int32, Key

from sdxl_jax import arrays, model
from sdxl_jax.arrays import Batch, Params
from sdxl_jax.conditioning import text
from sdxl_jax.config import OnNonfinite, TrainConfig
from sdxl_jax.diffusion import loss, schedule
from sdxl_jax.model import ModelConfig
from sdxl_jax.models import unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.optim import ema
from sdxl_jax.optim import optimiser as optimisers
from sdxl_jax.optim.ema import EmaKind
from sdxl_jax.training.state import TrainState, merge

NoTokens = Int32[np.ndarray, "1 77"]
Metrics = dict[str, Float[jax.Array, ""]]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]

_AVERAGE = 2**32 - 1
"""Folded into a step's key for the average's rounding. The keys of its examples are those folded with 0, 1, 2, …"""


def batch_loss(
    trained: Params,
    frozen: Params,
    batch: Batch,
    keys: Key[jax.Array, " batch"],
    config: TrainConfig,
    empty: Mapping[str, NoTokens],
) -> Float[jax.Array, ""]:
    """The loss of one (micro-)batch. keys: one an example; empty: the token numbers of [""]."""
    params, parts, compute = merge(trained, frozen), config.model, config.compute
    latent_keys, dropout_keys, loss_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)

    posterior, prompt = _encoded(batch, params, parts, compute)
    latent = vae.scaled_sample(parts.vae, posterior, latent_keys)
    nothing = model.without_prompt(parts, params, empty, compute)
    prompt = text.drop(prompt, nothing, dropout_keys, config.training.caption_dropout)
    condition = model.condition(parts, prompt, batch.micro)

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        return unet.apply(parts.unet, params["unet"], x_t, timestep, condition.context, condition.vector, compute)

    return loss.diffusion_loss(network, latent, loss_keys, schedule.make(parts.schedule), parts.prediction, config.loss)


def _encoded(
    batch: Batch, params: Params, parts: ModelConfig, compute: Compute
) -> tuple[vae.Posterior, text.TextCondition]:
    """Posterior of the latents and states of the text: of the frozen encoders, now or when the cache was written."""
    if batch.encoded is not None:
        mean, log_variance, context, pooled = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch.encoded)
        return vae.Posterior(mean, log_variance), text.TextCondition(context, pooled)
    assert batch.image is not None
    posterior = vae.encode(parts.vae, params["vae"], arrays.normalise(batch.image), compute)
    return posterior, text.encode(parts.text, params, batch.tokens, compute)


def make_step(config: TrainConfig, optimiser: optax.GradientTransformation, empty: Mapping[str, NoTokens]) -> Step:
    """The step of a configuration. Pure: compile it with `jax.jit`, donating the state."""
    value_and_grad = jax.value_and_grad(batch_loss)
    rate = optimisers.learning_rate(config.optimiser, config.training.steps)

    def accumulated(trained: Params, frozen: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, Params]:
        """Mean loss and gradient over micro-batches, one after the other."""
        count = config.optimiser.accumulate
        if count == 1:
            return value_and_grad(trained, frozen, batch, keys, config, empty)
        # Rows are dealt out in turn, so that each micro-batch still has rows on every device.
        micro = jax.tree.map(lambda x: rearrange(x, "(rows count) ... -> count rows ...", count=count), (batch, keys))

        def add(
            total: tuple[jax.Array, Params], part: tuple[Batch, jax.Array]
        ) -> tuple[tuple[jax.Array, Params], None]:
            result = value_and_grad(trained, frozen, *part, config, empty)
            return jax.tree.map(lambda a, b: a + b / count, total, result), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(add, zero, micro)[0]

    def averaged(
        state: TrainState, params: Params, moments: optax.OptState, made: jax.Array, step_key: jax.Array
    ) -> Params | None:
        """What is sampled from, after an update."""
        if state.ema is None:
            return None
        key = jax.random.fold_in(step_key, _AVERAGE)
        if config.ema.kind is EmaKind.OPTIMISER:
            params = optimisers.own_average(moments, params)
        return ema.update(state.ema, params, ema.weight_at(config.ema, made), key)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        keys = jax.random.split(step_key, len(batch.example))
        value, gradient = accumulated(state.params, frozen, batch, keys)
        norm, made = optax.tree.norm(gradient), optimisers.updates_made(state.optimiser)
        updates, moments = optimiser.update(gradient, state.optimiser, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        after = TrainState(state.step + 1, params, averaged(state, params, moments, made, step_key), moments)
        metrics = {
            "loss": value,
            "learning_rate": jnp.asarray(rate(made)),
            "grad_norm": norm,
            "replaced": jnp.sum(batch.replaced),
        }
        if config.training.on_nonfinite is OnNonfinite.SKIP:
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            # Not lax.cond: a select joins the loop that makes the update, and writes where the old value was read.
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
            after = kept._replace(step=after.step)
            metrics["skipped"] = jnp.where(finite, 0, 1)
        return after, metrics

    return step
