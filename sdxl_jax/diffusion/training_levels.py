"""Which noise levels are trained, of a model with continuous ones: the density P(σ) of EDM and flow matching.

    log-normal     ln σ ~ N(mean, deviation²)                         EDM    Karras et al., arXiv:2206.00364, table 1
    logit-normal   ln(s / (1 − s)) ~ N(mean, deviation²)              flow   Esser et al., arXiv:2403.03206, eq. 19
    mode           s = 1 − u − k (cos²(π u / 2) − 1 + u), u uniform   flow   eq. 20
    uniform        s uniform over 0..1                                flow   eq. 18

Levels of flow matching are shifted afterwards, as those that are sampled (`FlowConfig.shift`, eq. 23). What an error
costs at a level, λ(σ), is in `loss`.
"""

import enum
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from sdxl_jax.diffusion.continuous import ContinuousConfig, FlowConfig
from sdxl_jax.errors import InputError, check_ranges

Array = jax.Array


class LevelDistribution(enum.Enum):
    """How the noise levels that are trained are distributed."""

    LOG_NORMAL = "log_normal"
    """Of σ: EDM."""
    LOGIT_NORMAL = "logit_normal"
    """Of s: flow matching as in SD 3, most levels in the middle."""
    MODE = "mode"
    """Of s: more levels in the middle, and still some at both ends; SD 3's other one."""
    UNIFORM = "uniform"
    """Of s: rectified flow."""


@dataclass(frozen=True)
class LevelsConfig:
    """Which noise levels are trained, of a model with continuous ones (`model.noise`)."""

    distribution: LevelDistribution | None = None
    """How they are distributed. None: LOG_NORMAL for EDM, LOGIT_NORMAL for flow matching."""
    mean: float | None = None
    """Mean of ln σ, or of ln(s / (1 − s)). Higher: noisier levels are trained more, as large images need. None: −1.2
    for LOG_NORMAL, 0 for LOGIT_NORMAL, as published."""
    deviation: float | None = None
    """Standard deviation of the same. Higher: more of nearly clean and of nearly pure noise. None: 1.2 for LOG_NORMAL,
    1 for LOGIT_NORMAL, as published."""
    mode_scale: float | None = None
    """The k of MODE, −1 to 1.75. Higher: more levels in the middle; 0: UNIFORM. None: 1.29, as published."""

    def check(self, law: ContinuousConfig | None) -> None:
        """Raises InputError for values that are out of range, and for those that have no effect. law: None is the
        discrete schedule."""
        given = [name for name, value in vars(self).items() if value is not None]
        if law is None:
            if given:
                raise InputError(
                    f"loss.levels.{given[0]} has no effect on the timesteps of model.schedule. Leave it out, or set "
                    "model.noise to continuous noise levels"
                )
            return
        distribution = self.of(law)
        if (distribution is LevelDistribution.LOG_NORMAL) == isinstance(law, FlowConfig):
            fitting = "logit_normal, mode or uniform" if isinstance(law, FlowConfig) else "log_normal"
            raise InputError(
                f"loss.levels.distribution={distribution.value} is not of the levels of model.noise="
                f"{type(law).__name__}. Give {fitting}"
            )
        used = {LevelDistribution.MODE: {"mode_scale"}, LevelDistribution.UNIFORM: set()}
        for name in set(given) - {"distribution"} - used.get(distribution, {"mean", "deviation"}):
            raise InputError(
                f"loss.levels.{name}={getattr(self, name)} has no effect with loss.levels.distribution="
                f"{distribution.value}. Leave it out"
            )
        check_ranges([("loss.levels.mean", self.mean, -10, 10)])
        check_ranges([("loss.levels.deviation", self.deviation, 0, 10)], above_low=True)
        check_ranges([("loss.levels.mode_scale", self.mode_scale, -1, 1.75)])  # where s falls with u, up to 2 / (π − 2)

    def of(self, law: ContinuousConfig) -> LevelDistribution:
        """The distribution, that of the law by default."""
        default = LevelDistribution.LOGIT_NORMAL if isinstance(law, FlowConfig) else LevelDistribution.LOG_NORMAL
        return self.distribution or default


def draw_level(key: Key[Array, ""], config: LevelsConfig, law: ContinuousConfig) -> Float[Array, ""]:
    """One noise level to train: σ (EDM) or s (flow)."""

    def normal(mean: float, deviation: float) -> Float[Array, ""]:
        """Of the configured mean and deviation, these by default."""
        mean = mean if config.mean is None else config.mean
        deviation = deviation if config.deviation is None else config.deviation
        return mean + deviation * jax.random.normal(key)

    match config.of(law):
        case LevelDistribution.LOG_NORMAL:
            return jnp.exp(normal(-1.2, 1.2))
        case LevelDistribution.LOGIT_NORMAL:
            level = jax.nn.sigmoid(normal(0.0, 1.0))
        case LevelDistribution.MODE:
            u, scale = jax.random.uniform(key), 1.29 if config.mode_scale is None else config.mode_scale
            level = 1 - u - scale * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)
        case LevelDistribution.UNIFORM:
            level = jax.random.uniform(key)
    assert isinstance(law, FlowConfig), "LevelsConfig.check"
    return law.shifted(level)
