"""Sampling options: image size, sampler, guidance, micro-conditioning, and batching. The command line has the same
fields, and so imports this before anything that takes long; `generate` acts on them.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_jax.conditioning.prompts import LongPrompts
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.models.unet_parts import UNetPart
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults, Sigmas, Spacing
from sdxl_jax.sizes import Position, Size

if TYPE_CHECKING:
    from sdxl_jax.model import ModelConfig
    from sdxl_jax.samplers.steps import Sampler


@dataclass(frozen=True)
class Options:
    """How images are sampled: everything but prompts, models and init images."""

    height: int | None = None
    """Height in pixels, a multiple of 8. Default: the init image's, or the model's own."""
    width: int | None = None
    """Width in pixels, a multiple of 8. Default: the init image's, or the model's own."""
    steps: int | None = None
    """Sampling steps, 1 to 1000; 1 to 50 with sampler lcm; with a preset, those that it knows. Higher: slower, finer.
    Default: 30; the preset's."""
    sampler: str | None = None
    """Sampler: ddpm, ddim, euler, euler_ancestral, heun, lms, dpmpp_2m, dpmpp_2m_sde, unipc, lcm. Default: the one in
    the model's files, otherwise euler; ddim at zero terminal SNR; lcm for a distilled model."""
    timestep_spacing: Spacing | None = None
    """Timesteps that are visited: leading as in diffusers (981 … 1), trailing as in sgm (999 … 19), linspace. Default:
    the one in the model's files, otherwise leading; trailing at zero terminal SNR; sampler lcm has its own."""
    sigmas: Sigmas | None = None
    """Spacing of the noise levels between the first and the last: schedule (those of the timesteps), karras or
    exponential. Default: the one in the model's files, otherwise schedule."""
    eta: float = 0.0
    """Fraction of fresh noise in each step of sampler ddim, 0 to 1; 1 is ddpm."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 0 to 1000; 5 to 10 is usual. Up to 1 it is off, which halves the cost.
    Default: the one in the model's files, otherwise 5; 1 for a distilled model. Of a model that has it as an input,
    every scale costs the same."""
    guidance_rescale: float = 0.0
    """Guidance rescale, 0 to 1: fraction by which the guided output is rescaled to the deviation of the prompt's own.
    Higher: less over-exposure by strong guidance."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Interval of the steps, as fractions 0 to 1, in which guidance (and PAG) is on. The other steps cost half."""
    pag: float = 0.0
    """Scale of perturbed-attention guidance, 0 to 1000; 3 is usual, 0 is off. Higher: more structure. Costs one more
    network evaluation per step."""
    pag_parts: tuple[UNetPart, ...] = (UNetPart.MIDDLE,)
    """Parts of the UNet whose self-attention PAG perturbs: down, mid, up."""
    sequential: bool = False
    """Evaluate prompt and negative prompt one after the other instead of as one batch: less memory, slower."""
    seed: int = 0
    """Random seed, 0 to 4294967295. Image k depends on the seed and on k, not on how many images are sampled."""
    first_index: int = 0
    """Number k of the first image, 0 or more: continues the images of an earlier command."""
    num_images: int = 1
    """Images per prompt, 1 or more."""
    original_size: Size | None = None
    """HxW of the original image that the model is conditioned on. Default: the image's size."""
    crop: Position | None = None
    """TOP,LEFT of the crop that the model is conditioned on. Default: 0,0."""
    target_size: Size | None = None
    """HxW of the target size that the model is conditioned on. Default: the image's size."""
    aesthetic_score: float | None = None
    """Aesthetic score that a refiner is conditioned on, 0 to 100, usually 1 to 10. Default: 6."""
    negative_original_size: Size | None = None
    """Original size for the negative prompt. Default: that of the prompt."""
    negative_crop: Position | None = None
    """Crop for the negative prompt. Default: that of the prompt."""
    negative_target_size: Size | None = None
    """Target size for the negative prompt. Default: that of the prompt."""
    negative_aesthetic_score: float | None = None
    """Aesthetic score of a refiner for the negative prompt, 0 to 100. Default: 2.5."""
    long_prompts: LongPrompts = LongPrompts.TRUNCATE
    """Prompts of more than 75 tokens: truncate them, or encode them in chunks of 75."""
    prompt_weights: bool = False
    """Parse (word:1.2), (word) and [word] as prompt weights. Default: brackets are text."""
    strength: float | None = None
    """With an init image: fraction of the denoising schedule to run, 0 to 1, at least one step. Higher: less of the
    init image remains. Default: 0.3, or 1 with a mask."""
    handoff: float | None = None
    """With a refiner: fraction of the denoising schedule, 0 to 1, after which the refiner takes over (ensemble of
    experts). Default: 0.8, unless --refine-strength is given."""
    refine_strength: float | None = None
    """With a refiner: fraction of the denoising schedule, 0 to 1, that it runs on the finished latent (SDEdit)."""
    noise_augmentation: float | None = None
    """With image prompts: noise added to their embeddings, 0 to 1, as a fraction of the noise schedule. Higher: less of
    the images remains, and more varied results. Default: 0."""
    batch_size: int = 4
    """Images per batch, 1 or more. Higher: faster, until memory runs out."""
    decode_tile: int | None = None
    """Decode latents in tiles of this many pixels per side, a multiple of 8 from 128 on: needs the memory of one tile.
    Default: the whole image at once."""
    preset: str | None = None
    """Few-step model that the weights are, or that a LoRA makes of them: turbo, lightning, lcm, lcm-lora, hyper-sd,
    hyper-sd-unet, dmd2; distilled here: progressive, dmd, add. Sets sampler, timesteps, guidance and, where they are
    not given, steps and size. Default: as the model's files say; none otherwise."""

    def method(self, config: "ModelConfig") -> "Sampler":
        """The sampler of these options for a model."""
        from sdxl_jax.samplers.steps import find

        return find(self.resolved(config).sampler or "")

    def resolved(self, config: "ModelConfig") -> "Options":
        """With the defaults that depend on the model, the preset or the sampler filled in, and 1 for guidance that is
        off. Raises InputError for an unknown sampler or preset."""
        from sdxl_jax.samplers.steps import Family, find

        defaults, zero_terminal_snr = config.sampling or SamplingDefaults(), config.schedule.zero_terminal_snr
        name = self._preset_of(config)
        own = _own_defaults(name, defaults)
        if name is not None:
            preset = presets.find(name)
            defaults = dataclasses.replace(
                defaults, sampler=preset.sampler, spacing=preset.spacing, sigmas=Sigmas.SCHEDULE
            )
        sampler = defaults.sampler_of(zero_terminal_snr, config.distilled) if self.sampler is None else self.sampler
        spacing, guidance = self.timestep_spacing, self.guidance
        if spacing is None and find(sampler).family is not Family.CONSISTENCY and config.noise is None:
            spacing = defaults.spacing_of(zero_terminal_snr)
        if guidance is None:
            guidance = self._default_guidance(name, config, own)
        guidance = max(1.0, guidance)  # diffusers guides where guidance_scale > 1, and model cards write 0 for off
        sigmas = defaults.sigmas_of(sampler) if self.sigmas is None else self.sigmas
        steps = self.steps
        if steps is None:
            steps = own.steps or (STEPS if name is None else presets.find(name).default_steps)
        filled = dataclasses.replace(self, sampler=sampler, timestep_spacing=spacing, sigmas=sigmas, guidance=guidance)
        return dataclasses.replace(filled, steps=steps, preset=name)

    def _default_guidance(self, preset: str | None, config: "ModelConfig", own: SamplingDefaults) -> float:
        """own: the model's defaults, if they are of this preset."""
        if config.unet.guidance_dim is not None:
            return own.guidance or (None if preset is None else presets.find(preset).input_guidance) or GUIDANCE
        return 1.0 if config.distilled or preset is not None else own.guidance or GUIDANCE

    def _preset_of(self, config: "ModelConfig") -> str | None:
        """Name of the preset: the user's, or the one of the model's files, unless other timesteps are asked for."""
        if self.preset is not None:
            return self.preset
        defaults = config.sampling or SamplingDefaults()
        name = defaults.preset
        marked = config.distilled or config.unet.guidance_dim is not None
        if name is None and marked and defaults.sampler in (None, presets.find(presets.CONSISTENCY).sampler):
            name = presets.CONSISTENCY
        if name is None:
            return None
        other = self.sampler not in (None, presets.find(name).sampler) or self.timestep_spacing is not None
        return None if other or self.sigmas not in (None, Sigmas.SCHEDULE) else name

    def default_size(self, config: "ModelConfig") -> tuple[int, int]:
        """(height, width) in pixels where neither they nor an init image is given: what the model was distilled at, the
        preset's, or the model's own."""
        name, distilled_at = self._preset_of(config), config.sampling and config.sampling.size
        return distilled_at or (None if name is None else presets.find(name).size) or config.default_size

    def network_of(self, config: "ModelConfig") -> "ModelConfig":
        """The model as these options sample it: with the prediction of a preset's network of one step."""
        from sdxl_jax.diffusion.parameterisation import Prediction

        resolved = self.resolved(config)
        if resolved.preset is None or resolved.steps != 1 or not presets.find(resolved.preset).one_step_predicts_x0:
            return config
        return dataclasses.replace(config, prediction=Prediction.X0)

    def check(self, config: "ModelConfig") -> None:
        """Raises InputError for values out of range, and for options that have no effect on this model."""
        length, factor = config.schedule.timesteps, config.vae.downsampling
        sampler, sampler_name = self.method(config), self.resolved(config).sampler
        check_ranges(
            [
                ("steps", self.resolved(config).steps, 1, length),
                ("seed", self.seed, 0, 2**32 - 1),
                ("num_images", self.num_images, 1, math.inf),
                ("batch_size", self.batch_size, 1, math.inf),
                ("first_index", self.first_index, 0, math.inf),
                *((name, getattr(self, name), 0, most) for name, most in _RANGES.items()),
            ]
        )
        start, stop = self.guidance_interval
        if not 0 <= start < stop <= 1:
            raise InputError(
                f"guidance_interval={start:g} {stop:g}: expected two numbers of 0 to 1, the lower first, e.g. 0.2 0.8"
            )
        if self.eta and not sampler.takes_eta:
            raise InputError(
                f"eta={self.eta:g} has no effect on sampler {sampler_name}. Use sampler ddim, or leave eta out"
            )
        if self.pag and not self.pag_parts:
            raise InputError(f"pag={self.pag:g}, but pag_parts is empty. Give one or more of down, mid, up")
        if self.handoff is not None and self.refine_strength is not None:
            raise InputError(
                f"handoff={self.handoff:g} and refine_strength={self.refine_strength:g} are two ways to use a refiner. "
                "Give one of them"
            )
        if self.decode_tile is not None and (self.decode_tile < 16 * factor or self.decode_tile % factor):
            raise InputError(
                f"decode_tile={self.decode_tile}: expected a multiple of {factor}, {16 * factor} or more, e.g. 512"
            )
        if config.noise is not None and self.timestep_spacing is not None:
            raise InputError(
                f"timestep_spacing={self.timestep_spacing.value} has no effect on this model, whose noise levels are "
                "continuous. Leave it out"
            )
        has_input = config.unet.guidance_dim is not None
        self._check_guidance_input(has_input)
        if config.distilled and not has_input and self.guidance is not None and self.guidance > 1:
            raise InputError(
                f"guidance={self.guidance:g}, but this model is distilled: guidance is in its weights. Leave it out, "
                "or set it to 1"
            )
        if (name := self._preset_of(config)) is not None:
            self._check_preset(name, presets.find(name), config)

    def _check_guidance_input(self, has_input: bool) -> None:
        """Raises InputError for options of two evaluations, where guidance is an input of one."""
        if has_input and self.guidance_interval != (0.0, 1.0):
            start, stop = self.guidance_interval
            raise InputError(
                f"guidance_interval={start:g} {stop:g} has no effect on this model: guidance is an input of its UNet, "
                "and costs nothing. Leave it out"
            )
        if has_input and self.guidance_rescale and not self.pag:
            raise InputError(
                f"guidance_rescale={self.guidance_rescale:g} has no effect on this model: guidance is an input of its "
                "UNet, whose output is not guided again. Leave it out"
            )

    def _check_preset(self, name: str, preset: presets.Preset, config: "ModelConfig") -> None:
        """Raises InputError for options that contradict a preset, and for models that it is not for."""
        said, other = f"preset={name}", "Give another preset, or none"
        stated = config.sampling and config.sampling.preset
        if stated is not None and not presets.same_kind(name, stated):
            raise InputError(
                f"{said} contradicts preset={stated} of the model's files, which is of weights that were distilled in "
                f"another way. Leave preset out, or give weights of {name}; or a sampler without preset"
            )
        if self.preset is None:
            said, other = f"preset={name} of the model's files", "Give a sampler to sample it in another way"
        _check_model_of(said, preset, config, other)
        has_input = config.unet.guidance_dim is not None
        if has_input and preset.input_guidance is None:
            raise InputError(
                f"{said} is of weights without guidance as an input, which this model's UNet has (time_cond_proj_dim). "
                f"{other}"
            )
        if name == presets.CONSISTENCY and not config.distilled and not has_input:
            raise InputError(
                f"{said} is for consistency models, and this model's files do not mark it as one. For a model with an "
                "LCM-LoRA, give preset lcm-lora"
            )
        for field, own in (("sampler", preset.sampler), ("timestep_spacing", preset.spacing), ("sigmas", None)):
            given = getattr(self, field)
            if given not in (None, own, Sigmas.SCHEDULE):
                shown, instead = (getattr(each, "value", each) for each in (given, own))
                raise InputError(
                    f"{field}={shown} contradicts {said}, whose {field} is {instead or 'its own'}. Leave one of them "
                    "out"
                )
        if self.steps is not None and self.steps not in preset.steps:
            raise InputError(
                f"steps={self.steps}, but {said} is of weights for {presets.listed(preset.steps)} steps. Give one of "
                f"these numbers, or leave steps out. {other}"
            )
        taught = _own_defaults(name, config.sampling or SamplingDefaults()).steps
        if preset.of_one_number and taught is not None and self.steps not in (None, taught):
            raise InputError(
                f"steps={self.steps}, but the model's files say that it was distilled for {taught}, and {said} has "
                f"other weights for each number of steps. Leave steps out, or give the weights of {self.steps}"
            )
        if self.guidance is not None and self.guidance > preset.most_guidance and not has_input:
            most = "" if preset.most_guidance == 1 else f" but for a scale of up to {preset.most_guidance:g}"
            raise InputError(
                f"guidance={self.guidance:g}, but {said} is of weights that have guidance in them{most}. Leave it out, "
                f"or set it to {preset.most_guidance:g}. {other}"
            )

    def notes(self, config: "ModelConfig", negative: str | None = None) -> list[str]:
        """Options that have no effect, though nothing is wrong, as notes to the user."""
        given, stated = self.guidance, config.sampling and config.sampling.preset
        found = []
        if self.preset is None and stated is not None and stated == self._preset_of(config):
            found = [f"preset {stated}, by the model's files. A sampler that is given is used instead"]
        off = f"guidance={1 if given is None else given:g} turns guidance off: it needs a scale above 1"
        if config.unet.guidance_dim is not None:
            off = "guidance is an input of this model's UNet, which is evaluated for the prompt alone"
        elif self.resolved(config).guidance != 1:
            return found
        unused = [each.replace("_", "-") for each in vars(self) if each.startswith("negative_") and getattr(self, each)]
        unused = ["the negative prompt"] * (negative is not None) + unused
        if unused:
            return [*found, f"{off}. No effect: {', '.join(unused)}"]
        return [*found, off] if given is not None and 0 < given < 1 else found


