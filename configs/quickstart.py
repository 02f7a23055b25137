"""SDXL in small, as `sdxl-jax quickstart` trains it.

hardware   two CPU cores, 3 GB of memory
hours      0.15
metric     prompt accuracy at least 75 %
command    sdxl-jax quickstart        (or, once it has unpacked its pictures: sdxl-jax train configs/quickstart.py)
"""

from sdxl_jax.quickstart.recipe import get_config

__all__ = ["get_config"]
