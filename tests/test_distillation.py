"""Distillation: teacher and student, losses on networks that can be solved, what is refused, and what is exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny
from safetensors.numpy import load_file, save_file
from test_adapter_training import MODEL

from sdxl_jax import sharding
from sdxl_jax.adapters.embeddings import TextualInversionConfig
from sdxl_jax.adapters.targets import AdapterConfig, Layers
from sdxl_jax.arrays import BaseDtype, Batch, MicroConditioning, Params, flatten
from sdxl_jax.config import ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.continuous import EdmConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig, make
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig, UnconditionalKind
from sdxl_jax.models.layers import Compute, Dtype
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.presets import STATED, stated, with_stated
from sdxl_jax.samplers.steps import Levels, Spacing, find, make_levels
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import levels_of
from sdxl_jax.training import initial
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import AdversarialDiffusionConfig
from sdxl_jax.training.objectives.distillation.consistency import Consistency, ConsistencyConfig, ConsistencyTarget
from sdxl_jax.training.objectives.distillation.distribution_matching import DistributionMatchingConfig
from sdxl_jax.training.objectives.distillation.guidance import GuidanceDistillation, GuidanceDistillationConfig
from sdxl_jax.training.objectives.distillation.progressive import ProgressiveConfig
from sdxl_jax.training.objectives.distillation.teacher import (
    TEACHER,
    Distillation,
    DistillationConfig,
    Examples,
    TeacherConfig,
    noised,
)
from sdxl_jax.training.processes import Processes
from sdxl_jax.weights import lora
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.descriptions import distilled_for
from sdxl_jax.weights.formats import diffusers_sampling
from sdxl_jax.weights.formats.diffusers_fields import is_distilled, scheduler_fields
from sdxl_jax.weights.lazy import Initial, Origin, SourceLayout, Weights, abstract_leaves
from sdxl_jax.weights.parts import with_parts

pytestmark = pytest.mark.usefixtures("shared_steps", "quick_compilation")

METHODS = (GuidanceDistillationConfig, ConsistencyConfig, ProgressiveConfig)
LORA = AdapterConfig(rank=2, layers=Layers.LINEAR)
ALPHA, SIGMA_T = (np.float32(each) for each in (make(ScheduleConfig()).alpha, make(ScheduleConfig()).sigma_t))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a teacher."""
    folder = tmp_path_factory.mktemp("distillation")
    tiny.make_folder(folder / "images")
    convert(tiny.random_model(MODEL, 0), folder / "teacher", "orbax", False)
    return folder


def distillation(kind: type[DistillationConfig], folder: Path, **changes: Any) -> Any:
    """Three steps of two images, of one bucket."""
    base = tiny.train_config(folder / "images", 3)
    values: dict[str, Any] = {
        "data": dataclasses.replace(base.data, buckets=((16, 16),), max_aspect_distance=10.0, batch_size=2),
        "model": MODEL,
        "optimiser": dataclasses.replace(base.optimiser, learning_rate=1e-2),
        "ema": EmaConfig(EmaKind.CONSTANT, 0.5),
        "training": dataclasses.replace(base.training, init_from=(str(folder / "teacher"),)),
        "checkpoint": dataclasses.replace(base.checkpoint, every_steps=1),
        "validation": base.validation,
        **({} if "adapter" in changes or kind is DistillationConfig else {"guidance_dim": 8}),
    }
    return kind(**{**values, **changes})


def lora_student(folder: Path, **changes: Any) -> ConsistencyConfig:
    beside = {"adapter": LORA, "guidance_dim": None, "target": ConsistencyTarget.STUDENT}
    return distillation(ConsistencyConfig, folder, **{**beside, **changes})


