"""From options to segments: which steps are run with which network and guidance, before any weights are read.

The denoising schedule is cut into *segments*: steps that are run with the same network and the same guidance. A
`Segment` is static, its `SegmentArrays` are traced. Most schedules have one segment. A guidance interval makes up to
three, a refiner one more. `prepare` also checks the options: sizes, init image and mask, a refiner that fits.

What happens on the devices is `program`.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from sdxl_jax.conditioning import classes
from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.unet_parts import UNetPart
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.steps import Levels, Plan, Sigmas, continuous_levels, find, make_levels
from sdxl_jax.sampling import image_prompts, init_images
from sdxl_jax.sampling.options import Options, check_size
from sdxl_jax.sizes import Size

IMAGE_STRENGTH, HANDOFF = 0.3, 0.8
"""Defaults of `strength` and `handoff`, as diffusers has them for SDXL."""


class Terms(NamedTuple):
    """The guidance terms of each step: what the network is evaluated with besides the prompt. Static."""

    guided: bool = False
    """Classifier-free guidance: the negative prompt or the unconditional embedding too."""
    perturbed: tuple[UNetPart, ...] = ()
    """Perturbed-attention guidance: the prompt without self-attention in these parts too."""
    rescaled: bool = False
    """The guided output is rescaled."""
    sequential: bool = False
    """The network is evaluated once per term, not once for a batch of all."""


class SegmentStart(enum.Enum):
    """The state that a segment starts from."""

    NOISE = "noise"
    """Noise alone."""
    CONTINUE = "continue"
    """The state after the segment before, with the sampler's memory."""
    HAND_OVER = "hand_over"
    """The latent after the segment before, at its noise level, without the sampler's memory."""
    RENOISE = "renoise"
    """A finished latent, with fresh noise up to the segment's first level."""


class Segment(NamedTuple):
    """The static part of a segment: steps of the denoising schedule with the same network and guidance."""

    model: int
    """Number of the model whose UNet is evaluated: 0, or 1 for the refiner."""
    terms: Terms
    stochastic: bool
    """Whether the sampler adds fresh noise."""
    start: SegmentStart


class SegmentArrays(NamedTuple):
    """The traced part of a segment: noise levels, weights, and its place in the schedule."""

    plan: Plan
    """The sampler's rows of this segment, float32."""
    first: int | np.integer | Int[jax.Array, ""]
    """Number of its first row within the whole denoising schedule, for the keys of fresh noise."""


def plan_segments(
    config: ModelConfig, refiner: ModelConfig | None, options: Options, image: bool = False, mask: bool = False
) -> tuple[tuple[Segment, ...], tuple[SegmentArrays, ...]]:
    """The segments of the denoising schedule, and their numbers. Raises InputError where a part of it has no steps.

    image, mask: whether there is an init image, and a mask with it. With a mask the full schedule (strength 1) starts
    from noise alone, as in diffusers; without one it starts from the init image with the noise of the first level.
    """
    options = options.resolved(config)
    sampler, segments, segment_arrays = options.method(config), [], []
    levels, steps = levels_of(config, options, config.sampling), options.steps or 0
    skipped = steps - _steps_of(_strength(options, mask), steps, "strength") if image else 0
    start = SegmentStart.RENOISE if image and (skipped or not mask) else SegmentStart.NOISE

    def add_segments(number: int, levels: Levels, first: int, stop: int, start: SegmentStart) -> None:
        """Segments of steps `first` to `stop` with model `number`, cut where guidance begins or ends."""
        plan = sampler.plan(levels.since(first), options.eta)
        _check_finite(plan, refiner if number and refiner is not None else config, options)
        stochastic, done = plan.stochastic, sum(len(each.plan.timestep) for each in segment_arrays)
        for low, high, terms in _guidance_cuts(options, config, first, stop):
            rows = plan.between(sampler.evaluations * (low - first), _row(sampler.evaluations, high - first, plan))
            segments.append(Segment(number, terms, stochastic, start))
            segment_arrays.append(SegmentArrays(_float32(rows), np.int32(done)))
            done, start = done + len(rows.timestep), SegmentStart.CONTINUE

    refine = refiner is not None and options.refine_strength is not None
    if refiner is None or refine:
        add_segments(0, levels, skipped, steps, start)
    else:
        handoff = HANDOFF if options.handoff is None else options.handoff
        cutoff = round((1 - handoff) * config.schedule.timesteps)
        split = int((levels.timestep >= cutoff).sum())
        if not skipped < split < steps:
            who = "the refiner" if split >= steps else "the base"
            raise InputError(
                f"handoff={handoff:g} leaves {who} none of the {steps - skipped} steps. Give a handoff nearer to "
                f"{HANDOFF:g}, or more steps"
            )
        add_segments(0, levels, skipped, split, start)
        add_segments(1, levels_of(refiner, options, config.sampling), split, steps, SegmentStart.HAND_OVER)
    if refine:
        assert refiner is not None
        refined = _steps_of(options.refine_strength or 0.0, steps, "refine_strength")
        add_segments(1, levels_of(refiner, options, config.sampling), steps - refined, steps, SegmentStart.RENOISE)
    return tuple(segments), tuple(segment_arrays)


