"""One training step: a pure function of the state, the frozen parameters and a batch.

    batch ── loss (the objective's) ── gradient, over micro-batches ── update ── average

What is learnt is the loss, which an objective brings (training/objectives/); this is the rest of the step, the same for
all of them that train one tree of parameters with one optimiser.

Every random number of an example comes from one key: fold(seed, step), split over the rows of the batch. So a resumed
run repeats, and an example draws the same however the batch is spread over devices or cut into micro-batches.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Float, Key

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.config import OnNonfinite, RunConfig
from sdxl_jax.optim import ema
from sdxl_jax.optim import optimiser as optimisers
from sdxl_jax.optim.ema import EmaKind
from sdxl_jax.training.state import TrainState

Metrics = dict[str, Float[jax.Array, ""]]
Loss = Callable[[Params, Params, Batch, Key[jax.Array, " batch"]], tuple[Float[jax.Array, ""], Metrics]]
"""(trained, frozen, (micro-)batch, a key an example) -> (the mean loss, its terms by name, to be logged beside it)."""
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]

_AVERAGE = 2**32 - 1
"""Folded into a step's key for the average's rounding. The keys of its examples are those folded with 0, 1, 2, …"""


def make_step(config: RunConfig, optimiser: optax.GradientTransformation, loss: Loss) -> Step:
    """The step of a configuration. Pure: compile it with `jax.jit`, donating the state."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    rate = optimisers.learning_rate(config.optimiser, config.training.steps)

    def accumulated(trained: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Any:
        """((mean loss, its terms), gradient) over micro-batches, one after the other."""
        count = config.optimiser.accumulate
        if count == 1:
            return value_and_grad(trained, frozen, batch, keys)
        # Rows are dealt out in turn, so that each micro-batch still has rows on every device.
        micro = jax.tree.map(lambda x: rearrange(x, "(rows count) ... -> count rows ...", count=count), (batch, keys))

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            result = value_and_grad(trained, frozen, *part)
            return jax.tree.map(lambda a, b: a + b / count, total, result), None

        first = jax.eval_shape(value_and_grad, trained, frozen, *jax.tree.map(lambda x: x[0], micro))
        zero = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first[0]), jax.tree.map(jnp.zeros_like, trained))
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
        (value, terms), gradient = accumulated(state.params, frozen, batch, keys)
        norm, made = optax.tree.norm(gradient), optimisers.updates_made(state.optimiser)
        updates, moments = optimiser.update(gradient, state.optimiser, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        after = TrainState(state.step + 1, params, averaged(state, params, moments, made, step_key), moments)
        metrics = {
            "loss": value,
            **terms,
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
