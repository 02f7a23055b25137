"""The KL autoencoder of Stable Diffusion and SDXL: an image to a latent at an eighth of its size, and back.

    image −1..1 ── encoder ── mean, log variance ── sample × scale ── latent ── / scale ── decoder ── image

Sources: Rombach et al. (arXiv:2112.10752), sgm `modules/diffusionmodules/model.py`. Every norm has eps 1e-6; the
encoder pads (0, 1) at the bottom and right before a stride-2 convolution, unlike the UNet. Losses for its training are
in training/objectives/. `encode`, `decode` and `abstract` take the tiny autoencoder of `taesd.py` as well, and the
exact one of `wavelet.py`, by the type of the configuration.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Key

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers, taesd, tiling, wavelet
from sdxl_jax.models.attention import MultiHeadAttention
from sdxl_jax.models.layers import Compute, Remat, ResnetBlock, Upsample, conv, group_norm
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.wavelet import WaveletConfig

_EPSILON = 1e-6
_QUERIES = 1024
"""Positions that attend at a time in a tiled decode: scores of 256 MiB at 2048 × 2048 pixels."""


@dataclass(frozen=True)
class VaeConfig:
    """What the autoencoder's weights depend on. The defaults are SDXL's."""

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, from the finest. Four levels: height and width of the latent are an eighth."""
    resnets_per_block: int = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latent."""
    scale: float = 0.13025
    """Factor that brings the sampled latent to unit variance. SDXL 0.13025, SD 1.x and 2.x 0.18215."""
    groups: int = 32
    """Groups of every group norm. Must divide all block_channels."""
    latent_mean: tuple[float, ...] | None = None
    """Mean of each channel of the latent, which is subtracted before it is scaled: Playground v2.5. None: 0."""
    latent_std: tuple[float, ...] | None = None
    """Standard deviation of each channel, by which it is divided as well. None: 1. Given exactly if the mean is."""

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a latent position."""
        return 2 ** (len(self.block_channels) - 1)

    def check(self, name: str) -> None:
        """Raises InputError for a mean without a deviation, or not one of each per channel. name: of the field."""
        given = self.latent_mean, self.latent_std
        wrong = [each for each in given if each is not None and len(each) != self.latent_channels]
        if wrong or (given[0] is None) != (given[1] is None) or any(each <= 0 for each in given[1] or ()):
            raise InputError(
                f"{name}.latent_mean={given[0]} and latent_std={given[1]}. Give {self.latent_channels} numbers of "
                "both, one per channel, the deviations above 0, or neither"
            )


SDXL_VAE = VaeConfig()
SD_VAE = VaeConfig(scale=0.18215)

LearntVaeConfig = VaeConfig | TinyVaeConfig
"""Autoencoders with parameters."""
AnyVaeConfig = LearntVaeConfig | WaveletConfig


class Posterior(NamedTuple):
    """The diagonal normal distribution of unscaled latents that the encoder gives for an image."""

    mean: Float[jax.Array, "batch height width channels"]
    log_variance: Float[jax.Array, "batch height width channels"]
    """−∞ where the encoder gives the mean alone: a sample is the mean."""

    def sample(self, keys: Key[jax.Array, " batch"]) -> Float[jax.Array, "batch height width channels"]:
        """Samples from the posterior. keys: one per image, so that a latent does not depend on its neighbours in the
        batch."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class MiddleBlock(nn.Module):
    """Residual block, attention of one head over all positions, residual block."""

    config: VaeConfig
    compute: Compute
    queries: int | None = None
    """Positions that attend at a time; None: all."""

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch height width channels"]:
        _, height, _, channels = x.shape
        block, groups = self.compute.block(ResnetBlock), self.config.groups
        x = block(channels, groups, _EPSILON, self.compute, name="resnets_0")(x, None)
        hidden = group_norm(groups, _EPSILON, "norm", self.compute)(x)
        hidden = rearrange(hidden, "batch height width channels -> batch (height width) channels")
        hidden = MultiHeadAttention(1, self.compute, True, self.queries, name="attention")(hidden, hidden)
        x = x + rearrange(hidden, "batch (height width) channels -> batch height width channels", height=height)
        return block(channels, groups, _EPSILON, self.compute, name="resnets_1")(x, None)


class Encoder(nn.Module):
    config: VaeConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width 3"]
    ) -> Float[jax.Array, "batch latent_height latent_width moments"]:
        config, compute = self.config, self.compute
        block = compute.block(ResnetBlock)
        x = conv(config.block_channels[0], "conv_in", compute)(x)
        for level, channels in enumerate(config.block_channels):
            for index in range(config.resnets_per_block):
                name = f"down_blocks_{level}_resnets_{index}"
                x = block(channels, config.groups, _EPSILON, compute, name=name)(x, None)
            if level + 1 < len(config.block_channels):
                name = f"down_blocks_{level}_downsample"
                x = conv(channels, name, compute, strides=2, padding=((0, 1), (0, 1)))(x)
        x = MiddleBlock(config, compute, name="mid_block")(x)
        x = nn.silu(group_norm(config.groups, _EPSILON, "conv_norm_out", compute)(x))
        x = conv(2 * config.latent_channels, "conv_out", compute)(x)
        return conv(2 * config.latent_channels, "quant_conv", compute, size=1)(x)


def _entry(
    config: VaeConfig,
    compute: Compute,
    x: Float[jax.Array, "batch latent_height latent_width channels"],
    queries: int | None = None,
) -> Float[jax.Array, "batch latent_height latent_width channels_out"]:
    """The decoder's layers before its levels, in the scope of a module. queries: see `MiddleBlock`."""
    x = conv(config.latent_channels, "post_quant_conv", compute, size=1)(x)
    x = conv(config.block_channels[-1], "conv_in", compute)(x)
    return MiddleBlock(config, compute, queries, name="mid_block")(x)


