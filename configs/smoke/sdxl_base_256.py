"""Smoke configuration of configs/sdxl_base_256.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/sdxl_base_256.py --run-dir smoke/runs/sdxl_base_256
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "sdxl_base_256.py", TrainConfig))
