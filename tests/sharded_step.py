"""The part of test_sharding.py that needs eight devices; prints its results as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python sharded_step.py SCRATCH_FOLDER

Kept small to compile little: one short run under each of three layouts (all layouts: test_layouts.py).
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import layouts
import numpy as np
import tiny
from layouts import LAYOUTS, Options

from sdxl_jax import sharding
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.checkpoint import Checkpoints, restore
from sdxl_jax.training.encoding import fingerprint
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.training.state import TrainState

STEPS = {"data 2 × fsdp 2 × tensor 2": 2}
"""Steps under each layout, all of one bucket. The other layouts, and changes of bucket, are test_layouts.py's."""
RESTORED = ("single", "data 2 × fsdp 4", "data 2 × fsdp 2 × tensor 2")


def mesh_of(name: str) -> Any:
    return sharding.make_mesh(LAYOUTS[name].mesh, jax.devices()[:1] if name == "single" else None)


def fresh(name: str) -> tuple[Any, Any]:
    """((state, frozen parameters), their abstract arrays) of a new run."""
    config, mesh = layouts.train_config("unused", LAYOUTS[name]), mesh_of(name)
    objective = Denoising(config)
    with jax.set_mesh(mesh):
        abstract, abstract_frozen = objective.abstract_state(mesh)
        return objective.fresh_state(mesh, abstract, {}), (abstract, abstract_frozen)


def split_share(state: Any, parts: int) -> float:
    """The share of the state's bytes that is split into `parts` parts or more."""
    leaves = jax.tree.leaves(state)
    split = [leaf for leaf in leaves if leaf.addressable_shards[0].data.size * parts <= leaf.size]
    return sum(leaf.nbytes for leaf in split) / sum(leaf.nbytes for leaf in leaves)


def middle(state: TrainState) -> TrainState:
    """A part with every kind of parameter, which is read and written faster than the whole."""
    return TrainState(state.step, {"unet": {"mid_block": state.params["unet"]["mid_block"]}}, None, ())


def identical(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def restored(scratch: Path, state: TrainState) -> dict[str, Any]:
    """For each layout, whether a checkpoint is restored bit for bit and with its sharding."""
    with Checkpoints(scratch, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
    results = {}
    for name in RESTORED:
        abstract = sharding.placed(mesh_of(name), state)
        found = restore(scratch, 3, abstract)
        results[name] = [identical(state, found), layouts.misplaced(found, abstract)]
    return results


def main(scratch: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        "devices": jax.device_count(),
        "filled": [dict(sharding.make_mesh(MeshConfig(data, fsdp)).shape) for data, fsdp in ((-1, 4), (4, -1))],
    }
    alone, _ = fresh("single")
    made, places = fresh("data 4 × fsdp 2")
    results["fresh_difference"] = layouts.largest_difference(made, layouts.on_host(alone))
    results["fresh_misplaced"] = layouts.misplaced(made, places)
    results["fresh_split_share"] = split_share(made[0], 2)

    folder = str(tiny.make_folder(scratch / "images"))
    options = Options(folder, ["single"], 0, str(scratch / "reference"), buckets=1)
    spread = None
    for name, steps in STEPS.items():
        single = layouts.train("single", dataclasses.replace(options, steps=steps))
        spread = layouts.train(name, dataclasses.replace(options, steps=steps))
        before = layouts.initial(single.abstract, {})[0]
        results[name] = {
            "single_losses": single.losses,
            "losses": spread.losses,
            "difference": layouts.largest_difference(spread.state, layouts.on_host(single.state)),
            "misplaced": layouts.misplaced(spread.state, spread.abstract),
            "moved": layouts.largest_difference(single.state.params, layouts.on_host(before.params)),
        }
    assert spread is not None
    part = middle(spread.state)
    process = jax.tree.map(np.asarray, part.params)
    results["fingerprints"] = {name: fingerprint(sharding.put(mesh_of(name), process)) for name in RESTORED}
    results["restored"] = restored(scratch / "checkpoints", part)
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
