"""The decoder of SDXL's autoencoder, fine-tuned on your own images; the latents stay as they are.

hardware   none tried at full size
hours      unknown
metric     none measured
command    sdxl-jax train configs/decoder_only.py --run-dir runs/decoder_only --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/decoder_only.py

Needs images (captions are not needed), `sdxl-jax evaluate --fetch-weights`, and the published model's file, or any
other that has its autoencoder. Every UNet for SDXL works with the result.

The encoder's parameters keep their bits. L1 + LPIPS, means over all elements, no adversarial term: enough for a few
thousand images. All numbers are ours. To keep textures sharp, add a discriminator as in configs/ft_ema.py.
"""

import math

from sdxl_jax.config import CheckpointConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.models.layers import Compute, Remat
from sdxl_jax.models.vae import SDXL_VAE
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig


def get_config() -> AutoencoderConfig:
    return AutoencoderConfig(
        data=DataConfig(
            folder="data/images",
            buckets=((256, 256),),
            max_aspect_distance=math.inf,
            batch_size=16,
        ),
        vae=SDXL_VAE,
        compute=Compute(remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1),
        loss=AutoencodingLossConfig(edge_weight=0.0, kl_weight=0.0, perceptual_weight=0.5),
        optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=200, decay=Decay.COSINE, weight_decay=0.0),
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.999),
        training=AutoencodingLoopConfig(
            steps=20_000,
            trainable=("^vae/decoder/",),
            init_from=("weights/sd_xl_base_1.0.safetensors",),
            init_parts=("vae",),
        ),
        checkpoint=CheckpointConfig(every_steps=1000, keep=3),
        validation=AutoencodingValidationConfig(every_steps=1000, images=8),
    )
