"""Models from one layout to another and back: every tensor, name, dtype and bit; or nothing at all.

Tensors are compared as the bytes that stand in the files, read here without the library. A conversion that is refused
or interrupted leaves the disk as it was.
"""

import dataclasses
import errno
import itertools
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command
import foreign
import numpy as np
import pytest
from command import Outcome
from foreign import BASE, MODELS, STABLE_1, STABLE_2
from orbax.checkpoint import v1 as ocp
from test_open import DIALECTS, WEIGHTS, assert_holds, assert_part_holds, component, make_run, short, with_variants

from sdxl_jax.arrays import flatten
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.weights.convert import Layout, Written, convert
from sdxl_jax.weights.formats import diffusers, orbax, safetensors
from sdxl_jax.weights.lazy import in_memory, part_configs
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.names import Dialect, Naming, PartConfig
from sdxl_jax.weights.open import OpenOptions, open_model

UNET, VAE, QUICK, GELU = BASE.unet, BASE.vae, BASE.text[0].clip, BASE.text[1].clip


def call(*arguments: object) -> Outcome:
    """`sdxl-jax convert`, in this process."""
    return command.call("convert", *arguments)


def listing(folder: Path) -> dict[str, int | None]:
    """Everything below a folder, with its size."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None for path in folder.rglob("*")
    }


def assert_refused(folder: Path, *arguments: object, expected: str, code: int = 2) -> None:
    """That exit code, one message with the expected words, no traceback, and nothing below `folder` changed."""
    before = listing(folder)
    outcome = call(*arguments)
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.err.count("error: ") == 1
    words = re.sub(r"\s+", " ", outcome.err)
    assert re.search(expected, words), f"{expected} not in {words}"
    assert listing(folder) == before


def write(source: Path, destination: Path, to: Layout) -> Written:
    return convert(open_model(source), destination, to, progress=False)


# There and back


class Row(NamedTuple):
    """One line of the table that the slow test prints."""

    model: str
    dtype: str
    route: str
    tensors: int


def assert_returns(source: Path, folder: Path, to: Layout, through: Layout | None = None) -> int:
    """A source in the layout `to`, perhaps through another, comes back with every bit; how many tensors that are."""
    suffix = ".safetensors" if to is Layout.SINGLE_FILE else ""
    between = source
    if through is not None:
        between = folder / f"between{'.safetensors' if through is Layout.SINGLE_FILE else ''}"
        assert write(source, between, through).left_out == ()
    back = folder / f"back{suffix}"
    written = write(between, back, to)
    expected, found = foreign.contents(source), foreign.contents(back)
    if source.is_file():
        expected, found = ({k.partition(":")[2]: v for k, v in one.items()} for one in (expected, found))
    assert list(found.keys() ^ expected.keys()) == []
    assert [name for name in found if found[name] != expected[name]] == []
    assert written.left_out == ()
    assert written.tensors == len(expected)
    for made in {between, back} - {source}:
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    return len(expected)


def assert_crosses(source: Path, folder: Path, config: ModelConfig, dtype: Any) -> Iterator[tuple[str, int]]:
    """Into the other layout: every tensor as other people would have written it; what was beside it is listed."""
    directory, single = foreign.diffusers_folder(folder / "expected", config, dtype), folder / "expected.safetensors"
    short_config = diffusers.as_diffusers_has_it(config)
    foreign.single_file(single, short_config, dtype, beside=False)
    if source.is_dir():
        written = write(source, folder / "made.safetensors", Layout.SINGLE_FILE)
        expected, found = (foreign.read(path) for path in (single, folder / "made.safetensors"))
        assert all(name.endswith("position_ids") for name in written.left_out)
        yield "diffusers → single-file", len(found)
    else:
        written = write(source, folder / "made", Layout.DIFFUSERS)
        expected, found = ({}, {})
        for place in sorted(part.name for part in directory.iterdir() if list(part.glob("*.safetensors"))):
            for root, into in ((directory, expected), (folder / "made", found)):
                (file,) = (root / place).glob("*.safetensors")
                into |= {f"{place}:{name}": array for name, array in foreign.read(file).items()}
        expected = {name: array for name, array in expected.items() if not name.endswith("position_ids")}
        beside = set(foreign.beside_original(config))
        last = f"transformer.resblocks.{config.text[0].clip.layers - 1}."
        dropped = {name for name in foreign.read(source) if last in name or name.endswith("text_projection")}
        assert set(written.left_out) == beside | (dropped if short_config != config else set())
        assert diffusers.read_model_config(folder / "made") == short_config
        yield "single-file → diffusers", len(found)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name
    shutil.rmtree(directory)
    shutil.rmtree(folder / "made", ignore_errors=True)


def round_trips(
    name: str, dtype: str, folder: Path, betweens: tuple[Layout | None, ...] = (None, Layout.ORBAX)
) -> Iterator[Row]:
    config, numpy_dtype = MODELS[name], foreign.DTYPES[dtype]
    single = foreign.single_file(folder / "source.safetensors", config, numpy_dtype)
    directory = foreign.diffusers_folder(folder / "source", config, numpy_dtype)
    for source, to in ((single, Layout.SINGLE_FILE), (directory, Layout.DIFFUSERS)):
        opened = open_model(source)
        assert_holds(opened, opened.config, numpy_dtype)
        for through in betweens:
            route = " → ".join(layout.value for layout in (to, through, to) if layout)
            yield Row(name, dtype, route, assert_returns(source, folder, to, through))
        for route, count in assert_crosses(source, folder, config, numpy_dtype):
            yield Row(name, dtype, route, count)


@pytest.mark.parametrize(
    ("name", "dtype", "through"),
    [
        ("SDXL base", "float16", (None,)),
        pytest.param("SDXL refiner", "float32", (None,), marks=pytest.mark.slow),
        pytest.param("SD 1.x", "bfloat16", (None, Layout.ORBAX), marks=pytest.mark.slow),
    ],
)
def test_model_returns_with_every_bit(
    tmp_path: Path, name: str, dtype: str, through: tuple[Layout | None, ...]
) -> None:
    """The others, and all dtypes, are in the slow test below."""
    assert len(list(round_trips(name, dtype, tmp_path, through))) == 2 + 2 * len(through)


PARTS: dict[str, PartConfig] = {
    "SDXL UNet": UNET,
    "SDXL inpainting UNet": MODELS["SDXL inpainting"].unet,
    "refiner UNet": MODELS["SDXL refiner"].unet,
    "SD 1.x UNet": STABLE_1.unet,
    "SD 2.x UNet": STABLE_2.unet,
    "SDXL VAE": foreign.with_weights(VAE),
    "SD VAE": foreign.with_weights(STABLE_1.vae),
    "CLIP of quick-GELU": QUICK,
    "CLIP with projection": GELU,
}
VISUAL = {
    "visual.conv1.weight": np.ones((4, 3, 2, 2), np.float32),
    "visual.proj": np.ones((4, 4), np.float16),
    "logit_scale": np.array(4.6, np.float32),
    "attn_mask": np.full((77, 77), -np.inf, np.float32),
}
VISION = {
    "vision_model.embeddings.class_embedding": np.ones(4, np.float32),
    "vision_model.embeddings.position_ids": foreign.POSITION_IDS,
    "visual_projection.weight": np.ones((4, 4), np.float16),
    "logit_scale": np.array(4.6, np.float32),
    "text_model.embeddings.position_ids": foreign.POSITION_IDS,
}


def beside(config: PartConfig, naming: Naming) -> foreign.Arrays:
    """Further tensors in files of a tower alone."""
    if naming.prefix or not isinstance(config, ClipTextConfig):
        return {}
    return VISUAL if naming.dialect is Dialect.OPENCLIP else VISION


def part_round_trips(
    name: str, config: PartConfig, naming: Naming, dtype: str, folder: Path, directory: bool
) -> Iterator[Row]:
    numpy_dtype = foreign.DTYPES[dtype]
    arrays = foreign.tensors(config, naming, numpy_dtype) | beside(config, naming)
    file = "model.safetensors" if isinstance(config, ClipTextConfig) else WEIGHTS
    source = foreign.save(folder / "source" / file, arrays, {"format": "pt"})
    if directory:
        diffusers.write_component(config, folder / "source")
    routes = (
        ((folder / "source", Layout.DIFFUSERS), (source, Layout.SINGLE_FILE))
        if directory
        else ((source, Layout.SINGLE_FILE),)
    )
    for source, to in routes:
        for through in (None, Layout.ORBAX):
            kind = "directory" if source.is_dir() else "file"
            route = f"{kind}, {short(naming)}{f' → {through.value}' if through else ''} → {to.value}"
            yield Row(name, dtype, route, assert_returns(source, folder, to, through))


@pytest.mark.parametrize(
    ("name", "naming"),
    [(n, naming) for n in ("SDXL UNet", "SDXL VAE", "CLIP with projection") for naming in DIALECTS[type(PARTS[n])]],
    ids=short,
)
def test_network_alone_returns_with_every_bit(tmp_path: Path, name: str, naming: Naming) -> None:
    rows = part_round_trips(name, PARTS[name], naming, "float16", tmp_path, diffusers_can_have(naming))
    assert len(list(rows)) == (4 if diffusers_can_have(naming) else 2)


def diffusers_can_have(naming: Naming) -> bool:
    """Whether a directory keeps this naming; convolutions in the attention become linear, which diffusers needs."""
    return (
        naming.dialect not in (Dialect.ORIGINAL, Dialect.OPENCLIP) and not naming.prefix and not naming.conv_attention
    )


@pytest.mark.slow
def test_everything_returns_with_every_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every model and network, every naming, every dtype; and the towers at their real widths. Prints a table."""
    rows: list[Row] = []

    def place() -> Path:
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        (tmp_path / "place").mkdir()
        return tmp_path / "place"

    for dtype in foreign.DTYPES:
        for name in MODELS:
            rows += round_trips(name, dtype, place())
        for name, config in PARTS.items():
            for naming in DIALECTS[type(config)]:
                rows += part_round_trips(name, config, naming, dtype, place(), diffusers_can_have(naming))
    towers = {
        "CLIP-L": ClipTextConfig(layers=2),
        "ViT-H": ClipTextConfig(1024, 2, 16, 4096, Activation.GELU, 1024),
        "bigG": ClipTextConfig(1280, 2, 20, 5120, Activation.GELU, 1280),
    }
    for name, config in towers.items():
        for naming in DIALECTS[ClipTextConfig]:
            rows += part_round_trips(
                f"{name}, 2 layers", config, naming, "float16", place(), diffusers_can_have(naming)
            )
    table: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        table.setdefault((row.model, row.route), {})[row.dtype] = row.tensors
    with capsys.disabled():
        print(f"\n{'model':30} {'route':70} tensors, the same in each of")
        for (model, route), counts in table.items():
            print(f"{model:30} {route:70} {'/'.join(map(str, sorted(set(counts.values())))):>7}  {', '.join(counts)}")
        print(f"{len(rows)} round trips, {sum(row.tensors for row in rows)} tensors compared")


