"""A round of progressive distillation of SDXL base 1.0: 64 steps of DDIM, which are 128 of the teacher.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/progressive.py --run-dir runs/progressive --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/progressive.py

Salimans & Ho 2022, arXiv:2202.00512, with guidance as an input, stage 2 of Meng et al., arXiv:2210.03142. A round is a
run, which starts from the one before; the next two rounds, of 32 and 16 steps:

    sdxl-jax train configs/progressive.py --run-dir runs/progressive_32 --steps 32 --validation.steps 32 \\
        --model.unet.guidance-dim 256 --training.init-from runs/progressive --data.folder IMAGES
    sdxl-jax train configs/progressive.py --run-dir runs/progressive_16 --steps 16 --validation.steps 16 \\
        --model.unet.guidance-dim 256 --training.init-from runs/progressive_32 --data.folder IMAGES

Guidance of 1 to 15 (w of 0 to 14) is what the second paper has for Stable Diffusion; all other numbers are ours.
"""

from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.distillation.progressive import ProgressiveConfig
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config() -> ProgressiveConfig:
    return ProgressiveConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=500, weight_decay=0.0),
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
            steps=64,
            guidance=5.0,
        ),
        teacher=TeacherConfig(guidance=(1.0, 15.0)),
        steps=64,
        guidance_dim=256,
    )
