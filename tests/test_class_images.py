"""Class images: sampled once into a folder that training reads, resumed, and never mixed with others."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from tiny import MODEL, random_model

from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.images import read_image
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.pipeline import open_mixture
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import class_images, samples
from sdxl_jax.evaluation.class_images import sample_class_images
from sdxl_jax.model import Model
from sdxl_jax.sampling.generate import Generated
from sdxl_jax.sampling.options import Options
from sdxl_jax.weights import lora
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.lazy import Origin, SourceLayout, Weights
from sdxl_jax.weights.open import OpenOptions

PROMPT = "a photo of a dog"
OPTIONS = Options(num_images=5, batch_size=2, height=32, width=32, steps=2, seed=3)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a model without weights."""
    weights = Weights(MODEL, {}, Origin(SourceLayout.MEMORY))
    monkeypatch.setattr(class_images, "open_model", lambda *_: weights)
    monkeypatch.setattr(class_images, "load_weights", lambda *_: Model(MODEL, {}))
    return "base.safetensors"


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the images that were sampled, each an even colour that follows from its number."""
    numbers = list[int]()

    def generate(model: Model, prompts: list[str], *, options: Options, **_: Any) -> Generated:
        assert set(prompts) == {PROMPT} and options.num_images == 1
        own = range(options.first_index, options.first_index + len(prompts))
        numbers.extend(own)
        images = [np.full((32, 32, 3), 40 * number % 256, np.uint8) for number in own]
        return Generated(np.stack(images), np.zeros((len(prompts), 4, 4, 4), np.float32))

    monkeypatch.setattr(samples, "generate", generate)
    return numbers


def test_a_folder_is_sampled_once_resumed_enlarged_and_trained_on(
    model: str, sampled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "class"
    assert sample_class_images(model, folder, PROMPT, OPTIONS) == 5
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 6
    for number in (1, 4):
        samples.path_of(folder, number).unlink()
    with pytest.raises(InputError, match=r"no image 000001\.png in the folder"):
        open_folder(folder)
    sampled.clear()
    assert sample_class_images(model, folder, PROMPT, dataclasses.replace(OPTIONS, batch_size=1)) == 2
    assert sampled == [1, 4] and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sample_class_images(model, folder, PROMPT, dataclasses.replace(OPTIONS, num_images=7)) == 2
    source = open_folder(folder)
    assert len(source.paths) == 7 and {source.captions(image) for image in range(7)} == {(PROMPT,)}
    monkeypatch.setattr(class_images, "load_weights", None)  # not called
    assert sample_class_images(model, folder, PROMPT, dataclasses.replace(OPTIONS, num_images=7)) == 0


def test_folders_with_other_images_and_prompts_without_a_class_are_refused(
    model: str, sampled: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "class"
    sample_class_images(model, folder, PROMPT, OPTIONS)
    few, seed = dataclasses.replace(OPTIONS, num_images=4), dataclasses.replace(OPTIONS, seed=4)
    for prompt, options in (("a cat", OPTIONS), (PROMPT, few), (PROMPT, seed)):
        with pytest.raises(InputError, match=r"holds other images, e\.g\. 00000[04]\.png"):
            sample_class_images(model, folder, prompt, options)
    with pytest.raises(InputError, match="holds other images"):
        sample_class_images(model, folder, PROMPT, OPTIONS, opening=OpenOptions(raw=True))
    with pytest.raises(InputError, match="prompt of the class is empty"):
        sample_class_images(model, tmp_path / "new", " ", OPTIONS)
    with pytest.raises(InputError, match="num_images"):
        sample_class_images(model, tmp_path / "new", PROMPT, dataclasses.replace(OPTIONS, num_images=0))
    with pytest.raises(InputError, match="first_index=2 has no effect"):
        sample_class_images(model, tmp_path / "new", PROMPT, dataclasses.replace(OPTIONS, first_index=2))
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metadata.jsonl").write_text('{"file_name": "a.png", "text": "b"}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl has captions of other images"):
        sample_class_images(model, tmp_path / "mine", PROMPT, OPTIONS)


def test_command_samples_and_says_what_was_there(
    model: str, sampled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ("--height", 32, "--width", 32, "--steps", 2, "--num-images", 2)
    for now in (2, 0):
        outcome = call("data", "class-images", model, tmp_path / "class", "--prompt", PROMPT, *size)
        assert outcome.code == 0 and f"2 images of 'a photo of a dog', {now} of them sampled now" in outcome.out
    merged = list[Any]()
    monkeypatch.setattr(lora, "read", lambda path: str(path))
    monkeypatch.setattr(lora, "merge", lambda weights, *given: merged.append(given) or weights)
    with_adapter = ("--prompt", PROMPT, *size, "--lora", "x.safetensors:0.5")
    refused = call("data", "class-images", model, tmp_path / "class", *with_adapter)
    assert refused.code == 2 and "holds other images" in refused.err
    assert call("data", "class-images", model, tmp_path / "other", *with_adapter).code == 0
    assert merged == [("x.safetensors", 0.5)] * 2


@pytest.mark.slow
def test_class_images_of_a_model_are_those_of_sample(tmp_path: Path) -> None:
    convert(random_model(MODEL, 0), tmp_path / "model", "orbax", False)
    options = ("--height", 32, "--width", 32, "--steps", 2, "--num-images", 3, "--seed", 3)
    sample_class_images(tmp_path / "model", tmp_path / "class", PROMPT, dataclasses.replace(OPTIONS, num_images=3))
    assert call("sample", tmp_path / "model", "--prompt", PROMPT, *options, "--out", tmp_path / "out").code == 0
    for number in range(3):
        one, other = (read_image(samples.path_of(tmp_path / name, number)) for name in ("class", "out"))
        np.testing.assert_array_equal(one, other)


def test_a_configured_source_that_is_missing_names_the_command(tmp_path: Path) -> None:
    config = DataConfig(sources=(Source(str(tmp_path / "class")),))
    with pytest.raises(InputError, match=r"class, which does not exist.*`sdxl-jax data class-images MODEL .*/class`"):
        open_mixture(config)
