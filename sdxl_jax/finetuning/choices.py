"""The configuration of a fine-tuning, chosen from the images, the base and the machine.

    images ──┬── buckets, steps, rank ──┐
    base ────┼── size, learning rate ───┼── TrainConfig
    machine ─┴── batch, precision ──────┘

The learning rates 1e-4, 3e-4 and 1e-6 and ranks from 4 to 32 are those of sd-scripts, diffusers and OneTrainer; 1 to 4
vectors are usual, and OneTrainer can keep them at the norm of words; 500 to 1500 steps for 5 to 20 images are said to
be usual, which we have not checked. All other numbers are ours, and none was measured at full size.
The user's own choices (`Options`) come first.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from sdxl_jax.adapters.embeddings import Norm, TextualInversionConfig
from sdxl_jax.adapters.targets import AdapterConfig
from sdxl_jax.arrays import BaseDtype
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS, Bucket, assign, generate_buckets
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.errors import InputError
from sdxl_jax.finetuning.options import Kind, Options
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.layers import Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

LARGE = 1024
"""Channels of a UNet's widest level from which memory decides. SDXL, SD 1.x and 2.x: 1280."""
FEW, FULL_RATE_FROM = 5, 1000
"""Images below which the user is warned; images from which the whole UNet is trained at 1e-5, as in finetune_1024."""
_RARE, _CROPPED_MORE = 0.1, math.log(4 / 3)
"""A bucket with a smaller share of the images is left out, if its images then lose no more than a quarter."""
_WIDTH = 320
"""Channels of the UNet's first level in SDXL, SD 1.x and 2.x, for which the learning rates are."""
CLASS_IMAGES = 100
"""Of DreamBooth's class, as in diffusers."""
GRIDS = 5
"""Validation grids, checkpoints and files of a run."""


class Images(NamedTuple):
    """The usable images of a folder."""

    sizes: Int32[np.ndarray, "images 2"]
    """(height, width) in pixels, upright."""
    captions: list[tuple[str, ...]]
    """Of each image, as training sees them."""


class Machine(NamedTuple):
    """What is trained on."""

    platform: str
    """ "cpu", "gpu" or "tpu"."""
    devices: int


