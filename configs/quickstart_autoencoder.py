"""The quickstart's small autoencoder, as `sdxl-jax quickstart --train-autoencoder` trains it.

hardware   two CPU cores
hours      about 1
metric     PSNR of all pictures
command    sdxl-jax quickstart --train-autoencoder     (or, once the quickstart has unpacked its pictures:
           sdxl-jax train configs/quickstart_autoencoder.py)
"""

from sdxl_jax.quickstart.autoencoder import get_config

__all__ = ["get_config"]
