"""Image towers of CLIP at a path: found, read and written.

    a directory of transformers    config.json and model.safetensors: `image_encoder` of diffusers' pipelines, or a
                                   whole CLIP, of which the image tower is read
    a .safetensors file            the names of transformers or of OpenCLIP, with or without the text tower (such as
                                   ComfyUI's clip_vision files)

The configuration is that of config.json, in the directory or beside the file. Without one it follows from names and
shapes, by the conventions of the published towers: 16 heads (64 wide in towers below 1024), images of square size, and
quick-GELU where the embedding has the size of OpenAI's.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from sdxl_jax.arrays import Params, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath, located
from sdxl_jax.models.clip import Activation
from sdxl_jax.models.clip_vision import ClipVisionConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.formats import json_files, safetensors
from sdxl_jax.weights.formats.safetensors import Tensor
from sdxl_jax.weights.lazy import Leaf, leaves_of
from sdxl_jax.weights.names import Dialect, Naming
from sdxl_jax.weights.writing import tensors_of, write_leaves

_MARKS = {
    "vision_model.embeddings.class_embedding": (Dialect.TRANSFORMERS, ""),
    "visual.class_embedding": (Dialect.OPENCLIP, "visual."),
}
"""The tensor by which a naming is known, and what stands before the names of its table."""
_OF_TEXT = re.compile(
    r"^(text_model|text_projection|transformer|token_embedding|positional_embedding|ln_final)(\.|$)"
    r"|^(logit_scale|logit_bias|attn_mask|visual_projection\.bias)$|(^|\.)position_ids$"
)
"""Tensors of a whole CLIP that are not the image tower's, and buffers."""
_PART = "image_encoder"


@dataclass(frozen=True)
class ImageTower:
    """An image tower on disk. Its parameters are not read yet."""

    config: ClipVisionConfig
    leaves: Mapping[str, Leaf]
    """By path: "patch_embedding/kernel"."""
    naming: Naming

    def load(self, dtype: Any = np.float32) -> Params:
        """The parameters, cast to a dtype."""
        return unflatten({path: leaf.read().astype(dtype) for path, leaf in self.leaves.items()})


def open_tower(path: str | PurePath) -> ImageTower:
    """The image tower at a path. Raises InputError if there is none, and for tensors that are missing, unknown or of
    another shape."""
    path = located(path, "the image tower")
    tensors = _tensors(path)
    found = next(
        ((name.removesuffix(mark), *_MARKS[mark]) for name in tensors for mark in _MARKS if name.endswith(mark)), None
    )
    if found is None:
        raise InputError(
            f"{path} holds {len(tensors)} tensors, but no image tower of CLIP. Give a directory with the config.json "
            "of a CLIPVisionModelWithProjection or a CLIPModel, or a .safetensors file of one or of an OpenCLIP model"
        )
    before, dialect, inner = found
    naming = Naming(dialect, before + inner)
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(before) and not _OF_TEXT.search(name.removeprefix(before))
    }
    shapes = {name.removeprefix(naming.prefix): tensor.shape for name, tensor in own.items()}
    config = _described((path if path.is_dir() else path.parent) / "config.json")
    config = config or _inferred(shapes, dialect, path)
    table = names.table(config, naming)
    names.compare(table, {name: tensor.shape for name, tensor in own.items()}, str(path))
    leaves = leaves_of(_PART, table, own, path)
    return ImageTower(config, {path: leaves[f"{_PART}/{path}"] for path in table.abstract}, naming)


def write(tower: ImageTower, destination: Path, dialect: Dialect) -> None:
    """Writes a tower: to a new .safetensors file; or, with transformers' names, to a new directory that
    `CLIPVisionModelWithProjection.from_pretrained` loads. Numbers and dtypes stay as they are, bit for bit."""
    if destination.exists():
        raise InputError(f"{destination} exists already. Remove it, or choose another destination")
    as_file = destination.suffix == ".safetensors"
    if not as_file and dialect is not Dialect.TRANSFORMERS:
        raise InputError(f"{destination}: a directory has the names of transformers. Give a .safetensors file")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not as_file:
        destination.mkdir()
        (destination / "config.json").write_text(json.dumps(_fields(tower.config), indent=2) + "\n")
    file = destination if as_file else destination / "model.safetensors"
    table = names.table(tower.config, Naming(dialect, "visual." if dialect is Dialect.OPENCLIP else ""))
    leaves = {f"{_PART}/{path}": leaf for path, leaf in tower.leaves.items()}
    tensors = tensors_of(_PART, table, leaves, "Use a file of one dtype")
    with safetensors.Writer(file, tensors, {"format": "pt"}) as writer:
        write_leaves(writer, _PART, table, leaves, tensors)


