"""The training loss: noise an image, weight the squared error of the prediction.

    L = E w(t) ‖target − network(α_t x₀ + σ_t ε, t)‖²,   t over the timesteps, uniformly or as configured

With a continuous noise law t is σ or s, distributed as in `training_levels`, and the network has the law's input and
target (`continuous`).

Options: weights by noise level, offset noise, input perturbation, a range of timesteps, biased timesteps, the
distribution of continuous levels. The network is a function that is passed in.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Bool, Float, Int, Key, Num, UInt8

from sdxl_jax.diffusion import continuous
from sdxl_jax.diffusion.continuous import ContinuousConfig, EdmConfig, FlowConfig, noise_input, scales
from sdxl_jax.diffusion.parameterisation import CONTINUOUS, Prediction, target
from sdxl_jax.diffusion.schedule import Schedule
from sdxl_jax.diffusion.training_levels import LevelsConfig, draw_level
from sdxl_jax.errors import InputError, check_ranges

Array = jax.Array


class Weighting(enum.Enum):
    """How much an error counts at each noise level."""

    UNIFORM = "uniform"
    """Weight 1 for an error in what the network predicts: DDPM's simple loss, SDXL; EDM's λ(σ), which is 1 / c_out² for
    an error in x₀; flow matching."""
    MIN_SNR = "min_snr"
    """By min(SNR, γ) / SNR for ε: nearly clean timesteps count less. Hang et al. 2023, arXiv:2303.09556."""
    DEBIASED = "debiased"
    """By 1 / √SNR for ε: noisy timesteps count more. Yu et al. 2023, arXiv:2310.08442."""
    X0 = "x0"
    """Weight 1 for an error in x₀: noisy levels count more; diffusers' training of Playground v2.5. Of continuous noise
    levels alone."""
    INVERSE_SQUARE = "inverse_square"
    """By σ⁻² for an error in x₀: nearly clean levels count more; the weight of diffusers' EDM-style training. Of EDM's
    noise levels alone; for flow matching s⁻² is UNIFORM."""
    COSMAP = "cosmap"
    """By 2 / (π (1 − 2s + 2s²)) for ε − x₀: the middle counts twice as much as the ends. Esser et al. 2024,
    arXiv:2403.03206, eq. 21. Of flow matching alone."""


def _fitting(law: ContinuousConfig | None) -> tuple[Weighting, ...]:
    """Those of a model with this noise law, or with the discrete schedule (None)."""
    match law:
        case None:
            return Weighting.UNIFORM, Weighting.MIN_SNR, Weighting.DEBIASED
        case EdmConfig():
            return Weighting.UNIFORM, Weighting.X0, Weighting.INVERSE_SQUARE
        case FlowConfig():
            return Weighting.UNIFORM, Weighting.X0, Weighting.COSMAP


MIN_SNR_GAMMA = 5.0
"""γ of min-SNR-γ where none is given, as published."""


@dataclass(frozen=True)
class LossConfig:
    """How the error is weighted, and how timesteps and noise are drawn."""

    weighting: Weighting = Weighting.UNIFORM
    """How much an error counts at each noise level."""
    min_snr_gamma: float | None = None
    """The γ of MIN_SNR; None: 5, as published. Higher: closer to UNIFORM for ε."""
    offset_noise: float = 0.0
    """Strength of offset noise, one number per channel. Higher: overall brightness is learnt better; SDXL uses 0.05 in
    its last stage."""
    input_perturbation: float = 0.0
    """Strength γ of further noise ξ in the network's input that the target does not have: ε + γ ξ. Higher: sampling is
    more robust to its own errors, details are softer; 0.1 is published. Ning et al. 2023, arXiv:2301.11706, algorithm
    1."""
    timesteps: tuple[int, int] | None = None
    """First timestep that is trained, and the one after the last; None: all. (0, 200) is SDXL's refiner."""
    biased_timesteps: tuple[int, int] | None = None
    """First timestep that is drawn more often, and the one after the last, e.g. (750, 1000); None: uniform."""
    timestep_bias: float | None = None
    """How many times as often a biased timestep is drawn as another. Higher: the others are learnt more slowly; below
    1: drawn less often; 0: never."""
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    """Which noise levels are trained where they are continuous."""

    def check(self, timesteps: int, law: ContinuousConfig | None = None) -> None:
        """Raises InputError for values that are out of range and for those that would have no effect. timesteps: number
        of timesteps of the schedule. law: continuous noise levels in its place."""
        self._check_law(law)
        if self.min_snr_gamma is not None and self.weighting is not Weighting.MIN_SNR:
            remedy = "Set loss.weighting=min_snr, or leave it out" if law is None else "Leave it out"
            raise InputError(
                f"loss.min_snr_gamma={self.min_snr_gamma} has no effect with loss.weighting={self.weighting.value}. "
                f"{remedy}"
            )
        check_ranges([("loss.min_snr_gamma", self.min_snr_gamma, 0, np.inf)], above_low=True, below_high=True)
        check_ranges(
            [
                ("loss.offset_noise", self.offset_noise, 0, np.inf),
                ("loss.input_perturbation", self.input_perturbation, 0, np.inf),
                ("loss.timestep_bias", self.timestep_bias, 0, np.inf),
            ],
            below_high=True,
        )
        for name, span in (("timesteps", self.timesteps), ("biased_timesteps", self.biased_timesteps)):
            if span is not None and not 0 <= span[0] < span[1] <= timesteps:
                raise InputError(
                    f"loss.{name}={span[0]} {span[1]} is not a range of the schedule's timesteps. Give first and stop "
                    f"with 0 <= first < stop <= {timesteps}"
                )
        if (self.biased_timesteps is None) != (self.timestep_bias is None):
            given, other = "loss.biased_timesteps", "loss.timestep_bias"
            given, other = (given, other) if self.timestep_bias is None else (other, given)
            raise InputError(f"{given} needs {other}. Give both, e.g. 750 1000 and 2, or neither")
        shares = frequencies(self, timesteps)
        if not shares.any():
            raise InputError(
                "loss.timestep_bias=0 leaves no timestep to train: loss.biased_timesteps covers all of loss.timesteps. "
                "Bias a part of them"
            )
        plain = dataclasses.replace(self, biased_timesteps=None, timestep_bias=None)
        if self.biased_timesteps is not None and np.allclose(shares, frequencies(plain, timesteps)):
            raise InputError(
                f"loss.biased_timesteps with loss.timestep_bias={self.timestep_bias} has no effect: all timesteps that "
                "are trained are drawn equally often. Leave both out, or bias a part of loss.timesteps"
            )

    def _check_law(self, law: ContinuousConfig | None) -> None:
        self.levels.check(law)
        if self.weighting not in (fitting := _fitting(law)):
            noise = "None" if law is None else type(law).__name__
            raise InputError(
                f"loss.weighting={self.weighting.value} does not apply to the noise levels of model.noise={noise}. "
                f"Give one of {', '.join(each.value for each in fitting)}"
            )
        for name in ("timesteps", "biased_timesteps", "timestep_bias"):
            if law is not None and (value := getattr(self, name)) is not None:
                raise InputError(
                    f"loss.{name}={value} has no effect on a model with continuous noise levels (model.noise), which "
                    "has no timesteps. Leave it out; loss.levels says which levels are trained"
                )


