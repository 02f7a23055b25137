"""The exact autoencoder: an orthonormal Haar transform, which loses nothing and has no parameters.

    image [height, width, 3] ── levels times: 2 × 2 blocks → 4 numbers each ── × scale ── [height/2ᴸ, width/2ᴸ, 3 · 4ᴸ]

A block [[a, b], [c, d]] becomes ½(a+b+c+d), ½(a−b+c−d), ½(a+b−c−d), ½(a−b−c+d): mean, horizontal, vertical and diagonal
detail, each of all channels together, in this order. Every further level transforms all channels of the one before, so
that all have the same size. The transform is orthonormal: white noise stays white noise, and a squared error is that of
the pixels. Diffusion of these latents is diffusion of pixels, with a quarter of the positions per level; with levels=0
it is that of the pixels themselves.

`vae.encode`, `vae.decode` and `vae.abstract` take this autoencoder too; nothing is trained. Haar 1910, Mathematische
Annalen 69, 331-371.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from sdxl_jax.errors import InputError

_SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))


@dataclass(frozen=True)
class WaveletConfig:
    """The exact autoencoder. The defaults are one level, with latents of about unit variance."""

    levels: int = 1
    """Levels of the transform, 0 or more. Higher: fewer positions with more channels; 0: the pixels themselves."""
    scale: float = 2.0
    """Factor of the latents, above 0. Pixels of −1..1 have a deviation of about ½."""

    @property
    def latent_channels(self) -> int:
        return 3 * 4**self.levels

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a latent position."""
        return 2**self.levels

    def check(self, name: str) -> None:
        """Raises InputError for numbers out of range. name: its field."""
        if self.levels < 0 or not 0 < self.scale < float("inf"):
            raise InputError(
                f"{name} has levels={self.levels} and scale={self.scale:g}. Give 0 levels or more, and a finite scale "
                "above 0"
            )


def transform(
    config: WaveletConfig, image: Float[jax.Array, "batch height width 3"]
) -> Float[jax.Array, "batch latent_height latent_width channels"]:
    """The unscaled latent. Height and width: multiples of `config.downsampling`."""
    signs, x = jnp.array(_SIGNS) / 2, image
    for _ in range(config.levels):
        pattern = "batch (rows down) (columns right) channels -> batch rows columns (down right) channels"
        blocks = rearrange(x, pattern, down=2, right=2)
        bands = jnp.einsum("kp,bhwpc->bhwkc", signs, blocks, precision="highest")
        x = rearrange(bands, "batch rows columns bands channels -> batch rows columns (bands channels)")
    return x


def inverse(
    config: WaveletConfig, latent: Float[jax.Array, "batch latent_height latent_width channels"]
) -> Float[jax.Array, "batch height width 3"]:
    """The image of an unscaled latent."""
    signs, x = jnp.array(_SIGNS) / 2, latent
    for _ in range(config.levels):
        bands = rearrange(x, "batch rows columns (bands channels) -> batch rows columns bands channels", bands=4)
        blocks = jnp.einsum("kp,bhwkc->bhwpc", signs, bands, precision="highest")
        pattern = "batch rows columns (down right) channels -> batch (rows down) (columns right) channels"
        x = rearrange(blocks, pattern, down=2)
    return x
