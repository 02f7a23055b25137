"""Image prompts: images that sampling is conditioned on, encoded by CLIP's image tower before the model is loaded.

An image prompt is an embedding with a strength. What the model does with it is `conditioning.image`; which image tower
is at a path is `weights.clip_vision`.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.models import clip_vision
from sdxl_jax.models.clip_vision import ClipVisionConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.sampling.clip_images import preprocess


class ImagePrompt(NamedTuple):
    """An image that sampling is conditioned on. Several are added up."""

    embedding: Float[np.ndarray, " projection"]
    """By the image tower that belongs to the model's last text encoder; see `encode_images`."""
    strength: float = 1.0
    """Factor of the embedding. Higher: more of this image; below 0: away from it."""


ImagePrompts = Sequence[ImagePrompt] | Sequence[Sequence[ImagePrompt]]
"""Those of every prompt, or one list per prompt."""


def of_each_prompt(given: ImagePrompts, prompts: int) -> list[Sequence[ImagePrompt]]:
    """One list per prompt: as it is given, or the same for each. prompts: their number. Raises InputError where image
    prompts and lists are mixed."""
    single = [isinstance(each, ImagePrompt) for each in given]
    if all(single):
        return [cast("Sequence[ImagePrompt]", given)] * prompts
    if any(single):
        raise InputError(
            "The image prompts are in part lists and in part none. Give image prompts, which every prompt has, or one "
            "list of them per prompt"
        )
    return list(cast("Sequence[Sequence[ImagePrompt]]", given))


_encode = jax.jit(clip_vision.encode, static_argnames=("config", "compute"))


def encode_images(
    config: ClipVisionConfig,
    params: Params,
    images: Sequence[UInt8[np.ndarray, "_height _width 3"]],
    compute: Compute = Compute(),
) -> Float32[np.ndarray, "images projection"]:
    """Embeddings of images 0..255 by an image tower, not of unit length. One image at a time, so that any number of
    them compiles one program."""
    params = jax.device_put(params)
    pixels = (preprocess(image, config.side)[None] for image in images)
    return np.concatenate([_encode(config, params, each, compute=compute).embedding for each in pixels])


def check_width(config: ModelConfig, projection: int) -> None:
    """Raises InputError for a model that embeddings so wide cannot condition."""
    pooled = None if config.micro is None or not config.text else config.text[-1].clip.projection_dim
    if pooled is None:
        raise InputError(
            "The model has no pooled text, in whose place an image prompt would be; SD 1.x and 2.x have none. Give "
            "SDXL, or start from the image with --init-image"
        )
    if pooled != projection:
        raise InputError(
            f"The image encoder's embeddings have a width of {projection}, the model's pooled text {pooled}. Give the "
            "image tower of the CLIP whose text tower the model has; SDXL: OpenCLIP's ViT-bigG, 1280"
        )
