"""From prompts to pictures: the functions that users call.

    prompts ── tokens ── text states ┐
    sizes, crops ────────────────────┴─ condition ── sampler's scan over the UNet ── latent ── decoder ── picture

Text encoding and the sampling loop are one compiled program, decoding another. Both are keyed on the configuration and
the shapes, so a second call with the same shapes compiles nothing.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, UInt8
from tqdm import tqdm

from sdxl_jax import arrays, model
from sdxl_jax.arrays import MicroConditioning, Params, TokenIds
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.micro import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE
from sdxl_jax.conditioning.text import TextCondition, Tokenizer
from sdxl_jax.diffusion import schedule
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.samplers import guidance as guiding
from sdxl_jax.samplers import loop
from sdxl_jax.samplers.steps import SAMPLERS, Plan, Sampler, Spacing, timesteps

Size = tuple[int, int]
"""(height, width) or (top, left), in pixels."""


class Geometry(NamedTuple):
    """What the model is told of each picture's size and crop; None: the picture's own size."""

    original_size: Size | None = None
    crop_top_left: Size = (0, 0)
    target_size: Size | None = None
    aesthetic_score: float | None = None

    def rows(self, count: int, size: Size, aesthetic_score: float) -> MicroConditioning:
        def repeat(pair: Size) -> np.ndarray:
            return np.tile(np.array(pair, np.int32), (count, 1))

        score = aesthetic_score if self.aesthetic_score is None else self.aesthetic_score
        return MicroConditioning(
            repeat(self.original_size or size),
            repeat(self.crop_top_left),
            repeat(self.target_size or size),
            np.full(count, score, np.float32),
        )


class Generated(NamedTuple):
    images: UInt8[np.ndarray, "images height width 3"]
    latents: Float[np.ndarray, "images latent_height latent_width channels"]
    """Scaled, as the UNet sees them."""


@functools.partial(jax.jit, static_argnames=("config", "sampler", "compute", "guided"))
def sample_latents(
    params: Params,
    tokens: dict[str, TokenIds],
    negative_tokens: dict[str, TokenIds],
    has_negative: jax.Array,
    micro: tuple[MicroConditioning, MicroConditioning],
    state: jax.Array,
    keys: jax.Array,
    guidance: jax.Array,
    plan: Plan,
    *,
    config: ModelConfig,
    sampler: Sampler,
    compute: Compute,
    guided: bool,
) -> jax.Array:
    """Latents of one batch. micro: of the prompt and of the negative prompt. guided=False evaluates the prompt
    alone."""
    condition = model.condition(config, text.encode(config.text, params, tokens, compute), micro[0])
    if guided:
        negative = text.encode(config.text, params, negative_tokens, compute)
        if config.no_prompt is model.NoPrompt.ZEROS:
            negative = jax.tree.map(lambda x: x * has_negative.reshape(-1, *[1] * (x.ndim - 1)), negative)
        condition = guiding.both(model.condition(config, negative, micro[1]), condition)

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        inputs = jnp.concatenate([x_t, x_t]) if guided else x_t
        times = jnp.full(len(inputs), timestep)
        output = unet.apply(config.unet, params["unet"], inputs, times, condition.context, condition.vector, compute)
        return guiding.guide(output, guidance) if guided else output

    return loop.sample(network, state, keys, sampler, plan, config.prediction)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def decode(params: Params, latent: jax.Array, *, config: ModelConfig, compute: Compute) -> jax.Array:
    return arrays.to_bytes(vae.decode(config.vae, params["vae"], latent, compute))


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole of an array; of one that is spread over several processes, in each of them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def encode_prompt(model: Model, prompts: Sequence[str], compute: Compute = Compute()) -> TextCondition:
    """Text states of prompts: context [prompts, 77, features]; pooled [prompts, projection] where the model has it."""
    _check_parts(model, *(tower.name for tower in model.config.text))
    tokens = Tokenizer.of(model.config.text)(list(prompts))
    return text.encode(model.config.text, model.params, tokens, compute)


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    negative_prompts: Sequence[str | None] | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int = 30,
    sampler: str = "euler",
    timestep_spacing: Spacing = Spacing.LEADING,
    guidance: float = 5.0,
    seed: int = 0,
    num_images: int = 1,
    geometry: Geometry = Geometry(),
    negative_geometry: Geometry | None = None,
    init_noise: Float[np.ndarray, "images latent_height latent_width channels"] | None = None,
    batch_size: int = 8,
    compute: Compute = Compute(),
    progress: bool = False,
) -> Generated:
    """Pictures and their latents, in order of prompts, then images.

    Args:
        negative_prompts: one a prompt; None, or a None in it: no negative prompt, which is not the same as "".
        height, width: of the pictures, multiples of 8 for SDXL; default: the model's own.
        steps: 1 to the schedule's length.
        sampler: ddim, ddpm or euler.
        guidance: strength of classifier-free guidance; 1 is none, and costs half.
        seed: picture k's noise depends on the seed and k alone, whatever the batch size.
        num_images: pictures a prompt.
        geometry, negative_geometry: sizes and crop that the model is told; the negative's default is the same, except
            for its aesthetic score.
        init_noise: standard normal, in place of the seeded noise.
        batch_size: pictures at a time. Higher: faster until memory ends.
        progress: show a bar.

    Raises InputError for values out of range, an unknown sampler, noise of another shape, a model with parts missing.
    """
    config = model.config
    _check_parts(model, "unet", "vae", *(tower.name for tower in config.text))
    if config.unet.in_channels != config.vae.latent_channels:
        raise InputError(
            f"The UNet takes {config.unet.in_channels} channels, the latent has {config.vae.latent_channels}: a model "
            "for inpainting, which draws nothing from text alone. Use one for text to image"
        )
    factor = config.vae.downsampling
    height = config.default_size[0] if height is None else height
    width = config.default_size[1] if width is None else width
    negatives = [None] * len(prompts) if negative_prompts is None else negative_prompts
    _check(config, prompts, negatives, height, width, steps, sampler, num_images, batch_size, seed)
    prompts = [prompt for prompt in prompts for _ in range(num_images)]
    negatives = [prompt for prompt in negatives for _ in range(num_images)]
    size, count = (height, width), len(prompts)

    chosen = SAMPLERS[sampler]
    levels = schedule.make(config.schedule)
    plan = chosen.plan(levels, timesteps(steps, len(levels.alpha_bar), Spacing(timestep_spacing)))
    latent_shape = (height // factor, width // factor, config.vae.latent_channels)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))
    if init_noise is None:
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), latent_shape))(keys)
    elif init_noise.shape == (count, *latent_shape):
        noise = jnp.asarray(init_noise, jnp.float32)
    else:
        raise InputError(f"The initial noise has shape {init_noise.shape}, expected {(count, *latent_shape)}")
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)

    tokenizer = Tokenizer.of(config.text)
    negative_geometry = negative_geometry or geometry._replace(aesthetic_score=None)
    rows = (
        tokenizer(prompts),
        tokenizer([negative or "" for negative in negatives]),
        np.array([negative is not None for negative in negatives], np.float32),
        (geometry.rows(count, size, AESTHETIC_SCORE), negative_geometry.rows(count, size, NEGATIVE_AESTHETIC_SCORE)),
        noise * chosen.initial_scale(plan, timestep_spacing),
        step_keys,
    )
    images, latents = [], []
    batch_size = min(batch_size, count)
    starts = range(0, count, batch_size)
    for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
        # The last batch is filled up with its last row, so that it needs no compilation of its own.
        index = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = jax.tree.map(lambda row: row[index], rows)  # noqa: B023 (used within the iteration)
        latent = sample_latents(
            model.params,
            *batch,
            jnp.float32(guidance),
            plan,
            config=config,
            sampler=chosen,
            compute=compute,
            guided=guidance != 1,
        )
        latents.append(_on_host(latent)[: count - start])
        decoded = decode(model.params, latent, config=config, compute=compute)
        images.append(_on_host(decoded)[: count - start])
    return Generated(np.concatenate(images), np.concatenate(latents))


def text_to_image(
    model: Model, prompts: Sequence[str], **options: object
) -> UInt8[np.ndarray, "images height width 3"]:
    """Pictures of prompts, 0..255. The options are those of `generate`, which also gives the latents."""
    return generate(model, prompts, **options).images  # pyright: ignore[reportArgumentType]


def _check_parts(model: Model, *needed: str) -> None:
    if missing := [part for part in needed if part not in model.params]:
        raise InputError(
            f"The model has no {', '.join(missing)}, only {', '.join(model.params)}. Give a whole model, or the "
            "missing parts with --parts-from"
        )


def _check(
    config: ModelConfig,
    prompts: Sequence[str],
    negatives: Sequence[str | None],
    height: int,
    width: int,
    steps: int,
    sampler: str,
    num_images: int,
    batch_size: int,
    seed: int,
) -> None:
    factor, length = config.vae.downsampling, config.schedule.timesteps
    if isinstance(prompts, str):
        raise InputError(f"prompts is one text, {prompts[:40]!r}. Give a list of texts")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}, expected 0 to {2**32 - 1}")
    if num_images < 1 or not prompts:
        raise InputError("There is nothing to make: give at least one prompt and --num-images of 1 or more")
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(f"height {height} × width {width}: expected positive multiples of {factor}")
    if not 1 <= steps <= length:
        raise InputError(f"steps={steps}, expected 1 to {length}")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}, expected 1 or more")
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts. Give one each, or none")
    if sampler not in SAMPLERS:
        raise InputError(f"There is no sampler {sampler!r}. Known, nearest first: {nearest_first(sampler, SAMPLERS)}")