def fresh(config: Any) -> tuple[Distillation[Any], Any, Params]:
    """(objective, state before the first step, frozen parameters)."""
    objective, mesh = objective_of(config), sharding.make_mesh(config.mesh, jax.devices()[:1])
    assert isinstance(objective, Distillation)
    with jax.set_mesh(mesh):
        given = objective.initial_weights(mesh, progress=False)
        abstract, _ = objective.abstract_state(mesh)
        state, frozen = objective.fresh_state(mesh, abstract, given, progress=False)
    return objective, state, frozen


def batch(objective: Distillation[Any], rows: int = 2) -> Batch:
    assert objective.tokenizer is not None
    tokens = objective.tokenizer([f"image number {row}" for row in range(rows)])
    image = np.random.default_rng(0).integers(0, 256, (rows, 16, 16, 3), np.uint8)
    sizes = np.full((rows, 2), 16, np.int32)
    micro = MicroConditioning(sizes, 0 * sizes, sizes)
    return Batch(image, {**tokens}, micro, np.arange(rows, dtype=np.int32), np.zeros(rows, bool))


SOME = np.zeros((1, 2), np.int32)
BATCH = Batch(None, {}, MicroConditioning(SOME, SOME, SOME), SOME[0], SOME[0] > 0)
"""For losses that take nothing of it."""


def keys(rows: int = 2) -> Any:
    return jax.random.split(jax.random.key(3), rows)


# Teacher and student


@pytest.mark.parametrize(
    "kind",
    [
        ConsistencyConfig,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in METHODS if kind is not ConsistencyConfig),
    ],
)
def test_a_student_with_guidance_as_an_input_begins_as_the_teacher_without_guidance(
    kind: type[DistillationConfig], folder: Path
) -> None:
    objective, state, frozen = fresh(distillation(kind, folder))
    kernel = state.params["unet"]["time_embedding"]["cond_proj"]["kernel"]
    assert kernel.shape == (8, 8) and not kernel.any()

    def outputs(state: Any, frozen: Params, batch: Batch) -> Any:
        examples = objective.examples(frozen, batch, keys())
        scale, timestep = jnp.array([5.0, 9.0]), jnp.array([19, 999])
        networks = (
            objective.student(state.params, frozen, examples, scale),
            objective.teacher(frozen, examples),
            objective.teacher(frozen, examples, scale),
            objective.teacher(frozen, examples, jnp.ones(2)),
        )
        return [network(examples.latent, timestep) for network in networks]

    student, plain, guided, barely = jax.jit(outputs)(state, frozen, batch(objective))
    np.testing.assert_array_equal(student, plain)
    np.testing.assert_allclose(barely, plain, atol=1e-5)
    assert np.abs(guided - plain).max() > 0.1


@pytest.mark.parametrize("base_dtype", [None, pytest.param(BaseDtype.INT8, marks=pytest.mark.slow)])
def test_a_teacher_beside_a_full_student_is_a_copy_in_the_dtype_of_the_computation(
    folder: Path, base_dtype: BaseDtype | None
) -> None:
    config = distillation(ConsistencyConfig, folder, compute=Compute(Dtype.BFLOAT16))
    config = dataclasses.replace(config, teacher=TeacherConfig(base_dtype=base_dtype))
    objective, state, frozen = fresh(config)
    given, copy = flatten(tiny.random_model(MODEL, 0).params["unet"]), flatten(frozen[TEACHER]["unet"])
    assert frozen.keys() == {"text_encoder_2", TEACHER}
    kernels = [copy[path] for path in copy if path.endswith("/kernel")]
    if base_dtype is BaseDtype.INT8:
        assert any(kernel.dtype == jnp.int8 for kernel in kernels)
    else:
        assert copy.keys() == given.keys()
        for path, value in copy.items():
            np.testing.assert_array_equal(value, given[path].astype(jnp.bfloat16), err_msg=path)
    own = flatten(state.params["unet"])
    assert all(value.dtype == jnp.float32 for value in own.values())
    np.testing.assert_array_equal(own["conv_in/kernel"], given["conv_in/kernel"])
    abstract = objective.abstract_state(sharding.make_mesh(config.mesh, jax.devices()[:1]))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (state, frozen)
    )


