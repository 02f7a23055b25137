"""The samplers against diffusers' schedulers, step by step: same first noise, same network outputs, same fresh noise.

Our state is theirs as the network sees it: for those with an EDM sigma, theirs divided by √(1 + sigma²).

Tolerance, of each step's own largest value: 1e-5. diffusers multiplies up its ᾱ in float32, a thousand roundings of
6e-8 that partly cancel, and keeps its sigmas and logarithms in float32; ours is float64. Linspace timesteps are allowed
more, for the reason in `tolerance`.
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
from sdxl_jax.model import ModelConfig
from sdxl_jax.samplers import loop
from sdxl_jax.samplers.steps import SAMPLERS, Family, Levels, Plan, Sigmas, Spacing, initial_scale, make_levels
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import levels_of
from sdxl_jax.weights.formats import diffusers_fields, diffusers_sampling

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Of diffusers' Euler alone: NumPy 2 asks more of torch's tensors than they offer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

COUNTS = (1, 4, 20, 30, 50)
SHAPE = (1, 3, 5, 4)
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddpm": {"clip_sample": False, "variance_type": "fixed_small"},
    "ddim": {"clip_sample": False, "set_alpha_to_one": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "lcm": {"clip_sample": False},
}
"""diffusers' sample pipelines leave these at their defaults, but for what SDXL's scheduler configuration says."""
DRAWING = {"ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm"}


def tolerance(spacing: Spacing | None) -> float:
    # Timestep 0, which LINSPACE alone visits: 1 − ᾱ is 0.00085 there, and float32's rounding of ᾱ, 3e-8, moves its root
    # by 1.8e-5 of itself.
    return 2e-5 if spacing is Spacing.LINSPACE else 1e-5


def scheduler(name: str, spacing: Spacing | None, sigmas: Sigmas, prediction: Prediction, **more: Any) -> Any:
    """diffusers' scheduler of that name, with SDXL's settings."""
    options = {**SDXL, "steps_offset": 1, "prediction_type": prediction.value, **OPTIONS.get(name, {}), **more}
    if spacing is not None:
        options["timestep_spacing"] = spacing.value
    if sigmas is not Sigmas.SCHEDULE:
        options[f"use_{sigmas.value}_sigmas"] = True
    return getattr(diffusers, CLASSES[name])(**options)


def levels_like(theirs: Any, levels: Levels, noise: schedule.Schedule, index: int) -> Levels:
    """One step of a way, to where diffusers' DDIM steps.

    It steps to t − 1000 // steps, whatever timestep it visits next. Where the two are not the same (linspace; trailing
    with a number of steps that does not divide 1000) its state has another noise level than the network is then told.
    Ours steps to the next one visited; for the comparison it is made to step where theirs does.
    """
    now = int(levels.timestep[index])
    then = now - 1000 // theirs.num_inference_steps
    alpha_bar = np.array([noise.alpha_bar[now], noise.alpha_bar[then] if then >= 0 else levels.alpha[-1] ** 2])
    return Levels(levels.timestep[index : index + 1], np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


@jax.jit
def advance(arrays: jax.Array, output: Any, noise: Any, row: Plan) -> dict[str, jax.Array]:
    def one(prediction: Prediction) -> jax.Array:
        return loop.advance(row.weights, arrays, denoised(prediction, output, arrays[0], row.alpha, row.sigma_t), noise)

    return {prediction.value: one(prediction) for prediction in (Prediction.EPSILON, Prediction.V)}


def trajectories(
    name: str,
    spacing: Spacing | None,
    sigmas: Sigmas,
    prediction: Prediction,
    count: int,
    eta: float = 0.0,
    config: ScheduleConfig = ScheduleConfig(),
    **more: Any,
) -> Iterator[tuple[Any, Any]]:
    """(ours, theirs) after each step, both divided by the largest value of theirs."""
    theirs = scheduler(name, spacing, sigmas, prediction, **more)
    theirs.set_timesteps(count)
    levels = make_levels(SAMPLERS[name], schedule.make(config), count, spacing, sigmas)
    yield from along(name, theirs, levels, prediction, count, spacing, sigmas, eta, config)


def along(
    name: str,
    theirs: Any,
    levels: Levels,
    prediction: Prediction,
    count: int,
    spacing: Spacing | None,
    sigmas: Sigmas,
    eta: float = 0.0,
    config: ScheduleConfig = ScheduleConfig(),
) -> Iterator[tuple[Any, Any]]:
    """The same with a scheduler and levels that are there already."""
    sampler, noise = SAMPLERS[name], schedule.make(config)
    plan = sampler.plan(levels, eta)
    # float32 of a linspace or an interpolation; their whole ones are cut off, not rounded.
    atol = 1 if sigmas is Sigmas.EXPONENTIAL and sampler.family is Family.SOLVER else 2e-3
    np.testing.assert_allclose(plan.timestep, np.asarray(theirs.timesteps)[: len(plan.timestep)], atol=atol)

    rng = np.random.default_rng(count)
    start = rng.standard_normal(SHAPE, np.float32)
    arrays = loop.start(jnp.asarray(start) * initial_scale(sampler, levels, spacing), plan).arrays
    state = torch.from_numpy(start) * theirs.init_noise_sigma
    used, twin = (torch.Generator().manual_seed(count) for _ in range(2))
    for index in range(len(plan.timestep)):
        output, timestep = rng.standard_normal(SHAPE, np.float32), theirs.timesteps[index]
        drawn = torch.randn(SHAPE, generator=twin).numpy() if name in DRAWING or eta else np.zeros(SHAPE, np.float32)
        theirs.scale_model_input(state, timestep)
        keywords = {"generator": used} if name in DRAWING or eta else {}
        keywords |= {"eta": eta} if eta else {}
        state = theirs.step(torch.from_numpy(output), timestep, state, **keywords).prev_sample
        row = plan.between(index, index + 1)
        if name == "ddim":
            row = sampler.plan(levels_like(theirs, levels, noise, index), eta)
        row = Plan(*(jnp.asarray(column[0], jnp.float32) for column in row))
        arrays = advance(arrays, output, drawn, row)[prediction.value]
        scaled = state.numpy() * (plan.alpha_next[index] if sampler.family is Family.SIGMA else 1.0)
        largest = np.abs(scaled).max()
        yield np.asarray(arrays[0]) / largest, scaled / largest


WAYS = [
    pytest.param(
        name,
        spacing,
        sigmas,
        id=f"{name}-{spacing.value if spacing else 'own'}-{sigmas.value}",
        # Where Karras's and exponential sigmas begin and end is all that the spacing changes of them. Of lms, whose
        # coefficients are integrals, which take long, one spacing is always run.
        marks=[] if spacing is Spacing.LEADING or (sigmas is Sigmas.SCHEDULE and name != "lms") else pytest.mark.slow,
    )
    for name, sampler in SAMPLERS.items()
    for spacing in ([None] if sampler.family is Family.CONSISTENCY else Spacing)
    for sigmas in Sigmas
    if sigmas is Sigmas.SCHEDULE or sampler.family is Family.SOLVER or name in ("euler", "heun", "lms")
]
"""What diffusers' schedulers offer of it."""


