"""Sampling as pure functions of arrays: text to states, noise to latents, latents to images, and all three as one.

    tokens ── text_states ──┐
    sizes ──────────────────┴─ conditioning ──┐
    noise ──┬─ start_segment ─────────────────┴─ denoise, segment by segment ── decode ── images
    init image ── encode ──┘

The denoising schedule is cut into *segments* (`plan`): steps that are run with the same network and guidance. With a
callback every segment is cut into single steps, so that one compiled step serves any number of them.

A `Recipe` is static, `Inputs` are traced. `generate_batch` runs a recipe with the `Stages` that it is given: plain
functions within one `jax.jit` (`whole`), or each of them compiled on its own (`staged`). Not here: options, files,
messages to the user; that is `generate`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, Key, UInt8

from sdxl_jax import model
from sdxl_jax.arrays import MicroConditioning, Params, normalise, to_bytes, type_of_array
from sdxl_jax.compilation.jitted import jit
from sdxl_jax.conditioning import image as image_conditioning
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.classes import NO_CLASS
from sdxl_jax.conditioning.image import ImageConditioning
from sdxl_jax.conditioning.text import PromptTokens, TextConditioning, Tower
from sdxl_jax.model import ModelConfig
from sdxl_jax.models import unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.samplers import guidance, loop
from sdxl_jax.samplers.guidance import Conditioning, Outputs
from sdxl_jax.samplers.loop import KnownImage, Network, State
from sdxl_jax.samplers.steps import Plan
from sdxl_jax.sampling.plan import Segment, SegmentArrays, SegmentStart, Terms
from sdxl_jax.sharding import constrain

Array = jax.Array

TextStates = tuple[TextConditioning, TextConditioning | None]
"""Text states of the prompts, and of the negative prompts where there is guidance."""
Latent = Float[Array, "batch latent_height latent_width channels"]
"""Scaled, as the UNet sees it."""


class Strengths(NamedTuple):
    """Strengths of the guidance terms. Traced, so that another strength compiles nothing."""

    guidance: Float[Any, ""]
    pag: Float[Any, ""]
    rescale: Float[Any, ""]


class ConditioningPair(NamedTuple):
    """Conditioning of the prompt and of the negative prompt."""

    positive: Conditioning
    negative: Conditioning | None


class Recipe(NamedTuple):
    """The static part of a batch: models, segments, dtype."""

    models: tuple[ModelConfig, ...]
    shares_text: bool
    """The refiner has no text encoder of its own: it is the base's last."""
    segments: tuple[Segment, ...]
    compute: Compute
    tile: int | None
    """Side in pixels of the tiles in which latents are decoded; None: the whole image at once."""


class InitInputs(NamedTuple):
    """Init image and mask, of image to image and inpainting."""

    image: UInt8[Any, "batch height width 3"]
    mask: Float[Any, "batch latent_height latent_width 1"] | None
    """1 where it is repainted; None: everywhere."""
    hidden: Bool[Any, "batch height width 1"] | None
    """For UNets of 9 channels: True on the pixels that are masked out of the image that the UNet sees."""


class Inputs(NamedTuple):
    """The traced part of a batch: weights, tokens, noise, noise levels."""

    params: tuple[Params, ...]
    """Of each model."""
    tokens: PromptTokens
    negative_tokens: PromptTokens
    has_negative: Float[Any, " batch"]
    """0 where there is no negative prompt, which is not the same as the empty one; else 1."""
    micro: tuple[tuple[MicroConditioning, MicroConditioning], ...]
    """Of the prompt and of the negative prompt, for each model."""
    noise: Float[Any, "batch latent_height latent_width channels"]
    """Standard normal."""
    scale: Float[Any, ""]
    """Factor of the noise where the first segment starts from nothing else."""
    refiner_noise: Float[Any, "batch latent_height latent_width channels"] | None
    """What `SegmentStart.RENOISE` adds, standard normal."""
    keys: Key[Array, " batch"]
    """Of each image, for the fresh noise of stochastic samplers."""
    segment_arrays: tuple[SegmentArrays, ...]
    """Of each segment of the recipe."""
    strengths: Strengths
    init_inputs: InitInputs | None
    image_prompt: ImageConditioning | None = None
    """Of the prompt, for the first model."""
    label: Int32[Any, " batch"] | None = None
    """Classes of the images; None where no model has classes."""


