"""Presets of few-step models: what each samples with, what contradicts it, and how a model's files say it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, random_model

from sdxl_jax.adapters.changes import Lora
from sdxl_jax.commands import parsing
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, Model, ModelConfig
from sdxl_jax.samplers.defaults import SamplingDefaults, Sigmas, Spacing
from sdxl_jax.samplers.presets import PRESETS, listed, named, with_preset
from sdxl_jax.sampling import program
from sdxl_jax.sampling.generate import generate
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import levels_of, plan_segments, prepare
from sdxl_jax.serving.session import Request, fields_of, fields_of_preset, read_fields
from sdxl_jax.weights import lora
from sdxl_jax.weights.formats import diffusers, diffusers_sampling
from sdxl_jax.weights.lazy import Initial, Origin, SourceLayout, Weights, abstract_leaves
from sdxl_jax.weights.parts import with_parts

DISTILLED = dataclasses.replace(SDXL_BASE, distilled=True)


def with_file_preset(name: str, config: ModelConfig = SDXL_BASE) -> ModelConfig:
    return dataclasses.replace(config, sampling=SamplingDefaults(preset=name))


# What a preset samples with

VISITED = {
    "turbo": {1: [999], 2: [999, 499], 3: [999, 666, 332], 4: [999, 749, 499, 249]},
    "lightning": {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]},
    "lcm": {4: [999, 759, 499, 259]},
    "lcm-lora": {4: [999, 759, 499, 259]},
    "hyper-sd": {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]},
    "hyper-sd-unet": {1: [800]},
    "dmd2": {1: [399], 4: [999, 749, 499, 249]},
    "progressive": {1: [999], 8: [999, 874, 749, 624, 499, 374, 249, 124]},
    "dmd": {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]},
    "add": {1: [999], 2: [999, 499], 3: [999, 666, 332], 4: [999, 749, 499, 249]},
}
SAMPLERS = {"turbo": "euler_ancestral", "lightning": "euler", "hyper-sd": "ddim", "progressive": "ddim"}
SAMPLERS["add"] = "euler_ancestral"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_visits_the_timesteps_that_it_was_distilled_for(name: str) -> None:
    config = DISTILLED if name == "lcm" else SDXL_BASE
    for steps, timesteps in VISITED[name].items():
        options = Options(preset=name, steps=steps)
        options.check(config)
        resolved = options.resolved(config)
        assert resolved.sampler == SAMPLERS.get(name, "lcm")
        assert resolved.guidance == 1 and resolved.sigmas is Sigmas.SCHEDULE
        assert levels_of(config, resolved, config.sampling).timestep.tolist() == timesteps
        assert resolved.resolved(config) == resolved
        resolved.check(config)  # what an image's text says, read back with --from-png


def test_steps_and_size_are_the_presets_where_none_are_given() -> None:
    assert Options(preset="dmd2").resolved(SDXL_BASE).steps == 4
    assert Options(preset="hyper-sd-unet").resolved(SDXL_BASE).steps == 1
    assert Options().resolved(SDXL_BASE).steps == 30
    assert prepare(SDXL_BASE, None, Options(preset="turbo")).size == (512, 512)
    assert prepare(SDXL_BASE, None, Options(preset="turbo", height=256)).size == (256, 512)
    assert prepare(SDXL_BASE, None, Options(preset="dmd2")).size == (1024, 1024)


def test_defaults_of_the_base_models_files_give_way_to_a_preset() -> None:
    defaults = SamplingDefaults("dpmpp_2m", Spacing.LINSPACE, sigmas=Sigmas.KARRAS)
    base = dataclasses.replace(SDXL_BASE, sampling=defaults)
    resolved = Options(preset="lightning").resolved(base)
    assert (resolved.sampler, resolved.timestep_spacing, resolved.sigmas) == (
        "euler",
        Spacing.TRAILING,
        Sigmas.SCHEDULE,
    )


def test_guidance_up_to_2_goes_with_an_lcm_lora() -> None:
    guided = Options(preset="lcm-lora", guidance=1.5, steps=4)
    segments, _ = plan_segments(SDXL_BASE, None, guided)
    assert [segment.terms.guided for segment in segments] == [True]


def test_lightning_of_one_step_predicts_x0_and_of_more_steps_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (Options(preset="lightning", steps=steps) for steps in (1, 2))
    assert one.network_of(SDXL_BASE).prediction is Prediction.X0
    assert two.network_of(SDXL_BASE) == Options().network_of(SDXL_BASE) == SDXL_BASE

    class Reached(Exception):
        """The devices' part, with the recipe."""

    def staged(inputs: program.Inputs, recipe: program.Recipe, callback: Any) -> None:
        raise Reached(recipe)

    monkeypatch.setattr(program, "staged", staged)
    with pytest.raises(Reached) as reached:
        generate(random_model(MODEL, 0), ["a"], height=16, width=16, preset="lightning", steps=1)
    assert reached.value.args[0].models[0].prediction is Prediction.X0


