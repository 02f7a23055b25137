"""Distillation with a critic, DMD2 and ADD: losses follow their definitions, each network moves when it should and
leaves the other alone, and the loop provides what every objective has."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from crashing import crash_before
from jax.sharding import AbstractMesh
from test_adapter_training import MODEL

from sdxl_jax import config as configuration
from sdxl_jax import sharding
from sdxl_jax.adapters.targets import AdapterConfig, Layers
from sdxl_jax.aot.compile import inputs_by_use
from sdxl_jax.aot.report import shard_bytes
from sdxl_jax.arrays import Batch, MicroConditioning, Params, flatten, unflatten
from sdxl_jax.config import OnNonfinite
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import weights as evaluation_weights
from sdxl_jax.jsontree import to_json
from sdxl_jax.models.discriminator_heads import FeatureHeads
from sdxl_jax.models.image_features import VggFeatures
from sdxl_jax.models.initialisers import sample
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.samplers.steps import Spacing, timesteps
from sdxl_jax.sampling.options import Options
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import loop
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.distillation import losses
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import (
    DISCRIMINATOR,
    FEATURES,
    AdversarialDiffusion,
    AdversarialDiffusionConfig,
    DistillationWeighting,
    FeatureDiscriminatorConfig,
    distillation_weights,
)
from sdxl_jax.training.objectives.distillation.critic import CRITIC, REPORTED, CriticConfig, CriticDistillation
from sdxl_jax.training.objectives.distillation.distribution_matching import (
    HEAD,
    DistributionMatching,
    DistributionMatchingConfig,
    MiddleHeadConfig,
)
from sdxl_jax.training.objectives.distillation.teacher import Examples, TeacherConfig
from sdxl_jax.training.state import TrainState
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.dinov2 import open_dinov2
from sdxl_jax.weights.formats import orbax
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.open import open_model

pytestmark = pytest.mark.usefixtures("shared_steps", "quick_compilation")

RATE = OptimiserConfig(learning_rate=1e-2, warmup_steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a teacher."""
    folder = tmp_path_factory.mktemp("distillation")
    tiny.make_folder(folder / "images")
    convert(tiny.random_model(MODEL, 0), folder / "teacher", "orbax", False)
    return folder


def configured(kind: Any, folder: Path, count: int = 3, **changes: Any) -> Any:
    """Steps of two images, of one bucket."""
    base = tiny.train_config(folder / "images", count)
    values: dict[str, Any] = {
        "data": dataclasses.replace(base.data, buckets=((16, 16),), max_aspect_distance=10.0, batch_size=2),
        "model": MODEL,
        "optimiser": RATE,
        "ema": EmaConfig(EmaKind.CONSTANT, 0.5),
        "training": dataclasses.replace(base.training, init_from=(str(folder / "teacher"),), caption_dropout=0.0),
        "checkpoint": dataclasses.replace(base.checkpoint, every_steps=1),
        "validation": base.validation,
    }
    return kind(**{**values, **changes})


def matching(folder: Path, **changes: Any) -> DistributionMatchingConfig:
    own = {"critic": CriticConfig(updates=2, optimiser=RATE), "head": MiddleHeadConfig(layers=1)}
    return configured(DistributionMatchingConfig, folder, **{**own, **changes})


def fresh(config: Any) -> tuple[Any, TrainState, Params]:
    """(objective, state before the first step, frozen parameters)."""
    objective, mesh = objective_of(config), sharding.make_mesh(config.mesh, jax.devices()[:1])
    assert isinstance(objective, CriticDistillation)
    with jax.set_mesh(mesh):
        initial = objective.initial_weights(mesh, progress=False)
        abstract, abstract_frozen = objective.abstract_state(mesh)
        state, frozen = objective.fresh_state(mesh, abstract, initial, progress=False)
    for expected, found in ((abstract, state), (abstract_frozen, frozen)):
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (expected, found)]
        assert shapes[0] == shapes[1]
    return objective, state, frozen


def batch(objective: Any, rows: int = 2) -> Batch:
    tokens = objective.tokenizer([f"image number {row}" for row in range(rows)])
    image = np.random.default_rng(0).integers(0, 256, (rows, 16, 16, 3), np.uint8)
    sizes = np.full((rows, 2), 16, np.int32)
    micro = MicroConditioning(sizes, 0 * sizes, sizes)
    return Batch(image, tokens, micro, np.arange(rows, dtype=np.int32), np.zeros(rows, bool))


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


# Losses


