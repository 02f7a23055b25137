"""The configuration of a training run: the dataclasses that are defined beside the code, gathered into one tree.

    RunConfig          common to every objective: data, mesh, optimiser, average, checkpoints
    └ TrainConfig      denoising: a latent diffusion model
    └ …                other objectives define theirs: sdxl_jax/training/objectives/

A configuration file is Python with a function `get_config()` that returns one of them: its type chooses the objective.
Every field can be overridden on the command line (`--data.batch-size 64`). The resolved configuration is saved with the
run as JSON and compared when the run is resumed.
"""

import dataclasses
import enum
import hashlib
import math
import runpy
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sdxl_jax.adapters.embeddings import Norm, TextualInversionConfig
from sdxl_jax.adapters.targets import AdapterConfig, Layers, Spelling
from sdxl_jax.arrays import BaseDtype
from sdxl_jax.conditioning.classes import check as check_classes
from sdxl_jax.conditioning.prompts import check_text
from sdxl_jax.data.mixture import Target
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.errors import RENAMED, InputError, check_ranges, nearest_first, old_names
from sdxl_jax.evaluation.settings import OF_INCEPTION, SCORES, Metric
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.mesh import ProcessesConfig
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig, OptimiserKind, rate_names
from sdxl_jax.progress import LogFormat
from sdxl_jax.sharding import MeshConfig


class OnNonfinite(enum.Enum):
    """What happens at a step with a non-finite loss or gradient (NaN or inf)."""

    STOP = "stop"
    """The run ends before that step is saved."""
    SKIP = "skip"
    """The step is counted but changes nothing: neither parameters, average nor optimiser; the learning rate schedule
    does not advance either."""


class CompileAhead(enum.Enum):
    """When the steps of the buckets are compiled."""

    BACKGROUND = "background"
    """During training, in the order in which the data needs them: the first step waits only for its own program."""
    BEFORE = "before"
    """All before the first step: no later step waits, and the compiler does not compete with data loading for cores."""
    ON_DEMAND = "on_demand"
    """Each when a step first needs it: nothing is compiled unnecessarily, and training pauses for each."""


@dataclass(frozen=True)
class LoopConfig:
    """The training loop, for every objective."""

    steps: int = 600_000
    """Number of updates. Higher: longer training."""
    seed: int = 0
    """Seed of all random numbers on the device: initial weights, noise, timesteps, dropout."""
    trainable: tuple[str, ...] = field(default=("^unet/",), metadata={RENAMED: "trains"})
    """Regular expressions found in the paths of trainable parameters; the others are frozen."""
    on_nonfinite: OnNonfinite = OnNonfinite.STOP
    """What happens at a step with a non-finite loss or gradient (NaN or inf)."""
    init_from: tuple[str, ...] = ()
    """Models or single networks, in any layout, from whose weights a new run starts; for a part in several of them, the
    last one is used. A part in none of them starts from random weights."""
    init_parts: tuple[str, ...] | None = None
    """Parts of the model to load from `init_from`, e.g. ("vae", "text_encoder"); None: all parts found there."""
    init_changes: tuple[str, ...] = ()
    """Fields in which this run may differ from the UNet's training in `init_from`: prediction, schedule, unconditional,
    distilled, noise; e.g. ("prediction",) to turn an ε-prediction model into a v-prediction one."""
    compile_ahead: CompileAhead = CompileAhead.BACKGROUND
    """When the steps of the buckets are compiled: during training, before it, or on demand."""
    compile_threads: int = 1
    """Buckets compiled at once. Higher: all are ready sooner; each takes cores and memory on every process (about 10
    GiB at full size), which data loading may need too."""
    compilation_cache: str | None = "user"
    """Folder of compiled programs, read and written; several runs may share it. AOT programs of `sdxl-jax compile` are
    read from it too. "user": jax's own setting (JAX_COMPILATION_CACHE_DIR), or without it a folder in the user's cache
    folder, kept below 4 GiB (JAX_COMPILATION_CACHE_MAX_SIZE, in bytes). None: jax's own setting, without which every
    start compiles again."""
    watchdog_minutes: float | None = 30.0
    """Minutes after which a run that hangs is ended, with exit code 1 and the stacks of all threads: the longest wait
    for a batch or for a step. A compilation, a checkpoint or validation images may take four times as long. Higher:
    slower steps are tolerated, and a hang is noticed later. None: never."""


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """The training loop of a latent diffusion model."""

    caption_dropout: float = 0.1
    """Share of examples trained unconditionally, their text replaced by the null embedding, 0 to 1. Higher: better
    guidance, weaker prompts. Has no effect on a model without text encoders."""
    class_dropout: float = 0.0
    """Share of examples whose class is dropped, independently of everything else, 0 to 1; sgm's ImageNet models: 0.2.
    Higher: better guidance, less of the class."""
    micro_dropout: float = 0.0
    """Share of examples for which a condition of micro-conditioning is dropped: original size, crop, target size or
    score, each independently, 0 to 1; sgm's ImageNet models: 0.2. Higher: images follow sizes less closely."""
    layers: Layers | None = None
    """The layers that are trained, of the parameters that `trainable` matches: their kernels and biases. None: all of
    the parameters. More learn more, and take more memory. Of an adapter: adapter.layers."""


