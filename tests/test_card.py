"""Model cards: every layout has one, and it states what the model is, its source, its licence and how to load it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import command
import foreign
import numpy as np
import pytest
import yaml
from foreign import MODELS, STABLE_1
from test_open import component, make_run

from sdxl_jax.adapters.changes import Lora
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, Adapter, Model, ModelConfig
from sdxl_jax.weights import card
from sdxl_jax.weights.convert import Layout, convert
from sdxl_jax.weights.lazy import in_memory, part_configs
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.open import open_model

SUFFIXES = {Layout.ORBAX: "", Layout.DIFFUSERS: "", Layout.SINGLE_FILE: ".safetensors"}


def converted(source: Any, folder: Path, layout: Layout, name: str = "made") -> tuple[Path, str]:
    """(a conversion, the text of its card)."""
    made = folder / f"{name}{SUFFIXES[layout]}"
    convert(source, made, layout, progress=False)
    return made, card.path_of(made).read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n\n# ", text, re.DOTALL)
    assert found, text
    return yaml.safe_load(found[1])


def model_of(config: ModelConfig) -> Model:
    return Model(config, {part: foreign.part_params(other) for part, other in part_configs(config).items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a licence file, whose config.json names the commit."""
    run = make_run(tmp_path_factory.mktemp("runs") / "my-run", STABLE_1)
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"commit": "0123abcd"}))
    (run / "LICENSE.md").write_text("terms")
    return run


@pytest.mark.parametrize("layout", Layout)
def test_every_layout_has_a_card_with_source_licence_and_ways_to_load(
    run: Path, tmp_path: Path, layout: Layout
) -> None:
    made, text = converted(run, tmp_path, layout)
    fields = front_matter(text)
    libraries = {"orbax": "sdxl_jax", "diffusers": "diffusers", "single-file": "diffusion-single-file"}
    assert fields["library_name"] == libraries[layout.value]
    assert fields["pipeline_tag"] == "text-to-image"
    assert "sdxl_jax" in fields["tags"] and "stable-diffusion" in fields["tags"]
    licence = "made.LICENSE.md" if made.is_file() else "LICENSE.md"
    assert fields["license"] == "other" and fields["license_link"] == licence
    assert (card.path_of(made).parent / licence).read_text() == "terms"
    assert f"Licence files carried over from the source: `{licence}`" in text
    assert "averaged weights (EMA) of the run `my-run` at step 4 of 600000" in text
    assert "at commit 0123abcd" in text
    assert "SD 1.x, of another size than the published one" in text
    assert "Prediction: epsilon" in text and "512 × 512 pixels" in text
    assert f'sdxl_jax.load_model("{made.name}")' in text
    assert f"sdxl-jax sample {made.name} " in text
    assert ("DiffusionPipeline.from_pretrained" in text) == (layout is Layout.DIFFUSERS)
    assert ("models/checkpoints" in text) == (layout is Layout.SINGLE_FILE)
    assert ("ocp.load" in text) == (layout is Layout.ORBAX)
    assert str(tmp_path) not in text and str(run.parent) not in text


@pytest.mark.parametrize("layout", Layout)
def test_a_card_does_not_disturb_the_conversion_back(tmp_path: Path, layout: Layout) -> None:
    source = foreign.single_file(tmp_path / "source.safetensors", STABLE_1, beside=False)
    made, _ = converted(source, tmp_path, layout)
    back, text = converted(made, tmp_path, Layout.SINGLE_FILE, "back")
    first, last = (foreign.contents(path) for path in (source, back))
    assert [last[key.replace("source", "back")] for key in first] == list(first.values())
    assert f"Source: `{made.name}`" in text


def test_the_step_is_that_of_the_checkpoint_that_was_chosen(run: Path, tmp_path: Path) -> None:
    _, text = converted(run / "checkpoints" / "2", tmp_path, Layout.DIFFUSERS)
    assert "of the run `my-run` at step 2 of 600000" in text


def test_parameters_and_dtypes_are_counted_by_part(tmp_path: Path) -> None:
    source = foreign.diffusers_folder(tmp_path / "source", MODELS["SDXL base"], np.dtype("float16"))
    weights = open_model(source)
    _, text = converted(source, tmp_path, Layout.SINGLE_FILE)
    total = 0
    for part in weights.parts:
        leaves = [leaf for path, leaf in weights.leaves.items() if path.startswith(f"{part}/")]
        count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        assert f"Part `{part}`: {count:,} parameters, float16\n" in text
        total += count
    assert f"Together: {total:,} parameters, 0.00 GB" in text
    assert front_matter(text)["tags"][0] == "stable-diffusion-xl"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SDXL_BASE, "SDXL base"),
        (SDXL_REFINER, "SDXL refiner"),
        (SD1, "SD 1.x"),
        (SD2, "SD 2.x"),
        (foreign.inpainting(SDXL_BASE), "SDXL base for inpainting"),
        (MODELS["SDXL base"], "SDXL base, of another size than the published one"),
    ],
)
def test_the_family_is_that_of_the_unet(config: ModelConfig, expected: str) -> None:
    assert card.family(config) == expected


