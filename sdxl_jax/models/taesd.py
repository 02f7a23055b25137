"""The tiny autoencoder: an image to the latent of a large model's autoencoder and back, with a thirtieth of its
parameters.

    image −1..1 ── (x + 1) / 2 ── encoder ── scaled latent ── 3 tanh(x / 3) ── decoder ── 2x − 1 ── image

Convolutions, ReLU and residual blocks of three convolutions; no norm, no attention, no distribution: the encoder gives
the mean that the large autoencoder would. It is trained on latents that are scaled already, so nothing is multiplied
here (TAESDXL: those of SDXL × 0.13025). Inside, images are 0..1.

Source: Ollin Boer Bohan's `taesd` (github.com/madebyollin/taesd, taesd.py), which diffusers has as `AutoencoderTiny`.
`vae.encode`, `vae.decode` and `vae.abstract` take this autoencoder too. Its training is that of the large ones
(training/objectives/autoencoding.py).
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.errors import InputError
from sdxl_jax.models.layers import Compute, conv, nearest

_CLAMP = 3.0
"""The decoder sees latents between −3 and 3."""


@dataclass(frozen=True)
class TinyVaeConfig:
    """What the tiny autoencoder's weights depend on. The defaults are those of TAESD and TAESDXL."""

    channels: int = 64
    """Channels of every layer. Higher: better images, slower by the square."""
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Residual blocks of each level of the encoder, from the finest. Four levels: the latent's sides are an eighth."""
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Residual blocks of each level of the decoder, from the coarsest; as many levels."""
    latent_channels: int = 4
    """Channels of the latent."""

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a latent position."""
        return 2 ** (len(self.decoder_blocks) - 1)

    @property
    def scale(self) -> float:
        """Its latents have unit variance as they are."""
        return 1.0

    def check(self, name: str) -> None:
        """Raises InputError for numbers below 1, and for halves with different numbers of levels. name: its field."""
        encoder, decoder = (", ".join(map(str, blocks)) for blocks in (self.encoder_blocks, self.decoder_blocks))
        if self.channels < 1 or min(self.encoder_blocks + self.decoder_blocks, default=0) < 1:
            raise InputError(
                f"{name} has channels={self.channels}, encoder_blocks={encoder} and decoder_blocks={decoder}. Give 1 "
                "or more everywhere"
            )
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise InputError(
                f"{name}.encoder_blocks={encoder} and decoder_blocks={decoder} differ in length. Give each of them one "
                "number per level"
            )


TAESDXL = TinyVaeConfig()


class Block(nn.Module):
    """Three convolutions around a shortcut, the first two followed by a ReLU, and a ReLU after the sum."""

    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch height width channels"]:
        channels = x.shape[-1]
        hidden = nn.relu(conv(channels, "conv1", self.compute)(x))
        hidden = nn.relu(conv(channels, "conv2", self.compute)(hidden))
        return nn.relu(x + conv(channels, "conv3", self.compute)(hidden))


class TinyEncoder(nn.Module):
    config: TinyVaeConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width 3"]
    ) -> Float[jax.Array, "batch latent_height latent_width channels"]:
        config, compute = self.config, self.compute
        block = compute.block(Block)
        x = conv(config.channels, "conv_in", compute)((x + 1) / 2)
        for level, blocks in enumerate(config.encoder_blocks):
            if level:
                name = f"down_blocks_{level}_downsample"
                x = conv(config.channels, name, compute, strides=2, use_bias=False)(x)
            for index in range(blocks):
                x = block(compute, name=f"down_blocks_{level}_blocks_{index}")(x)
        return conv(config.latent_channels, "conv_out", compute)(x)


def decoder_level(
    config: TinyVaeConfig,
    compute: Compute,
    level: int,
    x: Float[jax.Array, "batch height width channels"],
    conv_out: bool = True,
) -> Float[jax.Array, "batch height_out width_out channels_out"]:
    """A level of the decoder, numbered from the coarsest, in the scope of a module: the upsampling before it, its
    blocks, and after the last level the output layer, if `conv_out`."""
    if level:
        for axis in (1, 2):
            x = nearest(x, 2 * x.shape[axis], axis)
        x = conv(config.channels, f"up_blocks_{level - 1}_upsample", compute, use_bias=False)(x)
    else:
        x = nn.relu(conv(config.channels, "conv_in", compute)(_CLAMP * jnp.tanh(x / _CLAMP)))
    for index in range(config.decoder_blocks[level]):
        x = compute.block(Block)(compute, name=f"up_blocks_{level}_blocks_{index}")(x)
    last = level + 1 == len(config.decoder_blocks) and conv_out
    return 2 * conv(3, "conv_out", compute)(x) - 1 if last else x


class TinyDecoder(nn.Module):
    config: TinyVaeConfig
    compute: Compute
    conv_out: bool = True
    """Whether it ends with its last convolution, or with what goes into that."""

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch latent_height latent_width channels"]
    ) -> Float[jax.Array, "batch height width channels_out"]:
        for level in range(len(self.config.decoder_blocks)):
            x = decoder_level(self.config, self.compute, level, x, self.conv_out)
        return x
