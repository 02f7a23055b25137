"""Training objectives, one file each. They are listed here: the configuration's type chooses.

`base` defines what an objective is. To add one, add a file beside these, and a line in `OBJECTIVES`.
"""

from typing import Any

from sdxl_jax.config import RunConfig, TrainConfig
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig, Autoencoding
from sdxl_jax.training.objectives.base import Objective
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import (
    AdversarialDiffusion,
    AdversarialDiffusionConfig,
)
from sdxl_jax.training.objectives.distillation.consistency import Consistency, ConsistencyConfig
from sdxl_jax.training.objectives.distillation.distribution_matching import (
    DistributionMatching,
    DistributionMatchingConfig,
)
from sdxl_jax.training.objectives.distillation.guidance import GuidanceDistillation, GuidanceDistillationConfig
from sdxl_jax.training.objectives.distillation.progressive import Progressive, ProgressiveConfig

OBJECTIVES: dict[type[RunConfig], type[Objective[Any]]] = {
    TrainConfig: Denoising,
    AutoencoderConfig: Autoencoding,
    GuidanceDistillationConfig: GuidanceDistillation,
    ConsistencyConfig: Consistency,
    ProgressiveConfig: Progressive,
    DistributionMatchingConfig: DistributionMatching,
    AdversarialDiffusionConfig: AdversarialDiffusion,
}


def objective_of(config: RunConfig) -> Objective[Any]:
    """The objective of a configuration."""
    return OBJECTIVES[type(config)](config)
