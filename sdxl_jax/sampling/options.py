"""What can be said of the images that are to be made: sizes, sampler, guidance, what the model is told, and how it is
computed. The command line has the same fields; `generate` acts on them.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from sdxl_jax.arrays import Size
from sdxl_jax.conditioning.prompts import LongPrompts
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.unet import UNetPart
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.steps import Family, Sampler, Sigmas, Spacing, find


class Position(NamedTuple):
    """Pixels from the image's corner."""

    top: int
    left: int


@dataclass(frozen=True)
class Options:
    """Everything about some images but their prompts, models, and the images that they start from."""

    height: int | None = None
    """Pixels, a multiple of 8, from 8 on. Default: the init image's, or the model's own."""
    width: int | None = None
    """Pixels, a multiple of 8, from 8 on. Default: the init image's, or the model's own."""
    steps: int = 30
    """Steps of the sampler, 1 to 1000; of sampler lcm 1 to 50. Higher: slower, finer."""
    sampler: str | None = None
    """How a step is made: ddpm, ddim, euler, euler_ancestral, heun, lms, dpmpp_2m, dpmpp_2m_sde, unipc, lcm. Default:
    what the model's files say, otherwise euler; ddim at zero terminal SNR; lcm for a distilled model."""
    timestep_spacing: Spacing | None = None
    """Which timesteps are visited: leading as diffusers (981 … 1), trailing as sgm (999 … 19), linspace. Default: what
    the model's files say, otherwise leading; trailing at zero terminal SNR; sampler lcm has its own."""
    sigmas: Sigmas | None = None
    """How noise levels lie between the first and the last: as the timesteps' own (schedule), karras, or exponential.
    Default: what the model's files say, otherwise schedule."""
    eta: float = 0.0
    """Share of fresh noise in each step of sampler ddim, 0 to 1."""
    guidance: float | None = None
    """Strength of classifier-free guidance, 0 to 1000; 5 to 10 is usual. 1 is none and costs half; so is all below it,
    as in diffusers: 0 is off. Default: 5; of a distilled model 1."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, of the guided output that is brought back to the deviation of the prompt's own. Higher: less
    over-exposed where guidance is strong."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the steps, 0 to 1, in which guidance (and PAG) acts. The others cost half."""
    pag: float = 0.0
    """Strength of perturbed-attention guidance, 0 to 1000; 3 is usual, 0 is off. More structure, for one more
    evaluation a step."""
    pag_parts: tuple[UNetPart, ...] = (UNetPart.MIDDLE,)
    """Where self-attention is perturbed for it: down, mid, up."""
    sequential: bool = False
    """Ask for prompt and negative prompt one after the other: less memory, slower."""
    seed: int = 0
    """0 to 4294967295. Image k depends on the seed and k, not on how many are drawn."""
    first_index: int = 0
    """The number k of the first image, 0 or more. Higher: the images that a longer run would have gone on with."""
    num_images: int = 1
    """Images per prompt, 1 or more."""
    original_size: Size | None = None
    """HxW that the model is told the image had before any resize. Default: the image's size."""
    crop: Position | None = None
    """TOP,LEFT that the model is told the image was cropped at. Default: 0,0."""
    target_size: Size | None = None
    """HxW that the model is told it draws. Default: the image's size."""
    aesthetic_score: float | None = None
    """Rating that a refiner is told, 0 to 100, usually 1 to 10. Default 6."""
    negative_original_size: Size | None = None
    """The same for the negative prompt. Default: as for the prompt."""
    negative_crop: Position | None = None
    """The same for the negative prompt. Default: as for the prompt."""
    negative_target_size: Size | None = None
    """The same for the negative prompt. Default: as for the prompt."""
    negative_aesthetic_score: float | None = None
    """Rating that a refiner is told for the negative prompt, 0 to 100. Default 2.5."""
    long_prompts: LongPrompts = LongPrompts.TRUNCATE
    """What becomes of tokens beyond the first 75: cut off, or read in further chunks."""
    prompt_weights: bool = False
    """Read (word:1.2), (word) and [word] as weights; otherwise brackets are text."""
    strength: float | None = None
    """Of an init image: share of the way, 0 to 1, that is gone again, one step or more. Higher: less is left of it.
    Default: 0.3, and 1 with a mask."""
    handoff: float | None = None
    """With a refiner: share of the way, 0 to 1, after which it takes over (ensemble of experts). Default 0.8, unless
    refine_strength is given."""
    refine_strength: float | None = None
    """With a refiner: the finished latent is noised by this share of the way, 0 to 1, which the refiner goes again
    (SDEdit)."""
    batch_size: int = 4
    """Images at a time, 1 or more. Higher: faster until memory ends."""
    decode_tile: int | None = None
    """Pixels a side of the tiles in which the autoencoder decodes, a multiple of 8 from 128 on. For large images:
    memory is that of a tile. Default: all at once."""

    def method(self, config: ModelConfig) -> Sampler:
        """The sampler, of a model."""
        return find(self.resolved(config).sampler or "")

    def resolved(self, config: ModelConfig) -> "Options":
        """With the defaults that depend on the model or the sampler, and guidance that is off as 1. Raises InputError
        for an unknown sampler."""
        said, ends_at_zero_snr = config.sampling or SamplingDefaults(), config.schedule.zero_terminal_snr
        sampler = said.sampler_of(ends_at_zero_snr, config.distilled) if self.sampler is None else self.sampler
        spacing, guidance = self.timestep_spacing, self.guidance
        if spacing is None and find(sampler).family is not Family.CONSISTENCY:
            spacing = said.spacing_of(ends_at_zero_snr)
        if guidance is None:
            guidance = 1.0 if config.distilled else 5.0
        guidance = max(1.0, guidance)  # diffusers guides where guidance_scale > 1, and cards say 0 for off
        sigmas = said.sigmas_of(sampler) if self.sigmas is None else self.sigmas
        return dataclasses.replace(self, sampler=sampler, timestep_spacing=spacing, sigmas=sigmas, guidance=guidance)

    def check(self, config: ModelConfig) -> None:
        """Raises InputError for values out of range, and for those that would have no effect on this model."""
        length, factor = config.schedule.timesteps, config.vae.downsampling
        sampler, name_of_sampler = self.method(config), self.resolved(config).sampler
        check_ranges(
            [
                ("steps", self.steps, 1, length),
                ("seed", self.seed, 0, 2**32 - 1),
                ("num_images", self.num_images, 1, math.inf),
                ("batch_size", self.batch_size, 1, math.inf),
                ("first_index", self.first_index, 0, math.inf),
                *((name, getattr(self, name), 0, most) for name, most in _RANGES.items()),
            ]
        )
        start, stop = self.guidance_interval
        if not 0 <= start < stop <= 1:
            raise InputError(f"guidance_interval={start:g} {stop:g}, expected two numbers of 0 to 1, the lower first")
        if self.eta and not sampler.takes_eta:
            raise InputError(
                f"eta={self.eta} has no effect on sampler {name_of_sampler}. Use sampler ddim, or leave it out"
            )
        if self.pag and not self.pag_parts:
            raise InputError(f"pag={self.pag:g}, but pag_parts names nothing. Name some of down, mid, up")
        if self.handoff is not None and self.refine_strength is not None:
            raise InputError(
                f"handoff={self.handoff} and refine_strength={self.refine_strength} are two ways to use a refiner. "
                "Give one of them"
            )
        if self.decode_tile is not None and (self.decode_tile < 16 * factor or self.decode_tile % factor):
            raise InputError(
                f"decode_tile={self.decode_tile}, expected a multiple of {factor} from {16 * factor} on, e.g. 512"
            )
        if config.distilled and self.guidance is not None and self.guidance > 1:
            raise InputError(
                f"guidance={self.guidance:g}, but this model is distilled: guidance is in its weights. Leave it out, "
                "or set it to 1"
            )

    def notes(self, config: ModelConfig, negative: str | None = None) -> list[str]:
        """What has no effect, though nothing is wrong."""
        given = self.guidance
        off = f"guidance={1 if given is None else given:g} is off: only above 1 is there guidance"
        if self.resolved(config).guidance != 1:
            return []
        unused = [each.replace("_", "-") for each in vars(self) if each.startswith("negative_") and getattr(self, each)]
        unused = ["the negative prompt"] * (negative is not None) + unused
        if unused:
            return [f"{off}, and {', '.join(unused)} has no effect"]
        return [off] if given is not None and 0 < given < 1 else []


_RANGES = {"eta": 1, "guidance_rescale": 1, "strength": 1, "handoff": 1, "refine_strength": 1, "guidance": 1000}
_RANGES |= {"pag": 1000, "aesthetic_score": 100, "negative_aesthetic_score": 100}
"""Options from 0 on, and the most that they can be. Beyond 1000, guidance is a slip: float32 has no room for it."""


def check_size(height: int, width: int, factor: int) -> None:
    """Raises InputError for a size that cannot be drawn."""
    if height < factor or width < factor or height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise InputError(
            f"height {height} × width {width}: expected positive multiples of {factor}, e.g. {near[0]} × {near[1]}"
        )
    if height * width > LARGEST:
        raise InputError(f"height {height} × width {width}: more than {LARGEST:,} pixels. Is a digit too many?")


LARGEST = 16384**2
"""Pixels of an image beyond which a size is taken for a slip."""
