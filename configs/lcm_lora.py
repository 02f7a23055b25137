"""A LoRA that makes a consistency model of SDXL base 1.0 and of its relatives: 4 to 8 steps (LCM-LoRA).

hardware   none tried at full size; the smoke configuration on CPUs
hours      unknown
metric     none measured
command    sdxl-jax train configs/lcm_lora.py --run-dir runs/lcm_lora --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/lcm_lora.py

Luo et al. 2023, arXiv:2311.05556. The teacher is the frozen base itself, without the adapter: no more memory than any
LoRA. Rank 64 on 788 layers, 196,751,360 parameters, and the learning rate are those of the published LCM-LoRA and of
diffusers' script; guidance of 8.5 (w of 7.5) is in the weights, and the target is the adapter's own. It ends with
runs/lcm_lora/lcm_lora.safetensors, which other programs load, alone or beside a style:

    sdxl-jax sample weights/sd_xl_base_1.0.safetensors --lora runs/lcm_lora --prompt "…"
"""

from sdxl_jax.adapters.targets import AdapterConfig, Layers
from sdxl_jax.arrays import BaseDtype
from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.distillation.consistency import ConsistencyConfig, ConsistencyTarget
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config() -> ConsistencyConfig:
    return ConsistencyConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=16,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0),
        ema=EmaConfig(EmaKind.NONE),
        training=TrainingConfig(
            steps=1000,
            caption_dropout=0.0,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        adapter=AdapterConfig(rank=64, alpha=64.0, layers=Layers.BLOCKS, base_dtype=BaseDtype.BFLOAT16),
        checkpoint=CheckpointConfig(every_steps=250, keep=2, export_every_steps=250),
        validation=ValidationConfig(
            every_steps=250,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
            steps=4,
            guidance=1.0,
        ),
        teacher=TeacherConfig(guidance=(8.5, 8.5)),
        guidance_dim=None,
        target=ConsistencyTarget.STUDENT,
    )
