"""SDXL, the latent diffusion model of arXiv:2307.01952, in JAX: training and sampling.

The names below are the public interface. They are imported when first used, so that `import sdxl_jax` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_jax.evaluation.scores import evaluate
    from sdxl_jax.sampling.generate import encode_prompt, generate, image_to_image, inpaint, refine, text_to_image
    from sdxl_jax.sampling.options import Options
    from sdxl_jax.training.loop import train
    from sdxl_jax.weights.convert import convert
    from sdxl_jax.weights.load import load_model

__all__ = [
    "Options",
    "convert",
    "encode_prompt",
    "evaluate",
    "generate",
    "image_to_image",
    "inpaint",
    "load_model",
    "refine",
    "text_to_image",
    "train",
]

_HOMES = {
    "Options": "sdxl_jax.sampling.options",
    "convert": "sdxl_jax.weights.convert",
    "encode_prompt": "sdxl_jax.sampling.generate",
    "evaluate": "sdxl_jax.evaluation.scores",
    "generate": "sdxl_jax.sampling.generate",
    "image_to_image": "sdxl_jax.sampling.generate",
    "inpaint": "sdxl_jax.sampling.generate",
    "load_model": "sdxl_jax.weights.load",
    "refine": "sdxl_jax.sampling.generate",
    "text_to_image": "sdxl_jax.sampling.generate",
    "train": "sdxl_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdxl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
