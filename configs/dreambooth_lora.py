"""A LoRA of one subject, from some 4 to 20 images of it, with prior preservation: DreamBooth on SDXL base 1.0.

hardware   none tried at full size; the smoke configuration on CPUs
hours      unknown
metric     none measured
command    sdxl-jax train configs/dreambooth_lora.py --run-dir runs/dreambooth_lora --data.trigger "sks dog"
last run   never at full size; the tests run the smoke configuration configs/smoke/dreambooth_lora.py

The images of the subject are in data/subject and need no captions: all of them get "a photo of sks dog". Those of its
class are in data/class. They are sampled first, once:

    sdxl-jax data class-images weights/sd_xl_base_1.0.safetensors data/class --prompt "a photo of a dog"

Half of the examples are of the class where the subject has 10 images and the class 100: Source.weight is how often an
image is seen per epoch. Class prompt and weight of the prior (1) are those of the paper (Ruiz et al. 2022,
arXiv:2208.12242), 100 images those of diffusers' script; rank, rate and steps are of configs/lora_1024.py. Without
images of the class: Source("data/subject", caption_template="a photo of a dog", target=Target.BASE) in its place.
"""

from sdxl_jax.adapters.targets import AdapterConfig, Layers
from sdxl_jax.arrays import BaseDtype
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            sources=(
                Source("data/subject", weight=10.0, caption_template="a photo of {trigger}"),
                Source("data/class", loss_weight=1.0),
            ),
            trigger="sks dog",
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
            prompts=("a photo of sks dog on a beach", "a photo of a dog"),
            sizes=((1024, 1024),),
        ),
    )