def frequencies(config: LossConfig, timesteps: int) -> Float[np.ndarray, " timesteps"]:
    """Probability of each timestep."""
    timestep = np.arange(timesteps)

    def inside(span: tuple[int, int]) -> Bool[np.ndarray, " timesteps"]:
        return (span[0] <= timestep) & (timestep < span[1])

    weight = inside(config.timesteps or (0, timesteps)).astype(np.float64)
    if config.biased_timesteps is not None and config.timestep_bias is not None:
        weight[inside(config.biased_timesteps)] *= config.timestep_bias
    return weight / max(weight.sum(), np.finfo(np.float64).tiny)


def draw_timestep(key: Key[Array, ""], config: LossConfig, timesteps: int) -> Int[Array, ""]:
    """One timestep of the range, with the probabilities of `frequencies`."""
    if config.biased_timesteps is None:
        return jax.random.randint(key, (), *(config.timesteps or (0, timesteps)))
    # Inverse of the distribution function, in integers of 2⁻³²: in float32 a probability is off by up to 1e-4.
    shares = frequencies(config, timesteps)
    ends = np.minimum(np.round(np.cumsum(shares) * 2.0**32), 2.0**32 - 1)[: np.flatnonzero(shares)[-1]]
    return jnp.searchsorted(ends.astype(np.uint32), jax.random.bits(key), side="right").astype(jnp.int32)


def weights(
    snr: Float[np.ndarray, " timesteps"], config: LossConfig, prediction: Prediction
) -> Float[np.ndarray, " timesteps"] | None:
    """The weight of an error in what the network predicts, at each timestep; None: all 1."""
    match config.weighting:
        case Weighting.UNIFORM:
            return None
        case Weighting.MIN_SNR:
            return min_snr_weight(
                snr, MIN_SNR_GAMMA if config.min_snr_gamma is None else config.min_snr_gamma, prediction
            )
        case Weighting.DEBIASED:
            return debiased_weight(snr, prediction)
        case Weighting.X0 | Weighting.INVERSE_SQUARE | Weighting.COSMAP:
            raise AssertionError("refused with the discrete schedule (`LossConfig.check`)")


