"""Stable Diffusion's first autoencoder, from random weights: latent-diffusion's kl-f8.

hardware   none tried at full size
hours      unknown
metric     none measured; its authors report on ImageNet's validation images at 256×256: rFID 0.90, PSNR 24.19
command    sdxl-jax train configs/sd_kl_f8.py --run-dir runs/sd_kl_f8
last run   never at full size; the tests run the smoke configuration configs/smoke/sd_kl_f8.py

Needs images at data/shards (`sdxl-jax data build`; captions are not needed), and `sdxl-jax evaluate --fetch-weights`.

latent-diffusion, `models/first_stage_models/kl-f8/config.yaml`: sums over an image, LPIPS × 1, KL × 1e-6, log-variance
fixed at 0 (it is in no optimiser there), discriminator × 0.5 from step 50,001, Adam (0.5, 0.9) at 4.5e-6 × batch for
both networks, no average, 246,803 steps. Batch 9: arXiv:2112.10752, first version, appendix on Stable Diffusion's
predecessors. Different here: OpenImages was cropped to 256 from a short side of 384, here the short side is 256; the
step is joint (docs/decisions/adversarial-step.md), there the discriminator gets a forward pass of its own.
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

BATCH = 9


def get_config() -> AutoencoderConfig:
    adam = OptimiserConfig(
        learning_rate=4.5e-6 * BATCH, warmup_steps=0, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_norm=None
    )
    return AutoencoderConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((256, 256),),
            max_aspect_distance=math.inf,
            batch_size=BATCH,
        ),
        vae=SD_VAE,
        compute=Compute(remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1),
        loss=AutoencodingLossConfig(edge_weight=0.0, kl_weight=1e-6, reduction=Reduction.SUM, perceptual_weight=1.0),
        discriminator=DiscriminatorConfig(start_step=50_001, weight=0.5, optimiser=adam),
        optimiser=adam,
        ema=EmaConfig(kind=EmaKind.NONE),
        training=AutoencodingLoopConfig(steps=246_803),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=AutoencodingValidationConfig(every_steps=5000, images=8),
    )
