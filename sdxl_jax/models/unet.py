"""The UNet of SDXL base, SDXL refiner, SD 1.x and SD 2.x, and any smaller one of the same shape.

    latent ── conv_in ─┬─ down_blocks_0 ─┬─ down_blocks_1 ─┬─ down_blocks_2 ─┐
                       │                 │                 │                 mid_block
    output ─ conv_out ─┴── up_blocks_2 ──┴── up_blocks_1 ──┴── up_blocks_0 ──┘

Every block is conditioned on one embedding: MLP(timestep (+ guidance scale)) + MLP(vector) (+ class). The transformers
attend to the text context, and without one to the image twice. What the vector holds is defined in
`conditioning/micro.py`; here it is `vector_dim` numbers. The table of class embeddings is among the parameters; it is
read in `conditioning/classes.py`. Sources: Rombach et al. (arXiv:2112.10752), Podell et al. (arXiv:2307.01952) section
2.1, the numbers in diffusers `unet_2d_condition.py`.
"""

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Num

from sdxl_jax.adapters import kinds
from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers
from sdxl_jax.models.attention import SpatialTransformer
from sdxl_jax.models.layers import (
    KERNEL_SCALE,
    TEXT,
    Compute,
    EmbeddingMlp,
    ResnetBlock,
    Upsample,
    conv,
    dequantised,
    group_norm,
    guidance_embedding,
    sinusoidal_embedding,
    variables,
)
from sdxl_jax.models.unet_parts import UNetPart
from sdxl_jax.sharding import constrain


class ClassPlace(enum.Enum):
    """Where the embedding of an image's class enters the UNet."""

    TOKEN = "token"
    """One token of cross-attention, after those of the text: latent-diffusion, sgm (`ClassEmbedder`)."""
    TIMESTEP = "timestep"
    """Added to the embedding of the timestep: guided-diffusion (ADM), diffusers (`num_class_embeds`)."""


@dataclass(frozen=True)
class ClassConfig:
    """The classes of images that a UNet is conditioned on."""

    number: int
    """Number of classes, which are numbered from 0."""
    place: ClassPlace = ClassPlace.TOKEN
    """Where the class embedding enters the UNet: as one token of cross-attention, or added to that of the timestep."""


@dataclass(frozen=True)
class UNetConfig:
    """What the UNet's weights depend on. The defaults are SDXL base 1.0."""

    block_channels: tuple[int, ...] = (320, 640, 1280)
    """Channels of each level, from the finest. Height and width halve from one level to the next."""
    resnets_per_block: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks after each residual block of a level; 0: no attention there."""
    middle_depth: int = 10
    """Transformer blocks in the middle."""
    heads: tuple[int, ...] = (5, 10, 20)
    """Attention heads of each level; the middle has as many as the last. SDXL: channels / 64."""
    context_dim: int | None = 2048
    """Width of the text states: CLIP-L 768 + bigG 1280. None: no text and no class token; every transformer block then
    has self-attention twice, as in sgm."""
    vector_dim: int | None = 2816
    """Width of the conditioning vector, None for no vector (SD 1.x and 2.x)."""
    conv_projection: bool = False
    """Transformers' projections as 1×1 convolutions (SD 1.x)."""
    in_channels: int = 4
    """Channels of the input: 4 of the latent; 9 for inpainting models."""
    out_channels: int = 4
    """Channels of the prediction."""
    groups: int = 32
    """Groups of every group norm. Must divide all block_channels."""
    classes: ClassConfig | None = None
    """Classes of images that it is conditioned on; None: none (every published SDXL and SD)."""
    guidance_dim: int | None = None
    """Width of the sinusoid of the guidance scale, an even number from 4 on, where that is an input: 256 for
    consistency models (diffusers' time_cond_proj_dim). None: it is not, and guidance needs a second evaluation."""

    @property
    def attention_heads(self) -> tuple[int, ...]:
        """Heads of each level that has transformers, and of the middle."""
        levels = [heads for heads, depth in zip(self.heads, self.transformer_depth, strict=True) if depth]
        return (*levels, self.heads[-1])

    @property
    def embedding_dim(self) -> int:
        return 4 * self.block_channels[0]


SDXL_BASE = UNetConfig()
SDXL_REFINER = UNetConfig(
    block_channels=(384, 768, 1536, 1536),
    transformer_depth=(0, 4, 4, 0),
    middle_depth=4,
    heads=(6, 12, 24, 24),
    context_dim=1280,
    vector_dim=2560,
)
SD1 = UNetConfig(
    block_channels=(320, 640, 1280, 1280),
    transformer_depth=(1, 1, 1, 0),
    middle_depth=1,
    heads=(8, 8, 8, 8),
    context_dim=768,
    vector_dim=None,
    conv_projection=True,
)
SD2 = UNetConfig(
    block_channels=(320, 640, 1280, 1280),
    transformer_depth=(1, 1, 1, 0),
    middle_depth=1,
    heads=(5, 10, 20, 20),
    context_dim=1024,
    vector_dim=None,
)


