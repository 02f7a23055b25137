"""The part of test_distillation_runs.py that needs four devices; prints its results as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python sharded_distillation.py SCRATCH_FOLDER

One step of consistency distillation, of a whole student and of an adapter, and one of guidance and of progressive
distillation, on one device and on a mesh of four.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import layouts
import numpy as np
import test_distillation
import tiny

from sdxl_jax import sharding
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import setup
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.distillation.consistency import ConsistencyConfig
from sdxl_jax.training.objectives.distillation.guidance import GuidanceDistillationConfig
from sdxl_jax.training.objectives.distillation.progressive import ProgressiveConfig
from sdxl_jax.training.objectives.distillation.teacher import TEACHER, Distillation
from sdxl_jax.weights.convert import convert


def stepped(config: Any, mesh: Any) -> tuple[float, Any, list[str], Any]:
    """(loss, parameters after the step, arrays that are not where they belong, how far the parameters moved)."""
    # A large epsilon: Adam's first step is else as long whatever the gradient, also for one of rounding alone.
    optimiser = dataclasses.replace(config.optimiser, epsilon=1e-3, warmup_steps=0)
    objective = objective_of(dataclasses.replace(config, optimiser=optimiser))
    assert isinstance(objective, Distillation)
    with jax.set_mesh(mesh):
        given = objective.initial_weights(mesh, progress=False)
        abstract, abstract_frozen = objective.abstract_state(mesh)
        state, frozen = objective.fresh_state(mesh, abstract, given, progress=False)
        misplaced = layouts.misplaced(state, abstract)
        copy, expected = (tree.get(TEACHER, {}) for tree in (frozen, abstract_frozen))
        places = zip(jax.tree.leaves(copy), jax.tree.leaves(expected), strict=True)
        misplaced += [TEACHER for leaf, wanted in places if leaf.sharding != wanted.sharding]
        batch = sharding.put_batch(mesh, test_distillation.batch(objective, 4))
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = setup.jitted(objective, mesh, abstract)(state, frozen, batch)
        misplaced += layouts.misplaced(state, abstract)
    after = jax.tree.map(np.asarray, state.params)
    return float(metrics["loss"]), after, misplaced, jax.tree.map(lambda a, b: a - b, after, before)


def main(folder: Path) -> dict[str, Any]:
    convert(tiny.random_model(test_distillation.MODEL, 0), folder / "teacher", "orbax", False)
    results: dict[str, Any] = {"devices": jax.device_count()}
    configs = {
        "student": test_distillation.distillation(ConsistencyConfig, folder),
        "adapter": test_distillation.lora_student(folder),
        "guidance": test_distillation.distillation(GuidanceDistillationConfig, folder),
        "progressive": test_distillation.distillation(ProgressiveConfig, folder, steps=4),
    }
    for name, config in configs.items():
        one = stepped(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
        four = stepped(config, sharding.make_mesh(MeshConfig(data=2, fsdp=2)))
        difference = max(
            float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one[1], four[1])), strict=True)
        )
        moved = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[3]))
        results[name] = {"losses": [one[0], four[0]], "difference": difference, "moved": moved}
        results[name]["misplaced"] = one[2] + four[2]
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
