"""The optimiser and its learning rate, from optax.

Gradients are clipped by their global norm, over all parameters at once. Whatever the optimiser, weight decay applies to
kernels and embeddings, not to biases and norms, and is multiplied by the learning rate.

    bytes a parameter that the optimiser keeps, with a float32 first moment: AdamW 8, Adafactor about 0 (4 with beta1),
    Lion 4, Muon 4 (8 where it is Adam), schedule-free 8, Prodigy 16; a bfloat16 first moment takes 2 less
"""

import enum
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from sdxl_jax.arrays import AccumulatorDtype, Params
from sdxl_jax.errors import InputError, check_ranges


class OptimiserKind(enum.Enum):
    """The rule by which parameters follow the gradient."""

    ADAMW = "adamw"
    """Loshchilov & Hutter, arXiv:1711.05101."""
    ADAFACTOR = "adafactor"
    """Second moments by rows and columns. Shazeer & Stern, arXiv:1804.04235, algorithm 4, but with learning rates that
    are absolute, as those of AdamW, not multiplied by the size of the parameters (section 8)."""
    LION = "lion"
    """The sign of the moving average; takes rates 3 to 10 times as low as AdamW, and as much more weight decay. Chen et
    al., arXiv:2302.06675."""
    MUON = "muon"
    """Orthogonalised moving averages for matrices and convolutions inside the networks, Adam for everything else.
    Jordan 2024, https://kellerjordan.github.io/posts/muon; sized to take AdamW's rates by Liu et al., arXiv:2502.16982,
    section 2.2."""
    SCHEDULE_FREE = "schedule_free"
    """AdamW whose own average takes the place of a falling rate, and of the EMA: it needs ema.kind=optimiser. Defazio
    et al., arXiv:2405.15682."""
    PRODIGY = "prodigy"
    """AdamW that finds its rate; learning_rate is a factor to it, usually 1. Mishchenko & Defazio, arXiv:2306.06101."""


class Decay(enum.Enum):
    """The learning rate after the warm-up."""

    CONSTANT = "constant"
    """Stays."""
    COSINE = "cosine"
    """Falls to zero at the last step, along half a cosine."""
    RSQRT = "rsqrt"
    """Falls as 1 / √step: learning_rate · √(warmup_steps / step). Needs no end. Vaswani et al., arXiv:1706.03762,
    eq. 3, with another factor."""