# What contradicts it

REFUSED: list[tuple[dict[str, Any], ModelConfig, str]] = [
    ({"preset": "turbi"}, SDXL_BASE, "There is no preset 'turbi'. Known, nearest first: turbo"),
    ({"preset": "turbo", "steps": 30}, SDXL_BASE, "steps=30, but preset=turbo is of weights for 1 to 4 steps"),
    ({"preset": "lightning", "steps": 3}, SDXL_BASE, "is of weights for 1, 2, 4 or 8 steps"),
    ({"preset": "dmd2", "steps": 2}, SDXL_BASE, "is of weights for 1 or 4 steps"),
    ({"preset": "hyper-sd-unet", "steps": 2}, SDXL_BASE, "is of weights for 1 steps"),
    ({"preset": "turbo", "guidance": 2.0}, SDXL_BASE, "guidance=2, but preset=turbo .* guidance in them. Leave it out"),
    ({"preset": "lcm-lora", "guidance": 3.0}, SDXL_BASE, "a scale of up to 2. Leave it out, or set it to 2"),
    (
        {"preset": "turbo", "sampler": "euler"},
        SDXL_BASE,
        "sampler=euler contradicts preset=turbo, whose sampler is eul",
    ),
    ({"preset": "turbo", "timestep_spacing": Spacing.LEADING}, SDXL_BASE, "timestep_spacing=leading contradicts"),
    ({"preset": "dmd2", "timestep_spacing": Spacing.LEADING}, SDXL_BASE, "whose timestep_spacing is its own"),
    ({"preset": "lightning", "sigmas": Sigmas.KARRAS}, SDXL_BASE, "sigmas=karras contradicts"),
    ({"preset": "lightning"}, SD1, "preset=lightning is of weights for SDXL; this model is SD 1.x"),
    ({"preset": "hyper-sd"}, SD2, "of weights for SDXL and SD 1.x; this model is SD 2.x"),
    ({"preset": "lcm-lora"}, SDXL_REFINER, "for models for text to image; this model is SDXL's refiner"),
    ({"preset": "lcm"}, SDXL_BASE, "is for consistency models, .* give preset lcm-lora"),
    ({"preset": "turbo"}, DISTILLED, "samples with euler_ancestral, but this model's files mark it as a consistency"),
    (
        {"preset": "dmd2"},
        dataclasses.replace(SDXL_BASE, prediction=Prediction.V),
        "of weights that predict epsilon; this model predicts v_prediction",
    ),
    (
        {"preset": "lightning"},
        with_file_preset("turbo"),
        "preset=lightning contradicts preset=turbo of the model's files, .* Leave preset out, or give weights of light",
    ),
    ({"preset": "hyper-sd-unet"}, with_file_preset("hyper-sd"), "contradicts preset=hyper-sd of the model's files"),
    ({"steps": 30}, with_file_preset("turbo"), "preset=turbo of the model's files .* Give a sampler to sample it in"),
]


@pytest.mark.parametrize(("given", "config", "message"), REFUSED, ids=[str(given) for given, _, _ in REFUSED])
def test_what_contradicts_a_preset_is_refused(given: dict[str, Any], config: ModelConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**given).check(config)


@pytest.mark.parametrize("kind", [("lcm", "lcm-lora"), ("dmd2", "dmd"), ("turbo", "add")], ids="-".join)
def test_presets_of_one_method_stand_for_each_other(kind: tuple[str, str]) -> None:
    for stated, given in (kind, kind[::-1]):
        config = dataclasses.replace(with_file_preset(stated), distilled="lcm" in kind)
        Options(preset=given).check(config)
        metadata = {"sdxl_jax.sampling": json.dumps({"preset": given})}
        added = lora.add(Model(config, {}), Lora("x.safetensors", {}, metadata=metadata))
        assert added.config.sampling == SamplingDefaults(preset=given)


