"""Teacher and student of a distillation: what its methods share.

    training.init_from ──┬── student: the UNet, or an adapter of it ── trained
                         └── teacher: a frozen UNet
    autoencoder, text encoders ── frozen, of both

`config.model` is the teacher. The student is another model by what it learns, the configuration's `student`: it may
have guidance as an input, and is sampled in its own way. It starts from the teacher's weights (`training.init_from`).

The teacher is `teacher.path`, by default the model of `training.init_from`. A student that is an adapter has it beside
itself already: the frozen base without the adapter. Otherwise a copy of its UNet in the dtype of the computation is
among the frozen parameters, {"teacher": {"unet": …}}, and so in RUN/frozen: a resumed run never looks for it again.

A method is a file beside this one: a configuration that extends `DistillationConfig`, and an objective that extends
`Distillation`, whose `loss` is made of

    examples = self.examples(frozen, batch, keys)             latents and conditioning, with a key per example
    scale = self.guidance_scale(keys)                         one per example, of the teacher's range
    teacher = self.teacher(frozen, examples, scale)           (x_t, timestep) → output, without gradient
    student = self.student(trained, frozen, examples, scale)  the same; with gradient, for parameters like `trained`
    denoised_by(student, …), noised(…), at(values, timestep)  x₀ and ε of a network's output; x_t; a schedule's numbers

Of several trained networks, each is a tree like `trained`: the student of other parameters (an average, a critic) is
`self.student(those, frozen, …)`. Not here: losses, and second optimisers.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int, Int32, Key

from sdxl_jax import sharding
from sdxl_jax.arrays import BaseDtype, Batch, MicroConditioning, Params, type_of_array, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.classes import NO_CLASS
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.config import LoopConfig, TrainConfig
from sdxl_jax.diffusion.continuous import predicted
from sdxl_jax.diffusion.loss import LossConfig, Network, at
from sdxl_jax.diffusion.parameterisation import Denoised
from sdxl_jax.diffusion.schedule import Schedule, make
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model, ModelConfig, UnconditionalKind, class_embedding, condition, unconditional_text
from sdxl_jax.models import unet, vae
from sdxl_jax.samplers import guidance, presets
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.guidance import Conditioning
from sdxl_jax.sampling.options import Options
from sdxl_jax.training.initial import abstract_base, check_initial, initial_weights
from sdxl_jax.training.objectives import adapters
from sdxl_jax.training.objectives.denoising import Denoising, encoded, with_dropout
from sdxl_jax.training.state import TrainState, merge, partition
from sdxl_jax.weights.lazy import abstract_leaves

Array = jax.Array

TEACHER = "teacher"
"""Key of the teacher's own UNet in the frozen tree."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen model that a student learns from."""

    path: str | None = None
    """A model in any layout, with the configuration of `model`; its UNet is used. None: that of training.init_from,
    from which the student starts too."""
    guidance: tuple[float, float] | None = (4.0, 16.0)
    """Lowest and highest scale of the teacher's classifier-free guidance, where 1 is none, drawn uniformly for each
    example; twice the same number: always that. Higher: closer to the prompt, less varied. The w of papers is the scale
    minus 1. None: the teacher is evaluated for the prompt alone, without guidance."""
    base_dtype: BaseDtype | None = None
    """How a copy of the teacher's UNet is kept: bfloat16 takes 2 bytes per parameter, int8 1. None: the dtype of the
    computation."""

    def check(self) -> None:
        """Raises InputError for a range that is none."""
        if self.guidance is None:
            return
        low, high = self.guidance
        if not 0 <= low <= high <= 1000:
            raise InputError(
                f"teacher.guidance={low:g},{high:g}. Give two numbers of 0 to 1000, the lower first, e.g. 4 16, or None"
            )


