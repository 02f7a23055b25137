"""Detection: which parts of a model a file of tensors holds, in whose naming, and their configurations, inferred from
names and shapes alone.

Shapes do not determine everything. By the conventions of the published models: heads are 64 wide (SD 1.x: 8 heads),
norms have 32 groups, an embedded number of the conditioning vector is 256 wide, and CLIP-L alone has quick-GELU.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sdxl_jax.conditioning.micro import MicroConfig
from sdxl_jax.conditioning.text import ContextState, Tower
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import ClassConfig, ClassPlace, UNetConfig
from sdxl_jax.models.vae import SD_VAE, SDXL_VAE, VaeConfig
from sdxl_jax.weights.names import Dialect, Naming, PartConfig

Shapes = Mapping[str, tuple[int, ...]]

_MARKS: tuple[tuple[type, Dialect, tuple[str, str]], ...] = (
    (UNetConfig, Dialect.DIFFUSERS, ("time_embedding.linear_1.weight", "time_embedding.linear_2.weight")),
    (UNetConfig, Dialect.ORIGINAL, ("time_embed.0.weight", "time_embed.2.weight")),
    *(
        (VaeConfig, dialect, (f"encoder.{query}.weight", f"decoder.{query}.weight"))
        for dialect, query in (
            (Dialect.DIFFUSERS, "mid_block.attentions.0.to_q"),
            (Dialect.DIFFUSERS_OLD, "mid_block.attentions.0.query"),
            (Dialect.ORIGINAL, "mid.attn_1.q"),
        )
    ),
    (TinyVaeConfig, Dialect.DIFFUSERS, ("encoder.layers.1.conv.0.weight", "decoder.layers.2.conv.0.weight")),
    *(
        (ClipTextConfig, dialect, (f"{prefix}token_embedding.weight", f"{prefix}position_embedding.weight"))
        for dialect, prefix in (
            (Dialect.TRANSFORMERS, "text_model.embeddings."),
            (Dialect.TRANSFORMERS_5, "embeddings."),
        )
    ),
    (ClipTextConfig, Dialect.OPENCLIP, ("token_embedding.weight", "positional_embedding")),
)
"""Two tensors that every network of a kind has in a naming: where one is missing, the other still identifies it. Names
that end in other names of the table come before those."""

_TAESD = {
    Dialect.TAESD_ENCODER: {"0.bias", "1.conv.0.weight", "2.weight"},
    Dialect.TAESD_DECODER: {"1.bias", "3.conv.0.weight"},
}
"""Tensors of the halves of taesd, all of which must be there: numbers without a prefix identify little."""

_CARRIED = re.compile(
    r"(^|\.)embeddings\.position_ids$|(^|\.)(logit_scale|attn_mask)$|(^|\.)(visual|vision_model|visual_projection)(\.|$)"
    r"|^(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|logvar)$"
    r"|^model_ema\.|^denoiser\.|^(first_stage_model\.)?loss\.|^(v_pred|ztsnr|global_step|step|epoch)$"
    r"|^edm_(mean|std|vpred\.sigma_(max|min))$"
)


def is_carried(name: str) -> bool:
    """Whether a tensor is one that published files are known to hold beside the weights: buffers, the moving average
    and losses of training, CLIP's image tower. It is not used; a conversion carries it along where the layout has a
    place for it."""
    return _CARRIED.search(name) is not None


@dataclass(frozen=True)
class FoundPart:
    """One part of a model in a file."""

    config: PartConfig
    naming: Naming

    def owns(self, name: str) -> bool:
        """Whether a tensor of the file is this part's, by its prefix; parts without one own what no other part does."""
        return name.startswith(self.naming.prefix)


