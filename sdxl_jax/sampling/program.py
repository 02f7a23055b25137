"""Drawing, as pure functions of arrays: text to states, noise to latent, latent to image, and all three as one.

    tokens ── text_states ──┐
    sizes ──────────────────┴─ told ── denoise, segment by segment ── decode ── image
    image ── encode ─────────────────────┘

A way from noise to an image is cut into *segments* (`plan`): stretches along which the same network is asked the same
things. Whoever watches cuts every segment into single steps, so that one compiled step serves any number of them.

What is static is a `Recipe`, what is traced are `Inputs`. `draw` follows the recipe with the functions that it is
given: plain ones within one `jax.jit` (`whole`), or each of them compiled on its own (`staged`). Not here: options,
files, whatever the user sees; that is `generate`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, Key, UInt8

from sdxl_jax import arrays, model
from sdxl_jax.arrays import MicroConditioning, Params, type_of_array
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.prompts import PromptTokens
from sdxl_jax.conditioning.text import TextConditioning, Tower
from sdxl_jax.model import ModelConfig
from sdxl_jax.models import unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.samplers import guidance, loop
from sdxl_jax.samplers.guidance import Conditioning, Outputs
from sdxl_jax.samplers.loop import KnownImage, State
from sdxl_jax.samplers.steps import Plan
from sdxl_jax.sampling.plan import Segment, SegmentArrays, SegmentStart, Terms
from sdxl_jax.sharding import constrain

Array = jax.Array


class Strengths(NamedTuple):
    """How strong the terms are. Traced, so that another strength compiles nothing."""

    guidance: Float[Any, ""]
    pag: Float[Any, ""]
    rescale: Float[Any, ""]


class ConditioningPair(NamedTuple):
    """What the network is told of the prompt and of the negative prompt."""

    positive: Conditioning
    negative: Conditioning | None


class Recipe(NamedTuple):
    """Static."""

    models: tuple[ModelConfig, ...]
    shares_text: bool
    """The refiner has no text encoder of its own: it is the base's last."""
    segments: tuple[Segment, ...]
    compute: Compute
    tile: int | None
    """Pixels a side that are decoded at a time; None: all."""


class InitInputs(NamedTuple):
    """Inpainting and image to image: what there was."""

    image: UInt8[Any, "batch height width 3"]
    mask: Float[Any, "batch latent_height latent_width 1"] | None
    """1 where it is repainted; None: everywhere."""
    hidden: Bool[Any, "batch height width 1"] | None
    """For UNets of 9 channels: True on what is left out of the image that they are shown."""


class Inputs(NamedTuple):
    """Traced."""

    params: tuple[Params, ...]
    """Of each model."""
    tokens: PromptTokens
    negative_tokens: PromptTokens
    has_negative: Float[Any, " batch"]
    """0 where there is no negative prompt, which is not the empty one."""
    micro: tuple[MicroConditioning, MicroConditioning]
    """Of the prompt and of the negative prompt."""
    noise: Float[Any, "batch latent_height latent_width channels"]
    """Standard normal."""
    scale: Float[Any, ""]
    """What it is multiplied by where a way begins with nothing else."""
    refiner_noise: Float[Any, "batch latent_height latent_width channels"] | None
    """What `SegmentStart.RENOISE` adds, standard normal."""
    keys: Key[Array, " batch"]
    segment_arrays: tuple[SegmentArrays, ...]
    strengths: Strengths
    init_inputs: InitInputs | None


# Text


def text_states(
    params: Params,
    tokens: PromptTokens,
    negative_tokens: PromptTokens,
    *,
    towers: tuple[Tower, ...],
    guided: bool,
    compute: Compute,
) -> tuple[TextConditioning, TextConditioning | None]:
    """Of prompts and, if needed, of negative prompts."""
    positive = text.encode_prompts(towers, params, tokens, compute)
    return positive, text.encode_prompts(towers, params, negative_tokens, compute) if guided else None


def conditioning(
    states: tuple[TextConditioning, TextConditioning | None],
    has_negative: Float[type_of_array, " batch"],
    micro: tuple[MicroConditioning, MicroConditioning],
    *,
    config: ModelConfig,
) -> ConditioningPair:
    """What a model's network is told."""
    positive, negative = states
    if negative is not None and config.unconditional is model.UnconditionalKind.ZEROS:
        negative = jax.tree.map(lambda x: x * has_negative.reshape(-1, *[1] * (x.ndim - 1)), negative)
    return ConditioningPair(
        model.condition(config, positive, micro[0]),
        None if negative is None else model.condition(config, negative, micro[1]),
    )


def of_the_last(states: TextConditioning | None, width: int) -> TextConditioning | None:
    """The states of the last tower alone, `width` wide: what a refiner that shares them is told."""
    return None if states is None else TextConditioning(states.context[..., -width:], states.pooled)


# The way


