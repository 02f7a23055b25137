"""Fine-tuning of a model with EDM's continuous noise levels on your own images: CosXL.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/finetune_edm.py --run-dir runs/finetune_edm --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/finetune_edm.py

Starts from the published file. Noise levels, prediction and sampling defaults are those that it says (its tensors
edm_vpred.sigma_max and edm_vpred.sigma_min); levels are trained as in EDM (arXiv:2206.00364, table 1): log-normal, mean
−1.2, deviation 1.2, and its λ(σ), which is weight 1 for an error in v. Which levels CosXL itself was trained with is
not published. The other numbers are those of finetune_1024.

Playground v2.5 is EDM itself, with latents of its own mean and deviation: take its model from its files, by

    model = sdxl_jax.weights.open.open_model("weights/playground-v2.5").config

and set model=model and init_from to the same path. To turn SDXL base, which predicts ε at 1000 timesteps, into such a
model: --training.init-from weights/sd_xl_base_1.0.safetensors --training.init-changes prediction noise, and many more
steps.
"""

import dataclasses

from sdxl_jax.config import CheckpointConfig, CompileAhead, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.diffusion.continuous import EdmConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.training_levels import LevelDistribution, LevelsConfig
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.samplers.defaults import SamplingDefaults, Sigmas
from sdxl_jax.sharding import MeshConfig

COSXL = dataclasses.replace(
    SDXL_BASE,
    noise=EdmConfig(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0),
    prediction=Prediction.V,
    sampling=SamplingDefaults(sigmas=Sigmas.EXPONENTIAL),
)


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=COSXL,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        loss=LossConfig(levels=LevelsConfig(LevelDistribution.LOG_NORMAL, mean=-1.2, deviation=1.2)),
        optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=500, weight_decay=0.01),
        ema=EmaConfig(decay=0.999),
        training=TrainingConfig(
            steps=10_000,
            caption_dropout=0.1,
            init_from=("weights/cosxl.safetensors",),
            compile_ahead=CompileAhead.BACKGROUND,
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        validation=ValidationConfig(
            every_steps=500,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
        ),
    )
