"""Pivotal tuning of SDXL base 1.0: a new word and a LoRA together, on your own images, in 40 aspect-ratio buckets of
about 1024×1024 pixels.

hardware   none tried at full size; the smoke configuration on CPUs
hours      unknown
metric     none measured
command    sdxl-jax train configs/pivotal.py --run-dir runs/pivotal --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/pivotal.py

Captions contain the word, "a photo of <zwx>"; for images without captions: --data.caption-template "a photo of <zwx>".
Another word: --textual-inversion.token "<dog>". Starts from the published file, or from any model
(`--training.init-from PATH`). It ends with pivotal.safetensors, the LoRA, and pivotal_emb.safetensors, the word, in
runs/pivotal, which other programs load, and

    sdxl-jax sample weights/sd_xl_base_1.0.safetensors --lora runs/pivotal --embedding "runs/pivotal:<zwx>" \
        --prompt "a <zwx> on the moon"

As in diffusers' script the vectors begin at random, are pulled back to the deviation of the table, and stop after half
of the steps. Their learning rate, three times the LoRA's, is OneTrainer's; the rest is as in lora_1024.
"""

from sdxl_jax.adapters.embeddings import Norm, TextualInversionConfig
from sdxl_jax.adapters.targets import AdapterConfig, Layers
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
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=50, weight_decay=0.01),
        ema=EmaConfig(decay=0.99),
        training=TrainingConfig(
            steps=1000,
            trainable=("^unet/",),
            caption_dropout=0.05,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        adapter=AdapterConfig(rank=16, alpha=16.0, layers=Layers.ATTENTION, base_dtype=BaseDtype.BFLOAT16),
        textual_inversion=TextualInversionConfig(token="<zwx>", vectors=2, norm=Norm.DEVIATION, rate=3.0, stop=0.5),
        checkpoint=CheckpointConfig(every_steps=250, keep=2, export_every_steps=250),
        validation=ValidationConfig(every_steps=250, prompts=("a photo of <zwx>",), sizes=((1024, 1024),)),
    )
