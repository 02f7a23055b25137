"""Stable Diffusion's smoother decoder, ft-MSE: the decoder of ft-EMA trained on with squared errors.

hardware   none tried at full size
hours      unknown
metric     none measured; its card reports on COCO 2017's validation images at 256×256: rFID 4.70, PSNR 24.5, SSIM 0.71
command    sdxl-jax train configs/ft_mse.py --run-dir runs/ft_mse
last run   never at full size; the tests run the smoke configuration configs/smoke/ft_mse.py

Needs images at data/shards, `sdxl-jax evaluate --fetch-weights`, and the run of configs/ft_ema.py.

The card of `stabilityai/sd-vae-ft-mse`: 280,000 steps after ft-EMA with MSE + 0.1 · LPIPS and EMA weights, the decoder
alone, batch 192, the same data. It names no adversarial term, so there is none here. Learning rate and decay are ours.
"""

from dataclasses import replace
from pathlib import Path

from sdxl_jax.config import load
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig, PixelLoss, Reduction


def get_config() -> AutoencoderConfig:
    before = load(Path(__file__).with_name("ft_ema.py"), AutoencoderConfig)
    return replace(
        before,
        loss=AutoencodingLossConfig(
            edge_weight=0.0, kl_weight=0.0, pixel=PixelLoss.L2, reduction=Reduction.SUM, perceptual_weight=0.1
        ),
        discriminator=None,
        training=replace(before.training, steps=280_000, init_from=("runs/ft_ema",)),
    )