def test_the_teacher_of_an_adapter_is_its_base_and_takes_no_memory(folder: Path) -> None:
    objective, state, frozen = fresh(lora_student(folder))
    assert TEACHER not in frozen
    model = objective.model(state, frozen)
    assert model.params.keys() == {"unet", "text_encoder_2"}
    assert model.config.distilled and model.config.sampling == SamplingDefaults(preset="lcm-lora")


@pytest.mark.slow
def test_a_teacher_of_its_own_is_read_from_its_path(folder: Path) -> None:
    other = tiny.random_model(MODEL, 1)
    if not (folder / "other").exists():
        convert(other, folder / "other", "orbax", False)
    teacher = TeacherConfig(path=str(folder / "other"))
    for config in (distillation(ConsistencyConfig, folder, teacher=teacher), lora_student(folder, teacher=teacher)):
        _, _, frozen = fresh(config)
        found, expected = (flatten(each["unet"]) for each in (frozen[TEACHER], other.params))
        assert found.keys() == expected.keys()
        np.testing.assert_array_equal(found["conv_in/kernel"], expected["conv_in/kernel"])


# Losses


class Toy(GuidanceDistillation):
    """The student is (a + b w) x + c + d w, the teacher with and without the caption linear too."""

    with_caption, without = (0.7, 0.3), (-0.2, 0.5)

    def examples(self, frozen: Params, batch: Any, keys: Any) -> Examples:
        nothing: Any = None
        return Examples(jax.random.normal(keys[0], (len(keys), 2, 2, 1)), nothing, nothing, nothing, None, keys)

    def teacher(self, frozen: Params, examples: Examples, scale: Any = None) -> Any:
        (a, c), (a_null, c_null) = self.with_caption, self.without
        w = scale[:, None, None, None]
        return lambda x, timestep: a_null * x + c_null + w * (a * x + c - a_null * x - c_null)

    def student(self, trained: Any, frozen: Params, examples: Examples, scale: Any = None, dropout: Any = None) -> Any:
        w = scale[:, None, None, None]
        a, b, c, d = trained["toy"]
        return lambda x, timestep: (a + b * w) * x + c + d * w


def test_the_optimum_of_guidance_distillation_on_a_linear_toy_is_the_guided_output(folder: Path) -> None:
    config = distillation(GuidanceDistillationConfig, folder, teacher=TeacherConfig(guidance=(1.0, 8.0)))
    toy, nothing = Toy(config), Params()
    batch_keys = jax.random.split(jax.random.key(0), 256)

    @jax.jit
    def loss(params: Any) -> Any:
        return toy.loss({"toy": params}, nothing, BATCH, batch_keys)[0]

    (a, c), (a_null, c_null) = toy.with_caption, toy.without
    guided = np.array([a_null, a - a_null, c_null, c - c_null], np.float32)
    assert loss(guided) < 1e-10, "a squared error of 0 is the optimum"
    for other in guided + 0.1 * np.eye(4, dtype=np.float32):  # and the only one
        assert loss(other) > 1e-4


def constant(value: Any) -> Any:
    """A network that predicts v, whose x₀ is the same whatever it is given."""

    def network(x_t: Any, timestep: Any) -> Any:
        alpha, sigma_t = (jnp.asarray(each)[timestep][:, None, None, None] for each in (ALPHA, SIGMA_T))
        return (alpha * x_t - value) / sigma_t

    return network


