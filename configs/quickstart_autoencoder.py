"""The quickstart's small autoencoder, as `sdxl-jax quickstart --train-autoencoder` trains it.

hardware   two CPU cores
hours      1.2, with other jobs on the same cores
metric     PSNR, mean of the 96 images: 29.8 dB; the shipped autoencoder, trained on 64×64 crops, has 30.1 dB
last run   29 November 2026, at commit 7de6e17
command    sdxl-jax quickstart --train-autoencoder     (or, once the quickstart has unpacked its images:
           sdxl-jax train configs/quickstart_autoencoder.py)
"""

from sdxl_jax.quickstart.autoencoder import get_config

__all__ = ["get_config"]
