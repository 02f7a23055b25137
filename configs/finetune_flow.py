"""SDXL base 1.0 turned into a flow-matching model on your own images, in 40 aspect-ratio buckets.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/finetune_flow.py --run-dir runs/finetune_flow --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/finetune_flow.py

x = (1 − s) x₀ + s ε, and the network predicts ε − x₀ (Lipman et al., arXiv:2210.02747). The published weights predict
ε at 1000 timesteps: `init_changes` says that prediction and noise levels change on purpose. Levels are trained as in
SD 3 (arXiv:2403.03206): logit-normal with mean 0 and deviation 1, shifted by 3, as those that are sampled are. The rest
is ours: three times the learning rate of finetune_1024 and ten times its steps, because there is another target to
learn.
"""

import dataclasses

from sdxl_jax.config import CheckpointConfig, CompileAhead, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.diffusion.continuous import FlowConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.training_levels import LevelDistribution, LevelsConfig
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
        model=dataclasses.replace(SDXL_BASE, noise=FlowConfig(shift=3.0), prediction=Prediction.FLOW),
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        loss=LossConfig(levels=LevelsConfig(LevelDistribution.LOGIT_NORMAL, mean=0.0, deviation=1.0)),
        optimiser=OptimiserConfig(learning_rate=3e-5, warmup_steps=500, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(
            steps=100_000,
            caption_dropout=0.1,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
            init_changes=("prediction", "noise"),
            compile_ahead=CompileAhead.BACKGROUND,
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        validation=ValidationConfig(
            every_steps=500,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
        ),
    )