# Text


def text_states(
    params: Params,
    tokens: PromptTokens,
    negative_tokens: PromptTokens,
    *,
    towers: tuple[Tower, ...],
    guided: bool,
    compute: Compute,
) -> TextStates:
    """Text states of prompts and, if `guided`, of negative prompts; empty ones without towers. params: of each tower,
    by its name."""
    if not towers:
        return TextConditioning(None, None), TextConditioning(None, None) if guided else None
    if not guided:
        return text.encode_prompts(towers, params, tokens, compute), None
    # One batch: their lengths and weights agree, as the UNet's batch needs.
    both = jax.tree.map(lambda *each: jnp.concatenate(each), tokens, negative_tokens)
    states = text.encode_prompts(towers, params, both, compute)
    assert states.context is not None
    count = len(states.context) // 2
    return jax.tree.map(lambda state: state[:count], states), jax.tree.map(lambda state: state[count:], states)


def conditioning(
    params: Params,
    states: TextStates,
    has_negative: Float[type_of_array, " batch"],
    micro: tuple[MicroConditioning, MicroConditioning],
    image_prompt: ImageConditioning | None = None,
    label: Int32[type_of_array, " batch"] | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
) -> ConditioningPair:
    """What a model's UNet is conditioned on. An absent negative prompt is the unconditional embedding. The negative
    prompt has no class.

    params: the UNet's, for what its cross-attention makes of the text, which is the same at every step.
    """
    positive, negative = states
    if image_prompt is not None:
        positive = image_conditioning.in_place_of_pooled(positive, image_prompt)
    if negative is not None and config.unconditional.zeros_text:
        negative = jax.tree.map(lambda x: x * has_negative.reshape(-1, *[1] * (x.ndim - 1)), negative)

    def condition(
        states: TextConditioning, micro: MicroConditioning, label: Int32[type_of_array, " batch"] | None
    ) -> Conditioning:
        found = model.condition(config, states, micro, model.class_embedding(config, params, label))
        if found.context is None:
            return found
        assert not isinstance(found.context, dict), "the context is not projected yet"
        return found._replace(context=unet.project_text(params, found.context, compute))

    no_class = None if label is None else jnp.full_like(label, NO_CLASS)
    return ConditioningPair(
        condition(positive, micro[0], label), None if negative is None else condition(negative, micro[1], no_class)
    )


def last_tower_states(states: TextConditioning | None, width: int) -> TextConditioning | None:
    """The states of the last tower alone, `width` wide: what a refiner that shares them is conditioned on."""
    if states is None:
        return None
    assert states.context is not None, "a model whose text encoder is shared has one"
    return TextConditioning(states.context[..., -width:], states.pooled)


# Denoising


def guided_network(
    params: Params,
    conditioning: ConditioningPair,
    strengths: Strengths,
    mask_channels: Float[Array, "batch latent_height latent_width mask_channels"] | None,
    *,
    config: ModelConfig,
    terms: Terms,
    compute: Compute,
) -> Network:
    """The UNet with guidance, as the sampler's loop calls it: (x_t, timestep) → guided output.

    The negative prompt, the prompt and the perturbed prompt are one batch, or with `terms.sequential` one after the
    other.
    """
    conditions = [conditioning.positive]
    if terms.guided:
        assert conditioning.negative is not None, "guidance needs a negative"
        conditions.insert(0, conditioning.negative)
    if terms.perturbed:
        conditions.append(conditioning.positive)
    evaluations = len(conditions)

    def evaluate(
        x: Float[Array, "batch height width channels"],
        timestep: Float[Array, ""],
        condition: Conditioning,
        perturbed: Bool[Array, " batch"] | None,
    ) -> Float[Array, "batch height width out_channels"]:
        times = jnp.full(len(x), timestep)
        more: dict[str, Any] = {} if perturbed is None else {"perturbed": perturbed, "perturbed_parts": terms.perturbed}
        if config.unet.guidance_dim is not None:
            more["guidance"] = jnp.full(len(x), strengths.guidance)
        context, vector, added = condition
        return unet.apply(config.unet, params, x, times, context, vector, compute, class_embedding=added, **more)

    def network(
        x_t: Float[Array, "batch height width channels"], timestep: Float[Array, ""]
    ) -> Float[Array, "batch height width channels"]:
        x = x_t if mask_channels is None else jnp.concatenate([x_t, mask_channels], axis=-1)
        count = len(x)
        # Self-attention is perturbed in the last evaluation.
        perturbed = jnp.arange(evaluations) == evaluations - 1 if terms.perturbed else None
        if evaluations == 1:
            outputs = [evaluate(x, timestep, conditioning.positive, None)]
        elif terms.sequential:
            stacked = jax.tree.map(lambda *each: jnp.stack(each), *conditions)
            rows = None if perturbed is None else jnp.repeat(perturbed[:, None], count, axis=1)
            outputs = list(jax.lax.map(lambda one: evaluate(x, timestep, *one), (stacked, rows)))
        else:
            joined = guidance.join(conditions)
            rows = None if perturbed is None else jnp.repeat(perturbed, count)
            batch = jnp.concatenate([x] * evaluations)
            outputs = jnp.split(evaluate(batch, timestep, joined, rows), evaluations)
        negative = outputs[0] if terms.guided else None
        positive = outputs[1 if terms.guided else 0]
        each = Outputs(positive, negative, outputs[-1] if terms.perturbed else None)
        return guidance.combine(each, strengths.guidance, strengths.pag, strengths.rescale if terms.rescaled else None)

    return network