@dataclass(frozen=True)
class DistillationConfig(TrainConfig):
    """What all distillations have: a teacher, which `model` describes, and a student that starts from it."""

    has_loss_config: ClassVar[bool] = False
    """Whether the fields of `loss` have an effect."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen model that the student learns from."""

    @property
    def student(self) -> ModelConfig:
        """The model that is sampled from or exported: `model` with what the student has of its own, and how it is
        sampled."""
        raise NotImplementedError

    def as_student(self, sampling: SamplingDefaults, **changes: Any) -> ModelConfig:
        """`model` with what the student has of its own, and with a size that the student is trained at: the model's if
        that is a bucket, else the squarest bucket. The size goes into sampling too, if it is not the model's."""
        own, buckets = self.model.default_size, self.data.buckets
        squarest = min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1])), default=own)
        height, width = own if own in buckets else squarest
        sampling = dataclasses.replace(sampling, size=None if (height, width) == own else (height, width))
        return dataclasses.replace(self.model, default_size=(height, width), sampling=sampling, **changes)

    @property
    def has_copy(self) -> bool:
        """Whether the teacher has parameters of its own among the frozen ones."""
        return self.adapter is None or self.teacher.path is not None

    def check(self) -> None:
        super().check()
        self.teacher.check()
        if not self.training.init_from:
            raise InputError(
                "training.init_from is empty, and so there is no teacher, from which the student starts too. Give the "
                "model to distil"
            )
        if self.training.init_changes:
            raise InputError(
                f"training.init_changes={','.join(self.training.init_changes)}: a teacher is used as it was trained. "
                "Leave it out, and set the fields of model to those of the teacher"
            )
        for name in ("textual_inversion", "image_prompt", "inpainting"):
            if getattr(self, name) is not None:
                raise InputError(f"{name} has no effect on a distillation. Leave it out (None)")
        if self.teacher.base_dtype is not None and not self.has_copy:
            raise InputError(
                f"teacher.base_dtype={self.teacher.base_dtype.value} has no effect beside an adapter, whose frozen "
                "base is the teacher. Set adapter.base_dtype"
            )
        if self.model.noise is not None:
            raise InputError(
                "model.noise is given, but distillation has the discrete noise levels of model.schedule alone. Give a "
                "teacher with these"
            )
        if not self.has_loss_config and self.loss != LossConfig():
            changed = differences(to_json(LossConfig()), to_json(self.loss))
            raise InputError(f"loss has no effect on this distillation, and has {changed[0]}. Leave it out")
        if self.model.unet.guidance_dim is not None and self.teacher.guidance is None:
            raise InputError(
                "teacher.guidance=None, but the teacher has guidance as an input (model.unet.guidance_dim). Give the "
                "range of scales, e.g. 4 16"
            )
        if self.adapter is not None and self.student.unet != self.model.unet:
            raise InputError(
                "adapter: the student is to have guidance as an input, which the teacher lacks, and an adapter cannot "
                "hold that layer. Set guidance_dim=None, or leave out adapter"
            )
        self.student.check()

    def check_guidance_input(self) -> None:
        """A teacher may have it."""


class Examples(NamedTuple):
    """A batch as the networks of a distillation take it, without gradient."""

    latent: Float[Array, "batch height width channels"]
    """Scaled latents of the images."""
    prompt: TextConditioning
    """Of the captions, after dropout."""
    null: TextConditioning
    """The null embedding, of each example."""
    micro: MicroConditioning
    label: Int32[type_of_array, " batch"] | None
    keys: Key[Array, " batch"]
    """One per example, for the method's random numbers."""


Config = TypeVar("Config", bound=DistillationConfig)


