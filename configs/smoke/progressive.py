"""Smoke configuration of configs/progressive.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/progressive.py --run-dir smoke/runs/progressive
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "progressive.py", TrainConfig))
