"""What a run begins with: the state before the first step, where each array belongs, and the programs to compile."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from sdxl_jax import flops, sharding
from sdxl_jax import model as models
from sdxl_jax.arrays import Batch, Params, flatten, unflatten
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.training import compilation
from sdxl_jax.training.programs import Programs, folder
from sdxl_jax.training.state import TrainState, create, partition
from sdxl_jax.training.step import NoTokens, Step, make_step


def abstract_state(
    config: TrainConfig, mesh: Mesh, optimiser: optax.GradientTransformation
) -> tuple[TrainState, Params]:
    """Shapes, dtypes and places of the state and of the frozen parameters, without making any."""
    params = jax.eval_shape(functools.partial(models.init, config=config.model), jax.random.key(0))
    trained, frozen = partition(params, config.training.trains)
    state = jax.eval_shape(functools.partial(create, optimiser=optimiser, config=config.ema), trained)
    return sharding.placed(mesh, state), sharding.placed(mesh, frozen)


def jitted(step: Step, config: TrainConfig, mesh: Mesh, abstract: TrainState) -> Any:
    """The step, to be compiled. Its results stay where the state was: left to choose, XLA moves small arrays, so that
    the next call compiles again, and a resumed run no longer repeats the last digits."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
        compiler_options=_options(config, mesh) or None,
    )


def programs(config: TrainConfig, mesh: Mesh) -> Programs | None:
    """Where steps compiled ahead, on another machine, are kept; None without a folder for them."""
    cache = config.training.compilation_cache
    return None if cache is None else Programs(folder(cache), mesh, _options(config, mesh))


def _options(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    return config.compute.options(mesh.devices.flat[0].platform)


def fresh_state(
    config: TrainConfig,
    optimiser: optax.GradientTransformation,
    abstract: TrainState,
    abstract_frozen: Params,
    initial: dict[str, jax.Array],
) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen parameters; each array is made where it belongs, or is the one
    that `initial` has by its path."""

    def make(key: jax.Array, initial: dict[str, jax.Array]) -> tuple[TrainState, Params]:
        params = unflatten(flatten(models.init(key, config.model)) | initial)
        trained, frozen = partition(params, config.training.trains)
        return create(trained, optimiser, config.ema), frozen

    places = jax.tree.map(lambda leaf: leaf.sharding, (abstract, abstract_frozen))
    with warnings.catch_warnings():
        # Of what trains, the average is a second copy: one of the two cannot be the array that was given.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        start = jax.jit(make, out_shardings=places, donate_argnums=1)
        return start(jax.random.key(config.training.seed), initial)


def arguments(
    config: TrainConfig,
    mesh: Mesh,
    dataset: BucketedDataset,
    first: int,
    abstract: TrainState,
    abstract_frozen: Params,
) -> dict[Bucket, tuple[TrainState, Params, Batch]]:
    """What the step of each bucket that the run still needs is compiled for, in the order of need."""
    needed = compilation.order_of_need(dataset, first, config.training.steps)
    return {
        bucket: (abstract, abstract_frozen, abstract_batch(config, mesh, bucket, batch_size))
        for bucket, batch_size in needed.items()
    }


def abstract_batch(config: TrainConfig, mesh: Mesh, bucket: Bucket, batch_size: int) -> Batch:
    """Shapes, dtypes and places of a bucket's batch, over all hosts."""
    cached, scored = config.data.cache is not None, config.data.aesthetic is not None
    return compilation.abstract_batch(mesh, config.model, bucket, batch_size, cached=cached, scored=scored)


def model_flops(
    config: TrainConfig, optimiser: optax.GradientTransformation, empty: Mapping[str, NoTokens], given: tuple[Any, ...]
) -> float:
    """FLOPs of one step, of the mathematics: with XLA's attention and nothing computed twice.

    given: the step's abstract arguments.
    """
    plain = Compute(dtype=config.compute.dtype, attention=Attention.XLA, remat=Remat.NONE)
    return flops.count(make_step(dataclasses.replace(config, compute=plain), optimiser, empty), *given).total
