"""Training with continuous noise laws: the target, which levels are trained, and what an error costs there."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdxl_jax.config import TrainConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.continuous import ContinuousConfig, EdmConfig, FlowConfig, scales, target
from sdxl_jax.diffusion.loss import BaseTarget, LossConfig, Weighting, diffusion_loss, draw_noise, position_weights
from sdxl_jax.diffusion.parameterisation import DISCRETE, Prediction, denoised
from sdxl_jax.diffusion.parameterisation import target as discrete_target
from sdxl_jax.diffusion.training_levels import LevelDistribution, LevelsConfig, draw_level
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.training.loop import train
from sdxl_jax.weights.open import open_model

Law = tuple[ContinuousConfig, Prediction]
EDM: Law = (EdmConfig(), Prediction.EDM)
COSXL: Law = (EdmConfig(0.002, 120.0, 1.0), Prediction.V)
FLOW: Law = (FlowConfig(3.0), Prediction.FLOW)
LAWS = [EDM, COSXL, (EdmConfig(sigma_data=0.7), Prediction.V), FLOW]
EVERY_LAW = pytest.mark.parametrize("given", LAWS, ids=str)
LAWS_OF_LOSS = pytest.mark.parametrize("given", [EDM, FLOW, pytest.param(COSXL, marks=pytest.mark.slow)], ids=str)
ROWS = 16


def values_of(law: ContinuousConfig) -> list[float]:
    return [1.0, 0.999, 0.5, 0.01] if isinstance(law, FlowConfig) else [120.0, 3.0, 0.5, 0.002]


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def latents(count: int = ROWS) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (count, 4, 4, 4))


def imperfect(x: jax.Array, timestep: jax.Array) -> jax.Array:
    return jnp.tanh(x) * (0.5 + jnp.cos(timestep))[:, None, None, None]


def loss_of(given: Law, network: Any = imperfect, config: LossConfig = LossConfig(), **more: Any) -> float:
    law, prediction = given
    return float(diffusion_loss(network, latents(), keys(ROWS), law, prediction, config, **more))


# The target


@EVERY_LAW
def test_the_target_is_what_gives_the_image_and_the_noise_back(given: Law) -> None:
    """In float64: c_skip · x + c_out · target = x₀, for EDM in the words of Karras et al., eq. 7."""
    law, prediction = given
    x0, epsilon = np.random.default_rng(0).standard_normal((2, 5, 3))
    for value in values_of(law):
        alpha, sigma_t = law.level(value)
        x_t, scale = alpha * x0 + sigma_t * epsilon, scales(law, prediction, alpha, sigma_t)
        aim = target(law, prediction, x0, epsilon, alpha, sigma_t)
        np.testing.assert_allclose(scale.skip * x_t + scale.output * aim, x0, rtol=0, atol=1e-13)
        np.testing.assert_allclose(scale.noise_skip * x_t + scale.noise_output * aim, epsilon, rtol=0, atol=1e-13)
        if isinstance(law, EdmConfig) and value > 0.1:  # their division loses digits at low σ
            total = value**2 + law.sigma_data**2
            c_skip, c_out = law.sigma_data**2 / total, value * law.sigma_data / total**0.5
            sign = -1 if prediction is Prediction.V else 1
            np.testing.assert_allclose(aim, sign * (x0 - c_skip * (x0 + value * epsilon)) / c_out, atol=1e-12)


@EVERY_LAW
@pytest.mark.parametrize("prediction", DISCRETE)
def test_predictions_become_each_other_and_back(given: Law, prediction: Prediction) -> None:
    """ε, v, x₀ → F of the law → the same again, in float64, at one α and σ_t."""
    law, own = given
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        output, x_t = jnp.asarray(rng.standard_normal((2, 1, 1, 5, 3)))
        alpha, sigma_t = (jnp.full((1, 1, 1, 1), each) for each in law.level(values_of(law)[2]))
        x0, epsilon = denoised(prediction, output, x_t, alpha, sigma_t)
        aim, scale = target(law, own, x0, epsilon, alpha, sigma_t), scales(law, own, alpha, sigma_t)
        back = scale.skip * x_t + scale.output * aim, scale.noise_skip * x_t + scale.noise_output * aim
        again = discrete_target(prediction, *back, alpha, sigma_t)
        assert again.dtype == jnp.float64
        np.testing.assert_allclose(again, output, rtol=0, atol=1e-13)


@LAWS_OF_LOSS
def test_loss_of_a_perfect_network_is_zero(given: Law) -> None:
    law, prediction = given
    x0 = latents()

    def perfect(x: jax.Array, timestep: jax.Array) -> jax.Array:
        """Knows the image, and finds the noise."""
        level = timestep / 1000 if isinstance(law, FlowConfig) else jnp.exp(4 * timestep)
        alpha, sigma_t = law.level(level[:, None, None, None])
        x_t = x / scales(law, prediction, alpha, sigma_t).input
        return target(law, prediction, x0, (x_t - alpha * x0) / sigma_t, alpha, sigma_t)

    for weighting in (Weighting.UNIFORM, Weighting.X0):
        config = LossConfig(weighting, offset_noise=0.1)
        # float32 of ε found by a division by σ_t, the least of which is about 0.02, squared.
        assert loss_of(given, perfect, config) < 1e-8
        assert loss_of(given, config=config) > 0.01


# Which levels are trained


def quantile(config: LevelsConfig, law: ContinuousConfig) -> Callable[[float], float]:
    """The distributions in their own words."""
    normal = NormalDist(config.mean or 0.0, config.deviation or 1.0).inv_cdf
    scale = config.mode_scale or 0.0

    def of(share: float) -> float:
        match config.distribution:
            case LevelDistribution.LOG_NORMAL:
                return math.exp(normal(share))
            case LevelDistribution.LOGIT_NORMAL:
                level = 1 / (1 + math.exp(-normal(share)))
            case LevelDistribution.MODE:  # falls with u
                level = share - scale * (math.cos(math.pi / 2 * (1 - share)) ** 2 - share)
            case _:
                level = share
        assert isinstance(law, FlowConfig)
        return law.shift * level / (1 + (law.shift - 1) * level)

    return of


@pytest.mark.parametrize(
    ("law", "default", "written"),
    [
        (EdmConfig(), LevelsConfig(), LevelsConfig(LevelDistribution.LOG_NORMAL, -1.2, 1.2)),
        (EdmConfig(), LevelsConfig(mean=1.0, deviation=1.6), LevelsConfig(LevelDistribution.LOG_NORMAL, 1.0, 1.6)),
        (FlowConfig(), LevelsConfig(), LevelsConfig(LevelDistribution.LOGIT_NORMAL, 0.0, 1.0)),
        (FlowConfig(3.0), LevelsConfig(mean=-0.5), LevelsConfig(LevelDistribution.LOGIT_NORMAL, -0.5, 1.0)),
        (FlowConfig(3.0), LevelsConfig(LevelDistribution.UNIFORM), LevelsConfig(LevelDistribution.UNIFORM)),
        (
            FlowConfig(),
            LevelsConfig(LevelDistribution.MODE),
            LevelsConfig(LevelDistribution.MODE, mode_scale=1.29),
        ),
    ],
    ids=str,
)
def test_levels_have_the_quantiles_of_their_distribution(
    law: ContinuousConfig, default: LevelsConfig, written: LevelsConfig
) -> None:
    count = 20_000
    drawn = np.sort(jax.vmap(lambda key: draw_level(key, default, law))(keys(count)))
    default.check(law)
    shares = np.linspace(0.005, 0.995, 100)
    below = np.searchsorted(drawn, [quantile(written, law)(share) for share in shares]) / count
    # Kolmogorov-Smirnov: √count times the largest difference is above 1.95 with a chance of 0.001.
    assert np.abs(below - shares).max() < 1.95 / math.sqrt(count)


def test_a_shift_of_a_logit_normal_is_the_logarithm_added_to_its_mean() -> None:
    shifted = draw_level(keys(1)[0], LevelsConfig(), FlowConfig(3.0))
    moved = draw_level(keys(1)[0], LevelsConfig(mean=math.log(3.0)), FlowConfig())
    assert float(shifted) == pytest.approx(float(moved), rel=1e-6)


@LAWS_OF_LOSS
def test_the_network_has_the_laws_input_and_number_of_the_level(given: Law) -> None:
    law, prediction = given
    seen: list[Any] = []
    x0 = latents()

    def network(x: jax.Array, timestep: jax.Array) -> jax.Array:
        seen.append((np.asarray(x), np.asarray(timestep)))
        return x

    diffusion_loss(network, x0, keys(ROWS), law, prediction, LossConfig(offset_noise=0.05))
    ((found, timestep),) = seen
    for row, key in enumerate(keys(ROWS)):
        level_key, noise_key, _ = jax.random.split(key, 3)
        level, noise = float(draw_level(level_key, LevelsConfig(), law)), draw_noise(noise_key, x0.shape[1:], 0.05)
        if isinstance(law, FlowConfig):
            expected, number = (1 - level) * x0[row] + level * noise, 1000 * level
        else:
            expected = (x0[row] + level * noise) / math.sqrt(level**2 + law.sigma_data**2)
            number = math.log(level) / 4
        assert timestep[row] == pytest.approx(number, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


# What an error costs


def in_own_words(weighting: Weighting, law: ContinuousConfig, level: float) -> float:
    """λ of an error in x₀."""
    if isinstance(law, FlowConfig):  # of ε − x₀, which is an error in x₀ by s
        of_velocity = {
            Weighting.UNIFORM: 1.0,
            Weighting.X0: level**2,
            Weighting.COSMAP: 2 / (math.pi * (1 - 2 * level + 2 * level**2)),
        }
        return of_velocity[weighting] / level**2
    edm = (level**2 + law.sigma_data**2) / (level * law.sigma_data) ** 2
    return {Weighting.UNIFORM: edm, Weighting.X0: 1.0, Weighting.INVERSE_SQUARE: level**-2}[weighting]


@pytest.mark.parametrize(
    ("given", "weightings"),
    [
        (EDM, (Weighting.UNIFORM, Weighting.X0, Weighting.INVERSE_SQUARE)),
        (COSXL, (Weighting.UNIFORM, Weighting.X0, Weighting.INVERSE_SQUARE)),
        (FLOW, (Weighting.UNIFORM, Weighting.X0, Weighting.COSMAP)),
    ],
    ids=str,
)
def test_errors_in_the_image_are_weighted_as_said(given: Law, weightings: tuple[Weighting, ...]) -> None:
    law, prediction = given
    x0, errors = latents(), []
    for row, key in enumerate(keys(ROWS)):
        level_key, noise_key, _ = jax.random.split(key, 3)
        level = float(draw_level(level_key, LevelsConfig(), law))
        alpha, sigma_t = law.level(level)
        x_t, scale = (
            alpha * x0[row] + sigma_t * draw_noise(noise_key, x0.shape[1:], 0.0),
            scales(law, prediction, alpha, sigma_t),
        )
        number = jnp.array([1000 * level if isinstance(law, FlowConfig) else math.log(level) / 4])
        made = scale.skip * x_t + scale.output * imperfect(scale.input * x_t[None], number)[0]
        errors.append((level, float(((made - x0[row]) ** 2).mean())))
    for weighting in weightings:
        LossConfig(weighting).check(1000, law)
        expected = np.mean([in_own_words(weighting, law, level) * error for level, error in errors])
        # float32: x₀ − c_skip x loses digits at low σ, where UNIFORM divides by them.
        assert loss_of(given, config=LossConfig(weighting)) == pytest.approx(expected, rel=2e-3)


@LAWS_OF_LOSS
def test_examples_masks_and_other_targets_count_as_with_timesteps(given: Law) -> None:
    plain = loss_of(given)
    halves = jnp.arange(ROWS) < ROWS // 2
    assert loss_of(given, example_weight=jnp.ones(ROWS)) == plain
    parts = [loss_of(given, example_weight=jnp.where(half, 1.0, 0.0)) for half in (halves, ~halves)]
    assert sum(parts) == pytest.approx(plain, rel=1e-6) and min(parts) > 0
    own = BaseTarget(imperfect, halves)
    assert loss_of(given, base=own) == pytest.approx(parts[1], rel=1e-6)
    assert loss_of(given, base=BaseTarget(imperfect, halves | True)) == 0
    white = position_weights(jnp.full((ROWS, 32, 32), 255, jnp.uint8), 4, 4)
    assert loss_of(given, position_weight=white) == plain
    assert loss_of(given, position_weight=0 * white) == 0


@LAWS_OF_LOSS
def test_perturbed_input_leaves_the_target_as_it_was(given: Law) -> None:
    def nothing(x: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)

    perturbed = LossConfig(input_perturbation=0.5)
    assert loss_of(given, nothing, perturbed) == loss_of(given, nothing)
    assert loss_of(given, config=perturbed) != loss_of(given)


def test_the_discrete_loss_is_that_of_before_to_the_bit() -> None:
    """In the words of the module without laws: draws, gathers and means in this order."""
    x0, made = latents(), schedule.make(SDXL_BASE.schedule)

    def before(x0: jax.Array, keys: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            time_key, noise_key, _ = jax.random.split(key, 3)
            return jax.random.randint(time_key, (), 0, 1000), draw_noise(noise_key, (4, 4, 4), 0.05)

        timestep, epsilon = jax.vmap(draw)(keys)
        alpha, sigma_t = (
            jnp.asarray(each, jnp.float32)[timestep][:, None, None, None] for each in (made.alpha, made.sigma_t)
        )
        return ((imperfect(alpha * x0 + sigma_t * epsilon, timestep) - epsilon) ** 2).mean()

    def now(x0: jax.Array, keys: jax.Array) -> jax.Array:
        return diffusion_loss(imperfect, x0, keys, made, Prediction.EPSILON, LossConfig(offset_noise=0.05))

    assert jax.jit(now)(x0, keys(ROWS)) == jax.jit(before)(x0, keys(ROWS))


# Configurations


def config_of(given: Law | None, **loss: Any) -> TrainConfig:
    model = SDXL_BASE
    if given is not None:
        model = dataclasses.replace(model, noise=given[0], prediction=given[1])
    return TrainConfig(DataConfig("images"), model=model, loss=LossConfig(**loss))


def levels(**fields: Any) -> dict[str, LevelsConfig]:
    return {"levels": LevelsConfig(**fields)}


@pytest.mark.parametrize(
    ("given", "loss", "said"),
    [
        (None, levels(mean=0.0), r"loss.levels.mean has no effect on the timesteps of model.schedule"),
        (None, {"weighting": Weighting.COSMAP}, "cosmap does not .*noise=None. Give one of uniform, min_snr, debiased"),
        (FLOW, {"weighting": Weighting.MIN_SNR}, "=FlowConfig. Give one of uniform, x0, cosmap"),
        (FLOW, {"weighting": Weighting.INVERSE_SQUARE}, "inverse_square does not apply"),
        (EDM, {"weighting": Weighting.COSMAP}, "=EdmConfig. Give one of uniform, x0, inverse_square"),
        (EDM, {"weighting": Weighting.DEBIASED}, "debiased does not apply"),
        (COSXL, {"min_snr_gamma": 5.0}, "min_snr_gamma=5.0 has no effect with loss.weighting=uniform. Leave it out"),
        (COSXL, {"timesteps": (0, 200)}, r"loss.timesteps=\(0, 200\) has no effect on .* has no timesteps"),
        (FLOW, {"biased_timesteps": (0, 5), "timestep_bias": 2.0}, "loss.biased_timesteps="),
        (FLOW, levels(distribution=LevelDistribution.LOG_NORMAL), "Give logit_normal, mode or uniform"),
        (EDM, levels(distribution=LevelDistribution.MODE), "of model.noise=EdmConfig. Give log_normal"),
        (EDM, levels(mode_scale=1.0), "mode_scale=1.0 has no effect with loss.levels.distribution=log_normal"),
        (FLOW, levels(distribution=LevelDistribution.UNIFORM, deviation=1.0), "deviation=1.0 has no effect with"),
        (FLOW, levels(distribution=LevelDistribution.MODE, mean=1.0), "mean=1.0 has no effect with"),
        (FLOW, levels(distribution=LevelDistribution.MODE, mode_scale=2.0), r"mode_scale=2.0 is out of range"),
        (EDM, levels(deviation=0.0), "deviation=0.0 is out of range"),
        (EDM, levels(mean=math.nan), "mean=nan is out of range"),
    ],
)
def test_what_does_not_apply_to_a_law_is_refused(given: Law | None, loss: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config_of(given, **loss).check()


def test_configurations_of_a_law_are_read_as_they_were_written() -> None:
    config = config_of(FLOW, weighting=Weighting.COSMAP, **levels(distribution=LevelDistribution.MODE, mode_scale=0.5))
    config.check()
    assert from_json(to_json(config), TrainConfig) == config


# Runs


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation", "shared_steps")
@pytest.mark.parametrize("given", [EDM, FLOW], ids=str)
def test_a_run_that_was_stopped_repeats_every_digit(given: Law, tmp_path: Path) -> None:
    base = tiny.train_config(tiny.make_folder(tmp_path / "images"), steps=4)
    model = dataclasses.replace(tiny.MODEL, noise=given[0], prediction=given[1])
    whole = dataclasses.replace(base, model=model, loss=LossConfig(Weighting.X0, offset_noise=0.05))
    half = dataclasses.replace(whole, training=dataclasses.replace(whole.training, steps=2))
    train(whole, tmp_path / "whole", progress=False)
    for config in (half, whole):
        train(config, tmp_path / "stopped", progress=False)
    lines = [
        [
            (line["loss"], line["grad_norm"])
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        ]
        for run in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert len(lines[0]) == 4
    assert lines[0] == lines[1]
    config = open_model(tmp_path / "stopped").config
    assert (config.noise, config.prediction) == given