def test_marks_without_numbers_return(tmp_path: Path) -> None:
    """Empty tensors, which Orbax does not save."""
    marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros((0, 2), np.float16), "step": np.array(7, np.int64)}
    source = foreign.save(tmp_path / "source.safetensors", foreign.tensors(UNET, DIALECTS[UNetConfig][1]) | marks)
    assert_returns(source, tmp_path, Layout.SINGLE_FILE, Layout.ORBAX)


# What a layout has no place for


@pytest.mark.slow
def test_last_layer_of_sd2_is_left_out_of_diffusers_and_reported(tmp_path: Path) -> None:
    path = foreign.single_file(tmp_path / "two.safetensors", STABLE_2, beside=False)
    outcome = call(path, tmp_path / "two", "--to", "diffusers")
    assert outcome.code == 0, outcome
    assert (
        "13 tensors of the source have no name in this layout and were left out: cond_stage_model.model" in outcome.err
    )
    assert "transformer.resblocks.1." in outcome.err
    opened = open_model(tmp_path / "two")
    assert opened.config == diffusers.as_diffusers_has_it(STABLE_2)
    kept = foreign.part_params(STABLE_2.text[0].clip)["layers"]
    for name, leaf in opened.leaves.items():
        if name.startswith("text_encoder/layers/"):
            np.testing.assert_array_equal(leaf.read(), flatten(kept)[name.removeprefix("text_encoder/layers/")][:1])


