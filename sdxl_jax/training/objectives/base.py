"""What an objective is: everything that the loop asks of what is learnt, and no more.

An objective is one file with a configuration (a `RunConfig`) and a class with the members below. Most of them have an
implementation here, which is that of one tree of parameters, a part of which trains with one optimiser; an objective
with several networks that train against each other brings its own state and its own step.

    which batches it wants         tokenize · batches · abstract_batch
    state                          init · abstract_state · fresh_state
    step                           loss · step
    what others see of it          model_config · parts · model · validation

Not here: compilation, checkpoints, processes, metrics, signals. They come from the loop, once, for all objectives.
"""

import abc
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Key, UInt8

from sdxl_jax import flops, sharding
from sdxl_jax.arrays import Batch, MicroConditioning, Params, flatten, unflatten
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import RunConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.optim import optimiser as optimisers
from sdxl_jax.training.initial import check_initial, initial_weights
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import TrainState, create, merge, partition
from sdxl_jax.training.step import Metrics, Step, make_step
from sdxl_jax.weights.lazy import part_configs

Config = TypeVar("Config", bound=RunConfig)


class Grid(NamedTuple):
    """Validation images, to be written as one image with captions."""

    images: Sequence[UInt8[np.ndarray, "_height _width 3"]]
    captions: Sequence[str]
    columns: int
    text: Mapping[str, Any]
    """How they were made, for the PNG's text."""


class Objective(abc.ABC, Generic[Config]):
    """What is learnt from a configuration of its type. Holds no arrays."""

    name: ClassVar[str]
    """As config.json and messages say it."""
    programs: ClassVar[tuple[str, ...]] = ("train",)
    """What `sdxl-jax compile` can compile of it."""

    def __init__(self, config: Config):
        self.config = config
        self.optimiser = optimisers.make(config.optimiser, config.training.steps)

    # What the model is

    @property
    @abc.abstractmethod
    def model_config(self) -> ModelConfig:
        """Of the model that others sample from or export; only its `parts` count."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that there are, trained or frozen."""
        return tuple(part_configs(self.model_config))

    @abc.abstractmethod
    def init(self, key: Key[jax.Array, ""]) -> Params:
        """Fresh float32 parameters, {part: …}, of all that the step needs."""

    def model(self, state: TrainState, frozen: Params) -> Model:
        """What others sample from or export: the averaged weights, with what is frozen."""
        return Model(self.model_config, merge(state.sampled, frozen))

    # Checks, before work starts

    def check(self) -> None:
        """Raises InputError for a configuration that cannot be trained. No data and no weights are read."""
        self.config.check()

    def check_start(self) -> None:
        """Raises InputError where a new run could not start: weights that are missing, or are another model's."""
        check_initial(self.config.training, self.model_config, self.parts)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises InputError for a mesh that cannot share the work."""
        sharding.check_batch(mesh, self.config.data.batch_size, self.config.optimiser.accumulate)
        self.check_heads(mesh)

    def check_heads(self, mesh: Mesh) -> None:
        """Raises InputError for a mesh whose `tensor` axis cannot share the attention heads. Here: nothing is split."""

    # Batches

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What captions become token numbers with; None: it wants no captions (`config.wants_captions`)."""
        return None

    def batches(self, dataset: BucketedDataset, frozen: Params) -> BucketedDataset:
        """The data set as the configuration wants it read."""
        del frozen
        return dataset

    def abstract_batch(self, mesh: Mesh | AbstractMesh, bucket: Bucket, batch_size: int) -> Batch:
        """Shapes, dtypes and places of a batch of one bucket, over all processes: what a step is compiled for."""
        array = functools.partial(abstract_rows, mesh, batch_size)
        return Batch(
            image=array(jnp.uint8, *bucket, 3),
            tokens={},
            micro=MicroConditioning(*(array(jnp.int32, 2) for _ in range(3))),
            example=array(jnp.int32),
            replaced=array(jnp.bool_),
        )

    # State

    def abstract_state(self, mesh: Mesh) -> tuple[TrainState, Params]:
        """Shapes, dtypes and places of the state and of the frozen parameters, without making any."""
        params = jax.eval_shape(self.init, jax.random.key(0))
        trained, frozen = partition(params, self.config.training.trainable)
        make = functools.partial(create, optimiser=self.optimiser, config=self.config.ema)
        return sharding.placed(mesh, jax.eval_shape(make, trained)), sharding.placed(mesh, frozen)

    def initial_weights(self, mesh: Mesh, progress: bool = True) -> dict[str, jax.Array]:
        """The parameters that do not start at random, by path, float32 and where they belong."""
        return initial_weights(self.config.training, self.model_config, mesh, parts=self.parts, progress=progress)

    def fresh_state(
        self, abstract: TrainState, abstract_frozen: Params, initial: dict[str, jax.Array]
    ) -> tuple[TrainState, Params]:
        """The state before the first step and the frozen parameters; each array is made where it belongs, or is the
        one that `initial` has by its path."""

        def make(key: jax.Array, initial: dict[str, jax.Array]) -> tuple[TrainState, Params]:
            params = unflatten(flatten(self.init(key)) | initial)
            trained, frozen = partition(params, self.config.training.trainable)
            return create(trained, self.optimiser, self.config.ema), frozen

        places = jax.tree.map(lambda leaf: leaf.sharding, (abstract, abstract_frozen))
        with warnings.catch_warnings():
            # Of what trains, the average is a second copy: one of the two cannot be the array that was given.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            start = jax.jit(make, out_shardings=places, donate_argnums=1)
            return start(jax.random.key(self.config.training.seed), initial)

    # Step

    @abc.abstractmethod
    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        """The mean loss of one (micro-)batch, and `config.losses` by name. keys: one an example."""

    def step(self) -> Step:
        """The pure step for one batch."""
        return make_step(self.config, self.optimiser, self.loss)

    def model_flops(self, arguments: tuple[Any, ...]) -> float:
        """FLOPs of one step, of the mathematics: with XLA's attention and nothing computed twice.

        arguments: the step's abstract ones.
        """
        plain = Compute(dtype=self.config.compute.dtype, attention=Attention.XLA, remat=Remat.NONE)
        return flops.count(type(self)(dataclasses.replace(self.config, compute=plain)).step(), *arguments).total

    # Validation

    @property
    @abc.abstractmethod
    def validates_every(self) -> int | None:
        """Steps between validation images; None: there are none."""

    @abc.abstractmethod
    def validation(self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes) -> Grid:
        """The images that show what was learnt. All processes make them together."""


def abstract_rows(mesh: Mesh | AbstractMesh, batch_size: int, dtype: Any, *shape: int) -> Any:
    """An abstract array [batch, *shape], split over the devices as a batch is."""
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))
