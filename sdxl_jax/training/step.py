"""One training step: a pure function of the state, the frozen parameters and a batch.

    batch ── loss (the objective's) ── gradient, over micro-batches ── update ── average

The loss comes from an objective (training/objectives/); this is the rest of the step, the same for every objective that
trains one tree of parameters with one optimiser.

Every random number of an example comes from one key: fold(seed, step), split over the rows of the batch. So a resumed
run repeats bit for bit, and an example draws the same numbers however the batch is sharded or cut into micro-batches.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Bool, Float, Int, Key, Num

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.config import OnNonfinite, RunConfig
from sdxl_jax.optim import ema
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import logged_rates, own_average, updates_made
from sdxl_jax.training.state import TrainState

Metrics = dict[str, Num[jax.Array, ""]]
"""Floats, and the counts "replaced" and "skipped"."""
Loss = Callable[[Params, Params, Batch, Key[jax.Array, " batch"]], tuple[Float[jax.Array, ""], Metrics]]
"""(trained, frozen, (micro-)batch, one key per example) -> (the mean loss, its terms by name, which are logged too)."""
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
"""(state, frozen, batch) -> (the state after the step, its metrics)."""
Rows = tuple[Batch, Key[jax.Array, " batch"]]
"""A (micro-)batch, and one key per example."""
_LossAndGradient = tuple[tuple[Float[jax.Array, ""], Metrics], Params]
_Result = TypeVar("_Result")
_Carry = TypeVar("_Carry")

_AVERAGE = 2**32 - 1
"""Folded into a step's key for the rounding of the average. Its examples' keys are folded with 0, 1, 2, …"""


def make_step(config: RunConfig, optimiser: optax.GradientTransformation, loss: Loss) -> Step:
    """The step of a configuration. Pure: compile it with `jax.jit`, donating the state."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    optimiser = optax.with_extra_args_support(optimiser)  # rules of an objective may read frozen parameters
    rates = logged_rates(config.optimiser, config.training.steps)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        keys = jax.random.split(step_key, len(batch.example))

        def of_rows(carry: None, rows: Rows) -> tuple[_LossAndGradient, None]:
            return value_and_grad(state.params, frozen, *rows), carry

        ((value, terms), gradient), _ = over_micro_batches(config.optimiser.accumulate, of_rows, None, (batch, keys))
        norm, update_count = optax.tree.norm(gradient), updates_made(state.optimiser)
        updates, moments = optimiser.update(gradient, state.optimiser, state.params, frozen=frozen)
        params = cast(Params, optax.apply_updates(state.params, updates))
        next_step = state.step + 1
        average = updated_average(config.ema, state.ema, params, moments, update_count, step_key)
        new_state = TrainState(next_step, params, average, moments)
        metrics = {
            "loss": value,
            **terms,
            **rates(update_count),
            "grad_norm": norm,
            "replaced": jnp.sum(batch.replaced),
        }
        if config.training.on_nonfinite is OnNonfinite.SKIP:
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            new_state = unless_skipped(finite, new_state, state)
            metrics["skipped"] = jnp.where(finite, 0, 1)
        return new_state, metrics

    return step


def over_micro_batches(
    count: int, function: Callable[[_Carry, Rows], tuple[_Result, _Carry]], carry: _Carry, rows: Rows
) -> tuple[_Result, _Carry]:
    """(the mean of what a function makes of `count` micro-batches, in turn; what it carried from one to the next)."""
    if count == 1:
        return function(carry, rows)
    # Rows are dealt out in turn, so that each micro-batch still has rows on every device.
    micro = jax.tree.map(lambda x: rearrange(x, "(rows count) ... -> count rows ...", count=count), rows)

    def add(before: tuple[_Result, _Carry], part: Rows) -> tuple[tuple[_Result, _Carry], None]:
        total, carry = before
        result, carry = function(carry, part)
        return (jax.tree.map(lambda a, b: a + b / count, total, result), carry), None

    first, _ = jax.eval_shape(function, carry, jax.tree.map(lambda x: x[0], micro))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return jax.lax.scan(add, (zero, carry), micro)[0]


def unless_skipped(finite: Bool[jax.Array, ""], new: TrainState, old: TrainState) -> TrainState:
    """The new state; if the step is not finite, the old one with the step counted."""
    # Not lax.cond: XLA fuses a select into the update, which then writes in place of the old value.
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)._replace(step=new.step)


def updated_average(
    config: EmaConfig,
    average: Params | None,
    params: Params,
    moments: optax.OptState,
    update_count: Int[jax.Array, ""],
    step_key: Key[jax.Array, ""],
) -> Params | None:
    """The moving average after an update. params, moments: after the update; those that are not in the average are left
    out. update_count: the updates before it."""
    if average is None:
        return None
    key = jax.random.fold_in(step_key, _AVERAGE)
    if config.kind is EmaKind.OPTIMISER:
        params = own_average(moments, params)
    params = {part: params[part] for part in average}
    return ema.update(average, params, ema.weight_at(config, update_count), key)
