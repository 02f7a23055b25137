"""Name tables: which part of our parameters each tensor of other people's files holds.

A table is made from a network's configuration and the naming of a file. It lists every tensor once and covers every
parameter once, so a missing or unexpected tensor is the difference of two tables, and the conversion back reads the
same table in reverse. Layouts differ in more than names: torch has a linear weight as [out, in] and a convolution as
[out, in, height, width], where ours are [in, out] and [height, width, in, out]; ours are stacked on a leading axis
where a scan runs over layers; OpenCLIP has queries, keys and values of a layer in one tensor, and its projection as
[in, out].

Sources: `state_dict()` of the networks in diffusers, transformers, open_clip, and in Stability's `generative-models`
(sgm), whose names for UNet and autoencoder are those of the first latent-diffusion code.
"""

import enum
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.models import clip, clip_vision, dinov2, unet, vae
from sdxl_jax.models.clip import ClipTextConfig
from sdxl_jax.models.clip_vision import ClipVisionConfig
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.models.initialisers import Parameter
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig

PartConfig = UNetConfig | VaeConfig | TinyVaeConfig | ClipTextConfig
TableConfig = PartConfig | ClipVisionConfig | DinoV2Config
"""Networks that have tables: parts of a model, the image towers of CLIP, and DINOv2."""


class Dialect(enum.Enum):
    """The library whose names the tensors have."""

    DIFFUSERS = "diffusers"
    """UNet, VAE and tiny VAE of diffusers."""
    DIFFUSERS_OLD = "diffusers_old"
    """VAE of diffusers before 0.18: its attention has query, key, value and proj_attn."""
    ORIGINAL = "original"
    """UNet and VAE of latent-diffusion and sgm: input_blocks, middle_block, output_blocks."""
    TRANSFORMERS = "transformers"
    """CLIP of transformers, as in every file on the hub: text_model.encoder.layers; DINOv2 of transformers."""
    TRANSFORMERS_5 = "transformers_5"
    """CLIP as transformers 5 saves it: without `text_model.`."""
    OPENCLIP = "openclip"
    """CLIP of OpenAI and OpenCLIP: transformer.resblocks, queries, keys and values in one tensor."""
    TAESD_ENCODER = "taesd_encoder"
    """The encoder alone of a tiny VAE, as taesd has it: layers by number."""
    TAESD_DECODER = "taesd_decoder"
    """The decoder alone, in a file of its own."""


HALVES = {Dialect.TAESD_ENCODER: "encoder/", Dialect.TAESD_DECODER: "decoder/"}
"""Path above the parameters that a naming of half a network covers. All other namings cover whole networks."""


@dataclass(frozen=True)
class Naming:
    """How a file names and shapes the tensors of one part of a model."""

    dialect: Dialect
    prefix: str = ""
    """Prefix of every name."""
    conv_attention: bool = False
    """The VAE's attention has 1×1 convolutions, [out, in, 1, 1]; false: linear layers, [out, in]."""