def test_hinge_and_softplus_follow_their_definitions() -> None:
    real, fake = (jnp.array([[0.5, 3.0], [-2.0, 1.0]]), jnp.array([[-0.5, -3.0], [2.0, 0.0]]))
    assert losses.hinge([real, real], [fake, fake]) == pytest.approx(
        2 * ((0.5 + 0 + 3 + 0) / 4 + (0.5 + 0 + 3 + 1) / 4)
    )
    assert losses.hinge_of_student([fake, fake]) == pytest.approx(2 * 1.5 / 4)
    expected = np.log1p(np.exp(-np.asarray(real))).mean() + np.log1p(np.exp(np.asarray(fake))).mean()
    assert losses.softplus(real, fake) == pytest.approx(expected, rel=1e-6)
    assert losses.softplus_of_student(fake) == pytest.approx(np.log1p(np.exp(-np.asarray(fake))).mean(), rel=1e-6)


def test_r1_is_the_norm_of_the_gradient_by_finite_differences() -> None:
    """Of two heads and three images, whose logits mix images and positions."""
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        features = tuple(jnp.asarray(generator.normal(size=(3, 4, width))) for width in (2, 5))
        weights = tuple(jnp.asarray(generator.normal(size=(each.shape[-1], 1))) for each in features)

        def logits(features: Any) -> Any:
            return [
                jnp.tanh(x @ w)[..., 0] ** 3 + 0.1 * x.mean((0, 1, 2)) for x, w in zip(features, weights, strict=True)
            ]

        penalty, step = 0.0, 1e-5
        for number, x in enumerate(features):
            for place in np.ndindex(x.shape):

                def total(change: float, number: int = number, x: Any = x, place: Any = place) -> Any:
                    changed = [*features[:number], x.at[place].add(change), *features[number + 1 :]]
                    return sum(each.sum() for each in logits(tuple(changed)))

                slope = (total(step) - total(-step)) / (2 * step)
                penalty += 0.5 * float(slope) ** 2 / len(x)
        assert float(losses.r1(logits, features)) == pytest.approx(penalty, rel=1e-7)


def of_gaussian(x_t: Any, alpha: Any, sigma_t: Any, mean: float, deviation: float = 0.5) -> Any:
    """E[x₀ | x_t] for x₀ of a normal distribution."""
    variance = deviation**2
    return (variance * alpha * x_t + sigma_t**2 * mean) / (alpha**2 * variance + sigma_t**2)


@pytest.mark.parametrize("mean", [-1.5, 2.0])
def test_the_matching_gradient_leads_one_gaussian_to_another_and_vanishes_there(mean: float) -> None:
    """The data are around 0; the student's are around `mean`, and its score knows it."""
    noise, latents = np.random.default_rng(0).normal(size=(2, 512, 1, 1, 1))

    def gradient(mean: float) -> Any:
        latent = mean + 0.5 * jnp.asarray(latents)
        x_t = 0.8 * latent + 0.6 * noise
        real, fake = (of_gaussian(x_t, 0.8, 0.6, each) for each in (0.0, mean))
        return losses.matching_gradient(latent, real, fake)

    assert np.all(np.sign(gradient(mean)) == np.sign(mean))  # a step against it leads to 0
    assert not gradient(0.0).any()
    for _ in range(400):
        mean -= 0.05 * float(gradient(mean).mean())
    assert abs(mean) < 0.05


def test_the_matching_loss_has_that_gradient_and_none_through_the_scores() -> None:
    latent, real, fake = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 3)).astype(np.float32)
    value, (of_latent, *of_scores) = jax.value_and_grad(losses.distribution_matching, argnums=(0, 1, 2))(
        *map(jnp.asarray, (latent, real, fake))
    )
    expected = (fake - real) / np.abs(latent - real).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(of_latent, expected / latent.size, rtol=1e-4, atol=1e-7)
    assert value == pytest.approx(0.5 * (expected**2).mean(), rel=1e-4)
    assert not any(each.any() for each in of_scores)
    assert not losses.matching_gradient(*map(jnp.asarray, (latent, latent, latent))).any()  # 0 / 0


# DMD2


def test_the_nodes_are_those_that_the_preset_samples_at(folder: Path) -> None:
    for steps in (1, 2, 4, 8):
        config = matching(folder, steps=steps)
        assert config.nodes == tuple(timesteps(steps, 1000, Spacing.TRAILING).astype(int))
        options = Options().resolved(config.student)
        assert (options.preset, options.sampler, options.steps, options.guidance) == ("dmd", "lcm", steps, 1.0)
        Options().check(config.student)
    assert matching(folder).nodes == (999, 749, 499, 249)


