"""SDXL base 1.0 with guidance as an input of the UNet: one evaluation per step in the place of two.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/guidance_distillation.py --run-dir runs/guidance_distillation --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/guidance_distillation.py

Stage 1 of Meng et al. 2023, arXiv:2210.03142; guidance of 1 to 15 (w of 0 to 14) is what the paper has for Stable
Diffusion. All other numbers are ours. The teacher is the published file, or any model (`--training.init-from PATH`),
from which the student starts; a copy of its UNet in bfloat16 is kept beside it. The result is sampled as before, in the
same number of steps, and is a teacher for configs/lcm.py and configs/progressive.py (--model.unet.guidance-dim 256).
"""

from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.distillation.guidance import GuidanceDistillationConfig
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config() -> GuidanceDistillationConfig:
    return GuidanceDistillationConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=500, weight_decay=0.01),
        ema=EmaConfig(decay=0.999),
        training=TrainingConfig(
            steps=10_000,
            caption_dropout=0.0,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=2),
        validation=ValidationConfig(
            every_steps=500,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
            steps=30,
            guidance=5.0,
        ),
        teacher=TeacherConfig(guidance=(1.0, 15.0)),
    )
