"""Class-conditional ImageNet at 512×512, conditioned on the original size and the crop: the third model of table 2.

hardware   none tried at full size; the state of 400 million parameters fits on one device of 16 GiB or more
hours      unknown
metric     none measured; the paper reports FID 36.53, IS 215.34 of 5,000 images (arXiv:2307.01952, table 2)
command    sdxl-jax train configs/imagenet_512_size_cond.py --run-dir runs/imagenet_512_size_cond
last run   never at full size; the tests run the smoke configuration configs/smoke/imagenet_512_size_cond.py

Needs ImageNet's training images as shards with their folders as classes,
`sdxl-jax data build imagenet/train data/imagenet --no-captions --class-folders`, and SDXL's published file, for its
autoencoder. Network, conditions and their dropout of 20 % each, learning rate, warm-up and batch size are those of
sgm's `configs/example_training/imagenet-f8_cond.yaml`, which is for 256×256. Not published for table 2: steps, batch
size, crops, average. All three models see centred crops, so that they differ in the size alone.
"""

import math

from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.model import ModelConfig, UnconditionalKind
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.models.unet import ClassConfig, ClassPlace, UNetConfig
from sdxl_jax.models.vae import SDXL_VAE
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig

MICRO = MicroConfig(Numbers.SIZE_CROP)
MODEL = ModelConfig(
    unet=UNetConfig(
        block_channels=(256, 512, 1024),
        transformer_depth=(1, 1, 1),
        middle_depth=1,
        heads=(4, 8, 16),
        context_dim=1024,
        vector_dim=MICRO.vector_dim,
        classes=ClassConfig(1000, ClassPlace.TOKEN),
    ),
    vae=SDXL_VAE,
    text=(),
    micro=MICRO,
    unconditional=UnconditionalKind.ALL_ZEROS,
    default_size=(512, 512),
)


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/imagenet",
            label="folder",
            buckets=((512, 512),),
            max_aspect_distance=math.inf,  # all aspect ratios, cropped to the square
            crop=CropMode.CENTRE,
            batch_size=64,
        ),
        model=MODEL,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01),
        ema=EmaConfig(decay=0.9999),
        training=TrainingConfig(
            steps=500_000,
            caption_dropout=0.0,
            class_dropout=0.2,
            micro_dropout=0.2,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
            init_parts=("vae",),
        ),
        checkpoint=CheckpointConfig(every_steps=5000, keep=3),
        validation=ValidationConfig(
            every_steps=5000, classes=(1, 207, 483, 985), sizes=((512, 512),), steps=50, guidance=5.0
        ),
    )
