"""The part of test_critic_distillation.py that needs several devices: two steps of DMD2 and of ADD, the same on one,
two and four devices. Prints their metrics as JSON. Argument: a folder with a teacher and DINOv2, which the test makes.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python sharded_critic.py FOLDER
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import test_critic_distillation as cases

from sdxl_jax import sharding
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import setup
from sdxl_jax.training.objectives import objective_of

ROWS, STEPS = 8, 2
MESHES = MeshConfig(data=1), MeshConfig(data=2), MeshConfig(data=2, fsdp=2)


def train(config: Any, given: MeshConfig) -> list[dict[str, float]]:
    """The metrics of each step."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=ROWS))
    objective, devices = objective_of(config), given.data * given.fsdp
    mesh = sharding.make_mesh(given, jax.devices()[:devices])
    abstract, _ = objective.abstract_state(mesh)
    with jax.set_mesh(mesh):
        initial = objective.initial_weights(mesh, progress=False)
        state, frozen = objective.fresh_state(mesh, abstract, initial, progress=False)
        step: Any = setup.jitted(objective, mesh, abstract)
        found = []
        for _ in range(STEPS):
            state, metrics = step(state, frozen, sharding.put_batch(mesh, cases.batch(objective, ROWS)))
            found.append({name: float(value) for name, value in metrics.items()})
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    configs = cases.matching(folder), cases.adversarial(folder)
    print(json.dumps([[train(config, mesh) for mesh in MESHES] for config in configs]))