def namings(shapes: Shapes) -> list[tuple[type, Naming]]:
    """(kind of configuration, naming) of the parts that a file holds, in the order of UNet, VAE, text towers by prefix.
    One of a part's two marks suffices."""
    found: dict[tuple[type, str], Naming] = {}
    names = [name for name in shapes if not is_carried(name)]
    for kind, dialect, marks in _MARKS:
        for name, mark in itertools.product(names, marks):
            prefix = name.removesuffix(mark)
            if name == prefix or (prefix and not prefix.endswith(".")):
                continue
            shorter = prefix.removesuffix("text_model.").removesuffix("embeddings.").removesuffix("text_model.")
            if (kind, shorter) in found:
                continue
            # The VAE's mark is a weight of its attention.
            found[kind, prefix] = Naming(dialect, prefix, kind is VaeConfig and len(shapes[name]) == 4)
    for dialect, marks in _TAESD.items():
        if marks <= shapes.keys():
            found[TinyVaeConfig, ""] = Naming(dialect)
    order = (UNetConfig, VaeConfig, TinyVaeConfig, ClipTextConfig)
    return [(key[0], found[key]) for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))]


def find(shapes: Shapes) -> list[FoundPart]:
    """The parts with their configurations. Raises InputError if tensors that determine these are missing."""
    return [FoundPart(_infer(kind, naming, shapes), naming) for kind, naming in namings(shapes)]


def _infer(kind: type, naming: Naming, shapes: Shapes) -> PartConfig:
    dialect, prefix = naming.dialect, naming.prefix
    inside = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    try:
        infer = {UNetConfig: _unet, VaeConfig: _vae, TinyVaeConfig: _tiny_vae, ClipTextConfig: _clip}[kind]
        return infer(inside, dialect)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"The tensors named {prefix}… look like those of a {kind.__name__.removesuffix('Config')} in the naming of "
            f"{dialect.value}, but {error} is missing or out of place. It may be another kind of network, or the file "
            "may be incomplete: give another file, or download it again"
        ) from error


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The distinct numbers that the pattern's group matches, ascending."""
    return sorted({int(found[1]) for name in names if (found := re.match(pattern, name))})


