"""The tiny autoencoder (TAESDXL): a new decoder for the latents of its frozen encoder; or the whole.

hardware   none tried at full size
hours      unknown
metric     none measured
command    sdxl-jax train configs/taesd.py --run-dir runs/taesd
last run   never at full size; the tests run the smoke configuration configs/smoke/taesd.py

Needs images at data/shards (`sdxl-jax data build`; captions are not needed), `sdxl-jax evaluate --fetch-weights`, and
the published encoder, whose latents are SDXL's. The decoder begins at random; add its file to training.init_from to
train it on. The whole: --training.trainable ^vae/ --training.init-from "" makes latents of its own, which no published
UNet knows.

Its author has published weights, network and this division of the work (github.com/madebyollin/taesd), not a training
configuration: loss, learning rate and steps are ours. It has no log-variance, hence no KL divergence.
"""

import math

from sdxl_jax.config import CheckpointConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.models.patchgan import Norm, PatchGanConfig
from sdxl_jax.models.taesd import TAESDXL
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.adversarial import DiscriminatorConfig
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig


def get_config() -> AutoencoderConfig:
    adam = OptimiserConfig(
        learning_rate=3e-4, warmup_steps=1000, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_norm=None
    )
    return AutoencoderConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((256, 256),),
            max_aspect_distance=math.inf,
            batch_size=32,
        ),
        vae=TAESDXL,
        compute=Compute(),
        mesh=MeshConfig(data=-1),
        loss=AutoencodingLossConfig(edge_weight=0.0, kl_weight=0.0, perceptual_weight=0.5),
        discriminator=DiscriminatorConfig(
            network=PatchGanConfig(norm=Norm.GROUP), start_step=20_000, weight=0.1, lecam_weight=0.001, optimiser=adam
        ),
        optimiser=adam,
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.999),
        training=AutoencodingLoopConfig(
            steps=200_000,
            trainable=("^vae/decoder/",),
            init_from=("weights/taesdxl_encoder.safetensors",),
        ),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=AutoencodingValidationConfig(every_steps=5000, images=8),
    )
