"""SDXL's autoencoder, from random weights: the one of Stable Diffusion, with batch 256 and averaged weights.

hardware   none tried at full size; the step is compiled for v5p:2x2x1 and h200:8 (docs/guides/autoencoder.md)
hours      unknown
metric     none measured
command    sdxl-jax train configs/sdxl_vae.py --run-dir runs/sdxl_vae
last run   never at full size; the tests run the smoke configuration configs/smoke/sdxl_vae.py

Needs images at data/shards (`sdxl-jax data build`; captions are not needed), and `sdxl-jax evaluate --fetch-weights`.

arXiv:2307.01952, section 2.4: the same architecture, batch 256 in place of 9, an exponential moving average. 500,000
steps: its appendix on autoencoders. Loss and optimiser are those of latent-diffusion's kl-f8 (configs/sd_kl_f8.py),
whose KL weight fits the deviation of SDXL's latents, 7.7. Crops: generative-models, `imagenet-kl_f8_8chn.yaml`: the
short side to 256, a random square. The decay of the average is that of `LitEma` there; the paper gives no data,
learning rate or decay. Learning rate, warm-up and bfloat16 activations are ours. The step is joint
(docs/decisions/adversarial-step.md).
"""

import math

from sdxl_jax.config import CheckpointConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.models.layers import Compute, Dtype, Remat
from sdxl_jax.models.vae import SDXL_VAE
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
        learning_rate=1e-4, warmup_steps=5000, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_norm=None
    )
    return AutoencoderConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((256, 256),),
            max_aspect_distance=math.inf,
            batch_size=256,
        ),
        vae=SDXL_VAE,
        compute=Compute(
            dtype=Dtype.BFLOAT16,
            remat=Remat.BLOCK,
            compiler_options=("xla_tpu_scoped_vmem_limit_kib=65536",),  # without it v5p's compiler refuses the step
        ),
        mesh=MeshConfig(data=-1),
        loss=AutoencodingLossConfig(edge_weight=0.0, kl_weight=1e-6, reduction=Reduction.SUM, perceptual_weight=1.0),
        discriminator=DiscriminatorConfig(start_step=50_001, weight=0.5, optimiser=adam),
        optimiser=adam,
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.9999),
        training=AutoencodingLoopConfig(steps=500_000),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=AutoencodingValidationConfig(every_steps=5000, images=8),
    )