def denoise(
    params: Params,
    conditioning: ConditioningPair,
    state: State,
    keys: Key[Array, " batch"],
    arrays: SegmentArrays,
    strengths: Strengths,
    known_image: KnownImage | None,
    mask_channels: Float[Array, "batch latent_height latent_width mask_channels"] | None,
    *,
    config: ModelConfig,
    terms: Terms,
    stochastic: bool,
    compute: Compute,
) -> State:
    """Runs one segment of the denoising schedule, or some of its rows.

    params: the UNet's. known_image: of inpainting with any UNet. mask_channels: of a UNet for inpainting, what it sees
    besides the latent: the mask and the latent of the masked image.
    """
    network = guided_network(
        params, conditioning, strengths, mask_channels, config=config, terms=terms, compute=compute
    )
    state = loop.sample(
        network,
        state,
        keys,
        arrays.plan,
        config.prediction,
        first=arrays.first,
        stochastic=stochastic,
        known_image=known_image,
        law=config.noise,
    )
    return _shard_batch(state)


def _shard_batch(state: State) -> State:
    """On a mesh, the batch split over its axes, before and after every segment: each finds the state as the last."""
    return State(
        constrain(state.arrays, None, "batch", None, None, None),
        constrain(state.x0, "batch", None, None, None),
        constrain(state.finite_rows, "batch", None, None, None),
    )


def start_segment(
    row: Plan, state: State | None, noise: Latent | None, init_latent: Latent | None, *, segment: Segment
) -> State:
    """The state before a segment whose first row is `row`.

    state: that after the segment before; None before the first segment. noise: standard normal; of a first segment
    that starts from noise, times `Inputs.scale`. init_latent: of the init image.
    """
    if segment.start is SegmentStart.CONTINUE:
        assert state is not None, "there is a segment before"
        return state
    if segment.start is SegmentStart.NOISE:
        assert noise is not None, "there is noise to start from"
        return _shard_batch(loop.start(noise, row))
    latent = init_latent if state is None else state.arrays[0]
    assert latent is not None, "there is a latent to start from"
    if segment.start is SegmentStart.RENOISE:
        assert noise is not None, "there is noise to add"
        alpha, sigma_t = (jnp.asarray(column, jnp.float32)[0] for column in (row.alpha, row.sigma_t))
        latent = alpha * latent + sigma_t * noise
    started = loop.start(latent, row)
    return _shard_batch(started if state is None else started._replace(finite_rows=state.finite_rows))


# Images


def encode(
    params: Params,
    image: UInt8[Array, "batch height width 3"],
    hidden: Bool[Array, "batch height width 1"] | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
) -> Latent:
    """Scaled latents: the mean of the autoencoder's posterior. Hidden pixels are 0 in −1..1, which no byte is.

    diffusers samples the posterior. Its deviation is a hundredth of the latent's, so the images hardly differ, and the
    mean needs no random numbers of its own.
    """
    normalised = normalise(image)
    if hidden is not None:
        normalised = jnp.where(hidden, 0.0, normalised)
    return vae.scaled(config.vae, vae.encode(config.vae, params, normalised, compute).mean)


