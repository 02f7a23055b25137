"""Smoke configuration of configs/lcm_lora.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/lcm_lora.py --run-dir smoke/runs/lcm_lora
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "lcm_lora.py", TrainConfig))
