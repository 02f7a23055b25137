"""From options to segments: which steps are run by which network and with what guidance, before any weights are read.

A denoising schedule is cut into *segments*, which are static, and their *stretches*, which are numbers: steps along which
the same network is asked the same things. Most have one. Guidance over a part of the steps makes up to three, a refiner
one more. `prepare` also checks what is asked for: sizes, init image and mask, a refiner that fits.

What happens on the devices is `program`.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sdxl_jax.arrays import Size
from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.unet import UNetPart
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.steps import Levels, Plan, Sigmas, find, make_levels
from sdxl_jax.sampling import init_images
from sdxl_jax.sampling.options import Options, check_size

IMAGE_STRENGTH, HANDOFF = 0.3, 0.8
"""Defaults of `strength` and `handoff`, as diffusers has them for SDXL."""


class Terms(NamedTuple):
    """What the network is asked at each step. Static."""

    guided: bool = False
    """The negative prompt too."""
    perturbed: tuple[UNetPart, ...] = ()
    """The prompt without self-attention in these parts too."""
    rescaled: bool = False
    """The guided output is rescaled."""
    sequential: bool = False
    """One after the other, not as one batch."""


class SegmentStart(enum.Enum):
    """How a segment takes over."""

    NOISE = "noise"
    """Nothing but noise."""
    CONTINUE = "continue"
    """The state as it is, with what the sampler remembers."""
    HAND_OVER = "hand_over"
    """The latent at its noise level; nothing is remembered."""
    RENOISE = "renoise"
    """The latent as a finished one, with fresh noise up to the segment's first level."""


class Segment(NamedTuple):
    """Static."""

    model: int
    """Number of the model that is asked: 0, or 1 for the refiner."""
    terms: Terms
    stochastic: bool
    start_segment: SegmentStart


class SegmentArrays(NamedTuple):
    """A segment's numbers. Traced."""

    plan: Plan
    first: Any
    """Number of its first row, for the keys."""


def plan_segments(
    config: ModelConfig, refiner: ModelConfig | None, options: Options, image: bool = False, mask: bool = False
) -> tuple[tuple[Segment, ...], tuple[SegmentArrays, ...]]:
    """The segments of a way, and their rows. Raises InputError where a part has none.

    image, mask: whether there is an init image, and a mask with it. With a mask the whole way begins with nothing but
    noise, as in diffusers; without one it begins with the image far below the noise.
    """
    options = options.resolved(config)
    sampler, segments, segment_arrays = options.method(config), [], []
    levels = levels_of(config, options, config.sampling)
    skipped = options.steps - _steps_of(_strength(options, mask), options.steps, "strength") if image else 0
    start = SegmentStart.RENOISE if image and (skipped or not mask) else SegmentStart.NOISE

    def add_segments(number: int, levels: Levels, first: int, stop: int, start_segment: SegmentStart) -> None:
        """Segments along levels `first` to `stop`, cut where guidance begins or ends."""
        plan = sampler.plan(levels.since(first), options.eta)
        _check_finite(plan, refiner if number and refiner is not None else config, options)
        stochastic, done = plan.stochastic, sum(len(each.plan.timestep) for each in segment_arrays)
        for low, high, terms in _cuts(options, config, first, stop):
            rows = plan.between(sampler.evaluations * (low - first), _row(sampler.evaluations, high - first, plan))
            segments.append(Segment(number, terms, stochastic, start_segment))
            segment_arrays.append(SegmentArrays(_rows(rows), np.int32(done)))
            done, start_segment = done + len(rows.timestep), SegmentStart.CONTINUE

    steps, refine = options.steps, refiner is not None and options.refine_strength is not None
    if refiner is None or refine:
        add_segments(0, levels, skipped, steps, start)
    else:
        handoff = HANDOFF if options.handoff is None else options.handoff
        cutoff = round((1 - handoff) * config.schedule.timesteps)
        split = int((levels.timestep >= cutoff).sum())
        if not skipped < split < steps:
            who = "the refiner" if split >= steps else "the model before it"
            raise InputError(
                f"handoff={handoff:g} leaves {who} none of the {steps - skipped} steps. Choose one nearer to "
                f"{HANDOFF:g}, or more steps"
            )
        add_segments(0, levels, skipped, split, start)
        add_segments(1, levels_of(refiner, options, config.sampling), split, steps, SegmentStart.HAND_OVER)
    if refine:
        assert refiner is not None
        again = _steps_of(options.refine_strength or 0.0, steps, "refine_strength")
        add_segments(1, levels_of(refiner, options, config.sampling), steps - again, steps, SegmentStart.RENOISE)
    return tuple(segments), tuple(segment_arrays)


def _check_finite(plan: Plan, config: ModelConfig, options: Options) -> None:
    """Raises InputError for steps from which nothing but NaN could come."""
    if config.prediction is Prediction.EPSILON and not plan.alpha.all():
        raise InputError(
            "The noise schedule leaves nothing of the image at its last timestep (zero terminal SNR), where a model "
            "that predicts noise has no answer. Give --prediction v_prediction if that is so, or another sampler"
        )
    if _is_finite(plan):
        return
    fewer = (dataclasses.replace(options, steps=steps) for steps in range(options.steps - 1, 0, -1))
    works = (
        each.steps
        for each in fewer
        if _is_finite(each.method(config).plan(levels_of(config, each, config.sampling), each.eta))
    )
    most = next(works, None)
    remedy = "Choose another sampler or timestep_spacing" if most is None else f"The most that work are {most}"
    raise InputError(
        f"steps={options.steps}: sampler {options.sampler} has non-finite weights between levels so near to each "
        f"other. {remedy}"
    )