@dataclass(frozen=True, kw_only=True)
class ImagePromptConfig:
    """Training with image prompts (training/objectives/image_prompts.py). Needs data.cache, in which `sdxl-jax data
    encode` puts the embedding of each crop."""

    NORMS: ClassVar = ("pooled_text_norm", "image_embedding_norm")
    """Metrics of a step."""

    encoder: str = "weights/clip_vision_g.safetensors"
    """CLIP's image tower, that of the model's last text encoder; SDXL: OpenCLIP's ViT-bigG. A directory with
    config.json, or a .safetensors file."""
    text_dropout: float = 0.5
    """Share of examples conditioned on the image alone, with zeros for the text states, 0 to 1. Higher: more is learnt
    from the image, less for images with text."""
    pooled_rows_alone: bool = False
    """Train the rows of add_embedding's first kernel that read the pooled vector, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Training of a model for inpainting with random masks (training/objectives/inpainting.py)."""

    whole_share: float = 0.25
    """Share of examples whose image is masked as a whole, 0 to 1; Stable Diffusion's inpainting models: 0.25. Higher:
    text to image is kept better, surroundings are followed less."""
    box_share: float = 0.5
    """Of the other examples, the share whose mask is boxes, 0 to 1; the rest have strokes. LaMa: a half. Higher: more
    masks of rectangles, fewer of brushes."""


class OnFailedSave(enum.Enum):
    """What happens if a checkpoint cannot be written."""

    STOP = "stop"
    """The run ends with an error."""
    GO_ON = "go_on"
    """Training continues, with a note."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept: those that any of the three fields selects."""

    every_steps: int = 1000
    """Steps between checkpoints. Lower: less is lost to a crash, more is written."""
    every_minutes: float | None = None
    """Also write a checkpoint when so many minutes have passed since the last, e.g. 10 on machines that may be taken
    away. Lower: less is lost, more is written. None: by steps only."""
    directory: str | None = None
    """Folder of checkpoints/ and frozen/, e.g. gs://BUCKET/NAME, of one run alone. None: the run directory."""
    keep: int = 3
    """Number of newest checkpoints to keep. Higher: more disk space."""
    keep_every_hours: float | None = None
    """Also keep one checkpoint per so many hours, for ever. Higher: fewer. None: none."""
    keep_best: str | None = None
    """Also keep the checkpoint with the lowest mean of this metric since the previous checkpoint, e.g. loss. None:
    none."""
    export_every_steps: int | None = None
    """Steps between adapter files, RUN/adapters/RUN-STEP.safetensors, of a run that trains an adapter or an embedding;
    one is always written at the end. Lower: more files. None: at the end only."""
    on_failed_save: OnFailedSave = OnFailedSave.STOP
    """If a checkpoint cannot be written, e.g. to a full disk: STOP ends the run with an error, GO_ON prints a note and
    continues training. Earlier checkpoints stay complete either way."""


