"""A latent consistency model of SDXL base 1.0: 4 to 8 steps, with guidance as an input of the UNet.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/lcm.py --run-dir runs/lcm --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/lcm.py

Luo et al. 2023, arXiv:2310.04378. The teacher is the published file, or any model (`--training.init-from PATH`), from
which the student starts; a copy of its UNet in bfloat16 is kept beside it. Guidance of 4 to 16 (w of 3 to 15), the
average's decay of 0.95, which is also the target, and the learning rate are those of diffusers' script for SDXL, the
number of steps that of its example; there the batch is 12. The images are any with captions: the student learns what
the teacher makes of them.

    sdxl-jax sample runs/lcm --prompt "…"
"""

from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.distillation.consistency import ConsistencyConfig
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config() -> ConsistencyConfig:
    return ConsistencyConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-6, warmup_steps=0, weight_decay=0.0),
        ema=EmaConfig(EmaKind.CONSTANT, decay=0.95),
        training=TrainingConfig(
            steps=1000,
            caption_dropout=0.0,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        checkpoint=CheckpointConfig(every_steps=250, keep=2),
        validation=ValidationConfig(
            every_steps=250,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
            steps=4,
            guidance=8.5,
        ),
        teacher=TeacherConfig(guidance=(4.0, 16.0)),
        guidance_dim=256,
    )