def test_inputs_are_noise_at_the_first_node_and_the_students_own_images_noised_at_later_ones(folder: Path) -> None:
    class Constant(DistributionMatching):
        """The student's image is 3, whatever it is given."""

        def student(self, trained: Any, frozen: Params, examples: Examples, *_: Any, **__: Any) -> Any:
            def network(x_t: Any, timestep: Any) -> Any:
                alpha, sigma_t = (jnp.asarray(each, jnp.float32)[timestep][:, None, None, None] for each in levels)
                return (x_t - 3 * alpha * trained["x"]) / sigma_t  # ε

            return network

    objective, nothing = Constant(matching(folder)), Params()
    levels, nodes = (objective.schedule.alpha, objective.schedule.sigma_t), objective.config.nodes
    latent: Any = jnp.zeros((256, 2, 2, 1))
    examples = Examples(latent, nothing, nothing, nothing, None, nothing)  # pyright: ignore[reportArgumentType]
    found = {}
    inputs = jax.jit(
        lambda seed: objective.inputs({"x": 1.0}, nothing, examples, jax.random.split(jax.random.key(seed), 256))
    )
    for seed in range(16):
        x_t, timestep = inputs(seed)
        assert len(set(np.asarray(timestep).tolist())) == 1
        found[int(timestep[0])] = np.asarray(x_t)
    assert sorted(found, reverse=True) == list(nodes)
    for node, x_t in found.items():
        alpha, sigma_t = (0.0, 1.0) if node == nodes[0] else (each[node] for each in levels)
        assert x_t.mean() == pytest.approx(3 * alpha, abs=0.15) and x_t.std() == pytest.approx(sigma_t, abs=0.1)

    def total(trained: Any) -> Any:
        return objective.inputs({"x": trained}, nothing, examples, jax.random.split(jax.random.key(1), 256))[0].sum()

    assert jax.grad(total)(1.0) == 0


class Gaussians(DistributionMatching):
    """The teacher's images are around 0, the student's and those of the fake score around their parameters."""

    def examples(self, frozen: Params, batch: Batch, keys: Any) -> Examples:
        nothing: Any = Params()
        return Examples(jnp.zeros((len(keys), 2, 2, 1)), nothing, nothing, nothing, None, keys)

    def _around(self, mean: Any) -> Any:
        def network(x_t: Any, timestep: Any) -> Any:
            levels = (self.schedule.alpha, self.schedule.sigma_t)
            alpha, sigma_t = (jnp.asarray(each, jnp.float32)[timestep][:, None, None, None] for each in levels)
            return (x_t - alpha * of_gaussian(x_t, alpha, sigma_t, mean)) / sigma_t

        return network

    def teacher(self, frozen: Params, examples: Examples, scale: Any = None) -> Any:
        return self._around(0.0)

    def student(self, trained: Any, frozen: Params, examples: Examples, *_: Any, **__: Any) -> Any:
        return self._around(trained["unet"]["bias"])


