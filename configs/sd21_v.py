"""Stable Diffusion 2.1: the last stage of SD 2, 768×768, v-prediction.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/sd21_v.py --run-dir runs/sd21_v
last run   never at full size; the tests run the smoke configuration configs/smoke/sd21_v.py

Starts from SD 2.0 for 768×768, a diffusers directory. 55,000 steps, then 155,000 with other images: the model card
of stable-diffusion-2-1; here they are one run. Batch size, learning rate and warm-up are SD 1's, as in configs/sd15.py.
Caption dropout and min_size are ours.
"""

import dataclasses
import math

from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import SD2
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

PROMPTS = ("a red bicycle against a white wall", "a portrait of an old fisherman", "a small house in the mountains")


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((768, 768),),
            max_aspect_distance=math.inf,
            min_size=768,
            batch_size=2048,
        ),
        model=dataclasses.replace(SD2, prediction=Prediction.V, default_size=(768, 768)),
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(steps=210_000, caption_dropout=0.1, init_from=("weights/stable-diffusion-2",)),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=ValidationConfig(every_steps=5000, prompts=PROMPTS, sizes=((768, 768),), guidance=7.5),
    )