def decode(
    params: Params, latent: Latent, *, config: ModelConfig, compute: Compute, tile: int | None
) -> tuple[UInt8[Array, "batch height width 3"], Bool[Array, " batch"]]:
    """(images, whether the decoder's output was finite, which bytes do not show). params: the autoencoder's. tile: as
    in `Recipe`."""
    if tile is None:
        image = vae.decode(config.vae, params, latent, compute)
    else:
        image = vae.decode_tiled(config.vae, params, latent, compute, tile)
    return to_bytes(image), jnp.isfinite(image).all(axis=(1, 2, 3))


class SampledBatch(NamedTuple):
    """One batch of images and latents, and what is known of NaN and inf in them."""

    images: UInt8[type_of_array, "batch height width 3"]
    latents: Float[type_of_array, "batch latent_height latent_width channels"]
    finite_rows: Int32[type_of_array, " batch"]
    """Rows of all segments after which the latent was finite, up to the first after which it was not."""
    decoded: Bool[type_of_array, " batch"]
    """Whether the decoder's output was finite."""


# The stages, and all of them as one


class TextStage(Protocol):
    """`text_states`."""

    def __call__(
        self,
        params: Params,
        tokens: PromptTokens,
        negative_tokens: PromptTokens,
        *,
        towers: tuple[Tower, ...],
        guided: bool,
        compute: Compute,
    ) -> TextStates: ...


class ConditioningStage(Protocol):
    """`conditioning`."""

    def __call__(
        self,
        params: Params,
        states: TextStates,
        has_negative: Float[type_of_array, " batch"],
        micro: tuple[MicroConditioning, MicroConditioning],
        image_prompt: ImageConditioning | None = None,
        label: Int32[type_of_array, " batch"] | None = None,
        *,
        config: ModelConfig,
        compute: Compute,
    ) -> ConditioningPair: ...


class EncodeStage(Protocol):
    """`encode`."""

    def __call__(
        self,
        params: Params,
        image: UInt8[Array, "batch height width 3"],
        hidden: Bool[Array, "batch height width 1"] | None = None,
        *,
        config: ModelConfig,
        compute: Compute,
    ) -> Latent: ...


class StartStage(Protocol):
    """`start_segment`."""

    def __call__(
        self, row: Plan, state: State | None, noise: Latent | None, init_latent: Latent | None, *, segment: Segment
    ) -> State: ...


class DenoiseStage(Protocol):
    """`denoise`."""

    def __call__(
        self,
        params: Params,
        conditioning: ConditioningPair,
        state: State,
        keys: Key[Array, " batch"],
        arrays: SegmentArrays,
        strengths: Strengths,
        known_image: KnownImage | None,
        mask_channels: Float[Array, "batch latent_height latent_width mask_channels"] | None,
        *,
        config: ModelConfig,
        terms: Terms,
        stochastic: bool,
        compute: Compute,
    ) -> State: ...


class DecodeStage(Protocol):
    """`decode`."""

    def __call__(
        self, params: Params, latent: Latent, *, config: ModelConfig, compute: Compute, tile: int | None
    ) -> tuple[UInt8[Array, "batch height width 3"], Bool[Array, " batch"]]: ...


class Stages(NamedTuple):
    """The functions that `generate_batch` calls: all plain, or each compiled on its own."""

    text_states: TextStage
    conditioning: ConditioningStage
    encode: EncodeStage
    start_segment: StartStage
    denoise: DenoiseStage
    decode: DecodeStage


PLAIN = Stages(text_states, conditioning, encode, start_segment, denoise, decode)


STAGED = Stages(
    jit(text_states, ("towers", "guided", "compute")),
    jit(conditioning, ("config", "compute")),
    jit(encode, ("config", "compute")),
    jit(start_segment, ("segment",)),
    jit(denoise, ("config", "terms", "stochastic", "compute")),
    jit(decode, ("config", "compute", "tile")),
)

RowCallback = Callable[[int, State], None]
"""Called with the number of a row of the whole denoising schedule, and the state after it."""


