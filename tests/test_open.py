"""The layout of a path is detected: every layout, every naming, every way in which a file can be wrong.

All on tiny random models; those of full size are detected from names and shapes alone.
"""

import dataclasses
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign
import jax
import numpy as np
import pytest
from foreign import BASE, MODELS, STABLE_1, STABLE_2
from jax.sharding import AbstractMesh, AxisType
from orbax.checkpoint import v1 as ocp

from sdxl_jax import config as configuration
from sdxl_jax import sharding
from sdxl_jax.arrays import flatten
from sdxl_jax.conditioning.text import ContextState, Tower
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.continuous import EdmConfig, FlowConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models.clip import CLIP_BIGG, CLIP_H, CLIP_L, ClipTextConfig
from sdxl_jax.models.initialisers import Distribution, Parameter, sample
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.sampling.options import Options
from sdxl_jax.weights import detect, lazy, names
from sdxl_jax.weights.convert import Layout, convert
from sdxl_jax.weights.formats import diffusers, safetensors
from sdxl_jax.weights.lazy import (
    Cast,
    FirstLayers,
    FromTensors,
    Initial,
    InMemory,
    Origin,
    SourceLayout,
    Weights,
    part_configs,
)
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.names import Dialect, Naming, PartConfig
from sdxl_jax.weights.open import OpenOptions, open_model


def short(value: object) -> str:
    """The id of a test's parameter."""
    if isinstance(value, Naming):
        return f"{value.dialect.value}{'-convolutions' if value.conv_attention else ''}-{value.prefix or 'bare'}"
    return type(value).__name__.removesuffix("Config")


PARTIAL = OpenOptions(allow_partial=True)
UNET, VAE, QUICK, GELU = BASE.unet, BASE.vae, BASE.text[0].clip, BASE.text[1].clip


def assert_holds(opened: Weights, config: ModelConfig, dtype: Any = np.float32, **seeds: int) -> None:
    """Just the parts of the configuration, with the numbers of `foreign`. seeds: of parts that have others than 0."""
    expected = part_configs(config)
    assert opened.parts == tuple(expected)
    for part, part_config in expected.items():
        assert_part_holds(opened, part, part_config, dtype, seeds.get(part, 0))


def assert_part_holds(opened: Weights, part: str, config: foreign.Part, dtype: Any = np.float32, seed: int = 0) -> None:
    params = flatten(foreign.part_params(config, dtype, seed))
    found = {path: leaf for path, leaf in opened.leaves.items() if path.startswith(f"{part}/")}
    assert list(found) == [f"{part}/{path}" for path in params]
    for path, value in params.items():
        leaf = found[f"{part}/{path}"]
        assert leaf.dtype == np.dtype(dtype), path
        assert leaf.read().tobytes() == value.tobytes(), path


def component(folder: Path, part_config: foreign.Part, *arrays: foreign.Arrays, dtype: Any = np.float32) -> Path:
    """One network's directory as diffusers writes it; further tensors beside it."""
    diffusers.write_component(part_config, folder)
    naming = DIALECTS[type(part_config)][0]
    stored = foreign.tensors(part_config, naming, dtype)
    for more in arrays:
        stored |= more
    part = "text_encoder" if isinstance(part_config, ClipTextConfig) else "unet"
    foreign.save(folder / f"{foreign.weights_name(part)}.safetensors", stored, {"format": "pt"})
    return folder