@dataclass(frozen=True, kw_only=True)
class ValidationMetricsConfig:
    """Metrics of the model during training, of a fixed set of images of the data: those of the largest bucket."""

    metrics: tuple[Metric, ...] = ()
    """Metrics, e.g. fid or psnr, logged as validation_fid, validation_psnr. Their weights come from `sdxl-jax evaluate
    --fetch-weights`."""
    metrics_every_steps: int = 5000
    """Steps between measurements. Lower: more often, slower training."""
    metrics_images: int = 256
    """Images of the set, evenly spread over the data. Higher: more reliable scores, slower measurements; FID needs
    2,048."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Their names among the metrics of a step."""
        return tuple(f"validation_{name}" for metric in self.metrics for name in SCORES[metric])

    def check_metrics(self, possible: Collection[Metric]) -> None:
        """Raises InputError for numbers out of range, and for a metric that is not one of those."""
        check_ranges(
            [
                ("validation.metrics_every_steps", self.metrics_every_steps, 1, math.inf),
                ("validation.metrics_images", self.metrics_images, 2, math.inf),
            ]
        )
        if wrong := [metric.value for metric in self.metrics if metric not in possible]:
            raise InputError(
                f"validation.metrics has {wrong[0]}, which is not measured during training. Give some of "
                f"{', '.join(metric.value for metric in possible)}; `sdxl-jax evaluate` has all"
            )


@dataclass(frozen=True)
class ValidationConfig(ValidationMetricsConfig):
    """The validation grids in RUN/samples, and metrics during training."""

    every_steps: int | None = 5000
    """Steps between grids; None: no grids. Lower: more often, slower training."""
    prompts: tuple[str, ...] = ()
    """Prompts to sample; one image per prompt and size."""
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    """(height, width) of the images, in pixels."""
    steps: int = 30
    """Euler steps per image. Higher: more detail, slower validation."""
    guidance: float = 5.0
    """Scale of classifier-free guidance, 0 to 1000; up to 1: no guidance, as in `sample`. Higher: closer to the prompt,
    less varied."""
    classes: tuple[int, ...] = ()
    """Classes to sample, of a model with classes: one image per class, prompt (if there are any) and size."""
    at_start: bool = False
    """A grid before the first step too: of the model that training starts from."""


