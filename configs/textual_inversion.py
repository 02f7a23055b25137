"""A new word for SDXL base 1.0, learnt from your own images: textual inversion, in 40 aspect-ratio buckets of about
1024×1024 pixels.

hardware   none tried at full size; the smoke configuration on CPUs
hours      unknown
metric     none measured
command    sdxl-jax train configs/textual_inversion.py --run-dir runs/textual_inversion --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/textual_inversion.py

Captions contain the word, "a photo of <zwx>"; for images without captions: --data.caption-template "a photo of <zwx>".
Another word: --textual-inversion.token "<dog>". What it begins as: --textual-inversion.initial dog. Starts from the
published file, or from any model (`--training.init-from PATH`). It ends with
runs/textual_inversion/textual_inversion.safetensors, which other programs load, and

    sdxl-jax sample weights/sd_xl_base_1.0.safetensors --embedding "runs/textual_inversion:<zwx>" \
        --prompt "a <zwx> on the moon"

Two vectors in each text encoder: 4,096 numbers. The learning rate, its warm-up and the norm of the vectors are
OneTrainer's; steps and average are ours, for some tens of images. No caption is dropped: without its word an image
teaches nothing.
"""

from sdxl_jax.adapters.embeddings import Norm, TextualInversionConfig
from sdxl_jax.arrays import BaseDtype
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            folder="data/shards",
            buckets=SDXL_BUCKETS,
            small_buckets=SmallBuckets.MERGE,  # with a few images most buckets have few
            batch_size=4,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1),
        optimiser=OptimiserConfig(learning_rate=3e-4, warmup_steps=20, weight_decay=0.0),
        ema=EmaConfig(decay=0.99),
        training=TrainingConfig(
            steps=1000,
            trainable=(),
            caption_dropout=0.0,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        textual_inversion=TextualInversionConfig(
            token="<zwx>", vectors=2, norm=Norm.MEDIAN, base_dtype=BaseDtype.BFLOAT16
        ),
        checkpoint=CheckpointConfig(every_steps=250, keep=2, export_every_steps=250),
        validation=ValidationConfig(every_steps=250, prompts=("a photo of <zwx>",), sizes=((1024, 1024),)),
    )