def test_the_consistency_function_is_the_identity_at_the_end_of_a_trajectory(folder: Path) -> None:
    objective = Consistency(distillation(ConsistencyConfig, folder))
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 12))
    at_zero = objective.function(lambda x, timestep: 100.0 * x, x, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(at_zero, x)


def with_v(kind: type[DistillationConfig], folder: Path, **changes: Any) -> Any:
    model = dataclasses.replace(MODEL, prediction=Prediction.V)
    return objective_of(distillation(kind, folder, model=model, **changes))


def test_consistency_distillation_needs_nothing_of_a_student_that_knows_the_end_of_every_trajectory(
    folder: Path,
) -> None:
    """On data that are one point, whose trajectories all end there, the loss is 0 but for c_skip x. Without the last
    part of a trajectory, whose end is taken to be timestep 0."""
    objective = with_v(ConsistencyConfig, folder)
    point = jax.random.normal(jax.random.key(1), (1, 2, 2, 12))
    latent, noise = (
        jnp.broadcast_to(each, (49, 2, 2, 12)) for each in (point, jax.random.normal(keys()[0], (1, 2, 2, 12)))
    )
    index = jnp.arange(1, 50)
    right, wrong = constant(point), constant(point + 0.1)
    assert objective.distance(right, right, right, latent, noise, index) < 2e-5
    assert objective.distance(wrong, right, right, latent, noise, index) > 0.09


def test_a_progressive_students_step_is_two_of_the_teachers(folder: Path) -> None:
    """The student that leads by one step of DDIM where the teacher leads by two has no loss."""
    objective = with_v(ProgressiveConfig, folder, steps=4)
    latent = jax.random.normal(jax.random.key(1), (4, 2, 2, 12))
    noise, index = jax.random.normal(jax.random.key(2), latent.shape), jnp.arange(4)

    def teacher(x_t: Any, timestep: Any) -> Any:
        return 0.3 * x_t + 0.001 * timestep[:, None, None, None]

    # x₀ of the student as the sampler ddim takes it from 4 levels, and the teacher through 8.
    schedule, ddim = objective.schedule, find("ddim")
    fine, coarse = (make_levels(ddim, schedule, steps, Spacing.TRAILING) for steps in (8, 4))
    start = coarse.timestep[::-1].astype(int)
    x_t = noised(schedule, latent, noise, jnp.asarray(start))
    x = x_t
    for half in (1, 0):  # from level 2i + 1 to 2i + 0, then to 2i − 1, counted from the least noise
        rows = len(fine.timestep) - 1 - (2 * np.arange(4) + half)
        alpha, sigma_t = (each[rows][:, None, None, None] for each in (fine.alpha, fine.sigma_t))
        after_alpha, after_sigma_t = (each[rows + 1][:, None, None, None] for each in (fine.alpha, fine.sigma_t))
        v = teacher(x, jnp.asarray(fine.timestep[rows]))
        x = after_alpha * (alpha * x - sigma_t * v) + after_sigma_t * (sigma_t * x + alpha * v)
    rows = np.arange(4)[::-1]
    alpha, sigma_t = (each[rows][:, None, None, None] for each in (coarse.alpha, coarse.sigma_t))
    after_alpha, after_sigma_t = (each[rows + 1][:, None, None, None] for each in (coarse.alpha, coarse.sigma_t))
    # One step: x = α' x₀ + σ' (x_t − α x₀) / σ.
    x0 = (x - after_sigma_t / sigma_t * x_t) / (after_alpha - after_sigma_t / sigma_t * alpha)
    assert objective.distance(constant(x0), teacher, latent, noise, index) < 1e-9
    assert objective.distance(constant(x0 + 0.1), teacher, latent, noise, index) > 0.01


# What is refused

REFUSED: list[tuple[type[DistillationConfig], dict[str, Any], str]] = [
    (ConsistencyConfig, {"teacher": TeacherConfig(guidance=(5.0, 2.0))}, r"teacher\.guidance=5,2\. Give two numbers"),
    (ConsistencyConfig, {"teacher": TeacherConfig(guidance=None)}, r"guidance_dim=8 with teacher\.guidance=None"),
    (ConsistencyConfig, {"teacher": TeacherConfig(guidance=(5.0, 5.0))}, r"is always 5: an input that never changes"),
    (ConsistencyConfig, {"adapter": LORA}, r"adapter: the student is to have guidance as an input"),
    (ConsistencyConfig, {"huber_c": 0.0}, r"huber_c=0\.0"),
    (ConsistencyConfig, {"ema": EmaConfig(EmaKind.NONE)}, r"target=average needs an average"),
    (ConsistencyConfig, {"loss": LossConfig(offset_noise=0.1)}, r"loss has no effect .* offset_noise"),
    (GuidanceDistillationConfig, {"teacher": TeacherConfig(guidance=None)}, r"no guidance to distil"),
    (GuidanceDistillationConfig, {"model": dataclasses.replace(MODEL, distilled=True)}, r"in its weights already"),
    (ProgressiveConfig, {"steps": 3}, r"steps=3 is not a power of two from 1 to 256"),
    (ProgressiveConfig, {"steps": 512}, r"steps=512 is not a power of two from 1 to 256"),
    (ProgressiveConfig, {"model": dataclasses.replace(MODEL, distilled=True)}, r"has no trajectory that steps of DDIM"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_settings_that_do_not_fit_are_refused(
    kind: type[DistillationConfig], changes: dict[str, Any], message: str, folder: Path
) -> None:
    changes = {**changes, "guidance_dim": 8}
    with pytest.raises(InputError, match=message):
        objective_of(distillation(kind, folder, **changes)).check()


def with_training(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def test_what_all_distillations_refuse(folder: Path) -> None:
    config = distillation(ConsistencyConfig, folder)
    objective_of(config).check()
    edm = dataclasses.replace(MODEL, noise=EdmConfig(), prediction=Prediction.EDM)
    for changed, message in (
        (with_training(config, init_from=()), r"training\.init_from is empty, and so there is no teacher"),
        (
            with_training(config, init_changes=("prediction",)),
            r"init_changes=prediction: a teacher is used as it",
        ),
        (
            with_training(config, trainable=("^unet/", "^text_encoder_2/")),
            r"makes text_encoder_2 trainable, which te",
        ),
        (dataclasses.replace(config, model=edm), r"distillation has the discrete noise levels"),
        (
            dataclasses.replace(lora_student(folder), teacher=TeacherConfig(base_dtype=BaseDtype.INT8)),
            r"teacher\.base_dtype=int8 has no effect beside an adapter",
        ),
        (
            with_training(
                dataclasses.replace(config, textual_inversion=TextualInversionConfig(token="<new>")), trainable=()
            ),
            r"textual_inversion has no effect on a distillation",
        ),
    ):
        with pytest.raises(InputError, match=message):
            objective_of(changed).check()


def test_validation_that_contradicts_the_student_is_refused_before_the_run(folder: Path) -> None:
    validation = ValidationConfig(prompts=("a",), sizes=((16, 16),), steps=4, guidance=5.0)
    config = lora_student(folder, validation=validation)
    with pytest.raises(InputError, match=r"validation: guidance=5, but this model is distilled"):
        objective_of(config).check()
    steps = dataclasses.replace(validation, guidance=1.0, steps=51)
    with pytest.raises(InputError, match=r"validation: steps=51, but preset=lcm-lora"):
        objective_of(dataclasses.replace(config, validation=steps)).check()
    objective_of(dataclasses.replace(config, validation=dataclasses.replace(validation, guidance=1.0))).check()


TEACHERS: dict[str, tuple[dict[str, Any], str]] = {
    "schedule": ({"schedule": ScheduleConfig(beta_end=0.02)}, r"was trained with a different schedule"),
    "distilled": ({"distilled": True}, r"was trained with a different distilled: True -> False"),
    "conditioning": ({"unconditional": UnconditionalKind.EMPTY}, r"was trained with a different unconditional"),
    "input": ({"unet": dataclasses.replace(MODEL.unet, guidance_dim=8)}, r"different configuration: guidance_dim"),
    "networks": ({"vae": tiny.MODEL.vae}, r"holds vae, which this model does not have"),
    "steps": (
        {"sampling": SamplingDefaults("ddim", steps=4)},
        r"the teacher was distilled for 4 steps\. Set steps to 2",
    ),
    "guidance": (
        {"sampling": SamplingDefaults(preset="turbo")},
        r"teacher\.guidance=4,16, but the teacher has guidance in its weights .* Set teacher\.guidance=None",
    ),
}
"""What is different about a model, and what is said of it as a teacher."""


def opened(path: str, options: Any) -> Weights:
    """A model that is nowhere, by the name of its difference."""
    changes = {} if path == "teacher" else TEACHERS[path][0]
    config = dataclasses.replace(MODEL, **changes)
    leaves = {path: Initial(leaf, path, 0) for path, leaf in abstract_leaves(config).items()}
    return Weights(config, leaves, Origin(SourceLayout.MEMORY))


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_of_another_kind_are_refused_before_work_starts(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "open_model", opened)
    message = TEACHERS[name][1]
    config = with_training(distillation(ProgressiveConfig, folder, steps=4), init_from=("teacher",))
    objective_of(config).check_start()
    own = dataclasses.replace(config, teacher=TeacherConfig(path=name))
    with pytest.raises(InputError, match=message) as refused:
        objective_of(own).check_start()
    assert "training." not in str(refused.value), "the fields of initial weights have no effect on a teacher"
    with pytest.raises(InputError, match=message):
        objective_of(with_training(config, init_from=(name,))).check_start()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.5}, r"different configuration: scale: 0\.5 -> "),
        ({"latent_mean": (0.5,) * 12, "latent_std": (2.0,) * 12}, r"different configuration: latent_mean: "),
    ],
    ids=["scale", "mean"],
)
def test_a_teacher_of_other_latents_is_refused_before_work_starts(
    change: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = VaeConfig(block_channels=(8,), resnets_per_block=1, latent_channels=12, groups=2)
    own = dataclasses.replace(MODEL, vae=small)

    def opened(path: str, options: Any) -> Weights:
        vae = dataclasses.replace(small, **change) if path == "other" else small
        leaves = {path: Initial(leaf, path, 0) for path, leaf in abstract_leaves(own).items()}
        return Weights(dataclasses.replace(own, vae=vae), leaves, Origin(SourceLayout.MEMORY))

    monkeypatch.setattr(initial, "open_model", opened)
    config = with_training(distillation(ProgressiveConfig, folder, model=own, steps=4), init_from=("same",))
    objective_of(config).check_start()
    with pytest.raises(InputError, match=rf"The vae in other \(teacher\.path\) has a {message}.*Give one that was"):
        objective_of(dataclasses.replace(config, teacher=TeacherConfig(path="other"))).check_start()


def test_a_teacher_with_guidance_in_its_weights_is_not_guided_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "open_model", opened)
    config = with_training(distillation(ProgressiveConfig, folder, steps=4, guidance_dim=None), init_from=("guidance",))
    for scales in (None, (1.0, 1.0)):
        objective_of(dataclasses.replace(config, teacher=TeacherConfig(guidance=scales))).check_start()
    objective, given_by_input = objective_of(config), dataclasses.replace(MODEL.unet, guidance_dim=8)
    assert isinstance(objective, Distillation)
    with pytest.raises(InputError, match="files say preset lcm"):
        objective.check_teacher(dataclasses.replace(MODEL, distilled=True))
    objective.check_teacher(dataclasses.replace(MODEL, unet=given_by_input, sampling=SamplingDefaults(preset="lcm")))


