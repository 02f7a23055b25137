"""CLIP models for the CLIP score and CMMD: a whole CLIP of transformers or OpenCLIP, both towers of which are read from
one path. An image tower alone suffices for CMMD.

    image ── standard preprocessing ── image tower ── projection ── / norm
    prompt ── tokens, 75 at most ── text tower ── projection ── / norm
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from sdxl_jax.arrays import Params
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer, Tower
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.features import Network
from sdxl_jax.evaluation.scores import Clip
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.models import clip_vision
from sdxl_jax.sampling.clip_images import preprocess
from sdxl_jax.weights.clip_vision import open_tower
from sdxl_jax.weights.load import load_weights
from sdxl_jax.weights.open import open_model

_PROMPTS = 64
"""Prompts per batch."""


def open_clip(path: AnyPath) -> Clip:
    """The CLIP model at a path: a directory of transformers, or a .safetensors file in the naming of transformers or
    OpenCLIP. Raises InputError where there is no image tower, and for towers of two models."""
    found = open_tower(path)
    config = found.config

    def apply(params: Params, pixels: Float[jax.Array, "batch side side 3"]) -> Float[jax.Array, "batch projection"]:
        return _unit(clip_vision.encode(config, params, pixels).embedding)

    name = f"{path.name}, {config.side} px"
    image = Network(name, functools.partial(preprocess, side=config.side), jax.jit(apply), found.load())
    try:
        weights = open_model(path)
    except InputError as error:
        return Clip(image, None, str(error))
    towers = [tower for tower in weights.config.text if tower.name in weights.parts]
    if len(towers) != 1 or towers[0].clip.projection_dim != config.projection_dim:
        dims = ", ".join(str(tower.clip.projection_dim) for tower in towers) or "none"
        return Clip(image, None, f"text towers with a projection to {dims}, not to {config.projection_dim}")
    return Clip(image, functools.partial(_embed, towers[0], load_weights(weights, progress=False).params))


def _unit(embedding: Float[jax.Array, "batch projection"]) -> Float[jax.Array, "batch projection"]:
    return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)


def _embed(tower: Tower, params: Params, prompts: Sequence[str]) -> Float32[np.ndarray, "prompts projection"]:
    """Embeddings of unit length. Tokens beyond the first 75 are left out, as the model was trained."""

    @jax.jit
    def encode(params: Params, tokens: Params) -> Float[jax.Array, "batch projection"]:
        pooled = text.encode((tower,), params, tokens).pooled
        assert pooled is not None, "the tower has a projection"
        return _unit(pooled)

    tokens = Tokenizer.of((tower,))(list(prompts))[tower.name]
    found = []
    for start in range(0, len(prompts), _PROMPTS):
        batch = tokens[start : start + _PROMPTS]
        padded = np.concatenate([batch, np.repeat(batch[-1:], min(_PROMPTS, len(prompts)) - len(batch), axis=0)])
        found.append(np.asarray(encode(params, {tower.name: padded}))[: len(batch)])
    return np.concatenate(found)
