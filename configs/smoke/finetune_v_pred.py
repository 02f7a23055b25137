"""Smoke configuration of configs/finetune_v_pred.py: the same run, small. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/smoke/finetune_v_pred.py --run-dir smoke/runs/finetune_v_pred
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import smoke_config


def get_config() -> TrainConfig:
    return smoke_config(load(Path(__file__).parents[1] / "finetune_v_pred.py", TrainConfig))
