"""Class-conditional ImageNet at 512×512, of the images that are at least as large: the first model of table 2.

hardware   none tried at full size; the state of 400 million parameters fits on one device of 16 GiB or more
hours      unknown
metric     none measured; the paper reports FID 43.84, IS 110.64 of 5,000 images (arXiv:2307.01952, table 2)
command    sdxl-jax train configs/imagenet_512_only.py --run-dir runs/imagenet_512_only
last run   never at full size; the tests run the smoke configuration configs/smoke/imagenet_512_only.py

As configs/imagenet_512_nocond.py, but without images that have a side below 512 pixels: 70 thousand of 1.28 million are
left, and the model overfits.
"""

from dataclasses import replace
from pathlib import Path

from sdxl_jax.config import TrainConfig, load


def get_config() -> TrainConfig:
    every = load(Path(__file__).with_name("imagenet_512_nocond.py"), TrainConfig)
    return replace(every, data=replace(every.data, min_size=512))
