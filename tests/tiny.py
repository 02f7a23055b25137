"""The smallest configuration with every part of the system, for tests that train or sample."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.conditioning.micro import MicroConfig
from sdxl_jax.conditioning.text import END_OF_TEXT, Tower
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import clip_vision, dinov2, initialisers
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.clip_vision import ClipVisionConfig
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.weights import clip_vision as towers
from sdxl_jax.weights import names
from sdxl_jax.weights.formats import safetensors
from sdxl_jax.weights.lazy import Initial, abstract_leaves
from sdxl_jax.weights.names import Dialect, Naming

MODEL = ModelConfig(
    unet=UNetConfig(
        block_channels=(8, 16),
        resnets_per_block=1,
        transformer_depth=(0, 2),
        middle_depth=1,
        heads=(1, 2),
        context_dim=16,
        vector_dim=8 + 6 * 4,
        groups=4,
    ),
    vae=VaeConfig(block_channels=(4, 4, 4, 4), resnets_per_block=1, groups=2),
    text=(
        Tower("text_encoder", ClipTextConfig(8, 2, 2, 16), END_OF_TEXT),
        Tower("text_encoder_2", ClipTextConfig(8, 2, 2, 16, Activation.GELU, 8), 0),
    ),
    micro=MicroConfig(embedding_dim=4),
    default_size=(32, 32),
)
BUCKETS = ((32, 32), (24, 40))
DINOV2 = DinoV2Config(width=8, layers=2, heads=2, mlp_width=16, side=28, patch=14)


def random_model(config: ModelConfig, seed: int) -> Model:
    """A model with random values for every parameter, so that its output depends on all conditioning; that of a newly
    initialised UNet is 0. The last convolutions are small, so that images are not all black or white."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names, noise = [key.key for key in path], rng.standard_normal(leaf.shape, np.float32)
        if names[-1] == "kernel":
            stacked = any(name in ("transformer_blocks", "layers") for name in names)
            gain = 0.3 if names[-2] == "conv_out" else 1.0
            return jnp.asarray(gain * noise / math.sqrt(math.prod(leaf.shape[stacked:-1])))
        embedding = names[-1] in ("embedding", "position_embedding")
        return jnp.asarray((1.0 if embedding else 0.1) * noise + (names[-1] == "scale"))

    return Model(config, jax.tree_util.tree_map_with_path(draw, unflatten(abstract_leaves(config))))


def write_image_tower(path: Path, projection: int, seed: int = 0) -> Path:
    """An image tower of CLIP with random weights, in a new .safetensors file."""
    config = ClipVisionConfig(64, 1, 1, 64, Activation.GELU, projection, 28, 14)
    leaves = {name: Initial(leaf, name, seed) for name, leaf in flatten(clip_vision.abstract(config)).items()}
    towers.write(towers.ImageTower(config, leaves, Naming(Dialect.OPENCLIP, "visual.")), path, Dialect.OPENCLIP)
    return path


def write_dinov2(folder: Path, config: DinoV2Config = DINOV2, seed: int = 0) -> Path:
    """DINOv2 with random weights, in a new directory as transformers saves it."""
    folder.mkdir(parents=True)
    abstract = flatten(dinov2.abstract(config))
    params = unflatten({path: initialisers.sample(leaf, seed, path) for path, leaf in abstract.items()})
    tensors = names.to_tensors(names.table(config, Naming(Dialect.TRANSFORMERS)), params)
    described = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    with safetensors.Writer(folder / "model.safetensors", described, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    fields = {"hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    fields |= {"mlp_ratio": config.mlp_width // config.width, "image_size": config.side, "patch_size": config.patch}
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2", **fields}))
    return folder


def make_folder(folder: Path, images: int = 16) -> Path:
    """A folder of captioned random images, half of them for each of the two buckets."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(images):
        height, width = BUCKETS[number % 2]
        pixels = rng.integers(0, 256, (height + number, width + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"image number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train_config(folder: Path, steps: int = 4) -> TrainConfig:
    """A run of a few steps over `make_folder`'s images, without validation images."""
    return TrainConfig(
        data=DataConfig(folder=str(folder), buckets=BUCKETS, batch_size=8),
        model=MODEL,
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=2),
        ema=EmaConfig(decay=0.9),
        training=TrainingConfig(steps=steps),
        checkpoint=CheckpointConfig(every_steps=2),
        validation=ValidationConfig(every_steps=None),
    )