def _own_defaults(name: str | None, defaults: SamplingDefaults) -> SamplingDefaults:
    """A model's defaults if they are of this preset, or of another one of its method; otherwise none."""
    stated = defaults.preset
    of_method = name is not None and stated is not None and presets.same_kind(name, stated)
    return defaults if name == stated or of_method else SamplingDefaults()


def _check_model_of(said: str, preset: presets.Preset, config: "ModelConfig", other: str) -> None:
    """Raises InputError for a model that a preset is not for. said, other: the preset and the remedy, for messages."""
    from sdxl_jax.diffusion.parameterisation import Prediction

    family = _family(config)
    if config.is_refiner or (preset.families and family not in preset.families):
        known = " and ".join(preset.families) or "models for text to image"
        raise InputError(f"{said} is of weights for {known}; this model is {family}. {other}")
    predicted = (Prediction.EPSILON, *((Prediction.X0,) if preset.one_step_predicts_x0 else ()))
    if preset.families and config.prediction not in predicted:
        raise InputError(
            f"{said} is of weights that predict epsilon; this model predicts {config.prediction.value}. {other}; "
            "--prediction epsilon if its files are wrong"
        )
    if config.distilled and preset.sampler != presets.find(presets.CONSISTENCY).sampler:
        raise InputError(
            f"{said} samples with {preset.sampler}, but this model's files mark it as a consistency model, which "
            f"sampler lcm is for. {other}"
        )


