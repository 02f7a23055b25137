"""Smoke configuration of configs/sd_kl_f8.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/sd_kl_f8.py --run-dir smoke/runs/sd_kl_f8
"""

from pathlib import Path

from sdxl_jax.config import load
from sdxl_jax.smoke import smoke_autoencoder
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig


def get_config() -> AutoencoderConfig:
    return smoke_autoencoder(load(Path(__file__).parents[1] / "sd_kl_f8.py", AutoencoderConfig))