def test_image_tower_is_left_out_where_names_change_and_reported(tmp_path: Path) -> None:
    stored = foreign.tensors(GELU, Naming(Dialect.OPENCLIP)) | VISUAL
    path = foreign.save(tmp_path / "clip" / "open_clip_model.safetensors", stored)
    outcome = call(path, tmp_path / "made", "--to", "diffusers")
    assert outcome.code == 0, outcome
    assert re.search("4 tensors .* left out: attn_mask, logit_scale, visual.conv1.weight, visual.proj", outcome.err)
    assert (
        foreign.read(tmp_path / "made" / "model.safetensors").keys()
        == foreign.tensors(GELU, Naming(Dialect.TRANSFORMERS)).keys()
    )


def test_tower_alone_keeps_its_last_layer(tmp_path: Path) -> None:
    """ViT-H in transformers' layout, 24 layers and a projection: only diffusers' SD 2.x goes without them."""
    opened = open_model(component(tmp_path / "tower", GELU))
    as_sd2 = dataclasses.replace(opened, config=STABLE_2)
    written = convert(as_sd2, tmp_path / "made", Layout.DIFFUSERS, progress=False)
    assert written.left_out == ()
    assert foreign.contents(tmp_path / "made") == foreign.contents(tmp_path / "tower")


