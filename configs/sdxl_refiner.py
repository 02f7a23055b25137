"""SDXL refiner: a separate network for the 200 lowest timesteps, conditioned on an aesthetic score.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/sdxl_refiner.py --run-dir runs/sdxl_refiner
last run   never at full size; the tests run the smoke configuration configs/smoke/sdxl_refiner.py

Works on the latents of the base: it takes autoencoder and text encoder of runs/sdxl_base_1024_multi_aspect. Its UNet
has other shapes (384 channels, one text encoder), so that it cannot start from the base's weights and starts from
random ones, as the separate model of arXiv:2307.01952, section 2.5. Every image needs the numeric field `aesthetic`
(`sdxl-jax data inspect` lists the fields of the data). The paper gives neither steps, batch size nor learning rate;
those here are ours: docs/guides/recipe.md.
"""

from sdxl_jax.config import CheckpointConfig, CompileAhead, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.model import SDXL_REFINER
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(folder="data/shards", buckets=SDXL_BUCKETS, batch_size=1024, aesthetic="aesthetic"),
        model=SDXL_REFINER,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        loss=LossConfig(timesteps=(0, 200)),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(
            steps=200_000,
            caption_dropout=0.1,
            init_from=("runs/sdxl_base_1024_multi_aspect",),
            init_parts=("vae", "text_encoder_2"),
            compile_ahead=CompileAhead.BACKGROUND,
        ),
        checkpoint=CheckpointConfig(every_steps=2000, keep=3),
        # It cannot sample from pure noise, which it is not trained on: evaluate it on latents of the base.
        validation=ValidationConfig(every_steps=None),
    )