def _conditioning_of_each_model(recipe: Recipe, inputs: Inputs, stages: Stages) -> list[ConditioningPair]:
    guided = any(segment.terms.guided for segment in recipe.segments)
    states: list[TextStates] = []
    for number, config in enumerate(recipe.models):
        if number and recipe.shares_text:
            width = config.text[-1].clip.width
            positive, negative = (last_tower_states(each, width) for each in states[0])
            assert positive is not None, "prompts have states, whatever the guidance"
            states.append((positive, negative))
        else:
            towers = {tower.name: inputs.params[number][tower.name] for tower in config.text}
            tokens = (inputs.tokens, inputs.negative_tokens)
            states.append(
                stages.text_states(towers, *tokens, towers=config.text, guided=guided, compute=recipe.compute)
            )
    image_prompts = [inputs.image_prompt, *[None] * (len(recipe.models) - 1)]  # a refiner has the text
    return [
        stages.conditioning(
            params["unet"],
            each,
            inputs.has_negative,
            micro,
            image,
            inputs.label,
            config=config,
            compute=recipe.compute,
        )
        for config, params, each, micro, image in zip(
            recipe.models, inputs.params, states, inputs.micro, image_prompts, strict=True
        )
    ]


def generate_batch(
    inputs: Inputs, recipe: Recipe, stages: Stages = PLAIN, callback: RowCallback | None = None
) -> SampledBatch:
    """One batch of images. With a callback, which is called after every row, segments are run row by row."""
    base, compute = recipe.models[0], recipe.compute
    conditions = _conditioning_of_each_model(recipe, inputs, stages)
    init_latent, known_image, mask_channels = None, None, None
    first_noise = inputs.scale * inputs.noise if recipe.segments[0].start is SegmentStart.NOISE else inputs.noise
    if (init_inputs := inputs.init_inputs) is not None:
        encoded = functools.partial(stages.encode, model.autoencoder(inputs.params[0]), config=base, compute=compute)
        init_latent = encoded(init_inputs.image)
        if init_inputs.hidden is not None:
            assert init_inputs.mask is not None
            masked = encoded(init_inputs.image, init_inputs.hidden)
            mask_channels = jnp.concatenate([init_inputs.mask, masked], axis=-1)
        if init_inputs.mask is not None:
            known_image = KnownImage(init_latent, inputs.noise, init_inputs.mask)
    state = None
    for segment, arrays in zip(recipe.segments, inputs.segment_arrays, strict=True):
        config = recipe.models[segment.model]
        noise = first_noise if state is None else inputs.refiner_noise
        state = stages.start_segment(arrays.plan.between(0, 1), state, noise, init_latent, segment=segment)
        run = functools.partial(
            stages.denoise,
            inputs.params[segment.model]["unet"],
            conditions[segment.model],
            keys=inputs.keys,
            strengths=inputs.strengths,
            known_image=None if config.sees_mask else known_image,
            mask_channels=mask_channels if config.sees_mask else None,
            config=config,
            terms=segment.terms,
            stochastic=segment.stochastic,
            compute=compute,
        )
        if callback is None:
            state = run(state=state, arrays=arrays)
            continue
        for row in range(len(arrays.plan.timestep)):
            part = SegmentArrays(arrays.plan.between(row, row + 1), arrays.first + row)
            state = run(state=state, arrays=part)
            callback(int(arrays.first) + row, state)
    assert state is not None
    latent = state.arrays[0]
    decoder = model.autoencoder(inputs.params[0])
    images, decoded = stages.decode(decoder, latent, config=base, compute=compute, tile=recipe.tile)
    return SampledBatch(images, latent, state.finite_rows[:, 0, 0, 0], decoded)


@functools.partial(jax.jit, static_argnames="recipe")
def whole(inputs: Inputs, recipe: Recipe) -> SampledBatch:
    """`generate_batch` as one program."""
    return generate_batch(inputs, recipe)


def staged(inputs: Inputs, recipe: Recipe, callback: RowCallback | None = None) -> SampledBatch:
    """`generate_batch` with one program per stage: text, image to latent, each segment, latent to image. Another
    prompt, another number of steps (with a callback), another decoder compile only what they change."""
    return generate_batch(inputs, recipe, STAGED, callback)
