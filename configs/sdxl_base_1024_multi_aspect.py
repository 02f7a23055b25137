"""SDXL base, stage 3 of 3: continues stage 2 in 40 aspect-ratio buckets of about 1024×1024 pixels, with offset noise.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/sdxl_base_1024_multi_aspect.py --run-dir runs/sdxl_base_1024_multi_aspect
last run   never at full size; the tests run the smoke configuration configs/smoke/sdxl_base_1024_multi_aspect.py

Starts from the EMA weights of runs/sdxl_base_512. Buckets and offset noise 0.05: arXiv:2307.01952, sections 2.3 and
2.5, appendix I. The paper gives neither steps nor batch size; 100,000 steps of 1024 images are ours:
docs/guides/recipe.md.
"""

from sdxl_jax.config import CheckpointConfig, CompileAhead, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

PROMPTS = ("a red bicycle against a white wall", "a portrait of an old fisherman", "a small house in the mountains")


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(folder="data/shards", buckets=SDXL_BUCKETS, batch_size=1024),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        loss=LossConfig(offset_noise=0.05),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=1000, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(
            steps=100_000,
            caption_dropout=0.1,
            init_from=("runs/sdxl_base_512",),
            compile_ahead=CompileAhead.BACKGROUND,
        ),
        checkpoint=CheckpointConfig(every_steps=2000, keep=3),
        validation=ValidationConfig(every_steps=2000, prompts=PROMPTS, sizes=((1024, 1024), (1344, 768), (832, 1216))),
    )
