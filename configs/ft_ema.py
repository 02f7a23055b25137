"""Stable Diffusion's improved decoder, ft-EMA: the decoder of kl-f8 trained on, with averaged weights.

hardware   none tried at full size
hours      unknown
metric     none measured; its card reports on COCO 2017's validation images at 256×256: rFID 4.42, PSNR 23.8, SSIM 0.69
command    sdxl-jax train configs/ft_ema.py --run-dir runs/ft_ema
last run   never at full size; the tests run the smoke configuration configs/smoke/ft_ema.py

Needs images at data/shards (`sdxl-jax data build`; captions are not needed), `sdxl-jax evaluate --fetch-weights`, and
the autoencoder to begin with: here the one in a directory of Stable Diffusion 1.x.

The card of `stabilityai/sd-vae-ft-ema`: 313,198 steps after kl-f8 with the same loss (L1 + LPIPS) and EMA weights, the
decoder alone, batch 192, LAION-Aesthetics and LAION-Humans 1:1. It gives no learning rate, decay or crop, and the
published file has no discriminator: its first step, the learning rate and the decay are ours. The step is joint
(docs/decisions/adversarial-step.md).
"""

import math

from sdxl_jax.config import CheckpointConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.models.layers import Compute, Remat
from sdxl_jax.models.vae import SD_VAE
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.adversarial import DiscriminatorConfig
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig, Reduction


def get_config() -> AutoencoderConfig:
    adam = OptimiserConfig(
        learning_rate=4e-5, warmup_steps=1000, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_norm=None
    )
    return AutoencoderConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((256, 256),),
            max_aspect_distance=math.inf,
            batch_size=192,
        ),
        vae=SD_VAE,
        compute=Compute(remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1),
        loss=AutoencodingLossConfig(edge_weight=0.0, kl_weight=0.0, reduction=Reduction.SUM, perceptual_weight=1.0),
        discriminator=DiscriminatorConfig(start_step=5001, weight=0.5, optimiser=adam),
        optimiser=adam,
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.9999),
        training=AutoencodingLoopConfig(
            steps=313_198,
            trainable=("^vae/decoder/",),
            init_from=("weights/stable-diffusion-v1-2",),
            init_parts=("vae",),
        ),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=AutoencodingValidationConfig(every_steps=5000, images=8),
    )
