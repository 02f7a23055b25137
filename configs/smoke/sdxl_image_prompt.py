"""Smoke configuration of configs/sdxl_image_prompt.py: the same run, small. See sdxl_jax/smoke.py.

first      sdxl-jax data encode configs/smoke/sdxl_image_prompt.py
command    sdxl-jax train configs/smoke/sdxl_image_prompt.py --run-dir smoke/runs/sdxl_image_prompt
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "sdxl_image_prompt.py", TrainConfig))