def test_steps_lead_a_student_of_one_gaussian_to_the_teachers(folder: Path) -> None:
    """The whole step, with as many updates of the fake score as by default, five for one of the student: the score
    follows the student, and the student goes to the teacher."""
    rate, usual = dataclasses.replace(RATE, learning_rate=0.05), configured(DistributionMatchingConfig, folder).critic
    critic = dataclasses.replace(usual, optimiser=rate)
    toy = Gaussians(matching(folder, head=None, optimiser=rate, critic=critic))
    state = toy.create({"unet": {"bias": jnp.array([2.0])}})
    state = state._replace(auxiliary=toy._auxiliary(state.params, {}))
    step, rows, distances = jax.jit(toy.step()), batch(toy, 64), []
    for number in range(500):
        state, metrics = step(state, {}, rows)
        assert (metrics["critic_updates"], metrics["student_updates"]) == (number + 1, number // 5 + 1)
        fake = state.auxiliary[CRITIC].params["unet"]["bias"]
        distances.append(abs(float(fake[0] - state.params["unet"]["bias"][0])))
    assert abs(float(state.params["unet"]["bias"][0])) < 0.1
    assert max(distances[50:]) < 0.5


@pytest.fixture(scope="module")
def matched(folder: Path) -> Any:
    """(objective, the states before and after four steps, their metrics)."""
    objective, state, frozen = fresh(matching(folder))
    step, states, metrics = jax.jit(objective.step()), [state], []
    for _ in range(4):
        state, numbers = step(states[-1], frozen, batch(objective))
        states.append(state)
        metrics.append(numbers)
    return objective, frozen, states, metrics


@pytest.mark.slow
def test_the_fake_score_begins_as_the_teacher_and_the_head_at_random(matched: Any) -> None:
    _, frozen, (first, *_), _ = matched
    critic = first.auxiliary[CRITIC].params
    assert critic.keys() == {"unet", HEAD}
    assert same(critic["unet"], first.params["unet"]) and same(critic["unet"], frozen["teacher"]["unet"])
    assert np.asarray(critic[HEAD]["conv_0"]["kernel"]).std() > 0


@pytest.mark.slow
def test_each_network_moves_when_it_should(matched: Any) -> None:
    """The critic in every step, the student in every second one, its average and moments with it."""
    objective, _, states, metrics = matched
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        moves = number % 2 == 0
        for name in ("params", "ema", "optimiser"):
            assert same(getattr(before, name), getattr(after, name)) is not moves, (number, name)
        old, new = (flatten(each.auxiliary[CRITIC].params) for each in (before, after))
        assert not any(np.array_equal(old[path], new[path]) for path in ("unet/conv_in/kernel", "head/conv_0/kernel"))
        assert metrics[number]["student_updates"] == number // 2 + 1 and metrics[number]["critic_updates"] == number + 1
        assert set(objective.config.metrics) <= metrics[number].keys()
    for name in (*objective.config.OF_STUDENT, "loss", "grad_norm"):
        assert metrics[1][name] == metrics[0][name] != metrics[2][name] == metrics[3][name]
        assert states[2].auxiliary[REPORTED][name] == metrics[0][name]


@pytest.mark.slow
def test_neither_update_depends_on_the_other(matched: Any) -> None:
    """The critic after a step in which the student stays, and after the same step in which it moves, is the same to
    the bit; and so is the student whatever the critic's optimiser does."""
    objective, frozen, states, _ = matched
    rows = batch(objective)
    often = type(objective)(dataclasses.replace(objective.config, critic=CriticConfig(updates=1, optimiser=RATE)))
    before = states[1]._replace(auxiliary={CRITIC: states[1].auxiliary[CRITIC]})
    moved, _ = jax.jit(often.step())(before, frozen, rows)
    assert same(moved.auxiliary[CRITIC], states[2].auxiliary[CRITIC])
    assert not same(moved.params, before.params) and same(states[2].params, states[1].params)
    slow = CriticConfig(updates=1, optimiser=dataclasses.replace(RATE, learning_rate=0.0))
    other, _ = jax.jit(type(objective)(dataclasses.replace(objective.config, critic=slow)).step())(before, frozen, rows)
    assert same(other.params, moved.params) and same(other.auxiliary[CRITIC].params, before.auxiliary[CRITIC].params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "steps=3. Give 1, 2, 4 or 8"),
        ({"head": MiddleHeadConfig(layers=2)}, "16×16, of which 8 rows or columns .* head.layers=2 needs 16"),
        ({"matched": (0.9, 0.1)}, "matched=0.9,0.1"),
        ({"critic": CriticConfig(updates=0)}, "critic.updates=0"),
        ({"critic": CriticConfig(optimiser=OptimiserConfig(accumulate=2))}, "critic.optimiser.accumulate=2 has no"),
        ({"critic": CriticConfig(optimiser=OptimiserConfig(beta1=2.0))}, "critic.optimiser.beta1=2"),
    ],
)
def test_settings_of_dmd2_that_do_not_fit_are_refused(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective_of(matching(folder, **changes)).check()


# ADD

NO_SIGNAL = dataclasses.replace(MODEL, prediction=Prediction.V, schedule=ScheduleConfig(zero_terminal_snr=True))
FEATURES_OF_TINY = FeatureDiscriminatorConfig(dinov2=tiny.DINOV2, layers=(0, 2))


def adversarial(folder: Path, **changes: Any) -> AdversarialDiffusionConfig:
    """On buckets with one patch of the tiny DINOv2 and a rest."""
    if not (folder / "dinov2").exists():
        tiny.write_dinov2(folder / "dinov2")
    discriminator = dataclasses.replace(FEATURES_OF_TINY, weights=str(folder / "dinov2"))
    own = {"critic": CriticConfig(optimiser=RATE), "discriminator": discriminator}
    return configured(AdversarialDiffusionConfig, folder, **{**own, **changes})


def test_the_students_of_add_are_sampled_as_turbo_is(folder: Path) -> None:
    for steps in (1, 2, 3, 4):
        config = adversarial(folder, steps=steps)
        options = Options().resolved(config.student)
        found = options.preset, options.sampler, options.timestep_spacing, options.steps, options.guidance
        assert found == ("add", "euler_ancestral", Spacing.TRAILING, steps, 1.0)
        Options().check(config.student)
    assert adversarial(folder).nodes == (999, 749, 499, 249)


def test_inputs_of_add_are_noised_images_and_noise_alone_at_the_first_node(folder: Path) -> None:
    objective = AdversarialDiffusion(adversarial(folder))
    x_s, timestep = objective.inputs(jnp.full((2048, 2, 2, 1), 3.0), jax.random.split(jax.random.key(0), 2048))
    assert set(np.asarray(timestep).tolist()) == set(objective.config.nodes)
    for node in objective.config.nodes:
        rows, alpha = np.asarray(x_s)[np.asarray(timestep) == node], objective.schedule.alpha[node]
        assert rows.mean() == pytest.approx(0 if node == 999 else 3 * alpha, abs=0.15)
        assert rows.std() == pytest.approx(objective.schedule.sigma_t[node], abs=0.1)


def test_weights_of_add_are_those_of_score_distillation(folder: Path) -> None:
    """With c of SDS, the gradient of c ‖y − x̂‖² with respect to y is σ² (ε̂ − ε); and c of the exponential falls."""
    schedule = AdversarialDiffusion(adversarial(folder)).schedule
    alpha, sigma_t = schedule.alpha, schedule.sigma_t
    y, noise, predicted = np.random.default_rng(0).normal(size=(3, 1))
    found = alpha * y + sigma_t * noise
    x0 = (found - sigma_t * predicted) / alpha
    c = distillation_weights(alpha, sigma_t, DistillationWeighting.SDS)
    np.testing.assert_allclose(2 * c * (y - x0), sigma_t**2 * (predicted - noise), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(distillation_weights(alpha, sigma_t, DistillationWeighting.NFSD), c)
    assert np.all(np.diff(distillation_weights(alpha, sigma_t, DistillationWeighting.EXPONENTIAL)) < 0)


@pytest.fixture(scope="module")
def deceived(folder: Path) -> Any:
    """(objective, frozen parameters, the states before and after two steps, their metrics)."""
    objective, state, frozen = fresh(adversarial(folder))
    step, states, metrics = jax.jit(objective.step()), [state], []
    for _ in range(2):
        state, numbers = step(states[-1], frozen, batch(objective))
        states.append(state)
        metrics.append(numbers)
    return objective, frozen, states, metrics


@pytest.mark.slow
def test_student_and_heads_of_add_move_in_every_step(deceived: Any) -> None:
    objective, _, states, metrics = deceived
    for before, after in itertools.pairwise(states):
        old, new = (each.auxiliary[CRITIC] for each in (before, after))
        assert old.params.keys() == {DISCRIMINATOR} and not same(old.params, new.params)
        assert not same(old.carried, new.carried)
        for name in ("params", "ema", "optimiser"):
            assert not same(getattr(before, name), getattr(after, name))
    assert all(set(objective.config.metrics) <= each.keys() for each in metrics)
    assert [int(each["student_updates"]) for each in metrics] == [1, 2] == [int(m["critic_updates"]) for m in metrics]
    for each in metrics:
        assert float(each["loss"]) == pytest.approx(float(each["deception"] + 2.5 * each["distillation"]), rel=1e-5)
        assert float(each["critic"]) == pytest.approx(float(each["discrimination"] + 1e-5 * each["r1"]), rel=1e-5)
        assert each["r1"] > 0 and each["distillation"] > 0


@pytest.mark.slow
def test_student_and_heads_of_add_move_with_features_of_vgg16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used without DINOv2's weights, here with random ones."""
    leaves = flatten(VggFeatures().abstract())
    backbone = unflatten({path: np.asarray(sample(leaf, 0, path)) for path, leaf in leaves.items()})
    monkeypatch.setattr(evaluation_weights, "check", lambda name: None)
    monkeypatch.setattr(evaluation_weights, "load", lambda name: {"backbone": backbone})
    config = adversarial(folder, discriminator=FeatureDiscriminatorConfig())
    objective_of(config).check()
    objective, state, frozen = fresh(config)
    after, metrics = jax.jit(objective.step())(state, frozen, batch(objective))
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["r1"] > 0
    assert not same(after.params, state.params)
    assert not same(after.auxiliary[CRITIC].params, state.auxiliary[CRITIC].params)
    assert same(frozen[FEATURES], backbone)


@pytest.mark.slow
def test_the_network_of_features_is_frozen_and_not_exported(deceived: Any) -> None:
    objective, frozen, (*_, last), _ = deceived
    assert same(frozen[FEATURES], open_dinov2(objective.config.discriminator.weights).load())
    assert objective.model(last, frozen).params.keys() == {"unet", "text_encoder_2"}
    paths = flatten(jax.tree.map(np.asarray, last.auxiliary[CRITIC].params))
    assert all(path.startswith(f"{DISCRIMINATOR}/head_") for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", list(DistillationWeighting))
def test_gradients_reach_the_student_through_decoder_and_features_and_nothing_else(
    deceived: Any, weighting: DistillationWeighting
) -> None:
    """Through the adversarial term alone, and through the distance alone; there is none to teacher, features and
    heads, and none of the critic's to the student."""
    objective, frozen, (_, _, state), _ = deceived
    rows, keys = batch(objective), jax.random.split(jax.random.key(0), 2)
    critic = state.auxiliary[CRITIC]
    for weight, alone in ((0.0, "deception"), (1.0, "distillation")):
        config = dataclasses.replace(objective.config, distillation_weight=weight, weighting=weighting)
        other = AdversarialDiffusion(config)

        def loss(trained: Any, heads: Any, other: Any = other, alone: str = alone) -> Any:
            return other.student_loss(trained, critic._replace(params=heads), frozen, rows, keys)[1][alone]

        of_student, of_heads = jax.jit(jax.grad(loss, (0, 1)))(state.params, critic.params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_student))
        assert np.abs(of_student["unet"]["conv_in"]["kernel"]).max() > 0
        assert (alone == "distillation") is not any(np.any(leaf) for leaf in jax.tree.leaves(of_heads))

    def of_critic(trained: Any) -> Any:
        return objective.critic_loss(critic.params, critic.carried, trained, frozen, rows, keys)[0]

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(of_critic))(state.params)))