def _level(
    config: VaeConfig,
    compute: Compute,
    level: int,
    x: Float[jax.Array, "batch height width channels"],
    conv_out: bool = True,
) -> Float[jax.Array, "batch height_out width_out channels_out"]:
    """A level of the decoder, numbered from the coarsest: the upsampling before it, its blocks, and after the last
    level the output layers. conv_out: whether the last convolution is among them."""
    block = compute.block(ResnetBlock)
    if level:
        _, height, width, _ = x.shape
        x = Upsample(compute, name=f"up_blocks_{level - 1}_upsample")(x, 2 * height, 2 * width)
    for index in range(config.resnets_per_block + 1):
        name = f"up_blocks_{level}_resnets_{index}"
        x = block(config.block_channels[-1 - level], config.groups, _EPSILON, compute, name=name)(x, None)
    if level + 1 < len(config.block_channels):
        return x
    x = nn.silu(group_norm(config.groups, _EPSILON, "conv_norm_out", compute)(x))
    return conv(3, "conv_out", compute)(x) if conv_out else x


class Decoder(nn.Module):
    config: VaeConfig
    compute: Compute
    conv_out: bool = True
    """Whether it ends with its last convolution, or with what goes into that."""

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch latent_height latent_width channels"]
    ) -> Float[jax.Array, "batch height width channels_out"]:
        x = _entry(self.config, self.compute, x)
        for level in range(len(self.config.block_channels)):
            x = _level(self.config, self.compute, level, x, self.conv_out)
        return x


class DecoderEntry(nn.Module):
    """The layers of `Decoder` before its levels; it takes its own of the decoder's parameters. queries: see
    `MiddleBlock`."""

    config: VaeConfig
    compute: Compute
    queries: int

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch latent_height latent_width channels"]
    ) -> Float[jax.Array, "batch latent_height latent_width channels_out"]:
        return _entry(self.config, self.compute, x, self.queries)


class DecoderLevel(nn.Module):
    """One level of a decoder alone, of either kind."""

    config: LearntVaeConfig
    compute: Compute
    level: int

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch height_out width_out channels_out"]:
        if isinstance(self.config, TinyVaeConfig):
            return taesd.decoder_level(self.config, self.compute, self.level, x)
        return _level(self.config, self.compute, self.level, x)


