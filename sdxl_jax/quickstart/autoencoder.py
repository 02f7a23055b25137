"""The quickstart's small autoencoder: SDXL's architecture with few channels, trained on the embedded images.

Here are its configuration and its shipped weights; the objective is training/objectives/autoencoding.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from sdxl_jax.arrays import Params, unflatten
from sdxl_jax.config import CheckpointConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.training.loop import train
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingLossConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.open import open_model

WEIGHTS = Path(__file__).with_name("autoencoder.safetensors")
"""Our own trained weights, float16, shipped with the package. `quickstart --train-autoencoder` trains others."""

BUCKETS = ((96, 160), (128, 128), (160, 96))
CONFIG = VaeConfig(block_channels=(16, 32, 64, 64), resnets_per_block=1, groups=8, scale=1.0)
STEPS = 4000


def get_config(images: str = "runs/quickstart/pictures", seed: int = 0, steps: int = STEPS) -> AutoencoderConfig:
    """images: the folder into which `quickstart` unpacks its images."""
    return AutoencoderConfig(
        data=DataConfig(folder=images, buckets=BUCKETS, batch_size=4, flip_probability=0.5, seed=seed),
        vae=CONFIG,
        loss=AutoencodingLossConfig(edge_weight=1.0, kl_weight=1e-3),
        optimiser=OptimiserConfig(
            learning_rate=2e-3, warmup_steps=steps // 20, decay=Decay.COSINE, weight_decay=0.0, clip_norm=1.0
        ),
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.998),
        training=AutoencodingLoopConfig(steps=steps, seed=seed),
        checkpoint=CheckpointConfig(every_steps=500, keep=1),
        validation=AutoencodingValidationConfig(every_steps=1000, images=8),
    )


def train_autoencoder(
    images: Path, run_dir: Path, out: Path, seed: int = 0, steps: int = STEPS, cache: str | None = "user"
) -> VaeConfig:
    """Trains on a folder of images, or resumes, and writes the weights to `out` in float16. Returns the configuration,
    with the measured latent scale. cache: as `training.compilation_cache`."""
    config = get_config(str(images), seed, steps)
    model = train(
        dataclasses.replace(config, training=dataclasses.replace(config.training, compilation_cache=cache)), run_dir
    )
    assert isinstance(model.config.vae, VaeConfig)
    half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), model.params)
    out.unlink(missing_ok=True)
    convert(Model(ModelConfig(vae=model.config.vae), half), out, "single-file", progress=False)
    return model.config.vae


def load(path: Path = WEIGHTS) -> tuple[VaeConfig, Params]:
    """The configuration and the weights, as float32."""
    weights = open_model(path)
    params = {name: np.asarray(leaf.read(), np.float32) for name, leaf in weights.leaves.items()}
    assert isinstance(weights.config.vae, VaeConfig)
    return weights.config.vae, unflatten(params)["vae"]
