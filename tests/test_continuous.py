"""Continuous noise laws: how the network is called, its levels, and how files say them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.diffusion.continuous import ContinuousConfig, EdmConfig, FlowConfig, noise_input, predicted, scales
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models.vae import SDXL_VAE, VaeConfig, scaled, unscaled
from sdxl_jax.samplers.defaults import SamplingDefaults, Sigmas, Spacing
from sdxl_jax.samplers.steps import SAMPLERS, continuous_levels
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import plan_segments, prepare
from sdxl_jax.weights.descriptions import check_noise, edm_marks, with_marks
from sdxl_jax.weights.formats import diffusers, diffusers_fields, diffusers_sampling
from sdxl_jax.weights.lazy import InMemory, Origin, SourceLayout, Weights

LAWS: list[tuple[ContinuousConfig, Prediction]] = [
    (EdmConfig(), Prediction.EDM),
    (EdmConfig(sigma_data=1.0), Prediction.V),
    (EdmConfig(sigma_data=0.7), Prediction.V),
    (FlowConfig(), Prediction.FLOW),
]
EDM = dataclasses.replace(SDXL_BASE, noise=EdmConfig(), prediction=Prediction.EDM)
COSXL = dataclasses.replace(SDXL_BASE, noise=EdmConfig(0.002, 120.0, 1.0), prediction=Prediction.V)
FLOW = dataclasses.replace(SDXL_BASE, noise=FlowConfig(3.0), prediction=Prediction.FLOW)
PLAYGROUND = dataclasses.replace(
    EDM,
    vae=VaeConfig(scale=0.5, latent_mean=(-1.5, 0.25, 2.0, 0.5), latent_std=(8.0, 10.0, 11.5, 7.0)),
    sampling=SamplingDefaults("dpmpp_2m", guidance=3.0),
)

X0, EPSILON = np.random.default_rng(0).standard_normal((2, 5, 3))


def values_of(law: ContinuousConfig) -> np.ndarray:
    return np.array([1.0, 0.999, 0.5, 0.01]) if isinstance(law, FlowConfig) else np.array([120.0, 3.0, 0.5, 0.002])


# How the network is called


@pytest.mark.parametrize(("law", "prediction"), LAWS, ids=str)
def test_of_a_perfect_network_come_the_image_and_its_noise(law: ContinuousConfig, prediction: Prediction) -> None:
    """In float64. The laws in their own words: Karras et al., table 1; v with its sign; ε − x₀."""
    for value in values_of(law):
        alpha, sigma_t = law.level(value)
        assert alpha**2 + sigma_t**2 == pytest.approx(1, abs=1e-15)
        x_t, scale = alpha * X0 + sigma_t * EPSILON, scales(law, prediction, alpha, sigma_t)
        if isinstance(law, FlowConfig):
            seen, output = (1 - value) * X0 + value * EPSILON, EPSILON - X0
        else:
            noised, data = X0 + value * EPSILON, law.sigma_data
            total = value**2 + data**2
            c_skip, c_out = data**2 / total, value * data / total**0.5 * (-1 if prediction is Prediction.V else 1)
            seen, output = noised / total**0.5, (X0 - c_skip * noised) / c_out
        np.testing.assert_allclose(scale.input * x_t, seen, rtol=1e-12)
        made = scale.skip * x_t + scale.output * output, scale.noise_skip * x_t + scale.noise_output * output
        np.testing.assert_allclose(made[0], X0, rtol=0, atol=1e-9 if value > 100 else 1e-12)
        np.testing.assert_allclose(made[1], EPSILON, rtol=0, atol=1e-12)


def test_v_of_unit_variance_is_the_discrete_v() -> None:
    law = EdmConfig(sigma_data=1.0)
    for value in values_of(law):
        alpha, sigma_t = law.level(value)
        expected = (1.0, alpha, -sigma_t, sigma_t, alpha)
        np.testing.assert_allclose(list(scales(law, Prediction.V, alpha, sigma_t)), expected, rtol=1e-14)


def test_noise_levels_are_given_as_a_quarter_of_the_logarithm_or_as_thousandths() -> None:
    np.testing.assert_allclose(noise_input(EdmConfig(), np.array([80.0, 0.002])), [1.0955066, -1.5536520], rtol=1e-7)
    np.testing.assert_array_equal(noise_input(FlowConfig(), np.array([1.0, 0.25])), [1000, 250])


def test_without_a_law_the_network_is_called_as_before() -> None:
    seen = []

    def network(x: Any, timestep: Any) -> Any:
        seen.append((x, timestep))
        return x

    x_t = jnp.ones((1, 1, 1, 1))
    found = predicted(network, x_t, 7.0, Prediction.V, None, jnp.array(0.6), jnp.array(0.8))
    assert seen == [(x_t, 7)]
    np.testing.assert_allclose([found.x0.item(), found.epsilon.item()], [0.6 - 0.8, 0.8 + 0.6], rtol=1e-6)


# Levels


def test_levels_run_from_the_highest_to_the_finished_image() -> None:
    for sampler in ("euler", "dpmpp_2m"):
        edm = continuous_levels(SAMPLERS[sampler], EdmConfig(), 3)
        np.testing.assert_allclose(edm.sigma[:3], [80.0, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002])
        exponential = continuous_levels(SAMPLERS[sampler], EdmConfig(), 3, Sigmas.EXPONENTIAL)
        np.testing.assert_allclose(exponential.sigma[:3], [80.0, 0.4, 0.002], rtol=1e-12)
        flow = continuous_levels(SAMPLERS[sampler], FlowConfig(), 3)
        np.testing.assert_allclose(flow.timestep, [1000, 500.5, 1])
        assert (flow.alpha[0], flow.sigma_t[0]) == (0, 1)
        for levels in (edm, exponential, flow):
            assert (levels.alpha[-1], levels.sigma_t[-1]) == (1, 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_apply_or_are_refused_by_name(name: str) -> None:
    """Those of whole timesteps never apply; to flow those that need no finite σ at the beginning."""
    applies = name not in ("ddpm", "ddim", "lcm")
    to_flow = applies and name not in ("heun", "lms")
    for config, possible in ((EDM, applies), (COSXL, applies), (FLOW, to_flow)):
        options = Options(sampler=name, steps=6)
        if possible:
            _, (arrays,) = plan_segments(config, None, options)
            assert all(np.isfinite(column).all() for column in arrays.plan)
            continue
        with pytest.raises(InputError, match=rf"sampler={name} (visits whole timesteps|cannot begin)"):
            plan_segments(config, None, options)


@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        ({"timestep_spacing": Spacing.TRAILING}, EDM, "timestep_spacing=trailing has no effect on this model, whose"),
        ({"sigmas": Sigmas.KARRAS}, FLOW, "sigmas=karras has no effect on flow matching"),
        ({"preset": "turbo"}, EDM, "of weights that predict epsilon; this model predicts edm"),
    ],
)
def test_options_without_effect_are_refused(given: dict[str, Any], config: ModelConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(config, None, Options(**given))


def test_a_refiner_is_refused() -> None:
    with pytest.raises(InputError, match=r"share no denoising schedule\. Leave the refiner out"):
        prepare(EDM, SDXL_REFINER, Options())


# Configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prediction": Prediction.EPSILON},
            "prediction=epsilon does not go with model.noise=EdmConfig. .* to edm or v",
        ),
        ({"noise": None}, "model.prediction=edm does not go with model.noise=None"),
        ({"noise": FlowConfig()}, "to flow, or set"),
        ({"noise": EdmConfig(2.0, 1.0)}, "model.noise.sigma_min=2, sigma_max=1"),
        ({"noise": FlowConfig(0.0), "prediction": Prediction.FLOW}, "model.noise.shift=0. Give a number above 0"),
        ({"distilled": True}, "model.distilled have no effect beside model.noise"),
        ({"vae": VaeConfig(latent_mean=(0.0,) * 4)}, "latent_std=None. Give 4 numbers of both"),
        ({"vae": VaeConfig(latent_mean=(0.0,), latent_std=(1.0,))}, "Give 4 numbers of both"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(EDM, **change).check()


@pytest.mark.parametrize("config", [SDXL_BASE, EDM, COSXL, FLOW, PLAYGROUND])
def test_configurations_are_read_as_they_were_written(config: ModelConfig) -> None:
    config.check()
    assert from_json(to_json(config), ModelConfig) == config


def test_latents_are_normalised_by_mean_and_deviation_and_back() -> None:
    latent = np.random.default_rng(0).standard_normal((1, 2, 2, 4), np.float32)
    vae = PLAYGROUND.vae
    assert isinstance(vae, VaeConfig)
    made = scaled(vae, jnp.asarray(latent))
    np.testing.assert_allclose(made, 0.5 * (latent - np.array(vae.latent_mean)) / np.array(vae.latent_std), rtol=1e-5)
    np.testing.assert_allclose(unscaled(vae, made), latent, atol=1e-5)
    np.testing.assert_array_equal(unscaled(SDXL_VAE, jnp.asarray(latent)), jnp.asarray(latent) / SDXL_VAE.scale)


# Files


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PLAYGROUND, "EDMDPMSolverMultistepScheduler"),
        (dataclasses.replace(COSXL, sampling=SamplingDefaults(sigmas=Sigmas.EXPONENTIAL)), "EDMEulerScheduler"),
        (FLOW, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_directory_is_read_as_it_was_written(config: ModelConfig, kind: str, tmp_path: Path) -> None:
    diffusers.write_folder(config, tmp_path)
    assert f'"{kind}"' in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    read = diffusers.read_model_config(tmp_path)
    assert (read.noise, read.prediction, read.vae) == (config.noise, config.prediction, config.vae)
    ours, theirs = (Options().resolved(each) for each in (config, read))
    assert ours == theirs
    assert diffusers.unfollowed(tmp_path) == ()


def test_solvers_with_flow_sigmas_are_of_flow_matching() -> None:
    fields = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for given, shift in (({}, 1.0), ({"flow_shift": 3}, 3.0)):
        schedule, prediction = diffusers_fields.schedule_config(fields | given, "file")
        assert diffusers_fields.noise_config(fields | given, "file") == FlowConfig(shift)
        assert (schedule, prediction) == (ScheduleConfig(), Prediction.FLOW)
    sampling, notes = diffusers_sampling.read(fields, "file", False, False)
    assert Options().resolved(dataclasses.replace(FLOW, sampling=sampling)).sampler == "unipc" and notes == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "use_dynamic_shifting": True,
            },
            "use_dynamic_shifting=true",
        ),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "implemented is EDMEulerScheduler or EDMDPM"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=true"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, 'prediction_type="sample"'),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": None}, "sigma_max=null, which is not implemented"),
    ],
)
def test_a_scheduler_that_is_not_implemented_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        diffusers_fields.schedule_config(fields, "file")


def test_a_mean_of_latents_without_a_deviation_is_refused() -> None:
    fields = diffusers_fields.vae_fields(SDXL_VAE)
    with pytest.raises(InputError, match=r"config.json.latent_mean=\(0.1,\) and latent_std=None. Give 4 numbers"):
        diffusers_fields.vae_config(fields | {"latents_mean": [0.1]}, "config.json")


def test_fields_of_edm_that_are_not_followed_are_noted() -> None:
    given = {"_class_name": "EDMEulerScheduler", "rho": 5.0, "final_sigmas_type": "sigma_min"}
    _, notes = diffusers_sampling.read(given, "file", False, False)
    assert [note.split(", ")[0] for note in notes] == ["file has final_sigmas_type=sigma_min", "file has rho=5.0"]


def opened(marks: dict[str, Any]) -> ModelConfig:
    carried = {("", name): InMemory(np.array(value, np.float32)) for name, value in marks.items()}
    weights = Weights(SDXL_BASE, {}, Origin(SourceLayout.SINGLE_FILE), carried)
    check_noise(marks, Path("file"))
    return with_marks(weights, {}, Path("file"), None, "").config


def test_marks_in_a_single_file_say_its_noise_levels() -> None:
    cosxl = opened({"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": [0.002]})
    assert (cosxl.noise, cosxl.prediction) == (EdmConfig(0.002, 120.0, 1.0), Prediction.V)
    assert Options().resolved(cosxl).sigmas is Sigmas.EXPONENTIAL
    playground = opened(edm_marks(PLAYGROUND))
    assert playground == PLAYGROUND
    assert [Options().resolved(each).guidance for each in (playground, cosxl)] == [3.0, 5.0]
    assert Options(guidance=4.0).resolved(playground).guidance == 4.0
    assert edm_marks(SDXL_BASE) == edm_marks(FLOW) == {}
    assert edm_marks(COSXL).keys() == {"edm_vpred.sigma_max", "edm_vpred.sigma_min"}


@pytest.mark.parametrize("marks", [("edm_mean",), ("edm_mean", "edm_std", "edm_vpred.sigma_max"), ("edm_other",)])
def test_marks_that_do_not_go_together_are_refused(marks: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="marks of EDM noise levels that do not go together"):
        check_noise(marks, Path("file"))