class Distillation(Denoising[Config]):
    """An objective with a teacher. A method has `name` and `loss` of its own."""

    weighs_examples = False

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The noise levels of teacher and student."""
        return make(self.config.model.schedule)

    # The models

    @property
    def model_config(self) -> ModelConfig:
        return self.config.student

    @property
    def initial_config(self) -> ModelConfig:
        return self.config.student

    @property
    def loaded_config(self) -> ModelConfig:
        return self.config.model

    def model(self, state: TrainState, frozen: Params) -> Model:
        shared = {part: params for part, params in frozen.items() if part != TEACHER}
        return super().model(state, shared)._replace(config=self.model_config)

    # Checks

    def check(self) -> None:
        super().check()
        if self._adapters is None:
            abstract = unflatten(abstract_leaves(self.model_config))
            trained, _ = partition(abstract, self.config.training.trainable, self._layers)
        else:
            trained = self._adapters.abstract_trees()[0][adapters.ADAPTERS]
        if others := [part for part in trained if part != "unet"]:
            raise InputError(
                f"training.trainable makes {', '.join(others)} trainable, which teacher and student share. Train the "
                'UNet alone, training.trainable=("^unet/",)'
            )
        validation = self.config.validation
        if self.validates_every is not None or validation.metrics:
            options = Options(steps=validation.steps, guidance=validation.guidance)
            try:
                options.check(self.model_config)
            except InputError as error:
                raise InputError(f"validation: {error}") from error

    def check_start(self) -> None:
        """Raises InputError also for a teacher that is missing, or of other latents, schedule or conditioning."""
        super().check_start()
        training, model, given = self.config.training, self.config.model, self.config.teacher
        found = check_initial(training, model, self.parts)
        if "unet" not in found:
            raise InputError(
                f"training.init_from={','.join(training.init_from)} gives no UNet, so there is no teacher. Add the "
                "model to distil, and unet to training.init_parts if that is given"
            )
        if given.path is not None:
            found = check_initial(self._loaded_teacher, model, self.parts, field="teacher.path")
            if "unet" not in found:
                raise InputError(f"teacher.path={given.path} has no UNet. Give a whole model, or a UNet")
        self.check_teacher(found["unet"])

    def check_teacher(self, teacher: ModelConfig) -> None:
        """Raises InputError for a teacher that the method cannot distil: its configuration by its own files, which has
        the networks of `model`. Here: one that would be guided twice."""
        preset, scales = teacher.sampling and teacher.sampling.preset, self.config.teacher.guidance
        preset = presets.CONSISTENCY if preset is None and teacher.distilled else preset
        has_guidance = preset is not None and teacher.unet.guidance_dim is None
        if has_guidance and scales not in (None, (1.0, 1.0)):
            low, high = scales
            raise InputError(
                f"teacher.guidance={low:g},{high:g}, but the teacher has guidance in its weights already: its files "
                f"say preset {preset}. Set teacher.guidance=None, or give another teacher"
            )

    @property
    def _loaded_teacher(self) -> LoopConfig:
        path = self.config.teacher.path
        return LoopConfig(init_from=self.config.training.init_from if path is None else (path,))

    # State

    def abstract_state(self, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Params]:
        state, frozen = super().abstract_state(mesh)
        if not self.config.has_copy:
            return state, frozen
        leaves = abstract_base(self.config.model, self._teacher_dtype)
        copy = unflatten({f"{TEACHER}/{path}": leaf for path, leaf in leaves.items() if path.startswith("unet/")})
        return state, frozen | sharding.placed(mesh, copy)

    @property
    def _teacher_dtype(self) -> BaseDtype:
        return self.config.teacher.base_dtype or BaseDtype(self.config.compute.dtype.value)

    def initial_weights(self, mesh: Mesh, progress: bool = True) -> dict[str, Float[Array, "..."]]:
        options: Any = {"parts": self.parts, "base_dtype": self.base_dtype, "progress": progress}
        # No notes: how the student is sampled is its own.
        return initial_weights(self.config.training, self.loaded_config, mesh, **options, notes=False)

    def fresh_state(
        self, mesh: Mesh, abstract: TrainState, initial: dict[str, Float[Array, "..."]], progress: bool = True
    ) -> tuple[TrainState, Params]:
        state, frozen = super().fresh_state(mesh, abstract, initial, progress)
        if not self.config.has_copy:
            return state, frozen
        only_unet = dataclasses.replace(self._loaded_teacher, init_parts=("unet",))
        options: Any = {"parts": ("unet",), "base_dtype": self._teacher_dtype, "progress": progress, "notes": False}
        return state, frozen | {TEACHER: unflatten(initial_weights(only_unet, self.config.model, mesh, **options))}

    # The batch

    def examples(self, frozen: Params, batch: Batch, keys: Key[Array, " batch"]) -> Examples:
        """The latents of a batch and what the networks are conditioned on; the caption dropout is `training`'s. keys:
        one per example."""
        config, parts, compute = self.config, self.config.model, self.config.compute
        latent_keys, dropout_keys, own_keys = split(keys, 3)
        posterior, prompt = encoded(batch, frozen, parts, compute, None)
        null = unconditional_text(parts, frozen, self._empty, compute)
        prompt = text.drop(prompt, null, dropout_keys, config.training.caption_dropout)
        null = jax.tree.map(lambda row, like: jnp.broadcast_to(row, like.shape), null, prompt)
        micro, label = with_dropout(batch, dropout_keys, config)
        latent = vae.scaled_sample(parts.vae, posterior, latent_keys)
        return Examples(latent, prompt, null, micro, label, own_keys)

    def guidance_scale(self, keys: Key[Array, " batch"]) -> Float[Array, " batch"] | None:
        """Guidance scales within `teacher.guidance`; None: the teacher has no guidance. keys: one per example."""
        if self.config.teacher.guidance is None:
            return None
        low, high = self.config.teacher.guidance
        return low + (high - low) * jax.vmap(jax.random.uniform)(keys)

    # The networks

    def student(
        self,
        trained: Params,
        frozen: Params,
        examples: Examples,
        scale: Float[Array, " batch"] | None = None,
        dropout_keys: Key[Array, " batch"] | None = None,
        ends_in_middle: bool = False,
    ) -> Network:
        """The student, conditioned on the captions. trained: its parameters, or others like them, e.g. their average.
        scale: of guidance, which it gets if it has it as an input. dropout_keys: of an adapter's dropout; None: nothing
        is dropped. ends_in_middle: give the features of its middle, for a head, in the place of its prediction."""
        beside = None
        if self._adapters is not None:
            whole = adapters.of(trained, frozen)
            beside = (whole if dropout_keys is None else self._adapters.of_step(whole, dropout_keys)).get("unet")
        params = merge(trained, {"unet": frozen.get("unet", {})})["unet"]
        given = _conditioned(self.model_config, params, examples)
        return self._network(self.model_config, params, given, scale, beside, ends_in_middle)

    def teacher(self, frozen: Params, examples: Examples, scale: Float[Array, " batch"] | None = None) -> Network:
        """The teacher, conditioned on the captions, without gradient. scale: of guidance, with which its output is
        guided: by its own input if it has one, else by a second evaluation with the null embedding; None: none."""
        config = self.config.model
        params = frozen[TEACHER]["unet"] if self.config.has_copy else frozen["unet"]
        positive = _conditioned(config, params, examples)
        if scale is None or config.unet.guidance_dim is not None:
            return _without_gradient(self._network(config, params, positive, scale, None))
        both = jax.tree.map(lambda *each: jnp.stack(each), positive, _unconditional(config, params, examples))

        def guided(
            x_t: Float[Array, "batch height width channels"], timestep: Int[Array, " batch"]
        ) -> Float[Array, "batch height width channels"]:
            # One after the other: half the memory, and one network to compile.
            def evaluate(given: Conditioning) -> Float[Array, "batch height width channels"]:
                return self._network(config, params, given, None, None)(x_t, timestep)

            with_prompt, without = jax.lax.map(evaluate, both)
            return guidance.combine(guidance.Outputs(with_prompt, without), scale[:, None, None, None])

        return _without_gradient(guided)

    def _network(
        self,
        config: ModelConfig,
        params: Params,
        given: Conditioning,
        scale: Float[Array, " batch"] | None,
        beside: Params | None,
        ends_in_middle: bool = False,
    ) -> Network:
        compute, evaluate = self.config.compute, unet.middle_features if ends_in_middle else unet.apply
        scale = None if config.unet.guidance_dim is None else scale

        def network(
            x_t: Float[Array, "batch height width channels"], timestep: Int[Array, " batch"]
        ) -> Float[Array, "batch height_out width_out channels_out"]:
            context, vector, added = given
            inputs = params, x_t, timestep, context, vector, compute
            return evaluate(config.unet, *inputs, adapters=beside, class_embedding=added, guidance=scale)

        return network


def _without_gradient(network: Network) -> Network:
    """Of a frozen network: none to its input."""
    return lambda x_t, timestep: network(jax.lax.stop_gradient(x_t), timestep)


def _conditioned(config: ModelConfig, params: Params, examples: Examples) -> Conditioning:
    """On the captions. params: the UNet's."""
    added = class_embedding(config, params, examples.label)
    return condition(config, examples.prompt, examples.micro, added)