@pytest.mark.parametrize("config", [UNET, VAE, QUICK, GELU], ids=short)
def test_directory_of_a_network_becomes_a_file_in_the_original_layout(tmp_path: Path, config: PartConfig) -> None:
    source = component(tmp_path / "source", config)
    write(source, tmp_path / "made.safetensors", Layout.SINGLE_FILE)
    naming = {
        UNetConfig: Naming(Dialect.ORIGINAL, "model.diffusion_model."),
        VaeConfig: Naming(Dialect.ORIGINAL, conv_attention=True),
    }.get(type(config), Naming(Dialect.OPENCLIP if config is GELU else Dialect.TRANSFORMERS))
    expected = foreign.tensors(config, naming)
    made = foreign.read(tmp_path / "made.safetensors")
    assert made.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(made[name], array)
    write(tmp_path / "made.safetensors", tmp_path / "back", Layout.DIFFUSERS)
    assert foreign.contents(tmp_path / "back") == foreign.contents(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_convolutions_in_the_attention_become_linear_for_diffusers(tmp_path: Path) -> None:
    """Its classes have linear layers, and refuse convolutions."""
    naming = Naming(Dialect.DIFFUSERS, conv_attention=True)
    path = foreign.diffusers_folder(tmp_path / "source", STABLE_1, namings={"vae": naming})
    write(path, tmp_path / "made", Layout.DIFFUSERS)
    foreign.diffusers_folder(tmp_path / "expected", STABLE_1)
    assert foreign.contents(tmp_path / "made") == foreign.contents(tmp_path / "expected")


def test_network_that_others_have_joined_is_a_whole_model(tmp_path: Path) -> None:
    """With the names of a whole model's file, whatever the names in its own file were."""
    unet = foreign.save(tmp_path / "unet.safetensors", foreign.tensors(STABLE_1.unet, Naming(Dialect.DIFFUSERS)))
    rest = foreign.diffusers_folder(tmp_path / "rest", STABLE_1)
    vae = component(tmp_path / "vae", STABLE_1.vae)
    assert (
        call(rest, tmp_path / "made.safetensors", "--to", "single-file", "--parts-from", unet, "--parts-from", vae).code
        == 0
    )
    joined = open_model(
        unet, parts_from=[foreign.single_file(tmp_path / "rest.safetensors", STABLE_1, seed=3), unet, vae]
    )
    convert(joined, tmp_path / "joined.safetensors", Layout.SINGLE_FILE, progress=False)
    assert_holds(open_model(tmp_path / "joined.safetensors"), STABLE_1, text_encoder=3)
    expected = foreign.read(foreign.single_file(tmp_path / "expected.safetensors", STABLE_1, beside=False))
    for made in ("made", "joined"):
        assert foreign.read(tmp_path / f"{made}.safetensors").keys() == expected.keys()


def test_parts_that_are_not_a_whole_model_make_no_diffusers_directory(tmp_path: Path) -> None:
    arrays = foreign.tensors(UNET, foreign.original(BASE)["unet"]) | foreign.tensors(VAE, foreign.original(BASE)["vae"])
    path = foreign.save(tmp_path / "source" / "model.safetensors", arrays)
    expected = "text_encoder, text_encoder_2 are missing. Give --parts-from a model that has what is missing"
    assert_refused(tmp_path, path, tmp_path / "new" / "made", "--to", "diffusers", expected=expected)
    assert call(path, tmp_path / "made.safetensors", "--to", "single-file").code == 0
    assert foreign.read(tmp_path / "made.safetensors").keys() == arrays.keys()
    assert call(tmp_path / "made.safetensors", tmp_path / "made", "--to", "orbax").code == 0
    assert open_model(tmp_path / "made").parts == ("unet", "vae")


def test_model_that_diffusers_cannot_express_is_refused(tmp_path: Path) -> None:
    towers = (BASE.text[0], dataclasses.replace(BASE.text[1], name="wheel"))
    config = dataclasses.replace(BASE, text=towers)
    params = {part: foreign.part_params(other) for part, other in part_configs(config).items()}
    with pytest.raises(InputError, match="which diffusers' pipelines cannot express"):
        convert(in_memory(Model(config, params)), tmp_path / "new" / "made", Layout.DIFFUSERS, progress=False)
    assert listing(tmp_path) == {}


def test_fused_tensor_of_two_dtypes_is_refused_without_one(tmp_path: Path) -> None:
    naming = Naming(Dialect.TRANSFORMERS)
    arrays = foreign.tensors(GELU, naming)
    for name in arrays:
        if "k_proj" in name:
            arrays[name] = arrays[name].astype(np.float16)
    diffusers.write_component(GELU, tmp_path / "source")
    foreign.save(tmp_path / "source" / "model.safetensors", arrays)
    command = tmp_path / "source", tmp_path / "made.safetensors", "--to", "single-file"
    assert_refused(
        tmp_path, *command, expected=r"in_proj_(weight|bias) would hold float(16|32) and float(16|32).*--dtype"
    )
    assert call(*command, "--dtype", "float16").code == 0
    assert {str(array.dtype) for array in foreign.read(tmp_path / "made.safetensors").values()} == {"float16"}


# What a layout remembers


ODD = dataclasses.replace(
    BASE,
    unet=dataclasses.replace(UNET, groups=16, heads=(2, 4)),
    vae=dataclasses.replace(VAE, groups=8, scale=0.5),
    text=(
        dataclasses.replace(BASE.text[0], clip=dataclasses.replace(QUICK, heads=2, activation=Activation.GELU)),
        BASE.text[1],
    ),
    schedule=ScheduleConfig(500, zero_terminal_snr=True),
    prediction=Prediction.V,
    default_size=(64, 96),
)


@pytest.mark.parametrize("layout", Layout)
def test_configuration_is_what_was_written_not_what_shapes_suggest(tmp_path: Path, layout: Layout) -> None:
    params = {part: foreign.part_params(config, np.float16) for part, config in part_configs(ODD).items()}
    path = tmp_path / "made.safetensors"
    convert(in_memory(Model(ODD, params)), path, layout, progress=False)
    opened = open_model(path)
    assert opened.config == ODD
    assert_holds(opened, ODD, np.float16)


def test_orbax_itself_reads_the_nested_parameters(tmp_path: Path) -> None:
    write(foreign.diffusers_folder(tmp_path / "source", STABLE_1), tmp_path / "made", Layout.ORBAX)
    tree = ocp.load(str(tmp_path / "made"))
    assert isinstance(tree, dict)
    found = flatten({part: tree[part] for part in part_configs(STABLE_1)})
    for part, config in part_configs(STABLE_1).items():
        for path, value in flatten(foreign.part_params(config)).items():
            np.testing.assert_array_equal(found[f"{part}/{path}"], value)


def test_large_checkpoint_is_written_and_read_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax, "_GROUP_BYTES", 2**19)
    source = foreign.diffusers_folder(tmp_path / "source", STABLE_1)
    saves: list[int] = []
    save = ocp.partial.save
    monkeypatch.setattr(ocp.partial, "save", lambda *a, **k: (saves.append(1), save(*a, **k))[1])
    write(source, tmp_path / "made", Layout.ORBAX)
    assert len(saves) >= 5
    opened = open_model(tmp_path / "made")
    assert_holds(opened, STABLE_1)


