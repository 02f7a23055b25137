"""A student of SDXL base 1.0 for 4 steps by distribution matching: DMD2.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/dmd2.py --run-dir runs/dmd2 --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/dmd2.py

Yin et al. 2024, arXiv:2405.14867. The teacher is the published file, or any model (`--training.init-from PATH`), from
which student and fake score start; a copy of its UNet in bfloat16 is kept beside them. Batch, learning rates, limits of
the gradients, guidance, weights and updates are those of its code for four steps of SDXL, the number of steps that of
its published generator: 57 hours of 64 GPUs there. A step is one of the fake score; every fifth is the student's too.
There the prompts of the student are a set of their own, and the images 500,000 of LAION with an aesthetic score of 6.25
or more; here both are the data's. There is no average, as there: with two UNets that are trained, memory is short.

    sdxl-jax sample runs/dmd2 --prompt "…"

With an adapter (`adapter=AdapterConfig(rank=64, …)`, learning rates of 5e-5) student and fake score are LoRAs beside
one frozen base, which is the teacher too.
"""

import math

from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.distillation.critic import CriticConfig
from sdxl_jax.training.objectives.distillation.distribution_matching import DistributionMatchingConfig, MiddleHeadConfig
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config() -> DistributionMatchingConfig:
    optimiser = OptimiserConfig(learning_rate=5e-7, warmup_steps=0, clip_norm=10.0)
    return DistributionMatchingConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((1024, 1024),),
            max_aspect_distance=math.inf,  # all aspect ratios, cropped to the square
            batch_size=128,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=optimiser,
        ema=EmaConfig(EmaKind.NONE),
        training=TrainingConfig(
            steps=19_000,
            caption_dropout=0.0,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=2),
        validation=ValidationConfig(
            every_steps=500,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
            steps=4,
            guidance=1.0,
        ),
        teacher=TeacherConfig(guidance=(8.0, 8.0)),
        critic=CriticConfig(updates=5, optimiser=optimiser),
        steps=4,
        head=MiddleHeadConfig(layers=3, student_weight=5e-3, critic_weight=1e-2),
    )
