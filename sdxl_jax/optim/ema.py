"""Moving average of the parameters (EMA), which is sampled from.

    average ← average + w · (parameters − average),    at update t = 1, 2, …

    CONSTANT  w = 1 − decay
    WARMUP    w = 1 − min(decay, t / (9 + t)), so that the first updates are not dominated by the initial parameters
              (as TensorFlow's `ExponentialMovingAverage`)
    POWER     w = 1 − (1 − 1/t)^(γ + 1): averages over the same share of the run, however long it is, and discards the
              initial parameters at the first update. Karras et al. 2023, arXiv:2312.02696, section 3.1

It takes 4 bytes per trainable parameter, 2 in bfloat16.
"""

import enum
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdxl_jax.arrays import AccumulatorDtype, Params
from sdxl_jax.errors import InputError, check_ranges


class EmaKind(enum.Enum):
    """How much of the average an update keeps."""

    CONSTANT = "constant"
    """`decay`, from the first update on."""
    WARMUP = "warmup"
    """Less in the beginning, then `decay`."""
    POWER = "power"
    """More and more: the average is over a share of the run, `relative_std`."""
    OPTIMISER = "optimiser"
    """Nothing: the average is the optimiser's own; only schedule-free has one."""
    NONE = "none"
    """No average is kept; the parameters themselves are sampled from."""


_DECAY, _RELATIVE_STD = 0.9999, 0.1
_WIDEST = math.sqrt(1 / 12)
"""Relative standard deviation of γ = 0, where the parameters of all updates have the same weight."""


@dataclass(frozen=True)
class EmaConfig:
    """The moving average of the parameters (EMA), which is sampled from."""

    kind: EmaKind = EmaKind.WARMUP
    """How much of the average an update keeps."""
    decay: float | None = None
    """Share of the average that an update keeps, 0 to below 1, for CONSTANT and WARMUP; None: 0.9999. Higher: smoother,
    slower to follow."""
    relative_std: float | None = None
    """Width of what POWER averages over, as a share of the run so far, up to 0.288; None: 0.1. Higher: smoother, slower
    to follow."""
    dtype: AccumulatorDtype = AccumulatorDtype.FLOAT32
    """Dtype of the average. bfloat16 takes 2 bytes per parameter instead of 4 and is rounded stochastically, to either
    neighbour, so that changes far below its 3 digits still accumulate; what is sampled has 3 digits."""

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for those that would have no effect."""
        for name, value, kinds in (
            ("decay", self.decay, (EmaKind.CONSTANT, EmaKind.WARMUP)),
            ("relative_std", self.relative_std, (EmaKind.POWER,)),
        ):
            if value is not None and self.kind not in kinds:
                raise InputError(
                    f"ema.{name}={value} has no effect with ema.kind={self.kind.value}. Leave it out (None), or set "
                    f"ema.kind={kinds[0].value}"
                )
        check_ranges([("ema.decay", self.decay, 0, 1)], below_high=True)
        check_ranges([("ema.relative_std", self.relative_std, 0, _WIDEST)], above_low=True)
        if self.kind is EmaKind.NONE and self.dtype is not AccumulatorDtype.FLOAT32:
            raise InputError(f"ema.dtype={self.dtype.value} has no effect with ema.kind=none. Set it to float32")


def power_of(relative_std: float) -> float:
    """The γ of the power function t^γ with this relative standard deviation.

    σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)), arXiv:2312.02696, section 3.1: the positive root of a cubic.
    """
    inverse = relative_std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def weight_at(config: EmaConfig, updates: Int[Array, ""]) -> Float[Array, ""]:
    """The weight w of the parameters in the average, at the update that follows `updates` updates."""
    decay = _DECAY if config.decay is None else config.decay
    match config.kind:
        case EmaKind.CONSTANT:
            return jnp.float32(1 - decay)
        case EmaKind.WARMUP:
            return 1 - jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
        case EmaKind.POWER:
            power = power_of(_RELATIVE_STD if config.relative_std is None else config.relative_std)
            # 1 − (1 − 1/t)^(γ + 1) would lose all but two digits to rounding by t = 10⁵.
            return -jnp.expm1((power + 1) * jnp.log1p(-1 / (1.0 + updates)))
        case EmaKind.OPTIMISER | EmaKind.NONE:
            return jnp.float32(1)


def start(config: EmaConfig, params: Params) -> Params | None:
    """The average before the first update: a copy of the parameters. None with EmaKind.NONE."""
    if config.kind is EmaKind.NONE:
        return None
    return jax.tree.map(lambda leaf: jnp.array(leaf, config.dtype.dtype, copy=True), params)


def update(average: Params, params: Params, weight: Float[Array, ""], key: Key[Array, ""]) -> Params:
    """The average after an update; each leaf keeps its dtype. key: for the stochastic rounding to bfloat16."""
    leaves, structure = jax.tree.flatten(average)
    updated = [
        _cast(old + weight * (new - old), old.dtype, jax.random.fold_in(key, number))
        for number, (old, new) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True))
    ]
    return jax.tree.unflatten(structure, updated)


def _cast(value: Float[Array, "*shape"], dtype: jnp.dtype, key: Key[Array, ""]) -> Float[Array, "*shape"]:
    return round_stochastically(value, key) if dtype == jnp.bfloat16 else value


def round_stochastically(value: Float[Array, "*shape"], key: Key[Array, ""]) -> Float[Array, "*shape"]:
    """Stochastic rounding of float32 to one of the two neighbours in bfloat16, the nearer one more often: unbiased.

    Rounded to nearest, a change below 0.4 % of a value would always be lost; a decay of 0.9999 changes it by 0.01 %.
    """
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32) + jax.random.bits(key, value.shape, jnp.uint16)
    high = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    # Adding to the bits of a NaN may turn it into a number.
    return jnp.where(jnp.isfinite(value), high, value.astype(jnp.bfloat16))