@pytest.mark.parametrize("layout", Layout)
def test_run_directory_becomes_any_layout(tmp_path: Path, layout: Layout) -> None:
    run = make_run(tmp_path / "run", STABLE_1, steps=(2,))
    (run / "LICENSE").write_text("of the run")
    made = tmp_path / "made.safetensors"
    outcome = call(run, made, "--to", layout.value)
    assert outcome.code == 0, outcome
    assert "unet, vae, text_encoder: " in outcome.out
    opened = open_model(made)
    assert opened.config == STABLE_1
    assert_holds(opened, STABLE_1, unet=2)
    assert [licence.read_text() for licence in opened.licences] == ["of the run"]


@pytest.mark.parametrize("dtype", foreign.DTYPES)
def test_dtype_changes_only_where_asked(tmp_path: Path, dtype: str) -> None:
    source = component(tmp_path / "source", VAE)
    assert call(source, tmp_path / "made", "--to", "diffusers", "--dtype", dtype).code == 0
    made = foreign.read(tmp_path / "made" / WEIGHTS)
    for name, array in foreign.read(source / WEIGHTS).items():
        assert made[name].dtype == foreign.DTYPES[dtype]
        assert made[name].tobytes() == array.astype(foreign.DTYPES[dtype]).tobytes()


def test_what_a_directory_says_of_its_sampling_travels_through_every_layout(tmp_path: Path) -> None:
    source = foreign.diffusers_folder(tmp_path / "source", BASE)
    file = source / "scheduler" / "scheduler_config.json"
    said = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "use_karras_sigmas": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    sampling = open_model(source).config.sampling
    assert sampling == SamplingDefaults("euler_ancestral", Spacing.TRAILING, sigmas=Sigmas.KARRAS)
    convert(source, tmp_path / "orbax", Layout.ORBAX, progress=False)
    convert(tmp_path / "orbax", tmp_path / "file.safetensors", Layout.SINGLE_FILE, progress=False)
    convert(tmp_path / "file.safetensors", tmp_path / "again", Layout.DIFFUSERS, progress=False)
    for place in ("orbax", "file.safetensors", "again"):
        assert open_model(tmp_path / place).config.sampling == sampling, place
    written = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert said.items() <= written.items()


