"""configs/: every recipe of an autoencoder loads, has the published size, fits its mesh, and runs in small."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from PIL import Image

from sdxl_jax import sharding
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.config import load
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import lpips, vae
from sdxl_jax.models.initialisers import Distribution, Parameter, sample
from sdxl_jax.models.layers import count
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.sharding import AXES
from sdxl_jax.smoke import SHRUNK, STEPS, smoke_autoencoder
from sdxl_jax.training.loop import train
from sdxl_jax.training.objectives import adversarial_step, autoencoding, objective_of
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.load import load_model

CONFIGS = Path(__file__).parents[1] / "configs"
AUTOENCODERS = ("sdxl_vae", "sd_kl_f8", "ft_ema", "ft_mse", "decoder_only", "taesd")


@functools.cache
def recipe(name: str) -> AutoencoderConfig:
    return load(CONFIGS / f"{name}.py", AutoencoderConfig)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_recipe_has_the_published_size_and_fits_its_mesh(name: str) -> None:
    config = recipe(name)
    config.check()
    tiny = isinstance(config.vae, TinyVaeConfig)
    assert count(vae.abstract(config.vae)) == (2_445_063 if tiny else 83_653_863)
    devices = math.gcd(config.data.batch_size, 16)
    mesh = AbstractMesh((1, devices, 1, 1), AXES)
    state, frozen = objective_of(config).abstract_state(mesh)  # raises where an axis does not divide
    sharding.check_batch(mesh, config.data.batch_size, config.optimiser.accumulate)
    assert set(state.params["vae"]) == (
        {"decoder"} if "decoder" in config.training.trainable[0] else {"encoder", "decoder"}
    )
    assert "lpips" in frozen


def test_numbers_are_those_of_the_sources() -> None:
    sdxl, kl_f8, ema, mse = (recipe(name) for name in AUTOENCODERS[:4])
    assert [config.data.batch_size for config in (sdxl, kl_f8, ema, mse)] == [256, 9, 192, 192]
    assert [config.training.steps for config in (sdxl, kl_f8, ema, mse)] == [500_000, 246_803, 313_198, 280_000]
    for config in (sdxl, kl_f8):
        assert config.discriminator is not None
        assert (config.discriminator.start_step, config.discriminator.weight) == (50_001, 0.5)
        assert (config.loss.perceptual_weight, config.loss.kl_weight) == (1.0, 1e-6)
        assert config.optimiser.numbers()[:2] == (0.5, 0.9)
    assert kl_f8.optimiser.learning_rate == pytest.approx(4.05e-5)
    assert (mse.loss.pixel.value, mse.loss.perceptual_weight, mse.discriminator) == ("l2", 0.1, None)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_smoke_configuration_differs_in_sizes_only(name: str) -> None:
    full, small = recipe(name), load(CONFIGS / "smoke" / f"{name}.py", AutoencoderConfig)
    small.check()
    assert {line.split(":", 1)[0] for line in differences(to_json(full), to_json(small))} <= set(SHRUNK)
    assert (small.loss, small.ema, small.compute) == (full.loss, full.ema, full.compute)


@pytest.fixture
def _small_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted squares in place of VGG16."""
    monkeypatch.setattr(lpips, "abstract", lambda backbone: {"layer": {"scale": Parameter((3,), Distribution(1.0))}})
    monkeypatch.setattr(autoencoding, "check_lpips", lambda: None)
    monkeypatch.setattr(autoencoding, "lpips_parameters", lambda: {"layer": {"scale": np.ones(3, np.float32)}})
    distance = lambda backbone, params, x, y: ((x - y) ** 2 @ params["layer"]["scale"]).mean((1, 2))  # noqa: E731
    monkeypatch.setattr(adversarial_step, "perceptual_distance", distance)


def initial_autoencoder(config: AutoencoderConfig, root: Path) -> None:
    """Random weights at the path that a smoke configuration starts from."""
    (path,) = map(Path, config.training.init_from)
    leaves = flatten(vae.abstract(config.vae))
    params: Any = unflatten({name: sample(leaf, 1, name) for name, leaf in leaves.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(config.vae, TinyVaeConfig):
        params = {"encoder": params["encoder"]}
    convert(Model(ModelConfig(vae=config.vae), {"vae": params}), root / "made.safetensors", "single-file", False)
    (root / "made.safetensors").replace(path)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_lpips")
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_smoke_configuration_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = smoke_autoencoder(recipe(name), "smoke")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, min_size=1))
    folder = Path(config.data.folder or "")
    folder.mkdir(parents=True)
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    if config.training.init_from:
        initial_autoencoder(config, tmp_path)
    train(config, Path("run"), progress=False)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    if config.discriminator is not None:
        assert [line["discriminator"] > 0 for line in lines] == [False, True, True]
    assert list(Path("run/samples").glob("*.png"))
    assert set(load_model("run", progress=False).params) == {"vae"}


@pytest.mark.parametrize("name", ["sdxl_vae", "taesd"])
def test_recipe_without_the_weights_of_lpips_is_refused_before_work_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = recipe(name)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, init_from=()))
    with pytest.raises(InputError, match=r"weights of lpips_vgg are missing.*evaluate --fetch-weights"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
