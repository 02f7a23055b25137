"""A LoRA of SDXL base 1.0 on your own images, in 40 aspect-ratio buckets of about 1024×1024 pixels.

hardware   none tried at full size; by the compiler one TPU v5e chip suffices (docs/guides/finetuning.md)
hours      unknown
metric     none measured
command    sdxl-jax train configs/lora_1024.py --run-dir runs/lora_1024 --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/lora_1024.py

Starts from the published file, or from any model (`--training.init-from PATH`), such as runs/finetune_1024. It ends
with runs/lora_1024/lora_1024.safetensors, which other programs load, and

    sdxl-jax sample weights/sd_xl_base_1.0.safetensors --lora runs/lora_1024 --prompt "…"

Rank 16 on attention: 23,224,320 parameters. The learning rate is that of most other programs (sd-scripts, diffusers,
SimpleTuner); steps, average and dropout are ours, for some tens of images. Another kind: --adapter.kind lokr; more
layers: --adapter.layers linear; text encoders too: --training.trainable "^unet/" "^text_encoder".
"""

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
        checkpoint=CheckpointConfig(every_steps=250, keep=2, export_every_steps=250),
        validation=ValidationConfig(
            every_steps=250,
            prompts=("what your images show, in words of their captions",),
            sizes=((1024, 1024),),
        ),
    )
