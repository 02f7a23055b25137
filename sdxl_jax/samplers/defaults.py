"""Sampling defaults of a model: sampler, spacing and noise levels, as its own files give them.

The fields are those of diffusers' scheduler_config.json.
"""

import enum
from dataclasses import dataclass


class Spacing(enum.Enum):
    """Which of the training timesteps a sampler visits. Lin et al. (arXiv:2305.08891), table 2."""

    LEADING = "leading"
    """Multiples of T // steps, plus an offset: 1, 21, 41 … 981. What diffusers does with the SDXL weights."""
    TRAILING = "trailing"
    """Counted down from the last: 999, 979 … 19. What sgm does."""
    LINSPACE = "linspace"
    """Evenly from 0 to the last, both included; not whole numbers in general."""


class Sigmas(enum.Enum):
    """Spacing of the noise levels between the first and the last."""

    SCHEDULE = "schedule"
    """The noise levels of the timesteps that `Spacing` selects."""
    KARRAS = "karras"
    """Even in sigma^(1/7). Karras et al., arXiv:2206.00364, eq. 5."""
    EXPONENTIAL = "exponential"
    """Even in log sigma."""


class FinalSigma(enum.Enum):
    """The noise level that the last step leads to."""

    ZERO = "zero"
    """No noise: the finished image."""
    SIGMA_MIN = "sigma_min"
    """The noise level of timestep 0, the lowest that was trained."""


@dataclass(frozen=True)
class SamplingDefaults:
    """The defaults are those of SDXL's official scheduler_config.json."""

    sampler: str | None = None
    """Name of the sampler, as on the command line. None: euler; ddim at zero terminal SNR, where Euler's sigma is
    infinite; lcm for a distilled model."""
    spacing: Spacing | None = None
    """Which timesteps are visited. None: leading; trailing at zero terminal SNR, so that the last one is among them."""
    steps_offset: int = 1
    """Added to leading timesteps."""
    sigmas: Sigmas = Sigmas.SCHEDULE
    """Spacing of the noise levels between the first and the last, for samplers that can visit any."""
    set_alpha_to_one: bool = False
    """Whether ddim ends at the finished image; otherwise at the noise level of timestep 0."""
    final_sigma: FinalSigma = FinalSigma.ZERO
    """Noise level that the last step of euler, dpmpp_2m, dpmpp_2m_sde and unipc leads to."""
    preset: str | None = None
    """Preset of a few-step model (`samplers/presets.py`), as on the command line: its sampler, timesteps, steps,
    guidance and size come before those of the other fields. None: none; lcm for a distilled model."""
    steps: int | None = None
    """Number of steps that the model was distilled for; None: the preset's, or 30."""
    guidance: float | None = None
    """Guidance scale, of a model that is guided or has it as an input; None: the preset's, or 5."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels that the model was distilled at; None: the preset's, or the model's `default_size`."""

    def sampler_of(self, zero_terminal_snr: bool, distilled: bool) -> str:
        """The sampler of a model with these properties."""
        if self.sampler is not None:
            return self.sampler
        return "lcm" if distilled else "ddim" if zero_terminal_snr else "euler"

    def spacing_of(self, zero_terminal_snr: bool) -> Spacing:
        """The spacing of a model with this property."""
        if self.spacing is not None:
            return self.spacing
        return Spacing.TRAILING if zero_terminal_snr else Spacing.LEADING

    def sigmas_of(self, sampler: str) -> Sigmas:
        """The spacing of a sampler's noise levels."""
        return self.sigmas if sampler in _ANY_SIGMAS else Sigmas.SCHEDULE

    def ends_at_first(self, sampler: str) -> bool:
        """Whether a sampler ends at the noise level of timestep 0 instead of the finished image."""
        if sampler == "ddim":
            return not self.set_alpha_to_one
        return sampler in _ENDS_AT_ANY and self.final_sigma is FinalSigma.SIGMA_MIN


PLAYGROUND_GUIDANCE = 3.0
"""Of Playground v2.5, by its card: its files do not say it."""
_ANY_SIGMAS = ("euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
"""Samplers whose schedulers in diffusers have use_karras_sigmas and the like."""
_ENDS_AT_ANY = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
"""Samplers whose schedulers in diffusers have final_sigmas_type."""
