"""SDXL base 1.0 turned into a model that predicts v, with zero terminal SNR: first its last layer, then all of it.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/finetune_v_pred.py --run-dir runs/finetune_v_pred --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/finetune_v_pred.py

Two runs, as NoobAI XL did it. This one trains the last convolution alone, at 3e-6, so that the rest is not pulled
towards an output of the wrong kind. The second begins with its weights and trains the whole UNet:

    sdxl-jax train configs/finetune_v_pred.py --run-dir runs/finetune_v_pred_all --data.folder IMAGES
        --training.init-from runs/finetune_v_pred --training.trainable ^unet/ --training.steps 50000
        --optimiser.learning-rate 1e-5

Their numbers of steps are ours, and so is the rate of the second. The published weights predict ε with a schedule that
leaves some of the image at its last timestep: `init_changes` says that both change on purpose. Exported files say what
they are: prediction_type and rescale_betas_zero_snr in a diffusers directory, the tensors v_pred and ztsnr in a single
file, by which ComfyUI and others know it. Sampled with ddim and trailing timesteps by default; guidance 3 to 5.
"""

import dataclasses

from sdxl_jax.config import CheckpointConfig, CompileAhead, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

MODEL = dataclasses.replace(SDXL_BASE, schedule=ScheduleConfig(zero_terminal_snr=True), prediction=Prediction.V)


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few thousand images most buckets have few
            batch_size=64,
        ),
        model=MODEL,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=3e-6, warmup_steps=100, weight_decay=0.01),
        ema=EmaConfig(decay=0.999),
        training=TrainingConfig(
            steps=2000,
            trainable=("^unet/conv_out/",),
            caption_dropout=0.1,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
            init_changes=("prediction", "schedule"),
            compile_ahead=CompileAhead.BACKGROUND,
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        validation=ValidationConfig(
            every_steps=500,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
        ),
    )