def test_a_teacher_that_is_missing_is_said(folder: Path) -> None:
    config = distillation(ProgressiveConfig, folder)
    missing = dataclasses.replace(config, teacher=TeacherConfig(path=str(folder / "missing")))
    with pytest.raises(InputError, match=r"teacher\.path=.*missing cannot be opened: There is nothing at"):
        objective_of(missing).check_start()
    with pytest.raises(InputError, match=r"gives no UNet, so there is no teacher"):
        objective_of(with_training(config, init_parts=("text_encoder_2",))).check_start()


# What is exported


def resolved(config: ModelConfig) -> tuple[Any, ...]:
    """How a model is sampled where nothing is asked for."""
    options = Options()
    options.check(config)
    found = options.resolved(config)
    return found.preset, found.sampler, found.timestep_spacing, found.steps, found.guidance


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (GuidanceDistillationConfig, {}, (None, "euler", Spacing.LEADING, 30, 5.0)),
        (ConsistencyConfig, {}, ("lcm", "lcm", None, 4, 8.5)),
        (ConsistencyConfig, {"teacher": TeacherConfig(guidance=(2.0, 6.0))}, ("lcm", "lcm", None, 4, 4.0)),
        (ConsistencyConfig, {"guidance_dim": None}, ("lcm", "lcm", None, 4, 1.0)),
        (ConsistencyConfig, {"guidance_dim": None, "adapter": LORA}, ("lcm-lora", "lcm", None, 4, 1.0)),
        (ProgressiveConfig, {"steps": 8}, ("progressive", "ddim", Spacing.TRAILING, 8, 5.0)),
        (ProgressiveConfig, {"steps": 2, "guidance_dim": None}, ("progressive", "ddim", Spacing.TRAILING, 2, 1.0)),
    ],
)
def test_a_student_and_its_diffusers_directory_are_sampled_as_it_was_distilled(
    kind: type[DistillationConfig], changes: dict[str, Any], expected: tuple[Any, ...], folder: Path
) -> None:
    student = distillation(kind, folder, **changes).student
    assert resolved(student) == expected
    fields = scheduler_fields(student.schedule, student.prediction, student.distilled, student.sampling)
    found, notes = diffusers_sampling.read(fields, "here", False, is_distilled(fields))
    assert notes == ()
    assert resolved(dataclasses.replace(student, sampling=found, distilled=is_distilled(fields))) == expected


