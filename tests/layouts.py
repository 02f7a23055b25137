"""Trains a tiny model under several layouts, on batches of the data pipeline; reports the difference from one device.

    python layouts.py OPTIONS_JSON      (see `Options`; prints one line of JSON per layout)

A process of its own, because the number of devices is fixed when jax starts: eight simulated ones with
XLA_FLAGS=--xla_force_host_platform_device_count=8, or several processes, with JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. The parameters come from numpy: XLA would need longer to compile their
initialisation than all the steps.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tiny

from sdxl_jax import sharding
from sdxl_jax.adapters.targets import AdapterConfig, Layers
from sdxl_jax.arrays import Params
from sdxl_jax.conditioning.text import END_OF_TEXT, Tower
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.sharding import MeshConfig, path_name
from sdxl_jax.training import setup
from sdxl_jax.training.checkpoint import Checkpoints, restore
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.training.state import TrainState


class Layout(NamedTuple):
    """The parallelism and computation of a step: none of it may change what is learnt."""

    mesh: MeshConfig
    compute: Compute = Compute()
    accumulate: int = 1


_TENSOR = MeshConfig(data=2, fsdp=2, tensor=2)
LAYOUTS = {
    "single": Layout(MeshConfig(1)),
    "data 8": Layout(MeshConfig(8)),
    "fsdp 8": Layout(MeshConfig(1, 8)),
    "data 2 × fsdp 4": Layout(MeshConfig(2, 4)),
    "data 4 × fsdp 2": Layout(MeshConfig(-1, 2)),
    "data 2 × fsdp 2 × tensor 2": Layout(_TENSOR),
    "fsdp 4 × tensor 2": Layout(MeshConfig(1, 4, 2)),
    "slice 2 × data 2 × fsdp 2": Layout(MeshConfig(2, 2, slices=2)),
    "data 2 × fsdp 2 × tensor 2, two micro-batches": Layout(_TENSOR, accumulate=2),
    "data 2 × fsdp 4, remat dots": Layout(MeshConfig(2, 4), Compute(remat=Remat.DOTS)),
    "data 2 × fsdp 4, remat block": Layout(MeshConfig(2, 4), Compute(remat=Remat.BLOCK)),
    "data 2 × fsdp 4, remat offload": Layout(MeshConfig(2, 4), Compute(remat=Remat.OFFLOAD)),
    "data 2 × fsdp 2 × tensor 2, unrolled": Layout(_TENSOR, Compute(unroll=True)),
    "data 2 × fsdp 2 × tensor 2, splash attention": Layout(_TENSOR, Compute(attention=Attention.SPLASH)),
    # For two devices and for four, over several processes.
    "data 2": Layout(MeshConfig(2)),
    "fsdp 2": Layout(MeshConfig(1, 2)),
    "tensor 2": Layout(MeshConfig(1, 1, 2)),
    "data 2 × fsdp 2": Layout(MeshConfig(2, 2)),
    "fsdp 2 × tensor 2": Layout(MeshConfig(1, 2, 2)),
}
BUCKETS = ((16, 16), (16, 24))
STEPS = 20
"""Steps of a whole run."""
MODEL = ModelConfig(
    unet=UNetConfig((8,), 1, (2,), 1, (2,), context_dim=8, vector_dim=8 + 6 * 4, groups=4),
    vae=VaeConfig(block_channels=(8, 8), resnets_per_block=1, groups=2),
    text=(Tower("text_encoder_2", ClipTextConfig(8, 2, 2, 16, Activation.GELU, 8), END_OF_TEXT),),
    micro=tiny.MODEL.micro,
    default_size=(16, 16),
)
"""The smallest model with every kind of parameter and both kinds of conditioning."""


@dataclasses.dataclass
class Options:
    folder: str
    """The images."""
    layouts: list[str]
    """Names in `LAYOUTS`, run in this order."""
    steps: int
    """The last step, up to `STEPS`."""
    reference: str
    """A file, written by the layout "single" and read by all later ones."""
    save: tuple[str, int] | None = None
    """Folder and step of a checkpoint to write, by the last layout."""
    restore: tuple[str, int] | None = None
    """Folder and step of a checkpoint to resume from."""
    buckets: int = len(BUCKETS)
    """The number of `BUCKETS` to use; each needs a compiled step."""
    adapter: bool = False
    """Train an adapter beside the model, instead of the UNet."""


ADAPTER = AdapterConfig(rank=2, layers=Layers.BLOCKS, biases_and_norms=True, rank_dropout=0.2, module_dropout=0.2)


def train_config(folder: str, layout: Layout, buckets: int = len(BUCKETS), adapter: bool = False) -> TrainConfig:
    base = tiny.train_config(Path(folder), STEPS)
    # An epsilon of 1e-3 keeps Adam from turning the rounding of a gradient near zero into a step of full length.
    options = dataclasses.replace(base.optimiser, epsilon=1e-3, warmup_steps=0, accumulate=layout.accumulate)
    return dataclasses.replace(
        base,
        data=DataConfig(folder, buckets=BUCKETS[:buckets], batch_size=8, max_aspect_distance=10.0),
        model=MODEL,
        mesh=layout.mesh,
        compute=layout.compute,
        optimiser=options,
        adapter=ADAPTER if adapter else None,
    )


def initial(abstract: TrainState, abstract_frozen: Params) -> tuple[TrainState, Params]:
    """Host arrays: kernels of about the usual size, none of them zero, so that every gradient matters from the start;
    scales one; moments zero."""
    rng = np.random.default_rng(0)

    def parameter(path: Any, leaf: Any) -> np.ndarray:
        if path_name(path).endswith(("scale", "alpha")):
            return np.ones(leaf.shape, leaf.dtype)
        fan_in = max(1, leaf.size // leaf.shape[-1])
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(parameter, abstract.params)
    frozen = jax.tree_util.tree_map_with_path(parameter, abstract_frozen)
    moments = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract.optimiser)
    return TrainState(np.zeros((), np.int32), params, params, moments), frozen  # pyright: ignore[reportArgumentType]


def placed(host: Any, abstract: Any) -> Any:
    """Host arrays with their shardings; each process has all of them, and each device a copy of its part."""

    def put(leaf: np.ndarray, place: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, place.sharding, lambda index: np.array(leaf[index]))

    return jax.tree.map(put, host, abstract)


class Trained(NamedTuple):
    losses: list[float]
    buckets: list[list[int]]
    state: TrainState
    abstract: TrainState


def train(name: str, options: Options) -> Trained:
    """The steps of one layout, from the initial parameters or from a checkpoint."""
    layout = LAYOUTS[name]
    config = train_config(options.folder, layout, options.buckets, options.adapter)
    mesh = sharding.make_mesh(layout.mesh, jax.devices()[:1] if name == "single" else None)
    sharding.check_batch(mesh, config.data.batch_size, layout.accumulate)
    objective = Denoising(config)
    index, count = sharding.process_part(mesh)
    dataset = BucketedDataset(config.data, objective.tokenizer, process_index=index, process_count=count)
    with jax.set_mesh(mesh):
        abstract, abstract_frozen = objective.abstract_state(mesh)
        host, frozen = initial(abstract, abstract_frozen)
        state = (
            placed(host, abstract)
            if options.restore is None
            else restore(Path(options.restore[0]), options.restore[1], abstract)
        )
        frozen = placed(frozen, abstract_frozen)
        step = setup.jitted(objective, mesh, abstract)
        losses, first = [], 0 if options.restore is None else options.restore[1]
        with contextlib.closing(dataset.iterate(first)) as batches:
            for number in range(first, options.steps):
                state, metrics = step(state, frozen, sharding.put_batch(mesh, next(batches)))
                losses.append(float(metrics["loss"]))
                if options.save is not None and number + 1 == options.save[1] and name == options.layouts[-1]:
                    with Checkpoints(Path(options.save[0]), keep=1) as checkpoints:
                        checkpoints.save(number + 1, state, {})
    return Trained(losses, [list(dataset.bucket_of(number)) for number in range(first, options.steps)], state, abstract)


def on_host(state: Any) -> dict[str, np.ndarray]:
    """By path; for a state on one device."""
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def largest_difference(state: Any, reference: dict[str, np.ndarray]) -> float:
    """Between the shards of this process's devices and the same parts of host arrays."""
    return max(
        float(np.abs(np.asarray(shard.data, np.float64) - reference[path_name(path)][shard.index]).max())
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        for shard in leaf.addressable_shards
    )


def misplaced(state: TrainState, abstract: TrainState) -> list[str]:
    """Leaves whose sharding is not that of the rules."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return [
        path_name(path)
        for (path, leaf), place in zip(flat, jax.tree.leaves(abstract), strict=True)
        if not leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
    ]


def main(options: Options) -> None:
    """For each layout: losses, buckets, the largest difference of the state after the last step, misplaced leaves."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    reference = Path(options.reference)
    for name in options.layouts:
        print(f"layout: {name}", file=sys.stderr, flush=True)  # the compiler's warnings come after it
        losses, buckets, state, abstract = train(name, options)
        if name == "single" and options.restore is None:
            reference.write_bytes(pickle.dumps(on_host(state)))
        result = {
            "layout": name,
            "processes": jax.process_count(),
            "devices": jax.device_count() if name != "single" else 1,
            "losses": losses,
            "buckets": buckets,
            "difference": largest_difference(state, pickle.loads(reference.read_bytes())),
            "misplaced": misplaced(state, abstract),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])))