def denoise(
    params: Params,
    conditioning: ConditioningPair,
    state: State,
    keys: Key[Array, " batch"],
    arrays_of_segment: SegmentArrays,
    strengths: Strengths,
    kept: KnownImage | None,
    shown: Float[Array, "batch latent_height latent_width shown"] | None,
    *,
    config: ModelConfig,
    terms: Terms,
    stochastic: bool,
    compute: Compute,
) -> State:
    """One segment. shown: what a UNet of more channels than the latent's sees besides it. `params`: the UNet's."""
    conditions = [conditioning.positive]
    if terms.guided:
        assert conditioning.negative is not None, "guidance needs a negative"
        conditions.insert(0, conditioning.negative)
    if terms.perturbed:
        conditions.append(conditioning.positive)
    ways = len(conditions)

    def ask(x: Array, timestep: Array, condition: Conditioning, perturbed: Array | None) -> Array:
        times = jnp.full(len(x), timestep)
        given: dict[str, Any] = (
            {} if perturbed is None else {"perturbed": perturbed, "perturbed_parts": terms.perturbed}
        )
        return unet.apply(config.unet, params, x, times, condition.context, condition.vector, compute, **given)

    def network(x_t: Array, timestep: Array) -> Array:
        x = x_t if shown is None else jnp.concatenate([x_t, shown], axis=-1)
        count = len(x)
        # Which rows are perturbed: the last way's.
        perturbed = jnp.arange(ways) == ways - 1 if terms.perturbed else None
        if ways == 1:
            outputs = [ask(x, timestep, conditioning.positive, None)]
        elif terms.sequential:
            stacked = jax.tree.map(lambda *each: jnp.stack(each), *conditions)
            rows = None if perturbed is None else jnp.repeat(perturbed[:, None], count, axis=1)
            outputs = list(jax.lax.map(lambda plan_segments: ask(x, timestep, *plan_segments), (stacked, rows)))
        else:
            joined = guidance.join(conditions)
            rows = None if perturbed is None else jnp.repeat(perturbed, count)
            outputs = jnp.split(ask(jnp.concatenate([x] * ways), timestep, joined, rows), ways)
        negative = outputs[0] if terms.guided else None
        positive = outputs[1 if terms.guided else 0]
        said = Outputs(positive, negative, outputs[-1] if terms.perturbed else None)
        return guidance.combine(said, strengths.guidance, strengths.pag, strengths.rescale if terms.rescaled else None)

    ended = loop.sample(
        network,
        state,
        keys,
        arrays_of_segment.plan,
        config.prediction,
        first=arrays_of_segment.first,
        stochastic=stochastic,
        kept=kept,
    )
    return _laid(ended)


def _laid(state: State) -> State:
    """On a mesh, the batch over its axes, before and after every segment: so that the next finds it as the last did."""
    return State(
        constrain(state.arrays, None, "batch", None, None, None),
        constrain(state.x0, "batch", None, None, None),
        constrain(state.finite_rows, "batch", None, None, None),
    )


def start_segment(segment: Segment, row: Plan, state: State | None, noise: Array | None, image: Array | None) -> State:
    """The state before a segment whose first row is `row`. Before the first segment there is none; `image` is the latent that
    it may start from."""
    if segment.start_segment is SegmentStart.CONTINUE:
        assert state is not None, "there is something to go on with"
        return state
    if segment.start_segment is SegmentStart.NOISE:
        assert noise is not None, "there is noise to start from"
        return _laid(loop.start(noise, row))
    latent = image if state is None else state.arrays[0]
    assert latent is not None, "there is a latent to start from"
    if segment.start_segment is SegmentStart.RENOISE:
        assert noise is not None, "there is noise to add"
        alpha, sigma_t = (jnp.asarray(column, jnp.float32)[0] for column in (row.alpha, row.sigma_t))
        latent = alpha * latent + sigma_t * noise
    begun = loop.start(latent, row)
    return _laid(begun if state is None else begun._replace(finite_rows=state.finite_rows))


# Images


def encode(
    params: Params,
    image: UInt8[Array, "batch height width 3"],
    hidden: Bool[Array, "batch height width 1"] | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
) -> Array:
    """Scaled latents: the mean of the autoencoder's posterior. What is hidden is 0 in −1..1, which no byte is.

    diffusers draws from the posterior. Its deviation is a hundredth of the latent's, so the images are alike, and the
    mean needs no random numbers of its own.
    """
    seen = arrays.normalise(image)
    if hidden is not None:
        seen = jnp.where(hidden, 0.0, seen)
    return config.vae.scale * vae.encode(config.vae, params, seen, compute).mean


def decode(
    params: Params, latent: Array, *, config: ModelConfig, compute: Compute, tile: int | None
) -> tuple[UInt8[Array, "batch height width 3"], Bool[Array, " batch"]]:
    """(images, whether each was finite, which bytes do not tell). `params`: the autoencoder's. tile: pixels a side that
    are decoded at a time; None: all."""
    if tile is None:
        image = vae.decode(config.vae, params, latent, compute)
    else:
        image = vae.decode_tiled(config.vae, params, latent, compute, tile)
    return arrays.to_bytes(image), jnp.isfinite(image).all(axis=(1, 2, 3))