@dataclass(frozen=True)
class LoggingConfig:
    """Additional metrics logging; RUN/metrics.jsonl and RUN/tensorboard are always written."""

    wandb_project: str | None = None
    """Project of Weights & Biases to log to; None: nothing is sent. Needs the package wandb."""
    format: LogFormat = LogFormat.AUTO
    """How progress and messages are printed: text, json, or auto, which is a bar in a terminal and a notebook, JSON
    under Cloud Logging, and text elsewhere."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, for every objective. A configuration file returns a subclass of it, whose type
    chooses the objective (sdxl_jax/training/objectives/)."""

    data: DataConfig
    """The images and captions, their buckets, batch size and order."""
    compute: Compute = field(default_factory=Compute)
    """How the networks are computed: dtype, attention, rematerialisation."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices share the work: parallelism and sharding."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """The optimiser and its learning rate."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """The moving average of the parameters (EMA), which is sampled from."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """The training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written, and which are kept."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig, metadata={RENAMED: "hosts"})
    """The processes that train together."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Additional metrics logging."""

    @property
    def wants_captions(self) -> bool:
        """Whether images without a caption are refused."""
        return True

    @property
    def losses(self) -> tuple[str, ...]:
        """The terms of the loss that a step reports in addition to the loss."""
        return ()

    @property
    def validation_metrics(self) -> ValidationMetricsConfig | None:
        """Which metrics are measured during training; None: the objective has none."""
        return None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of a step (training/step.py)."""
        skips = self.training.on_nonfinite is OnNonfinite.SKIP
        rates = rate_names(self.optimiser)
        return ("loss", *self.losses, *rates, "grad_norm", "replaced", *(("skipped",) if skips else ()))

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for fields that do not fit together."""
        check_ranges(
            [
                ("training.steps", self.training.steps, 0, math.inf),
                ("training.compile_threads", self.training.compile_threads, 1, math.inf),
                ("training.watchdog_minutes", self.training.watchdog_minutes, 1 / 60, math.inf),
                ("optimiser.warmup_steps", self.optimiser.warmup_steps, 0, math.inf),
                ("optimiser.accumulate", self.optimiser.accumulate, 1, math.inf),
                ("checkpoint.every_steps", self.checkpoint.every_steps, 1, math.inf),
                ("checkpoint.every_minutes", self.checkpoint.every_minutes, 1 / 60, math.inf),
                ("checkpoint.keep", self.checkpoint.keep, 1, math.inf),
                ("checkpoint.export_every_steps", self.checkpoint.export_every_steps, 1, math.inf),
                ("checkpoint.keep_every_hours", self.checkpoint.keep_every_hours, 1 / 3600, math.inf),
                ("processes.join_timeout_seconds", self.processes.join_timeout_seconds, 1, math.inf),
            ]
        )
        best, measured = self.checkpoint.keep_best, self.validation_metrics
        metrics = self.metrics if measured is None else (*self.metrics, *measured.scores)
        if best is not None and best not in metrics:
            known = ", ".join(nearest_first(best, metrics))
            raise InputError(
                f"checkpoint.keep_best={best} is not a logged metric. Give one of these, nearest first: {known}"
            )
        if self.training.init_parts is not None and not self.training.init_from:
            raise InputError(
                f"training.init_parts={','.join(self.training.init_parts)} has no effect without training.init_from. "
                "Give the models to load them from, or leave it out (None)"
            )
        if unknown := [name for name in self.training.init_changes if name not in MEANING]:
            raise InputError(
                f"training.init_changes has {unknown[0]}, which is not one of its names. Known, nearest first: "
                f"{', '.join(nearest_first(unknown[0], MEANING))}"
            )
        self.optimiser.check()
        self.ema.check()
        has_average = self.optimiser.kind is OptimiserKind.SCHEDULE_FREE
        if has_average != (self.ema.kind is EmaKind.OPTIMISER):
            raise InputError(
                f"optimiser.kind={self.optimiser.kind.value} {'has' if has_average else 'does not have'} an average of "
                f"its own, which does not fit ema.kind={self.ema.kind.value}. Set "
                f"ema.kind={'optimiser' if has_average else 'warmup'}"
            )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that training a latent diffusion model depends on (training/objectives/denoising.py)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model: networks, noise schedule, prediction, conditioning."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss: weights, noise and timesteps."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training loop."""
    image_prompt: ImagePromptConfig | None = None
    """Conditioning on the image's embedding in the place of the pooled text; None: on the pooled text."""
    adapter: AdapterConfig | None = None
    """An adapter to train (LoRA and its kin) beside the model, which is then frozen; None: the parameters themselves
    are trained."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The validation grids in RUN/samples, and metrics during training."""
    textual_inversion: TextualInversionConfig | None = None
    """A new token whose embedding vectors are trained beside the model, which is then frozen; None: none. With adapter:
    pivotal tuning."""
    inpainting: InpaintingConfig | None = None
    """Random masks, for a model whose UNet sees a mask (model.unet.in_channels is 9); None: the UNet receives the
    latent alone."""

    @property
    def losses(self) -> tuple[str, ...]:
        return () if self.image_prompt is None else ImagePromptConfig.NORMS

    @property
    def wants_captions(self) -> bool:
        return bool(self.model.text)

    @property
    def validation_metrics(self) -> ValidationMetricsConfig:
        return self.validation

    @property
    def base_dtype(self) -> BaseDtype:
        """How the UNet and the text encoders are kept: in float32, unless something else is trained beside them."""
        beside = self.adapter or self.textual_inversion
        return BaseDtype.FLOAT32 if beside is None else beside.base_dtype

    def check(self) -> None:
        """Raises InputError for numbers out of range and parts of the model that do not fit together."""
        self.model.check()
        super().check()
        self.validation.check_metrics(OF_INCEPTION)
        check_ranges(
            [
                ("training.caption_dropout", self.training.caption_dropout, 0, 1),
                ("training.class_dropout", self.training.class_dropout, 0, 1),
                ("training.micro_dropout", self.training.micro_dropout, 0, 1),
                ("validation.every_steps", self.validation.every_steps, 1, math.inf),
                ("validation.steps", self.validation.steps, 1, self.model.schedule.timesteps),
                ("validation.guidance", self.validation.guidance, 0, 1000),
            ]
        )
        self.loss.check(self.model.schedule.timesteps, self.model.noise)
        self._check_inpainting()
        self._check_data()
        self._check_image_prompt()
        self._check_adapter()
        self._check_textual_inversion()
        self._check_classes()
        check_sizes("validation.sizes", self.validation.sizes, self.model.vae.downsampling)
        for number, prompt in enumerate(self.validation.prompts, 1):
            check_text(prompt, f"Prompt {number} of validation.prompts")
        for name in ("prompts", "classes"):
            if getattr(self.validation, name) and not self.validation.sizes:
                raise InputError(
                    f"validation.{name} has no effect without validation.sizes. Give at least one (height, width), or "
                    f"leave out the {name}"
                )

    def _check_data(self) -> None:
        needs_score = self.model.is_refiner
        if needs_score and self.data.aesthetic is None:
            raise InputError(
                "model.micro.numbers=size_crop_aesthetic needs an aesthetic score for every image. Set "
                "data.aesthetic to the name of the score in the data (sdxl-jax data inspect lists the names), or set "
                "model.micro.numbers=size_crop_target"
            )
        if self.data.aesthetic is not None and not needs_score:
            raise InputError(
                f"data.aesthetic={self.data.aesthetic} has no effect: this model is not conditioned on a score. Leave "
                "it out (None), or set model.micro.numbers=size_crop_aesthetic, as in the refiner"
            )
        has_classes, label = self.model.unet.classes is not None, self.data.label
        if has_classes and label is None:
            raise InputError(
                "model.unet.classes needs a class for every image. Set data.label to the name of the field in the data "
                "(sdxl-jax data inspect lists the names), or to folder, where the subfolders are the classes"
            )
        if label is not None and not has_classes:
            raise InputError(
                f"data.label={label} has no effect: this model is not conditioned on classes. Leave it out (None), or "
                "set model.unet.classes"
            )
        self.check_guidance_input()
        if self.data.cache is not None and self.data.crops_per_image is None:
            raise InputError(
                f"data.cache={self.data.cache} holds a fixed number of crops per image. Set data.crops_per_image to "
                "that number, e.g. 4 (with 1, training sees a single crop of each image)"
            )

    def check_guidance_input(self) -> None:
        """Raises InputError for a UNet with guidance as an input."""
        if self.model.unet.guidance_dim is not None:
            raise InputError(
                f"model.unet.guidance_dim={self.model.unet.guidance_dim}: denoising has no guidance scale to train "
                "this input with. Set it to None, or distil a model"
            )

    def _check_classes(self) -> None:
        """Raises InputError for conditions to drop, and prompts and classes to sample, that the model does not have."""
        given, training = self.model, self.training
        for name, share, has, remedy in (
            ("class_dropout", training.class_dropout, given.unet.classes is not None, "model.unet.classes"),
            ("micro_dropout", training.micro_dropout, given.micro is not None, "model.micro"),
        ):
            if share and not has:
                raise InputError(
                    f"training.{name}={share:g} has no effect on a model with {remedy}=None. Set it to 0, or set "
                    f"{remedy}"
                )
        if self.validation.prompts and not given.text:
            raise InputError(
                "validation.prompts has no effect on a model without text encoders. Give validation.classes instead"
            )
        try:
            check_classes(given.unet.classes, self.validation.classes)
        except InputError as error:
            raise InputError(f"validation.classes: {error}") from error

    def _check_adapter(self) -> None:
        given = self.adapter
        if self.training.layers is not None and (given or self.textual_inversion) is not None:
            raise InputError(
                f"training.layers={self.training.layers.value} has no effect on an adapter or a new token. Leave it "
                "out (None), or set adapter.layers"
            )
        if given is None:
            if of_base := [source.folder for source in self.data.sources if source.target is Target.BASE]:
                raise InputError(
                    f"data.sources gives {of_base[0]} target=base, which needs an adapter: without one the model "
                    "itself is trained, and no frozen one is beside it. Set adapter, or give images of the class and "
                    "target=data"
                )
            return
        given.check()
        if self.image_prompt is not None and self.image_prompt.pooled_rows_alone:
            raise InputError(
                "image_prompt.pooled_rows_alone trains rows of a frozen parameter where adapter is set. Leave one of "
                "them out (image_prompt.pooled_rows_alone=False, adapter=None)"
            )
        if self.optimiser.kind is OptimiserKind.SCHEDULE_FREE and (given.up_rate != 1 or given.norm_limit is not None):
            raise InputError(
                "adapter.up_rate and norm_limit change the updates, which the average of "
                "optimiser.kind=schedule_free does not allow. Leave them out, or use another optimiser, e.g. adamw"
            )

    def _check_textual_inversion(self) -> None:
        given = self.textual_inversion
        if given is None:
            return
        given.check()
        if not self.model.text:
            raise InputError("textual_inversion has no effect on a model without text encoders. Leave it out (None)")
        if self.data.cache is not None:
            raise InputError(
                f"data.cache={self.data.cache} holds the text states of before training, which textual_inversion "
                "changes. Leave out data.cache: text is then encoded in every step"
            )
        if self.adapter is None and self.training.trainable:
            raise InputError(
                f"training.trainable={','.join(self.training.trainable)} has no effect with textual_inversion alone, "
                "which trains embedding vectors. Set training.trainable=(), or give an adapter (pivotal tuning)"
            )
        for name, is_given, has_effect in (
            ("stop", given.stop != 1, self.adapter is not None),
            ("bundle", given.bundle, self.adapter is not None),
            ("base_dtype", given.base_dtype is not BaseDtype.FLOAT32, self.adapter is None),
        ):
            if is_given and not has_effect:
                remedy = "set adapter" if self.adapter is None else f"set adapter.{name}"
                raise InputError(
                    f"textual_inversion.{name} has no effect {'without' if self.adapter is None else 'beside'} an "
                    f"adapter. Leave it out, or {remedy}"
                )
        if given.bundle and self.adapter is not None and self.adapter.file_spelling is Spelling.PEFT:
            raise InputError(
                "textual_inversion.bundle has no place in adapter.file_spelling=peft: diffusers refuses a LoRA with "
                "tensors that it does not know. Leave it out; the vectors have a file of their own"
            )
        if self.optimiser.kind is OptimiserKind.SCHEDULE_FREE and (
            given.rate != 1 or given.stop != 1 or given.norm is not Norm.FREE
        ):
            raise InputError(
                "textual_inversion.rate, stop and norm change the updates, which the average of "
                "optimiser.kind=schedule_free does not allow. Leave them out, or use another optimiser, e.g. adamw"
            )

    def _check_inpainting(self) -> None:
        latent, channels = self.model.vae.latent_channels, self.model.unet.in_channels
        expected = latent if self.inpainting is None else 2 * latent + 1
        if channels != expected:
            what = "receives the latent alone"
            if self.inpainting is not None:
                what = "receives the latent, a mask and the latent of the masked image (inpainting)"
            remedy = ", or set inpainting to train a model for inpainting" if self.model.sees_mask else ""
            raise InputError(
                f"model.unet.in_channels={channels}, but model.vae.latent_channels={latent}: in this training the UNet "
                f"{what}. Set it to {expected}{remedy}"
            )
        if self.inpainting is None:
            return
        check_ranges([(f"inpainting.{name}", value, 0, 1) for name, value in vars(self.inpainting).items()])
        if self.data.cache is not None:
            raise InputError(
                f"data.cache={self.data.cache} holds the latents of whole images, and inpainting encodes masked images "
                "too, with another mask in each epoch. Leave out data.cache: images are then encoded in every step"
            )
        if self.validation.metrics:
            raise InputError(
                "validation.metrics compares images sampled from captions alone, which a model for inpainting does not "
                "make. Leave it out"
            )

    def _check_image_prompt(self) -> None:
        given, model = self.image_prompt, self.model
        if given is None:
            return
        check_ranges([("image_prompt.text_dropout", given.text_dropout, 0, 1)])
        if model.micro is None or not model.text or model.text[-1].clip.projection_dim is None:
            raise InputError(
                "image_prompt has no effect: this model has no pooled text, in whose place the image's embedding would "
                "be. Leave it out (None), or train SDXL"
            )
        if self.data.cache is None:
            raise InputError(
                "image_prompt needs data.cache, which holds the images' embeddings. Set data.cache to a folder, and "
                "run `sdxl-jax data encode` with this configuration first"
            )
        if given.pooled_rows_alone and self.optimiser.kind is OptimiserKind.SCHEDULE_FREE:
            raise InputError(
                "image_prompt.pooled_rows_alone keeps all other rows to the bit, which the average of "
                "optimiser.kind=schedule_free does not. Use another optimiser, e.g. adamw"
            )