@pytest.mark.parametrize(
    ("part", "layout", "expected"),
    [
        ("unet", Layout.DIFFUSERS, ["from diffusers import UNet2DConditionModel", "The UNet of a model of the family"]),
        ("vae", Layout.DIFFUSERS, ["from diffusers import AutoencoderKL"]),
        ("vae", Layout.SINGLE_FILE, ["`models/vae`", "An autoencoder (KL, latents × 0.13025)"]),
        ("text_encoder_2", Layout.DIFFUSERS, ["from transformers import CLIPTextModelWithProjection"]),
        ("text_encoder", Layout.DIFFUSERS, ["import CLIPTextModel\n"]),
        ("text_encoder", Layout.SINGLE_FILE, ["`models/text_encoders`"]),
    ],
)
def test_a_part_alone_is_loaded_as_such(part: str, layout: Layout, expected: list[str]) -> None:
    whole = in_memory(model_of(MODELS["SDXL base"]))
    leaves = {path: leaf for path, leaf in whole.leaves.items() if path.startswith(f"{part}/")}
    text = card.card(dataclasses.replace(whole, leaves=leaves), layout, "made", [])
    assert all(piece in text for piece in expected), text
    assert "sdxl-jax sample MODEL --parts-from made " in text
    assert "pipeline_tag" not in front_matter(text)


# Licences


def test_without_a_licence_file_the_card_says_so_and_guesses_none(tmp_path: Path) -> None:
    source = component(tmp_path / "vae", STABLE_1.vae)
    _, text = converted(source, tmp_path, Layout.DIFFUSERS)
    assert front_matter(text)["license"] == "other" and "license_link" not in front_matter(text)
    assert "No licence file was found beside the source" in text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("license: openrail++\ntags:\n- a", "openrail++"),
        ('tags:\n- a\nlicense: "mit"', "mit"),
        ("license: other\nlicense_name: x", "other"),
        ("license:\n- mit\n- gpl", "other"),
        ("licence: mit", "other"),
    ],
)
def test_the_licence_that_the_source_states_is_carried_over_without_its_card(
    tmp_path: Path, lines: str, expected: str
) -> None:
    source = component(tmp_path / "vae", STABLE_1.vae)
    (source / "README.md").write_text(f"---\n{lines}\n---\n\n# Another card\n\nlicense: gpl\n")
    made, text = converted(source, tmp_path, Layout.SINGLE_FILE)
    assert front_matter(text)["license"] == expected
    assert "Another card" not in text
    if expected != "other":
        assert f"The model card of the source states the licence `{expected}`" in text
    _, again = converted(made, tmp_path, Layout.DIFFUSERS, "again")
    assert front_matter(again)["license"] == expected


def test_a_licence_is_stated_for_parts_of_two_models_only_if_both_state_it(tmp_path: Path) -> None:
    whole = foreign.diffusers_folder(tmp_path / "whole", STABLE_1)
    vae = component(tmp_path / "other-vae", STABLE_1.vae)
    (whole / "README.md").write_text("---\nlicense: mit\n---\n")
    for number, (licence, expected) in enumerate([("mit", "mit"), ("openrail++", "other")]):
        (vae / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        weights = open_model(whole, parts_from=[vae])
        _, text = converted(weights, tmp_path, Layout.SINGLE_FILE, f"made-{number}")
        assert front_matter(text)["license"] == expected
        assert "Source: `whole`\n- Parts replaced by those of `other-vae`" in text


def test_merged_loras_are_named_and_leave_the_licence_open() -> None:
    model = model_of(STABLE_1)._replace(adapters=(Adapter("style.safetensors", 0.8, Lora("style.safetensors", {})),))
    text = card.card(in_memory(model), Layout.DIFFUSERS, "made", [])
    assert "LoRA merged into the weights: style.safetensors × 0.8" in text


def test_a_licence_file_of_any_name_is_valid_yaml() -> None:
    weights = in_memory(model_of(STABLE_1))
    name = 'a "b": c.license'
    assert front_matter(card.card(weights, Layout.ORBAX, "made", [name]))["license_link"] == name


# Files that are there already


def test_a_card_beside_a_file_replaces_a_card_of_ours_and_no_other_file(tmp_path: Path) -> None:
    source = component(tmp_path / "vae", STABLE_1.vae)
    made, text = converted(source, tmp_path, Layout.SINGLE_FILE)
    made.unlink()
    assert converted(source, tmp_path, Layout.SINGLE_FILE)[1] == text
    made.unlink()
    (tmp_path / "made.md").write_text("my notes")
    with pytest.raises(InputError, match=r"made\.md exists already.*not a model card.*Move it"):
        convert(source, made, Layout.SINGLE_FILE, progress=False)
    assert (tmp_path / "made.md").read_text() == "my notes" and not made.exists()


def test_the_command_writes_a_card_with_the_dtype_of_the_result(run: Path, tmp_path: Path) -> None:
    outcome = command.call("convert", run, tmp_path / "made", "--to", "diffusers", "--dtype", "bfloat16")
    assert outcome.code == 0, outcome
    text = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "parameters, bfloat16" in text
    assert load_model(tmp_path / "made", progress=False).config == STABLE_1
