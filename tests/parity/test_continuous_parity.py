"""Continuous noise levels against diffusers: its schedulers step by step, and its pipeline at random weights.

    EDMEulerScheduler, EDMDPMSolverMultistepScheduler    Playground v2.5 (F of EDM, normalised latents), CosXL (v)
    FlowMatchEulerDiscreteScheduler                      flow matching, with and without a shift

Our state is theirs times α for EDM, whose state is x₀ + σ ε, and times α + σ_t for flow's (1 − s) x₀ + s ε.

Tolerance of a step: 1e-5 of its largest value: diffusers keeps sigmas and their logarithms in float32, ours in float64.
Of latents: that of `pipelines.py`. diffusers' pipeline for SDXL does not take its flow scheduler, so the loop for that
is written here.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree
from pipelines import PROMPTS, TOLERANCE, Source, build, sdxl
from reference import diffusers, from_torch, to_torch, torch

from sdxl_jax.diffusion.continuous import ContinuousConfig, EdmConfig, FlowConfig, predicted
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.samplers import loop
from sdxl_jax.samplers.steps import SAMPLERS, Plan, Sigmas, continuous_levels
from sdxl_jax.sampling.generate import generate
from sdxl_jax.weights.load import load_model

SHAPE, SIZE = (1, 3, 5, 4), (64, 64)
COSXL = {"sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential"}
COSXL_LAW = EdmConfig(0.002, 120.0, 1.0)
CASES: list[tuple[str, dict[str, Any], str, ContinuousConfig, Prediction, Sigmas]] = [
    ("EDMEulerScheduler", {}, "euler", EdmConfig(), Prediction.EDM, Sigmas.SCHEDULE),
    ("EDMEulerScheduler", COSXL, "euler", COSXL_LAW, Prediction.V, Sigmas.EXPONENTIAL),
    ("EDMDPMSolverMultistepScheduler", {}, "dpmpp_2m", EdmConfig(), Prediction.EDM, Sigmas.SCHEDULE),
    ("EDMDPMSolverMultistepScheduler", COSXL, "dpmpp_2m", COSXL_LAW, Prediction.V, Sigmas.EXPONENTIAL),
    ("FlowMatchEulerDiscreteScheduler", {}, "euler", FlowConfig(), Prediction.FLOW, Sigmas.SCHEDULE),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler", FlowConfig(3.0), Prediction.FLOW, Sigmas.SCHEDULE),
]
NAMES = [f"{kind}-{'cosxl' if fields is COSXL else fields or 'own'}" for kind, fields, *_ in CASES]


@pytest.mark.parametrize(("kind", "fields", "sampler", "law", "prediction", "sigmas"), CASES, ids=NAMES)
def test_every_step_matches_diffusers(
    kind: str,
    fields: dict[str, Any],
    sampler: str,
    law: ContinuousConfig,
    prediction: Prediction,
    sigmas: Sigmas,
    agree: Agree,
) -> None:
    for count in (1, 4, 20) if sigmas is Sigmas.SCHEDULE else (4, 20):  # one exponential step of theirs is at sigma_min
        theirs = getattr(diffusers, kind)(**fields)
        theirs.set_timesteps(count)
        plan = SAMPLERS[sampler].plan(continuous_levels(SAMPLERS[sampler], law, count, sigmas))
        np.testing.assert_allclose(plan.timestep, np.asarray(theirs.timesteps), rtol=1e-5, atol=1e-6)
        rng = np.random.default_rng(count)
        start = rng.standard_normal(SHAPE, np.float32)
        arrays = loop.start(jnp.asarray(start), plan).arrays
        state = torch.from_numpy(start) * getattr(theirs, "init_noise_sigma", 1.0)
        ours, expected = [], []
        for index in range(count):
            output, timestep = rng.standard_normal(SHAPE, np.float32), theirs.timesteps[index]
            if hasattr(theirs, "scale_model_input"):
                theirs.scale_model_input(state, timestep)
            state = theirs.step(torch.from_numpy(output), timestep, state).prev_sample
            row = Plan(*(jnp.asarray(column[index], jnp.float32) for column in plan))
            result = jnp.asarray(output)
            made = predicted(lambda *_: result, arrays[0], row.timestep, prediction, law, row.alpha, row.sigma_t)  # noqa: B023 (called at once)
            arrays = loop.advance(row.weights, arrays, made, np.zeros(SHAPE, np.float32))
            norm = row.alpha_next + (row.sigma_t_next if isinstance(law, FlowConfig) else 0)
            scaled = state.numpy() * norm
            largest = np.abs(scaled).max()
            ours.append(np.asarray(arrays[0]) / largest)
            expected.append(scaled / largest)
        agree(f"{kind} {prediction.value}, {count:2d} steps", np.stack(ours), np.stack(expected), 1e-5)


# ---- pipelines -------------------------------------------------------------------------------------------------------


def first_noise() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((1, SIZE[0] // 8, SIZE[1] // 8, 4), np.float32)


def source_of(folder: Path, scheduler: Any, **vae_fields: Any) -> Source:
    source = build(SDXL_BASE, sdxl, folder)
    source.pipeline.scheduler = scheduler
    source.pipeline.vae.register_to_config(**vae_fields)
    source.pipeline.save_pretrained(source.path)
    return source


PLAYGROUND = {"latents_mean": [-1.5, 0.25, 2.0, 0.5], "latents_std": [8.0, 10.0, 11.5, 7.0], "scaling_factor": 0.5}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("kind", "fields", "vae_fields"),
    [
        ("EDMDPMSolverMultistepScheduler", {}, PLAYGROUND),
        ("EDMEulerScheduler", COSXL, {}),
    ],
    ids=["Playground v2.5", "CosXL"],
)
def test_a_directory_with_edm_is_sampled_as_diffusers_does(
    kind: str, fields: dict[str, Any], vae_fields: dict[str, Any], tmp_path: Path, agree: Agree
) -> None:
    source, last = source_of(tmp_path, getattr(diffusers, kind)(**fields), **vae_fields), dict[str, Any]()

    def keep(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        return state

    images = source.pipeline(
        PROMPTS[0],
        height=SIZE[0],
        width=SIZE[1],
        guidance_scale=3.0,
        num_inference_steps=10,
        latents=to_torch(first_noise()),
        output_type="np",
        callback_on_step_end=keep,
    ).images
    size: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1]}
    made = generate(
        load_model(source.path, progress=False),
        PROMPTS[:1],
        init_noise=first_noise(),
        guidance=3.0,
        steps=10,
        progress=True,
        **size,
    )
    agree(
        f"{kind} {fields.get('prediction_type', 'edm')}, 10 steps", made.latents, from_torch(last["latents"]), TOLERANCE
    )
    assert np.abs(made.images - images * 255).max() <= 1, "so the latents' mean and deviation are undone alike"
    assert images.std() > 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_directory_with_flow_matching_is_sampled_as_diffusers_does(
    shift: float, tmp_path: Path, agree: Agree
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    source = source_of(tmp_path, scheduler)
    pipeline, state = source.pipeline, to_torch(first_noise())
    scheduler.set_timesteps(10)
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
        sizes = torch.tensor([[*SIZE, 0, 0, *SIZE]], dtype=torch.float32)
        given = {"text_embeds": pooled, "time_ids": sizes}
        for timestep in scheduler.timesteps:
            output = pipeline.unet(state, timestep, context, added_cond_kwargs=given).sample
            state = scheduler.step(output, timestep, state).prev_sample
    made = generate(
        load_model(source.path, progress=False),
        PROMPTS[:1],
        init_noise=first_noise(),
        guidance=1.0,
        steps=10,
        height=SIZE[0],
        width=SIZE[1],
        progress=True,
    )
    agree(f"flow matching, shift {shift:g}, 10 steps", made.latents, from_torch(state), TOLERANCE)
