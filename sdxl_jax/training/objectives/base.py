"""The interface between the training loop and what is learnt: one `Objective` per kind of model.

An objective is one file with a configuration (a `RunConfig`) and a class with the members below. Most of them are
implemented here for one tree of parameters, a part of which is trainable, with one optimiser; an objective with several
networks that train against each other (adversarial training) overrides the state and the step.

    batches                        check_data · tokenizer · batches · abstract_batch
    state                          initial_config · abstract_state · initial_weights · fresh_state
    step                           loss · step · model_flops
    for sampling and export        model_config · parts · model · validation · counterparts · measure · export

Not here: compilation, checkpoints, processes, metrics, signals. The loop has them once, for all objectives.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Key, UInt8

from sdxl_jax import flops, sharding
from sdxl_jax.adapters.targets import Layers
from sdxl_jax.arrays import BaseDtype, Batch, MicroConditioning, Params, unflatten
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import RunConfig, TrainingConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.mixture import Target
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import weights
from sdxl_jax.evaluation.scores import weights_of
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.optim.optimiser import make_optimiser
from sdxl_jax.training.initial import check_initial, initial_weights, random_weights
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import TrainState, create, merge, partition
from sdxl_jax.training.step import Metrics, Step, make_step
from sdxl_jax.weights.lazy import abstract_leaves, part_configs

Config = TypeVar("Config", bound=RunConfig)


class Grid(NamedTuple):
    """Validation images, to be written as one contact sheet with captions."""

    images: Sequence[UInt8[np.ndarray, "_height _width 3"]]
    captions: Sequence[str]
    columns: int
    text: Mapping[str, Any]
    """The settings that they were generated with, for the PNG's text."""


class Examples(NamedTuple):
    """A fixed set of examples of the data, of one size."""

    images: UInt8[np.ndarray, "images height width 3"]
    captions: Sequence[str]
    """Of each image the first one, or "" where there is none."""
    labels: Sequence[int] | None = None
    """The class of each image, where the data have classes."""


class Measured(NamedTuple):
    """What is measured on the trained model when training ends."""

    model: ModelConfig
    """The model's configuration with it, which is exported from then on."""
    values: Mapping[str, float | int]
    """By name, for config.json."""


