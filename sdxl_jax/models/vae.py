"""The KL autoencoder of Stable Diffusion and SDXL: an image to a latent at an eighth of its size, and back.

    image −1..1 ── encoder ── mean, log variance ── sample × scale ── latent ── / scale ── decoder ── image

Sources: Rombach et al. (arXiv:2112.10752), sgm `modules/diffusionmodules/model.py`. Every norm has eps 1e-6; the
encoder pads (0, 1) at the bottom and right before a stride-2 convolution, unlike the UNet. Losses for its training are
not here. `encode`, `decode` and `init` take the tiny autoencoder of `taesd.py` as well, by the type of its
configuration.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Key

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.models import taesd
from sdxl_jax.models.attention import MultiHeadAttention
from sdxl_jax.models.layers import Compute, ResnetBlock, Upsample, conv, group_norm
from sdxl_jax.models.taesd import TinyVaeConfig

_EPSILON = 1e-6


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

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a latent position."""
        return 2 ** (len(self.block_channels) - 1)


SDXL_VAE = VaeConfig()
SD_VAE = VaeConfig(scale=0.18215)

AnyVaeConfig = VaeConfig | TinyVaeConfig


class Posterior(NamedTuple):
    """The diagonal normal distribution of unscaled latents that the encoder gives for an image."""

    mean: Float[jax.Array, "batch height width channels"]
    log_variance: Float[jax.Array, "batch height width channels"]
    """−∞ where the encoder gives the mean alone: a sample is the mean."""

    def sample(self, keys: Key[jax.Array, " batch"]) -> Float[jax.Array, "batch height width channels"]:
        """keys: one an image, so that a latent does not depend on its neighbours in the batch."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class MiddleBlock(nn.Module):
    """Residual block, attention of one head over all positions, residual block."""

    config: VaeConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch height width channels"]:
        _, height, _, channels = x.shape
        block, groups = self.compute.block(ResnetBlock), self.config.groups
        x = block(channels, groups, _EPSILON, self.compute, name="resnets_0")(x, None)
        hidden = group_norm(groups, _EPSILON, "norm", self.compute)(x)
        hidden = rearrange(hidden, "b height width channels -> b (height width) channels")
        hidden = MultiHeadAttention(1, self.compute, bias=True, name="attention")(hidden, hidden)
        x = x + rearrange(hidden, "b (height width) channels -> b height width channels", height=height)
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


class Decoder(nn.Module):
    config: VaeConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch latent_height latent_width channels"]
    ) -> Float[jax.Array, "batch height width 3"]:
        config, compute = self.config, self.compute
        block = compute.block(ResnetBlock)
        x = conv(config.latent_channels, "post_quant_conv", compute, size=1)(x)
        x = conv(config.block_channels[-1], "conv_in", compute)(x)
        x = MiddleBlock(config, compute, name="mid_block")(x)
        for level, channels in enumerate(reversed(config.block_channels)):
            for index in range(config.resnets_per_block + 1):
                name = f"up_blocks_{level}_resnets_{index}"
                x = block(channels, config.groups, _EPSILON, compute, name=name)(x, None)
            if level + 1 < len(config.block_channels):
                _, height, width, _ = x.shape
                x = Upsample(compute, name=f"up_blocks_{level}_upsample")(x, 2 * height, 2 * width)
        x = nn.silu(group_norm(config.groups, _EPSILON, "conv_norm_out", compute)(x))
        return conv(3, "conv_out", compute)(x)


def encode(
    config: AnyVaeConfig, params: Params, image: Float[jax.Array, "batch height width 3"], compute: Compute = Compute()
) -> Posterior:
    """Distribution of the unscaled latent, float32, log variance clamped to −30..20. Of a tiny autoencoder the mean,
    with log variance −∞.

    image: −1..1, height and width multiples of `config.downsampling`. Raises InputError where there is no encoder.
    """
    _check_half(params, "encoder")
    if isinstance(config, TinyVaeConfig):
        mean = taesd.encode(config, params, image, compute)
        return Posterior(mean, jnp.full_like(mean, -jnp.inf))
    moments = Encoder(config, compute).apply({"params": params["encoder"]}, image)
    mean, log_variance = jnp.split(jnp.asarray(moments, jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))


def scaled_sample(
    config: AnyVaeConfig, posterior: Posterior, keys: Key[jax.Array, " batch"]
) -> Float[jax.Array, "batch latent_height latent_width channels"]:
    """Latents as the UNet sees them: drawn, and × `config.scale`. keys: one an image."""
    return posterior.sample(keys) * config.scale


def decode(
    config: AnyVaeConfig,
    params: Params,
    latent: Float[jax.Array, "batch latent_height latent_width channels"],
    compute: Compute = Compute(),
) -> Float[jax.Array, "batch height width 3"]:
    """The image of a scaled latent, float32, about −1..1 (not clipped). Raises InputError where there is no decoder."""
    _check_half(params, "decoder")
    if isinstance(config, TinyVaeConfig):
        return taesd.decode(config, params, latent, compute)
    image = Decoder(config, compute).apply({"params": params["decoder"]}, latent / config.scale)
    return jnp.asarray(image, jnp.float32)


def _check_half(params: Params, half: str) -> None:
    """Tiny autoencoders come as two files, of which one alone may have been loaded."""
    if half not in params:
        raise InputError(
            f"The autoencoder has no {half}, only its {', '.join(params)}. Give the file of the {half} too "
            f"(taesdxl_{half}.safetensors, with --parts-from), or a whole autoencoder"
        )


def init(key: Key[jax.Array, ""], config: AnyVaeConfig) -> Params:
    """Fresh float32 parameters: {"encoder": …, "decoder": …}."""
    if isinstance(config, TinyVaeConfig):
        return taesd.init(key, config)
    encoder_key, decoder_key = jax.random.split(key)
    side = config.downsampling
    image, latent = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1, 1, config.latent_channels))
    return {
        "encoder": Encoder(config, Compute()).init(encoder_key, image)["params"],
        "decoder": Decoder(config, Compute()).init(decoder_key, latent)["params"],
    }
