"""An autoencoder's reconstructions of a set of images: what PSNR, SSIM, LPIPS and reconstruction FID compare with them.

    square ── encode, mean ── decode ── round ── FOLDER/N.png

The latent is the posterior's mean, not a sample of it. The folder is resumable, as those of `samples`.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from sdxl_jax.arrays import Params, normalise, to_bytes
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.evaluation import features, samples
from sdxl_jax.evaluation.features import Network
from sdxl_jax.evaluation.image_sets import Squares, open_images
from sdxl_jax.evaluation.scores import Evaluation, Measurement
from sdxl_jax.evaluation.settings import OF_PAIRS, Metric
from sdxl_jax.models import vae
from sdxl_jax.models.layers import Compute, Dtype
from sdxl_jax.models.vae import AnyVaeConfig
from sdxl_jax.sampling.contact_sheet import save_png
from sdxl_jax.weights.lazy import cast
from sdxl_jax.weights.load import load_weights
from sdxl_jax.weights.open import OpenOptions, open_model

OF_AUTOENCODERS = (*OF_PAIRS, Metric.FID)
_THREADS = 4


def evaluate_autoencoder(
    path: str | PurePath,
    images: str | PurePath,
    *,
    side: int = 256,
    count: int | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    options: OpenOptions = OpenOptions(),
    parts_from: Sequence[str | PurePath] = (),
    measured: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Scores of an autoencoder's reconstructions of a folder's images; "rfid" is their FID.

    Args:
        path: the autoencoder: a model, an autoencoder alone, a run. options, parts_from: as for `open_model`.
        images: the folder, or an .npz; the centred square of each is resized to `side` pixels.
        count: of the images, the first by name; None: all.
        out: folder for the reconstructions, which a later call resumes; None: a temporary one.
        batch_size, dtype: of the autoencoder.
        measured: arguments of `Measurement`; None: all metrics of pairs, and FID.

    Raises InputError before work begins, as `evaluate` and `open_model`, and for a path without an autoencoder.
    """
    if out is None and jax.process_count() > 1:
        raise InputError("Several processes need a folder that all of them see for the reconstructions. Give --out DIR")
    opened = open_images(images, "the folder")
    check_ranges([("images", count, 2, len(opened.names)), ("batch_size", batch_size, 1, math.inf)])
    squares = Squares(opened, count or len(opened.names), side)
    measurement = Measurement(squares, **({"metrics": OF_AUTOENCODERS} if measured is None else measured))
    weights = open_model(path, options, parts_from)
    if "vae" not in weights.parts:
        raise InputError(f"{path} has no autoencoder, only {', '.join(weights.parts)}. Give one that has")
    leaves = {name: leaf for name, leaf in weights.leaves.items() if name.startswith("vae/")}
    weights = cast(replace(weights, leaves=leaves), np.dtype(np.float32))
    check_side(side, weights.config.vae)
    settings = {"model": str(path), "dtype": dtype}
    settings |= {"parts_from": json.dumps([str(each) for each in parts_from])} if parts_from else {}
    settings |= {"weights": "raw"} if options.raw else {}
    with contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reconstructions-")))
        params = load_weights(weights).params["vae"]
        autoencoder = network(weights.config.vae, params, Compute(dtype=Dtype(dtype)))
        reconstruct(autoencoder, squares, folder, texts(squares, settings), batch_size)
        samples.wait_for_all(folder, squares.count)
        evaluation = measurement.of(folder)
    scores = [score._replace(name="rfid") if score.name == "fid" else score for score in evaluation.scores]
    notes = [*evaluation.notes, "latents are the posterior's mean; reconstructions are rounded to uint8"]
    return evaluation._replace(images=f"reconstructions by {path}", scores=scores, notes=notes)


def network(config: AnyVaeConfig, params: Params, compute: Compute) -> Network:
    """Images to the bytes of their reconstructions, and whether each was finite, which bytes do not show."""

    def apply(
        params: Params, image: UInt8[jax.Array, "batch side side 3"]
    ) -> tuple[UInt8[jax.Array, "batch side side 3"], Bool[jax.Array, " batch"]]:
        latent = vae.scaled(config, vae.encode(config, params, normalise(image), compute).mean)
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