class Objective(abc.ABC, Generic[Config]):
    """Trains from configurations of one type. Holds no arrays."""

    name: ClassVar[str]
    """Used in config.json and in messages."""
    programs: ClassVar[tuple[str, ...]] = ("train",)
    """The programs that `sdxl-jax compile` can compile for it."""
    weighs_examples: ClassVar[bool] = False
    """Whether its loss has the factors, targets and masks of `data`."""

    def __init__(self, config: Config):
        self.config = config
        self.optimiser = make_optimiser(config.optimiser, config.training.steps)

    # The model

    @property
    @abc.abstractmethod
    def model_config(self) -> ModelConfig:
        """The configuration of the model that is sampled from or exported; only its `parts` are used."""

    @property
    def initial_config(self) -> ModelConfig:
        """The configuration of the model that a run starts from. Here: that of the model which is exported."""
        return self.model_config

    @property
    def loaded_config(self) -> ModelConfig:
        """The configuration of the model at `training.init_from`. Here: of the one that a run starts from."""
        return self.initial_config

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that the objective has, trainable or frozen."""
        return tuple(part_configs(self.model_config))

    @property
    def measures_scale(self) -> bool:
        """Whether `measure` measures the latent scale, so that initial weights may have another one. Here: no."""
        return False

    def model(self, state: TrainState, frozen: Params) -> Model:
        """The model to sample from or export: averaged weights and frozen parameters."""
        return Model(self.model_config, merge(state.sampled, frozen))

    # Checks, before work starts

    def check(self) -> None:
        """Raises InputError for a configuration that cannot be trained. No data and no weights are read."""
        self.config.check()
        measured = self.config.validation_metrics
        for name in weights_of(() if measured is None else measured.metrics):
            weights.check(name)
        for source in () if self.weighs_examples else self.config.data.every_source:
            for name, is_given in (
                ("loss_weight", source.loss_weight != 1),
                ("target", source.target is not Target.DATA),
                ("masks", source.masks is not None),
            ):
                if is_given:
                    raise InputError(
                        f"data gives {source.folder} {name}, which has no effect on a run of {self.name}. Leave it out"
                    )
        if self.config.optimiser.rates:  # its state is not made for a pattern without a match
            self.abstract_state(AbstractMesh((1,) * len(sharding.AXES), sharding.AXES))
        if (every := self.config.checkpoint.export_every_steps) is not None and not self.exports:
            raise InputError(
                f"checkpoint.export_every_steps={every} has no effect: this run trains no adapter, and its checkpoints "
                "open as models (sdxl-jax convert writes them in other layouts). Leave it out (None)"
            )

    def check_start(self) -> None:
        """Raises InputError if a new run could not start: initial weights that are missing, or of another model."""
        check_initial(self.config.training, self.loaded_config, self.parts, measures_scale=self.measures_scale)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises InputError for a mesh over which the batch or the attention heads cannot be split."""
        sharding.check_batch(mesh, self.config.data.batch_size, self.config.optimiser.accumulate)
        self.check_heads(mesh)

    def check_heads(self, mesh: Mesh) -> None:
        """Raises InputError for a mesh whose `tensor` axis does not divide the attention heads. Here: no heads are
        split, so nothing is checked."""

    def check_data(self, dataset: BucketedDataset) -> None:
        """Raises InputError for data that cannot be trained on. Here: nothing is checked."""

    # Batches

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenises the captions; None: no captions are needed (`config.wants_captions`)."""
        return None

    def batches(self, dataset: BucketedDataset, frozen: Params) -> BucketedDataset:
        """The data set, reading from a cache if the configuration has one. Here: unchanged."""
        del frozen
        return dataset

    def abstract_batch(self, mesh: Mesh | AbstractMesh, bucket: Bucket, batch_size: int) -> Batch:
        """Shapes, dtypes and shardings of a batch of one bucket, over all processes, to compile a step for."""
        array = functools.partial(abstract_rows, mesh, batch_size)
        return Batch(
            image=array(jnp.uint8, *bucket, 3),
            tokens={},
            micro=MicroConditioning(*(array(jnp.int32, 2) for _ in range(3))),
            example=array(jnp.int32),
            replaced=array(jnp.bool_),
        )

    # State

    def abstract_state(self, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Params]:
        """Shapes, dtypes and shardings of the state and of the frozen parameters; no array is created."""
        params = unflatten(abstract_leaves(self.initial_config, self.parts))
        trained, frozen = partition(params, self.config.training.trainable, self._layers)
        return sharding.placed(mesh, jax.eval_shape(self.create, trained)), sharding.placed(mesh, frozen)

    @property
    def _layers(self) -> Layers | None:
        training = self.config.training
        return training.layers if isinstance(training, TrainingConfig) else None

    def create(self, params: Params) -> TrainState:
        """The state before the first step, of trainable parameters. Pure: compiled by `jitted_start`."""
        return create(params, self.optimiser, self.config.ema)

    @property
    def base_dtype(self) -> BaseDtype:
        """How parameters are kept that are not trained. Here: as those that are."""
        return BaseDtype.FLOAT32

    def initial_weights(self, mesh: Mesh, progress: bool = True) -> dict[str, Float[jax.Array, "..."]]:
        """The parameters that are not initialised at random, by path, with their shardings."""
        return initial_weights(
            self.config.training,
            self.loaded_config,
            mesh,
            parts=self.parts,
            measures_scale=self.measures_scale,
            base_dtype=self.base_dtype,
            progress=progress,
        )

    def fresh_state(
        self, mesh: Mesh, abstract: TrainState, initial: dict[str, Float[jax.Array, "..."]], progress: bool = True
    ) -> tuple[TrainState, Params]:
        """The state before the first step and the frozen parameters. Parameters are taken from `initial`, by path, and
        donated; those that it lacks are random. Each array is created with its sharding."""
        params = self.all_parameters(mesh, initial, progress)
        trained, frozen = partition(params, self.config.training.trainable, self._layers)
        return self.jitted_start(abstract)(trained), frozen

    def all_parameters(self, mesh: Mesh, initial: dict[str, Float[jax.Array, "..."]], progress: bool = True) -> Params:
        """The model's parameters before the first step: those in `initial`, by path, and random ones."""
        random = random_weights(
            self.config.training,
            self.initial_config,
            mesh,
            parts=self.parts,
            given=initial,
            base_dtype=self.base_dtype,
            progress=progress,
        )
        return unflatten(random | initial)

    def jitted_start(self, abstract: TrainState) -> Callable[[Params], TrainState]:
        """Trainable parameters → the state before the first step. The parameters are donated."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(self.create, out_shardings=shardings, donate_argnums=0)

    # Step

    @abc.abstractmethod
    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        """The mean loss of one (micro-)batch, and `config.losses` by name. keys: one per example."""

    def step(self) -> Step:
        """The pure step for one batch."""
        return make_step(self.config, self.optimiser, self.loss)

    def model_flops(self, arguments: tuple[Any, ...]) -> float:
        """Model FLOPs of one step, for MFU: those of the mathematics, with XLA's attention and no rematerialisation.

        arguments: the step's abstract arguments.
        """
        plain = Compute(dtype=self.config.compute.dtype, attention=Attention.XLA, remat=Remat.NONE)
        return flops.count(type(self)(dataclasses.replace(self.config, compute=plain)).step(), *arguments).total

    # Validation

    @property
    @abc.abstractmethod
    def validates_every(self) -> int | None:
        """Steps between validation grids; None: no validation."""

    @property
    def validates_at_start(self) -> bool:
        """Whether there is a grid before the first step too. Here: no."""
        return False

    @abc.abstractmethod
    def validation(self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes) -> Grid:
        """Images that show what was learnt. All processes compute them together."""

    def counterparts(
        self, model: Model, examples: Examples, mesh: Mesh, processes: Processes
    ) -> UInt8[np.ndarray, "images height width 3"]:
        """The model's own images for examples of the data, with which `config.validation_metrics` compares them:
        samples of their captions, reconstructions. All processes compute them together, the same ones each time."""
        raise NotImplementedError

    @property
    def exports(self) -> bool:
        """Whether `export` writes a file. Here: no."""
        return False

    def export(
        self,
        state: TrainState,
        frozen: Params,
        path: Path,
        step: int,
        mesh: Mesh,
        processes: Processes,
        dataset: BucketedDataset | None = None,
    ) -> dict[str, Path]:
        """Writes what was trained as files of their own: `path`, or beside it. All processes call it together, and the
        first writes. Returns the files by what they are, "adapter". dataset: for what a file says of its training."""
        raise NotImplementedError

    def export_notes(self) -> Sequence[str]:
        """Notes for the user on the files: who does not read them. Here: none."""
        return ()

    def measure(
        self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes, progress: bool = True
    ) -> Measured | None:
        """What an export has to know of the trained model besides its parameters, measured when training ends, by all
        processes together. None, as here: nothing."""
        del model, dataset, mesh, processes, progress


def abstract_rows(mesh: Mesh | AbstractMesh, batch_size: int, dtype: Any, *shape: int) -> Any:
    """An abstract array [batch, *shape] (a ShapeDtypeStruct), sharded as a batch. `Any`: it stands in for an array."""
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))
