"""The samplers against diffusers' schedulers, step by step: same first noise, same network outputs, same fresh noise.

Tolerance: diffusers multiplies up its ᾱ in float32, a thousand roundings of 6e-8 that partly cancel; ours is float64.
Each step is measured by its own largest value, as the state of Euler shrinks on its way. Timestep 0, which LINSPACE
alone visits, is allowed twice as much: 1 − ᾱ is 0.00085 there, and float32's rounding of ᾱ, 3e-8, moves its root by
1.8e-5 of itself.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree

from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.parameterisation import Prediction, denoised
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.samplers.steps import SAMPLERS, Plan, Spacing, timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Of diffusers' Euler alone: NumPy 2 asks more of torch's tensors than they offer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TOLERANCE = {Spacing.LEADING: 1e-5, Spacing.TRAILING: 1e-5, Spacing.LINSPACE: 2e-5}
SHAPE = (1, 3, 5, 4)
LEVELS = schedule.make(ScheduleConfig())
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def scheduler(name: str, spacing: Spacing, prediction: Prediction) -> Any:
    """diffusers' scheduler of that name, with SDXL's settings."""
    options = {**SDXL, "steps_offset": 1, "timestep_spacing": spacing.value, "prediction_type": prediction.value}
    match name:
        case "ddim":
            return diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)
        case "ddpm":
            return diffusers.DDPMScheduler(**options, clip_sample=False, variance_type="fixed_small")
        case "euler":
            return diffusers.EulerDiscreteScheduler(**options)
    raise ValueError(name)


def consistent(theirs: Any, plan: Plan) -> Plan:
    """The plan with the noise levels that diffusers' DDIM steps to.

    It steps to t − 1000 // steps, whatever timestep it visits next. Where the two are not the same (linspace; trailing
    with a number of steps that does not divide 1000) its state has another noise level than the network is then told.
    Ours steps to the next one visited; for the comparison it is made to step where theirs does.
    """
    visited = plan.timestep.astype(int)
    previous = visited - 1000 // theirs.num_inference_steps
    after = np.where(previous >= 0, LEVELS.alpha_bar[np.maximum(previous, 0)], 1.0)
    return plan._replace(next=after)


def trajectories(name: str, spacing: Spacing, prediction: Prediction, count: int) -> Iterator[tuple[Any, Any]]:
    """(ours, theirs) after each step, both divided by the largest value of theirs."""
    sampler, theirs = SAMPLERS[name], scheduler(name, spacing, prediction)
    theirs.set_timesteps(count)
    plan = sampler.plan(LEVELS, timesteps(count, 1000, spacing))
    np.testing.assert_allclose(plan.timestep, theirs.timesteps[:count], rtol=1e-7)  # float32 of a linspace
    if name == "ddim":
        if spacing is Spacing.LEADING:
            np.testing.assert_array_equal(consistent(theirs, plan).next, plan.next)
        plan = consistent(theirs, plan)

    @jax.jit
    def step(state: jax.Array, output: jax.Array, noise: jax.Array, row: Any) -> jax.Array:
        x_t = state * row.input_scale
        return sampler.step(state, denoised(prediction, output, x_t, row.alpha, row.sigma_t), row, noise)

    rng = np.random.default_rng(count)
    start = rng.standard_normal(SHAPE, np.float32)
    ours = jnp.asarray(start) * sampler.initial_scale(plan, spacing)
    state = torch.from_numpy(start) * theirs.init_noise_sigma
    used, twin = (torch.Generator().manual_seed(count) for _ in range(2))
    for index in range(count):
        output, timestep = rng.standard_normal(SHAPE, np.float32), theirs.timesteps[index]
        # Drawn as the scheduler will draw it, which does so at every timestep but 0.
        noise = torch.randn(SHAPE, generator=twin).numpy()
        theirs.scale_model_input(state, timestep)
        keywords = {} if name == "ddim" else {"generator": used}
        state = theirs.step(torch.from_numpy(output), timestep, state, **keywords).prev_sample
        row = jax.tree.map(lambda column, index=index: jnp.float32(column[index]), plan)
        ours = step(ours, jnp.asarray(output), jnp.asarray(noise), row)
        largest = np.abs(state.numpy()).max()
        yield np.asarray(ours) / largest, state.numpy() / largest


@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_matches_diffusers(name: str, spacing: Spacing, agree: Agree) -> None:
    for prediction in (Prediction.EPSILON, Prediction.V):
        pairs = [pair for count in (1, 4, 20, 30, 50) for pair in trajectories(name, spacing, prediction, count)]
        ours, theirs = (np.stack(side) for side in zip(*pairs, strict=True))
        agree(f"{name}, {spacing.value} timesteps, {prediction.value}", ours, theirs, TOLERANCE[spacing])


@pytest.mark.parametrize("spacing", Spacing)
def test_euler_starts_from_noise_of_the_same_size(spacing: Spacing) -> None:
    for count in (1, 4, 20, 30, 50):
        theirs = scheduler("euler", spacing, Prediction.EPSILON)
        theirs.set_timesteps(count)
        plan = SAMPLERS["euler"].plan(LEVELS, timesteps(count, 1000, spacing))
        expected = float(theirs.init_noise_sigma)
        assert SAMPLERS["euler"].initial_scale(plan, spacing) == pytest.approx(expected, rel=TOLERANCE[spacing])
