"""The reverse process: known sums, the timesteps, and what must hold whatever the network is.

Agreement with diffusers step by step is in `parity/`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.parameterisation import Denoised, Prediction, target
from sdxl_jax.diffusion.schedule import BetaSchedule, ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.samplers import guidance, loop
from sdxl_jax.samplers.steps import DDIM, DDPM, EULER, SAMPLERS, Plan, Sampler, Spacing, timesteps

SDXL = schedule.make(ScheduleConfig())
ZERO_SNR = schedule.make(ScheduleConfig(zero_terminal_snr=True))
SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


def normal(seed: int, shape: tuple[int, ...] = (2, 3, 5, 4)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(7), count)


# Known sums


def clipped(sampler: Sampler) -> Sampler:
    """The sampler with its x₀ clipped to ±1, as diffusers' `clip_sample`: ε stays what the network said."""

    def step(state: jax.Array, prediction: Denoised, row: Plan, noise: jax.Array) -> jax.Array:
        return sampler.step(state, prediction._replace(x0=jnp.clip(prediction.x0, -1, 1)), row, noise)

    return Sampler(sampler.plan, step, sampler.initial_scale)


def from_the_input(sampler: Sampler) -> Sampler:
    """The sampler going on from the network's input in the place of its state, as the loop of diffusers' tests does."""

    def step(state: jax.Array, prediction: Denoised, row: Plan, noise: jax.Array) -> jax.Array:
        return sampler.step(state * row.input_scale, prediction, row, noise)

    return Sampler(sampler.plan, step, sampler.initial_scale)


@pytest.mark.parametrize(
    ("sampler", "prediction", "length", "spacing", "total"),
    [
        pytest.param(clipped(DDIM), Prediction.EPSILON, 1000, Spacing.LEADING, 172.0067, id="DDIM"),
        pytest.param(clipped(DDIM), Prediction.V, 1000, Spacing.LEADING, 52.5302, id="DDIM, v"),
        pytest.param(from_the_input(EULER), Prediction.EPSILON, 1100, Spacing.LINSPACE, 10.0807, id="Euler"),
    ],
)
def test_ten_steps_end_at_the_sum_that_diffusers_tests_for(
    sampler: Sampler, prediction: Prediction, length: int, spacing: Spacing, total: float
) -> None:
    levels = schedule.make(ScheduleConfig(length, 1e-4, 0.02, BetaSchedule.LINEAR))
    plan = sampler.plan(levels, timesteps(10, length, spacing, offset=0))
    start = (jnp.arange(768, dtype=jnp.float32) / 768).reshape(3, 8, 8, 4).transpose(3, 1, 2, 0)

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        return x_t * timestep / (timestep + 1)

    state = start * sampler.initial_scale(plan, spacing)
    latent = loop.sample(network, state, keys(4), sampler, plan, prediction)
    # The known sums have four digits behind the point; a float32 sum of 768 numbers may miss by some of the last.
    assert float(jnp.abs(latent).sum()) == pytest.approx(total, abs=max(1e-4, 1e-5 * total))


# Timesteps


def test_fifty_leading_steps_are_those_of_diffusers_and_trailing_those_of_sgm() -> None:
    np.testing.assert_array_equal(timesteps(50, 1000, Spacing.LEADING), np.arange(981, 0, -20))
    np.testing.assert_array_equal(timesteps(50, 1000, Spacing.TRAILING), np.arange(999, 0, -20))
    assert timesteps(4, 1000, Spacing.TRAILING).tolist() == [999, 749, 499, 249]  # few-step sampling


@pytest.mark.parametrize("spacing", Spacing)
def test_timesteps_are_as_many_as_asked_descending_and_within_the_schedule(spacing: Spacing) -> None:
    for count in range(1, 1001):
        steps = timesteps(count, 1000, spacing)
        assert len(steps) == count
        # A leading timestep beyond the last is held at the last, which 1000 steps reach twice.
        assert (np.diff(steps)[count == 1000 :] < 0).all(), count
        assert 0 <= steps[-1] <= steps[0] <= 999, count
    # Every timestep visited: only the order is left to choose.
    every = timesteps(1000, 1000, spacing, offset=0)
    np.testing.assert_array_equal(every, np.arange(999, -1, -1))


