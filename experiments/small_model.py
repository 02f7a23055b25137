"""The small model that the experiments on pixels share: SDXL's UNet in small, conditioned on a class, for images of 16
to 32 pixels.

It works on an exact Haar transform of the pixels, so that no autoencoder blurs or shifts anything. A step of 64 images
of 32×32 is about 0.1 TFLOP.

The optimiser is chosen by measurement (CIFAR-10 at 16×16, FID of 500 samples without guidance): 176 after 25,600
images, 16 at a time, at 1e-3 with cosine decay; a constant 5e-4 with 64 at a time took 76,800 images to 170. A network
that predicts v had 219 and 252, with 16 and 64 at a time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.files import atomic
from sdxl_jax.model import Model, ModelConfig, UnconditionalKind
from sdxl_jax.models.unet import ClassConfig, UNetConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.sampling.generate import generate

Images = UInt8[np.ndarray, "images side side 3"]

DROPOUT = 0.2
"""Of each condition on its own, as in sgm."""


def model_config(
    side: int, classes: int, numbers: Numbers | None = None, prediction: Prediction = Prediction.EPSILON
) -> ModelConfig:
    """side: of the images, a multiple of 8. numbers: of micro-conditioning; None: there is none."""
    micro = None if numbers is None else MicroConfig(numbers, embedding_dim=64)
    channels = WaveletConfig().latent_channels
    return ModelConfig(
        unet=UNetConfig(
            block_channels=(64, 128, 128),
            resnets_per_block=1,
            transformer_depth=(0, 1, 1),
            middle_depth=1,
            heads=(1, 2, 2),
            context_dim=128,
            vector_dim=None if micro is None else micro.vector_dim,
            in_channels=channels,
            out_channels=channels,
            classes=ClassConfig(classes),
        ),
        vae=WaveletConfig(),
        text=(),
        micro=micro,
        prediction=prediction,
        unconditional=UnconditionalKind.ALL_ZEROS,
        default_size=(side, side),
    )


def train_config(
    images: Path,
    model: ModelConfig,
    *,
    batch: int,
    steps: int,
    loss: LossConfig = LossConfig(),
    training_seed: int = 0,
    **data: Any,
) -> TrainConfig:
    """images: a folder of `write_images`. data: fields of DataConfig; one process reads about 3,000 images a second,
    which an accelerator is ahead of without `workers`."""
    side = model.default_size[0]
    assert model.unet.classes is not None
    return TrainConfig(
        data=DataConfig(
            folder=str(images),
            label="label",
            buckets=((side, side),),
            batch_size=batch,
            verify_images=False,
            **data,
        ),
        model=model,
        loss=loss,
        optimiser=OptimiserConfig(
            learning_rate=1e-3, warmup_steps=steps // 20, decay=Decay.COSINE, beta2=0.99, weight_decay=0.0
        ),
        ema=EmaConfig(decay=0.99),
        training=TrainingConfig(
            steps=steps,
            seed=training_seed,
            caption_dropout=0.0,
            class_dropout=DROPOUT,
            micro_dropout=0.0 if model.micro is None else DROPOUT,
        ),
        checkpoint=CheckpointConfig(every_steps=max(1, steps // 4), keep=4),
        validation=ValidationConfig(
            every_steps=max(1, steps // 4),
            classes=tuple(range(min(10, model.unet.classes.number))),
            sizes=((side, side),),
            steps=50,
        ),
    )


def write_images(folder: Path, images: Sequence[np.ndarray], **columns: Sequence[Any]) -> None:
    """uint8 images of any sizes; written once. columns: what metadata.jsonl says of each image, such as label."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, *values) in enumerate(zip(images, *columns.values(), strict=True)):
        Image.fromarray(image).save(folder / f"{number:05d}.png", compress_level=1)
        lines.append(json.dumps({"file_name": f"{number:05d}.png", **dict(zip(columns, values, strict=True))}))
    atomic.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def sampled(model: Model, classes: Sequence[int], file: Path, options: Mapping[str, Any]) -> Images:
    """One sample of each class in the list; kept in `numbered(file)`. options: of `generate`, besides DDIM's 50
    steps."""
    file = numbered(file, len(classes))
    if file.exists():
        return np.load(file)["images"]
    found = generate(
        model,
        [""] * len(classes),
        classes=list(classes),
        **{"sampler": "ddim", "steps": 50, "batch_size": min(len(classes), 250), "progress": True, **options},
    ).images
    write_samples(file, images=found)
    return found


def numbered(file: Path, images: int) -> Path:
    """The .npz of so many images, so that a run with more of them does not take these for its own."""
    return file.with_name(f"{file.stem}_{images}.npz")


def write_samples(file: Path, **arrays: Any) -> None:
    """An .npz with these arrays, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(file) as partial, partial.open("wb") as opened:
        np.savez(opened, **arrays)