@dataclass(frozen=True)
class OptimiserConfig:
    """An optimiser, its numbers and its learning rate. A number that it does not have is refused."""

    kind: OptimiserKind = OptimiserKind.ADAMW
    """The rule by which parameters follow the gradient."""
    learning_rate: float = 1e-4
    """The rate after the warm-up. Higher: faster, until the loss jumps."""
    warmup_steps: int = 1000
    """Steps over which the rate rises from 0. Higher: calmer start; with RSQRT the rate also stays higher."""
    decay: Decay = Decay.CONSTANT
    """The rate after the warm-up."""
    beta1: float | None = None
    """Decay of the gradient's moving average; None: the optimiser's own, in `DEFAULTS`. Higher: smoother direction. Muon's
    Adam keeps 0.9."""
    beta2: float | None = None
    """Decay of the squared gradient's moving average, with Lion of the average that is kept; None: the optimiser's own.
    Higher: steadier step sizes."""
    epsilon: float | None = None
    """Added to the root of the second moment; None: the optimiser's own. Higher: smaller steps where gradients are
    tiny."""
    weight_decay: float | None = None
    """Share of each kernel taken off at a learning rate of 1; None: the optimiser's own. Higher: smaller weights."""
    first_moment: AccumulatorDtype = AccumulatorDtype.FLOAT32
    """How the gradient's moving average is kept. bfloat16 saves 2 bytes a parameter and rounds to 3 digits: little
    beside the tenth or twentieth of it that a step replaces with a beta1 of 0.9 or 0.95."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping. Lower: outliers count less."""
    accumulate: int = 1
    """Micro-batches a step. Higher: less memory for the same batch, a little slower."""

    def check(self) -> None:
        """Raises InputError for numbers out of range and for those that this optimiser does not have."""
        usual, kind = DEFAULTS[self.kind], self.kind.value
        below_1 = [("beta1", self.beta1, usual.beta1), ("beta2", self.beta2, usual.beta2)]
        positive = [("epsilon", self.epsilon, usual.epsilon), ("weight_decay", self.weight_decay, usual.weight_decay)]
        for name, given, own in below_1 + positive:
            if given is not None and own is None:
                raise InputError(
                    f"optimiser.{name}={given} has no effect: {kind} has no such number. Leave it out (None), or "
                    f"choose one of {', '.join(k.value for k in OptimiserKind if DEFAULTS[k]._asdict()[name] is not None)}"
                )
        check_ranges([(f"optimiser.{name}", given, 0, 1) for name, given, _ in below_1], below_high=True)
        ranges = [(f"optimiser.{name}", given, 0, math.inf) for name, given, _ in positive]
        check_ranges([*ranges, ("optimiser.learning_rate", self.learning_rate, 0, math.inf)], below_high=True)
        check_ranges([("optimiser.clip_norm", self.clip_norm, 0, math.inf)], above_low=True)
        if self.first_moment is not AccumulatorDtype.FLOAT32 and not (usual.first_moment and self.numbers()[0]):
            raise InputError(
                f"optimiser.first_moment={self.first_moment.value} has no effect: {kind} keeps no moving average of "
                "the gradient that could be smaller. Set it to float32"
                + (", or optimiser.beta1 to 0.9" if usual.first_moment else "")
            )
        if self.kind is OptimiserKind.SCHEDULE_FREE and self.decay is not Decay.CONSTANT:
            raise InputError(
                f"optimiser.decay={self.decay.value}: {kind} is there to do without a falling rate. Set it to constant"
            )
        if self.kind is OptimiserKind.SCHEDULE_FREE and self.beta1 == 0:
            raise InputError(f"optimiser.beta1=0: {kind} needs more than 0. Its own is {usual.beta1}")
        if self.kind is OptimiserKind.PRODIGY and not 0.1 <= self.learning_rate <= 10:
            raise InputError(
                f"optimiser.learning_rate={self.learning_rate}: {kind} finds the rate, and this is a factor to it. Set "
                "it to 1 (0.1 to 10)"
            )
        if self.decay is Decay.RSQRT and not self.warmup_steps:
            raise InputError(
                "optimiser.decay=rsqrt falls from the end of the warm-up, and optimiser.warmup_steps is 0. Give some, "
                "e.g. 1000"
            )

    def numbers(self) -> tuple[float, float, float, float]:
        """(beta1, beta2, epsilon, weight decay) as given, else the optimiser's own; 0 for what it does not have."""
        usual = DEFAULTS[self.kind]
        return (
            usual.beta1 if self.beta1 is None else self.beta1,
            (usual.beta2 or 0.0) if self.beta2 is None else self.beta2,
            (usual.epsilon or 0.0) if self.epsilon is None else self.epsilon,
            usual.weight_decay if self.weight_decay is None else self.weight_decay,
        )


class OptimiserDefaults(NamedTuple):
    """An optimiser's own numbers; None: it has no such number."""

    beta1: float
    beta2: float | None
    epsilon: float | None
    weight_decay: float
    first_moment: bool
    """Whether it keeps a moving average of the gradient whose dtype may be chosen."""


DEFAULTS = {
    OptimiserKind.ADAMW: OptimiserDefaults(0.9, 0.999, 1e-8, 1e-2, True),
    OptimiserKind.ADAFACTOR: OptimiserDefaults(0.0, None, None, 0.0, True),
    OptimiserKind.LION: OptimiserDefaults(0.9, 0.99, None, 1e-3, True),
    OptimiserKind.MUON: OptimiserDefaults(0.95, 0.999, 1e-8, 0.0, True),
    OptimiserKind.SCHEDULE_FREE: OptimiserDefaults(0.9, 0.999, 1e-8, 0.0, False),
    OptimiserKind.PRODIGY: OptimiserDefaults(0.9, 0.999, 1e-8, 0.0, False),
}
"""Each optimiser's own numbers: the defaults of optax 0.2.8, and AdamW's weight decay as in PyTorch."""


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Rate at each step. `steps`: the run's length, which COSINE needs."""
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