def test_mixed_stack_keeps_every_tensors_dtype_where_the_layout_can(tmp_path: Path) -> None:
    source = component(tmp_path / "source", UNET)
    name = "mid_block.attentions.0.transformer_blocks.1.norm1.weight"
    foreign.edit(source / WEIGHTS, lambda t: t.update({name: t[name].astype(np.float16)}))
    assert call(source, tmp_path / "file.safetensors", "--to", "single-file").code == 0
    assert call(tmp_path / "file.safetensors", tmp_path / "again", "--to", "diffusers").code == 0
    assert foreign.contents(tmp_path / "again" / WEIGHTS) == foreign.contents(source / WEIGHTS)
    command = source, tmp_path / "made", "--to", "orbax"
    assert_refused(
        tmp_path, *command, expected=r"norm1/scale are float16 and float32, and an Orbax.*one array\. .*--dtype"
    )
    assert call(*command, "--dtype", "bfloat16").code == 0
    assert {leaf.dtype for leaf in open_model(tmp_path / "made").leaves.values()} == {np.dtype("bfloat16")}


def test_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    source = component(tmp_path / "source", VAE)
    foreign.edit(source / WEIGHTS, lambda t: t.update({"decoder.conv_in.bias": np.full(32, 1e5, np.float32)}))
    for to in Layout:
        command = source, tmp_path / "made.safetensors", "--to", to.value, "--dtype"
        assert_refused(
            tmp_path, *command, "float16", expected=r"vae/decoder/conv_in/bias has values up to 1e\+05; float16"
        )
    assert call(source, tmp_path / "made", "--to", "orbax", "--dtype", "bfloat16").code == 0


def test_variant_is_chosen(tmp_path: Path) -> None:
    source = with_variants(tmp_path / "source", "fp16", "non_ema")
    command = source, tmp_path / "made", "--to", "diffusers"
    assert_refused(tmp_path, *command, expected="several variants, fp16, non_ema. Choose one: give --variant")
    assert call(*command, "--variant", "non_ema").code == 0
    assert_part_holds(open_model(tmp_path / "made"), "vae", VAE, seed=2)


def test_prediction_that_the_user_gives_is_written(tmp_path: Path) -> None:
    source = foreign.single_file(tmp_path / "source.safetensors", STABLE_2)
    for to in Layout:
        made = tmp_path / f"{to.value}.safetensors"
        assert call(source, made, "--to", to.value, "--prediction", "v_prediction").code == 0
        assert open_model(made).config.prediction is Prediction.V


def test_partial_model_is_written_only_when_asked_and_listed(tmp_path: Path) -> None:
    source = component(tmp_path / "source", VAE)
    foreign.edit(source / WEIGHTS, lambda t: t.pop("decoder.conv_in.bias"))
    command = source, tmp_path / "made", "--to", "diffusers"
    assert_refused(
        tmp_path, *command, expected=r"1 of \d+ tensors are missing.*decoder\.conv_in\.bias.*--allow-partial"
    )
    outcome = call(*command, "--allow-partial")
    assert outcome.code == 0
    assert "1 parameters have their initial values: decoder/conv_in/bias" in outcome.err
    assert not foreign.read(tmp_path / "made" / WEIGHTS)["decoder.conv_in.bias"].any()


# Memory


LARGE = UNetConfig((64, 128, 128), 3, (0, 4, 4), 4, (2, 4, 4), 64, None, groups=8)


