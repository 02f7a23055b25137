"""The optimiser and its learning rate, from optax.

Gradients are clipped by their global norm, over all parameters at once. Whatever the optimiser, weight decay applies to
kernels and embeddings, not to biases and norms, and is multiplied by the learning rate.

    bytes of moments per parameter, with a float32 first moment: AdamW 8, Adafactor about 0 (4 with beta1), Lion 4,
    Muon 4 (8 where it is Adam), schedule-free 8, Prodigy 16; a bfloat16 first moment takes 2 less
"""

import enum
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, Num

from sdxl_jax.arrays import AccumulatorDtype, Params, flatten, unflatten
from sdxl_jax.errors import InputError, check_pattern, check_ranges, nearest_first


class OptimiserKind(enum.Enum):
    """The optimiser."""

    ADAMW = "adamw"
    """Loshchilov & Hutter, arXiv:1711.05101."""
    ADAFACTOR = "adafactor"
    """Factored second moments: one per row and per column. Shazeer & Stern, arXiv:1804.04235, algorithm 4, but
    with absolute learning rates, as in AdamW, not multiplied by the size of the parameters (section 8)."""
    LION = "lion"
    """The sign of the moving average; needs rates 3 to 10 times lower than AdamW, and weight decay higher by the same
    factor. Chen et al., arXiv:2302.06675."""
    MUON = "muon"
    """Orthogonalised moving averages for matrices and convolutions inside the networks, Adam for everything else.
    Jordan 2024, https://kellerjordan.github.io/posts/muon; scaled so that AdamW's rates fit, as in Liu et al.,
    arXiv:2502.16982, section 2.2."""
    SCHEDULE_FREE = "schedule_free"
    """AdamW with an average of its own, which replaces learning rate decay and the EMA: it needs ema.kind=optimiser.
    Defazio et al., arXiv:2405.15682."""
    PRODIGY = "prodigy"
    """AdamW that estimates its learning rate; learning_rate is a factor to it, usually 1. Mishchenko & Defazio,
    arXiv:2306.06101."""


class Decay(enum.Enum):
    """The learning rate after the warm-up."""

    CONSTANT = "constant"
    """Constant."""
    COSINE = "cosine"
    """Falls to zero at the last step, along half a cosine."""
    RSQRT = "rsqrt"
    """Falls as 1 / √step: learning_rate · √(warmup_steps / step). Does not depend on the last step.
    Vaswani et al., arXiv:1706.03762, eq. 3, with another factor."""


