"""What files of adapters and embeddings say of themselves: `modelspec.*`, and the hash by which A1111 knows them.

Sources: sd-scripts' `library/sai_model_spec.py` and `train_util.py`.
"""

import datetime
import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import ModelConfig
from sdxl_jax.weights.formats import safetensors

Named = dict[str, Shaped[np.ndarray, "..."]]
"""Tensors by name."""


def family(config: ModelConfig) -> tuple[str, str]:
    """(ss_base_model_version, modelspec.architecture without /lora)."""
    if config.micro is not None:
        if config.is_refiner:
            return "sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner"
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if config.unet.conv_projection:
        return "sd_v1", "stable-diffusion-v1"
    return "sd_v2", "stable-diffusion-v2-768-v" if config.prediction is Prediction.V else "stable-diffusion-v2-512"


def modelspec(config: ModelConfig, kind: str) -> dict[str, str]:
    """Of a file for a model. kind: what it holds, "lora" or "textual-inversion"."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family(config)[1]}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "modelspec.prediction_type": "v" if config.prediction is Prediction.V else config.prediction.value,
        "modelspec.resolution": "x".join(map(str, reversed(config.default_size))),
    }


def hash_of(tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> str:
    """sha256 of the file without its header, by which A1111 knows a LoRA."""
    digest = hashlib.sha256()
    for name in safetensors.in_order({name: (value.shape, value.dtype) for name, value in tensors.items()}):
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
