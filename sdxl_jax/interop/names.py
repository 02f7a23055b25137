"""Tables: a path in our parameter tree <-> names of tensors in the diffusers and transformers layouts.

A table is made from the abstract parameter tree and a few renaming rules, so it lists every parameter exactly once; a
missing or surplus tensor is the difference of two tables. Layouts differ in two ways: torch keeps a linear weight as
[out, in] and a convolution as [out, in, height, width], where ours are [in, out] and [height, width, in, out]; and ours
are stacked on a leading axis where a scan runs over layers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError, nearest_first

Rules = Sequence[tuple[str, str]]
"""(pattern, replacement) pairs, applied in order to a path joined by dots. `{layer}` stands for the stacked index."""

UNET: Rules = (
    (r"_(\d+)(?=\.)", r".\1"),
    (r"\.downsample\.", ".downsamplers.0.conv."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"^mid_block\.attentions", "mid_block.attentions"),
    (r"\.transformer_blocks\.", ".transformer_blocks.{layer}."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
    (r"\.linear\.(\d)", r".linear_\1"),
)
VAE: Rules = (
    (r"_blocks_(\d+)_resnets_(\d+)", r"_blocks.\1.resnets.\2"),
    (r"mid_block\.resnets_(\d)", r"mid_block.resnets.\1"),
    (r"_blocks_(\d+)_downsample\.", r"_blocks.\1.downsamplers.0.conv."),
    (r"_blocks_(\d+)_upsample\.", r"_blocks.\1.upsamplers.0."),
    (r"mid_block\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"mid_block\.attention\.", "mid_block.attentions.0."),
    (r"\.to_out\.", ".to_out.0."),
    (r"^(?:en|de)coder\.((?:post_)?quant_conv)", r"\1"),
)
CLIP_TEXT: Rules = (
    (r"^(token_embedding|position_embedding)", r"text_model.embeddings.\1"),
    (r"position_embedding$", "position_embedding.weight"),
    (r"^final_layer_norm", "text_model.final_layer_norm"),
    (r"^layers\.(.*_proj)\.", r"text_model.encoder.layers.{layer}.self_attn.\1."),
    (r"^layers\.(fc\d)\.", r"text_model.encoder.layers.{layer}.mlp.\1."),
    (r"^layers\.", "text_model.encoder.layers.{layer}."),
)


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensors that hold it elsewhere."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """One tensor; or one a layer, in order, where ours is stacked."""
    stacked: bool

    @property
    def torch_axes(self) -> tuple[int, ...]:
        """The axes of one of our layers in torch's order."""
        rank = len(self.shape) - self.stacked
        if self.path[-1] != "kernel":
            return tuple(range(rank))
        return (1, 0) if rank == 2 else (3, 2, 0, 1)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in torch's layout."""
        layer = self.shape[self.stacked :]
        return tuple(layer[axis] for axis in self.torch_axes)


Table = tuple[Entry, ...]


def table(abstract_params: Params, rules: Rules) -> Table:
    """The table of a model. abstract_params: as from `jax.eval_shape`; only paths and shapes are read."""
    entries = []
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params)[0]:
        path = tuple(key.key for key in key_path)
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", ".".join(path))
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        stacked = "{layer}" in name
        layers = range(leaf.shape[0]) if stacked else (0,)
        names = tuple(name.replace("{layer}", str(layer)) for layer in layers)
        entries.append(Entry(path, leaf.shape, names, stacked))
    return tuple(entries)


def from_tensors(table: Table, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our nested dict from named tensors in torch's layout; dtypes are kept.

    transformers 5 writes CLIP's names without their `text_model.` prefix; both are taken. Raises InputError for a
    tensor that is missing, left over, or of another shape.
    """
    known = {name for entry in table for name in entry.names}
    prefix = "text_model."
    # Buffers that older files carry: 0, 1, … 76, not a weight.
    buffers = {"embeddings.position_ids", prefix + "embeddings.position_ids"}
    tensors = {
        prefix + name if prefix + name in known else name: array
        for name, array in tensors.items()
        if name not in buffers
    }
    if missing := sorted(known - tensors.keys()):
        near = nearest_first(missing[0], tensors.keys() - known)[:3]
        raise InputError(f"{len(missing)} tensors are missing, the first is {missing[0]}. Nearest unused names: {near}")
    if surplus := sorted(tensors.keys() - known):
        near = nearest_first(surplus[0], known)[:3]
        raise InputError(f"{len(surplus)} tensors are unknown, the first is {surplus[0]}. Nearest known names: {near}")

    params: Params = {}
    for entry in table:
        for name in entry.names:
            if tensors[name].shape != entry.torch_shape:
                raise InputError(
                    f"{name} has shape {tensors[name].shape}, the model's {'/'.join(entry.path)} needs "
                    f"{entry.torch_shape}. Is it another model's file?"
                )
        back = np.argsort(entry.torch_axes)
        layers = [np.transpose(tensors[name], back) for name in entry.names]
        value = np.stack(layers) if entry.stacked else layers[0]
        node = params
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = value
    return params


def to_tensors(table: Table, params: Params) -> dict[str, np.ndarray]:
    """The reverse: named tensors in torch's layout, dtypes kept."""
    tensors = {}
    for entry in table:
        value = params
        for key in entry.path:
            value = value[key]
        layers = np.asarray(value) if entry.stacked else np.asarray(value)[None]
        for name, layer in zip(entry.names, layers, strict=True):
            tensors[name] = np.ascontiguousarray(np.transpose(layer, entry.torch_axes))
    return tensors