def test_a_lora_for_another_number_of_steps_is_refused_where_weights_are_of_one_number() -> None:
    def added(preset: str, steps: int) -> SamplingDefaults | None:
        given = {"preset": preset, "steps": steps}
        file = Lora("x.safetensors", {}, metadata={"sdxl_jax.sampling": json.dumps(given)})
        config = dataclasses.replace(SDXL_BASE, sampling=SamplingDefaults(preset=preset, steps=4))
        return lora.add(Model(config, {}), file).config.sampling

    assert added("lightning", 4) == SamplingDefaults(preset="lightning", steps=4)
    assert added("turbo", 1) == SamplingDefaults(preset="turbo", steps=1)
    with pytest.raises(InputError, match=r"of preset lightning with 8 steps .* is of preset lightning with 4 steps"):
        added("lightning", 8)


def test_a_refiner_beside_a_preset_is_refused() -> None:
    with pytest.raises(InputError, match="preset=turbo is of a few-step model, and refiners take many steps"):
        prepare(SDXL_BASE, SDXL_REFINER, Options(preset="turbo"))


def test_numbers_of_steps_in_words() -> None:
    assert [listed(steps) for steps in ((1,), (1, 4), (1, 2, 4), (2, 3, 4))] == ["1", "1 or 4", "1, 2 or 4", "2 to 4"]


# What the files say


def test_names_of_published_weights_are_known_and_those_of_merges_are_not() -> None:
    known = {
        "stabilityai/sdxl-turbo": ("turbo", None),
        "sd_xl_turbo_1.0_fp16": ("turbo", None),
        "sd_xl_turbo, 4 steps": ("turbo", None),
        "SDXL-Lightning": ("lightning", None),
        "sdxl_lightning_4step_lora": ("lightning", 4),
        "sdxl_lightning_1step_x0": ("lightning", 1),
        "sdxl_lightning_3step": ("lightning", None),
        "latent-consistency/lcm-lora-sdxl": ("lcm-lora", None),
        "Hyper-SDXL-8steps-lora": ("hyper-sd", 8),
        "Hyper-SDXL-1step-Unet": ("hyper-sd-unet", None),
        "dmd2_sdxl_4step_unet_fp16": ("dmd2", 4),
        "dmd2_sdxl_1step_unet": ("dmd2", 1),
    }
    assert {name: (named(name).get("preset"), named(name).get("steps")) for name in known} == known
    assert named(None, 3, "Hyper-SDXL-8steps-CFG-lora", "DreamTurbo XL v2", "turbovision", "lightningmix") == {}


@pytest.mark.parametrize(("name", "given"), [("lightning", "lightning"), ("dmd2", "dmd"), ("progressive", None)])
def test_the_number_of_steps_of_the_files_is_the_weights_where_they_are_of_one_number(
    name: str, given: str | None
) -> None:
    config = dataclasses.replace(SDXL_BASE, sampling=SamplingDefaults(preset=name, steps=1))
    assert Options(preset=given).resolved(config).steps == 1
    Options(preset=given, steps=1).check(config)
    with pytest.raises(InputError, match=r"steps=4, but the model's files say .* for 1, .* give the weights of 4"):
        Options(preset=given, steps=4).check(config)
    other = {"sampler": "euler", "timestep_spacing": Spacing.LEADING}
    Options(steps=4, **other).check(config)
    for free in ("turbo", "lcm-lora", "add"):
        any_number = dataclasses.replace(SDXL_BASE, sampling=SamplingDefaults(preset=free, steps=1))
        Options(steps=4).check(any_number)


def test_a_preset_of_the_files_is_a_default_that_options_override() -> None:
    config = with_file_preset("turbo")
    resolved = Options().resolved(config)
    assert (resolved.preset, resolved.sampler, resolved.steps) == ("turbo", "euler_ancestral", 4)
    (note,) = Options().notes(config)
    assert note.startswith("preset turbo, by the model's files")
    others = (Options(sampler="ddim"), Options(timestep_spacing=Spacing.LEADING), Options(sigmas=Sigmas.KARRAS))
    for options in others:
        options.check(config)
        assert (options.resolved(config).preset, options.resolved(config).steps) == (None, 30)
        assert options.notes(config) == []


def test_a_consistency_model_is_sampled_in_four_steps() -> None:
    resolved = Options().resolved(DISTILLED)
    assert (resolved.preset, resolved.sampler, resolved.steps, resolved.guidance) == ("lcm", "lcm", 4, 1)


