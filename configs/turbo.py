"""A student of SDXL base 1.0 for 1 to 4 steps by adversarial diffusion distillation (ADD), as SDXL-Turbo is.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: each copy of the state is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/turbo.py --run-dir runs/turbo --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/turbo.py

Sauer et al. 2023, arXiv:2311.17042. The teacher is the published file, or any model (`--training.init-from PATH`), from
which the student starts; a copy of its UNet in bfloat16 is kept beside it. The size of images, batch, number of steps,
weights of the distance and of R1, and DINOv2's size S are the paper's. Ours, because the paper does not say them or we
have not read them there: both learning rates, the teacher's guidance, that there is no average. Of other networks than
there is what the heads are conditioned on: the pooled text of the model's own encoder (there CLIP ViT-g-14) and the
class token of the same DINOv2 (there of size L).

weights/dinov2-small is DINOv2 as transformers has it (facebook/dinov2-small): config.json and model.safetensors.
Without it, VGG16 stands in: `discriminator=FeatureDiscriminatorConfig()`, after `sdxl-jax evaluate --fetch-weights`.

    sdxl-jax sample runs/turbo --prompt "…"
"""

import math

from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.dinov2 import DINOV2_S
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import (
    AdversarialDiffusionConfig,
    DiscriminatorCondition,
    DistillationWeighting,
    FeatureDiscriminatorConfig,
)
from sdxl_jax.training.objectives.distillation.critic import CriticConfig
from sdxl_jax.training.objectives.distillation.teacher import TeacherConfig


def get_config() -> AdversarialDiffusionConfig:
    return AdversarialDiffusionConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=((512, 512),),
            max_aspect_distance=math.inf,  # all aspect ratios, cropped to the square
            batch_size=128,
        ),
        model=SDXL_BASE,
        compute=Compute(
            dtype=Dtype.BFLOAT16,
            attention=Attention.AUTO,
            remat=Remat.BLOCK,
            compiler_options=("xla_tpu_scoped_vmem_limit_kib=65536",),  # without it v5p's compiler refuses the step
        ),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=100),
        ema=EmaConfig(EmaKind.NONE),
        training=TrainingConfig(
            steps=4000,
            caption_dropout=0.0,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        checkpoint=CheckpointConfig(every_steps=250, keep=2),
        validation=ValidationConfig(
            every_steps=250,
            prompts=("what your images show, in words of their captions",),
            sizes=((512, 512),),
            steps=4,
            guidance=1.0,
        ),
        teacher=TeacherConfig(guidance=(7.5, 7.5)),
        critic=CriticConfig(updates=1, optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=0)),
        discriminator=FeatureDiscriminatorConfig(
            dinov2=DINOV2_S,
            weights="weights/dinov2-small",
            condition=DiscriminatorCondition.BOTH,
            r1_weight=1e-5,
        ),
        steps=4,
        distillation_weight=2.5,
        weighting=DistillationWeighting.EXPONENTIAL,
    )
