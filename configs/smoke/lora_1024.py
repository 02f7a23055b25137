"""Smoke configuration of configs/lora_1024.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/lora_1024.py --run-dir smoke/runs/lora_1024
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "lora_1024.py", TrainConfig))