def make(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser. Its state has the parameters' paths inside, so that the sharding rules fit."""
    beta1, beta2, epsilon, weight_decay = config.numbers()
    rate, stored = learning_rate(config, steps), config.first_moment.dtype
    decay, scale = optax.add_decayed_weights(weight_decay, _decayed), optax.scale_by_learning_rate(rate)
    match config.kind:
        case OptimiserKind.ADAMW:
            chosen = optax.chain(optax.scale_by_adam(beta1, beta2, epsilon, mu_dtype=stored), decay, scale)
        case OptimiserKind.ADAFACTOR:
            mean = [optax.ema(beta1, debias=False, accumulator_dtype=stored)] if beta1 else []
            chosen = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *mean, decay, scale)
        case OptimiserKind.LION:
            chosen = optax.chain(optax.scale_by_lion(beta1, beta2, mu_dtype=stored), decay, scale)
        case OptimiserKind.MUON:
            chosen = optax.chain(_muon(beta1, beta2, epsilon, stored), decay, scale)
        case OptimiserKind.SCHEDULE_FREE:
            # Adam without a first moment, whose place the average takes.
            rms = optax.scale_by_rms(beta2, epsilon, eps_in_sqrt=False, bias_correction=True)
            # Its count is one ahead, and it is to weigh each step by the rate that the step has.
            own_rate = lambda count: rate(count - 1)  # noqa: E731
            chosen = optax.contrib.schedule_free(optax.chain(rms, decay, scale), own_rate, beta1)
        case OptimiserKind.PRODIGY:
            chosen = _prodigy(beta1, beta2, epsilon, weight_decay, rate)
    return chosen if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)


def _decayed(params: Params) -> Params:
    """Which parameters weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


_NOT_INSIDE = re.compile(r"(^|/)conv_(in|out)/kernel$")
"""The first and last convolution of a network, which Muon leaves to Adam, as it does embeddings, biases and norms."""


def _matrix(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes that make a kernel a matrix for Muon; None: it is none, and Adam has it.

    [in, out]; [layers, in, out], of which every layer is a matrix; [height, width, in, out], where a filter is one row,
    as in Jordan's code.
    """
    name = "/".join(key.key for key in path)
    if not name.endswith("kernel") or _NOT_INSIDE.search(name):
        return None
    match leaf.ndim:
        case 2 | 3:
            return optax.contrib.MuonDimensionNumbers((-2,), (-1,))
        case 4:
            return optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
        case _:
            return None


def _muon(beta1: float, beta2: float, epsilon: float, stored: Any) -> optax.GradientTransformation:
    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_matrix, params)

    def label(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda *leaf: "muon" if _matrix(*leaf) else "adam", params)

    def sized(update: jax.Array) -> jax.Array:
        columns = update.shape[-1]
        rows = update.size // columns if update.ndim == 4 else update.shape[-2]
        # Its root mean square is 1 / √(longer side), that of AdamW's updates about 0.2: Liu et al., section 2.2.
        return 0.2 * math.sqrt(max(rows, columns)) * update

    orthogonal = optax.contrib.scale_by_muon(
        beta=beta1, eps=epsilon, mu_dtype=stored, weight_dimension_numbers=cast(Any, matrices)
    )
    resize = optax.stateless(lambda updates, _: jax.tree.map(sized, updates))
    adam = optax.scale_by_adam(0.9, beta2, epsilon, mu_dtype=stored)
    return optax.partition({"muon": optax.chain(orthogonal, resize), "adam": adam}, label)


def _prodigy(
    beta1: float, beta2: float, epsilon: float, weight_decay: float, rate: optax.Schedule
) -> optax.GradientTransformation:
    """optax's, with weight decay for kernels alone, which it cannot be told; the rate that it finds is in its state."""
    inner = optax.contrib.prodigy(rate, (beta1, beta2), eps=epsilon)

    def init(params: Any) -> Any:
        state: Any = inner.init(params)
        return state._replace(params0=jax.tree.map(jnp.copy, state.params0))  # or the step is given one array twice

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found: Any
        updates, found = inner.update(updates, state, params)
        if weight_decay:
            corrections = jnp.sqrt(1 - beta2**found.count) / (1 - beta1**found.count)
            taken = weight_decay * state.estim_lr * rate(state.count) * corrections
            updates = jax.tree.map(lambda u, p, d: u - taken * p if d else u, updates, params, _decayed(params))
        return updates, found

    return optax.GradientTransformation(init, update)


def updates_made(state: optax.OptState) -> Int[jax.Array, ""]:
    """How many updates an optimiser has made: its steps, less those that were skipped."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def own_average(state: optax.OptState, params: Params) -> Params:
    """What schedule-free is sampled from: the x of its paper, where `params` is y."""

    def is_own(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    (own,) = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
    return cast(Params, optax.contrib.schedule_free_eval_params(own, params))
