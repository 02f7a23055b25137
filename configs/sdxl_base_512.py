"""SDXL base, stage 2 of 3: continues stage 1 at 512×512.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/sdxl_base_512.py --run-dir runs/sdxl_base_512
last run   never at full size; the tests run the smoke configuration configs/smoke/sdxl_base_512.py

Starts from the EMA weights of runs/sdxl_base_256. 200,000 steps: arXiv:2307.01952, section 2.5, which does not give the
batch size; 2048 is stage 1's. The optimiser state is new, hence the short warm-up. Our own choices:
docs/guides/recipe.md.
"""

import math

from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import SDXL_BASE
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
            max_aspect_distance=math.inf,  # algorithm 1: all aspect ratios, cropped to the square
            batch_size=2048,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=1000, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(steps=200_000, caption_dropout=0.1, init_from=("runs/sdxl_base_256",)),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=ValidationConfig(every_steps=5000, prompts=PROMPTS, sizes=((512, 512),)),
    )
