"""Fits the linear map of `sdxl_jax.sampling.previews`, from SDXL latents to RGB, by least squares.

    python benchmarks/latent_colours.py taesdxl_encoder.safetensors PHOTOGRAPHS

PHOTOGRAPHS: a folder of .jpg, which are cropped to the centred square and resized to 320 × 320. Latents are TAESDXL's.
The colour of a latent position is the mean of its 8 × 8 pixels, 0..1. The error is that of a fit without every fifth
photograph, on these; the map itself is fitted to all.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float32, Float64
from PIL import Image, ImageOps

import sdxl_jax
from sdxl_jax.models import vae

SIDE = 320


def square(path: Path) -> Float32[np.ndarray, "height width 3"]:
    """The centred square of a photograph, SIDE × SIDE pixels, 0..1."""
    with Image.open(path) as opened:
        image = ImageOps.fit(opened.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


def main(weights: str, folder: str) -> None:
    model = sdxl_jax.load_model(weights, dtype="float32")
    encode = jax.jit(lambda image: vae.encode(model.config.vae, model.params["vae"], image).mean)
    images = [square(path) for path in sorted(Path(folder).rglob("*.jpg"))]
    latents = np.stack([np.asarray(encode(2 * image[None] - 1))[0] for image in images]).astype(np.float64)
    colours = np.stack([image.reshape(SIDE // 8, 8, SIDE // 8, 8, 3).mean((1, 3)) for image in images])
    inputs = np.concatenate([latents, np.ones_like(latents[..., :1])], axis=-1)

    def fit(chosen: Bool[np.ndarray, "images"]) -> Float64[np.ndarray, "5 3"]:
        return np.linalg.lstsq(inputs[chosen].reshape(-1, 5), colours[chosen].reshape(-1, 3), rcond=None)[0]

    def error(fitted: Float64[np.ndarray, "5 3"], chosen: Bool[np.ndarray, "images"]) -> float:
        predicted = np.clip(inputs[chosen] @ fitted, 0, 1)
        return 255 * float(np.sqrt(np.mean((predicted - colours[chosen]) ** 2)))

    held_out = np.arange(len(images)) % 5 == 0
    every = np.ones(len(images), bool)
    print(f"{len(images)} photographs; standard deviation of the colours {255 * colours.std():.1f} of 255 levels")
    print(f"root mean square error, held out: {error(fit(~held_out), held_out):.2f} levels")
    print(f"root mean square error of the fit to all: {error(fit(every), every):.2f} levels")
    print(np.round(fit(every), 4).tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