@SAMPLER
@pytest.mark.parametrize("spacing", Spacing)
def test_noise_only_ever_goes_down_and_ends_at_none(name: str, spacing: Spacing) -> None:
    plan = SAMPLERS[name].plan(SDXL, timesteps(30, 1000, spacing))
    np.testing.assert_array_equal(plan.next[:-1], plan.now[1:])
    rising = 1 if SAMPLERS[name] is EULER else -1  # an EDM sigma, or ᾱ
    assert (rising * (plan.now - plan.next) > 0).all()
    assert plan.next[-1] == (0 if SAMPLERS[name] is EULER else 1)
    np.testing.assert_allclose(plan.alpha**2 + plan.sigma_t**2, 1, rtol=1e-14)


# What holds whatever the network is


def perfect(prediction: Prediction, x0: jax.Array, plan: Plan) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A network that knows the image. It finds its noise level by its timestep."""
    table = [jnp.asarray(column, jnp.float32) for column in (plan.timestep, plan.alpha, plan.sigma_t)]

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        row = jnp.argmin(jnp.abs(table[0] - timestep))
        alpha, sigma_t = (jnp.full((1, 1, 1, 1), column[row]) for column in table[1:])
        return target(prediction, x0, (x_t - alpha * x0) / sigma_t, alpha, sigma_t)

    return network


@SAMPLER
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("count", [1, 7])
def test_a_network_that_knows_the_image_leads_to_it(
    name: str, prediction: Prediction, spacing: Spacing, count: int
) -> None:
    sampler, x0 = SAMPLERS[name], normal(0)
    plan = sampler.plan(SDXL, timesteps(count, 1000, spacing))
    state = normal(1) * sampler.initial_scale(plan, spacing)
    latent = loop.sample(perfect(prediction, x0, plan), state, keys(2), sampler, plan, prediction)
    # From noise of 14.6 times the image's size in float32, or divided by α = 0.068: 1e-7 · 15, a few times over.
    np.testing.assert_allclose(latent, x0, atol=2e-5)


def test_ddim_with_x0_prediction_returns_the_image_bit_for_bit() -> None:
    x0 = normal(0)
    plan = DDIM.plan(SDXL, timesteps(4, 1000, Spacing.TRAILING))
    latent = loop.sample(lambda x_t, timestep: x0, normal(1), keys(2), DDIM, plan, Prediction.X0)
    np.testing.assert_array_equal(latent, x0)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_terminal_snr_can_be_sampled_from_the_last_timestep(name: str) -> None:
    sampler, x0 = SAMPLERS[name], normal(0)
    plan = sampler.plan(ZERO_SNR, timesteps(5, 1000, Spacing.TRAILING))
    assert plan.now[0] == 0
    latent = loop.sample(perfect(Prediction.V, x0, plan), normal(1), keys(2), sampler, plan, Prediction.V)
    np.testing.assert_allclose(latent, x0, atol=2e-5)


@pytest.mark.parametrize("spacing", [Spacing.TRAILING, Spacing.LINSPACE])
def test_euler_at_zero_terminal_snr_is_refused_with_a_remedy(spacing: Spacing) -> None:
    # Elsewhere sigma = ∞ goes in and NaN pictures come out.
    with pytest.raises(InputError, match=r"zero terminal SNR.*infinite.*Use the sampler ddim"):
        EULER.plan(ZERO_SNR, timesteps(10, 1000, spacing))


def test_euler_starts_zero_terminal_snr_below_the_infinite_sigma() -> None:
    plan = EULER.plan(ZERO_SNR, timesteps(10, 1000, Spacing.LEADING))
    assert all(np.isfinite(column).all() for column in plan)


def test_ddpm_adds_no_noise_at_its_last_step() -> None:
    plan = DDPM.plan(SDXL, timesteps(10, 1000, Spacing.LEADING))
    prediction = Denoised(normal(0), normal(1))
    for step in (8, 9):
        row = jax.tree.map(lambda column, step=step: jnp.float32(column[step]), plan)
        quiet, loud = (DDPM.step(normal(2), prediction, row, noise) for noise in (jnp.zeros((2, 3, 5, 4)), normal(3)))
        moved = float(jnp.abs(quiet - loud).max())
        assert moved == 0 if step == 9 else moved > 0.01


def test_ddpm_noise_has_the_variance_of_the_posterior() -> None:
    # q(x_next | x_t, x₀), put together with q(x_t | x₀), must be q(x_next | x₀): mean √ᾱ x₀, variance 1 − ᾱ.
    plan = DDPM.plan(SDXL, timesteps(10, 1000, Spacing.LEADING))
    x0, epsilon, fresh = jnp.full((1, 200, 250, 1), 1.5), normal(0, (1, 200, 250, 1)), normal(1, (1, 200, 250, 1))
    row = jax.tree.map(lambda column: jnp.float32(column[4]), plan)
    after = DDPM.step(row.alpha * x0 + row.sigma_t * epsilon, Denoised(x0, epsilon), row, fresh)
    # 50,000 numbers: five standard errors.
    assert float(after.mean()) == pytest.approx(1.5 * float(row.next) ** 0.5, abs=0.02)
    assert float(after.var()) == pytest.approx(1 - float(row.next), rel=0.03)


@SAMPLER
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(name: str) -> None:
    sampler, noise, drawn = SAMPLERS[name], normal(0, (3, 3, 5, 4)), keys(3)
    plan = sampler.plan(SDXL, timesteps(5, 1000, Spacing.LEADING))
    run = functools.partial(loop.sample, lambda x_t, timestep: jnp.tanh(x_t), sampler=sampler, plan=plan)
    together = run(state=noise, keys=drawn, prediction=Prediction.EPSILON)
    for row in range(3):
        alone = run(state=noise[row : row + 1], keys=drawn[row : row + 1], prediction=Prediction.EPSILON)
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)  # float32, compiled for another size


def test_only_stochastic_samplers_read_their_keys_and_each_step_draws_anew() -> None:
    for name, sampler in SAMPLERS.items():
        plan = sampler.plan(SDXL, timesteps(3, 1000, Spacing.LEADING))
        seen: list[jax.Array] = []

        def step(
            state: jax.Array, prediction: Denoised, row: Plan, noise: jax.Array, seen: list[jax.Array] = seen
        ) -> jax.Array:
            jax.debug.callback(lambda value: seen.append(value), noise, ordered=True)
            return state

        spy = Sampler(sampler.plan, step, sampler.initial_scale, sampler.stochastic)
        loop.sample(lambda x_t, timestep: x_t, normal(0), keys(2), spy, plan, Prediction.EPSILON)
        jax.effects_barrier()
        assert len(seen) == 3
        unlike = float(np.abs(np.asarray(seen[0]) - np.asarray(seen[1])).max())
        assert (unlike > 0.1) == sampler.stochastic, name


# Guidance


def test_guidance_goes_from_the_negative_at_0_through_the_positive_at_1() -> None:
    negative, positive = normal(0), normal(1)
    output = jnp.concatenate([negative, positive])

    def guide(strength: float) -> jax.Array:
        return guidance.guide(output, jnp.float32(strength))

    np.testing.assert_array_equal(guide(0), negative)
    np.testing.assert_allclose(guide(1), positive, atol=1e-6)  # a float32 sum and difference
    for strength in (-1.0, 0.5, 5.0, 12.0):
        straight = (1 - strength) * guide(0) + strength * guide(1)
        np.testing.assert_allclose(guide(strength), straight, rtol=1e-4, atol=1e-5)


def test_guidance_takes_the_halves_in_the_order_in_which_they_are_joined() -> None:
    def condition(value: float) -> guidance.Condition:
        return guidance.Condition(jnp.full((2, 77, 3), value), jnp.full((2, 6), value))

    joined = guidance.both(condition(-1.0), condition(2.0))
    assert joined.vector is not None
    for part in (joined.context, joined.vector):
        output = part.reshape(4, 1, 1, -1)
        np.testing.assert_allclose(guidance.guide(output, jnp.float32(3)), -1 + 3 * 3, rtol=1e-6)


def test_conditions_without_a_vector_are_joined_too() -> None:
    context = jnp.ones((2, 77, 3))
    joined = guidance.both(guidance.Condition(context, None), guidance.Condition(context, None))
    assert joined.vector is None
    assert joined.context.shape == (4, 77, 3)


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_terms_that_are_not_there_leave_no_trace(guided: bool, perturbed: bool) -> None:
    positive, other = normal(0), normal(1)
    outputs = guidance.Outputs(positive, other if guided else None, other if perturbed else None)
    strengths = jnp.float32(5), jnp.float32(3)
    combined = guidance.combine(outputs, *strengths)
    if not guided and not perturbed:
        assert combined is positive
    if guided and not perturbed:
        both = jnp.concatenate([other, positive])
        np.testing.assert_array_equal(combined, guidance.guide(both, strengths[0]))
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
