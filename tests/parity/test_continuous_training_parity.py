"""The loss of one training step with continuous noise levels against diffusers' and the papers' formulas, in torch.

    EDM, CosXL's v    EDMEulerScheduler's precondition_inputs, _noise and _outputs; an error in x₀, weighted by λ(σ)
    flow matching     (1 − s) x₀ + s ε, the target ε − x₀; training_utils.compute_loss_weighting_for_sd3
    EDM-style         of the discrete schedule: weight σ⁻² for an error in x₀, which is our loss with a known weighting

Both sides have the same levels and noise: those that our loss draws. Theirs is in float64, since in terms of x₀ an
error at a low σ is a small difference.

Tolerance: 1e-5 of the loss, 2e-5 through a UNet (`agreement.py`): float32 on our side. A wrong weight, sign or c_in
moves the loss by more than 1e-2.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree
from reference import UNETS, diffusers, from_torch, run_unet, to_torch, torch, unet_inputs, unet_pair

from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.continuous import ContinuousConfig, EdmConfig, FlowConfig
from sdxl_jax.diffusion.loss import LossConfig, Weighting, diffusion_loss, draw_noise, draw_timestep
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.diffusion.training_levels import LevelDistribution, LevelsConfig, draw_level
from sdxl_jax.models import unet

training_utils = pytest.importorskip("diffusers.training_utils")

ROWS, SHAPE = 64, (4, 4, 4)
OFFSET = 0.05
KINDS: list[tuple[str, ContinuousConfig, Prediction, tuple[Weighting, ...]]] = [
    ("EDM", EdmConfig(), Prediction.EDM, (Weighting.UNIFORM, Weighting.X0, Weighting.INVERSE_SQUARE)),
    ("CosXL", EdmConfig(0.002, 120.0, 1.0), Prediction.V, (Weighting.UNIFORM, Weighting.X0, Weighting.INVERSE_SQUARE)),
    ("flow matching", FlowConfig(3.0), Prediction.FLOW, (Weighting.UNIFORM, Weighting.COSMAP)),
]
NAMES = [name for name, *_ in KINDS]


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def latents(count: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((count, *shape), np.float32)


def drawn(law: ContinuousConfig, count: int, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any]:
    """Levels [batch] and noise of our loss, as torch's float64."""
    parts = [jax.random.split(key, 3) for key in keys(count)]
    levels = np.array([draw_level(part[0], LevelsConfig(), law) for part in parts], np.float32)
    noise = np.stack([draw_noise(part[1], shape, OFFSET) for part in parts])
    return torch.from_numpy(levels).double(), to_torch(noise).double()


def simple(x: Any, timestep: Any, functions: Any) -> Any:
    """A network, in jax (functions: jnp) or torch."""
    factor = 0.5 + functions.log(1 + abs(timestep)) / 10 + functions.tanh(timestep) / 5
    return functions.tanh(x) * factor[:, None, None, None]


