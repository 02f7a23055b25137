"""The configuration of a training run: the dataclasses that stand beside the code, gathered into one tree.

A configuration file is Python with a function `get_config()` that returns a `TrainConfig`. Every field can be
overridden on the command line (`--data.batch-size 64`). The resolved configuration is saved with the run as JSON and
compared when the run is resumed.
"""

import dataclasses
import enum
import json
import math
import runpy
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cattrs

from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
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
class TrainingConfig:
    """What the loop does."""

    steps: int = 600_000
    """Updates. Higher: longer."""
    seed: int = 0
    """All random numbers on the device follow from it: initial weights, noise, timesteps, dropout."""
    trains: tuple[str, ...] = ("^unet/",)
    """Patterns of the paths of parameters that train; the rest stays as it is."""
    on_nonfinite: OnNonfinite = OnNonfinite.STOP
    """What happens at a loss or gradient that is no finite number."""
    caption_dropout: float = 0.1
    """Share of examples whose text is replaced by no text, 0 to 1. Higher: better guidance, weaker prompts."""
    init_from: tuple[str, ...] = ()
    """Models, or networks alone, in any layout, whose weights a new run starts from; the last one wins. A part that is
    in none of them starts from random weights."""
    init_parts: tuple[str, ...] | None = None
    """Parts of the model that are taken of `init_from`, e.g. ("vae", "text_encoder"); None: all that are there."""
    compile_ahead: CompileAhead = CompileAhead.BACKGROUND
    """When the steps of the buckets are compiled: beside training, before it, or each when it is needed."""
    compile_threads: int = 1
    """Buckets compiled at once. Higher: all are there sooner; each takes cores and memory of every host (at full size
    about 10 GiB), which reading the data may need too."""
    compilation_cache: str | None = None
    """Folder that compiled programs are kept in and read from; several runs may share it. Those of
    `sdxl-jax compile` are read from it too. None: jax's own setting (JAX_COMPILATION_CACHE_DIR), without which every
    start compiles anew."""


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
class HostsConfig:
    """The processes that train together, one a machine; the environment says which they are (training/hosts.py)."""

    join_timeout_seconds: float = 300.0
    """Until a process that has not joined is given up. Higher: slower machines may come later."""


@dataclass(frozen=True)
class ValidationConfig:
    """The pictures in RUN/samples."""

    every_steps: int | None = 5000
    """Steps between grids; None: none."""
    prompts: tuple[str, ...] = ()
    """One picture a prompt and size."""
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    """(height, width) of the pictures."""
    steps: int = 30
    """Euler steps a picture."""
    guidance: float = 5.0
    """Strength of classifier-free guidance; 1 is none."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where else the numbers go; RUN/metrics.jsonl and RUN/tensorboard have them always."""

    wandb_project: str | None = None
    """Project of Weights & Biases; None: nothing is sent. Needs the package wandb."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on."""

    data: DataConfig
    """What is trained on, and in which shapes and order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What the weights depend on."""
    compute: Compute = field(default_factory=Compute)
    """How the networks are computed."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices share the work."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How the error is weighed."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """How the parameters follow the gradient."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Their moving average, which is sampled from."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """What the loop does."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When and how many."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """The processes that train together."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The pictures in RUN/samples."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where else the numbers go."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a step tells (training/step.py)."""
        skips = self.training.on_nonfinite is OnNonfinite.SKIP
        return ("loss", "learning_rate", "grad_norm", "replaced", *(("skipped",) if skips else ()))

    def check(self) -> None:
        """Raises InputError for numbers out of range and parts of the model that do not fit together."""
        self.model.check()
        ranges: list[tuple[str, float | None, float, float]] = [
            ("training.steps", self.training.steps, 0, math.inf),
            ("training.compile_threads", self.training.compile_threads, 1, math.inf),
            ("training.caption_dropout", self.training.caption_dropout, 0, 1),
            ("optimiser.warmup_steps", self.optimiser.warmup_steps, 0, math.inf),
            ("optimiser.accumulate", self.optimiser.accumulate, 1, math.inf),
            ("checkpoint.every_steps", self.checkpoint.every_steps, 1, math.inf),
            ("checkpoint.keep", self.checkpoint.keep, 1, math.inf),
            ("checkpoint.keep_every_hours", self.checkpoint.keep_every_hours, 1 / 3600, math.inf),
            ("hosts.join_timeout_seconds", self.hosts.join_timeout_seconds, 1, math.inf),
            ("validation.every_steps", self.validation.every_steps, 1, math.inf),
            ("validation.steps", self.validation.steps, 1, self.model.schedule.timesteps),
        ]
        for name, value, low, high in ranges:
            if value is not None and not low <= value <= high:
                expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise InputError(f"{name}={value} is out of range. Give {expected}")
        best = self.checkpoint.keep_best
        if best is not None and best not in (metrics := self.metrics):
            known = ", ".join(nearest_first(best, metrics))
            raise InputError(f"checkpoint.keep_best={best} is no metric. Known, nearest first: {known}")
        if self.training.init_parts is not None and not self.training.init_from:
            raise InputError(
                f"training.init_parts={self.training.init_parts} has no effect without training.init_from. Name the "
                "models to take them of, or leave it out (None)"
            )
        self.loss.check(self.model.schedule.timesteps)
        self.optimiser.check()
        self.ema.check()
        averages = self.optimiser.kind is OptimiserKind.SCHEDULE_FREE
        if averages != (self.ema.kind is EmaKind.OPTIMISER):
            raise InputError(
                f"optimiser.kind={self.optimiser.kind.value} {'makes' if averages else 'does not make'} an average of "
                f"its own, and ema.kind={self.ema.kind.value}. Set ema.kind={'optimiser' if averages else 'warmup'}"
            )
        if self.model.unet.in_channels != self.model.vae.latent_channels:
            raise InputError(
                f"model.unet.in_channels={self.model.unet.in_channels}: training feeds the latent's "
                f"{self.model.vae.latent_channels} channels and nothing else. Set it to that"
            )
        told = self.model.is_refiner
        if told and self.data.aesthetic is None:
            raise InputError(
                "model.micro.numbers=size_crop_aesthetic needs an aesthetic score for every picture. Set "
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
                "e.g. 4 (1 shows each picture in one crop for ever)"
            )
        if self.validation.prompts and not self.validation.sizes:
            raise InputError("validation.prompts are given but no validation.sizes. Give at least one (height, width)")
        factor = self.model.vae.downsampling
        for height, width in self.validation.sizes:
            if height < 1 or width < 1 or height % factor or width % factor:
                raise InputError(f"validation.sizes has ({height}, {width}). Give positive multiples of {factor}")


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
    "hosts",
    "logging",
    "training.compilation_cache",
    "training.compile_ahead",
    "training.compile_threads",
    "training.init_from",
    "training.init_parts",
    "validation",
)
"""Fields, or groups of them, that a resumed run may set anew: they do not change what is learnt. Folders may have
moved, their contents are compared, with the weights of several sources; the frozen weights are in the run."""