def _check_finite(plan: Plan, config: ModelConfig, options: Options) -> None:
    """Raises InputError for weights or noise levels that lead to NaN whatever the network predicts."""
    if config.prediction is Prediction.EPSILON and not plan.alpha.all():
        raise InputError(
            "The noise schedule has zero terminal SNR: its last timestep is noise alone, from which a model that "
            "predicts noise cannot be sampled. Give --prediction v_prediction if the model predicts v, or another "
            "sampler"
        )
    if _is_finite(plan):
        return
    if config.noise is not None:
        raise InputError(
            f"sampler={options.sampler} cannot begin at this model's first noise level, where nothing of the image is "
            "left (flow matching). Use sampler euler or dpmpp_2m"
        )
    fewer = (dataclasses.replace(options, steps=steps) for steps in range((options.steps or 0) - 1, 0, -1))
    finite = (
        each.steps
        for each in fewer
        if _is_finite(each.method(config).plan(levels_of(config, each, config.sampling), each.eta))
    )
    most = next(finite, None)
    remedy = "Use another sampler or timestep_spacing" if most is None else f"Use {most} steps or fewer"
    raise InputError(
        f"steps={options.steps}: sampler {options.sampler} has non-finite weights (NaN or inf) between noise levels so "
        f"close to each other. {remedy}"
    )


def _is_finite(plan: Plan) -> bool:
    with np.errstate(over="ignore"):
        return all(np.isfinite(column).all() for column in _float32(plan))


def _strength(options: Options, mask: bool) -> float:
    if options.strength is not None:
        return options.strength
    return 1.0 if mask else IMAGE_STRENGTH


def levels_of(config: ModelConfig, options: Options, defaults: SamplingDefaults | None) -> Levels:
    """The noise levels that a model's steps visit. options: `resolved`, those of the whole schedule; defaults: the
    first model's."""
    if config.noise is not None:
        sigmas = options.sigmas or Sigmas.SCHEDULE
        return continuous_levels(find(options.sampler or ""), config.noise, options.steps or 0, sigmas)
    defaults, sampler, steps = defaults or SamplingDefaults(), options.sampler or "", options.steps or 0
    preset = None if options.preset is None else presets.find(options.preset)
    return make_levels(
        find(sampler),
        schedule.make(config.schedule),
        steps,
        options.timestep_spacing,
        options.sigmas or Sigmas.SCHEDULE,
        offset=defaults.steps_offset,
        ends_at_first=defaults.ends_at_first(sampler) and not (preset is not None and preset.ends_at_image),
        chosen=None if preset is None else preset.timesteps.get(steps),
    )


def _steps_of(strength: float, steps: int, name: str) -> int:
    """The number of last steps that a strength runs. name: its option, for the message."""
    if not (count := min(int(steps * strength), steps)):
        raise InputError(
            f"{name}={strength:g} leaves 0 of {steps} steps to run. Give at least {1 / steps:.3g}, or more steps"
        )
    return count


def _guidance_cuts(options: Options, config: ModelConfig, first: int, stop: int) -> Iterator[tuple[int, int, Terms]]:
    """(first, stop, terms) of each part of the steps with the same guidance terms."""
    resolved = options.resolved(config)
    guided = resolved.guidance != 1 and config.unet.guidance_dim is None
    terms = Terms(
        guided,
        options.pag_parts if options.pag else (),
        bool(options.guidance_rescale) and (guided or bool(options.pag)),
        options.sequential,
    )
    low, high = (round(share * (resolved.steps or 0)) for share in options.guidance_interval)
    marks = sorted({first, stop, *(min(max(mark, first), stop) for mark in (low, high))})
    for start, end in itertools.pairwise(marks):
        inside = low <= start and end <= high
        yield start, end, terms if inside else Terms()


def _row(evaluations: int, steps: int, plan: Plan) -> int:
    """The row after so many steps: the last step of a sampler with several evaluations has one."""
    return min(evaluations * steps, len(plan.timestep))


def _float32(plan: Plan) -> Plan:
    return Plan._make(column.astype(np.float32) for column in plan)


class Prepared(NamedTuple):
    """What follows from options and init image before a model's weights are read."""

    size: Size
    """Of the images that are generated."""
    image: UInt8[np.ndarray, "height width 3"] | None
    """Init image, at that size."""
    mask: Bool[np.ndarray, "height width"] | None
    """At that size; True is repainted."""
    segments: tuple[Segment, ...]
    segment_arrays: tuple[SegmentArrays, ...]


def check_prompts(config: ModelConfig, prompts: Iterable[str | None], labels: Iterable[int | None]) -> None:
    """Raises InputError for a text prompt to a model without text encoders, and for a class that a model does not have.
    None: no prompt, no class."""
    if not config.text and (text := next(filter(None, prompts), None)) is not None:
        raise InputError(
            f"The prompt {text[:40]!r} has no effect: the model has no text encoders. Leave it out, and give a class"
        )
    classes.check(config.unet.classes, labels)


