"""What can be learnt, one file each. This is where objectives are listed: the configuration's type chooses.

`base` says what an objective is. Another one is a file beside these, and a line in `OBJECTIVES`.
"""

from typing import Any

from sdxl_jax.config import RunConfig, TrainConfig
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig, Autoencoding
from sdxl_jax.training.objectives.base import Objective
from sdxl_jax.training.objectives.denoising import Denoising

OBJECTIVES: dict[type[RunConfig], type[Objective[Any]]] = {
    TrainConfig: Denoising,
    AutoencoderConfig: Autoencoding,
}


def objective_of(config: RunConfig) -> Objective[Any]:
    """The objective that a configuration is of."""
    return OBJECTIVES[type(config)](config)
