"""The quickstart's images and autoencoder, prompt accuracy, and (slow) the accuracy that it reaches."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sdxl_jax import arrays
from sdxl_jax.data.buckets import Bucket, assign
from sdxl_jax.data.folders import open_folder
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.models import vae
from sdxl_jax.quickstart import autoencoder, recipe, run, student
from sdxl_jax.sampling.options import Options
from sdxl_jax.training.objectives import objective_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked training images."""
    folder = tmp_path_factory.mktemp("images")
    with zipfile.ZipFile(run.IMAGES_ZIP) as archive:
        archive.extractall(folder)
    return folder


def test_embedded_images_fill_three_buckets_evenly_and_carry_their_licence(folder: Path):
    source = open_folder(folder, verify=True)
    counts = np.bincount(assign(source.sizes, tuple(run.SCORED)).bucket, minlength=3)
    assert counts.tolist() == [32, 32, 32]
    assert len({source.captions(image) for image in range(len(source.sizes))}) == 60
    assert "MIT License" in (folder / "LICENSE").read_text()
    assert "MIT License" in run.IMAGES_ZIP.with_name("PICTURES.md").read_text()


def test_images_come_in_many_original_sizes(folder: Path):
    longest = open_folder(folder).sizes.max(axis=1)
    assert longest.min() < 60
    assert longest.max() > 240


@pytest.mark.slow
def test_shipped_autoencoder_is_small_and_reconstructs_the_images(folder: Path):
    """PSNR of 28 dB on average over a quarter of them, where differences are hard to see. Measured 29.7 over all."""
    assert autoencoder.WEIGHTS.stat().st_size < 5_000_000
    config, params = autoencoder.load()
    for examples in run.training_images(folder).values():
        images = examples.images[::4]
        latent = vae.encode(config, params, arrays.normalise(images)).mean * config.scale
        reconstructed = np.asarray(arrays.to_bytes(vae.decode(config, params, latent)), np.float64)
        error = np.square(reconstructed - images).mean(axis=(1, 2, 3))
        assert np.mean(10 * np.log10(255**2 / error)) > 28
        # The noise schedule assumes unit variance over all buckets; a single bucket may be a little off.
        assert 0.8 < float(latent.std()) < 1.2


@pytest.mark.slow
def test_autoencoder_training_writes_weights_that_load(folder: Path, tmp_path: Path):
    few = tmp_path / "few"
    few.mkdir()
    lines = [line for line in (folder / "metadata.jsonl").read_text().splitlines() if "taco" in line]
    for line in lines:
        name = json.loads(line)["file_name"]
        (few / name).write_bytes((folder / name).read_bytes())
    (few / "metadata.jsonl").write_text("\n".join(lines))
    config = autoencoder.train_autoencoder(few, tmp_path / "run", tmp_path / "weights.safetensors", steps=2)
    loaded, params = autoencoder.load(tmp_path / "weights.safetensors")
    assert loaded == config
    assert np.isfinite(params["decoder"]["conv_out"]["kernel"]).all()


def test_recipe_is_a_valid_model():
    config = recipe.get_config()
    config.model.check()
    assert len(config.data.buckets) >= 3
    assert len(config.model.text) == 2


def test_the_student_is_sampled_with_four_steps_and_no_guidance(tmp_path: Path):
    config = student.get_config(tmp_path, recipe.get_config(), run.GUIDANCE)
    objective = objective_of(config)
    objective.config.check()
    chosen = Options().resolved(objective.model_config)
    assert (chosen.sampler, chosen.steps, chosen.guidance) == ("lcm", 4, 1)


def test_prompt_accuracy_is_one_for_the_training_images_and_none_for_wrong_captions(folder: Path):
    for images, captions in run.training_images(folder).values():
        assert all(hits(images, captions, images, captions))
        others = [next(other for other in captions if other != caption) for caption in captions]
        assert not any(hits(images, others, images, captions))


def test_prompt_accuracy_of_noise_is_about_chance(folder: Path):
    """One caption in twenty: noise is nearest to the same one or two images, whatever the prompt."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), np.uint8)
    images, captions = run.training_images(folder)[Bucket(*recipe.BUCKETS[1])]
    prompts = sorted(set(captions)) * 3
    assert np.mean(hits(noise, prompts, images, captions)) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_reaches_75_percent_prompt_accuracy(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run.quickstart(tmp_path / "run", seed=seed)
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if "prompt accuracy" in line)
    trained, untrained = (float(part.split("%")[0].split()[-1]) for part in accuracy.split("untrained"))
    assert trained >= 75
    assert untrained <= 20