@dataclass(frozen=True)
class OptimiserConfig:
    """An optimiser, its hyperparameters and its learning rate. A hyperparameter that it does not have is refused."""

    kind: OptimiserKind = OptimiserKind.ADAMW
    """The optimiser."""
    learning_rate: float = 1e-4
    """The learning rate after the warm-up. Higher: faster, until the loss diverges."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises from 0. Higher: more stable start; with RSQRT the rate also stays
    higher."""
    decay: Decay = Decay.CONSTANT
    """How the learning rate changes after the warm-up."""
    beta1: float | None = None
    """Decay of the gradient's moving average; None: the optimiser's own, in `DEFAULTS`. Higher: smoother direction. The
    Adam inside Muon always has 0.9."""
    beta2: float | None = None
    """Decay of the squared gradient's moving average, with Lion of the stored average; None: the optimiser's own.
    Higher: steadier step sizes."""
    epsilon: float | None = None
    """Added to the root of the second moment; None: the optimiser's own. Higher: smaller steps where gradients are
    tiny."""
    weight_decay: float | None = None
    """Share of each kernel subtracted at a learning rate of 1; None: the optimiser's own. Higher: smaller weights."""
    first_moment: AccumulatorDtype = AccumulatorDtype.FLOAT32
    """Dtype of the gradient's moving average. bfloat16 saves 2 bytes per parameter and rounds to 3 digits: little next
    to the tenth or twentieth of it that a step replaces with a beta1 of 0.9 or 0.95."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, to which longer ones are clipped; None: no clipping. Lower: outliers count
    less."""
    accumulate: int = 1
    """Micro-batches per step (gradient accumulation). Higher: less memory for the same batch, a little slower."""
    rates: tuple[tuple[str, float], ...] = ()
    """(regular expression, factor): the learning rate of trainable parameters, or of adapters, whose parameter's path
    has the pattern is multiplied by the factor; the first that matches counts. E.g. ("^text_encoder", 0.1)."""

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for hyperparameters that this optimiser does not have."""
        check_ranges(
            [(f"optimiser.rates, {pattern}", factor, 0, math.inf) for pattern, factor in self.rates], below_high=True
        )
        for pattern, _ in self.rates:
            check_pattern("optimiser.rates", pattern)
        defaults, kind = DEFAULTS[self.kind], self.kind.value
        below_1 = [("beta1", self.beta1, defaults.beta1), ("beta2", self.beta2, defaults.beta2)]
        positive = [
            ("epsilon", self.epsilon, defaults.epsilon),
            ("weight_decay", self.weight_decay, defaults.weight_decay),
        ]
        for name, given, own in below_1 + positive:
            if given is not None and own is None:
                having = [other.value for other in OptimiserKind if DEFAULTS[other]._asdict()[name] is not None]
                raise InputError(
                    f"optimiser.{name}={given} has no effect: {kind} has no {name}. Leave it out (None), or set "
                    f"optimiser.kind to {', '.join(having[:-1])} or {having[-1]}"
                )
        check_ranges([(f"optimiser.{name}", given, 0, 1) for name, given, _ in below_1], below_high=True)
        ranges = [(f"optimiser.{name}", given, 0, math.inf) for name, given, _ in positive]
        check_ranges([*ranges, ("optimiser.learning_rate", self.learning_rate, 0, math.inf)], below_high=True)
        check_ranges([("optimiser.clip_norm", self.clip_norm, 0, math.inf)], above_low=True)
        if self.first_moment is not AccumulatorDtype.FLOAT32 and not (defaults.first_moment and self.numbers()[0]):
            raise InputError(
                f"optimiser.first_moment={self.first_moment.value} has no effect: {kind} has no moving average of the "
                "gradient whose dtype can be chosen. Set it to float32"
                + (", or optimiser.beta1 to 0.9" if defaults.first_moment else "")
            )
        if self.kind is OptimiserKind.SCHEDULE_FREE and self.decay is not Decay.CONSTANT:
            raise InputError(
                f"optimiser.decay={self.decay.value} does not fit {kind}, which replaces learning rate decay. Set it "
                "to constant"
            )
        if self.kind is OptimiserKind.SCHEDULE_FREE and self.beta1 == 0:
            raise InputError(
                f"optimiser.beta1=0 is out of range: {kind} needs more than 0. Leave it out (None) for its own, "
                f"{defaults.beta1}"
            )
        if self.kind is OptimiserKind.PRODIGY and not 0.1 <= self.learning_rate <= 10:
            raise InputError(
                f"optimiser.learning_rate={self.learning_rate} is out of range: {kind} estimates the rate, and this is "
                "a factor to it, 0.1 to 10. Set it to 1"
            )
        if self.decay is Decay.RSQRT and not self.warmup_steps:
            raise InputError(
                "optimiser.decay=rsqrt falls from the end of the warm-up, and optimiser.warmup_steps is 0. Set it to 1 "
                "or more, e.g. 1000"
            )

    def numbers(self) -> tuple[float, float, float, float]:
        """(beta1, beta2, epsilon, weight decay) as given, else the optimiser's own; 0 for one that it does not have."""
        defaults = DEFAULTS[self.kind]
        return (
            defaults.beta1 if self.beta1 is None else self.beta1,
            (defaults.beta2 or 0.0) if self.beta2 is None else self.beta2,
            (defaults.epsilon or 0.0) if self.epsilon is None else self.epsilon,
            defaults.weight_decay if self.weight_decay is None else self.weight_decay,
        )


class OptimiserDefaults(NamedTuple):
    """An optimiser's default hyperparameters; None: it does not have this one."""

    beta1: float
    beta2: float | None
    epsilon: float | None
    weight_decay: float
    first_moment: bool
    """Whether it has a moving average of the gradient whose dtype can be chosen."""


