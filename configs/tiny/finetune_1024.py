"""The smoke configuration of configs/finetune_1024.py: the same run, tiny. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/tiny/finetune_1024.py --run-dir tiny/runs/finetune_1024
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import tiny


def get_config() -> TrainConfig:
    return tiny(load(Path(__file__).parents[1] / "finetune_1024.py", TrainConfig))