def min_snr_weight(
    snr: Float[np.ndarray, " timesteps"], gamma: float, prediction: Prediction
) -> Float[np.ndarray, " timesteps"]:
    """Min-SNR-γ, Hang et al. 2023, arXiv:2303.09556, section 3.4: the weight min(SNR, γ) of an error in x₀, expressed
    as the weight of an error in what the network predicts.

    ‖Δx₀‖² = ‖Δε‖² / SNR = ‖Δv‖² / (SNR + 1). An SNR of 0 (zero terminal SNR) is allowed: the weight of ε is 1 there,
    its limit.
    """
    clipped = np.minimum(snr, gamma)
    match prediction:
        case Prediction.EPSILON:
            return np.divide(clipped, snr, out=np.ones_like(snr), where=snr > 0)
        case Prediction.V:
            return clipped / (snr + 1)
        case Prediction.X0:
            return clipped
        case Prediction.EDM | Prediction.FLOW:
            raise AssertionError(CONTINUOUS)


def debiased_weight(snr: Float[np.ndarray, " timesteps"], prediction: Prediction) -> Float[np.ndarray, " timesteps"]:
    """Debiased estimation, Yu et al. 2023, arXiv:2310.08442: the weight 1/√SNR of an error in ε, expressed as the
    weight of an error in what the network predicts, as above: √SNR for x₀, √SNR / (SNR + 1) for v.

    Published for ε alone, without a cap: SDXL's schedule ends at 14.6. At an SNR of 0 the weights of x₀ and v are 0;
    that of ε has no limit there, and is refused together with zero terminal SNR (`ModelConfig.check`): it is 0 too.
    """
    root = np.sqrt(snr)
    match prediction:
        case Prediction.EPSILON:
            return np.divide(1, root, out=np.zeros_like(snr), where=snr > 0)
        case Prediction.V:
            return root / (snr + 1)
        case Prediction.X0:
            return root
        case Prediction.EDM | Prediction.FLOW:
            raise AssertionError(CONTINUOUS)


def level_weight(
    weighting: Weighting,
    law: ContinuousConfig,
    prediction: Prediction,
    alpha: Float[Array, "batch 1 1 1"],
    sigma_t: Float[Array, "batch 1 1 1"],
) -> Float[Array, "batch 1 1 1"] | None:
    """λ(σ) as the weight of an error in what the network predicts, at continuous noise levels; None: all 1.

    An error Δ there is one of c_out Δ in x₀.
    """
    output = scales(law, prediction, alpha, sigma_t).output
    match weighting:
        case Weighting.X0:
            return output**2
        case Weighting.INVERSE_SQUARE:
            return (output * alpha / sigma_t) ** 2
        case Weighting.COSMAP:
            return 2 / math.pi * (alpha + sigma_t) ** 2  # 1 − 2s + 2s² = 1 / (α + σ_t)²
        case Weighting.UNIFORM | Weighting.MIN_SNR | Weighting.DEBIASED:
            return None


def draw_noise(key: Key[Array, ""], shape: tuple[int, ...], offset: float) -> Float[Array, "height width channels"]:
    """Standard normal noise for one latent of shape [height, width, channels], plus `offset` × one normal number per
    channel.

    Offset noise: Guttenberg 2023, "Diffusion with Offset Noise"; SDXL's stage 3 (arXiv:2307.01952, section 2.5).
    """
    noise_key, offset_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, shape)
    if offset:
        noise += offset * jax.random.normal(offset_key, (1, 1, shape[-1]))
    return noise


Network = Callable[
    [Float[Array, "batch height width channels"], Num[Array, " batch"]], Float[Array, "batch height width channels"]
]
"""(x_t, timestep) -> prediction; of a continuous law, (its `Scales.input` · x_t, its `noise_input`) -> F."""


class BaseTarget(NamedTuple):
    """The prediction of another network as the target of some examples: the model without what is trained beside it."""

    network: Network
    examples: Bool[Array, " batch"]
    """Which examples."""