def _tensors(path: AnyPath) -> dict[str, Tensor]:
    if path.is_file():
        return safetensors.open_file(path)[0]
    if not path.is_dir():
        safetensors.refuse_pickle(path)
        raise InputError(f"There is nothing at {path}. Expected an image tower of CLIP: a directory, or a file")
    if (index := path / "model.safetensors.index.json").is_file():
        return safetensors.open_index(index)[0]
    if (file := path / "model.safetensors").is_file():
        return safetensors.open_file(file)[0]
    raise InputError(f"{path} has no model.safetensors. Download it too, or give the file itself")


def _described(path: AnyPath) -> ClipVisionConfig | None:
    """The configuration of a config.json; None if there is none, or it is another network's."""
    fields = json_files.read(path, optional=True)
    architectures = fields.get("architectures") or []
    if "vision_config" in fields:
        fields = {**fields["vision_config"], "projection_dim": fields.get("projection_dim", 512)}
    elif "CLIPVisionModelWithProjection" not in architectures and fields.get("model_type") != "clip_vision_model":
        return None
    given: dict[str, Any] = {**_DEFAULTS, **fields}
    try:
        return ClipVisionConfig(
            width=int(given["hidden_size"]),
            layers=int(given["num_hidden_layers"]),
            heads=int(given["num_attention_heads"]),
            mlp_width=int(given["intermediate_size"]),
            activation=Activation(given["hidden_act"]),
            projection_dim=int(given["projection_dim"]),
            side=int(given["image_size"]),
            patch=int(given["patch_size"]),
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} describes an image tower that is not implemented ({error})") from error


_DEFAULTS = {
    **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12},
    **{"num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"},
}
"""Of transformers' CLIPVisionConfig, whose files leave out what has these values."""


def _fields(config: ClipVisionConfig) -> dict[str, Any]:
    """config.json of a CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "projection_dim": config.projection_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "image_size": config.side,
        "patch_size": config.patch,
        "hidden_act": config.activation.value,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }


def _inferred(shapes: Mapping[str, tuple[int, ...]], dialect: Dialect, where: AnyPath) -> ClipVisionConfig:
    """The configuration by names and shapes, without the naming's prefix."""
    transformers = dialect is Dialect.TRANSFORMERS
    inside = "vision_model.embeddings." if transformers else ""
    layers = r"vision_model\.encoder\.layers\.(\d+)\." if transformers else r"transformer\.resblocks\.(\d+)\."
    try:
        width, _, patch, _ = shapes[f"{inside}patch_embedding.weight" if transformers else "conv1.weight"]
        positions = shapes[f"{inside}position_embedding.weight" if transformers else "positional_embedding"][0]
        first = "vision_model.encoder.layers.0.mlp.fc1" if transformers else "transformer.resblocks.0.mlp.c_fc"
        mlp_width = shapes[f"{first}.weight"][0]
        projection = shapes["visual_projection.weight"][0] if transformers else shapes["proj"][1]
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{where} looks like an image tower of CLIP, but {error} is missing or out of place. Download it again"
        ) from error
    return ClipVisionConfig(
        width=width,
        layers=len({found[1] for name in shapes if (found := re.match(layers, name))}),
        heads=16 if width >= 1024 else max(1, width // 64),
        mlp_width=mlp_width,
        activation=Activation.QUICK_GELU if (width, projection) in ((1024, 768), (768, 512)) else Activation.GELU,
        projection_dim=projection,
        side=patch * math.isqrt(positions - 1),
        patch=patch,
    )
