"""Fine-tuning of SDXL base 1.0 on your own images, in 40 aspect-ratio buckets of about 1024×1024 pixels.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/finetune_1024.py --run-dir runs/finetune_1024 --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/finetune_1024.py

Starts from the published file, or from any model (`--training.init-from PATH`), such as
runs/sdxl_base_1024_multi_aspect. All numbers are ours: a tenth of the recipe's learning rate, against forgetting, and
an EMA over fewer steps, because the run is short. Offset noise is stage 3's (arXiv:2307.01952, section 2.5).
"""

from sdxl_jax.config import CheckpointConfig, CompileAhead, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        loss=LossConfig(offset_noise=0.05),
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
    )