def _is_finite(plan: Plan) -> bool:
    with np.errstate(over="ignore"):
        return all(np.isfinite(column).all() for column in _rows(plan))


def _strength(options: Options, mask: bool) -> float:
    if options.strength is not None:
        return options.strength
    return 1.0 if mask else IMAGE_STRENGTH


def levels_of(config: ModelConfig, options: Options, defaults: SamplingDefaults | None) -> Levels:
    """The noise levels that a model's steps visit. options: `resolved`, as the whole way has them; defaults: of the
    first model."""
    defaults, sampler = defaults or SamplingDefaults(), options.sampler or ""
    return make_levels(
        find(sampler),
        schedule.make(config.schedule),
        options.steps,
        options.timestep_spacing,
        options.sigmas or Sigmas.SCHEDULE,
        offset=defaults.steps_offset,
        ends_at_first=defaults.ends_at_first(sampler),
    )


def _steps_of(strength: float, steps: int, name: str) -> int:
    """The last steps of a way, which begin at a strength."""
    if not (count := min(int(steps * strength), steps)):
        raise InputError(f"{name}={strength:g} of {steps} steps is none. Give at least {1 / steps:.3g}, or more steps")
    return count


def _cuts(options: Options, config: ModelConfig, first: int, stop: int) -> Iterator[tuple[int, int, Terms]]:
    """(first, stop, terms) of each part of some steps in which the same is asked."""
    guided = options.resolved(config).guidance != 1
    asked = Terms(
        guided,
        options.pag_parts if options.pag else (),
        bool(options.guidance_rescale) and (guided or bool(options.pag)),
        options.sequential,
    )
    low, high = (round(share * options.steps) for share in options.guidance_interval)
    marks = sorted({first, stop, *(min(max(mark, first), stop) for mark in (low, high))})
    for start, end in itertools.pairwise(marks):
        inside = low <= start and end <= high
        yield start, end, asked if inside else Terms()


def _row(evaluations: int, steps: int, plan: Plan) -> int:
    """The row after so many steps: the last step of a sampler with several evaluations has one."""
    return min(evaluations * steps, len(plan.timestep))


def _rows(plan: Plan) -> Plan:
    return Plan._make(column.astype(np.float32) for column in plan)


class Prepared(NamedTuple):
    """What can be said of images without a model's weights."""

    size: Size
    image: UInt8[np.ndarray, "height width 3"] | None
    """Init image at the images' size."""
    mask: Bool[np.ndarray, "height width"] | None
    segments: tuple[Segment, ...]
    segment_arrays: tuple[SegmentArrays, ...]


def prepare(
    config: ModelConfig,
    refiner: ModelConfig | None,
    options: Options,
    init_image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Prepared:
    """Checks what is asked for, and works out what follows from it; raises InputError. Quick: it needs no weights."""
    options.check(config)
    _check_refiner(config, refiner, options)
    size = _size(config, options, init_image)
    if init_image is None and options.strength is not None:
        raise InputError(f"strength={options.strength} has no effect without an init image. Give one, or leave it out")
    original, fitted = _fit_init(config, init_image, mask, size)
    return Prepared(
        size, original, fitted, *plan_segments(config, refiner, options, original is not None, fitted is not None)
    )


def _size(config: ModelConfig, options: Options, image: np.ndarray | None) -> Size:
    factor = config.vae.downsampling
    own = config.default_size if image is None else init_images.snap(image.shape[0], image.shape[1], factor)
    height = own[0] if options.height is None else options.height
    width = own[1] if options.width is None else options.width
    check_size(height, width, factor)
    return Size(height, width)


def _fit_init(
    config: ModelConfig, image: np.ndarray | None, mask: np.ndarray | None, size: Size
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Init image and mask at the size of the images."""
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
        raise InputError("A mask needs an init image of its size. Give both")
    if image is None:
        return None, None
    if mask is not None and mask.shape != image.shape[:2]:
        raise InputError(
            f"The mask has {mask.shape[0]}×{mask.shape[1]} pixels (height × width), the init image "
            f"{image.shape[0]}×{image.shape[1]}. Give one of the same size"
        )
    fitted = None if mask is None else init_images.fit_mask(mask, *size)
    if fitted is not None and not fitted.any():
        raise InputError("The mask is black, so nothing would be repainted. Make white what is to be repainted")
    return init_images.fit(image, *size), fitted


def _check_refiner(config: ModelConfig, refiner: ModelConfig | None, options: Options) -> None:
    if refiner is None:
        for name in ("handoff", "refine_strength"):
            if (value := getattr(options, name)) is not None:
                raise InputError(f"{name}={value:g} has no effect without a refiner. Give --refiner, or leave it out")
        return
    if config.is_refiner:
        raise InputError(
            f"The model is a refiner itself: it attends to text states of width {config.unet.context_dim}, bigG's "
            "alone. Give the base as the model, and this as the refiner"
        )
    if not refiner.is_refiner:
        raise InputError(
            f"The model that is given as the refiner attends to text states of width {refiner.unet.context_dim} "
            "and is told no aesthetic score, so it is none. Give a refiner, which attends to bigG's 1280 alone"
        )
    if refiner.vae.latent_channels != config.vae.latent_channels:
        raise InputError("Model and refiner have latents of different channels. Use a refiner of the same latent space")
