"""The configuration of a training run: the dataclasses that stand beside the code, gathered into one tree.

    RunConfig          what every run has, whatever is learnt: data, mesh, optimiser, average, checkpoints
    └ TrainConfig      a latent diffusion model learns to denoise
    └ …                other objectives have theirs beside them: sdxl_jax/training/objectives/

A configuration file is Python with a function `get_config()` that returns one of them: its type says what is learnt.
Every field can be overridden on the command line (`--data.batch-size 64`). The resolved configuration is saved with the
run as JSON and compared when the run is resumed.
"""

import dataclasses
import enum
import math
import runpy
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdxl_jax.conditioning.prompts import check_text
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.errors import RENAMED, InputError, check_ranges, nearest_first, old_names
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig, OptimiserKind
from sdxl_jax.sharding import MeshConfig


class OnNonfinite(enum.Enum):
    """What a step does whose loss or gradient is no finite number."""

    STOP = "stop"
    """The run ends, before anything of it is saved."""
    SKIP = "skip"
    """The step counts, and changes nothing: neither parameters nor average nor optimiser, whose schedule waits too."""


class CompileAhead(enum.Enum):
    """When the steps of the buckets are compiled."""

    BACKGROUND = "background"
    """Beside training, in the order in which the data needs them: the first step waits for its own program alone."""
    BEFORE = "before"
    """All of them before the first step: no step waits, and the compiler takes no core from the data."""
    ON_DEMAND = "on_demand"
    """Each when a step needs it: nothing is compiled in vain, and training stops for each."""


@dataclass(frozen=True)
class LoopConfig:
    """What the loop does, whatever is learnt."""

    steps: int = 600_000
    """Updates. Higher: longer."""
    seed: int = 0
    """All random numbers on the device follow from it: initial weights, noise, timesteps, dropout."""
    trainable: tuple[str, ...] = field(default=("^unet/",), metadata={RENAMED: "trains"})
    """Patterns of the paths of trainable parameters; the others are frozen."""
    on_nonfinite: OnNonfinite = OnNonfinite.STOP
    """What happens at a loss or gradient that is no finite number."""
    init_from: tuple[str, ...] = ()
    """Models, or networks alone, in any layout, whose weights a new run starts from; the last one wins. A part that is
    in none of them starts from random weights."""
    init_parts: tuple[str, ...] | None = None
    """Parts of the model that are taken of `init_from`, e.g. ("vae", "text_encoder"); None: all that are there."""
    init_changes: tuple[str, ...] = ()
    """What the UNet of `init_from` may have been trained with otherwise than it is trained on here, of prediction,
    schedule, unconditional and distilled, e.g. ("prediction",) to make a v-prediction model of an ε-prediction one."""
    compile_ahead: CompileAhead = CompileAhead.BACKGROUND
    """When the steps of the buckets are compiled: beside training, before it, or each when it is needed."""
    compile_threads: int = 1
    """Buckets compiled at once. Higher: all are there sooner; each takes cores and memory of every process (at full size
    about 10 GiB), which reading the data may need too."""
    compilation_cache: str | None = None
    """Folder that compiled programs are kept in and read from; several runs may share it. Those of
    `sdxl-jax compile` are read from it too. None: jax's own setting (JAX_COMPILATION_CACHE_DIR), without which every
    start compiles again."""


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """What the loop does, of a model that learns to denoise."""

    caption_dropout: float = 0.1
    """Share of examples whose text is replaced by no text, 0 to 1. Higher: better guidance, weaker prompts."""


