"""The quickstart's student: its model distilled for four steps, so that two CPU cores sample while one watches.

Consistency distillation (LCM) of the whole UNet, on the same images, with the guidance that the quickstart samples with
in the student's weights.
"""

from pathlib import Path

from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.training.objectives.distillation.consistency import ConsistencyConfig
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config(teacher: Path, trained: TrainConfig, guidance: float, steps: int = 300) -> ConsistencyConfig:
    """teacher: the run directory of `trained`. steps: of training."""
    seed = trained.training.seed
    return ConsistencyConfig(
        data=trained.data,
        model=trained.model,
        optimiser=OptimiserConfig(
            learning_rate=2e-4, warmup_steps=15, decay=Decay.COSINE, beta2=0.99, weight_decay=0.0
        ),
        ema=EmaConfig(decay=0.95),
        training=TrainingConfig(
            steps=steps,
            seed=seed,
            trainable=("^unet/",),
            caption_dropout=0.0,
            init_from=(str(teacher),),
            compilation_cache=trained.training.compilation_cache,
        ),
        checkpoint=CheckpointConfig(every_steps=100, keep=1),
        validation=ValidationConfig(every_steps=None),
        teacher=TeacherConfig(guidance=(guidance, guidance)),
        guidance_dim=None,
    )
