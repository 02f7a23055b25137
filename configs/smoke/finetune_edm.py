"""Smoke configuration of configs/finetune_edm.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/finetune_edm.py --run-dir smoke/runs/finetune_edm
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "finetune_edm.py", TrainConfig))
