"""The reverse process: known sums, the timesteps, and properties that hold for every network.

Agreement with diffusers step by step is in `parity/`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.parameterisation import DISCRETE, Denoised, Prediction, denoised, target
from sdxl_jax.diffusion.schedule import BetaSchedule, Schedule, ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.samplers import guidance, loop
from sdxl_jax.samplers.loop import KnownImage
from sdxl_jax.samplers.steps import (
    SAMPLERS,
    Family,
    Levels,
    Plan,
    Sigmas,
    Spacing,
    initial_scale,
    make_levels,
    timesteps,
)

SDXL = schedule.make(ScheduleConfig())
ZERO_SNR = schedule.make(ScheduleConfig(zero_terminal_snr=True))
SAMPLER = pytest.mark.parametrize("name", SAMPLERS)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed: int, shape: tuple[int, ...] = (2, 3, 5, 4)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def split_keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(7), count)


# Known sums


def ten_steps(name: str, prediction: Prediction) -> jax.Array:
    """The computation of diffusers' own tests of its schedulers, with their quirks.

    Euler, Heun and LMS continue from the network's input instead of their state; DDIM clips its x₀ to ±1 and keeps
    the network's ε; DPM++ and UniPC end at the sigma of timestep 0.
    """
    sampler, family = SAMPLERS[name], SAMPLERS[name].family
    length = 1100 if family is Family.SIGMA else 1000
    noise = schedule.make(ScheduleConfig(length, 1e-4, 0.02, BetaSchedule.LINEAR))
    spacing = Spacing.LEADING if family is Family.DISCRETE else Spacing.LINSPACE
    levels = make_levels(sampler, noise, 10, spacing)
    if family is Family.DISCRETE:  # no offset
        visited = timesteps(10, length, spacing, offset=0).astype(int)
        levels = Levels(visited * 1.0, np.append(noise.alpha[visited], 1.0), np.append(noise.sigma_t[visited], 0.0))
    if family is Family.SOLVER:
        levels.alpha[-1], levels.sigma_t[-1] = noise.alpha[0], noise.sigma_t[0]
    plan = sampler.plan(levels)
    start = (jnp.arange(768, dtype=jnp.float32) / 768).reshape(3, 8, 8, 4).transpose(3, 1, 2, 0)
    arrays = loop.start(start * initial_scale(sampler, levels, spacing), plan).arrays
    for row in zip(*plan, strict=True):
        row = Plan(*map(jnp.float32, row))
        seen = arrays[0]
        output = seen * row.timestep / (row.timestep + 1)
        x_t = seen * row.alpha if family is Family.SIGMA else seen
        result = denoised(prediction, output, x_t, row.alpha, row.sigma_t)
        if family is Family.DISCRETE:
            result = result._replace(x0=jnp.clip(result.x0, -1, 1))
        arrays = loop.advance(row.weights, arrays.at[0].set(x_t), result, jnp.zeros_like(seen))
    return arrays[0]


@pytest.mark.parametrize(
    ("name", "prediction", "measure", "known"),
    [
        ("ddim", Prediction.EPSILON, "sum", 172.0067),
        ("ddim", Prediction.V, "sum", 52.5302),
        ("euler", Prediction.EPSILON, "sum", 10.0807),
        ("heun", Prediction.EPSILON, "sum", 0.1233),
        ("lms", Prediction.EPSILON, "sum", 1006.388),
        ("dpmpp_2m", Prediction.EPSILON, "mean", 0.3301),
        ("unipc", Prediction.EPSILON, "mean", 0.2464),
    ],
)
def test_ten_steps_end_at_the_sum_that_diffusers_tests_for(
    name: str, prediction: Prediction, measure: str, known: float
) -> None:
    latent = jnp.abs(ten_steps(name, prediction))
    # The known sums have four digits after the point; a float32 sum of 768 numbers may miss by some of the last.
    assert float(getattr(latent, measure)()) == pytest.approx(known, abs=max(1e-4, 1e-5 * known))


# Timesteps


def test_fifty_leading_steps_are_those_of_diffusers_and_trailing_those_of_sgm() -> None:
    np.testing.assert_array_equal(timesteps(50, 1000, Spacing.LEADING), np.arange(981, 0, -20))
    np.testing.assert_array_equal(timesteps(50, 1000, Spacing.TRAILING), np.arange(999, 0, -20))
    assert timesteps(4, 1000, Spacing.TRAILING).tolist() == [999, 749, 499, 249]  # few-step sampling


@pytest.mark.parametrize("spacing", Spacing)
def test_timesteps_have_the_given_count_descend_and_are_within_the_schedule(spacing: Spacing) -> None:
    for count in range(1, 1001):
        steps = timesteps(count, 1000, spacing)
        assert len(steps) == count
        # A leading timestep beyond the last is held at the last, which 1000 steps reach twice.
        assert (np.diff(steps)[count == 1000 :] < 0).all(), count
        assert 0 <= steps[-1] <= steps[0] <= 999, count
    # Every timestep visited: only the order is left to choose.
    every = timesteps(1000, 1000, spacing, offset=0)
    np.testing.assert_array_equal(every, np.arange(999, -1, -1))


def levels_of(name: str, count: int, spacing: Spacing, sigmas: Sigmas = Sigmas.SCHEDULE, of: Schedule = SDXL) -> Levels:
    """The levels of a sampler, with those of the options that it takes."""
    family = SAMPLERS[name].family
    return make_levels(
        SAMPLERS[name],
        of,
        count,
        None if family is Family.CONSISTENCY else spacing,
        sigmas if family in (Family.SIGMA, Family.SOLVER) else Sigmas.SCHEDULE,
    )


@SAMPLER
@pytest.mark.parametrize("sigmas", Sigmas)
@pytest.mark.parametrize("spacing", Spacing)
def test_noise_only_ever_goes_down_and_ends_at_none(name: str, spacing: Spacing, sigmas: Sigmas) -> None:
    for count in (1, 2, 30, 50):
        levels = levels_of(name, count, spacing, sigmas)
        assert len(levels.timestep) == count
        assert (np.diff(levels.sigma) < 0).all()
        assert (levels.alpha[-1], levels.sigma_t[-1]) == (1, 0)
        np.testing.assert_allclose(levels.alpha**2 + levels.sigma_t**2, 1, rtol=1e-14)
        assert 0 <= levels.timestep[-1] <= levels.timestep[0] <= 999
        plan = SAMPLERS[name].plan(levels)
        evaluations = SAMPLERS[name].evaluations
        assert len(plan.timestep) == evaluations * count - (evaluations - 1)
        assert all(np.isfinite(column).all() for column in plan)
        assert (plan.alpha_next[-1], plan.sigma_t_next[-1]) == (1, 0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize(
    "of", [pytest.param(SDXL, marks=pytest.mark.slow), ZERO_SNR], ids=["sdxl", "zero terminal SNR"]
)
def test_as_many_steps_as_there_are_timesteps_have_finite_weights(name: str, spacing: Spacing, of: Schedule) -> None:
    # Elsewhere two visits of one timestep divide 0 by 0.
    for count in (999, 1000):
        levels = levels_of(name, count, spacing, of=of)
        with np.errstate(over="raise"):
            columns = [column.astype(np.float32) for column in SAMPLERS[name].plan(levels)]
        assert all(np.isfinite(column).all() for column in columns), count
        assert np.abs(columns[-1]).max() < 1e5
        assert levels.timestep[0] == 999
        assert len(set(levels.timestep)) >= 999, "nearly every timestep is visited once"


def test_leading_solvers_of_all_steps_visit_all_timesteps() -> None:
    # Elsewhere 1000 steps are a thousand times timestep 1, which leaves noise.
    for count in (999, 1000):
        visited = levels_of("dpmpp_2m", count, Spacing.LEADING).timestep
        np.testing.assert_array_equal(visited, np.arange(999, 999 - count, -1))
    np.testing.assert_array_equal(levels_of("unipc", 998, Spacing.LEADING).timestep, np.arange(999, 1, -1))


@pytest.mark.parametrize("name", ["lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_step_of_no_length_is_its_limit_which_changes_nothing(name: str, at: int) -> None:
    levels = levels_of(name, 6, Spacing.LEADING)
    twice = Levels(*(np.insert(column, at, column[at]) for column in levels))
    plan, longer = SAMPLERS[name].plan(levels), SAMPLERS[name].plan(twice)
    for column, other in zip(plan, longer, strict=True):
        np.testing.assert_array_equal(np.delete(other, at, axis=0), column)
    stays = np.eye(plan.memory, plan.weights.shape[2])
    np.testing.assert_array_equal(longer.weights[at], stays)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_karras_sigmas_are_even_in_the_seventh_root_and_exponential_ones_in_the_logarithm(name: str) -> None:
    plain, karras, exponential = (levels_of(name, 30, Spacing.TRAILING, each).sigma[:-1] for each in Sigmas)
    for given, scale in ((karras, lambda sigma: sigma ** (1 / 7)), (exponential, np.log)):
        steps = np.diff(scale(given))
        np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
        assert given[0] == pytest.approx(plain[0])
    # The whole schedule's, or what the timesteps reach.
    last = SDXL.sigma[0] if SAMPLERS[name].family is Family.SOLVER else plain[-1]
    assert karras[-1] == pytest.approx(last)
    assert exponential[-1] == pytest.approx(last)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm"])
@pytest.mark.parametrize("sigmas", [Sigmas.KARRAS, Sigmas.EXPONENTIAL])
def test_sigmas_that_a_sampler_cannot_visit_are_refused(name: str, sigmas: Sigmas) -> None:
    with pytest.raises(InputError, match=rf"{name}, which visits whole timesteps. Use sampler euler, .* or unipc"):
        make_levels(SAMPLERS[name], SDXL, 10, None, sigmas)


def test_consistency_models_have_timesteps_of_their_own() -> None:
    lcm = functools.partial(make_levels, SAMPLERS["lcm"], SDXL)
    assert lcm(4, None).timestep.tolist() == [999, 759, 499, 259]
    assert lcm(1, None).timestep.tolist() == [999]
    assert lcm(50, None).timestep.tolist() == list(range(999, 0, -20))
    with pytest.raises(InputError, match="steps=51, but sampler lcm takes at most 50 steps"):
        lcm(51, None)
    with pytest.raises(InputError, match=r"timestep_spacing=trailing has no effect on sampler lcm, .* Leave it out"):
        lcm(4, Spacing.TRAILING)


def test_levels_from_a_later_one_are_the_end_of_all_levels() -> None:
    whole = levels_of("euler", 10, Spacing.LEADING)
    part = whole.since(6)
    assert len(part.timestep) == 4
    plan, rest = SAMPLERS["euler"].plan(whole), SAMPLERS["euler"].plan(part)
    for column, end in zip(plan.between(6, None), rest, strict=True):
        np.testing.assert_array_equal(column, end)
    # The memory of a multistep sampler starts empty.
    first = SAMPLERS["dpmpp_2m"].plan(levels_of("dpmpp_2m", 10, Spacing.LEADING).since(6)).weights[0, 0]
    assert first[1] == 0, "no x₀ from before the beginning"


# For every network


Network = Callable[[Any, Plan, jax.Array, jax.Array], jax.Array]
"""(its data, the plan, x_t, timestep) -> output."""


def perfect(prediction: Prediction) -> Network:
    return PERFECT[prediction]


def _perfect(prediction: Prediction) -> Network:
    """A network that knows the image. It finds its noise level by its timestep."""

    def network(x0: jax.Array, plan: Plan, x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        row = jnp.argmin(jnp.abs(jnp.asarray(plan.timestep) - timestep))
        alpha, sigma_t = (jnp.full((1, 1, 1, 1), column[row]) for column in (plan.alpha, plan.sigma_t))
        return target(prediction, x0, (x_t - alpha * x0) / sigma_t, alpha, sigma_t)

    return network


PERFECT = {prediction: _perfect(prediction) for prediction in DISCRETE}


def tanh(data: None, plan: Plan, x_t: jax.Array, timestep: jax.Array) -> jax.Array:
    return jnp.tanh(x_t)


def linear(alpha_bar: jax.Array, plan: Plan, x_t: jax.Array, timestep: jax.Array) -> jax.Array:
    """A perfect network's output for images of normal numbers with mean 1 and deviation 1/2: smooth in sigma, so that
    the order of a solver shows."""
    level = jnp.interp(timestep, jnp.arange(len(alpha_bar)), alpha_bar)
    alpha, variance = jnp.sqrt(level), 1 - level
    x0 = 1 + 0.25 * alpha / (0.25 * alpha**2 + variance) * (x_t - alpha)
    return (x_t - alpha * x0) / jnp.sqrt(variance)


@functools.partial(jax.jit, static_argnames=("network", "prediction", "stochastic"))
def _jitted(
    data: Any,
    plan: Plan,
    state: loop.State,
    keys: jax.Array,
    first: int,
    known_image: KnownImage | None,
    *,
    network: Network,
    prediction: Prediction,
    stochastic: bool,
) -> loop.State:
    bound = functools.partial(network, data, plan)
    return loop.sample(
        bound, state, keys, plan, prediction, first=first, stochastic=stochastic, known_image=known_image
    )


def sample(
    network: Network,
    plan: Plan,
    start: jax.Array | loop.State,
    prediction: Prediction,
    data: Any = None,
    *,
    keys: jax.Array | None = None,
    first: int = 0,
    stochastic: bool | None = None,
    known_image: KnownImage | None = None,
) -> loop.State:
    state = start if isinstance(start, loop.State) else loop.start(start, plan)
    keys = split_keys(state.x0.shape[0]) if keys is None else keys
    stochastic = plan.stochastic if stochastic is None else stochastic
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), plan)
    static: Any = {"network": network, "prediction": prediction, "stochastic": stochastic}
    return _jitted(data, rows, state, keys, first, known_image, **static)


@SAMPLER
@pytest.mark.parametrize("prediction", DISCRETE)
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_network_that_knows_the_image_leads_to_it(
    name: str, prediction: Prediction, spacing: Spacing, count: int
) -> None:
    x0, levels = normal(0), levels_of(name, count, spacing)
    plan = SAMPLERS[name].plan(levels)
    state = normal(1) * initial_scale(SAMPLERS[name], levels, spacing)
    latent = sample(perfect(prediction), plan, state, prediction, x0).arrays[0]
    # From noise of 14.6 times the image's size in float32, or divided by α = 0.068: 1e-7 · 15, a few times over. LMS
    # extrapolates that through four points. LCM keeps (0.05 / t)² of its state, which is largest at timestep 19.
    atol = 2e-4 if name == "lms" else 2e-5
    np.testing.assert_allclose(latent, x0, atol=max(atol, 5e-3 * (name == "lcm")))


def test_ddim_with_x0_prediction_returns_the_image_bit_for_bit() -> None:
    x0 = normal(0)
    plan = SAMPLERS["ddim"].plan(levels_of("ddim", 4, Spacing.TRAILING))
    latent = sample(perfect(Prediction.X0), plan, normal(1), Prediction.X0, x0).arrays[0]
    np.testing.assert_array_equal(latent, x0)


@pytest.mark.parametrize("name", ["heun", "lms", "dpmpp_2m", "unipc"])
def test_solvers_of_higher_order_come_nearer_than_euler(name: str) -> None:
    def error(name: str, count: int) -> float:
        def end(name: str, count: int) -> jax.Array:
            plan = SAMPLERS[name].plan(levels_of(name, count, Spacing.TRAILING, Sigmas.KARRAS))
            return sample(linear, plan, normal(1), Prediction.EPSILON, jnp.asarray(SDXL.alpha_bar, jnp.float32)).arrays[
                0
            ]

        return float(jnp.abs(end(name, count) - end("heun", 400)).max())

    # Heun's last step is Euler's.
    assert error(name, 12) < (0.7 if name == "heun" else 0.4) * error("euler", 12)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_zero_terminal_snr_can_be_sampled_from_the_last_timestep(name: str) -> None:
    # Elsewhere sigma = ∞ goes in and NaN images come out.
    x0, levels = normal(0), levels_of(name, 5, Spacing.TRAILING, of=ZERO_SNR)
    assert levels.alpha[0] == (0 if SAMPLERS[name].family is Family.DISCRETE else pytest.approx(2**-12, rel=1e-3))
    plan = SAMPLERS[name].plan(levels)
    latent = sample(perfect(Prediction.V), plan, normal(1), Prediction.V, x0).arrays[0]
    np.testing.assert_allclose(latent, x0, atol=2e-5)


@SAMPLER
@pytest.mark.parametrize("spacing", Spacing)
def test_zero_terminal_snr_makes_no_plan_with_infinities(name: str, spacing: Spacing) -> None:
    plan = SAMPLERS[name].plan(levels_of(name, 10, spacing, of=ZERO_SNR))
    assert all(np.isfinite(column).all() for column in plan)


def test_ddpm_adds_no_noise_at_its_last_step() -> None:
    weights = SAMPLERS["ddpm"].plan(levels_of("ddpm", 10, Spacing.LEADING)).weights
    assert weights[9, 0, -1] == 0
    assert (weights[:9, 0, -1] > 0.01).all()


def test_ddim_with_eta_1_is_ddpm_and_with_eta_0_adds_no_noise() -> None:
    levels = levels_of("ddim", 10, Spacing.LEADING)
    ours, ddpm = SAMPLERS["ddim"].plan(levels, 1.0), SAMPLERS["ddpm"].plan(levels)
    prediction = denoised(Prediction.EPSILON, normal(0), normal(1), jnp.float32(0.5), jnp.float32(0.75**0.5))
    for row in range(10):
        alpha, sigma_t = (jnp.float32(column[row]) for column in (ours.alpha, ours.sigma_t))
        prediction = denoised(Prediction.EPSILON, normal(0), normal(1), alpha, sigma_t)
        one, other = (
            loop.advance(jnp.asarray(plan.weights[row], jnp.float32), normal(1)[None], prediction, normal(2))
            for plan in (ours, ddpm)
        )
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert not SAMPLERS["ddim"].plan(levels).stochastic


def test_ddpm_noise_has_the_variance_of_the_posterior() -> None:
    # q(x_next | x_t, x₀), put together with q(x_t | x₀), must be q(x_next | x₀): mean √ᾱ x₀, variance 1 − ᾱ.
    plan = SAMPLERS["ddpm"].plan(levels_of("ddpm", 10, Spacing.LEADING))
    x0, epsilon, fresh = jnp.full((1, 200, 250, 1), 1.5), normal(0, (1, 200, 250, 1)), normal(1, (1, 200, 250, 1))
    row = Plan(*(jnp.asarray(column[4], jnp.float32) for column in plan))
    x_t = row.alpha * x0 + row.sigma_t * epsilon
    after = loop.advance(row.weights, jnp.asarray(x_t)[None], Denoised(x0, epsilon), fresh)[0]
    # 50,000 numbers: five standard errors.
    assert float(after.mean()) == pytest.approx(1.5 * float(row.alpha_next), abs=0.02)
    assert float(after.var()) == pytest.approx(float(row.sigma_t_next) ** 2, rel=0.03)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_noise_of_every_step_keeps_the_variance_of_the_next_level(name: str) -> None:
    """With a perfect network's output at the first step, where memory is still empty."""
    plan = SAMPLERS[name].plan(levels_of(name, 10, Spacing.TRAILING))
    row = Plan(*(column[0] for column in plan))
    x, x0, epsilon, noise = (row.weights[0][index] for index in (0, -3, -2, -1))
    # x = α x₀ + σ_t ε: shares of the image, and of two independent noises.
    assert x * row.alpha + x0 == pytest.approx(row.alpha_next)
    assert np.hypot(x * row.sigma_t + epsilon, noise) == pytest.approx(row.sigma_t_next)


