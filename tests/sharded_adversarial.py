"""The part of test_adversarial.py that needs several devices: three steps of an autoencoder with a discriminator, the
same on one, two and four devices. Prints their metrics as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python sharded_adversarial.py
"""

import json
from typing import Any

import jax
import numpy as np

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, MicroConditioning
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.models.patchgan import PatchGanConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import setup
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.adversarial import DiscriminatorConfig
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig, AutoencodingLoopConfig
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig, Reduction

ROWS, STEPS = 4, 3
MESHES = MeshConfig(data=1), MeshConfig(data=2), MeshConfig(data=2, fsdp=2)


def batch(seed: int) -> Batch:
    zeros = np.zeros((ROWS, 2), np.int32)
    image = np.random.default_rng(seed).integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
    micro = MicroConditioning(zeros, zeros, zeros)
    return Batch(image, {}, micro, zeros[:, 0], zeros[:, 0].astype(bool))


def train(given: MeshConfig) -> list[dict[str, float]]:
    """The metrics of each step."""
    config = AutoencoderConfig(
        data=DataConfig(folder="unused", buckets=((32, 32),), batch_size=ROWS),
        vae=VaeConfig(block_channels=(8, 8), resnets_per_block=1, groups=2),
        loss=AutoencodingLossConfig(0.0, 1e-2, reduction=Reduction.SUM, learn_log_variance=True),
        discriminator=DiscriminatorConfig(PatchGanConfig(4, 2), start_step=1, lecam_weight=0.1),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=0, clip_norm=None),
        training=AutoencodingLoopConfig(steps=STEPS),
    )
    objective, devices = objective_of(config), given.data * given.fsdp
    mesh = sharding.make_mesh(given, jax.devices()[:devices])
    abstract, _ = objective.abstract_state(mesh)
    with jax.set_mesh(mesh):
        state, frozen = objective.fresh_state(mesh, abstract, {}, progress=False)
        step: Any = setup.jitted(objective, mesh, abstract)
        found = []
        for number in range(STEPS):
            state, metrics = step(state, frozen, sharding.put_batch(mesh, batch(number)))
            found.append({name: float(value) for name, value in metrics.items()})
    return found


if __name__ == "__main__":
    print(json.dumps([train(mesh) for mesh in MESHES]))