def _heads(channels: tuple[int, ...], conv_projection: bool) -> tuple[int, ...]:
    return tuple(8 if conv_projection else max(1, width // 64) for width in channels)


def _unet(shapes: Shapes, dialect: Dialect) -> UNetConfig:
    if dialect is Dialect.DIFFUSERS:
        levels = _numbers(shapes, r"down_blocks\.(\d+)\.")
        resnets = len(_numbers(shapes, r"down_blocks\.0\.resnets\.(\d+)\."))
        channels = tuple(shapes[f"down_blocks.{level}.resnets.0.conv2.weight"][0] for level in levels)
        attentions = [rf"down_blocks\.{level}\.attentions\.0\." for level in levels]
        first, last, middle = "conv_in.weight", "conv_out.weight", "mid_block.attentions.0."
        vector = shapes.get("add_embedding.linear_1.weight")
        guidance = shapes.get("time_embedding.cond_proj.weight")
    else:
        downs = _numbers(shapes, r"input_blocks\.(\d+)\.0\.op\.")
        resnets = downs[0] - 1 if downs else _numbers(shapes, r"input_blocks\.(\d+)\.")[-1]
        firsts = [1 + level * (resnets + 1) for level in range(len(downs) + 1)]
        channels = tuple(shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0] for index in firsts)
        attentions = [rf"input_blocks\.{index}\.1\." for index in firsts]
        first, last, middle = "input_blocks.0.0.weight", "out.2.weight", "middle_block.1."
        vector = shapes.get("label_emb.0.0.weight")
        guidance = shapes.get("time_embed.cond_proj.weight")

    def depth(pattern: str) -> int:
        return len(_numbers(shapes, pattern + r"transformer_blocks\.(\d+)\."))

    conv_projection = len(shapes[middle + "proj_in.weight"]) == 4
    return UNetConfig(
        block_channels=channels,
        resnets_per_block=resnets,
        transformer_depth=tuple(depth(pattern) for pattern in attentions),
        middle_depth=depth(re.escape(middle)),
        heads=_heads(channels, conv_projection),
        context_dim=shapes[middle + "transformer_blocks.0.attn2.to_k.weight"][1],
        vector_dim=None if vector is None else vector[1],
        conv_projection=conv_projection,
        in_channels=shapes[first][1],
        out_channels=shapes[last][0],
        classes=_classes(shapes, dialect),
        guidance_dim=None if guidance is None else guidance[1],
    )


def _classes(shapes: Shapes, dialect: Dialect) -> ClassConfig | None:
    added = "class_embedding.weight" if dialect is Dialect.DIFFUSERS else "label_emb.weight"
    for name, place in (("class_token.weight", ClassPlace.TOKEN), (added, ClassPlace.TIMESTEP)):
        if name in shapes:
            return ClassConfig(shapes[name][0], place)
    return None


def _vae(shapes: Shapes, dialect: Dialect) -> VaeConfig:
    if dialect is Dialect.ORIGINAL:
        level, block = "encoder.down.{}.", "encoder.down.{}.block.{}.conv2.weight"
    else:
        level, block = "encoder.down_blocks.{}.", "encoder.down_blocks.{}.resnets.{}.conv2.weight"
    levels = _numbers(shapes, level.replace(".", r"\.").format(r"(\d+)"))
    resnets = _numbers(shapes, block.replace(".", r"\.").format(0, r"(\d+)"))
    channels = tuple(shapes[block.format(number, 0)][0] for number in levels)
    return VaeConfig(channels, len(resnets), shapes["quant_conv.weight"][0] // 2)


def _tiny_vae(shapes: Shapes, dialect: Dialect) -> TinyVaeConfig:
    """For a half alone, the other is assumed to mirror it."""
    if dialect is Dialect.DIFFUSERS:
        halves = [
            {name.removeprefix(half): shape for name, shape in shapes.items() if name.startswith(half)}
            for half in ("encoder.layers.", "decoder.layers.")
        ]
        encoder, decoder = map(_blocks, halves)
        first = halves[1]["0.weight"]
    elif dialect is Dialect.TAESD_DECODER:
        decoder, first = _blocks(shapes), shapes["1.weight"]
        encoder = decoder[::-1]
    else:
        encoder, last = _blocks(shapes), _numbers(shapes, r"(\d+)\.bias")[-1]
        decoder, first = encoder[::-1], shapes[f"{last}.weight"][:2][::-1]
    return TinyVaeConfig(first[0], encoder, decoder, first[1])


def _blocks(layers: Shapes) -> tuple[int, ...]:
    """Residual blocks between the plain convolutions of half a tiny autoencoder, whose layers are numbered."""
    plain = _numbers(layers, r"(\d+)\.weight")
    blocks = _numbers(layers, r"(\d+)\.conv\.0\.weight")
    ends = itertools.pairwise(plain)
    return tuple(sum(start < block < stop for block in blocks) for start, stop in ends)


def _clip(shapes: Shapes, dialect: Dialect) -> ClipTextConfig:
    match dialect:
        case Dialect.TRANSFORMERS:
            token, positions = (
                "text_model.embeddings.token_embedding",
                "text_model.embeddings.position_embedding.weight",
            )
            layers, fc1 = "text_model.encoder.layers.", "mlp.fc1.weight"
        case Dialect.TRANSFORMERS_5:
            token, positions = "embeddings.token_embedding", "embeddings.position_embedding.weight"
            layers, fc1 = "encoder.layers.", "mlp.fc1.weight"
        case _:
            token, positions = "token_embedding", "positional_embedding"
            layers, fc1 = "transformer.resblocks.", "mlp.c_fc.weight"
    vocabulary, width = shapes[f"{token}.weight"]
    if dialect is Dialect.OPENCLIP:
        projection = shapes["text_projection"][1] if "text_projection" in shapes else None
    else:
        projection = shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None
    quick = width == 768 or (dialect is not Dialect.OPENCLIP and width not in (1024, 1280))
    return ClipTextConfig(
        width=width,
        layers=len(_numbers(shapes, layers.replace(".", r"\.") + r"(\d+)\.")),
        heads=max(1, width // 64),
        mlp_width=shapes[f"{layers}0.{fc1}"][0],
        activation=Activation.QUICK_GELU if quick else Activation.GELU,
        projection_dim=projection,
        vocabulary=vocabulary,
        tokens=shapes[positions][0],
    )


def assemble(found: list[FoundPart]) -> tuple[ModelConfig, dict[str, FoundPart]]:
    """(configuration, parts by name) of a file. Parts that the file does not hold have the values of the nearest
    published model in the configuration.

    Raises InputError for a file with two parts of one kind that no published model has.
    """
    unets = [part for part in found if isinstance(part.config, UNetConfig)]
    vaes = [part for part in found if isinstance(part.config, VaeConfig | TinyVaeConfig)]
    towers = [part for part in found if isinstance(part.config, ClipTextConfig)]
    if len(unets) > 1 or len(vaes) > 1 or len(towers) > 2:
        prefixes = ", ".join(part.naming.prefix or "(none)" for part in found)
        raise InputError(
            f"The file holds {len(found)} networks, with the prefixes {prefixes}: no model that is implemented has so "
            "many of one kind. Give a file of one model of SDXL, SD 1.x or SD 2.x"
        )
    network = unets[0].config if unets else None
    assert network is None or isinstance(network, UNetConfig)
    clips = [part.config for part in towers if isinstance(part.config, ClipTextConfig)]
    config = nearest(network, clips)
    parts = {name: part for name, part in zip(("unet", "vae"), (unets, vaes), strict=True) for part in part}
    if network is not None:
        config = replace(config, unet=network)
    if vaes:
        autoencoder = vaes[0].config
        assert isinstance(autoencoder, VaeConfig | TinyVaeConfig)
        if isinstance(autoencoder, VaeConfig):
            scale = SD_VAE.scale if config.micro is None else SDXL_VAE.scale
            autoencoder = replace(autoencoder, scale=scale)
        config = replace(config, vae=autoencoder)
        parts["vae"] = FoundPart(autoencoder, vaes[0].naming)
    found_towers = {}
    for preset, clip, part in zip(_assign(config.text, clips), clips, towers, strict=True):
        found_towers[preset.name] = with_clip(preset, clip)
        parts[preset.name] = part
    config = replace(config, text=tuple(found_towers.get(tower.name, tower) for tower in config.text))
    return _with_micro(config, complete=network is not None and len(found_towers) == len(config.text)), parts


def with_clip(preset: Tower, clip: ClipTextConfig) -> Tower:
    """A published model's tower with the network that was found."""
    context = preset.context
    shortened = clip.projection_dim is None and clip.layers != preset.clip.layers
    if context is ContextState.PENULTIMATE_NORMED and shortened:
        context = ContextState.LAST  # diffusers' ViT-H of SD 2.x lacks the last layer, which is not read
    return replace(preset, clip=clip, context=context)


def nearest(network: UNetConfig | None, towers: Sequence[ClipTextConfig]) -> ModelConfig:
    """The published model that is nearest to the given networks."""
    if network is None:
        return SD2 if [tower.width for tower in towers] == [SD2.text[0].clip.width] else SDXL_BASE
    if network.vector_dim is None:
        return SD1 if network.conv_projection else SD2
    refiner = len(towers) == 1 or (not towers and network.vector_dim == SDXL_REFINER.unet.vector_dim)
    return SDXL_REFINER if refiner else SDXL_BASE


def by_width(presets: tuple[Tower, ...], tower: ClipTextConfig) -> Tower:
    """The tower of a model that a single network corresponds to; the first if none has its width."""
    return next((preset for preset in presets if preset.clip.width == tower.width), presets[0])


def _assign(presets: tuple[Tower, ...], towers: list[ClipTextConfig]) -> list[Tower]:
    """The model's tower of each network: in order if all are there; a single one by its width."""
    if len(towers) > len(presets):
        raise InputError(
            f"The file holds {len(towers)} text encoders, but a model with its UNet has {len(presets)}. Give a file of "
            "one model of SDXL, SD 1.x or SD 2.x"
        )
    return list(presets) if len(towers) == len(presets) else [by_width(presets, tower) for tower in towers]


def _with_micro(config: ModelConfig, complete: bool) -> ModelConfig:
    """The width of one embedded number: that of the vector without the pooled text, divided by their count."""
    pooled = config.text[-1].clip.projection_dim
    if not complete or config.micro is None or config.unet.vector_dim is None or pooled is None:
        return config
    count = sum(config.micro.numbers.widths)
    return replace(config, micro=MicroConfig(config.micro.numbers, (config.unet.vector_dim - pooled) // count))