DEFAULTS = {
    OptimiserKind.ADAMW: OptimiserDefaults(0.9, 0.999, 1e-8, 1e-2, True),
    OptimiserKind.ADAFACTOR: OptimiserDefaults(0.0, None, None, 0.0, True),
    OptimiserKind.LION: OptimiserDefaults(0.9, 0.99, None, 1e-3, True),
    OptimiserKind.MUON: OptimiserDefaults(0.95, 0.999, 1e-8, 0.0, True),
    OptimiserKind.SCHEDULE_FREE: OptimiserDefaults(0.9, 0.999, 1e-8, 0.0, False),
    OptimiserKind.PRODIGY: OptimiserDefaults(0.9, 0.999, 1e-8, 0.0, False),
}
"""Each optimiser's default hyperparameters: those of optax 0.2.8, and AdamW's weight decay as in PyTorch."""


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """The learning rate at each update, counted from 0. steps: the run's length, which COSINE needs."""
    match config.decay:
        case Decay.CONSTANT:
            after: Any = optax.constant_schedule(config.learning_rate)
        case Decay.COSINE:
            after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - config.warmup_steps))
        case Decay.RSQRT:
            begin = config.warmup_steps
            after = lambda step: config.learning_rate * jnp.sqrt(begin / (begin + jnp.maximum(0, step)))  # noqa: E731
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    # Update n uses rate n + 1: the first update of a warm-up would otherwise do nothing.
    return optax.join_schedules([lambda step: warmup(step + 1), after], [config.warmup_steps])


def logged_rates(config: OptimiserConfig, steps: int) -> Callable[[Int[jax.Array, ""]], dict[str, Num[jax.Array, ""]]]:
    """update, counted from 0 -> the learning rates by the names of metrics: without a factor, and by pattern."""
    rate = learning_rate(config, steps)

    def at(update: Int[jax.Array, ""]) -> dict[str, Num[jax.Array, ""]]:
        factors = dict(zip(rate_names(config), (1.0, *(factor for _, factor in config.rates)), strict=True))
        plain = jnp.asarray(rate(update))
        return {name: plain if factor == 1 else factor * plain for name, factor in factors.items()}

    return at


def rate_names(config: OptimiserConfig) -> tuple[str, ...]:
    """The names of `logged_rates`."""
    return ("learning_rate", *(f"learning_rate {pattern}" for pattern, _ in config.rates))


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser. Its state contains the parameters' paths, so that the sharding rules match. steps: as for
    `learning_rate`."""
    beta1, beta2, epsilon, weight_decay = config.numbers()
    rate, moment_dtype = learning_rate(config, steps), config.first_moment.dtype
    decay, scale = optax.add_decayed_weights(weight_decay, _decayed), optax.scale_by_learning_rate(rate)
    if config.rates:
        scale = optax.chain(scale, _with_factors(config.rates))
    match config.kind:
        case OptimiserKind.ADAMW:
            chosen = optax.chain(optax.scale_by_adam(beta1, beta2, epsilon, mu_dtype=moment_dtype), decay, scale)
        case OptimiserKind.ADAFACTOR:
            mean = [optax.ema(beta1, debias=False, accumulator_dtype=moment_dtype)] if beta1 else []
            chosen = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *mean, decay, scale)
        case OptimiserKind.LION:
            chosen = optax.chain(optax.scale_by_lion(beta1, beta2, mu_dtype=moment_dtype), decay, scale)
        case OptimiserKind.MUON:
            chosen = optax.chain(_muon(beta1, beta2, epsilon, moment_dtype), decay, scale)
        case OptimiserKind.SCHEDULE_FREE:
            # Adam without a first moment, which the average replaces.
            rms = optax.scale_by_rms(beta2, epsilon, eps_in_sqrt=False, bias_correction=True)
            # Its count is one ahead, and each step must be weighted by its own rate.
            own_rate = lambda count: rate(count - 1)  # noqa: E731
            chosen = optax.contrib.schedule_free(optax.chain(rms, decay, scale), own_rate, beta1)
        case OptimiserKind.PRODIGY:
            chosen = _prodigy(beta1, beta2, epsilon, weight_decay, rate)
            chosen = optax.chain(chosen, _with_factors(config.rates)) if config.rates else chosen
    return chosen if config.clip_norm is None else optax.chain(_clip_by_global_norm(config.clip_norm), chosen)


_BESIDE = "adapters/"
"""What the factors of an adapter are below, beside the model's parameters."""