@pytest.mark.slow
def test_the_penalty_at_the_heads_inputs_is_that_of_finite_differences() -> None:
    """R1 of ADD's heads, with their norms over the virtual batch, along random directions: the directional derivative
    of the logits' sum is the product with the gradient that R1 is the norm of."""
    with jax.enable_x64(True):
        heads = FeatureHeads((3,), 1, 2)
        leaves = flatten(heads.abstract()).items()
        params = unflatten({path: jnp.asarray(sample(leaf, 0, path), jnp.float64) for path, leaf in leaves})
        normalised, _ = heads.normalised(params, heads.carried())
        features, condition = (jnp.asarray(np.random.default_rng(0).normal(size=size)) for size in ((4, 6, 3), (4, 2)))

        def total(x: Any) -> Any:
            return sum(each.sum() for each in heads.logits(normalised, (x,), condition))

        def slope(number: int) -> Any:
            change = jnp.zeros(features.size).at[number].set(1e-6).reshape(features.shape)
            return (total(features + change) - total(features - change)) / 2e-6

        slopes = np.array([slope(number) for number in range(features.size)])
        penalty = losses.r1(lambda each: heads.logits(normalised, each, condition), (features,))
        assert float(penalty) == pytest.approx(0.5 * (slopes**2).sum() / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "steps=5. Give 1 to 4"),
        ({"discriminator": dataclasses.replace(FEATURES_OF_TINY, weights=None)}, "needs discriminator.weights"),
        ({"discriminator": FeatureDiscriminatorConfig(weights="dinov2")}, "discriminator.weights=dinov2 has no effect"),
        ({"discriminator": FeatureDiscriminatorConfig(layers=(1,))}, r"discriminator.layers=\(1,\) has no effect"),
        ({"discriminator": dataclasses.replace(FEATURES_OF_TINY, layers=(3,), weights="x")}, "has 2 layers"),
        ({"discriminator": FeatureDiscriminatorConfig(r1_weight=-1.0)}, "discriminator.r1_weight=-1"),
        ({"model": NO_SIGNAL}, "zero_terminal_snr=True: the student is sampled with euler_ancestral"),
        ({"weighting": DistillationWeighting.NFSD, "teacher": TeacherConfig(guidance=None)}, "weighting=nfsd needs"),
    ],
)  # fmt: skip
def test_settings_of_add_that_do_not_fit_are_refused(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective_of(adversarial(folder, **changes)).check()


def test_missing_and_wrong_weights_of_features_are_refused_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which, and where."""
    missing = dataclasses.replace(FEATURES_OF_TINY, weights=str(tmp_path / "none"))
    with pytest.raises(InputError, match=rf"discriminator\.weights={tmp_path}/none: There is no .*DINOv2"):
        objective_of(adversarial(folder, discriminator=missing)).check_start()
    other = dataclasses.replace(tiny.DINOV2, heads=4)
    config = adversarial(folder)
    with pytest.raises(InputError, match=r"heads=2.* but discriminator\.dinov2 is .*heads=4"):
        wrong = dataclasses.replace(config.discriminator, dinov2=other)
        objective_of(dataclasses.replace(config, discriminator=wrong)).check_start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=rf"weights of lpips_vgg are missing: there is no {tmp_path}.*--fetch-weights"):
        objective_of(adversarial(folder, discriminator=FeatureDiscriminatorConfig())).check_start()


# What the loop provides


def both(folder: Path, count: int = 3, **changes: Any) -> list[Any]:
    return [matching(folder, count=count, **changes), adversarial(folder, count=count, **changes)]


KINDS = pytest.mark.parametrize("number", [0, 1], ids=["dmd2", "add"])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("decay", [Decay.CONSTANT, Decay.COSINE])
def test_a_critic_whose_rate_ends_with_the_run_keeps_its_number_of_steps(folder: Path, decay: Decay) -> None:
    critic = CriticConfig(optimiser=dataclasses.replace(RATE, decay=decay))
    short, long = (to_json(matching(folder, count=count, critic=critic)) for count in (3, 9))
    assert bool(configuration.blocking_differences(short, long)) is (decay is Decay.COSINE)


@KINDS
@pytest.mark.parametrize("layout", ["single-file", "diffusers"])
def test_exports_say_how_the_student_is_sampled(folder: Path, number: int, layout: Any, tmp_path: Path) -> None:
    """As the run does."""
    config = both(folder, steps=2)[number].student
    unet = dataclasses.replace(tiny.MODEL.unet, middle_depth=2)
    parts = {"unet": unet, "vae": tiny.MODEL.vae, "text": tiny.MODEL.text, "micro": tiny.MODEL.micro}
    whole = dataclasses.replace(config, **parts)
    path = tmp_path / ("student.safetensors" if layout == "single-file" else "student")
    convert(tiny.random_model(whole, 0), path, layout, False)
    options = Options().resolved(open_model(path).config)
    assert (options.preset, options.steps, options.guidance) == (("dmd", "add")[number], 2, 1.0)
    assert options == Options().resolved(config)


@pytest.mark.slow
@KINDS
def test_resumed_run_repeats_every_bit(folder: Path, number: int, tmp_path: Path) -> None:
    """Losses and counters; student, average, critic, both optimisers, what the critic carries, and the last metrics."""
    config = both(folder, 4)[number]
    loop.train(config, whole := tmp_path / "whole", progress=False)
    with crash_before(3):
        loop.train(config, stopped := tmp_path / "stopped", progress=False)
    loop.train(config, stopped, progress=False)
    for one, other in zip(lines(whole), lines(stopped), strict=True):
        assert {name: one[name] for name in config.metrics} == {name: other[name] for name in config.metrics}
    expected, found = (stored(run / "checkpoints" / "4") for run in (whole, stopped))
    assert expected.keys() == found.keys()
    assert {name.split("/")[1] for name in expected if name.startswith("auxiliary")} == (
        {CRITIC, REPORTED} if number == 0 else {CRITIC}
    )
    for path, leaf in expected.items():
        np.testing.assert_array_equal(leaf, found[path], err_msg=path)
    model = load_model(whole, progress=False)
    assert Options().resolved(model.config).preset == ("dmd", "add")[number]
    assert model.params.keys() == {"unet", "text_encoder_2"}


def stored(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by path."""
    return {name: leaf.read() for name, leaf in orbax.leaves(path, orbax.metadata(path)[0]).items()}


@KINDS
def test_the_report_of_a_step_has_a_row_for_each_network_beside_the_student(folder: Path, number: int) -> None:
    """Of `sdxl-jax compile`; together they are all inputs."""
    config = both(folder)[number]
    objective, mesh = objective_of(config), AbstractMesh((1, 1, 1, 1), sharding.AXES)
    state, frozen = objective.abstract_state(mesh)
    rows = objective.abstract_batch(mesh, Bucket(16, 16), 2)
    counted = {name: shard_bytes(tree) for name, tree in inputs_by_use(objective, state, frozen, rows).items()}
    assert sum(counted.values()) == shard_bytes((state._replace(step=()), frozen, rows))
    assert counted["teacher"] == shard_bytes(frozen["teacher"]) > 0
    assert counted["critic"] == shard_bytes(state.auxiliary[CRITIC]) > counted["teacher"] * (number == 0)
    assert counted.get("image features", 0) == shard_bytes(frozen.get(FEATURES, {}))
    assert counted["frozen"] == shard_bytes(frozen["text_encoder_2"])
    assert counted["auxiliary"] == shard_bytes(state.auxiliary.get(REPORTED, {})) < 100


@pytest.mark.slow
def test_flops_of_a_step_are_the_mean_of_steps_with_and_without_the_student(folder: Path) -> None:
    mesh, found = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), {}
    for every in (1, 2, 10):
        objective = objective_of(matching(folder, critic=CriticConfig(updates=every, optimiser=RATE)))
        state, frozen = objective.abstract_state(mesh)
        rows = objective.abstract_batch(mesh, Bucket(16, 16), 2)
        found[every] = objective.model_flops((state, frozen, rows))
    student = (found[1] - found[2]) * 2
    assert 0 < student < found[1] and found[10] == pytest.approx(found[1] - 0.9 * student, rel=1e-3)