DIALECTS: dict[type, tuple[Naming, ...]] = {
    UNetConfig: (
        Naming(Dialect.DIFFUSERS),
        Naming(Dialect.ORIGINAL, "model.diffusion_model."),
        Naming(Dialect.ORIGINAL),
    ),
    VaeConfig: (
        Naming(Dialect.DIFFUSERS),
        Naming(Dialect.DIFFUSERS_OLD),
        Naming(Dialect.DIFFUSERS, conv_attention=True),
        Naming(Dialect.DIFFUSERS_OLD, conv_attention=True),
        Naming(Dialect.ORIGINAL, "first_stage_model.", conv_attention=True),
        Naming(Dialect.ORIGINAL, conv_attention=True),
        Naming(Dialect.ORIGINAL),
    ),
    TinyVaeConfig: (Naming(Dialect.DIFFUSERS),),
    ClipTextConfig: (
        Naming(Dialect.TRANSFORMERS),
        Naming(Dialect.TRANSFORMERS, "cond_stage_model.transformer."),
        Naming(Dialect.TRANSFORMERS_5),
        Naming(Dialect.TRANSFORMERS_5, "cond_stage_model.transformer."),
        Naming(Dialect.OPENCLIP),
        Naming(Dialect.OPENCLIP, "conditioner.embedders.1.model."),
    ),
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL and SD 2.x in every layout, to be read only."""
    home = tmp_path_factory.mktemp("home")
    foreign.single_file(home / "base.safetensors", BASE)
    foreign.diffusers_folder(home / "base", BASE)
    foreign.single_file(home / "two.safetensors", STABLE_2)
    foreign.diffusers_folder(home / "two", STABLE_2)
    convert(open_model(home / "base"), home / "base.orbax", Layout.ORBAX, progress=False)
    make_run(home / "run", BASE)
    return home


def make_run(folder: Path, config: ModelConfig, steps: tuple[int, ...] = (2, 4)) -> Path:
    """A run directory: the UNet was trained, its average has the seed of the step; the rest is frozen."""
    saved = configuration.to_json(TrainConfig(data=DataConfig(folder="images"), model=config))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": saved}))
    for step in steps:
        state = {"step": np.array(step), "ema": {"unet": foreign.part_params(config.unet, seed=step)}}
        state["params"] = {"unet": foreign.part_params(config.unet, seed=99)}
        ocp.save(str(folder / "checkpoints" / str(step)), state)
    frozen = {part: foreign.part_params(other) for part, other in part_configs(config).items() if part != "unet"}
    ocp.save(str(folder / "frozen"), frozen)
    return folder


# Detection


@pytest.mark.parametrize("dtype", foreign.DTYPES)
@pytest.mark.parametrize("name", ["SDXL base", "SD 1.x"])
def test_single_file_is_detected_with_its_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", MODELS[name], foreign.DTYPES[dtype])
    opened = open_model(path)
    assert opened.config == MODELS[name]
    assert_holds(opened, MODELS[name], foreign.DTYPES[dtype])


@pytest.mark.parametrize("name", ["SDXL refiner", "SDXL inpainting", "SD 1.x inpainting", "SD 2.x v"])
def test_single_file_of_other_families_is_detected(tmp_path: Path, name: str) -> None:
    opened = open_model(foreign.single_file(tmp_path / "model.safetensors", MODELS[name]))
    assert opened.config == MODELS[name]
    assert_holds(opened, MODELS[name])


@pytest.mark.parametrize("name", ["SDXL base", "SDXL refiner", "SD 1.x inpainting", "SD 2.x v"])
def test_diffusers_directory_is_read(tmp_path: Path, name: str) -> None:
    opened = open_model(foreign.diffusers_folder(tmp_path / "model", MODELS[name]))
    assert opened.config == diffusers.as_diffusers_has_it(MODELS[name])
    assert_holds(opened, opened.config)


def test_orbax_checkpoint_is_read(home: Path) -> None:
    opened = open_model(home / "base.orbax")
    assert opened.config == BASE
    assert_holds(opened, BASE)


def test_run_directory_gives_the_newest_average_and_what_was_frozen(home: Path) -> None:
    opened = open_model(home / "run")
    assert opened.config == BASE
    assert_holds(opened, BASE, unet=4)


def test_checkpoint_of_a_run_is_that_of_its_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_holds(open_model(home / "run" / "checkpoints" / "2"), BASE, unet=2)
    monkeypatch.chdir(home / "run" / "checkpoints")
    assert_holds(open_model("2"), BASE, unet=2)


def test_model_is_loaded_with_the_numbers_of_its_file(home: Path) -> None:
    model = load_model(home / "base", progress=False)
    assert model.config == BASE
    for part, config in part_configs(BASE).items():
        jax.tree.map(np.testing.assert_array_equal, model.params[part], foreign.part_params(config))


@pytest.mark.parametrize(
    ("config", "naming"), [(c, n) for c in (UNET, VAE, QUICK, GELU) for n in DIALECTS[type(c)]], ids=short
)
def test_network_alone_is_found_out_in_every_naming(tmp_path: Path, config: PartConfig, naming: Naming) -> None:
    opened = open_model(foreign.save(tmp_path / "alone.safetensors", foreign.tensors(config, naming)))
    (part,) = opened.parts
    found = part_configs(opened.config)[part]
    if isinstance(config, ClipTextConfig):  # of an unknown width, which does not determine the activation
        assert isinstance(found, ClipTextConfig)
        found = dataclasses.replace(found, activation=config.activation)
    assert found == config
    assert_part_holds(opened, part, config)


@pytest.mark.parametrize("naming", DIALECTS[ClipTextConfig][::2], ids=short)
def test_text_encoder_beside_its_configuration_is_as_that_says(tmp_path: Path, naming: Naming) -> None:
    path = foreign.save(tmp_path / "alone.safetensors", foreign.tensors(GELU, naming))
    diffusers.write_component(GELU, tmp_path)
    opened = open_model(path)
    assert part_configs(opened.config)[opened.parts[0]] == GELU


def test_file_alone_is_as_the_configuration_beside_it_says(tmp_path: Path) -> None:
    config = dataclasses.replace(VAE, scale=0.5, groups=16)
    opened = open_model(component(tmp_path / "vae", config) / "diffusion_pytorch_model.safetensors")
    assert opened.config.vae == config
    assert opened.scale_is_known


def test_another_networks_configuration_beside_a_file_is_passed_over(tmp_path: Path) -> None:
    component(tmp_path / "tower", GELU)
    path = foreign.save(tmp_path / "tower" / "vae.safetensors", foreign.tensors(VAE, Naming(Dialect.DIFFUSERS)))
    opened = open_model(path)
    assert opened.config.vae == VAE
    assert not opened.scale_is_known


@pytest.mark.parametrize("config", [UNET, VAE, QUICK, GELU, STABLE_1.unet, STABLE_1.vae], ids=short)
def test_directory_of_one_network_is_read(tmp_path: Path, config: PartConfig) -> None:
    opened = open_model(component(tmp_path / "alone", config))
    (part,) = opened.parts
    assert part_configs(opened.config)[part] == config
    assert_part_holds(opened, part, config)


@pytest.mark.parametrize("dialect", [Dialect.TRANSFORMERS_5, Dialect.DIFFUSERS_OLD, Dialect.DIFFUSERS])
def test_diffusers_directory_may_have_any_naming(tmp_path: Path, dialect: Dialect) -> None:
    part = "text_encoder" if dialect is Dialect.TRANSFORMERS_5 else "vae"
    naming = Naming(dialect, conv_attention=dialect is Dialect.DIFFUSERS)
    path = foreign.diffusers_folder(tmp_path / "model", STABLE_1, namings={part: naming})
    opened = open_model(path)
    assert opened.origin.namings[part] == naming
    assert_holds(opened, STABLE_1)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "unet", "vae"])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_with_an_index_are_one_model(tmp_path: Path, home: Path, name: str, variant: str) -> None:
    """As diffusers and transformers split them: the index of a variant has its name elsewhere than its shards."""
    config, stem = part_configs(BASE)[name], foreign.weights_name(name)
    naming = foreign.diffusers_namings(BASE)[name]
    diffusers.write_component(config, tmp_path, BASE.micro)
    file = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    index = foreign.shard(foreign.save(tmp_path / file, foreign.tensors(config, naming)), 3, variant)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert index.name == f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    opened = open_model(tmp_path)
    assert_part_holds(opened, opened.parts[0], config)


# Variants


def with_variants(folder: Path, *variants: str) -> Path:
    """A VAE with files of these variants, whose seeds are 1, 2, …; "" is that without."""
    diffusers.write_component(VAE, folder)
    for seed, variant in enumerate(variants, 1):
        file = f"diffusion_pytorch_model.{variant}.safetensors" if variant else "diffusion_pytorch_model.safetensors"
        foreign.save(folder / file, foreign.tensors(VAE, Naming(Dialect.DIFFUSERS), seed=seed))
    return folder


def test_files_without_a_variant_are_the_default(tmp_path: Path) -> None:
    folder = with_variants(tmp_path, "fp16", "", "non_ema")
    assert_part_holds(open_model(folder), "vae", VAE, seed=2)
    assert_part_holds(open_model(folder, OpenOptions(variant="fp16")), "vae", VAE, seed=1)
    assert_part_holds(open_model(folder, OpenOptions(variant="non_ema")), "vae", VAE, seed=3)


def test_only_a_run_has_raw_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--weights raw has no effect on .*, which is not a training run"):
        open_model(with_variants(tmp_path, ""), OpenOptions(raw=True))


def test_the_only_variant_is_the_default(tmp_path: Path) -> None:
    assert_part_holds(open_model(with_variants(tmp_path, "fp16")), "vae", VAE, seed=1)


def test_several_variants_without_a_default_are_refused_with_their_names(tmp_path: Path) -> None:
    folder = with_variants(tmp_path, "fp16", "non_ema")
    with pytest.raises(InputError, match=r"several variants, fp16, non_ema\. Choose one: give --variant NAME \(in"):
        open_model(folder)
    with pytest.raises(InputError, match=r"no variant bf16\. Give one of those that it has: fp16, non_ema"):
        open_model(folder, OpenOptions(variant="bf16"))


def test_part_without_the_variant_gives_what_it_has_and_that_is_said(tmp_path: Path) -> None:
    folder = foreign.diffusers_folder(tmp_path / "model", BASE)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(vae, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    opened = open_model(folder, OpenOptions(variant="fp16"))
    assert len([note for note in opened.notes if "has no variant fp16; its files without" in note]) == 3
    with pytest.raises(InputError, match=r"no variant bf16\. Give one of those that it has: "):
        open_model(folder, OpenOptions(variant="bf16"))


# Full size, by names and shapes


def shapes(config: foreign.Part, naming: Naming) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for entry in names.table(foreign.with_weights(config), naming).entries}


FULL = {
    "SDXL base": SDXL_BASE,
    "SDXL refiner": SDXL_REFINER,
    "SDXL inpainting": foreign.inpainting(SDXL_BASE),
    "SD 1.x": SD1,
    "SD 1.x inpainting": foreign.inpainting(SD1),
    "SD 2.x": SD2,
    "SD 2.x inpainting": foreign.inpainting(SD2),
}


@pytest.mark.parametrize(
    "name", [name if name in ("SDXL base", "SD 2.x") else pytest.param(name, marks=pytest.mark.slow) for name in FULL]
)
def test_published_model_is_detected_from_names_and_shapes(name: str) -> None:
    found: dict[str, tuple[int, ...]] = {"model_ema.decay": (), "alphas_cumprod": (1000,)}
    namings = foreign.original(FULL[name])
    for part, config in part_configs(FULL[name]).items():
        found |= shapes(config, namings[part])
    config, parts = detect.assemble(detect.find(found))
    assert config == FULL[name]
    assert {part: place.naming for part, place in parts.items()} == namings


ALONE = {
    "SDXL UNet": ("unet", SDXL_BASE.unet, SDXL_BASE),
    "refiner UNet": ("unet", SDXL_REFINER.unet, SDXL_REFINER),
    "inpainting UNet": ("unet", FULL["SDXL inpainting"].unet, FULL["SDXL inpainting"]),
    "SD 1.x UNet": ("unet", SD1.unet, SD1),
    "SD 2.x UNet": ("unet", SD2.unet, SD2),
    "VAE": ("vae", SDXL_BASE.vae, SDXL_BASE),
    "CLIP-L": ("text_encoder", CLIP_L, SDXL_BASE),
    "ViT-H": ("text_encoder", CLIP_H, SD2),
    "bigG": ("text_encoder_2", CLIP_BIGG, SDXL_BASE),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("refiner UNet", "inpainting UNet", "SD 1.x UNet")
        else name
        for name in ALONE
    ],
)
def test_published_network_alone_is_told_in_every_naming(name: str) -> None:
    part, config, expected = ALONE[name]
    for naming in DIALECTS[type(config)]:
        found = detect.find(shapes(config, naming))
        assembled, parts = detect.assemble(found)
        assert parts == {part: detect.FoundPart(config, naming)}
        assert assembled == expected


def test_vit_h_without_its_last_layer_is_read_at_its_last() -> None:
    """As diffusers has SD 2.x."""
    short = dataclasses.replace(CLIP_H, layers=23, projection_dim=None)
    config = detect.assemble(detect.find(shapes(short, Naming(Dialect.TRANSFORMERS))))[0]
    assert config.text == (Tower("text_encoder", short, SD2.text[0].pad_token, ContextState.LAST),)
    without = dataclasses.replace(CLIP_H, projection_dim=None)
    config = detect.assemble(detect.find(shapes(without, Naming(Dialect.OPENCLIP))))[0]
    assert config.text[0].context is ContextState.PENULTIMATE_NORMED


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda found: found.pop("conv_in.weight"), "like those of a UNet in the naming of diffusers.*conv_in.weight"),
        (lambda found: found.update({"more.time_embed.0.weight": (4, 4)}), "UNet in the naming of original"),
        (lambda found: found.update({"token_embedding.weight": (4,)}), "ClipText in the naming of openclip"),
    ],
)
def test_tensors_that_do_not_make_a_network_are_refused(change: Callable[[Any], object], expected: str) -> None:
    found = shapes(UNET, Naming(Dialect.DIFFUSERS))
    change(found)
    with pytest.raises(InputError, match=expected):
        detect.find(found)


def test_two_networks_of_one_kind_are_refused() -> None:
    found = shapes(VAE, Naming(Dialect.DIFFUSERS, "a.")) | shapes(VAE, Naming(Dialect.ORIGINAL, "b."))
    with pytest.raises(InputError, match="2 networks, with the prefixes"):
        detect.assemble(detect.find(found))
    towers = shapes(QUICK, Naming(Dialect.TRANSFORMERS, "a.")) | shapes(GELU, Naming(Dialect.OPENCLIP, "b."))
    with pytest.raises(InputError, match=r"2 text encoders, but a model with its UNet has 1. Give"):
        detect.assemble(detect.find(towers | shapes(STABLE_1.unet, DIALECTS[UNetConfig][1])))


# What the UNet predicts


@pytest.fixture(scope="module")
def two(home: Path) -> foreign.Arrays:
    arrays = foreign.read(home / "two.safetensors")
    return {name: array for name, array in arrays.items() if name != "v_pred"}


NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(("spread", "prediction", "size"), [(0.05, Prediction.EPSILON, 512), (0.15, Prediction.V, 768)])
def test_prediction_of_sd2_is_detected_by_the_spread_of_a_norm(
    tmp_path: Path, two: foreign.Arrays, spread: float, prediction: Prediction, size: int
) -> None:
    bias = np.tile(np.array([spread, -spread], np.float32), 16)
    opened = open_model(foreign.save(tmp_path / "two.safetensors", two | {NORM: bias}))
    assert opened.config.prediction is prediction
    assert opened.config.default_size == (size, size)
    assert any("--prediction overrides it" in note and prediction.value in note for note in opened.notes)
    given = open_model(tmp_path / "two.safetensors", OpenOptions(prediction=Prediction.X0))
    assert given.config.prediction is Prediction.X0


def test_prediction_is_detected_by_a_mark_or_by_metadata(tmp_path: Path, two: foreign.Arrays) -> None:
    mark = {"v_pred": np.zeros(0, np.float32)}
    marked = open_model(foreign.save(tmp_path / "mark.safetensors", two | mark))
    said = open_model(foreign.save(tmp_path / "said.safetensors", two, {"modelspec.prediction_type": "v"}))
    for opened in (marked, said):
        assert opened.config.prediction is Prediction.V
        assert opened.config.default_size == (768, 768)
        assert not opened.config.schedule.zero_terminal_snr
    bias = np.tile(np.array([0.15, -0.15], np.float32), 16)
    epsilon = {"modelspec.prediction_type": "epsilon"}
    opened = open_model(foreign.save(tmp_path / "epsilon.safetensors", two | {NORM: bias}, epsilon))
    assert opened.config.prediction is Prediction.EPSILON


def test_mark_of_zero_terminal_snr_is_heeded(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    foreign.edit(path, lambda t: t.update(v_pred=np.zeros(0, np.float32), ztsnr=np.zeros(0, np.float32)))
    config = open_model(path).config
    assert config.prediction is Prediction.V
    assert config.schedule.zero_terminal_snr


@pytest.mark.parametrize("where", ["base", "base.safetensors", "base.orbax", "run", "base/unet"])
def test_user_has_the_last_word_on_the_prediction(home: Path, where: str) -> None:
    assert open_model(home / where, OpenOptions(prediction=Prediction.V)).config.prediction is Prediction.V


# Parts from elsewhere


def test_part_from_elsewhere_takes_its_place(home: Path, tmp_path: Path) -> None:
    folder = with_variants(tmp_path / "vae", "")
    opened = open_model(home / "base", parts_from=[folder])
    assert_holds(opened, BASE, vae=1)
    loaded = load_model(home / "base", parts_from=[folder], progress=False)
    expected = foreign.part_params(VAE, seed=1)
    jax.tree.map(np.testing.assert_array_equal, loaded.params["vae"], expected)


def test_last_of_several_wins_and_a_network_alone_is_completed(home: Path, tmp_path: Path) -> None:
    other = foreign.single_file(tmp_path / "other.safetensors", STABLE_1, seed=5)
    opened = open_model(component(tmp_path / "unet", STABLE_1.unet), parts_from=[other, home / "two" / "vae"])
    assert opened.config == STABLE_1
    assert_holds(opened, STABLE_1, unet=5, vae=0, text_encoder=5)


def test_scale_stays_where_the_autoencoder_does_not_tell_its_own(home: Path, tmp_path: Path) -> None:
    alone = foreign.save(tmp_path / "vae.safetensors", foreign.tensors(VAE, Naming(Dialect.ORIGINAL)))
    assert open_model(home / "two", parts_from=[alone]).config.vae.scale == STABLE_2.vae.scale
    scaled = component(tmp_path / "vae", dataclasses.replace(VAE, scale=0.5))
    assert open_model(home / "two", parts_from=[scaled]).config.vae.scale == 0.5


@pytest.mark.parametrize("alone", ["directory", "diffusers file", "original file"])
def test_prediction_stays_where_the_unet_does_not_tell_its_own(tmp_path: Path, alone: str) -> None:
    config = dataclasses.replace(BASE, prediction=Prediction.V)
    path = foreign.diffusers_folder(tmp_path / "model", config)
    if alone == "directory":
        other = component(tmp_path / "unet", UNET)
    else:
        naming = DIALECTS[UNetConfig][alone == "original file"]
        other = foreign.save(tmp_path / "unet.safetensors", foreign.tensors(UNET, naming))
    assert open_model(path, parts_from=[other]).config.prediction is Prediction.V


def test_marks_and_averages_of_a_replaced_unet_are_left_out(home: Path, tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "v.safetensors", dataclasses.replace(BASE, prediction=Prediction.V))
    assert ("", "v_pred") in open_model(path).carried
    opened = open_model(path, parts_from=[home / "base.safetensors"])
    assert opened.config.prediction is Prediction.EPSILON
    assert [name for _, name in opened.carried] == ["alphas_cumprod"]


class _Named:
    """A leaf that is never read."""

    def __init__(self, leaf: Any):
        self.shape, self.dtype = tuple(leaf.shape), np.dtype(leaf.dtype)

    def read(self, index: Any = None) -> np.ndarray:
        raise AssertionError("read")


def unread(config: ModelConfig, *parts: str) -> Weights:
    leaves = {
        f"{part}/{path}": _Named(leaf)
        for part in parts
        for path, leaf in names.abstract(part_configs(config)[part]).items()
    }
    return Weights(config, leaves, Origin(SourceLayout.PART))


def test_text_encoder_of_sd2_brings_along_which_layer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last layer it is read before that, without it at its last."""
    whole = unread(SD2, "text_encoder")
    short = unread(diffusers.as_diffusers_has_it(SD2), "text_encoder")
    found = {"whole": whole, "short": short}
    monkeypatch.setattr("sdxl_jax.weights.open._open", lambda path, options: found[str(path)])
    assert open_model("whole", parts_from=["short"]).config == short.config
    assert open_model("short", parts_from=["whole"]).config == whole.config


def test_directory_of_sd2s_text_encoder_is_read_at_its_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = diffusers.as_diffusers_has_it(SD2)
    diffusers.write_component(short.text[0].clip, tmp_path)
    clip = short.text[0].clip
    found = shapes(clip, Naming(Dialect.TRANSFORMERS)).items()
    stored = {name: safetensors.Tensor(name, shape, np.dtype("float32"), None, tmp_path) for name, shape in found}
    monkeypatch.setattr("sdxl_jax.weights.open._weight_files", lambda folder, variant: stored)
    assert open_model(tmp_path).config == short


def test_part_without_a_place_is_refused(home: Path, tmp_path: Path) -> None:
    folder = component(tmp_path / "tower", GELU)
    (tower,) = open_model(folder).parts
    assert tower == "text_encoder"
    refiner = foreign.single_file(tmp_path / "refiner.safetensors", MODELS["SDXL refiner"], beside=False)
    with pytest.raises(
        InputError, match=r"holds text_encoder, which the model has no place for\. It has unet, vae, text"
    ):
        open_model(refiner, parts_from=[folder])
    with pytest.raises(InputError, match=r"model\.unet\.context_dim=8.*a width of 16"):
        open_model(
            home / "base",
            parts_from=[
                foreign.save(tmp_path / "u.safetensors", foreign.tensors(STABLE_1.unet, Naming(Dialect.DIFFUSERS)))
            ],
        )


# Reading parts of parameters


def random_index(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[slice, ...]:
    bounds = [(start, int(rng.integers(start, size)) + 1) for size in shape for start in [int(rng.integers(size))]]
    return tuple(
        slice(
            None if start == 0 and rng.random() < 0.5 else start, None if stop == size and rng.random() < 0.5 else stop
        )
        for (start, stop), size in zip(bounds, shape, strict=True)
    )


@pytest.mark.parametrize(
    ("config", "naming"), [(c, n) for c in (UNET, VAE, GELU) for n in DIALECTS[type(c)] if not n.prefix], ids=short
)
def test_part_of_a_parameter_is_that_part_of_the_whole(tmp_path: Path, config: PartConfig, naming: Naming) -> None:
    opened = open_model(foreign.save(tmp_path / "alone.safetensors", foreign.tensors(config, naming)))
    rng = np.random.default_rng(0)
    for path, leaf in opened.leaves.items():
        assert isinstance(leaf, FromTensors)
        whole = leaf.read()
        for _ in range(2):
            index = random_index(rng, leaf.shape)
            part = leaf.read(index)
            assert part.shape == whole[index].shape, (path, index)
            np.testing.assert_array_equal(part, whole[index], err_msg=f"{path} {index}")


def test_every_kind_of_leaf_reads_parts_of_itself() -> None:
    value = np.random.default_rng(0).standard_normal((4, 3, 5), np.float32)
    memory, normal = InMemory(value), Parameter(value.shape, Distribution(deviation=1.0))
    leaves = {
        "in memory": (memory, value),
        "on a device": (InMemory(jax.numpy.asarray(value)), value),
        "cast": (Cast(memory, np.dtype(np.float16), "path"), value.astype(np.float16)),
        "changed": (lazy.Changed(memory, lambda array: 2 * array, np.dtype(np.float32)), 2 * value),
        "first layers": (FirstLayers(memory, 2), value[:2]),
        "initial": (Initial(normal, "path", 3), sample(normal, 3, "path")),
    }
    rng = np.random.default_rng(1)
    for name, (leaf, expected) in leaves.items():
        assert isinstance(leaf, lazy.Leaf)
        assert leaf.shape == expected.shape
        np.testing.assert_array_equal(leaf.read(), expected, err_msg=name)
        for _ in range(20):
            index = random_index(rng, leaf.shape)
            np.testing.assert_array_equal(leaf.read(index), expected[index], err_msg=f"{name} {index}")
            assert leaf.read(index).dtype == leaf.dtype


# Dtypes


LAYER = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.weight"


@pytest.mark.parametrize(("first", "other"), [("float32", "float16"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_stack_of_several_dtypes_is_float32_unless_told_otherwise(tmp_path: Path, first: str, other: str) -> None:
    folder = component(tmp_path / "unet", UNET, dtype=first)
    foreign.edit(folder / "diffusion_pytorch_model.safetensors", lambda t: t.update({LAYER: t[LAYER].astype(other)}))
    path = "unet/down_blocks_1/attentions_0/transformer_blocks/attn1/to_q/kernel"
    kept = {name: str(leaf.dtype) for name, leaf in open_model(folder).leaves.items()}
    assert kept.pop(path) == "float32"
    assert set(kept.values()) == {first}, "the others keep theirs"
    model = load_model(folder, dtype="float32", progress=False)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"float32"}
    found = flatten(model.params)[path]
    expected = foreign.tensors(UNET, Naming(Dialect.DIFFUSERS), first)
    np.testing.assert_array_equal(found[1].T, expected[LAYER].astype(other).astype(np.float32))
    np.testing.assert_array_equal(
        found[0].T, expected[LAYER.replace("blocks.1.attn", "blocks.0.attn")].astype(np.float32)
    )


def test_dtypes_differ_from_parameter_to_parameter(tmp_path: Path) -> None:
    folder = component(tmp_path / "vae", VAE, dtype=np.float16)
    file = folder / "diffusion_pytorch_model.safetensors"
    foreign.edit(file, lambda t: t.update({"quant_conv.weight": t["quant_conv.weight"].astype(np.float32)}))
    dtypes = {path: str(leaf.dtype) for path, leaf in flatten(load_model(folder, progress=False).params).items()}
    assert [path for path, dtype in dtypes.items() if dtype != "float16"] == ["vae/encoder/quant_conv/kernel"]


@pytest.mark.parametrize("dtype", foreign.DTYPES)
@pytest.mark.parametrize("target", [None, *foreign.DTYPES])
def test_dtype_is_kept_unless_another_is_given(tmp_path: Path, dtype: str, target: str | None) -> None:
    folder = component(tmp_path / "vae", VAE, dtype=foreign.DTYPES[dtype])
    params = load_model(folder, dtype=target, progress=False).params["vae"]
    expected = foreign.DTYPES[target or dtype]
    for path, value in flatten(foreign.part_params(VAE, foreign.DTYPES[dtype])).items():
        found = flatten(params)[path]
        assert found.dtype == expected
        np.testing.assert_array_equal(np.asarray(found), value.astype(expected))


@pytest.mark.parametrize("wrong", [np.int8, np.float64])
def test_numbers_that_are_no_parameters_are_refused(tmp_path: Path, wrong: Any) -> None:
    """E.g. quantised weights, whose numbers are not the parameters."""
    folder = component(tmp_path / "vae", VAE)
    foreign.edit(
        folder / "diffusion_pytorch_model.safetensors",
        lambda t: t.update({"quant_conv.weight": t["quant_conv.weight"].astype(wrong)}),
    )
    with pytest.raises(InputError, match=f"quant_conv.weight is {np.dtype(wrong)}; parameters of float32"):
        open_model(folder)


def test_dtype_that_parameters_cannot_have_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match=r"dtype=int8 is not implemented.*Choose one of float32, bfloat16, float16"):
        load_model(home / "base", dtype="int8", progress=False)


@pytest.mark.parametrize("also", [1.0, np.nan, np.inf])
def test_float16_that_cannot_hold_a_value_is_refused(also: float) -> None:
    leaf = Cast(InMemory(np.array([also, -70000.0], np.float32)), np.dtype(np.float16), "unet/some/bias")
    with pytest.raises(InputError, match=r"unet/some/bias has values up to 7e\+04; float16 holds up to 65504"):
        leaf.read()
    kept = Cast(InMemory(np.array([also], np.float32)), np.dtype(np.float16), "path").read()
    np.testing.assert_array_equal(kept, np.array([also], np.float16))


# Several devices


def on_mesh(path: str) -> dict[str, Any]:
    """What `test_weights_load_into_their_shards` looks at, in a process with eight devices."""
    sizes: list[int] = []
    read = safetensors.Tensor.read

    def counted(tensor: safetensors.Tensor, index: tuple[slice, ...] = ()) -> np.ndarray:
        value = read(tensor, index)
        sizes.append(value.nbytes)
        return value

    safetensors.Tensor.read = counted  # pyright: ignore[reportAttributeAccessIssue] (for a while)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    model = load_model(path, mesh=mesh, progress=False)
    safetensors.Tensor.read = read
    flat, places = flatten(model.params), flatten(sharding.place(mesh, model.params))
    expected = {
        f"{part}/{name}": value
        for part, config in part_configs(BASE).items()
        for name, value in flatten(foreign.part_params(config)).items()
    }
    split = [leaf for leaf in flat.values() if leaf.addressable_shards[0].data.size * 4 == leaf.size]
    return {
        "devices": jax.device_count(),
        "misplaced": [name for name, leaf in flat.items() if leaf.sharding != places[name]],
        "different": [name for name, leaf in flat.items() if np.asarray(leaf).tobytes() != expected[name].tobytes()],
        "split share": sum(leaf.nbytes for leaf in split) / sum(leaf.nbytes for leaf in flat.values()),
        "bytes": sum(leaf.nbytes for leaf in flat.values()),
        "read": sum(sizes),
        "largest read": max(sizes, default=0),
        "largest": max(leaf.nbytes for leaf in flat.values()),
    }


def test_weights_load_into_their_shards(home: Path) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    layouts = [home / "base", home / "base.safetensors", home / "base.orbax"]
    program = "import json, sys, test_open; print(json.dumps([*map(test_open.on_mesh, sys.argv[1:])]))"
    command = [sys.executable, "-c", program, *map(str, layouts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for layout, found in zip(layouts, json.loads(done.stdout), strict=True):
        assert found["devices"] == 8
        assert found["misplaced"] == found["different"] == [], layout
        assert found["split share"] > 0.9
        if layout.suffix != ".orbax":
            assert found["read"] == found["bytes"], "each number once"
            assert found["largest read"] == found["largest"] / 4, "a shard at a time"


def test_mesh_that_does_not_divide_is_refused(home: Path) -> None:
    mesh = AbstractMesh((1, 1, 3, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    with pytest.raises(InputError, match=r"cannot be split over mesh\.fsdp=3"):
        sharding.place(mesh, load_model(home / "base", progress=False).params)


# Refused, or in part


def refusal(path: Path, *expected: str, options: OpenOptions = OpenOptions()) -> None:
    """InputError with these words, of any layout's reader, and short."""
    with pytest.raises(InputError) as error:
        open_model(path, options)
    message = str(error.value)
    for pattern in expected:
        assert re.search(pattern, message), f"{pattern} not in {message}"
    assert len(message) < 1500


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """An autoencoder's directory, to damage; its weights are in `WEIGHTS`."""
    return component(tmp_path / "vae", VAE)


WEIGHTS = "diffusion_pytorch_model.safetensors"
LONE = "encoder.conv_in.weight"


def both(vae: Path, spoil: foreign.Edit, *expected: str) -> None:
    """The same refusal of a directory, and of a single file in the original layout."""
    foreign.edit(vae / WEIGHTS, spoil)
    refusal(vae, *expected, "--allow-partial")


def test_missing_tensor_is_named_with_what_is_near(vae: Path) -> None:
    def rename(tensors: foreign.Arrays) -> None:
        tensors["encoder.convin.weight"] = tensors.pop(LONE)

    both(
        vae,
        rename,
        r"1 of \d+ tensors are missing, the first is encoder\.conv_in\.weight \(32, 3, 3, 3\)",
        r"nearest in the file: encoder\.convin\.weight",
        r"1 tensors are unknown, the first is encoder\.convin\.weight",
    )


def test_surplus_tensor_is_named_with_what_is_near(vae: Path) -> None:
    both(
        vae,
        lambda t: t.update({"encoder.conv_inn.weight": np.zeros(3, np.float32)}),
        r"1 tensors are unknown, the first is encoder\.conv_inn\.weight \(3,\)",
        r"known: encoder\.conv_in\.weight",
    )


def test_tensor_of_another_shape_is_named_with_both(vae: Path) -> None:
    both(
        vae,
        lambda t: t.update({LONE: t[LONE][:, :2]}),
        r"encoder\.conv_in\.weight: \(32, 2, 3, 3\) in the file, \(32, 3, 3, 3\) in the model",
        r"\(encoder/conv_in/kernel\)",
    )


@pytest.mark.parametrize(
    "name",
    ["encoder.mid_block.attentions.0.to_q.weight", "quant_conv.weight", "encoder.down_blocks.1.resnets.0.conv2.weight"],
)
def test_missing_tensor_is_named_though_it_would_tell_what_the_file_is(vae: Path, name: str) -> None:
    both(vae, lambda t: t.pop(name), rf"1 of \d+ tensors are missing, the first is {re.escape(name)}")
    opened = open_model(vae, PARTIAL)
    assert any("1 parameters have their initial values" in note for note in opened.notes)


def test_single_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.1.attn1.to_q.weight"
    foreign.edit(path, lambda t: t.pop(name))
    refusal(path, rf"1 of \d+ tensors are missing, the first is {re.escape(name)} \(64, 64\)", "--allow-partial")


@pytest.mark.parametrize(
    "name",
    [
        "first_stage_model.quant_conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.1.model.positional_embedding",
    ],
)
def test_single_file_of_ours_that_lacks_a_telling_tensor_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    convert(foreign.diffusers_folder(tmp_path / "folder", BASE), path, "single-file", progress=False)
    foreign.edit(path, lambda t: t.pop(name))
    refusal(path, rf"1 of \d+ tensors are missing, the first is {re.escape(name)}", "--allow-partial")
    assert any("1 parameters have their initial values" in note for note in open_model(path, PARTIAL).notes)


@pytest.mark.parametrize("name", ["quant_conv.weight", "decoder.mid.attn_1.q.weight"])
def test_single_file_of_others_that_lacks_a_telling_tensor_is_refused(tmp_path: Path, name: str) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    foreign.edit(path, lambda t: t.pop(f"first_stage_model.{name}"))
    refusal(path, re.escape(name))


def test_single_file_with_a_network_that_is_not_implemented_is_refused(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    foreign.edit(path, lambda t: t.update({"control_model.zero_convs.0.weight": np.zeros(3, np.float32)}))
    refusal(path, "1 tensors that no part of the model owns, the first is control_model.zero_convs.0.weight")
    opened = open_model(path, PARTIAL)
    assert_holds(opened, BASE)
    assert any("control_model" in note and "left out" in note for note in opened.notes)


@pytest.mark.parametrize(
    ("marks", "prediction"),
    [
        ({"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}, Prediction.V),
        ({"edm_mean": np.zeros(4), "edm_std": np.ones(4)}, Prediction.EDM),
    ],
)
def test_model_of_continuous_noise_levels_is_opened_with_them(
    tmp_path: Path, marks: dict[str, Any], prediction: Prediction
) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    foreign.edit(path, lambda t: t.update({name: np.array(value, np.float32) for name, value in marks.items()}))
    config = open_model(path).config
    assert isinstance(config.noise, EdmConfig)
    assert config.prediction is prediction
    assert open_model(path, OpenOptions(prediction=prediction)).config == config
    other = Prediction.EPSILON if prediction is Prediction.V else Prediction.V
    message = (
        rf"--prediction {other.value} contradicts .* EdmConfig noise .* {prediction.value}. Leave --prediction out"
    )
    with pytest.raises(InputError, match=message):
        open_model(path, OpenOptions(prediction=other))


def test_model_of_unknown_noise_levels_is_refused_and_no_way_around_is_offered(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    foreign.edit(path, lambda t: t.update({"edm_mean": np.zeros(4, np.float32)}))
    for options in (OpenOptions(), PARTIAL):
        with pytest.raises(InputError, match=r"holds edm_mean: marks of EDM noise levels .* go together") as error:
            open_model(path, options)
        assert "--" not in str(error.value)


def test_prediction_that_is_not_implemented_is_refused_unless_the_user_knows_better(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    arrays = foreign.read(path)
    for unknown in ("x_prediction", "velocity"):
        foreign.save(path, arrays, {"modelspec.prediction_type": unknown})
        refusal(path, rf"predicts {unknown} \(modelspec.prediction_type\), which is not known")
        assert open_model(path, OpenOptions(prediction=Prediction.V)).config.prediction is Prediction.V


def test_flow_matching_in_one_file_is_opened_by_its_metadata_or_by_the_flag(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "model.safetensors", BASE)
    arrays, flow = foreign.read(path), OpenOptions(prediction=Prediction.FLOW)
    marked = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    given = [open_model(path, flow), open_model(foreign.save(tmp_path / "v.safetensors", arrays | marked), flow)]
    for said in ("flow", "rectified_flow", "Flow-Matching"):
        given.append(open_model(foreign.save(path, arrays, {"modelspec.prediction_type": said})))
    assert open_model(path, OpenOptions(prediction=Prediction.EPSILON)).config.noise is None
    for config in (opened.config for opened in given):
        config.check()
        assert (config.prediction, config.noise) == (Prediction.FLOW, FlowConfig())
        assert (Options().resolved(config).sampler, config.schedule) == ("euler", ScheduleConfig())


def test_unmarked_file_whose_groups_nothing_tells_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(VAE, block_channels=(16, 32), groups=16)
    naming = Naming(Dialect.ORIGINAL, "first_stage_model.", conv_attention=True)
    path = foreign.save(tmp_path / "vae.safetensors", foreign.tensors(config, naming))
    refusal(path, "The vae in .* has layers of 16 channels, which the 32 groups .*norm_num_groups")


def test_advice_is_of_the_command_that_gives_it(tmp_path: Path, vae: Path) -> None:
    foreign.edit(vae / WEIGHTS, lambda t: t.pop(LONE))
    refusal(vae, r"give --allow-partial \(in Python: allow_partial=…\)")
    training = OpenOptions(has_options=False)
    refusal(vae, f"`sdxl-jax convert {vae} NEW --to orbax --allow-partial`, and train from that", options=training)


def test_nothing_loads_in_part_unless_what_is_left_is_listed(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: foreign.Arrays) -> None:
        tensors.pop(LONE)
        tensors["decoder.conv_out.bias"] = np.zeros(4, np.float32)
        tensors["more"] = np.zeros(4, np.float32)

    foreign.edit(vae / WEIGHTS, spoil)
    with pytest.raises(InputError):
        load_model(vae, progress=False)
    model = load_model(vae, allow_partial=True)
    said = capsys.readouterr().err
    assert "2 tensors do not fit and are left out: decoder.conv_out.bias, more" in said
    listed = re.search(r"2 parameters have their initial values: (.*)", said)
    assert listed and sorted(listed[1].split(", ")) == ["decoder/conv_out/bias", "encoder/conv_in/kernel"]
    params, expected = flatten(model.params["vae"]), flatten(foreign.part_params(VAE))
    initial = {path: sample(leaf, 0, f"vae/{path}") for path, leaf in names.abstract(VAE).items()}
    for path, value in params.items():
        source = initial if path in listed[1] else expected
        np.testing.assert_array_equal(value, source[path], err_msg=path)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".CKPT"])
def test_pickle_is_refused_with_the_remedy(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x02}q\x00.")
    why = ("is a pickle: loading it would run any program that it holds", r"Use the model's \.safetensors file")
    refusal(path, *why)
    refusal(tmp_path, *why)
    path.unlink()
    refusal(path, *why)


def test_diffusers_directory_of_pickles_is_refused(tmp_path: Path) -> None:
    path = foreign.diffusers_folder(tmp_path / "model", STABLE_1)
    (path / "unet" / WEIGHTS).rename(path / "unet" / "diffusion_pytorch_model.bin")
    refusal(path, r"diffusion_pytorch_model\.bin is a pickle")


@pytest.mark.parametrize("length", [0, 4, 8, 100, 0.5, -1])
def test_truncated_file_is_refused(vae: Path, length: float) -> None:
    data = (vae / WEIGHTS).read_bytes()
    cut = int(len(data) * length) if 0 < length < 1 else int(length)
    (vae / WEIGHTS).write_bytes(data[:cut])
    for path in (vae, vae / WEIGHTS):
        refusal(path, r"cannot be read as a safetensors file.*truncated or damaged.*download it again")


@pytest.mark.parametrize("data", [b"<html>404</html>", b"\xff" * 64, b"\x02" + 7 * b"\0" + b"[]", b"{}" * 20])
def test_file_that_is_no_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refusal(path, "cannot be read as a safetensors file")


def test_file_without_a_model_is_refused(tmp_path: Path) -> None:
    empty = foreign.save(tmp_path / "empty.safetensors", {})
    refusal(empty, "holds 0 tensors but no UNet, VAE or CLIP")
    lora = foreign.save(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": np.zeros((4, 4), np.float32)})
    refusal(
        lora, "holds 1 tensors, such as lora_unet_x.lora_up.weight, but no UNet.*takes them beside a model, as --lora"
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The index of an autoencoder in two shards."""
    return foreign.shard(component(tmp_path / "vae", VAE) / WEIGHTS)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded.parent / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refusal(sharded.parent, r"lists 2 shards, of which diffusion_pytorch_model-00002-of-00002\.safetensors is not in")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '"weight_map"',
    ],
)
def test_broken_index_is_refused(sharded: Path, text: str) -> None:
    sharded.write_text(text)
    refusal(sharded.parent, r"index\.json cannot be read as an index of shards.*Download it again")


def test_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index = json.loads(sharded.read_text())
    places = index["weight_map"]
    first, second = sorted(set(places.values()))
    for change in ({LONE: second if places[LONE] == first else first}, {"more": first}):
        sharded.write_text(json.dumps({"weight_map": places | change}))
        refusal(sharded.parent, rf"disagree on 1 tensors, the first is {next(iter(change))}")
    sharded.write_text(json.dumps({"weight_map": {name: place for name, place in places.items() if name != LONE}}))
    refusal(sharded.parent, f"disagree on 1 tensors, the first is {LONE}")


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    sharded.unlink()
    refusal(sharded.parent, r"has shards, such as diffusion_pytorch_model-0000\d-of-00002\.safetensors, but no index")


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.parent.glob("*.safetensors"))
    name, value = next(iter(foreign.read(first).items()))
    foreign.edit(second, lambda t: t.update({name: value}))
    refusal(sharded.parent, rf"tensor {re.escape(name)} is in both .*00002-of.* and .*00001-of")


def test_place_without_a_model_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "absent", "There is nothing at .*absent. Expected a run directory")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "There is no model at .*empty. Expected a run directory")
    foreign.save(tmp_path / "folder" / "model.safetensors", {})
    refusal(tmp_path / "folder", "It has model.safetensors: give the file itself")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds \\[\\], not a JSON object"),
        ("{}", "config.json is not the configuration of a run"),
        ('{"config": 3}', "config.json is not the configuration of a run \\(its config is 3, not an object\\)"),
        ('{"config": {"moddel": {}}}', "does not describe the model that was trained"),
        ('{"_class_name": "ControlNetModel"}', "config.json is not the configuration of a run"),
    ],
)
def test_configuration_of_something_else_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refusal(tmp_path, expected)


def test_field_that_is_not_implemented_is_refused_by_name(vae: Path) -> None:
    path = vae / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift_factor": 0.1}))
    refusal(vae, "shift_factor.*not implemented")


def test_diffusers_directory_without_a_part_is_refused(tmp_path: Path) -> None:
    path = foreign.diffusers_folder(tmp_path / "model", STABLE_1)
    (path / "unet" / WEIGHTS).unlink()
    refusal(path, r"unet has no weights \(\*\.safetensors\)\. Download them")


def test_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", BASE, steps=())
    refusal(run, "has no checkpoint yet")
    (run / "checkpoints" / "7").mkdir(parents=True)
    refusal(run / "checkpoints" / "3", r"has no checkpoint of step 3\. Give one of its newest: 7")
    refusal(run, "checkpoint .*7 is incomplete or damaged")


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    ocp.save(str(tmp_path / "other"), {"a": np.zeros(3)})
    refusal(tmp_path / "other", "is an Orbax checkpoint whose metadata does not describe a model.*convert --to orbax")


def test_frozen_parameters_of_a_run_alone_are_refused(home: Path) -> None:
    refusal(home / "run" / "frozen", "is an Orbax checkpoint whose metadata does not .*or the run directory")


def _copy(home: Path, tmp_path: Path) -> Path:
    convert(open_model(home / "base" / "vae"), tmp_path / "vae.orbax", Layout.ORBAX, progress=False)
    return tmp_path / "vae.orbax"


# As in test_cli.py: Orbax leaves coroutines behind when a read fails half-way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("_METADATA", "manifest.ocdbt")), "d", "array_metadatas"],
)
def test_damaged_checkpoint_is_refused(home: Path, tmp_path: Path, name: str) -> None:
    path = _copy(home, tmp_path)
    found = sorted(path.rglob(name))
    assert found or name == "array_metadatas"
    for place in found:
        for file in [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    try:
        opened = open_model(path)
        values = {leaf_path: leaf.read() for leaf_path, leaf in opened.leaves.items()}
    except InputError as error:
        assert re.search(r"checkpoint .* (is incomplete or damaged|does not fit)", str(error))
    else:  # nothing that was needed is gone
        assert name == "array_metadatas"
        for leaf_path, value in flatten(foreign.part_params(VAE)).items():
            np.testing.assert_array_equal(values[f"vae/{leaf_path}"], value)
    gc.collect()  # here, not in the next test


def test_file_that_says_wrongly_what_it_is_is_refused(tmp_path: Path, vae: Path) -> None:
    made = tmp_path / "made.safetensors"
    convert(open_model(vae), made, Layout.SINGLE_FILE, progress=False)
    described = json.loads(foreign.metadata(made)["sdxl_jax"])
    arrays = foreign.read(made)
    for change, expected in (
        ({"parts": ["unet"]}, "says in its metadata that it holds unet, but its tensors are those of Vae"),
        ({"parts": ["wheel"]}, "says in its metadata that it holds wheel, but its tensors are those of Vae"),
        ({"model": {"wheels": 4}}, "in its metadata, but the description cannot be read.*wheels"),
    ):
        foreign.save(made, arrays, {"sdxl_jax": json.dumps(described | change)})
        refusal(made, expected)
    for text in ("{", "[]", "null"):
        foreign.save(made, arrays, {"sdxl_jax": text})
        refusal(made, "in its metadata, but the description cannot be read")


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    arrays = foreign.tensors(STABLE_1.unet, foreign.original(STABLE_1)["unet"])
    arrays |= foreign.tensors(VAE, foreign.original(STABLE_1)["vae"])
    wide = dataclasses.replace(QUICK, width=16)
    arrays |= foreign.tensors(wide, foreign.original(STABLE_1)["text_encoder"])
    path = foreign.save(tmp_path / "model.safetensors", arrays)
    refusal(path, r"The parts of .* do not fit together: model\.unet\.context_dim=8.*a width of 16")


# Licences


@pytest.fixture
def names_in(vae: Path) -> Iterator[Callable[[Path], list[str]]]:
    yield lambda path: [licence.name for licence in open_model(path).licences]


def test_licences_of_a_directory_are_found(vae: Path, names_in: Callable[[Path], list[str]]) -> None:
    for name in ("LICENSE.md", "licence", "NOTICE.txt", "sd_xl_base_1.0.LICENSE", "COPYING", "license-apache-2.0.txt"):
        (vae / name).write_text(name)
    for name in ("unlicensed.md", "README.md", "notices", ".LICENSE.swp"):
        (vae / name).write_text(name)
    assert sorted(names_in(vae)) == sorted(
        ["LICENSE.md", "licence", "NOTICE.txt", "sd_xl_base_1.0.LICENSE", "COPYING", "license-apache-2.0.txt"]
    )


def test_file_has_its_own_licence_or_else_its_folders(vae: Path, names_in: Callable[[Path], list[str]]) -> None:
    (vae / "LICENSE").write_text("the folder's")
    (vae / "another_model.LICENSE.md").write_text("another model's")
    assert names_in(vae / WEIGHTS) == ["LICENSE"]
    (vae / "diffusion_pytorch_model.LICENSE.md").write_text("its own")
    assert names_in(vae / WEIGHTS) == ["diffusion_pytorch_model.LICENSE.md"]
