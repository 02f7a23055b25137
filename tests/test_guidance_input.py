"""Guidance as an input of the UNet (diffusers' time_cond_proj_dim): its embedding, its weights' names, its options."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL

from sdxl_jax.config import TrainConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.errors import InputError
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models import unet
from sdxl_jax.models.layers import guidance_embedding
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import plan_segments
from sdxl_jax.weights import detect, names
from sdxl_jax.weights.formats import diffusers_fields
from sdxl_jax.weights.names import Dialect, Naming

UNET = dataclasses.replace(SDXL_BASE.unet, guidance_dim=256)
CONSISTENCY = dataclasses.replace(SDXL_BASE, unet=UNET, distilled=True)


def test_the_embedding_is_the_sinusoid_of_a_thousand_times_the_scale_minus_one() -> None:
    scale = np.array([1.0, 2.5, 8.5])
    frequencies = np.exp(-math.log(1e4) * np.arange(128) / 127)
    angles = 1000 * (scale - 1)[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    made = guidance_embedding(jnp.asarray(scale), 256)
    np.testing.assert_allclose(made, expected, atol=1e-3)  # float32 of an angle of 7500 is 5e-4
    np.testing.assert_array_equal(made[0], np.repeat([0.0, 1.0], 128))  # no guidance


def test_a_unet_without_it_has_the_parameters_of_before() -> None:
    flat, without = (names.abstract(config) for config in (UNET, SDXL_BASE.unet))
    assert flat.keys() - without.keys() == {"time_embedding/cond_proj/kernel"}
    assert flat["time_embedding/cond_proj/kernel"].shape == (256, 320)


@pytest.mark.parametrize(
    ("dialect", "name"),
    [(Dialect.DIFFUSERS, "time_embedding.cond_proj.weight"), (Dialect.ORIGINAL, "time_embed.cond_proj.weight")],
)
def test_its_weight_is_named_and_found_in_both_layouts(dialect: Dialect, name: str) -> None:
    table = names.table(UNET, Naming(dialect))
    assert table.by_name[name].shape == (320, 256)
    (found,) = detect.find({entry.name: entry.shape for entry in table.entries})
    assert found.config == UNET


def test_its_field_is_read_and_written() -> None:
    fields = diffusers_fields.unet_fields(UNET)
    assert fields["time_cond_proj_dim"] == 256
    assert diffusers_fields.unet_config(fields, "config.json") == UNET
    assert "time_cond_proj_dim" not in diffusers_fields.unet_fields(SDXL_BASE.unet)


def test_any_scale_needs_one_evaluation_and_another_network_two() -> None:
    for guidance in (None, 1.0, 8.0, 900.0):
        options = Options(guidance=guidance, steps=4)
        options.check(CONSISTENCY)
        assert options.resolved(CONSISTENCY).guidance == (8.5 if guidance is None else guidance)
        (segment,), _ = plan_segments(CONSISTENCY, None, options)
        assert not segment.terms.guided
    (segment,), _ = plan_segments(SDXL_BASE, None, Options(guidance=8.0))
    assert segment.terms.guided


def test_a_unet_with_it_alone_marks_a_consistency_model_unless_the_sampler_is_another() -> None:
    config = dataclasses.replace(CONSISTENCY, distilled=False)
    assert Options().resolved(config).preset == "lcm"
    Options(preset="lcm").check(config)
    distilled_guidance = dataclasses.replace(config, sampling=SamplingDefaults("ddim"))
    resolved = Options().resolved(distilled_guidance)
    assert (resolved.preset, resolved.sampler, resolved.steps, resolved.guidance) == (None, "ddim", 30, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_interval": (0.0, 0.5)}, "guidance_interval=0 0.5 has no effect .* an input of its UNet"),
        ({"guidance_rescale": 0.5}, "guidance_rescale=0.5 has no effect"),
        ({"preset": "lcm-lora"}, "preset=lcm-lora is of weights without guidance as an input, .*time_cond_proj_dim"),
    ],
)
def test_options_of_two_evaluations_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**given).check(CONSISTENCY)


def test_a_negative_prompt_is_noted_as_without_effect() -> None:
    (note,) = Options(guidance=8.0).notes(CONSISTENCY, "blurry")
    assert note == (
        "guidance is an input of this model's UNet, which is evaluated for the prompt alone. No effect: the negative "
        "prompt"
    )
    assert Options(guidance=8.0).notes(CONSISTENCY) == []


@pytest.mark.parametrize("width", [2, 5])
def test_a_width_without_a_sinusoid_is_refused(width: int) -> None:
    with pytest.raises(InputError, match=rf"model.unet.guidance_dim={width}. Give an even number, 4 or more"):
        dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, guidance_dim=width)).check()


def test_a_scale_is_given_exactly_to_a_unet_that_has_it_as_an_input() -> None:
    given: list[Any] = [jnp.zeros((1, 2, 2, 4)), jnp.zeros(1), jnp.zeros((1, 1, 16)), jnp.zeros((1, 32))]
    with pytest.raises(AssertionError, match="and so is a guidance scale"):
        unet.apply(MODEL.unet, {}, *given, guidance=jnp.ones(1))


def test_denoising_has_no_scale_to_train_it_with() -> None:
    with pytest.raises(InputError, match="guidance_dim=256: denoising has no guidance scale"):
        TrainConfig(DataConfig("images"), model=CONSISTENCY).check()
