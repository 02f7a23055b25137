"""An autoencoder's reconstructions of a set of images: what PSNR, SSIM, LPIPS and reconstruction FID compare with them.

    square ── encode, mean ── decode ── round ── FOLDER/N.png

The latent is the posterior's mean, not a sample of it. The folder is resumable, as those of `samples`.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from sdxl_jax.arrays import Params, normalise, to_bytes
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import features, samples
from sdxl_jax.evaluation.features import Network
from sdxl_jax.evaluation.image_sets import Squares
from sdxl_jax.models import vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.models.vae import AnyVaeConfig
from sdxl_jax.sampling.contact_sheet import save_png

_THREADS = 4


def network(config: AnyVaeConfig, params: Params, compute: Compute) -> Network:
    """Images to the bytes of their reconstructions, and whether each was finite, which bytes do not show."""

    def apply(
        params: Params, image: UInt8[jax.Array, "batch side side 3"]
    ) -> tuple[UInt8[jax.Array, "batch side side 3"], Bool[jax.Array, " batch"]]:
        latent = vae.encode(config, params, normalise(image), compute).mean * config.scale
        decoded = vae.decode(config, params, latent, compute)
        return to_bytes(decoded), jnp.isfinite(decoded).all(axis=(1, 2, 3))

    return Network("autoencoder", lambda image: image, jax.jit(apply), params)


def texts(squares: Squares, settings: dict[str, str]) -> list[dict[str, str]]:
    """What each PNG says: the settings, and which image it is of."""
    names = squares.images.names[: squares.count]
    return [{**settings, "size": str(squares.side), "source": name} for name in names]


def reconstruct(network: Network, squares: Squares, folder: Path, texts: list[dict[str, str]], batch_size: int) -> None:
    """Writes the reconstructions that the folder lacks. Raises InputError for a folder with other images, and for a
    reconstruction that is not finite."""
    missing = samples.missing(folder, texts)
    if not missing:
        return

    def write(number: int, image: UInt8[np.ndarray, "side side 3"]) -> None:
        save_png(Image.fromarray(image), samples.path_of(folder, number), texts[number])

    with ThreadPoolExecutor(_THREADS) as pool:
        left = missing
        for images, finite in features.rows(network, squares.pixels, missing, batch_size, "reconstructing"):
            numbers, left = left[: len(finite)], left[len(finite) :]
            if not finite.all():
                name = squares.images.names[numbers[int(finite.argmin())]]
                raise InputError(
                    f"The reconstruction of {name} is not finite (NaN or inf). Use --dtype float32; if that does not "
                    "help, the autoencoder's weights are at fault"
                )
            list(pool.map(write, numbers, images))


def check_side(side: int, config: AnyVaeConfig) -> None:
    """Raises InputError for a size that the autoencoder does not take."""
    if side < config.downsampling or side % config.downsampling:
        near = max(1, round(side / config.downsampling)) * config.downsampling
        raise InputError(f"--size {side}: this autoencoder takes multiples of {config.downsampling}. Give {near}")
