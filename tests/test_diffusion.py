"""The forward process: the schedule's numbers, how predictions convert into each other, how errors are weighted."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.diffusion import loss as loss_module
from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.loss import (
    LossConfig,
    Weighting,
    debiased_weight,
    diffusion_loss,
    draw_noise,
    frequencies,
    min_snr_weight,
    position_weights,
)
from sdxl_jax.diffusion.parameterisation import DISCRETE, Prediction, denoised, target
from sdxl_jax.diffusion.schedule import BetaSchedule, Schedule, ScheduleConfig
from sdxl_jax.errors import InputError

Network = Callable[[jax.Array, jax.Array], jax.Array]
SDXL = schedule.make(ScheduleConfig())
ZERO_SNR = schedule.make(ScheduleConfig(zero_terminal_snr=True))
SCHEDULES = {
    "SDXL": SDXL,
    "linear": schedule.make(ScheduleConfig(beta_start=1e-4, beta_end=0.02, betas=BetaSchedule.LINEAR)),
    "zero terminal SNR": ZERO_SNR,
}
EVERY_PREDICTION = pytest.mark.parametrize("prediction", DISCRETE)


def normal(seed: int, shape: tuple[int, ...] = (3, 4, 5, 4)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def levels(levels: Schedule, *timesteps: int) -> tuple[jax.Array, jax.Array]:
    """α and σ_t of one timestep per example, as [batch, 1, 1, 1]."""

    def column(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values[list(timesteps)], jnp.float32)[:, None, None, None]

    return column(levels.alpha), column(levels.sigma_t)


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


# The schedule


def test_sdxl_schedule_has_the_published_numbers() -> None:
    # To the digits that are printed: half a unit of the last one.
    assert SDXL.sigma[0] == pytest.approx(0.0291672, abs=5e-8)
    assert SDXL.sigma[999] == pytest.approx(14.6146412, abs=5e-8)
    assert SDXL.alpha_bar[999] == pytest.approx(0.0046601, abs=5e-8)
    assert len(SDXL.alpha_bar) == 1000


@pytest.mark.parametrize("name", SCHEDULES)
def test_image_and_noise_share_the_variance(name: str) -> None:
    chosen = SCHEDULES[name]
    np.testing.assert_allclose(chosen.alpha**2 + chosen.sigma_t**2, 1, rtol=1e-15)  # float64, one rounding each
    np.testing.assert_array_less(np.diff(chosen.alpha_bar), 0)  # every timestep is noisier than the one before
    noisy = chosen.alpha_bar > 0
    np.testing.assert_allclose(chosen.snr[noisy], 1 / chosen.sigma[noisy] ** 2, rtol=1e-12)


def test_zero_terminal_snr_ends_at_exactly_nothing_and_begins_where_it_did() -> None:
    assert ZERO_SNR.alpha_bar[-1] == 0
    assert ZERO_SNR.alpha_bar[0] == pytest.approx(SDXL.alpha_bar[0], rel=1e-14)
    assert ZERO_SNR.sigma[-1] == np.inf
    assert np.isfinite(ZERO_SNR.sigma[:-1]).all()


def test_zero_terminal_snr_matches_diffusers() -> None:
    torch = pytest.importorskip("torch")
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - ddim.rescale_zero_terminal_snr(betas), dim=0).numpy()
    # They go through the betas and back, in float64: 1000 roundings.
    np.testing.assert_allclose(ZERO_SNR.alpha_bar, theirs, atol=1e-13)


def test_snr_is_taken_after_the_rescale_to_zero_terminal_snr() -> None:
    # A mistake of other trainers: the SNR of the betas before they are rescaled, 0.0047 at the end instead of 0.
    assert ZERO_SNR.snr[-1] == 0
    np.testing.assert_allclose(ZERO_SNR.snr, ZERO_SNR.alpha_bar / (1 - ZERO_SNR.alpha_bar))
    np.testing.assert_array_less(ZERO_SNR.snr[1:], SDXL.snr[1:])


# Predictions


@EVERY_PREDICTION
def test_a_target_is_denoised_to_the_image_and_the_noise_that_made_it(prediction: Prediction) -> None:
    x0, epsilon = normal(0), normal(1)
    alpha, sigma_t = levels(SDXL, 0, 500, 999)
    output = target(prediction, x0, epsilon, alpha, sigma_t)
    result = denoised(prediction, output, alpha * x0 + sigma_t * epsilon, alpha, sigma_t)
    # float32; the rounding of x_t is divided by α or σ, at worst by 0.029.
    np.testing.assert_allclose(result.x0, x0, atol=2e-5)
    np.testing.assert_allclose(result.epsilon, epsilon, atol=2e-5)


def test_epsilon_to_v_to_x0_to_epsilon_comes_back() -> None:
    x_t, output = normal(0), normal(1)  # any x_t and any prediction, not only those of one image
    alpha, sigma_t = levels(SDXL, 0, 500, 999)
    from_epsilon = denoised(Prediction.EPSILON, output, x_t, alpha, sigma_t)
    v = target(Prediction.V, from_epsilon.x0, from_epsilon.epsilon, alpha, sigma_t)
    from_v = denoised(Prediction.V, v, x_t, alpha, sigma_t)
    from_x0 = denoised(Prediction.X0, from_v.x0, x_t, alpha, sigma_t)
    np.testing.assert_allclose(from_v.x0, from_epsilon.x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(from_x0.epsilon, output, atol=5e-5)  # the roundings of three divisions by 0.029 or 0.068


def test_v_prediction_is_defined_where_nothing_of_the_image_is_left() -> None:
    x0, epsilon = normal(0, (1, 4, 5, 4)), normal(1, (1, 4, 5, 4))
    alpha, sigma_t = levels(ZERO_SNR, 999)
    output = target(Prediction.V, x0, epsilon, alpha, sigma_t)
    result = denoised(Prediction.V, output, alpha * x0 + sigma_t * epsilon, alpha, sigma_t)
    np.testing.assert_array_equal(result.x0, x0)
    np.testing.assert_array_equal(result.epsilon, epsilon)


# Min-SNR-γ


@pytest.mark.parametrize("timestep", [0, 200, 500, 900, 999])
def test_min_snr_weights_the_same_error_equally_for_every_prediction(timestep: int) -> None:
    x0, epsilon, mistake = (normal(seed, (1, 4, 5, 4)) for seed in range(3))
    alpha, sigma_t = levels(SDXL, timestep)
    snr = SDXL.snr[timestep]
    x_t = alpha * x0 + sigma_t * epsilon
    wrong = denoised(Prediction.X0, x0 + mistake, x_t, alpha, sigma_t)

    def squared_error(prediction: Prediction) -> float:
        right = target(prediction, x0, epsilon, alpha, sigma_t)
        return float(jnp.sum((target(prediction, *wrong, alpha, sigma_t) - right) ** 2))

    errors = {prediction: squared_error(prediction) for prediction in DISCRETE}
    # float32: differences of numbers that are up to 34 times as large as what is compared.
    assert errors[Prediction.EPSILON] == pytest.approx(snr * errors[Prediction.X0], rel=1e-3)
    assert errors[Prediction.V] == pytest.approx((snr + 1) * errors[Prediction.X0], rel=1e-3)
    weighted = [min_snr_weight(SDXL.snr, 5.0, each)[timestep] * errors[each] for each in DISCRETE]
    np.testing.assert_allclose(weighted, min(snr, 5.0) * errors[Prediction.X0], rtol=1e-3)


@EVERY_PREDICTION
@pytest.mark.parametrize("gamma", [1e-3, 5.0, 1e9])
def test_min_snr_weights_are_finite_at_zero_terminal_snr(prediction: Prediction, gamma: float) -> None:
    weight = min_snr_weight(ZERO_SNR.snr, gamma, prediction)
    assert np.isfinite(weight).all()
    assert (weight >= 0).all()
    assert weight[-1] == (1 if prediction is Prediction.EPSILON else 0)


def test_min_snr_with_a_huge_gamma_weights_all_noise_errors_equally() -> None:
    snr = SDXL.snr
    np.testing.assert_allclose(min_snr_weight(snr, 1e9, Prediction.EPSILON), 1)
    np.testing.assert_allclose(min_snr_weight(snr, 1e9, Prediction.X0), snr)
    np.testing.assert_allclose(min_snr_weight(snr, 1e9, Prediction.V), snr / (snr + 1))


def test_min_snr_with_a_tiny_gamma_weights_all_image_errors_equally() -> None:
    np.testing.assert_allclose(min_snr_weight(SDXL.snr, 1e-3, Prediction.X0), 1e-3)


# Debiased estimation


@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_debiased_weights_are_one_weight_in_three_terms(timestep: int) -> None:
    """1/√SNR of ‖Δε‖² (arXiv:2310.08442), expressed for ‖Δv‖² = ‖Δε‖² (SNR + 1) / SNR and ‖Δx₀‖² = ‖Δε‖² / SNR."""
    snr = SDXL.snr[timestep]
    in_epsilon = {Prediction.EPSILON: 1.0, Prediction.V: (snr + 1) / snr, Prediction.X0: 1 / snr}
    for prediction, size in in_epsilon.items():
        assert debiased_weight(SDXL.snr, prediction)[timestep] * size == pytest.approx(snr**-0.5)


@EVERY_PREDICTION
def test_debiased_weights_are_finite_at_zero_terminal_snr(prediction: Prediction) -> None:
    weight = debiased_weight(ZERO_SNR.snr, prediction)
    assert np.isfinite(weight).all()
    assert weight[-1] == 0
    assert (weight[:-1] > 0).all()


# Offset noise


def test_offset_noise_moves_a_channel_as_a_whole() -> None:
    key, shape = jax.random.key(3), (6, 5, 4)
    plain = draw_noise(key, shape, 0.0)
    moved = draw_noise(key, shape, 0.5) - plain
    np.testing.assert_allclose(moved, jnp.broadcast_to(moved[:1, :1], shape), atol=1e-6)  # float32 sum and difference
    assert len(np.unique(np.round(moved[0, 0], 3))) == 4, "one number a channel"
    np.testing.assert_allclose(draw_noise(key, shape, 1.0) - plain, 2 * moved, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.5])
def test_offset_noise_adds_its_square_to_the_variance_of_a_channels_mean(strength: float) -> None:
    noise = jax.vmap(lambda key: draw_noise(key, (8, 8, 3), strength))(keys(5000))
    means = noise.mean(axis=(1, 2))
    # 15,000 means: the standard error of their variance is √(2/15000) = 1.2 % of it; five of those. 0.05² is 16 % of
    # 1/64.
    assert float(means.var()) == pytest.approx(1 / 64 + strength**2, rel=0.06)
    within = (noise - means[:, None, None]).var() * 64 / 63
    assert float(within) == pytest.approx(1, abs=0.01)


# The loss


def perfect(prediction: Prediction, x0: jax.Array, chosen: Schedule) -> Network:
    """A network that knows the image."""
    alphas, sigmas = (jnp.asarray(values, jnp.float32) for values in (chosen.alpha, chosen.sigma_t))

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        alpha, sigma_t = (values[timestep][:, None, None, None] for values in (alphas, sigmas))
        return target(prediction, x0, (x_t - alpha * x0) / sigma_t, alpha, sigma_t)

    return network


def imperfect(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
    return jnp.tanh(x_t) * (0.5 + timestep / 1000)[:, None, None, None]


@EVERY_PREDICTION
@pytest.mark.parametrize("weighting", [Weighting.UNIFORM, Weighting.DEBIASED])
def test_loss_of_a_perfect_network_is_zero(prediction: Prediction, weighting: Weighting) -> None:
    chosen = SDXL if prediction is Prediction.EPSILON else ZERO_SNR
    x0 = normal(0, (64, 4, 4, 4))
    config = LossConfig(weighting, offset_noise=0.1)
    loss = functools.partial(diffusion_loss, schedule=chosen, prediction=prediction, config=config)
    # float32 of ε found by a division by σ ≥ 0.029, squared.
    assert float(loss(perfect(prediction, x0, chosen), x0, keys(64))) < 1e-9
    assert float(loss(imperfect, x0, keys(64))) > 0.01


@EVERY_PREDICTION
def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts(prediction: Prediction) -> None:
    x0, random_keys = normal(0, (8, 4, 4, 4)), keys(8)
    config = LossConfig(Weighting.MIN_SNR, offset_noise=0.05, input_perturbation=0.1)
    loss = functools.partial(diffusion_loss, imperfect, schedule=SDXL, prediction=prediction, config=config)
    parts = [float(loss(x0[rows], random_keys[rows])) for rows in (slice(0, 4), slice(4, 8))]
    assert len(set(parts)) == 2
    assert float(loss(x0, random_keys)) == pytest.approx(np.mean(parts), rel=1e-6)  # the order of a float32 sum


def test_examples_with_a_weight_of_zero_count_for_nothing_and_others_by_their_weights() -> None:
    x0, random_keys = normal(0, (4, 4, 4, 4)), keys(4)
    config = LossConfig(Weighting.MIN_SNR)
    loss = functools.partial(diffusion_loss, imperfect, schedule=SDXL, prediction=Prediction.EPSILON, config=config)
    each = [float(loss(x0[row : row + 1], random_keys[row : row + 1])) for row in range(4)]
    weighted = float(loss(x0, random_keys, example_weight=jnp.array([1.0, 0.5, 0.0, 2.0])))
    assert weighted == pytest.approx((each[0] + 0.5 * each[1] + 2 * each[3]) / 4, rel=1e-6)
    assert float(loss(x0, random_keys, example_weight=jnp.ones(4))) == float(loss(x0, random_keys))


def test_a_mask_weighs_positions_by_their_area_and_leaves_the_scale_of_the_loss() -> None:
    x0, random_keys = normal(0, (2, 4, 4, 4)), keys(2)
    loss = functools.partial(
        diffusion_loss, lambda x_t, _: x_t, schedule=SDXL, prediction=Prediction.EPSILON, config=LossConfig()
    )
    plain = float(loss(x0, random_keys))
    mask = np.zeros((2, 32, 32), np.uint8)

    def weights_of(mask: np.ndarray) -> jax.Array:
        return position_weights(jnp.asarray(mask), 4, 4)

    assert float(loss(x0, random_keys, position_weight=weights_of(mask + 255))) == plain
    assert float(loss(x0, random_keys, position_weight=weights_of(mask))) == 0
    left, right = mask.copy(), mask.copy()
    left[..., :16], right[..., 16:] = 50, 255
    halves = [float(loss(x0, random_keys, position_weight=weights_of(half))) for half in (left, right)]
    assert halves[0] != halves[1] and sum(halves) / 2 == pytest.approx(plain, rel=1e-6)
    mask[:, :8, :12] = 255  # one position, and half of the next one
    weights = weights_of(mask)
    np.testing.assert_allclose(weights[1], 16 * np.pad([[2 / 3, 1 / 3]], ((0, 3), (0, 2))), rtol=1e-6)


def seen_by_the_network(
    x0: jax.Array, random_keys: jax.Array, config: LossConfig = LossConfig()
) -> tuple[jax.Array, jax.Array]:
    seen = []

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        seen.append((x_t, timestep))
        return x_t

    diffusion_loss(network, x0, random_keys, SDXL, Prediction.EPSILON, config)
    return seen[0]


def test_an_example_draws_the_same_whatever_its_batch() -> None:
    x0, random_keys = normal(0, (8, 4, 4, 4)), keys(8)
    config = LossConfig(offset_noise=0.05)
    x_t, timestep = seen_by_the_network(x0, random_keys, config)
    for row in range(8):
        alone_x_t, alone_timestep = seen_by_the_network(x0[row : row + 1], random_keys[row : row + 1], config)
        np.testing.assert_array_equal(alone_timestep[0], timestep[row])
        np.testing.assert_allclose(alone_x_t[0], x_t[row], rtol=1e-6, atol=1e-6)
    assert len(set(timestep.tolist())) > 1
    assert float(jnp.abs(x_t[0] - x_t[1]).max()) > 0.1, "examples draw noise of their own"


def test_noise_in_the_loss_is_at_the_level_of_its_timestep() -> None:
    x0 = jnp.full((4000, 4, 4, 1), 2.0)
    x_t, timestep = seen_by_the_network(x0, keys(4000))
    standard = (np.asarray(x_t) - 2 * SDXL.alpha[timestep][:, None, None, None]) / SDXL.sigma_t[timestep][
        :, None, None, None
    ]
    for late in (False, True):
        noise = standard[(timestep >= 500) == late]
        # 32,000 numbers: five standard errors of their mean and of their variance.
        assert noise.mean() == pytest.approx(0, abs=0.03)
        assert noise.var() == pytest.approx(1, abs=0.04)


def test_timesteps_are_uniform_over_all_of_them() -> None:
    _, timestep = seen_by_the_network(jnp.zeros((20_000, 1, 1, 1)), keys(20_000))
    counts = np.bincount(timestep, minlength=1000)
    assert len(counts) == 1000
    assert counts.min() > 0, "20 draws are expected of each; none at all has the chance 2e-6"
    in_tenths = counts.reshape(10, 100).sum(axis=1)
    np.testing.assert_allclose(in_tenths, 2000, atol=5 * np.sqrt(2000 * 0.9))


@EVERY_PREDICTION
def test_weight_in_the_loss_is_that_of_the_drawn_timestep(prediction: Prediction) -> None:
    x0, random_keys = normal(0, (1, 4, 4, 4)), keys(1, seed=5)
    timestep = int(seen_by_the_network(x0, random_keys)[1][0])

    def loss(config: LossConfig) -> float:
        return float(diffusion_loss(imperfect, x0, random_keys, SDXL, prediction, config))

    plain = loss(LossConfig())
    for config, weight in (
        (LossConfig(Weighting.MIN_SNR), min_snr_weight(SDXL.snr, 5.0, prediction)),
        (LossConfig(Weighting.MIN_SNR, 0.5), min_snr_weight(SDXL.snr, 0.5, prediction)),
        (LossConfig(Weighting.DEBIASED), debiased_weight(SDXL.snr, prediction)),
    ):
        assert loss(config) == pytest.approx(plain * weight[timestep], rel=1e-5)


def test_min_snr_in_the_loss_uses_the_rescaled_schedule() -> None:
    # The same mistake as above, where it does harm: at the last timestep an image error must weigh nothing.
    random_keys = keys(5000)
    timestep = seen_by_the_network(jnp.zeros((5000, 1, 1, 1)), random_keys)[1]
    last = random_keys[np.flatnonzero(timestep == 999)[:1]]
    assert len(last) == 1
    losses = {
        weighting: float(
            diffusion_loss(imperfect, normal(0, (1, 4, 4, 4)), last, ZERO_SNR, Prediction.V, LossConfig(weighting))
        )
        for weighting in (Weighting.UNIFORM, Weighting.MIN_SNR, Weighting.DEBIASED)
    }
    assert losses[Weighting.MIN_SNR] == losses[Weighting.DEBIASED] == 0
    assert losses[Weighting.UNIFORM] > 0.01


# Which timesteps and which noise


def test_default_draws_are_the_first_two_halves_of_the_key() -> None:
    """Published figures depend on them: further random numbers of an option come from further keys."""
    x0, random_keys = normal(0, (8, 4, 4, 4)), keys(8)
    for config in (LossConfig(offset_noise=0.05), LossConfig(offset_noise=0.05, input_perturbation=1e-30)):
        x_t, timestep = seen_by_the_network(x0, random_keys, config)
        for row in range(8):
            time_key, noise_key = jax.random.split(random_keys[row])
            assert timestep[row] == jax.random.randint(time_key, (), 0, 1000)
            alpha, sigma_t = levels(SDXL, int(timestep[row]))
            noise = draw_noise(noise_key, (4, 4, 4), 0.05)
            np.testing.assert_allclose(x_t[row], (alpha * x0[row] + sigma_t * noise)[0], atol=1e-6)


@EVERY_PREDICTION
def test_perturbed_input_leaves_the_target_as_it_was(prediction: Prediction) -> None:
    """A network that outputs zero has the target as its error: its input is perturbed, and only that."""
    x0, random_keys = normal(0, (64, 4, 4, 4)), keys(64)

    def loss(network: Network, strength: float) -> float:
        config = LossConfig(input_perturbation=strength)
        return float(diffusion_loss(network, x0, random_keys, SDXL, prediction, config))

    def nothing(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        return jnp.zeros_like(x_t)

    assert loss(nothing, 0.5) == loss(nothing, 0.0)
    assert loss(imperfect, 0.5) != loss(imperfect, 0.0)


def test_perturbation_has_its_strength_at_the_level_of_the_noise_and_is_independent_of_it() -> None:
    x0, random_keys = jnp.zeros((2000, 4, 4, 1)), keys(2000)
    plain, timestep = seen_by_the_network(x0, random_keys)
    perturbed, again = seen_by_the_network(x0, random_keys, LossConfig(input_perturbation=0.1))
    np.testing.assert_array_equal(again, timestep)
    sigma_t = SDXL.sigma_t[timestep][:, None, None, None]
    added, noise = (np.asarray(perturbed - plain) / sigma_t).ravel(), (np.asarray(plain) / sigma_t).ravel()
    # 32,000 numbers: five standard errors, 0.4 % of the deviation and 0.6 % of a correlation each.
    assert added.std() == pytest.approx(0.1, rel=0.02)
    assert abs(np.corrcoef(added, noise)[0, 1]) < 0.03


def test_only_timesteps_of_the_range_are_drawn() -> None:
    _, timestep = seen_by_the_network(jnp.zeros((5000, 1, 1, 1)), keys(5000), LossConfig(timesteps=(100, 200)))
    assert set(np.asarray(timestep).tolist()) == set(range(100, 200))  # none of 100 has the chance 1e-20


@pytest.mark.parametrize("bias", [0.0, 0.25, 3.0])
def test_biased_timesteps_are_drawn_as_often_as_told(bias: float) -> None:
    count = 40_000
    config = LossConfig(timesteps=(200, 1000), biased_timesteps=(750, 1000), timestep_bias=bias)
    _, timestep = seen_by_the_network(jnp.zeros((count, 1, 1, 1)), keys(count), config)
    counts = np.bincount(timestep, minlength=1000)
    assert counts[:200].sum() == 0
    share = 250 * bias / (550 + 250 * bias)
    assert frequencies(config, 1000)[750:].sum() == pytest.approx(share)
    assert counts[750:].sum() == pytest.approx(count * share, abs=5 * np.sqrt(count * share * (1 - share)))
    inside = counts[200:750].reshape(5, 110).sum(axis=1)
    expected = count * (1 - share) / 5
    np.testing.assert_allclose(inside, expected, atol=5 * np.sqrt(expected))  # equally often within each range


def test_an_even_bias_of_the_whole_draws_uniformly_to_the_last_timestep() -> None:
    """The table's own ends: neither timestep 0 nor the last is drawn more or less than the others."""
    config = LossConfig(biased_timesteps=(0, 2), timestep_bias=1.0)
    count = 40_000
    timesteps = jax.vmap(lambda key: loss_module.draw_timestep(key, config, 4))(keys(count))
    np.testing.assert_allclose(np.bincount(timesteps), count / 4, atol=5 * np.sqrt(count * 3 / 16))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LossConfig(min_snr_gamma=5.0), r"min_snr_gamma=5.0 has no effect with .*uniform. Set loss.weighting=min_snr"),
        (LossConfig(Weighting.DEBIASED, 5.0), "no effect with loss.weighting=debiased"),
        (LossConfig(Weighting.MIN_SNR, 0.0), "min_snr_gamma=0.0 is out of range. Give more than 0"),
        (LossConfig(offset_noise=-0.1), "offset_noise=-0.1 is out of range"),
        (LossConfig(input_perturbation=float("nan")), "input_perturbation=nan is out of range"),
        (LossConfig(timesteps=(0, 1001)), r"timesteps=0 1001 is not a range .* stop <= 1000"),
        (LossConfig(timesteps=(5, 5)), "is not a range"),
        (LossConfig(biased_timesteps=(0, 5)), "loss.biased_timesteps needs loss.timestep_bias. Give both"),
        (LossConfig(timestep_bias=2.0), "loss.timestep_bias needs loss.biased_timesteps. Give both"),
        (LossConfig(biased_timesteps=(0, 5), timestep_bias=1.0), "has no effect"),
        (LossConfig(biased_timesteps=(0, 1000), timestep_bias=2.0), "has no effect"),
        (LossConfig(timesteps=(0, 200), biased_timesteps=(200, 300), timestep_bias=2.0), "has no effect"),
        (LossConfig(timesteps=(0, 200), biased_timesteps=(0, 300), timestep_bias=0.0), "leaves no timestep to train"),
    ],
)
def test_options_of_the_loss_that_make_no_sense_are_refused(config: LossConfig, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config.check(1000)


def test_options_of_the_loss_that_make_sense_pass() -> None:
    LossConfig().check(1000)
    LossConfig(Weighting.MIN_SNR, 1.0, 0.05, 0.1, (0, 200), (100, 200), 0.0).check(1000)