def check_sizes(name: str, sizes: Collection[tuple[int, int]], factor: int) -> None:
    """Raises InputError for a (height, width) that is not a multiple of the autoencoder's downsampling `factor`."""
    for height, width in sizes:
        if height < 1 or width < 1 or height % factor or width % factor:
            raise InputError(f"{name} has ({height}, {width}). Give positive multiples of {factor}")


MEANING = ("prediction", "schedule", "unconditional", "distilled", "noise")
"""Fields of a model's configuration that its UNet's weights are trained for: with other values, they mean something
else."""

_Config = TypeVar("_Config", bound=RunConfig)

MAY_CHANGE = (
    "adapter.file_dtype",
    "adapter.file_spelling",
    "adapter.init_from",
    "adapter.trigger_phrase",
    "checkpoint",
    "data.cache",
    "data.cache_of_other_code",
    "data.folder",
    "data.masks",
    "data.max_bad_share",
    "data.on_refused",
    "data.read_ahead",
    "data.sources",
    "data.verify_images",
    "data.workers",
    "discriminator.weights",
    "image_prompt.encoder",
    "logging",
    "model.sampling",
    "processes",
    "teacher.path",
    "textual_inversion.bundle",
    "training.compilation_cache",
    "training.compile_ahead",
    "training.compile_threads",
    "training.init_changes",
    "training.init_from",
    "training.init_parts",
    "training.watchdog_minutes",
    "validation",
)
"""Fields, or groups of them, that may change on resume: they do not affect what is learnt. Folders may have moved;
their contents are compared, with the weights of several sources. The frozen weights are in the run directory."""

