"""Smoke configuration of configs/ft_mse.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/ft_mse.py --run-dir smoke/runs/ft_mse
"""

from pathlib import Path

from sdxl_jax.config import load
from sdxl_jax.smoke import smoke_autoencoder
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig


def get_config() -> AutoencoderConfig:
    return smoke_autoencoder(load(Path(__file__).parents[1] / "ft_mse.py", AutoencoderConfig))