def test_turbos_scheduler_file_is_known_and_its_neighbours_are_not() -> None:
    fields = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    assert diffusers_sampling.is_turbo(fields, 64, 64)
    assert not diffusers_sampling.is_turbo(fields, 128, 128)
    assert not diffusers_sampling.is_turbo(fields | {"timestep_spacing": "leading"}, 64, 64)
    assert not diffusers_sampling.is_turbo(fields | {"_class_name": "EulerDiscreteScheduler"}, 64, 64)


def folder(path: Path, config: ModelConfig, index: Mapping[str, Any] = {}) -> ModelConfig:
    """The configuration of a diffusers directory of a model, with further fields in its index."""
    diffusers.write_folder(config, path)
    file = path / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return diffusers.read_model_config(path)


def test_a_directory_says_its_preset_by_name_or_by_turbos_scheduler(tmp_path: Path) -> None:
    half = dataclasses.replace(SDXL_BASE, default_size=(512, 512))
    plain = folder(tmp_path / "plain", half)
    assert plain.sampling is None
    said = folder(tmp_path / "named", half, {"_name_or_path": "ByteDance/SDXL-Lightning"})
    assert said == dataclasses.replace(plain, sampling=SamplingDefaults(preset="lightning"))
    # Written with the preset's sampler and spacing, which Turbo is known by again.
    again = folder(tmp_path / "again", with_file_preset("turbo", half)).sampling
    assert again == SamplingDefaults("euler_ancestral", Spacing.TRAILING, preset="turbo")


def test_metadata_of_a_lora_and_another_unet_bring_their_preset() -> None:
    unet = {path: Initial(leaf, path, 0) for path, leaf in abstract_leaves(MODEL, ["unet"]).items()}
    weights = Weights(MODEL, unet, Origin(SourceLayout.PART), noise_is_known=False)
    named_lora = Lora("x.safetensors", {}, metadata={"ss_output_name": "sdxl_lightning_4step_lora"})
    merged = lora.merge(weights, named_lora, 1.0)
    assert merged.config.sampling == SamplingDefaults(preset="lightning", steps=4)
    assert lora.merge(weights, Lora("x.safetensors", {}), 1.0).config == MODEL
    added = lora.add(Model(MODEL, {}), named_lora)
    assert added.config.sampling == SamplingDefaults(preset="lightning", steps=4)
    assert lora.remove(added, "x.safetensors").config == MODEL
    assert with_parts(merged, weights, "there").config.sampling is None, "the preset was of the UNet that is replaced"
    assert with_preset(SamplingDefaults("ddim"), "dmd2") == SamplingDefaults("ddim", preset="dmd2")


def test_a_few_step_lora_of_another_preset_than_the_models_is_refused() -> None:
    """Turbo with a Lightning LoRA, and two few-step LoRAs."""
    lightning, hyper = (Lora(name, {}, metadata={"ss_output_name": name}) for name in ("sdxl_lightning", "hyper-sdxl"))
    base = Model(SDXL_BASE, {})
    for model, second in (
        (base._replace(config=with_file_preset("turbo")), lightning),
        (lora.add(base, lightning), hyper),
    ):
        with pytest.raises(InputError, match=rf"{second.name} is of preset .*Leave the LoRA out"):
            lora.add(model, second)
        weights = Weights(model.config, {}, Origin(SourceLayout.PART))
        with pytest.raises(InputError, match="weights distilled in two ways do not add up"):
            lora.merge(weights, second, 1.0)
    assert lora.add(lora.add(base, lightning), Lora("style", {})).config.sampling == SamplingDefaults(
        preset="lightning"
    )


# Where options are given


def test_a_line_of_json_and_the_page_take_presets() -> None:
    assert parsing.from_mapping(Options(), {"preset": "dmd2"}, "here") == Options(preset="dmd2")
    chosen = fields_of(SDXL_BASE) | {"preset": "turbo"} | fields_of_preset(SDXL_BASE, "turbo") | {"prompt": "a"}
    assert (chosen["steps"], chosen["height"], chosen["guidance"]) == (4, 512, 1)
    request = Request("a", None, Options(preset="turbo"))
    assert read_fields(SDXL_BASE, chosen) == request
    assert read_fields(SDXL_BASE, fields_of(SDXL_BASE, request)) == request
    one = request._replace(options=Options(preset="turbo", steps=1))
    assert read_fields(SDXL_BASE, fields_of(SDXL_BASE, one)) == one
