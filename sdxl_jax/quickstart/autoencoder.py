"""The quickstart's small autoencoder: the real architecture with few channels, trained on the embedded pictures.

Loss per image: L1 of the pixels, L1 of the horizontal and vertical differences (edges; a stand-in for a perceptual
loss, which needs a pretrained network), and a KL term that keeps the latents smooth enough to be generated. Trained on
random crops, which a convolutional network does not mind, in about an hour of one core. Adversarial and perceptual
losses, as behind SDXL's own autoencoder, are not here.
"""

import dataclasses
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, UInt8
from tqdm import trange

from sdxl_jax.arrays import Params, normalise, unflatten
from sdxl_jax.data.buckets import Bucket, assign
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.transforms import cover_crop
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import vae
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.open import open_model

WEIGHTS = Path(__file__).with_name("autoencoder.safetensors")
"""Our own trained weights, float16, shipped with the package. `sdxl-jax quickstart --train-autoencoder` makes them."""

CONFIG = VaeConfig(block_channels=(16, 32, 64, 64), resnets_per_block=1, groups=8, scale=1.0)
STEPS, BATCH, CROP_PX = 4000, 16, 64
PEAK_LEARNING_RATE = 2e-3
EDGE_WEIGHT, KL_WEIGHT = 1.0, 1e-3


def _loss(params: Params, pixels: UInt8[Array, "batch height width 3"], key: Key[Array, ""]) -> Float[Array, ""]:
    image = normalise(pixels)
    posterior = vae.encode(CONFIG, params, image)
    difference = vae.decode(CONFIG, params, posterior.sample(jax.random.split(key, BATCH))) - image
    edges = sum(jnp.abs(jnp.diff(difference, axis=axis)).mean() for axis in (1, 2))
    variance = jnp.exp(posterior.log_variance)
    kl = 0.5 * (posterior.mean**2 + variance - 1 - posterior.log_variance).mean()
    return jnp.abs(difference).mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def _crops(images: list[UInt8[np.ndarray, "height width 3"]], step: int) -> UInt8[np.ndarray, "batch crop crop 3"]:
    rng = np.random.default_rng([0, step])
    rows = []
    for index in rng.integers(0, len(images), BATCH):
        height, width, _ = images[index].shape
        top, left = rng.integers(0, [height - CROP_PX + 1, width - CROP_PX + 1])
        crop = images[index][top : top + CROP_PX, left : left + CROP_PX]
        rows.append(crop[:, :: rng.choice([1, -1])])
    return np.stack(rows)


def train(folder: Path, buckets: tuple[tuple[int, int], ...], out: Path, steps: int = STEPS) -> VaeConfig:
    """Trains on the pictures of a folder, each at its bucket's size, and writes `out`; returns its configuration."""
    source = open_folder(folder)
    sizes = [Bucket(*bucket) for bucket in buckets]
    rng = np.random.default_rng(0)  # a centred crop draws nothing that shows
    images = [
        cover_crop(source.pixels(image), sizes[number], rng=rng, crop="centre").image
        for image, number in enumerate(assign(source.sizes, tuple(sizes)).bucket)
    ]

    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_onecycle_schedule(steps, PEAK_LEARNING_RATE, 0.05))
    )
    params = vae.init(jax.random.key(0), CONFIG)

    @jax.jit
    def update(params: Params, average: Params, state: optax.OptState, pixels: Array, key: Array):
        loss, gradient = jax.value_and_grad(_loss)(params, pixels, key)
        updates, state = optimiser.update(gradient, state)
        params = cast(Params, optax.apply_updates(params, updates))
        average = cast(Params, optax.incremental_update(params, average, 0.002))
        return params, average, state, loss

    state, average = optimiser.init(params), params
    progress = trange(steps, desc="autoencoder", unit="step")
    for step in progress:
        key = jax.random.fold_in(jax.random.key(1), step)
        params, average, state, loss = update(params, average, state, _crops(images, step), key)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.4f}")

    # Measured once over all pictures: latents × scale have unit variance, which the noise schedule counts on.
    latents = [vae.encode(CONFIG, average, normalise(image[None])).mean.ravel() for image in images]
    config = dataclasses.replace(CONFIG, scale=round(1 / float(np.concatenate(latents).std()), 5))
    half = jax.tree.map(lambda array: np.asarray(array, np.float16), average)
    out.unlink(missing_ok=True)
    convert(Model(ModelConfig(vae=config), {"vae": half}), out, "single-file", progress=False)
    return config


def load(path: Path = WEIGHTS) -> tuple[VaeConfig, Params]:
    """The configuration and the weights, as float32."""
    weights = open_model(path)
    params = {name: np.asarray(leaf.read(), np.float32) for name, leaf in weights.leaves.items()}
    assert isinstance(weights.config.vae, VaeConfig)
    return weights.config.vae, unflatten(params)["vae"]
