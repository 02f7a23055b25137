"""The smoke configuration of configs/sdxl_base_512.py: the same run, tiny. See sdxl_jax/smoke.py.

command    sdxl-jax train configs/tiny/sdxl_base_512.py --run-dir tiny/runs/sdxl_base_512
"""

from pathlib import Path

from sdxl_jax.config import TrainConfig, load
from sdxl_jax.smoke import tiny


def get_config() -> TrainConfig:
    return tiny(load(Path(__file__).parents[1] / "sdxl_base_512.py", TrainConfig))
