"""The smoke configuration of configs/sd15.py: the same run, tiny. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/tiny/sd15.py --run-dir tiny/runs/sd15
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import tiny


def get_config() -> TrainConfig:
    return tiny(load(Path(__file__).parents[1] / "sd15.py", TrainConfig))