SAME_WITHIN_ROUNDING = ("compute.attention", "compute.compiler_options", "compute.remat", "compute.unroll", "mesh")
"""Those that may change too, and change the order of additions: a resumed run says so."""

_converter = cattrs.Converter(forbid_extra_keys=True)


def _either_vae(value: Any, _: Any) -> AnyVaeConfig:
    """The kind is not written beside the fields, which tell it."""
    kind = TinyVaeConfig if isinstance(value, dict) and "decoder_blocks" in value else VaeConfig
    return _converter.structure(value, kind)


_converter.register_structure_hook(AnyVaeConfig, _either_vae)


def to_json(config: Any) -> Any:
    """A dataclass tree as JSON values: enums by value, tuples as lists."""
    return json.loads(json.dumps(_converter.unstructure(config)))


def from_json(value: Any, kind: type) -> Any:
    """The reverse of `to_json`. Raises InputError for unknown, missing or mistyped fields."""
    try:
        return _converter.structure(value, kind)
    except (cattrs.BaseValidationError, ValueError, TypeError, AttributeError) as error:
        problems = "; ".join(cattrs.transform_error(error))
        raise InputError(f"This is no {kind.__name__} that this version can read: {problems}") from error


def read_saved(path: Path) -> dict[str, Any]:
    """What a run keeps in its config.json; "config" is in it. Raises InputError if it cannot be read."""
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved["config"], dict):
            raise TypeError(f"it has config={saved['config']!r}")
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is no configuration of a run ({error}). Restore it, or choose another run "
            "(with train: another --run-dir)"
        ) from error
    return saved


def load(path: Path) -> TrainConfig:
    """Runs a configuration file and returns what its `get_config()` gives.

    Raises InputError for a missing file, a file without `get_config`, unknown fields, and whatever the file raises.
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
            f"{path} fails with {type(error).__name__}: {error}{_nearest_field(str(error))}. Mend it; --debug shows "
            "where"
        ) from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"get_config() of {path} returned {type(config).__name__}, expected a TrainConfig")
    return from_json(to_json(config), TrainConfig)  # a list where a tuple belongs becomes one; a wrong type is named


def _nearest_field(message: str) -> str:
    """For Python's message about an unknown keyword: the dataclass's fields, nearest first."""
    if "unexpected keyword argument" not in message:
        return ""
    class_name, unknown = message.split(".", 1)[0], message.split("'")[1]
    for kind in _dataclasses(TrainConfig):
        if kind.__name__ == class_name:
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


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`name: old -> new` for every value that differs between two `to_json` trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{prefix}{name}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


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