@pytest.mark.slow
@pytest.mark.parametrize("to", Layout)
def test_conversion_needs_little_memory(tmp_path: Path, to: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax, "_GROUP_BYTES", 2**22)
    source = component(tmp_path / "source", LARGE)
    opened = open_model(source)
    size, largest = opened.size, max(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in opened.leaves.values())
    assert size > 50e6
    assert largest < 0.05 * size
    tracemalloc.start()
    try:
        convert(opened, tmp_path / "made.safetensors", to, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.25 * size


# All or nothing


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, to be read only."""
    return foreign.diffusers_folder(tmp_path_factory.mktemp("source") / "model", STABLE_1)


def interrupt(monkeypatch: pytest.MonkeyPatch, to: Layout, error: BaseException, destination: Path) -> None:
    """Makes a conversion fail half-way."""
    owner, name, after = (ocp.partial, "save", 3) if to is Layout.ORBAX else (safetensors.Writer, "put", 100)
    working, calls = getattr(owner, name), itertools.count()

    def failing(*arguments: Any, **options: Any) -> Any:
        assert not destination.exists(), "appears only when it is whole"
        if next(calls) == after:
            raise error
        return working(*arguments, **options)

    monkeypatch.setattr(orbax, "_GROUP_BYTES", 2**19)
    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("to", Layout)
def test_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, source: Path, to: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "new" / "folder" / "made.safetensors"
    interrupt(monkeypatch, to, OSError(errno.ENOSPC, "No space left on device"), destination)
    expected = "No space left on device.*has free space"
    assert_refused(tmp_path, source, destination, "--to", to.value, expected=expected, code=1)


@pytest.mark.parametrize("to", Layout)
def test_interruption_leaves_nothing_behind(
    tmp_path: Path, source: Path, to: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_text("as it was")
    destination = tmp_path / "made.safetensors"
    interrupt(monkeypatch, to, KeyboardInterrupt(), destination)
    with pytest.raises(KeyboardInterrupt):
        write(source, destination, to)
    assert listing(tmp_path) == {"other": 9}
    monkeypatch.undo()
    write(source, destination, to)
    assert_holds(open_model(destination), STABLE_1)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_single_file_of_an_sdxl_that_predicts_v_has_comfyuis_marks(tmp_path: Path, zero_terminal_snr: bool) -> None:
    schedule = dataclasses.replace(BASE.schedule, zero_terminal_snr=zero_terminal_snr)
    config = dataclasses.replace(BASE, prediction=Prediction.V, schedule=schedule)
    folder = foreign.diffusers_folder(tmp_path / "model", config)
    convert(folder, tmp_path / "made.safetensors", "single-file", progress=False)
    marks = {
        name: value.shape for name, value in foreign.read(tmp_path / "made.safetensors").items() if "." not in name
    }
    assert marks == {"v_pred": (0,)} | ({"ztsnr": (0,)} if zero_terminal_snr else {})
    foreign.save(tmp_path / "made.safetensors", foreign.read(tmp_path / "made.safetensors"))  # as others would
    opened = open_model(tmp_path / "made.safetensors")
    assert (opened.config.prediction, opened.config.schedule) == (config.prediction, config.schedule)
    epsilon = open_model(tmp_path / "made.safetensors", OpenOptions(prediction=Prediction.EPSILON))
    convert(epsilon, tmp_path / "epsilon.safetensors", "single-file", progress=False)
    assert not [name for name in foreign.read(tmp_path / "epsilon.safetensors") if "." not in name]


def test_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    expected = r"has 0\.00 GB left, and the model needs 0\.00 GB\. Free space, or choose another disk or a smaller"
    for to in Layout:
        made = tmp_path / "new" / "made.safetensors"
        assert_refused(tmp_path, source, made, "--to", to.value, expected=expected, code=1)


def test_damage_that_is_detected_late_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    """A file that changes while it is read."""
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    opened = open_model(copy)
    file = copy / "unet" / WEIGHTS
    with file.open("r+b") as opened_file:
        opened_file.truncate(file.stat().st_size // 2)
    before = listing(tmp_path)
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model.safetensors cannot be read as a safetensors"):
        convert(opened, tmp_path / "made", Layout.ORBAX, progress=False)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("to", Layout)
def test_destination_that_is_there_is_left_alone(tmp_path: Path, source: Path, to: Layout) -> None:
    file, folder = tmp_path / "file.safetensors", tmp_path / "folder.safetensors"
    file.write_text("precious")
    folder.mkdir()
    for destination in (file, folder):
        assert_refused(tmp_path, source, destination, "--to", to.value, expected="exists already. Remove it, or choose")
    assert file.read_text() == "precious"


def test_source_is_no_destination(tmp_path: Path) -> None:
    source = component(tmp_path / "vae", VAE)
    assert_refused(tmp_path, source, source, "--to", "orbax", expected="exists already")
    assert_refused(tmp_path, source / WEIGHTS, source / WEIGHTS, "--to", "single-file", expected="exists already")
    assert_refused(tmp_path, source, source / ".." / "vae", "--to", "diffusers", expected="exists already")


def test_destination_may_lie_within_the_source(tmp_path: Path) -> None:
    source = component(tmp_path / "vae", VAE)
    before = foreign.contents(source)
    write(source, source / "made", Layout.ORBAX)
    assert foreign.contents(source) == before
    assert_part_holds(open_model(source / "made"), "vae", VAE)
    assert_part_holds(open_model(source), "vae", VAE)


def test_folders_of_a_destination_are_made(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(source, tmp_path / "a" / "b" / "made", Layout.DIFFUSERS)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["made"]
    monkeypatch.chdir(tmp_path)
    write(source, Path("here.safetensors"), Layout.SINGLE_FILE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "here.md", "here.safetensors"]


def test_destination_below_a_file_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    expected = "file is not a directory with write permission"
    assert_refused(tmp_path, source, tmp_path / "file" / "made", "--to", "orbax", expected=expected)


def test_single_file_has_the_suffix_of_one(tmp_path: Path, source: Path) -> None:
    for name in ("made", "made.ckpt", "made.safetensor"):
        expected = rf"A single file is a \.safetensors file.*Use .*{name}\.safetensors"
        assert_refused(tmp_path, source, tmp_path / name, "--to", "single-file", expected=expected)


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("absent", lambda path: None, "There is nothing at .*absent. Expected a run directory"),
        (
            "model.ckpt",
            lambda path: path.write_bytes(b"\x80"),
            r"model\.ckpt is a pickle.*Use the model's \.safetensors",
        ),
        ("empty", lambda path: path.mkdir(), "There is no model at .*empty"),
        ("cut.safetensors", lambda path: path.write_bytes(b"\x99" * 20), "cannot be read as a safetensors file"),
        ("notes.txt", lambda path: path.write_text("no model"), "notes.txt cannot be read as a safetensors file"),
    ],
)
def test_source_that_is_not_a_model_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path / name)
    assert_refused(tmp_path, tmp_path / name, tmp_path / "made", "--to", "orbax", expected=expected)


def test_unknown_layout_is_refused(tmp_path: Path, source: Path) -> None:
    outcome = call(source, tmp_path / "made", "--to", "ckpt")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "single-file" in outcome.err + outcome.out
    assert listing(tmp_path) == {}


# Licences


def test_licence_travels_along(tmp_path: Path) -> None:
    source = component(tmp_path / "vae", VAE)
    (source / "LICENSE.md").write_text("open")
    write(source, tmp_path / "made.orbax", Layout.ORBAX)
    write(tmp_path / "made.orbax", tmp_path / "out" / "made.safetensors", Layout.SINGLE_FILE)
    write(tmp_path / "out" / "made.safetensors", tmp_path / "made", Layout.DIFFUSERS)
    names = ["made.LICENSE.md", "made.md", "made.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "made.orbax" / "LICENSE.md").read_text() == "open"
    assert [path.read_text() for path in open_model(tmp_path / "made").licences] == ["open"]
    assert (tmp_path / "out" / "made.LICENSE.md").read_text() == "open"


def test_licence_beside_a_file_travels_with_it(tmp_path: Path) -> None:
    source = foreign.single_file(tmp_path / "in" / "sd.safetensors", STABLE_1)
    source.with_name("sd.LICENSE").write_text("of sd")
    source.with_name("other.LICENSE").write_text("of another model")
    write(source, tmp_path / "made", Layout.DIFFUSERS)
    assert [path.read_text() for path in open_model(tmp_path / "made").licences] == ["of sd"]
    write(source, tmp_path / "made.safetensors", Layout.SINGLE_FILE)
    assert [path.read_text() for path in open_model(tmp_path / "made.safetensors").licences] == ["of sd"]


@pytest.mark.parametrize("to", Layout)
def test_licences_of_both_models_travel_along(tmp_path: Path, to: Layout) -> None:
    source = foreign.diffusers_folder(tmp_path / "sd", STABLE_1)
    vae = component(tmp_path / "vae", STABLE_1.vae)
    (source / "LICENSE").write_text("of sd")
    (vae / "LICENSE").write_text("of the vae")
    convert(open_model(source, parts_from=[vae]), tmp_path / "made.safetensors", to, progress=False)
    found = {path.read_text() for path in open_model(tmp_path / "made.safetensors").licences}
    assert found == {"of sd", "of the vae"}


# Reports


def test_the_command_reports_what_it_wrote(tmp_path: Path, source: Path) -> None:
    outcome = call(source, tmp_path / "made.safetensors", "--to", "single-file")
    assert outcome.code == 0
    assert re.fullmatch(r"unet, vae, text_encoder: \d+ tensors, 0\.00 GB, in .*made\.safetensors\n", outcome.out)
    again = call(tmp_path / "made.safetensors", tmp_path / "made", "--to", "orbax")
    assert again.code == 0
    assert "note" not in again.err


def test_model_in_memory_is_written(tmp_path: Path, source: Path) -> None:
    model = load_model(source, dtype="bfloat16", progress=False)
    convert(in_memory(model), tmp_path / "made", Layout.DIFFUSERS, progress=False)
    expected = foreign.diffusers_folder(tmp_path / "expected", STABLE_1, foreign.DTYPES["bfloat16"])
    for name, stored in foreign.contents(tmp_path / "made").items():
        assert stored == foreign.contents(expected)[name]