def choose(
    kind: Kind,
    folder: str,
    class_folder: str,
    images: Images,
    base: str,
    model: ModelConfig,
    machine: Machine,
    options: Options,
) -> TrainConfig:
    """folder: of the images with these captions. class_folder: where DreamBooth's images of the class will be. base:
    the path of the model, whose configuration is `model`."""
    count, on_cpu, is_large = len(images.sizes), machine.platform == "cpu", _is_large(model)
    chosen = buckets(images.sizes, known_buckets(model, options.size))
    batch_size = options.batch_size or machine.devices * (1 if is_large else 4)
    steps = options.steps or steps_for(count, batch_size) * (2 if kind is Kind.DREAMBOOTH else 1)
    every = math.ceil(steps / GRIDS)
    common = TrainConfig(
        data=DataConfig(
            folder=folder, buckets=chosen, batch_size=batch_size, on_refused=OnRefused.SKIP, seed=options.seed
        ),
        model=model,
        compute=Compute(
            dtype=Dtype.FLOAT32 if on_cpu else Dtype.BFLOAT16, remat=Remat.BLOCK if is_large else Remat.NONE
        ),
        optimiser=OptimiserConfig(
            learning_rate=options.learning_rate or learning_rate(kind, count, model),
            warmup_steps=min(50, steps // 10),
            weight_decay=0.01,
        ),
        ema=EmaConfig(decay=0.99),
        training=TrainingConfig(steps=steps, seed=options.seed, caption_dropout=0.1, init_from=(base,)),
        checkpoint=CheckpointConfig(every_steps=every, keep=2),
        validation=ValidationConfig(
            every_steps=every,
            prompts=options.validation_prompt or prompts(images.captions, options.class_prompt),
            sizes=(commonest(images.sizes, chosen),),
            at_start=True,
        ),
    )
    if kind is Kind.DREAMBOOTH:  # half of the examples are of the class
        weight = (options.class_images or CLASS_IMAGES) / count
        sources = Source(folder, weight=weight), Source(class_folder)
        common = replace(common, data=replace(common.data, folder=None, sources=sources))
    if kind is Kind.FULL:
        return replace(common, mesh=MeshConfig(fsdp=machine.devices if is_large else 1))
    return _beside_the_base(common, kind, count, options)


def _is_large(model: ModelConfig) -> bool:
    return max(model.unet.block_channels) >= LARGE


def _beside_the_base(common: TrainConfig, kind: Kind, count: int, options: Options) -> TrainConfig:
    """Training of a file of its own beside the frozen base, which is copied to every device."""
    base_dtype = BaseDtype.BFLOAT16 if _is_large(common.model) else BaseDtype.FLOAT32
    base_dtype = base_dtype if options.quantize is None else BaseDtype(options.quantize)
    exports = replace(common.checkpoint, export_every_steps=common.checkpoint.every_steps)
    if kind is not Kind.TEXTUAL_INVERSION:
        rank = options.rank or rank_for(count, common.model)
        trigger = None if options.trigger is None else options.trigger.strip()
        return replace(
            common,
            training=replace(common.training, caption_dropout=0.05),
            adapter=AdapterConfig(rank=rank, alpha=float(rank), base_dtype=base_dtype, trigger_phrase=trigger),
            checkpoint=exports,
        )
    assert options.trigger is not None
    return replace(
        common,
        training=replace(common.training, caption_dropout=0.0, trainable=()),
        optimiser=replace(common.optimiser, weight_decay=0.0),
        textual_inversion=TextualInversionConfig(
            token=options.trigger.strip(),
            vectors=options.vectors or 2,
            initial=options.initial,
            norm=Norm.MEDIAN,
            base_dtype=base_dtype,
        ),
        checkpoint=exports,
    )


def steps_for(count: int, batch_size: int) -> int:
    """Updates: 100 per image, but 500 to 1500; more only where that is not 10 epochs."""
    return max(min(max(100 * count, 500), 1500), math.ceil(10 * count / batch_size))


def rank_for(count: int, model: ModelConfig) -> int:
    """8 for up to 10 images, 16 for up to 50, 32 for more; no more than the model's narrowest layer has."""
    rank = 8 if count <= 10 else 16 if count <= 50 else 32
    return min(rank, *model.unet.block_channels, model.unet.context_dim or rank)


def learning_rate(kind: Kind, count: int, model: ModelConfig) -> float:
    """Of the UNet's parameters it is higher where the UNet is narrower than SDXL's, in proportion."""
    if kind is Kind.TEXTUAL_INVERSION:
        return 3e-4
    rate = 1e-4 if kind is not Kind.FULL else 1e-5 if count >= FULL_RATE_FROM else 1e-6
    return rate * max(1.0, _WIDTH / model.unet.block_channels[0])


def known_buckets(model: ModelConfig, side: int | None) -> tuple[Bucket, ...]:
    """All buckets with as many pixels as the base's own images, or as a square of that side: SDXL's 40, or others by
    its rule. Raises InputError for too few pixels."""
    height, width = model.default_size if side is None else (side, side)
    if height * width == 1024**2:
        return SDXL_BUCKETS
    multiple = max(8, model.vae.downsampling * 2 ** (len(model.unet.block_channels) - 1))
    multiple = max(64, multiple) if min(model.default_size) >= 512 else multiple  # as in SDXL
    try:
        return generate_buckets(height * width, multiple)
    except InputError:
        raise InputError(
            f"Images of {height}×{width} are too small for this base, which needs sides in multiples of {multiple}. "
            f"Give such a multiple as --size"
        ) from None


def buckets(sizes: Int32[np.ndarray, "images 2"], known: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """Those that the images need. Each has to be compiled, so that one for a few images is left out where they are
    cropped little more in another."""
    counts = np.bincount(assign(sizes, known).bucket, minlength=len(known)).tolist()
    chosen = [bucket for bucket, count in zip(known, counts, strict=True) if count]
    for bucket, count in sorted(zip(known, counts, strict=True), key=lambda pair: pair[1]):
        others = [each for each in chosen if each != bucket]
        if 0 < count < _RARE * len(sizes) and others:
            moved = sizes[assign(sizes, chosen).bucket == chosen.index(bucket)]
            if assign(moved, others).distance.max() <= _CROPPED_MORE:
                chosen = others
    return tuple(chosen)


def commonest(sizes: Int32[np.ndarray, "images 2"], chosen: tuple[Bucket, ...]) -> Bucket:
    """The bucket of the most images."""
    return chosen[np.bincount(assign(sizes, chosen).bucket).argmax()]


def prompts(captions: list[tuple[str, ...]], of_class: str | None = None) -> tuple[str, ...]:
    """Up to four different captions, evenly spread; if there is one alone, that and the same in snow. And the prompt of
    the class, which should stay as it is."""
    known = list(dict.fromkeys(each[0] for each in captions))
    if len(known) == 1:
        known.append(f"{known[0]} in the snow")
    if len(known) > 4:
        known = [known[number * len(known) // 4] for number in range(4)]
    return (*known, *([] if of_class is None else [of_class]))
