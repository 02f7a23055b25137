"""Trains a tiny model on one device and on three layouts of eight simulated ones; prints how they differ, as JSON.

Run by test_sharding.py in a process of its own, because the number of devices is fixed when jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python sharded_step.py SCRATCH_FOLDER
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, MicroConditioning
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.errors import InputError
from sdxl_jax.sharding import MeshConfig, path_name
from sdxl_jax.training import optimiser, start
from sdxl_jax.training.checkpoint import Checkpoints, restore
from sdxl_jax.training.encoding import fingerprint
from sdxl_jax.training.state import TrainState
from sdxl_jax.training.step import make_step

LAYOUTS = {"single": MeshConfig(1, 1), "8×1": MeshConfig(8, 1), "2×4": MeshConfig(2, 4), "4×2": MeshConfig(-1, 2)}


class Trained(NamedTuple):
    loss: float
    state: TrainState


BUCKETS = ((16, 16), (8, 24), (16, 16))
"""(height, width) of three steps."""


def config() -> Any:
    model = dataclasses.replace(
        tiny.MODEL,
        unet=dataclasses.replace(tiny.MODEL.unet, block_channels=(8,), transformer_depth=(2,), heads=(2,)),
        vae=dataclasses.replace(tiny.MODEL.vae, block_channels=(4, 4)),
    )
    base = tiny.train_config(Path("unused"), steps=3)
    # An epsilon of 1e-3 keeps Adam from turning the rounding of a gradient near zero into a step of full length.
    options = dataclasses.replace(base.optimiser, epsilon=1e-3, warmup_steps=0)
    return dataclasses.replace(base, data=DataConfig("unused", batch_size=8), model=model, optimiser=options)


CONFIG = config()
OPTIMISER = optimiser.make(CONFIG.optimiser, 3)
TOKENIZER = Tokenizer.of(CONFIG.model.text)
STEP = make_step(CONFIG, OPTIMISER, TOKENIZER([""]))


def batch(number: int) -> Batch:
    rng = np.random.default_rng(number)
    height, width = BUCKETS[number]
    sizes = rng.integers(8, 999, (3, 8, 2), np.int32)
    return Batch(
        image=rng.integers(0, 256, (8, height, width, 3), np.uint8),
        tokens=cast(Any, TOKENIZER([f"picture {number} {row}" for row in range(8)])),
        micro=MicroConditioning(*sizes),
        example=np.arange(8, dtype=np.int32),
        replaced=np.zeros(8, bool),
    )


def mesh_of(layout: str) -> Any:
    return sharding.make_mesh(LAYOUTS[layout], jax.devices()[:1] if layout == "single" else None)


def fresh(layout: str) -> tuple[TrainState, Any, TrainState]:
    """State, frozen parameters, and the state's shapes and places."""
    mesh = mesh_of(layout)
    with jax.set_mesh(mesh):
        abstract, abstract_frozen = start.abstract_state(CONFIG, mesh, OPTIMISER)
        return *start.fresh_state(CONFIG, OPTIMISER, abstract, abstract_frozen, {}), abstract


def train(layout: str, state: TrainState, frozen: Any, abstract: TrainState, steps: int) -> list[Trained]:
    mesh, made = mesh_of(layout), []
    with jax.set_mesh(mesh):
        step = start.jitted(STEP, CONFIG, mesh, abstract)
        for number in range(steps):
            state = jax.tree.map(jnp.copy, state)  # the step takes its input's memory
            state, metrics = step(state, frozen, sharding.put_batch(mesh, batch(number)))
            made.append(Trained(float(metrics["loss"]), state))
    return made


def largest_difference(one: Any, other: Any) -> float:
    """Of any value of two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b)).max()) for a, b in pairs)


def identical(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def misplaced(state: TrainState, abstract: TrainState) -> list[str]:
    """Leaves that do not lie as the rules say."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return [
        path_name(path)
        for (path, leaf), place in zip(flat, jax.tree.leaves(abstract), strict=True)
        if not leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
    ]


def split_share(state: TrainState, parts: int) -> float:
    """How much of the state's bytes lies on each device in `parts` parts."""
    leaves = jax.tree.leaves(state)
    split = [leaf for leaf in leaves if leaf.addressable_shards[0].data.size * parts == leaf.size]
    return sum(leaf.nbytes for leaf in split) / sum(leaf.nbytes for leaf in leaves)


def restored(scratch: Path, state: TrainState, layouts: dict[str, TrainState]) -> dict[str, Any]:
    """For each layout, whether a checkpoint comes back with every bit and at its place."""
    with Checkpoints(scratch, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
    found = {name: restore(scratch, 3, abstract) for name, abstract in layouts.items()}
    return {name: [identical(state, new), misplaced(new, layouts[name])] for name, new in found.items()}


def refusal(config: MeshConfig) -> str:
    try:
        sharding.make_mesh(config)
    except InputError as error:
        return str(error)
    return "accepted"


def main(scratch: Path) -> dict[str, Any]:
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is what this costs
    single, frozen, abstract = fresh("single")
    made, made_frozen, made_abstract = fresh("4×2")
    results: dict[str, Any] = {
        "devices": jax.device_count(),
        "meshes": {name: dict(mesh_of(name).shape) for name in LAYOUTS},
        "filled": [dict(sharding.make_mesh(MeshConfig(data, fsdp)).shape) for data, fsdp in ((-1, 4), (4, -1))],
        "refused": {f"{data},{fsdp}": refusal(MeshConfig(data, fsdp)) for data, fsdp in ((3, 2), (-1, 3), (-1, -1))},
        "fresh_difference": largest_difference((single, frozen), (made, made_frozen)),
        "fresh_misplaced": misplaced(made, made_abstract),
        "fresh_split_share": split_share(made, 2),
    }

    alone = train("single", single, frozen, abstract, len(BUCKETS))
    results["losses"] = [step.loss for step in alone]
    results["moved"] = largest_difference(single.params, alone[0].state.params)
    everywhere, together = {"single": abstract}, alone
    for layout, steps in (("8×1", 1), ("2×4", 1), ("4×2", len(BUCKETS))):
        mesh = mesh_of(layout)
        with jax.set_mesh(mesh):
            places = start.abstract_state(CONFIG, mesh, OPTIMISER)[0]
        state = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), single, places)
        together = train(layout, state, sharding.put(mesh, frozen), places, steps)
        results[layout] = {
            "losses": [step.loss for step in together],
            "difference": largest_difference(together[-1].state, alone[steps - 1].state),
            "misplaced": misplaced(together[-1].state, places),
        }
        everywhere[layout] = places
    part = {"unet": {"mid_block": single.params["unet"]["mid_block"]}}
    meshes = {"single": mesh_of("single"), "2×4": mesh_of("2×4"), "4×2": mesh_of("4×2")}
    results["fingerprints"] = {layout: fingerprint(sharding.put(mesh, part)) for layout, mesh in meshes.items()}
    results["restored"] = restored(scratch, together[-1].state, everywhere)
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