def _unconditional(config: ModelConfig, params: Params, examples: Examples) -> Conditioning:
    """Of the second evaluation of guidance: the null embedding, no class, and the same sizes, unless the null embedding
    is all zeros."""
    micro, label = examples.micro, examples.label
    if config.micro is not None and config.unconditional is UnconditionalKind.ALL_ZEROS:
        micro = micro._replace(kept=jnp.zeros((len(examples.latent), len(config.micro.numbers.widths))))
    added = class_embedding(config, params, None if label is None else jnp.full_like(label, NO_CLASS))
    return condition(config, examples.null, micro, added)


def noised(
    schedule: Schedule,
    x0: Float[Array, "batch height width channels"],
    noise: Float[Array, "batch height width channels"],
    timestep: Int[Array, " batch"],
) -> Float[Array, "batch height width channels"]:
    """x_t = α x₀ + σ_t ε."""
    return at(schedule.alpha, timestep) * x0 + at(schedule.sigma_t, timestep) * noise


def denoised_by(
    network: Network,
    schedule: Schedule,
    config: ModelConfig,
    x_t: Float[Array, "batch height width channels"],
    timestep: Int[Array, " batch"],
) -> Denoised:
    """x₀ and ε by a network at x_t. config: its model."""
    alpha, sigma_t = at(schedule.alpha, timestep), at(schedule.sigma_t, timestep)
    return predicted(network, x_t, timestep, config.prediction, None, alpha, sigma_t)


