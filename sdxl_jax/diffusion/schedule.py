"""The noise schedule: how much of the image is left at each of the 1000 timesteps.

    x_t = α_t x₀ + σ_t ε,   α_t² = ᾱ_t = Π (1 − β_i),   α_t² + σ_t² = 1

Computed once in float64 with numpy, then used in float32. Two names for noise are kept apart: `sigma_t` here is the
variance-preserving √(1 − ᾱ); the EDM sigma, of x₀ + sigma ε, is √((1 − ᾱ) / ᾱ). Ho et al. (arXiv:2006.11239), Karras
et al. (arXiv:2206.00364), and the numbers of sgm `modules/diffusionmodules/discretizer.py`.
"""

import enum
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


class BetaSchedule(enum.Enum):
    SCALED_LINEAR = "scaled_linear"
    """√β is linear: Stable Diffusion and SDXL."""
    LINEAR = "linear"
    """β is linear: DDPM."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The defaults are Stable Diffusion's and SDXL's."""

    timesteps: int = 1000
    """Number of discrete noise levels."""
    beta_start: float = 0.00085
    """β of timestep 0. Higher: the cleanest level is noisier."""
    beta_end: float = 0.012
    """β of the last timestep. Higher: less of the image is left at the end."""
    betas: BetaSchedule = BetaSchedule.SCALED_LINEAR
    """How β is interpolated between the two."""
    zero_terminal_snr: bool = False
    """Rescale so that nothing of the image is left at the last timestep. Needs v- or x₀-prediction."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule's numbers, float64, one per timestep."""

    alpha_bar: Float[np.ndarray, " timesteps"]

    @property
    def alpha(self) -> Float[np.ndarray, " timesteps"]:
        """α_t = √ᾱ_t, the share of the image."""
        return np.sqrt(self.alpha_bar)

    @property
    def sigma_t(self) -> Float[np.ndarray, " timesteps"]:
        """σ_t = √(1 − ᾱ_t), the share of the noise."""
        return np.sqrt(1 - self.alpha_bar)

    @property
    def sigma(self) -> Float[np.ndarray, " timesteps"]:
        """The EDM sigma σ_t / α_t; infinite where nothing of the image is left."""
        with np.errstate(divide="ignore"):
            return self.sigma_t / self.alpha

    @property
    def snr(self) -> Float[np.ndarray, " timesteps"]:
        """Signal-to-noise ratio ᾱ / (1 − ᾱ), of the schedule as it is used: after any rescaling."""
        return self.alpha_bar / (1 - self.alpha_bar)


def make(config: ScheduleConfig) -> Schedule:
    """The schedule that a configuration describes."""
    if config.betas is BetaSchedule.SCALED_LINEAR:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps) ** 2
    else:
        betas = np.linspace(config.beta_start, config.beta_end, config.timesteps)
    alpha_bar = np.cumprod(1 - betas)
    return Schedule(rescale_to_zero_terminal_snr(alpha_bar) if config.zero_terminal_snr else alpha_bar)


def rescale_to_zero_terminal_snr(alpha_bar: Float[np.ndarray, " timesteps"]) -> Float[np.ndarray, " timesteps"]:
    """Shifts √ᾱ so that it ends at 0 and scales it so that it begins where it did. Lin et al., arXiv:2305.08891,
    alg. 1."""
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