@dataclass(frozen=True)
class Place:
    """One of our parameters, or one layer of a stacked one."""

    path: str
    """Keys joined by slashes."""
    layer: int | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of another layout, and the parameters that it holds."""

    name: str
    shape: tuple[int, ...]
    """The tensor's."""
    places: tuple[Place, ...]
    """One; or query, key and value, of equal size, concatenated along the tensor's first axis."""
    axes: tuple[int, ...]
    """Our axes of a place (without the layer's), in the tensor's order. The tensor may have further axes of 1."""

    def ours(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """A tensor, or one place's part of it, with our axes."""
        return tensor.reshape(tensor.shape[: len(self.axes)]).transpose(np.argsort(self.axes))

    def theirs(self, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """A place's value with the tensor's axes."""
        value = value.transpose(self.axes)
        return value.reshape(value.shape + (1,) * (len(self.shape) - value.ndim))


@dataclass(frozen=True)
class Table:
    """Every tensor of one part in one naming."""

    abstract: Mapping[str, Parameter]
    """Our parameters, by path."""
    entries: tuple[Entry, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    @functools.cached_property
    def by_path(self) -> dict[str, list[tuple[Entry, int]]]:
        """For each parameter its tensors, in the order of layers, with the number of the place."""
        found: dict[str, list[tuple[Entry, int]]] = {path: [] for path in self.abstract}
        for entry in self.entries:
            for number, place in enumerate(entry.places):
                found[place.path].append((entry, number))
        for rows in found.values():
            rows.sort(key=lambda row: row[0].places[row[1]].layer or 0)
        return found


# (pattern, replacement) pairs, applied in order to a path joined by dots; `{layer}` stands for the stacked index.
_Rules = Sequence[tuple[str, str]]
_DIFFUSERS_UNET: _Rules = (
    (r"_(\d+)(?=\.)", r".\1"),
    (r"\.downsample\.", ".downsamplers.0.conv."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.transformer_blocks\.", ".transformer_blocks.{layer}."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
    (r"\.linear\.(\d)", r".linear_\1"),
)
_DIFFUSERS_VAE: _Rules = (
    (r"_blocks_(\d+)_resnets_(\d+)", r"_blocks.\1.resnets.\2"),
    (r"mid_block\.resnets_(\d)", r"mid_block.resnets.\1"),
    (r"_blocks_(\d+)_downsample\.", r"_blocks.\1.downsamplers.0.conv."),
    (r"_blocks_(\d+)_upsample\.", r"_blocks.\1.upsamplers.0."),
    (r"mid_block\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"mid_block\.attention\.", "mid_block.attentions.0."),
    (r"\.to_out\.", ".to_out.0."),
    (r"^(?:en|de)coder\.((?:post_)?quant_conv)", r"\1"),
)
_DIFFUSERS_OLD_VAE: _Rules = (
    *_DIFFUSERS_VAE,
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)
_TRANSFORMERS: _Rules = (
    (r"^(token_embedding|position_embedding)", r"text_model.embeddings.\1"),
    (r"position_embedding$", "position_embedding.weight"),
    (r"^final_layer_norm", "text_model.final_layer_norm"),
    (r"^layers\.(.*_proj)\.", r"text_model.encoder.layers.{layer}.self_attn.\1."),
    (r"^layers\.(fc\d)\.", r"text_model.encoder.layers.{layer}.mlp.\1."),
    (r"^layers\.", "text_model.encoder.layers.{layer}."),
)
_TRANSFORMERS_5: _Rules = (*_TRANSFORMERS, (r"^text_model\.", ""))
_OPENCLIP: _Rules = (
    (r"position_embedding$", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^layers\.[qkv]_proj\.", "transformer.resblocks.{layer}.attn.in_proj_"),
    (r"^layers\.out_proj\.", "transformer.resblocks.{layer}.attn.out_proj."),
    (r"^layers\.layer_norm(\d)", r"transformer.resblocks.{layer}.ln_\1"),
    (r"^layers\.fc1\.", "transformer.resblocks.{layer}.mlp.c_fc."),
    (r"^layers\.fc2\.", "transformer.resblocks.{layer}.mlp.c_proj."),
)

# The layers of text and image towers have the same names.
_VISION_TRANSFORMERS: _Rules = (
    (r"^((?:class|patch|position)_embedding)", r"vision_model.embeddings.\1"),
    (r"position_embedding$", "position_embedding.weight"),
    (r"^pre_layernorm", "vision_model.pre_layrnorm"),  # spelt like this in every file
    (r"^post_layernorm", "vision_model.post_layernorm"),
    *((pattern, new.replace("text_model", "vision_model")) for pattern, new in _TRANSFORMERS[3:]),
)
_VISION_OPENCLIP: _Rules = (
    (r"position_embedding$", "positional_embedding"),
    (r"^patch_embedding\.", "conv1."),
    (r"^pre_layernorm", "ln_pre"),
    (r"^post_layernorm", "ln_post"),
    (r"^visual_projection\.weight", "proj"),
    *_OPENCLIP[3:],
)
_DINOV2: _Rules = (
    (r"^(cls_token|position_embeddings)$", r"embeddings.\1"),
    (r"^patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^layers\.(query|key|value)\.", r"encoder.layer.{layer}.attention.attention.\1."),
    (r"^layers\.out\.", "encoder.layer.{layer}.attention.output.dense."),
    (r"^layers\.(layer_scale\d)$", r"encoder.layer.{layer}.\1.lambda1"),
    (r"^layers\.(fc\d)\.", r"encoder.layer.{layer}.mlp.\1."),
    (r"^layers\.", "encoder.layer.{layer}."),
)


def _original_unet(config: UNetConfig) -> _Rules:
    """Rules from diffusers' names. Blocks are numbered consecutively: a down- or upsampling belongs to the block that
    it follows."""
    levels, count = len(config.block_channels), config.resnets_per_block
    rules = [
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut", ".skip_connection"),
    ]
    rules += [(r"(resnets\.\d+)\.norm1\.", r"\1.in_layers.0."), (r"(resnets\.\d+)\.norm2\.", r"\1.out_layers.0.")]
    rules += [(r"\.time_emb_proj\.", ".emb_layers.1.")]
    for level in range(levels):
        first = 1 + level * (count + 1)
        for index in range(count):
            rules += [(rf"^down_blocks\.{level}\.resnets\.{index}\.", f"input_blocks.{first + index}.0.")]
            rules += [(rf"^down_blocks\.{level}\.attentions\.{index}\.", f"input_blocks.{first + index}.1.")]
        rules += [(rf"^down_blocks\.{level}\.downsamplers\.0\.conv\.", f"input_blocks.{first + count}.0.op.")]
    for block in range(levels):
        first = block * (count + 1)
        for index in range(count + 1):
            rules += [(rf"^up_blocks\.{block}\.resnets\.{index}\.", f"output_blocks.{first + index}.0.")]
            rules += [(rf"^up_blocks\.{block}\.attentions\.{index}\.", f"output_blocks.{first + index}.1.")]
        slot = 2 if config.transformer_depth[levels - 1 - block] else 1
        rules += [(rf"^up_blocks\.{block}\.upsamplers\.0\.", f"output_blocks.{first + count}.{slot}.")]
    return (
        *_DIFFUSERS_UNET,
        *rules,
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^time_embedding\.cond_proj", "time_embed.cond_proj"),
        (r"^class_embedding\.", "label_emb."),
        (r"^add_embedding\.linear_1", "label_emb.0.0"),
        (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
    )


def _original_vae(config: VaeConfig) -> _Rules:
    """Rules from diffusers' names. The decoder's levels are numbered from the finest, diffusers' from the coarsest."""
    last = len(config.block_channels) - 1
    ups = [(rf"up_blocks\.{index}\.", f"up.{last - index}.") for index in range(last + 1)]
    return (
        *_DIFFUSERS_VAE,
        (r"down_blocks\.(\d+)\.", r"down.\1."),
        *ups,
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"\.resnets\.", ".block."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    )


def _tiny_vae(config: TinyVaeConfig, dialect: Dialect) -> _Rules:
    """Layers are numbered consecutively in each half, activations and upsampling included."""
    encoder, decoder = ["conv_in"], ["conv_in", ""]
    for level, blocks in enumerate(config.encoder_blocks):
        encoder += [f"down_blocks_{level}_downsample"] if level else []
        encoder += [f"down_blocks_{level}_blocks_{index}" for index in range(blocks)]
    for level, blocks in enumerate(config.decoder_blocks):
        decoder += [f"up_blocks_{level}_blocks_{index}" for index in range(blocks)]
        decoder += ["", f"up_blocks_{level}_upsample"] if level + 1 < len(config.decoder_blocks) else []
    rules = []
    # taesd's own decoder begins with the clamp of the latent, as layer 0.
    for half, layers_of, first in (("encoder", encoder, 0), ("decoder", decoder, dialect is Dialect.TAESD_DECODER)):
        prefix = f"{half}.layers." if dialect is Dialect.DIFFUSERS else ""
        for number, layer in enumerate([*layers_of, "conv_out"], first):
            rules += [(rf"^{half}\.{layer}\.", f"{prefix}{number}.")] if layer else []
    return (*rules, (r"\.conv1\.", ".conv.0."), (r"\.conv2\.", ".conv.2."), (r"\.conv3\.", ".conv.4."))


def _rules(config: TableConfig, dialect: Dialect) -> _Rules:
    match config, dialect:
        case TinyVaeConfig(), Dialect.DIFFUSERS | Dialect.TAESD_ENCODER | Dialect.TAESD_DECODER:
            return _tiny_vae(config, dialect)
        case UNetConfig(), Dialect.DIFFUSERS:
            return _DIFFUSERS_UNET
        case UNetConfig(), Dialect.ORIGINAL:
            return _original_unet(config)
        case VaeConfig(), Dialect.DIFFUSERS:
            return _DIFFUSERS_VAE
        case VaeConfig(), Dialect.DIFFUSERS_OLD:
            return _DIFFUSERS_OLD_VAE
        case VaeConfig(), Dialect.ORIGINAL:
            return _original_vae(config)
        case ClipTextConfig(), Dialect.TRANSFORMERS:
            return _TRANSFORMERS
        case ClipTextConfig(), Dialect.TRANSFORMERS_5:
            return _TRANSFORMERS_5
        case ClipTextConfig(), Dialect.OPENCLIP:
            return _OPENCLIP
        case ClipVisionConfig(), Dialect.TRANSFORMERS:
            return _VISION_TRANSFORMERS
        case ClipVisionConfig(), Dialect.OPENCLIP:
            return _VISION_OPENCLIP
        case DinoV2Config(), Dialect.TRANSFORMERS:
            return _DINOV2
        case _:
            raise AssertionError(f"{dialect} has no names for {type(config).__name__}")


@functools.cache
def abstract(config: TableConfig) -> dict[str, Parameter]:
    """A part's parameters and how they begin, by path; nothing is computed."""
    match config:
        case UNetConfig():
            return flatten(unet.abstract(config))
        case VaeConfig() | TinyVaeConfig():
            return flatten(vae.abstract(config))
        case ClipTextConfig():
            return flatten(clip.abstract(config))
        case ClipVisionConfig():
            return flatten(clip_vision.abstract(config))
        case DinoV2Config():
            return flatten(dinov2.abstract(config))


@functools.cache
def table(config: TableConfig, naming: Naming) -> Table:
    """The table of one part of a model in one naming; of half the part, if the naming covers half."""
    half = HALVES.get(naming.dialect, "")
    params = {path: leaf for path, leaf in abstract(config).items() if path.startswith(half)}
    rules = _rules(config, naming.dialect)
    places: dict[str, list[Place]] = {}
    layouts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for path, leaf in _by_order_of_fusion(params):
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path.replace("/", "."))
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        stacked = path.startswith("layers/") or "/transformer_blocks/" in path
        shape = leaf.shape[stacked:]
        axes = _axes(path, len(shape), naming.dialect)
        ones = (1, 1) if naming.conv_attention and "/attention/" in path and path.endswith("kernel") else ()
        for layer in range(leaf.shape[0]) if stacked else (None,):
            full = naming.prefix + name.replace("{layer}", str(layer))
            places.setdefault(full, []).append(Place(path, layer))
            layouts[full] = (*(shape[axis] for axis in axes), *ones), axes
    entries = []
    for name, parts in places.items():
        (first, *rest), axes = layouts[name]
        entries.append(Entry(name, (first * len(parts), *rest), tuple(parts), axes))
    return Table(params, tuple(entries))


def _by_order_of_fusion(params: Mapping[str, Parameter]) -> Iterable[tuple[str, Parameter]]:
    """Queries before keys before values, the order of OpenCLIP's in_proj."""
    order = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
    return sorted(params.items(), key=lambda item: order.get(item[0].split("/")[-2] if "/" in item[0] else "", 3))


def _axes(path: str, rank: int, dialect: Dialect) -> tuple[int, ...]:
    """Our axes in torch's order."""
    projections = ("text_projection/kernel", "visual_projection/kernel")
    if not path.endswith("kernel") or (dialect is Dialect.OPENCLIP and path in projections):
        return tuple(range(rank))
    return (1, 0) if rank == 2 else (3, 2, 0, 1)


class Mismatch(InputError):
    """The tensors of a file do not match those of the model."""


def compare(table: Table, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises Mismatch unless these tensors, shapes by name, are exactly those of the table: it names the first that is
    missing and the first that is unknown, each with the nearest names of the other side, and the first of another
    shape. where: the file, for messages."""
    problems = []
    missing, surplus = sorted(table.by_name.keys() - shapes.keys()), sorted(shapes.keys() - table.by_name.keys())
    if missing:
        near = ", ".join(nearest_first(missing[0], surplus or shapes)[:3])
        problems.append(
            f"{len(missing)} of {len(table.entries)} tensors are missing, the first is {missing[0]} "
            f"{table.by_name[missing[0]].shape}, nearest in the file: {near}"
        )
    if surplus:
        near = ", ".join(nearest_first(surplus[0], missing or table.by_name)[:3])
        problems.append(
            f"{len(surplus)} tensors are unknown, the first is {surplus[0]} {shapes[surplus[0]]}, nearest that are "
            f"known: {near}"
        )
    if wrong := [name for name in shapes.keys() & table.by_name.keys() if shapes[name] != table.by_name[name].shape]:
        entry = table.by_name[min(wrong)]
        problems.append(
            f"{len(wrong)} tensors have another shape, the first is {entry.name}: {shapes[entry.name]} in the file, "
            f"{entry.shape} in the model ({entry.places[0].path})"
        )
    if problems:
        raise Mismatch(
            f"{where} does not fit the model: {'; '.join(problems)}. It may be incomplete (download it again), another "
            "model's, or have additions that are not implemented"
        )


def from_tensors(table: Table, tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> Params:
    """Our nested dict from all named tensors of a table; dtypes are kept. Raises Mismatch."""
    compare(table, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "The state dict")
    flat = {}
    for path, rows in table.by_path.items():
        layers = []
        for entry, number in rows:
            part = entry.shape[0] // len(entry.places)
            layers.append(entry.ours(tensors[entry.name][number * part : (number + 1) * part]))
        flat[path] = layers[0] if rows[0][0].places[rows[0][1]].layer is None else np.stack(layers)
    return unflatten(flat)


def to_tensors(table: Table, params: Params) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The reverse of `from_tensors`: named tensors, dtypes kept."""
    flat = flatten(params)
    tensors = {}
    for entry in table.entries:
        values = [
            np.asarray(flat[p.path]) if p.layer is None else np.asarray(flat[p.path][p.layer]) for p in entry.places
        ]
        tensors[entry.name] = np.ascontiguousarray(np.concatenate([entry.theirs(value) for value in values]))
    return tensors
