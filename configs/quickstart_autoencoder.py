"""The quickstart's small autoencoder, as `sdxl-jax quickstart --train-autoencoder` trains it.

hardware   two CPU cores
hours      not measured; about one is expected
metric     PSNR of all images: not measured. The shipped autoencoder, trained on 64×64 crops, has 29.7 dB
command    sdxl-jax quickstart --train-autoencoder     (or, once the quickstart has unpacked its images:
           sdxl-jax train configs/quickstart_autoencoder.py)
"""

from sdxl_jax.quickstart.autoencoder import get_config

__all__ = ["get_config"]