def _with_factors(rates: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Updates times the factor of the first pattern that their parameter's path has. Raises InputError, when its state
    is made, for a pattern that no path has."""

    def init(params: Params) -> optax.OptState:
        paths = [path.removeprefix(_BESIDE) for path in flatten(params)]
        for pattern, _ in rates:
            if not any(re.search(pattern, path) for path in paths):
                raise InputError(
                    f'optimiser.rates has "{pattern}", which matches nothing that is trained. Give patterns of paths '
                    f"such as {', '.join(nearest_first(pattern, paths)[:3])}"
                )
        return optax.EmptyState()

    def update(updates: Params, state: optax.OptState, _: Params | None = None) -> tuple[Params, optax.OptState]:
        found = flatten(updates)
        for path, value in found.items():
            matching = (factor for pattern, factor in rates if re.search(pattern, path.removeprefix(_BESIDE)))
            factor = next(matching, 1.0)
            found[path] = value if factor == 1 else factor * value
        return unflatten(found), state

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As optax's, by one factor, which XLA fuses into the moments: optax's division became an array of its own."""

    def clipped(gradient: Params, _: Params | None) -> Params:
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)

    return optax.stateless(cast(Any, clipped))


def _decayed(params: Params) -> Params:
    """A tree of bools: whether weight decay applies to a parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding") or _is_factor(path), params
    )


def _is_factor(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a matrix that changes a kernel: kernel/down, kernel/up (`adapters.kinds`)."""
    return len(path) > 1 and path[-2].key == "kernel" and path[-1].key != "magnitude"


_NOT_INSIDE = re.compile(r"(^|/)conv_(in|out)/kernel$")
"""The first and last convolution of a network, which Muon leaves to Adam, like embeddings, biases and norms."""


def _matrix(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes that make a kernel a matrix for Muon; None: it is not a matrix, and Adam updates it.

    [in, out]; [layers, in, out], where every layer is a matrix; [height, width, in, out], where a filter is one row, as
    in Jordan's code. Factors of an adapter are matrices as well.
    """
    name = "/".join(key.key for key in path)
    if not (_is_factor(path) or (name.endswith("kernel") and not _NOT_INSIDE.search(name))):
        return None
    match leaf.ndim:
        case 2 | 3:
            return optax.contrib.MuonDimensionNumbers((-2,), (-1,))
        case 4:
            return optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
        case _:
            return None


def _muon(beta1: float, beta2: float, epsilon: float, moment_dtype: Any) -> optax.GradientTransformation:
    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_matrix, params)

    def label(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda *leaf: "muon" if _matrix(*leaf) else "adam", params)

    def scaled(update: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
        columns = update.shape[-1]
        rows = update.size // columns if update.ndim == 4 else update.shape[-2]
        # Its root mean square is 1 / √(longer side), that of AdamW's updates about 0.2: Liu et al., section 2.2.
        return 0.2 * math.sqrt(max(rows, columns)) * update

    orthogonal = optax.contrib.scale_by_muon(
        beta=beta1, eps=epsilon, mu_dtype=moment_dtype, weight_dimension_numbers=cast(Any, matrices)
    )
    resize = optax.stateless(lambda updates, _: jax.tree.map(scaled, updates))
    adam = optax.scale_by_adam(0.9, beta2, epsilon, mu_dtype=moment_dtype)
    return optax.partition({"muon": optax.chain(orthogonal, resize), "adam": adam}, label)


def _prodigy(
    beta1: float, beta2: float, epsilon: float, weight_decay: float, rate: optax.Schedule
) -> optax.GradientTransformation:
    """optax's Prodigy, with weight decay applied to kernels alone, for which it has no option; the estimated learning
    rate is in its state."""
    inner = optax.contrib.prodigy(rate, (beta1, beta2), eps=epsilon)

    def init(params: Any) -> Any:
        state: Any = inner.init(params)
        return state._replace(params0=jax.tree.map(jnp.copy, state.params0))  # or one buffer is donated twice

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new_state: Any
        updates, new_state = inner.update(updates, state, params)
        if weight_decay:
            corrections = jnp.sqrt(1 - beta2**new_state.count) / (1 - beta1**new_state.count)
            decay = weight_decay * state.estim_lr * rate(state.count) * corrections
            updates = jax.tree.map(lambda u, p, d: u - decay * p if d else u, updates, params, _decayed(params))
        return updates, new_state

    return optax.GradientTransformation(init, update)


def updates_made(state: optax.OptState) -> Int[jax.Array, ""]:
    """The number of updates that an optimiser has made: the steps, without skipped ones."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def own_average(state: optax.OptState, params: Params) -> Params:
    """The average of schedule-free, to sample from: the x of its paper, where `params` is y."""

    def is_schedule_free(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    (schedule_free,) = filter(is_schedule_free, jax.tree.leaves(state, is_leaf=is_schedule_free))
    return cast(Params, optax.contrib.schedule_free_eval_params(schedule_free, params))