class OnFailedSave(enum.Enum):
    """What a checkpoint that could not be written does to the run."""

    STOP = "stop"
    GO_ON = "go_on"


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept: those that one of the three fields asks for."""

    every_steps: int = 1000
    """Steps between checkpoints. Lower: less is lost to a crash, more is written."""
    keep: int = 3
    """Newest checkpoints that are kept. Higher: more room is taken."""
    keep_every_hours: float | None = None
    """Besides, one of so many hours is kept for ever. Higher: fewer. None: none."""
    keep_best: str | None = None
    """Besides, that one is kept whose mean of this metric since the checkpoint before it is lowest, e.g. loss. None:
    none."""
    on_failed_save: OnFailedSave = OnFailedSave.STOP
    """A full disk, for example: STOP ends the run with an error, GO_ON says so and trains on. The checkpoints of before
    stay whole either way."""


@dataclass(frozen=True)
class ProcessesConfig:
    """The processes that train together, one a machine; the environment says which they are (training/processes.py)."""

    join_timeout_seconds: float = 300.0
    """Until a process that has not joined is given up. Higher: slower machines may come later."""


@dataclass(frozen=True)
class ValidationConfig:
    """The images in RUN/samples."""

    every_steps: int | None = 5000
    """Steps between grids; None: none."""
    prompts: tuple[str, ...] = ()
    """One image a prompt and size."""
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    """(height, width) of the images."""
    steps: int = 30
    """Euler steps an image."""
    guidance: float = 5.0
    """Strength of classifier-free guidance, 0 to 1000; none up to 1, as in `sample`."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where else the numbers go; RUN/metrics.jsonl and RUN/tensorboard have them always."""

    wandb_project: str | None = None
    """Project of Weights & Biases; None: nothing is sent. Needs the package wandb."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, whatever is learnt. The type of what stands in a configuration file, one of
    those that extend this one, chooses that (sdxl_jax/training/objectives/)."""

    data: DataConfig
    """What is trained on, and in which shapes and order."""
    compute: Compute = field(default_factory=Compute)
    """How the networks are computed."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices share the work."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """How the parameters follow the gradient."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Their moving average, which is sampled from."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """What the loop does."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When and how many."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig, metadata={RENAMED: "hosts"})
    """The processes that train together."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where else the numbers go."""

    @property
    def wants_captions(self) -> bool:
        """Whether images without a caption are refused."""
        return True

    @property
    def losses(self) -> tuple[str, ...]:
        """The terms of the loss that a step reports besides the loss itself."""
        return ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a step reports (training/step.py)."""
        skips = self.training.on_nonfinite is OnNonfinite.SKIP
        return ("loss", *self.losses, "learning_rate", "grad_norm", "replaced", *(("skipped",) if skips else ()))

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for what does not fit together."""
        check_ranges(
            [
                ("training.steps", self.training.steps, 0, math.inf),
                ("training.compile_threads", self.training.compile_threads, 1, math.inf),
                ("optimiser.warmup_steps", self.optimiser.warmup_steps, 0, math.inf),
                ("optimiser.accumulate", self.optimiser.accumulate, 1, math.inf),
                ("checkpoint.every_steps", self.checkpoint.every_steps, 1, math.inf),
                ("checkpoint.keep", self.checkpoint.keep, 1, math.inf),
                ("checkpoint.keep_every_hours", self.checkpoint.keep_every_hours, 1 / 3600, math.inf),
                ("processes.join_timeout_seconds", self.processes.join_timeout_seconds, 1, math.inf),
            ]
        )
        best = self.checkpoint.keep_best
        if best is not None and best not in (metrics := self.metrics):
            known = ", ".join(nearest_first(best, metrics))
            raise InputError(f"checkpoint.keep_best={best} is no metric. Known, nearest first: {known}")
        if self.training.init_parts is not None and not self.training.init_from:
            raise InputError(
                f"training.init_parts={','.join(self.training.init_parts)} has no effect without training.init_from. "
                "Name the models to take them of, or leave it out (None)"
            )
        if unknown := [name for name in self.training.init_changes if name not in MEANING]:
            raise InputError(
                f"training.init_changes has {unknown[0]}. Known, nearest first: "
                f"{', '.join(nearest_first(unknown[0], MEANING))}"
            )
        self.optimiser.check()
        self.ema.check()
        averages = self.optimiser.kind is OptimiserKind.SCHEDULE_FREE
        if averages != (self.ema.kind is EmaKind.OPTIMISER):
            raise InputError(
                f"optimiser.kind={self.optimiser.kind.value} {'makes' if averages else 'does not make'} an average of "
                f"its own, and ema.kind={self.ema.kind.value}. Set ema.kind={'optimiser' if averages else 'warmup'}"
            )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that the training of a latent diffusion model depends on (training/objectives/denoising.py)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What the weights depend on."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How the error is weighed."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """What the loop does."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The images in RUN/samples."""

    def check(self) -> None:
        """Raises InputError for numbers out of range and parts of the model that do not fit together."""
        self.model.check()
        super().check()
        check_ranges(
            [
                ("training.caption_dropout", self.training.caption_dropout, 0, 1),
                ("validation.every_steps", self.validation.every_steps, 1, math.inf),
                ("validation.steps", self.validation.steps, 1, self.model.schedule.timesteps),
                ("validation.guidance", self.validation.guidance, 0, 1000),
            ]
        )
        self.loss.check(self.model.schedule.timesteps)
        if self.model.unet.in_channels != self.model.vae.latent_channels:
            raise InputError(
                f"model.unet.in_channels={self.model.unet.in_channels}: training feeds the latent's "
                f"{self.model.vae.latent_channels} channels and nothing else. Set it to that"
            )
        self._check_data()
        check_sizes("validation.sizes", self.validation.sizes, self.model.vae.downsampling)
        for number, prompt in enumerate(self.validation.prompts, 1):
            check_text(prompt, f"Prompt {number} of validation.prompts")
        if self.validation.prompts and not self.validation.sizes:
            raise InputError("validation.prompts are given but no validation.sizes. Give at least one (height, width)")

    def _check_data(self) -> None:
        told = self.model.is_refiner
        if told and self.data.aesthetic is None:
            raise InputError(
                "model.micro.numbers=size_crop_aesthetic needs an aesthetic score for every image. Set "
                "data.aesthetic to the name of that number in the data (`sdxl-jax data inspect` lists them), or train "
                "with size_crop_target"
            )
        if self.data.aesthetic is not None and not told:
            raise InputError(
                f"data.aesthetic={self.data.aesthetic} has no effect: this model is told no score. Remove it, or train "
                "one with model.micro.numbers=size_crop_aesthetic, as the refiner"
            )
        if self.data.cache is not None and self.data.crops_per_image is None:
            raise InputError(
                f"data.cache={self.data.cache} holds a fixed number of crops an image. Set data.crops_per_image to it, "
                "e.g. 4 (1 shows each image in one crop for ever)"
            )