SAME_WITHIN_ROUNDING = ("compute.attention", "compute.compiler_options", "compute.remat", "compute.unroll", "mesh")
"""Fields that may change on resume as well, with a note: they change the order of float additions."""


FILES = set[str]()
"""Checksums of the configuration files that this process has run. They are programs: what they change beside the values
takes part in compiled programs."""


def load(path: Path, kind: type[_Config] = RunConfig) -> _Config:
    """Runs a configuration file and returns the result of its `get_config()`, which must be an instance of `kind`.

    Raises InputError for a missing file, a file without `get_config`, another type of configuration, unknown fields,
    and any error that the file raises.
    """
    if not path.is_file():
        raise InputError(
            f"There is no configuration file {path}. Give a Python file with a function get_config(), as in configs/"
        )
    try:
        FILES.add(hashlib.sha256(path.read_bytes()).hexdigest())
        functions = runpy.run_path(str(path))
        if "get_config" not in functions:
            raise InputError(f"{path} has no get_config(). Define it, and return an sdxl_jax.config.TrainConfig")
        config = functions["get_config"]()
    except InputError:
        raise
    except Exception as error:  # the file is the user's program: its errors are about their input
        raise InputError(
            f"{path} fails with {type(error).__name__}: {str(error).rstrip('.')}{_nearest_field(str(error))}. Fix it; "
            "--debug shows where"
        ) from error
    if not isinstance(config, kind) or type(config) is RunConfig:
        expected = kind.__name__
        if kind is RunConfig:
            expected = "TrainConfig, or the configuration of another objective (sdxl_jax/training/objectives/)"
        raise InputError(f"get_config() of {path} returned {type(config).__name__}. Return a {expected}")
    return from_json(to_json(config), type(config))  # turns lists into tuples, and refuses values of a wrong type


