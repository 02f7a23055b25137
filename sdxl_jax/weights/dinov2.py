"""DINOv2 at a path, as transformers has it: a directory with config.json and model.safetensors, or a .safetensors file
with config.json beside it.

Only the backbone is read (Dinov2Model). Not here: the network itself (`models.dinov2`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from sdxl_jax.arrays import Params, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath, located
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.weights import names
from sdxl_jax.weights.formats import json_files, safetensors
from sdxl_jax.weights.lazy import Leaf, leaves_of
from sdxl_jax.weights.names import Dialect, Naming

_PART = "dinov2"
_UNUSED = "embeddings.mask_token"
"""Of DINOv2's own training."""
_EXPECTED = "Give DINOv2 as transformers saves it: a directory with config.json and model.safetensors"


@dataclass(frozen=True)
class DinoV2Weights:
    """DINOv2 on disk. Its parameters are not read yet."""

    config: DinoV2Config
    leaves: Mapping[str, Leaf]
    """By path: "patch_embedding/kernel"."""

    def load(self) -> Params:
        """The parameters, float32."""
        return unflatten({path: leaf.read().astype(np.float32) for path, leaf in self.leaves.items()})


def open_dinov2(path: str | PurePath) -> DinoV2Weights:
    """DINOv2 at a path. Raises InputError if there is none, for a variant that is not implemented, and for tensors that
    are missing, unknown or of another shape."""
    path = located(path, "DINOv2")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"There is no {file}, with the weights of DINOv2. {_EXPECTED}")
    if file.suffix != ".safetensors":
        safetensors.refuse_pickle(file)
        raise InputError(f"{file} is not a .safetensors file. {_EXPECTED}")
    config = _described(file.parent / "config.json")
    tensors = {name: tensor for name, tensor in safetensors.open_file(file)[0].items() if name != _UNUSED}
    table = names.table(config, Naming(Dialect.TRANSFORMERS))
    names.compare(table, {name: tensor.shape for name, tensor in tensors.items()}, str(file))
    leaves = leaves_of(_PART, table, tensors, file)
    return DinoV2Weights(config, {name: leaves[f"{_PART}/{name}"] for name in table.abstract})


def _described(path: AnyPath) -> DinoV2Config:
    fields: dict[str, Any] = {**_DEFAULTS, **json_files.read(path)}
    implemented = {"model_type": "dinov2", "hidden_act": "gelu", "use_swiglu_ffn": False, "qkv_bias": True}
    for name, value in {**implemented, "layer_norm_eps": 1e-6, "num_channels": 3}.items():
        if fields[name] != value:
            raise InputError(
                f"{path} has {name}={fields[name]}; implemented is {value}. {_EXPECTED}, of size S, B or L"
            )
    try:
        width = int(fields["hidden_size"])
        return DinoV2Config(
            width=width,
            layers=int(fields["num_hidden_layers"]),
            heads=int(fields["num_attention_heads"]),
            mlp_width=int(width * fields["mlp_ratio"]),
            side=int(fields["image_size"]),
            patch=int(fields["patch_size"]),
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} describes a DINOv2 that is not implemented ({error}). {_EXPECTED}") from error


_DEFAULTS = {
    **{"model_type": None, "hidden_act": "gelu", "use_swiglu_ffn": False, "qkv_bias": True, "layer_norm_eps": 1e-6},
    **{"num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4},
    **{"image_size": 224, "patch_size": 14},
}
"""Of transformers' Dinov2Config, whose files leave out what has these values."""
