"""Stable Diffusion 1.5: the last stage of SD 1, 512×512, predicts ε.

hardware   none tried at full size; the mesh wants a multiple of 8 devices, which share a copy of the state eight ways
hours      unknown
metric     none measured
command    sdxl-jax train configs/sd15.py --run-dir runs/sd15
last run   never at full size; the tests run its smoke configuration, configs/smoke/sd15.py

Starts from SD 1.2, a diffusers directory. 595,000 steps, 10 % of texts left out: the model card of
stable-diffusion-v1-5. AdamW, 2048 images a step, a rate of 1e-4 after 10,000 steps of warm-up: the model card of SD 1
(CompVis/stable-diffusion, Stable_Diffusion_v1_Model_Card.md). The smallest size of images is ours: this model is
not told their size, and would learn what enlarged ones look like.
"""

import math

from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import SD1
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

PROMPTS = ("a red bicycle against a white wall", "a portrait of an old fisherman", "a small house in the mountains")


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((512, 512),),
            max_aspect_distance=math.inf,
            min_size=512,
            batch_size=2048,
        ),
        model=SD1,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(steps=595_000, caption_dropout=0.1, init_from=("weights/stable-diffusion-v1-2",)),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=ValidationConfig(every_steps=5000, prompts=PROMPTS, sizes=((512, 512),), guidance=7.5),
    )