@pytest.mark.parametrize("kind", [*METHODS, DistributionMatchingConfig, AdversarialDiffusionConfig])
@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        (((512, 512),), (512, 512)),
        (((512, 768), (640, 576), (768, 512)), (640, 576)),
        (((64, 64), MODEL.default_size), MODEL.default_size),
    ],
)
def test_a_student_is_sampled_at_a_size_that_it_was_trained_at(
    kind: Any, buckets: tuple[tuple[int, int], ...], expected: tuple[int, int]
) -> None:
    student = kind(data=DataConfig(folder="images", buckets=buckets), model=MODEL).student
    assert student.default_size == Options().default_size(student) == expected
    # What is known of it beside another model, where its weights go without the size of their own.
    said = with_stated(None, distilled_for({STATED: json.dumps(stated(student.sampling))}))
    assert Options().default_size(dataclasses.replace(MODEL, sampling=said)) == expected


def test_the_file_of_a_student_that_is_an_adapter_says_its_preset(folder: Path, tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, default_size=(32, 32))
    objective, state, frozen = fresh(lora_student(folder, model=model))
    mesh = sharding.make_mesh(objective.config.mesh, jax.devices()[:1])
    objective.export(state, frozen, tmp_path / "student.safetensors", 3, mesh, Processes(1.0))
    base = tiny.random_model(model, 0)
    made = lora.add(base, tmp_path / "student.safetensors")
    assert resolved(made.config) == ("lcm-lora", "lcm", None, 4, 1.0)
    assert Options().default_size(made.config) == (16, 16), "the size of its only bucket"
    assert lora.remove(made, made.adapters[0].name).config == base.config

    # The same factors as those of a progressive student, which ends at the finished image; its base does not.
    changes = {"adapter": LORA, "guidance_dim": None, "steps": 4, "model": model}
    student = distillation(ProgressiveConfig, folder, **changes).student
    with safetensors.safe_open(tmp_path / "student.safetensors", "numpy") as file:
        metadata = {**file.metadata(), STATED: json.dumps(stated(student.sampling))}
    factors = load_file(tmp_path / "student.safetensors")
    save_file(factors, tmp_path / "progressive.safetensors", metadata)
    visited = [levels(config) for config in (student, lora.add(base, tmp_path / "progressive.safetensors").config)]
    jax.tree.map(np.testing.assert_array_equal, *visited)
    assert visited[0].alpha[-1] == 1 > levels(base.config, sampler="ddim").alpha[-1]