def check_sizes(name: str, sizes: Collection[tuple[int, int]], factor: int) -> None:
    """Raises InputError for a (height, width) that the autoencoder, which reduces both by `factor`, cannot take."""
    for height, width in sizes:
        if height < 1 or width < 1 or height % factor or width % factor:
            raise InputError(f"{name} has ({height}, {width}). Give positive multiples of {factor}")


MEANING = ("prediction", "schedule", "unconditional", "distilled")
"""Fields of a model's configuration that say what its UNet's weights mean: another value makes others of them."""

_Config = TypeVar("_Config", bound=RunConfig)

MAY_CHANGE = (
    "checkpoint",
    "data.cache",
    "data.cache_of_other_code",
    "data.folder",
    "data.max_bad_share",
    "data.on_refused",
    "data.read_ahead",
    "data.sources",
    "data.verify_images",
    "data.workers",
    "logging",
    "model.sampling",
    "processes",
    "training.compilation_cache",
    "training.compile_ahead",
    "training.compile_threads",
    "training.init_changes",
    "training.init_from",
    "training.init_parts",
    "validation",
)
"""Fields, or groups of them, that a resumed run may set again: they do not change what is learnt. Folders may have
moved, their contents are compared, with the weights of several sources; the frozen weights are in the run."""

SAME_WITHIN_ROUNDING = ("compute.attention", "compute.compiler_options", "compute.remat", "compute.unroll", "mesh")
"""Those that may change too, and change the order of additions: a resumed run says so."""


def load(path: Path, kind: type[_Config] = RunConfig) -> _Config:
    """Runs a configuration file and returns what its `get_config()` gives, which must be of a kind.

    Raises InputError for a missing file, a file without `get_config`, another kind of configuration, unknown fields,
    and whatever the file raises.
    """
    if not path.is_file():
        raise InputError(f"There is no configuration file {path}. Give a Python file with get_config(), see configs/")
    try:
        functions = runpy.run_path(str(path))
        if "get_config" not in functions:
            raise InputError(f"{path} has no get_config(). Define it; it returns a sdxl_jax.config.TrainConfig")
        config = functions["get_config"]()
    except InputError:
        raise
    except Exception as error:  # the file is the user's program: what it raises is about their input
        raise InputError(
            f"{path} fails with {type(error).__name__}: {error}{_nearest_field(str(error))}. Fix it; --debug shows "
            "where"
        ) from error
    if not isinstance(config, kind) or type(config) is RunConfig:
        expected = "TrainConfig, or the configuration of another objective (sdxl_jax/training/objectives/)"
        raise InputError(
            f"get_config() of {path} returned {type(config).__name__}, expected a "
            f"{expected if kind is RunConfig else kind.__name__}"
        )
    return from_json(to_json(config), type(config))  # a list where a tuple belongs becomes one; a wrong type is named


def _nearest_field(message: str) -> str:
    """For Python's message about an unknown keyword: the dataclass's fields, nearest first."""
    if "unexpected keyword argument" not in message:
        return ""
    class_name, unknown = message.split(".", 1)[0], message.split("'")[1]
    kinds = [kind for top in RunConfig.__subclasses__() for kind in _dataclasses(top)]
    for kind in kinds:
        if kind.__name__ == class_name:
            if new := old_names(kind).get(unknown):
                return f". It is called {new} now"
            names = nearest_first(unknown, (field.name for field in dataclasses.fields(kind)))
            return f". Its fields, nearest first: {', '.join(names)}"
    return ""


def _dataclasses(kind: type) -> list[type]:
    """A dataclass and those of its fields, from their defaults."""
    found = [kind]
    for entry in dataclasses.fields(kind):
        inner = entry.default_factory() if callable(entry.default_factory) else entry.default
        for value in inner if isinstance(inner, tuple) else (inner,):
            if dataclasses.is_dataclass(value):
                found += _dataclasses(type(value))
    return [*found, DataConfig]


def is_within(line: str, names: Collection[str]) -> bool:
    """Whether a line of `differences` is about one of the fields, or fields of one of the groups, that are named."""
    name = line.split(":", 1)[0]
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in names)


def blocking_differences(old: Any, new: Any) -> list[str]:
    """The differences that a resumed run may not have."""
    allowed = [*MAY_CHANGE, *SAME_WITHIN_ROUNDING]
    if new.get("optimiser", {}).get("decay") != Decay.COSINE.value:
        allowed.append("training.steps")  # no other schedule depends on where the end is
    return [line for line in differences(old, new) if not is_within(line, allowed)]