def theirs(kind: tuple[Any, ...], weighting: Weighting, network: Any, x0: Any, levels: Any, noise: Any) -> float:
    _, law, prediction, _ = kind
    level = levels[:, None, None, None]
    if isinstance(law, FlowConfig):
        output = network((1 - level) * x0 + level * noise, 1000 * levels)
        weight = training_utils.compute_loss_weighting_for_sd3(
            "cosmap" if weighting is Weighting.COSMAP else "none", level
        )
        return float((weight * (output - (noise - x0)) ** 2).mean())
    predicts = "v_prediction" if prediction is Prediction.V else "epsilon"  # which is F there
    scheduler = diffusers.EDMEulerScheduler(sigma_data=law.sigma_data, prediction_type=predicts)
    noised = x0 + level * noise
    output = network(scheduler.precondition_inputs(noised, level), scheduler.precondition_noise(levels))
    made = scheduler.precondition_outputs(noised, output, level)
    weight = {
        Weighting.UNIFORM: (level**2 + law.sigma_data**2) / (level * law.sigma_data) ** 2,
        Weighting.X0: 1.0,
        Weighting.INVERSE_SQUARE: level**-2.0,
    }[weighting]
    return float((weight * (made - x0) ** 2).mean())


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow), KINDS[2]], ids=NAMES)
def test_loss_of_a_step_matches_diffusers(kind: tuple[Any, ...], agree: Agree) -> None:
    name, law, prediction, weightings = kind
    x0 = latents(ROWS)
    levels, noise = drawn(law, ROWS)
    for weighting in weightings:
        expected = theirs(
            kind, weighting, lambda x, timestep: simple(x, timestep, torch), to_torch(x0).double(), levels, noise
        )
        config = LossConfig(weighting, offset_noise=OFFSET)
        ours = diffusion_loss(
            lambda x, timestep: simple(x, timestep, jnp), jnp.asarray(x0), keys(ROWS), law, prediction, config
        )
        agree(f"loss of a step, {name}, {weighting.value}", ours, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_loss_through_a_unet_matches_diffusers(kind: tuple[Any, ...], agree: Agree) -> None:
    name, law, prediction, _ = kind
    config = UNETS["SD 2.x"]
    pair, inputs = unet_pair(config), unet_inputs(config, 8, 8)
    x0 = latents(2, (8, 8, 4))
    levels, noise = drawn(law, 2, (8, 8, 4))
    model = pair.model.double()

    def of_torch(x: Any, timestep: Any) -> Any:
        return run_unet(model, inputs._replace(timestep=timestep.numpy()), x)

    def ours(x: jax.Array, timestep: jax.Array) -> jax.Array:
        return unet.apply(config, pair.params, **{**inputs.ours(), "latent": x, "timestep": timestep})

    with torch.no_grad():
        expected = theirs(kind, Weighting.UNIFORM, of_torch, to_torch(x0).double(), levels, noise)
    loss = jax.jit(lambda x0: diffusion_loss(ours, x0, keys(2), law, prediction, LossConfig(offset_noise=OFFSET)))(
        jnp.asarray(x0)
    )
    agree(f"loss of a step through a UNet, {name}", loss, expected)


def test_edm_style_training_of_discrete_models_is_a_weighting_that_is_there(agree: Agree) -> None:
    """diffusers' --do_edm_style_training: of ε it is the plain loss, of v min-SNR without its limit."""
    made, x0 = schedule.make(ScheduleConfig()), latents(ROWS)
    parts = [jax.random.split(key, 3) for key in keys(ROWS)]
    timesteps = np.array([draw_timestep(part[0], LossConfig(), 1000) for part in parts])
    noise = to_torch(np.stack([draw_noise(part[1], SHAPE, 0.0) for part in parts])).double()
    image, sigma = to_torch(x0).double(), torch.from_numpy(made.sigma[timesteps])[:, None, None, None]
    noised = image + sigma * noise
    output = simple(noised / (sigma**2 + 1) ** 0.5, torch.from_numpy(timesteps).double(), torch)
    for prediction, of_output, config in (
        (Prediction.EPSILON, output * -sigma + noised, LossConfig()),
        (
            Prediction.V,
            output * (-sigma / (sigma**2 + 1) ** 0.5) + noised / (sigma**2 + 1),
            LossConfig(Weighting.MIN_SNR, math.inf),
        ),
    ):
        expected = float((sigma**-2.0 * (of_output - image) ** 2).mean())
        network = lambda x, timestep: simple(x, jnp.asarray(timestep, jnp.float32), jnp)  # noqa: E731
        ours = diffusion_loss(network, jnp.asarray(x0), keys(ROWS), made, prediction, config)
        agree(f"loss of a step, EDM-style, {prediction.value}", ours, expected, 1e-5)


@pytest.mark.parametrize("distribution", [LevelDistribution.MODE, LevelDistribution.UNIFORM])
def test_distributions_are_diffusers_of_the_same_uniform_numbers(
    distribution: LevelDistribution, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    uniform = np.array([jax.random.uniform(key) for key in keys(ROWS)], np.float32)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.from_numpy(uniform))
    expected = training_utils.compute_density_for_timestep_sampling(distribution.value, ROWS, mode_scale=1.29)
    ours = [draw_level(key, LevelsConfig(distribution), FlowConfig()) for key in keys(ROWS)]
    agree(f"levels of {distribution.value}", np.array(ours), from_torch(expected), 1e-6)