@pytest.mark.slow
def test_many_devices_take_the_same_steps_as_one(folder: Path, tmp_path: Path) -> None:
    """Two and four simulated devices, the latter with split parameters. The tolerance is that of float32 sums in
    another order, through Adam, whose first steps divide by the gradient's own size."""
    adversarial(folder)
    program = Path(__file__).with_name("sharded_critic.py")
    environment = compiling.environment(tmp_path, devices=4)
    command = [sys.executable, str(program), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, *others in json.loads(done.stdout.splitlines()[-1]):
        for many, step in itertools.product(others, range(len(one))):
            for name, value in one[step].items():
                assert many[step][name] == pytest.approx(value, rel=2e-3, abs=1e-5), (step, name)


@pytest.mark.slow
@KINDS
def test_adapters_are_trained_against_a_critic_beside_one_frozen_base(folder: Path, number: int) -> None:
    """No copy of the teacher; the fake score is an adapter too; micro-batches and dropout go with it."""
    adapter = AdapterConfig(rank=4, layers=Layers.LINEAR, rank_dropout=0.2)  # not all four at once
    optimiser = dataclasses.replace(RATE, accumulate=2)
    objective, state, frozen = fresh(both(folder, adapter=adapter, optimiser=optimiser)[number])
    assert "teacher" not in frozen and state.params.keys() == {"adapters"}
    critic = state.auxiliary[CRITIC].params
    assert critic.keys() == ({"adapters", HEAD} if number == 0 else {DISCRIMINATOR})
    step = jax.jit(objective.step())
    after, _ = step(state, frozen, batch(objective, 4))
    after, metrics = step(after, frozen, batch(objective, 4))
    assert all(np.isfinite(value) for value in metrics.values())
    moved = [(state.params, after.params)]
    if number == 0:
        moved.append((state.auxiliary[CRITIC].params, after.auxiliary[CRITIC].params))
    for old, new in ((flatten(each) for each in pair) for pair in moved):
        # The other factor has no gradient before this one, which begins at zero, has moved.
        ups = [path for path in old if path.endswith("/up")]
        assert ups and all(not np.array_equal(old[path], new[path]) for path in ups)
    model = objective.model(after, frozen)
    assert not same(model.params["unet"], frozen["unet"])


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_by_both(folder: Path) -> None:
    base = matching(folder)
    training = dataclasses.replace(base.training, on_nonfinite=OnNonfinite.SKIP)
    objective, state, frozen = fresh(dataclasses.replace(base, training=training))
    step = jax.jit(objective.step())
    poisoned = state.params["unet"]["conv_in"]["bias"].at[0].set(jnp.nan)
    bad = state._replace(params={"unet": {**state.params["unet"], "conv_in": {
        **state.params["unet"]["conv_in"], "bias": poisoned}}})  # fmt: skip
    after, metrics = step(bad, frozen, batch(objective))
    assert metrics["skipped"] == 1 and after.step == 1
    assert same(after._replace(step=bad.step), bad)


SIZES = {"dmd2": 2_567_463_684 + 4 * (16 * 1280 * 1280 + 1280) + 4 * 2 * 1280 + 1281, "turbo": 5 * 1_608_064}
"""Parameters of the critics at full size: another UNet and its head; five heads on DINOv2-S."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmd2", "turbo"])
def test_full_size_states_have_the_bytes_of_their_networks(name: str) -> None:
    """Nothing is computed: shapes alone, on a mesh of eight devices, and those of a whole step."""
    config = configuration.load(Path(__file__).parents[1] / "configs" / f"{name}.py")
    objective, mesh = objective_of(config), AbstractMesh((1, 1, 8, 1), sharding.AXES)
    state, frozen = objective.abstract_state(mesh)

    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    unet = 2_567_463_684
    assert count(state.params) == unet == count(frozen["teacher"]) and size(frozen["teacher"]) == 2 * unet
    critic = state.auxiliary[CRITIC]
    assert count(critic.params) == SIZES[name]
    whole = size(state)
    moments = 12 * (unet + SIZES[name])  # parameters and two moments of Adam, all in float32
    assert moments <= whole < moments + 100_000
    print(f"\n{name}: state {whole / 2**30:.2f} GiB, frozen {size(frozen) / 2**30:.2f} GiB")
    rows = objective.abstract_batch(mesh, Bucket(*config.data.buckets[0]), config.data.batch_size)
    after, metrics = jax.eval_shape(objective.step(), state, frozen, rows)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
    assert shapes[0] == shapes[1] and set(config.metrics) <= metrics.keys()
