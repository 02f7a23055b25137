"""Smoke configuration of configs/decoder_only.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/decoder_only.py --run-dir smoke/runs/decoder_only
"""

from pathlib import Path

from sdxl_jax.config import load
from sdxl_jax.smoke import smoke_autoencoder
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig


def get_config() -> AutoencoderConfig:
    return smoke_autoencoder(load(Path(__file__).parents[1] / "decoder_only.py", AutoencoderConfig))