_OF_TEXT = (("attn2", "to_k"), ("attn2", "to_v"))
"""Layers whose input is the text."""


class _Level(nn.Module):
    """What the blocks of the UNet share: its options, and how it builds a residual block and a transformer."""

    config: UNetConfig
    level: int
    compute: Compute

    def resnet(self, index: int) -> nn.Module:
        block = self.compute.block(ResnetBlock)
        features = self.config.block_channels[self.level]
        return block(features, self.config.groups, 1e-5, self.compute, name=f"resnets_{index}")

    def transformer(self, index: int, depth: int) -> nn.Module:
        config = self.config
        name = f"attentions_{index}"
        heads = config.heads[self.level]
        alone = config.context_dim is None
        return SpatialTransformer(heads, depth, config.groups, config.conv_projection, self.compute, alone, name=name)


class DownBlock(_Level):
    """Residual blocks, each with its transformer, then a stride-2 convolution except at the last level."""

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "batch height width channels_in"],
        embedding: Float[jax.Array, "batch embedding"],
        context: Float[jax.Array, "batch tokens context"] | None,
        perturbed: Bool[jax.Array, "batch"] | None,
    ) -> list[Float[jax.Array, "batch _height _width _channels"]]:
        """Every intermediate result, in order: the way up takes them as skips, the last one enters the next level."""
        depth = self.config.transformer_depth[self.level]
        skips = []
        for index in range(self.config.resnets_per_block):
            x = self.resnet(index)(x, embedding)
            if depth:
                x = self.transformer(index, depth)(x, context, perturbed)
            skips.append(x)
        if self.level + 1 < len(self.config.block_channels):
            x = conv(x.shape[-1], "downsample", self.compute, strides=2)(x)
            skips.append(x)
        return skips


class MiddleBlock(_Level):
    """Residual block, transformer, residual block."""

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "batch height width channels"],
        embedding: Float[jax.Array, "batch embedding"],
        context: Float[jax.Array, "batch tokens context"] | None,
        perturbed: Bool[jax.Array, "batch"] | None,
    ) -> Float[jax.Array, "batch height width channels"]:
        x = self.resnet(0)(x, embedding)
        x = self.transformer(0, self.config.middle_depth)(x, context, perturbed)
        return self.resnet(1)(x, embedding)


class UpBlock(_Level):
    """As `DownBlock`, with a skip concatenated before each residual block, then an enlargement to the next skip."""

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "batch height width channels_in"],
        skips: list[Float[jax.Array, "batch _height _width _channels"]],
        embedding: Float[jax.Array, "batch embedding"],
        context: Float[jax.Array, "batch tokens context"] | None,
        perturbed: Bool[jax.Array, "batch"] | None,
    ) -> Float[jax.Array, "batch height_out width_out channels_out"]:
        """Takes its skips from the end of the list and removes them."""
        depth = self.config.transformer_depth[self.level]
        for index in range(self.config.resnets_per_block + 1):
            x = self.resnet(index)(jnp.concatenate([x, skips.pop()], axis=-1), embedding)
            if depth:
                x = self.transformer(index, depth)(x, context, perturbed)
        if skips:
            _, height, width, _ = skips[-1].shape
            x = Upsample(self.compute, name="upsample")(x, height, width)
        return x


