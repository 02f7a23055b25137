"""SDXL base 1.0 turned into a model for inpainting: its UNet sees a mask, and the image without what is masked.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/inpaint.py --run-dir runs/inpaint --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/inpaint.py

The first convolution gets five input channels, which begin at zero, and the whole UNet is trained, as Stable
Diffusion's inpainting models were: random masks of LaMa's strategy, a quarter of them of the whole image. From SDXL's
own inpainting model: --training.init-from PATH, which has the five channels already. The other numbers are those of
finetune_1024. Sampled with

    sdxl-jax sample runs/inpaint --init-image IMAGE --mask MASK --prompt TEXT --out DIR
"""

import dataclasses

from sdxl_jax.config import (
    CheckpointConfig,
    CompileAhead,
    InpaintingConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

MODEL = dataclasses.replace(SDXL_BASE, unet=dataclasses.replace(SDXL_BASE.unet, in_channels=9))


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=MODEL,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=500, weight_decay=0.01),
        ema=EmaConfig(decay=0.999),
        training=TrainingConfig(
            steps=10_000,
            caption_dropout=0.1,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
            compile_ahead=CompileAhead.BACKGROUND,
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        validation=ValidationConfig(
            every_steps=500,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
        ),
        inpainting=InpaintingConfig(whole_share=0.25, box_share=0.5),
    )