@SAMPLER
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(name: str) -> None:
    noise, keys = normal(0, (3, 3, 5, 4)), split_keys(3)
    plan = SAMPLERS[name].plan(levels_of(name, 5, Spacing.LEADING))

    def end(noise: jax.Array, keys: jax.Array) -> jax.Array:
        return sample(tanh, plan, noise, Prediction.EPSILON, keys=keys).arrays[0]

    together = end(noise, keys)
    for row in range(3):
        alone = end(noise[row : row + 1], keys[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)  # float32, compiled for another size


@SAMPLER
def test_a_schedule_run_in_parts_gives_the_schedule_run_in_one(name: str) -> None:
    plan = SAMPLERS[name].plan(levels_of(name, 5, Spacing.LEADING))
    state = start = loop.start(normal(0), plan)
    for row in range(len(plan.timestep)):
        part = plan.between(row, row + 1)
        state = sample(tanh, part, state, Prediction.X0, first=row, stochastic=plan.stochastic)
    whole = sample(tanh, plan, start, Prediction.X0)
    np.testing.assert_allclose(state.arrays, whole.arrays, atol=1e-6)  # the same sums, two programs
    np.testing.assert_allclose(state.x0, whole.x0, atol=1e-6)


def test_only_stochastic_samplers_read_their_keys_and_each_step_adds_fresh_noise() -> None:
    stochastic = {"ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm"}
    for name, sampler in SAMPLERS.items():
        plan = sampler.plan(levels_of(name, 4, Spacing.LEADING))
        assert plan.stochastic == (name in stochastic)
        latents = [
            [
                sample(tanh, rows, normal(0), Prediction.X0, keys=keys, stochastic=plan.stochastic).arrays[0]
                for rows in (plan.between(0, 1), plan.between(0, 2))
            ]
            for keys in (split_keys(2), split_keys(3)[1:])
        ]
        for one, other in zip(*latents, strict=True):
            assert (float(jnp.abs(one - other).max()) > 0.01) == (name in stochastic), name
        if name in stochastic:
            changes = [one - other for one, other in zip(*latents, strict=True)]
            assert float(jnp.abs(changes[0] - changes[1]).max()) > 0.01, "each step adds fresh noise"


# Inpainting


@SAMPLER
def test_the_known_image_is_kept_and_the_rest_is_repainted(name: str) -> None:
    x0, expected, mask = normal(0), normal(1), jnp.zeros((2, 3, 5, 1)).at[:, :, 2:].set(1)
    plan = SAMPLERS[name].plan(levels_of(name, 6, Spacing.LEADING))
    known_image = KnownImage(x0, normal(2), mask)
    latent = sample(
        perfect(Prediction.EPSILON), plan, normal(3), Prediction.EPSILON, expected, known_image=known_image
    ).arrays[0]
    np.testing.assert_array_equal(latent[:, :, :2], x0[:, :, :2])
    np.testing.assert_allclose(
        latent[:, :, 2:], expected[:, :, 2:], atol=2e-4 if name == "lms" else 5e-3 * (name == "lcm") + 2e-5
    )


def test_the_known_image_has_the_noise_of_the_level_after_each_step() -> None:
    x0, noise = normal(0), normal(2)
    plan = SAMPLERS["euler"].plan(levels_of("euler", 6, Spacing.LEADING))
    known_image = KnownImage(x0, noise, jnp.zeros((2, 3, 5, 1)))
    half = plan.between(0, 3)
    latent = sample(tanh, half, normal(3), Prediction.EPSILON, known_image=known_image).arrays[0]
    np.testing.assert_allclose(latent, half.alpha_next[-1] * x0 + half.sigma_t_next[-1] * noise, atol=1e-6)


# Guidance


def guided(output: jax.Array, strength: float) -> jax.Array:
    """Of a network's output for negatives and then positives."""
    negative, positive = jnp.split(output, 2)
    return guidance.combine(guidance.Outputs(positive, negative), jnp.float32(strength))


def test_guidance_goes_from_the_negative_at_0_through_the_positive_at_1() -> None:
    negative, positive = normal(0), normal(1)
    output = jnp.concatenate([negative, positive])

    def guide(strength: float) -> jax.Array:
        return guided(output, strength)

    np.testing.assert_array_equal(guide(0), negative)
    np.testing.assert_allclose(guide(1), positive, atol=1e-6)  # a float32 sum and difference
    for strength in (-1.0, 0.5, 5.0, 12.0):
        straight = (1 - strength) * guide(0) + strength * guide(1)
        np.testing.assert_allclose(guide(strength), straight, rtol=1e-4, atol=1e-5)


def test_guidance_takes_the_halves_in_the_order_in_which_they_are_joined() -> None:
    def condition(value: float) -> guidance.Conditioning:
        return guidance.Conditioning(jnp.full((2, 77, 3), value), jnp.full((2, 6), value))

    joined = guidance.join([condition(-1.0), condition(2.0)])
    assert joined.vector is not None
    for part in (joined.context, joined.vector):
        assert isinstance(part, jax.Array)
        output = part.reshape(4, 1, 1, -1)
        np.testing.assert_allclose(guided(output, 3), -1 + 3 * 3, rtol=1e-6)


def test_conditions_without_a_vector_are_joined_too() -> None:
    context = jnp.ones((2, 77, 3))
    joined = guidance.join([guidance.Conditioning(context, None)] * 2)
    assert joined.vector is None
    assert isinstance(joined.context, jax.Array)
    assert joined.context.shape == (4, 77, 3)


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_absent_terms_have_no_effect(guided: bool, perturbed: bool) -> None:
    positive, other = normal(0), normal(1)
    outputs = guidance.Outputs(positive, other if guided else None, other if perturbed else None)
    strengths = jnp.float32(5), jnp.float32(3)
    combined = guidance.combine(outputs, *strengths)
    if not guided and not perturbed:
        assert combined is positive
    if guided and not perturbed:
        np.testing.assert_array_equal(combined, other + strengths[0] * (positive - other))
    # Two float32 sums of a few terms of size 5.
    expected = positive + (4 * guided + 3 * perturbed) * (positive - other)
    np.testing.assert_allclose(combined, expected, atol=1e-5)
    unperturbed = guidance.combine(outputs._replace(perturbed=None), strengths[0])
    np.testing.assert_array_equal(guidance.combine(outputs, strengths[0], jnp.float32(0)), unperturbed)


def test_rescaling_gives_each_row_the_deviation_of_its_positive() -> None:
    positive, negative = normal(0) * jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), normal(1)
    outputs, strength = guidance.Outputs(positive, negative), jnp.float32(7.5)
    guided = guidance.combine(outputs, strength)
    deviation = functools.partial(jnp.std, axis=(1, 2, 3))
    wholly = guidance.combine(outputs, strength, phi=jnp.float32(1))
    np.testing.assert_allclose(deviation(wholly), deviation(positive), rtol=1e-5)  # float32 sums of 60 squares
    assert (deviation(guided) > 2 * deviation(positive)).all(), "there was something to rescale"
    np.testing.assert_array_equal(guidance.combine(outputs, strength, phi=jnp.float32(0)), guided)
    half = guidance.combine(outputs, strength, phi=jnp.float32(0.5))
    np.testing.assert_allclose(half, (wholly + guided) / 2, rtol=1e-5, atol=1e-6)


def test_rescaling_leaves_the_zeros_of_a_fresh_network_zero() -> None:
    zeros = jnp.zeros((2, 3, 5, 4))
    np.testing.assert_array_equal(guidance.rescale(zeros, zeros, jnp.float32(0.7)), zeros)