class UNet(nn.Module):
    config: UNetConfig
    compute: Compute = Compute()
    perturbed_parts: tuple[UNetPart, ...] = ()
    """Where `perturbed` rows are."""
    ends_in_middle: bool = False
    """Return what leaves the middle block; nothing after it is computed."""

    @nn.compact
    def __call__(
        self,
        latent: Float[jax.Array, "batch height width channels_in"],
        timestep: Num[jax.Array, "batch"],
        context: Float[jax.Array, "batch tokens context"] | None,
        vector: Float[jax.Array, "batch vector"] | None,
        perturbed: Bool[jax.Array, "batch"] | None = None,
        class_embedding: Float[jax.Array, "batch embedding"] | None = None,
        guidance: Float[jax.Array, "batch"] | None = None,
    ) -> Float[jax.Array, "batch height_out width_out channels_out"]:
        config, compute, dtype = self.config, self.compute, self.compute.activations
        context = None if context is None else context.astype(dtype)

        frequencies = sinusoidal_embedding(timestep, config.block_channels[0])
        scale = None
        if guidance is not None and config.guidance_dim is not None:
            scale = guidance_embedding(guidance, config.guidance_dim)
        embedding = EmbeddingMlp(config.embedding_dim, compute, name="time_embedding")(frequencies, scale)
        if vector is not None:
            embedding += EmbeddingMlp(config.embedding_dim, compute, name="add_embedding")(vector)
        if class_embedding is not None:
            embedding += class_embedding.astype(embedding.dtype)

        down, middle, up = (perturbed if part in self.perturbed_parts else None for part in UNetPart)
        levels = range(len(config.block_channels))
        x = conv(config.block_channels[0], "conv_in", compute)(latent)
        skips = [x]
        for level in levels:
            block = DownBlock(config, level, compute, name=f"down_blocks_{level}")
            skips += block(skips[-1], embedding, context, down)
        x = MiddleBlock(config, levels[-1], compute, name="mid_block")(skips[-1], embedding, context, middle)
        if self.ends_in_middle:
            return x.astype(jnp.float32)
        for index, level in enumerate(reversed(levels)):
            x = UpBlock(config, level, compute, name=f"up_blocks_{index}")(x, skips, embedding, context, up)
        assert not skips

        x = nn.silu(group_norm(config.groups, 1e-5, "conv_norm_out", compute)(x))
        out = conv(config.out_channels, "conv_out", compute, kernel_init=initialisers.zeros)
        return out(x).astype(jnp.float32)


TextProjections = dict[str, Any]
"""Keys and values of every cross-attention layer, each [batch, depth, tokens, features], at the paths of their kernels.
"""


def project_text(
    params: Params,
    context: Float[jax.Array, "batch tokens context"],
    compute: Compute = Compute(),
    adapters: Params | None = None,
) -> TextProjections:
    """Keys and values of the text. They do not depend on the latent: the steps of a denoising schedule share them. At
    256 × 256 they are up to a fifth of a step's products. adapters: as in `apply`."""
    context = context.astype(compute.activations)
    changes: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, factor in flatten_dict(adapters or {}).items():
        changes.setdefault(path[:-1], {})[path[-1]] = factor

    def project(
        kernels: Num[jax.Array, "depth context features"],
        changes: dict[str, Any],
        scales: Float[jax.Array, "depth features"] | None,
    ) -> Float[jax.Array, "batch depth tokens features"]:
        def of_layer(layer: tuple[Any, dict[str, Any], Any]) -> Any:
            kernel, factors, scale = layer

            def product(x: Any) -> Any:
                found = x @ kernel.astype(x.dtype)
                return found if scale is None else found * scale.astype(x.dtype)

            whole = dequantised(kernel, scale)
            return kinds.applied(context, product, factors, kernel=whole) if factors else product(context)

        projected = jax.lax.map(of_layer, (kernels, changes, scales))
        return constrain(projected.swapaxes(0, 1), "batch", None, None, "tensor")

    kernels: Any = flatten_dict(params)
    layers = [path[:-1] for path in kernels if path[-3:-1] in _OF_TEXT and path[-1] == "kernel"]
    projected = {}
    for layer in layers:
        path = (*layer, "kernel")
        projected[layer] = project(kernels[path], changes.get(path, {}), kernels.get((*layer, KERNEL_SCALE)))
    return unflatten_dict(projected)


def apply(
    config: UNetConfig,
    params: Params,
    latent: Float[jax.Array, "batch height width channels_in"],
    timestep: Num[jax.Array, "batch"],
    context: Float[jax.Array, "batch tokens context"] | TextProjections | None,
    vector: Float[jax.Array, "batch vector"] | None = None,
    compute: Compute = Compute(),
    *,
    adapters: Params | None = None,
    class_embedding: Float[jax.Array, "batch embedding"] | None = None,
    guidance: Float[jax.Array, "batch"] | None = None,
    perturbed: Bool[jax.Array, "batch"] | None = None,
    perturbed_parts: Sequence[UNetPart] = (UNetPart.MIDDLE,),
) -> Float[jax.Array, "batch height width channels_out"]:
    """The network's prediction (ε, v or x₀, as it was trained), float32.

    latent: scaled and noised, any height and width. timestep: 0..999, integers or floats. context: text states,
    [batch, 77, context_dim], or what `project_text` makes of them; with the class token, if the configuration has one;
    None exactly if `context_dim` is. vector: [batch, vector_dim], None exactly if the configuration has none.
    class_embedding: of classes in `ClassPlace.TIMESTEP`, and None exactly for all other models. guidance: scale of
    classifier-free guidance, where 1 is none; given exactly if it is an input (`guidance_dim`).

    adapters: changes of the parameters (`adapters.kinds`), at the same paths; those of kernels are applied beside them,
    so that no changed kernel is made.

    perturbed: rows whose self-attention in `perturbed_parts` is the identity, for perturbed-attention guidance (Ahn et
    al. 2024, arXiv:2403.17377; `samplers/guidance.py`). None: no row, and nothing more is computed. The parts are
    static. Raises InputError for a part that has no attention.
    """
    _check_inputs(config, context, vector, class_embedding, guidance)
    if perturbed is not None:
        _check_attends(config, perturbed_parts)
    network = UNet(config, compute, tuple(perturbed_parts))
    given = latent, timestep, vector, perturbed, class_embedding, guidance
    return _applied(network, params, adapters, context, *given)