@pytest.mark.parametrize(("name", "spacing", "sigmas"), WAYS)
def test_every_step_matches_diffusers(name: str, spacing: Spacing | None, sigmas: Sigmas, agree: Agree) -> None:
    for prediction in (Prediction.EPSILON, Prediction.V):
        for count in COUNTS:
            ours, theirs = map(np.stack, zip(*trajectories(name, spacing, sigmas, prediction, count), strict=True))
            what = f"{name}, {spacing.value if spacing else 'own'} timesteps, {sigmas.value} sigmas, {prediction.value}"
            agree(f"{what}, {count:2d} steps", ours, theirs, tolerance(spacing))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_matches_diffusers(eta: float, agree: Agree) -> None:
    for count in COUNTS:
        pairs = trajectories("ddim", Spacing.LEADING, Sigmas.SCHEDULE, Prediction.EPSILON, count, eta)
        ours, theirs = map(np.stack, zip(*pairs, strict=True))
        agree(f"ddim, η = {eta}, {count:2d} steps", ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_zero_terminal_snr_matches_diffusers(name: str, agree: Agree) -> None:
    config, more = ScheduleConfig(zero_terminal_snr=True), {"rescale_betas_zero_snr": True}
    pairs = trajectories(name, Spacing.TRAILING, Sigmas.SCHEDULE, Prediction.V, 20, config=config, **more)
    ours, theirs = map(np.stack, zip(*pairs, strict=True))
    agree(f"{name}, zero terminal SNR", ours, theirs, 1e-5)


ENDING = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
SAID: list[tuple[str, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("DDPMScheduler", {"clip_sample": False, "steps_offset": 1}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 2}),
    ("DPMSolverMultistepScheduler", ENDING | {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", ENDING | {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("kind", "fields"), SAID, ids=[f"{kind}-{'-'.join(map(str, f))}" for kind, f in SAID])
def test_what_a_file_says_of_sampling_is_how_its_scheduler_samples(
    kind: str, fields: dict[str, Any], agree: Agree
) -> None:
    prediction = Prediction.V if "rescale_betas_zero_snr" in fields else Prediction.EPSILON
    built = getattr(diffusers, kind)(**SDXL, prediction_type=prediction.value, **fields)
    saved = {**built.config, "_class_name": kind}
    config, _ = diffusers_fields.schedule_config(saved, "file")
    distilled = diffusers_fields.is_distilled(saved)
    said, notes = diffusers_sampling.read(saved, "file", config.zero_terminal_snr, distilled)
    assert notes == ()
    whole = ModelConfig(schedule=config, sampling=said, distilled=distilled)
    for count in (4, 20):
        options = Options(steps=count).resolved(whole)
        name, spacing = options.sampler or "", options.timestep_spacing
        theirs = getattr(diffusers, kind).from_config(built.config)
        theirs.set_timesteps(count)
        levels = levels_of(whole, options, whole.sampling)
        sigmas = options.sigmas or Sigmas.SCHEDULE
        pairs = along(name, theirs, levels, prediction, count, spacing, sigmas, config=config)
        ours, expected = map(np.stack, zip(*pairs, strict=True))
        agree(f"{kind} {fields}, {count:2d} steps", ours, expected, 2e-5)


@pytest.mark.parametrize("name", ["euler", "heun", "lms", "euler_ancestral", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("spacing", Spacing)
def test_the_first_noise_has_the_same_size(name: str, spacing: Spacing) -> None:
    for count in COUNTS:
        theirs = scheduler(name, spacing, Sigmas.SCHEDULE, Prediction.EPSILON)
        theirs.set_timesteps(count)
        levels = make_levels(SAMPLERS[name], schedule.make(ScheduleConfig()), count, spacing)
        seen = float(theirs.init_noise_sigma) * (levels.alpha[0] if SAMPLERS[name].family is Family.SIGMA else 1.0)
        assert initial_scale(SAMPLERS[name], levels, spacing) == pytest.approx(seen, rel=2e-5)