def _nearest_field(message: str) -> str:
    """A remedy to append to Python's message about an unknown keyword: the dataclass's fields, nearest first."""
    if "unexpected keyword argument" not in message:
        return ""
    class_name, unknown = message.split(".", 1)[0], message.split("'")[1]
    kinds = [kind for top in _descendants(RunConfig) for kind in _dataclasses(top)]
    for kind in kinds:
        if kind.__name__ == class_name:
            if new := old_names(kind).get(unknown):
                return f". It is called {new} now"
            names = nearest_first(unknown, (field.name for field in dataclasses.fields(kind)))
            return f". Its fields, nearest first: {', '.join(names)}"
    return ""


def _descendants(kind: type) -> list[type]:
    """The subclasses of a class, and theirs."""
    return [each for child in kind.__subclasses__() for each in (child, *_descendants(child))]


def _dataclasses(kind: type) -> list[type]:
    """A dataclass and the dataclasses of its fields, found from their defaults."""
    found = [kind]
    for entry in dataclasses.fields(kind):
        inner = entry.default_factory() if callable(entry.default_factory) else entry.default
        for value in inner if isinstance(inner, tuple) else (inner,):
            if dataclasses.is_dataclass(value):
                found += _dataclasses(type(value))
    return [*found, DataConfig, AdapterConfig, TextualInversionConfig]


def is_within(line: str, names: Collection[str]) -> bool:
    """Whether a line of `differences` is about one of the named fields, or a field of one of the named groups."""
    name = line.split(":", 1)[0]
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in names)


def blocking_differences(old: Any, new: Any) -> list[str]:
    """The differences with which a run must not be resumed."""
    allowed = [*MAY_CHANGE, *SAME_WITHIN_ROUNDING]
    stops_early = (new.get("textual_inversion") or {}).get("stop", 1) < 1
    networks = new, *(new.get(name) or {} for name in ("critic", "discriminator"))
    decays = {(each.get("optimiser") or {}).get("decay") for each in networks}
    if Decay.COSINE.value not in decays and not stops_early:
        allowed.append("training.steps")  # the cosine schedule and the vectors' end depend on the last step, no other
    return [line for line in differences(old, new) if not is_within(line, allowed)]