def prepare(
    config: ModelConfig,
    refiner: ModelConfig | None,
    options: Options,
    init_image: UInt8[np.ndarray, "init_height init_width 3"] | None = None,
    mask: Bool[np.ndarray, "mask_height mask_width"] | None = None,
    embedding_width: int | None = None,
) -> Prepared:
    """Checks options, refiner, init image and mask, and plans the segments. Raises InputError. Quick: needs no weights.

    mask: of the init image's size. embedding_width: of the embeddings of image prompts, if there are any.
    """
    options.check(config)
    if embedding_width is not None:
        image_prompts.check_width(config, embedding_width)
    elif options.noise_augmentation is not None:
        raise InputError(
            f"noise_augmentation={options.noise_augmentation:g} has no effect without an image prompt. Give one, or "
            "leave it out"
        )
    _check_refiner(config, refiner, options)
    size = _size(config, options, init_image)
    if init_image is None and options.strength is not None:
        raise InputError(
            f"strength={options.strength:g} has no effect without an init image. Give one, or leave strength out"
        )
    original, fitted = _fit_init(config, init_image, mask, size)
    return Prepared(
        size, original, fitted, *plan_segments(config, refiner, options, original is not None, fitted is not None)
    )


def _size(config: ModelConfig, options: Options, image: UInt8[np.ndarray, "height width 3"] | None) -> Size:
    factor = config.vae.downsampling
    default = (
        options.default_size(config) if image is None else init_images.snap(image.shape[0], image.shape[1], factor)
    )
    height = default[0] if options.height is None else options.height
    width = default[1] if options.width is None else options.width
    check_size(height, width, factor)
    return Size(height, width)


def _fit_init(
    config: ModelConfig,
    image: UInt8[np.ndarray, "_height _width 3"] | None,
    mask: Bool[np.ndarray, "_mask_height _mask_width"] | None,
    size: Size,
) -> tuple[UInt8[np.ndarray, "height width 3"] | None, Bool[np.ndarray, "height width"] | None]:
    """Init image and mask at the size of the images that are generated."""
    if config.sees_mask and (image is None or mask is None):
        raise InputError(
            f"The UNet takes {config.unet.in_channels} channels, the latent has {config.vae.latent_channels}: a model "
            "for inpainting. Give an init image and a mask, or use a model for text to image"
        )
    if config.unet.in_channels != config.vae.latent_channels and not config.sees_mask:
        raise InputError(
            f"The UNet takes {config.unet.in_channels} channels, the latent has {config.vae.latent_channels}. Give a "
            f"UNet of {config.vae.latent_channels}, or of {2 * config.vae.latent_channels + 1} for inpainting"
        )
    if mask is not None and image is None:
        raise InputError("A mask needs an init image of its size, and there is none. Give both")
    if image is None:
        return None, None
    if mask is not None and mask.shape != image.shape[:2]:
        raise InputError(
            f"The mask has {mask.shape[0]}×{mask.shape[1]} pixels (height × width), the init image "
            f"{image.shape[0]}×{image.shape[1]}. Give a mask of the init image's size"
        )
    fitted = None if mask is None else init_images.fit_mask(mask, *size)
    if fitted is not None and not fitted.any():
        raise InputError("The mask is all black, so nothing would be repainted. Paint white what is to be repainted")
    return init_images.fit(image, *size), fitted


def _check_refiner(config: ModelConfig, refiner: ModelConfig | None, options: Options) -> None:
    if refiner is None:
        for name in ("handoff", "refine_strength"):
            if (value := getattr(options, name)) is not None:
                raise InputError(f"{name}={value:g} has no effect without a refiner. Give --refiner, or leave it out")
        return
    if config.noise is not None or refiner.noise is not None:
        raise InputError(
            "A model or refiner with continuous noise levels (EDM, flow matching) and another one share no denoising "
            "schedule. Leave the refiner out"
        )
    if (preset := options.resolved(config).preset) is not None:
        raise InputError(
            f"preset={preset} is of a few-step model, and refiners take many steps. Leave the refiner out, or refine "
            "the finished images in a second command, with --init-image"
        )
    if config.is_refiner:
        raise InputError(
            f"The model is a refiner itself: it attends to text states of width {config.unet.context_dim}, bigG's "
            "alone. Give the base as the model, and this as the refiner"
        )
    if not refiner.is_refiner:
        raise InputError(
            "The model given as --refiner is not a refiner: it attends to text states of width "
            f"{refiner.unet.context_dim} and is not conditioned on an aesthetic score. Give SDXL's refiner or one like "
            "it, which attends to bigG's 1280 alone"
        )
    if refiner.vae.latent_channels != config.vae.latent_channels:
        raise InputError(
            f"The model's latent has {config.vae.latent_channels} channels, the refiner's "
            f"{refiner.vae.latent_channels}. Give a refiner of the same latent space"
        )
    numbers = [each.unet.classes.number for each in (config, refiner) if each.unet.classes is not None]
    if len(set(numbers)) > 1:
        raise InputError(
            f"The model has {numbers[0]} classes, the refiner {numbers[1]}. Give a refiner of the same classes"
        )