class SampledBatch(NamedTuple):
    """One batch."""

    images: UInt8[type_of_array, "batch height width 3"]
    latents: Float[type_of_array, "batch latent_height latent_width channels"]
    finite_rows: Int32[type_of_array, " batch"]
    """Rows of all segments after which the latent was finite, up to the first after which it was not."""
    decoded: Bool[type_of_array, " batch"]
    """Whether the decoder's output was finite."""


class Functions(NamedTuple):
    """What `draw` calls: all plain, or all compiled."""

    text_states: Callable[..., Any]
    conditioning: Callable[..., Any]
    encode: Callable[..., Any]
    start_segment: Callable[..., Any]
    denoise: Callable[..., Any]
    decode: Callable[..., Any]


PLAIN = Functions(text_states, conditioning, encode, start_segment, denoise, decode)


STAGED = Functions(
    jax.jit(text_states, static_argnames=("towers", "guided", "compute")),
    jax.jit(conditioning, static_argnames="config"),
    jax.jit(encode, static_argnames=("config", "compute")),
    jax.jit(start_segment, static_argnames="segment"),
    jax.jit(denoise, static_argnames=("config", "terms", "stochastic", "compute")),
    jax.jit(decode, static_argnames=("config", "compute", "tile")),
)


def _text(recipe: Recipe, inputs: Inputs, call: Functions) -> list[ConditioningPair]:
    """What each model is told."""
    guided = any(segment.terms.guided for segment in recipe.segments)
    found = []
    for number, config in enumerate(recipe.models):
        if number and recipe.shares_text:
            width = config.text[-1].clip.width
            states = tuple(of_the_last(each, width) for each in found[0])
        else:
            towers = {tower.name: inputs.params[number][tower.name] for tower in config.text}
            tokens = (inputs.tokens, inputs.negative_tokens)
            states = call.text_states(towers, *tokens, towers=config.text, guided=guided, compute=recipe.compute)
        found.append(states)
    return [
        call.conditioning(states, inputs.has_negative, inputs.micro, config=config)
        for config, states in zip(recipe.models, found, strict=True)
    ]


def draw(
    inputs: Inputs,
    recipe: Recipe,
    call: Functions = PLAIN,
    callback: Callable[[int, State], None] | None = None,
) -> SampledBatch:
    """One batch. watch(number of the row, state) is called after every row of every segment; the
    segments are then gone through row by row."""
    base, compute = recipe.models[0], recipe.compute
    conditions = _text(recipe, inputs, call)
    image, kept, shown = None, None, None
    begun = inputs.scale * inputs.noise if recipe.segments[0].start_segment is SegmentStart.NOISE else inputs.noise
    if (init_inputs := inputs.init_inputs) is not None:
        latents = functools.partial(call.encode, inputs.params[0]["vae"], config=base, compute=compute)
        image = latents(init_inputs.image)
        if init_inputs.hidden is not None:
            assert init_inputs.mask is not None
            shown = jnp.concatenate([init_inputs.mask, latents(init_inputs.image, init_inputs.hidden)], axis=-1)
        if init_inputs.mask is not None:
            kept = KnownImage(image, inputs.noise, init_inputs.mask)
    state = None
    for segment, arrays_of_segment in zip(recipe.segments, inputs.segment_arrays, strict=True):
        config = recipe.models[segment.model]
        noise = begun if state is None else inputs.refiner_noise
        state = call.start_segment(segment, arrays_of_segment.plan.between(0, 1), state, noise, image)
        go = functools.partial(
            call.denoise,
            inputs.params[segment.model]["unet"],
            conditions[segment.model],
            keys=inputs.keys,
            strengths=inputs.strengths,
            kept=None if config.sees_mask else kept,
            shown=shown if config.sees_mask else None,
            config=config,
            terms=segment.terms,
            stochastic=segment.stochastic,
            compute=compute,
        )
        if callback is None:
            state = go(state=state, arrays_of_segment=arrays_of_segment)
            continue
        for row in range(len(arrays_of_segment.plan.timestep)):
            part = SegmentArrays(arrays_of_segment.plan.between(row, row + 1), arrays_of_segment.first + row)
            state = go(state=state, arrays_of_segment=part)
            callback(int(arrays_of_segment.first) + row, state)
    assert state is not None
    latent = state.arrays[0]
    images, decoded = call.decode(inputs.params[0]["vae"], latent, config=base, compute=compute, tile=recipe.tile)
    return SampledBatch(images, latent, state.finite_rows[:, 0, 0, 0], decoded)


@functools.partial(jax.jit, static_argnames="recipe")
def whole(inputs: Inputs, recipe: Recipe) -> SampledBatch:
    """`draw` as one program."""
    return draw(inputs, recipe)


def staged(inputs: Inputs, recipe: Recipe, callback: Callable[[int, State], None] | None = None) -> SampledBatch:
    """`draw` as programs of their own: text, image to latent, each segment, latent to image. Another prompt, another
    number of steps (if watched), another decoder compile only what they change."""
    return draw(inputs, recipe, STAGED, callback)