def levels(config: ModelConfig, **given: Any) -> Levels:
    """The noise levels that a model is sampled at by default."""
    return levels_of(config, Options(**given).resolved(config), config.sampling)


def test_a_progressive_student_ends_at_the_finished_image_in_the_place_of_a_models_parts(folder: Path) -> None:
    """With --parts-from, with --preset, and where a model with its adapter is converted to a diffusers directory."""
    student = distillation(ProgressiveConfig, folder, steps=4, guidance_dim=None).student
    leaves = {path: Initial(leaf, path, 0) for path, leaf in abstract_leaves(MODEL, ["unet"]).items()}
    base, unet = (
        Weights(config, leaves, Origin(SourceLayout.PART), noise_is_known=False) for config in (MODEL, student)
    )
    joined = with_parts(base, unet, "there").config
    named = dataclasses.replace(MODEL, sampling=SamplingDefaults(preset="progressive", steps=4))
    fields = scheduler_fields(named.schedule, named.prediction, named.distilled, named.sampling)
    converted = dataclasses.replace(MODEL, sampling=diffusers_sampling.read(fields, "here", False, False)[0])
    for config, given in ((joined, {}), (MODEL, {"preset": "progressive"}), (named, {}), (converted, {})):
        jax.tree.map(np.testing.assert_array_equal, levels(config, **given), levels(student))
    assert fields["set_alpha_to_one"] is True


