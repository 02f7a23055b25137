"""SDXL, the latent diffusion model of arXiv:2307.01952, trained and sampled in JAX.

The names below are the public interface. They are imported when first used, so that `import sdxl_jax` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_jax.converting import convert
    from sdxl_jax.loading import load_model
    from sdxl_jax.options import Options
    from sdxl_jax.pipeline import encode_prompt, generate, image_to_image, inpaint, refine, text_to_image
    from sdxl_jax.training.loop import train

__all__ = [
    "Options",
    "convert",
    "encode_prompt",
    "generate",
    "image_to_image",
    "inpaint",
    "load_model",
    "refine",
    "text_to_image",
    "train",
]

_HOMES = {
    "Options": "sdxl_jax.options",
    "convert": "sdxl_jax.converting",
    "encode_prompt": "sdxl_jax.pipeline",
    "generate": "sdxl_jax.pipeline",
    "image_to_image": "sdxl_jax.pipeline",
    "inpaint": "sdxl_jax.pipeline",
    "load_model": "sdxl_jax.loading",
    "refine": "sdxl_jax.pipeline",
    "text_to_image": "sdxl_jax.pipeline",
    "train": "sdxl_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdxl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
