"""Few-step models against diffusers' pipeline: presets, and guidance as an input of the UNet, at random weights.

The same directory, the same first noise and the same fresh noise; the scheduler of each preset is the one that
diffusers samples such weights with. Models, prompts and tolerance are those of `pipelines.py`, of latents alone: one
step of random weights makes no image. Guidance is off in diffusers (guidance_scale=1), but where it is an input.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from agreement import Agree
from pipelines import PROMPTS, TOLERANCE, Source, build, sdxl
from pipelines import scheduler as euler
from reference import diffusers, from_torch, to_torch

from sdxl_jax.model import SDXL_BASE, Model
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.sampling.generate import generate
from sdxl_jax.weights.load import load_model

# Of diffusers' Euler alone: NumPy 2 asks more of torch's tensors than they offer.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

SEED, SIZE = 5, (64, 64)
TRAILING = {"timestep_spacing": "trailing"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "turbo": ("EulerAncestralDiscreteScheduler", TRAILING),
    "lightning": ("EulerDiscreteScheduler", TRAILING),
    "lightning x0": ("EulerDiscreteScheduler", TRAILING | {"prediction_type": "sample"}),
    "lcm": ("LCMScheduler", {}),
    "lcm-lora": ("LCMScheduler", {}),
    "hyper-sd": ("DDIMScheduler", TRAILING | {"set_alpha_to_one": False, "clip_sample": False}),
    "hyper-sd 1": ("TCDScheduler", {}),
    "hyper-sd-unet": ("LCMScheduler", {}),
    "dmd2": ("LCMScheduler", {}),
}
"""Class, and its settings in addition to those of SDXL's configuration."""
CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("turbo", 1, "turbo", {}),
    ("turbo", 4, "turbo", {}),
    ("lightning", 1, "lightning x0", {}),
    ("lightning", 2, "lightning", {}),
    ("lightning", 8, "lightning", {}),
    ("lcm-lora", 4, "lcm-lora", {}),
    ("hyper-sd", 1, "hyper-sd 1", {"eta": 1.0}),
    ("hyper-sd", 4, "hyper-sd", {}),
    ("hyper-sd-unet", 1, "hyper-sd-unet", {"timesteps": [800]}),
    ("dmd2", 1, "dmd2", {"timesteps": [399]}),
    ("dmd2", 4, "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("dmd", 2, "dmd2", {"timesteps": [999, 499]}),
    ("add", 4, "turbo", {}),
]
"""Preset, steps, scheduler, and what else diffusers' pipeline is called with."""


def first_noise() -> np.ndarray:
    rng = np.random.default_rng(SEED)
    return rng.standard_normal((1, SIZE[0] // 8, SIZE[1] // 8, 4), np.float32)


@contextlib.contextmanager
def our_fresh_noise() -> Iterator[None]:
    """diffusers' schedulers draw what ours draws in the same step of an image."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), 1)

    def drawn() -> Iterator[Any]:
        for row in itertools.count():
            yield to_torch(np.array(jax.random.normal(jax.random.fold_in(key, row), first_noise().shape[1:]))[None])

    noise = drawn()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("scheduling_euler_ancestral_discrete", "scheduling_lcm", "scheduling_tcd"):
            patch.setattr(getattr(diffusers.schedulers, name), "randn_tensor", lambda *_, **__: next(noise))
        yield


def theirs(pipeline: Any, scheduler: str, steps: int, guidance: float = 1.0, **more: Any) -> np.ndarray:
    """Latents, in our layout."""
    name, fields = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(diffusers, name).from_config(euler("epsilon").config, **fields)
    last: dict[str, Any] = {}

    def keep(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        return state

    steps_given = {} if "timesteps" in more else {"num_inference_steps": steps}
    with our_fresh_noise():
        pipeline(
            PROMPTS[0],
            height=SIZE[0],
            width=SIZE[1],
            guidance_scale=guidance,
            latents=to_torch(first_noise()),
            output_type="latent",
            callback_on_step_end=keep,
            **steps_given,
            **more,
        )
    return from_torch(last["latents"])


def ours(model: Model, **options: Any) -> np.ndarray:
    size = {"height": SIZE[0], "width": SIZE[1], "seed": SEED}
    return generate(model, PROMPTS[:1], init_noise=first_noise(), progress=True, **size, **options).latents


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Model]:
    source = build(SDXL_BASE, sdxl, tmp_path_factory.mktemp("few") / "plain")
    model = load_model(source.path, progress=False)
    # What SDXL's official file says, and this one does not: that DDIM ends at the level of timestep 0.
    return source, model._replace(config=dataclasses.replace(model.config, sampling=SamplingDefaults()))


@pytest.mark.parametrize(("preset", "steps", "scheduler", "more"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_preset_samples_as_diffusers_does(
    preset: str, steps: int, scheduler: str, more: dict[str, Any], plain: tuple[Source, Model], agree: Agree
) -> None:
    source, model = plain
    expected = theirs(source.pipeline, scheduler, steps, **more)
    assert expected.std() > 0.1, "a difference would show"
    agree(f"{preset}, {steps} steps", ours(model, preset=preset, steps=steps), expected, TOLERANCE)


def test_guidance_as_an_input_of_the_unet_matches_diffusers(tmp_path: Path, agree: Agree) -> None:
    """A directory with LCM's scheduler and time_cond_proj_dim: read as it is, sampled without further options."""
    source = build(SDXL_BASE, functools.partial(sdxl, time_cond_proj_dim=32), tmp_path)
    source.pipeline.scheduler = diffusers.LCMScheduler.from_config(euler("epsilon").config)
    source.pipeline.save_pretrained(source.path)
    model = load_model(source.path, progress=False)
    assert model.config.unet.guidance_dim == 32
    made = {}
    for guidance in (1.0, 8.5, 3.0):
        expected = theirs(source.pipeline, "lcm", 4, guidance)
        made[guidance] = ours(model, **({} if guidance == 8.5 else {"guidance": guidance}))
        agree(f"guidance {guidance} as an input, 4 steps", made[guidance], expected, TOLERANCE)
    assert np.abs(made[8.5] - made[3.0]).max() > 100 * TOLERANCE * np.abs(made[3.0]).max()