@pytest.mark.slow
def test_a_second_round_has_the_first_one_as_its_teacher_by_one_evaluation(folder: Path) -> None:
    first = distillation(ProgressiveConfig, folder, steps=4).student
    convert(tiny.random_model(first, 0), folder / "round", "orbax", False)
    model = dataclasses.replace(MODEL, unet=first.unet)
    second = distillation(ProgressiveConfig, folder, model=model, steps=2)
    second = with_training(second, init_from=(str(folder / "round"),))
    objective_of(dataclasses.replace(second, adapter=LORA)).check()  # the base has the input
    objective, state, frozen = fresh(second)
    objective.check()
    objective.check_start()
    assert objective.model_config.sampling == dataclasses.replace(first.sampling or SamplingDefaults(), steps=2)
    with pytest.raises(InputError, match=r"steps=4, but the teacher was distilled for 4 steps\. Set steps to 2"):
        objective_of(dataclasses.replace(second, steps=4)).check_start()

    def outputs(state: Any, frozen: Params, batch: Batch) -> Any:
        examples = objective.examples(frozen, batch, keys())
        timestep, x = jnp.array([19, 999]), examples.latent
        teacher, student = (
            [network(jnp.full(2, scale))(x, timestep) for scale in (2.0, 7.0)]
            for network in (
                lambda scale: objective.teacher(frozen, examples, scale),
                lambda scale: objective.student(state.params, frozen, examples, scale),
            )
        )
        return teacher, student, objective.loss(state.params, frozen, batch, keys())[0]

    teacher, student, value = jax.jit(outputs)(state, frozen, batch(objective))
    np.testing.assert_array_equal(teacher, student)  # the same weights, which both have the input
    assert np.abs(teacher[0] - teacher[1]).max() > 1e-3 and np.isfinite(value) and value > 0
