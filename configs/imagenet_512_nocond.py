"""Class-conditional ImageNet at 512×512, of all images, without their sizes: the second model of table 2.

hardware   none tried at full size; the state of 400 million parameters fits on one device of 16 GiB or more
hours      unknown
metric     none measured; the paper reports FID 39.76, IS 211.50 of 5,000 images (arXiv:2307.01952, table 2)
command    sdxl-jax train configs/imagenet_512_nocond.py --run-dir runs/imagenet_512_nocond
last run   never at full size; the tests run the smoke configuration configs/smoke/imagenet_512_nocond.py

As configs/imagenet_512_size_cond.py, which says what is sgm's and what is ours, but conditioned on the class alone:
small images are upscaled, and the model learns their blur.
"""

from dataclasses import replace
from pathlib import Path

from sdxl_jax.config import TrainConfig, load


def get_config() -> TrainConfig:
    full = load(Path(__file__).with_name("imagenet_512_size_cond.py"), TrainConfig)
    model = replace(full.model, micro=None, unet=replace(full.model.unet, vector_dim=None))
    return replace(full, model=model, training=replace(full.training, micro_dropout=0.0))