def middle_features(
    config: UNetConfig,
    params: Params,
    latent: Float[jax.Array, "batch height width channels_in"],
    timestep: Num[jax.Array, "batch"],
    context: Float[jax.Array, "batch tokens context"] | TextProjections | None,
    vector: Float[jax.Array, "batch vector"] | None = None,
    compute: Compute = Compute(),
    *,
    adapters: Params | None = None,
    class_embedding: Float[jax.Array, "batch embedding"] | None = None,
    guidance: Float[jax.Array, "batch"] | None = None,
) -> Float[jax.Array, "batch rows columns features"]:
    """What leaves the middle block, float32: features of a noised latent, for discriminators. The way up is not
    computed. Arguments: as of `apply`."""
    _check_inputs(config, context, vector, class_embedding, guidance)
    network = UNet(config, compute, ends_in_middle=True)
    return _applied(network, params, adapters, context, latent, timestep, vector, None, class_embedding, guidance)


def _applied(
    network: UNet, params: Params, adapters: Params | None, context: Any, latent: Any, timestep: Any, *inputs: Any
) -> Any:
    """inputs: those of the network's call after the text."""
    text = {TEXT: context} if isinstance(context, dict) else {}
    states = None if text else context
    return network.apply({**variables(params, adapters), **text}, latent, timestep, states, *inputs)


def _check_inputs(config: UNetConfig, context: Any, vector: Any, class_embedding: Any, guidance: Any) -> None:
    assert (vector is None) == (config.vector_dim is None), "a vector is given exactly if the configuration has one"
    assert (context is None) == (config.context_dim is None), "so is a context"
    added = config.classes is not None and config.classes.place is ClassPlace.TIMESTEP
    assert (class_embedding is not None) == added, "and so is a class embedding"
    assert (guidance is None) == (config.guidance_dim is None), "and so is a guidance scale"


def _check_attends(config: UNetConfig, parts: Sequence[UNetPart]) -> None:
    """Where there is no attention to perturb, the guidance would silently be zero."""
    attends = {UNetPart.DOWN: any(config.transformer_depth), UNetPart.MIDDLE: config.middle_depth > 0}
    attends[UNetPart.UP] = attends[UNetPart.DOWN]
    if not parts or not all(attends[part] for part in parts):
        given = ", ".join(part.value for part in parts) or "nothing"
        known = ", ".join(part.value for part in UNetPart if attends[part])
        raise InputError(f"Attention is to be perturbed in {given}. This UNet has attention in {known}: name those")


@functools.cache
def abstract(config: UNetConfig) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`). The output convolution and the last one of every
    block begin at zero, as in sgm; class embeddings are standard normal, as torch's are."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    side = 2 ** (len(config.block_channels) - 1)
    latent = array(1, side, side, config.in_channels)
    context = None if config.context_dim is None else array(1, 1, config.context_dim)
    vector = None if config.vector_dim is None else array(1, config.vector_dim)
    guidance = None if config.guidance_dim is None else array(1)
    params = initialisers.abstract(UNet(config), latent, array(1), context, vector, None, None, guidance)
    return params | _class_table(config)


CLASS_TABLES = {ClassPlace.TOKEN: "class_token", ClassPlace.TIMESTEP: "class_embedding"}
"""Name of the table of class embeddings among the parameters: {name: {"embedding": [classes, features]}}."""


def _class_table(config: UNetConfig) -> Params:
    if config.classes is None:
        return {}
    token = config.classes.place is ClassPlace.TOKEN
    features = config.context_dim if token else config.embedding_dim
    assert features is not None, "a class token has the width of the context"
    table = initialisers.Parameter((config.classes.number, features), initialisers.Distribution(deviation=1.0))
    return {CLASS_TABLES[config.classes.place]: {"embedding": table}}