def position_weights(
    mask: UInt8[Array, "batch _height _width"], height: int, width: int
) -> Float[Array, "batch height width"]:
    """Weights of the positions of a latent of that size, from masks of its pixels, 0..255: the mean over the pixels of
    a position, divided by the mean over all positions, so that the loss of an image does not depend on how much of it
    counts. 0 everywhere for a black mask."""
    averaged = reduce(jnp.asarray(mask, jnp.float32) / 255, "b (h y) (w x) -> b h w", "mean", h=height, w=width)
    area = averaged.mean((1, 2), keepdims=True)
    return averaged / jnp.where(area > 0, area, 1)


class _Levels(NamedTuple):
    """The noise levels of a batch."""

    timestep: Num[Array, " batch"]
    """The network's input: whole numbers, or a law's `noise_input`."""
    alpha: Float[Array, "batch 1 1 1"]
    sigma_t: Float[Array, "batch 1 1 1"]


def at(values: Float[np.ndarray, " timesteps"], timestep: Num[Array, " batch"]) -> Float[Array, "batch 1 1 1"]:
    """A schedule's numbers at the timesteps of a batch, to multiply latents with."""
    return jnp.asarray(values, jnp.float32)[timestep][:, None, None, None]


def _levels(schedule: Schedule | ContinuousConfig, drawn: Num[Array, " batch"]) -> _Levels:
    """drawn: timesteps, or levels of a law."""
    if isinstance(schedule, Schedule):
        return _Levels(drawn, at(schedule.alpha, drawn), at(schedule.sigma_t, drawn))
    return _Levels(jnp.asarray(noise_input(schedule, drawn)), *schedule.level(drawn[:, None, None, None]))


def _weight(
    schedule: Schedule | ContinuousConfig, prediction: Prediction, config: LossConfig, levels: _Levels
) -> Float[Array, "batch 1 1 1"] | None:
    if not isinstance(schedule, Schedule):
        return level_weight(config.weighting, schedule, prediction, levels.alpha, levels.sigma_t)
    by_timestep = weights(schedule.snr, config, prediction)
    return None if by_timestep is None else at(by_timestep, levels.timestep)


def diffusion_loss(
    network: Network,
    x0: Float[Array, "batch height width channels"],
    keys: Key[Array, " batch"],
    schedule: Schedule | ContinuousConfig,
    prediction: Prediction,
    config: LossConfig,
    example_weight: Float[Array, " batch"] | None = None,
    base: BaseTarget | None = None,
    position_weight: Float[Array, "batch height width"] | None = None,
) -> Float[Array, ""]:
    """Mean weighted squared error over the batch. schedule: discrete noise levels, or a law of continuous ones.
    example_weight: a factor of each example's; the mean is over their number, as in sd-scripts. base: for examples with
    another target. position_weight: of `position_weights`.

    network(x_t, timestep [batch]) -> prediction; x0: scaled latents; keys: one per example, so that an example's
    timestep and noise do not depend on how the batch is split into micro-batches or over devices.
    """

    def draw(
        key: Key[Array, ""],
    ) -> tuple[Num[Array, ""], Float[Array, "height width channels"], Float[Array, "height width channels"]]:
        """(timestep or level, ε, ε of the network's input) of one example."""
        time_key, noise_key, perturbation_key = jax.random.split(key, 3)
        epsilon = draw_noise(noise_key, x0.shape[1:], config.offset_noise)
        perturbed = epsilon
        if config.input_perturbation:
            perturbed += config.input_perturbation * jax.random.normal(perturbation_key, epsilon.shape)
        if isinstance(schedule, Schedule):
            return draw_timestep(time_key, config, len(schedule.alpha_bar)), epsilon, perturbed
        return draw_level(time_key, config.levels, schedule), epsilon, perturbed

    drawn, epsilon, perturbed = jax.vmap(draw)(keys)
    levels = _levels(schedule, drawn)
    timestep, alpha, sigma_t = levels
    x_t = alpha * x0 + sigma_t * perturbed
    if isinstance(schedule, Schedule):
        aim = target(prediction, x0, epsilon, alpha, sigma_t)
    else:
        x_t = scales(schedule, prediction, alpha, sigma_t).input * x_t
        aim = continuous.target(schedule, prediction, x0, epsilon, alpha, sigma_t)
    output = network(x_t, timestep)
    if base is not None:
        of_base = jax.lax.stop_gradient(base.network(x_t, timestep))
        aim = jnp.where(base.examples[:, None, None, None], of_base, aim)
    error = (output - aim) ** 2
    if (weight := _weight(schedule, prediction, config, levels)) is not None:
        error *= weight
    if example_weight is not None:
        error *= example_weight[:, None, None, None]
    if position_weight is not None:
        error *= position_weight[..., None]
    return error.mean()