def _networks(config: LearntVaeConfig, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder."""
    if isinstance(config, TinyVaeConfig):
        return taesd.TinyEncoder(config, compute), taesd.TinyDecoder(config, compute)
    return Encoder(config, compute), Decoder(config, compute)


def encode(
    config: AnyVaeConfig, params: Params, image: Float[jax.Array, "batch height width 3"], compute: Compute = Compute()
) -> Posterior:
    """Posterior of the unscaled latent, float32, log variance clamped to −30..20. Tiny and exact autoencoders give the
    mean, with log variance −∞.

    image: −1..1, height and width multiples of `config.downsampling`. Raises InputError where there is no encoder.
    """
    if isinstance(config, WaveletConfig):
        mean = wavelet.transform(config, image)
        return Posterior(mean, jnp.full_like(mean, -jnp.inf))
    _check_half(params, "encoder")
    encoder, _ = _networks(config, compute)
    moments = jnp.asarray(encoder.apply({"params": params["encoder"]}, image), jnp.float32)
    if isinstance(config, TinyVaeConfig):
        return Posterior(moments, jnp.full_like(moments, -jnp.inf))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))


def scaled_sample(
    config: AnyVaeConfig, posterior: Posterior, keys: Key[jax.Array, " batch"]
) -> Float[jax.Array, "batch latent_height latent_width channels"]:
    """Latents as the UNet sees them: sampled from the posterior, and `scaled`. keys: one per image."""
    return scaled(config, posterior.sample(keys))


def scaled(
    config: AnyVaeConfig, latent: Float[jax.Array, "batch latent_height latent_width channels"]
) -> Float[jax.Array, "batch latent_height latent_width channels"]:
    """A latent of the encoder as the UNet sees it: × `config.scale`, normalised first if the configuration says so."""
    if isinstance(config, VaeConfig) and config.latent_mean is not None and config.latent_std is not None:
        latent = (latent - jnp.asarray(config.latent_mean)) / jnp.asarray(config.latent_std)
    return latent * config.scale


def unscaled(
    config: AnyVaeConfig, latent: Float[jax.Array, "batch latent_height latent_width channels"]
) -> Float[jax.Array, "batch latent_height latent_width channels"]:
    """The reverse of `scaled`."""
    latent = latent / config.scale
    if isinstance(config, VaeConfig) and config.latent_mean is not None and config.latent_std is not None:
        latent = latent * jnp.asarray(config.latent_std) + jnp.asarray(config.latent_mean)
    return latent


def decode(
    config: AnyVaeConfig,
    params: Params,
    latent: Float[jax.Array, "batch latent_height latent_width channels"],
    compute: Compute = Compute(),
) -> Float[jax.Array, "batch height width 3"]:
    """The image of a scaled latent, float32, about −1..1 (not clipped). Raises InputError where there is no decoder."""
    if isinstance(config, WaveletConfig):
        return wavelet.inverse(config, unscaled(config, latent))
    _check_half(params, "decoder")
    _, decoder = _networks(config, compute)
    image = decoder.apply({"params": params["decoder"]}, unscaled(config, latent))
    return jnp.asarray(image, jnp.float32)


def decode_features(
    config: LearntVaeConfig,
    params: Params,
    latent: Float[jax.Array, "batch latent_height latent_width channels"],
    compute: Compute = Compute(),
) -> Float[jax.Array, "batch height width features"]:
    """`decode` up to its last convolution: `features_to_image` of this is the image."""
    decoder = taesd.TinyDecoder if isinstance(config, TinyVaeConfig) else Decoder
    features = decoder(config, compute, conv_out=False)  # pyright: ignore[reportArgumentType]
    return jnp.asarray(features.apply({"params": params["decoder"]}, unscaled(config, latent)))


def features_to_image(
    config: LearntVaeConfig,
    last: Params,
    features: Float[jax.Array, "batch height width features"],
    compute: Compute = Compute(),
) -> Float[jax.Array, "batch height width 3"]:
    """The last convolution of `decode`, float32. last: its parameters, decoder/conv_out."""
    image = jnp.asarray(conv(3, "conv_out", compute).apply({"params": last}, features))
    return jnp.asarray(2 * image - 1 if isinstance(config, TinyVaeConfig) else image, jnp.float32)


def decode_tiled(
    config: AnyVaeConfig,
    params: Params,
    latent: Float[jax.Array, "batch latent_height latent_width channels"],
    compute: Compute = Compute(),
    tile: int = 512,
) -> Float[jax.Array, "batch height width 3"]:
    """Tiled decoding: the image that `decode` gives, apart from rounding, with the memory of a tile; for images that do
    not fit otherwise.

    tile: positions along a tile's side, at every level of the decoder; at the last level these are pixels. Higher:
    faster, more memory. A level that fits in one tile is computed whole.

    Norms take their moments over the whole image, which costs the large autoencoder seven or eight passes over a level
    that does not fit (models/tiling.py); the tiny one has no norms. The image and the results of levels are held whole;
    the largest of these has half the image's sides. Attention is chunked.

    Raises InputError as `decode`, and for tiles too small for the borders that they need.
    """
    if isinstance(config, WaveletConfig):  # which needs the memory of an image
        return decode(config, params, latent, compute)
    _check_half(params, "decoder")
    compute, variables = replace(compute, remat=Remat.NONE), {"params": params["decoder"]}
    if isinstance(config, TinyVaeConfig):
        x, borders = latent, [3 * blocks + 2 for blocks in config.decoder_blocks]
    else:
        x = DecoderEntry(config, compute, _QUERIES).apply(variables, unscaled(config, latent))
        borders = [2 * (config.resnets_per_block + 1) + 2] * len(config.block_channels)
    for number, border in enumerate(borders):

        def network(
            x: Float[jax.Array, "batch height width channels"],
            level: nn.Module = DecoderLevel(config, compute, number),
        ) -> Float[jax.Array, "batch height_out width_out channels_out"]:
            return jnp.asarray(level.apply(variables, x))

        x = tiling.apply(network, jnp.asarray(x), tile, border, factor=2 if number else 1)
    return jnp.asarray(x, jnp.float32)


def _check_half(params: Params, half: str) -> None:
    """Raises InputError for a half that is missing: tiny autoencoders come as two files, of which one alone may have
    been loaded."""
    if half not in params:
        raise InputError(
            f"The autoencoder has no {half}, only its {', '.join(params)}. Give the file of the {half} too "
            f"(taesdxl_{half}.safetensors, with --parts-from), or a whole autoencoder"
        )


@functools.cache
def abstract(config: AnyVaeConfig) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`): {"encoder": …, "decoder": …}, or none."""
    if isinstance(config, WaveletConfig):
        return {}
    encoder, decoder = _networks(config, Compute())
    side = config.downsampling
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, 1, 1, config.latent_channels), jnp.float32)
    return {"encoder": initialisers.abstract(encoder, image), "decoder": initialisers.abstract(decoder, latent)}
