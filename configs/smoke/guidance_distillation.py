"""Smoke configuration of configs/guidance_distillation.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/guidance_distillation.py --run-dir smoke/runs/guidance_distillation
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "guidance_distillation.py", TrainConfig))