def split(keys: Key[Array, " batch"], count: int) -> Key[Array, "count batch"]:
    """`count` keys for each example, by purpose first."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0)


def normal(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> Float[Array, "batch *shape"]:
    """Standard normal noise, one key per example."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def check_guidance_dim(config: DistillationConfig, guidance_dim: int | None) -> None:
    """Raises InputError for an input of the student (`guidance_dim`) that its teacher does not go with."""
    if guidance_dim is not None and config.teacher.guidance is None:
        raise InputError(
            f"guidance_dim={guidance_dim} with teacher.guidance=None: there is no scale to give to the student. Give a "
            "range, e.g. 4 16, or set guidance_dim=None"
        )
    if guidance_dim is not None and config.teacher.guidance is not None and len(set(config.teacher.guidance)) == 1:
        raise InputError(
            f"guidance_dim={guidance_dim}, but teacher.guidance is always {config.teacher.guidance[0]:g}: an input that"
            " never changes has no effect. Give a range, e.g. 4 16, or set guidance_dim=None"
        )
    if config.model.unet.guidance_dim not in (None, guidance_dim):
        raise InputError(
            f"guidance_dim={guidance_dim}, but guidance is an input of the teacher with "
            f"model.unet.guidance_dim={config.model.unet.guidance_dim}. Set both to the same"
        )


def fitting(usual: float, scales: tuple[float, float] | None) -> float | None:
    """The guidance scale to sample with: the usual one if the student has learnt it, else the middle of the range that
    it has."""
    if scales is None:
        return None
    low, high = scales
    return usual if low <= usual <= high else (low + high) / 2