def _family(config: "ModelConfig") -> str:
    """In the words of `presets.Preset.families`, and others for models that have none."""
    if config.is_refiner:
        return "SDXL's refiner"
    if not config.text:
        return "a model of classes"
    if config.micro is not None:
        return presets.SDXL
    return presets.SD1 if config.unet.conv_projection else presets.SD2


STEPS, GUIDANCE = 30, 5.0
"""Steps and guidance of a model that is not one of few steps, where none are given."""
_RANGES = {"eta": 1, "guidance_rescale": 1, "strength": 1, "handoff": 1, "refine_strength": 1, "guidance": 1000}
_RANGES |= {"noise_augmentation": 1, "pag": 1000, "aesthetic_score": 100, "negative_aesthetic_score": 100}
"""Largest value of options that start at 0. Guidance beyond 1000 is a slip: float32 overflows."""


def check_size(height: int, width: int, factor: int) -> None:
    """Raises InputError for a size that cannot be sampled."""
    if height < factor or width < factor or height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise InputError(
            f"height {height} × width {width}: expected positive multiples of {factor}, e.g. {near[0]} × {near[1]}"
        )
    if height * width > LARGEST:
        raise InputError(
            f"height {height} × width {width}: more than {LARGEST:,} pixels. Give a smaller size, e.g. 1024 × 1024"
        )


LARGEST = 16384**2
"""Number of pixels of an image beyond which a size is taken for a slip."""
