"""Image prompts for SDXL base 1.0: the layer that reads the pooled text learns to read the embedding of an image.

hardware   none tried at full size; the mesh needs a multiple of 8 devices: the frozen UNet is split over 8
hours      unknown
metric     none measured
command    sdxl-jax train configs/sdxl_image_prompt.py --run-dir runs/sdxl_image_prompt --data.folder IMAGES
last run   never at full size; the tests run the smoke configuration configs/smoke/sdxl_image_prompt.py

Podell et al. (arXiv:2307.01952), section 2.6: 1000 steps, the one layer, the image's embedding by OpenCLIP's ViT-bigG
in the place of its pooled text. Data, batch, learning rate and dropout are not published: all other numbers are ours.
The layer is add_embedding: 5,245,440 of 2,567,463,684 parameters. For the 1,638,400 that read the pooled vector alone:
--image-prompt.pooled-rows-alone True --training.trainable "^unet/add_embedding/linear_1/kernel$".

Encode first, with the same options: sdxl-jax data encode configs/sdxl_image_prompt.py --data.folder IMAGES. The image
tower is published as clip_vision_g.safetensors, in Stability's control-lora repository, in its folder revision.
"""

from sdxl_jax.config import CheckpointConfig, ImagePromptConfig, TrainConfig, TrainingConfig, ValidationConfig
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
            small_buckets=SmallBuckets.MERGE,
            batch_size=64,
            cache="data/image_prompts",
            crops_per_image=1,
        ),
        model=SDXL_BASE,
        compute=Compute(dtype=Dtype.BFLOAT16, attention=Attention.AUTO, remat=Remat.BLOCK),
        mesh=MeshConfig(data=-1, fsdp=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=50, weight_decay=0.0),
        ema=EmaConfig(decay=0.99),
        training=TrainingConfig(
            steps=1000,
            trainable=("^unet/add_embedding/",),
            caption_dropout=0.1,
            init_from=("weights/sd_xl_base_1.0.safetensors",),
        ),
        checkpoint=CheckpointConfig(every_steps=250, keep=4),
        image_prompt=ImagePromptConfig(encoder="weights/clip_vision_g.safetensors"),
        validation=ValidationConfig(every_steps=None),
    )
