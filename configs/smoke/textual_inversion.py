"""Smoke configuration of configs/textual_inversion.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/textual_inversion.py --run-dir smoke/runs/textual_inversion
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "textual_inversion.py", TrainConfig))
