"""The promises of sdxl_jax.config: what is written can be read back, and what is wrong is named with its remedy."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from sdxl_jax import config as configuration
from sdxl_jax import model
from sdxl_jax.commands import parsing
from sdxl_jax.config import MAY_CHANGE, SAME_WITHIN_ROUNDING, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives import OBJECTIVES
from sdxl_jax.training.run_directory import check_run

MODELS = {
    "tiny": tiny.MODEL,
    "SDXL base": model.SDXL_BASE,
    "SDXL refiner": model.SDXL_REFINER,
    "SD 1": model.SD1,
    "SD 2": model.SD2,
}


def dataclasses_of(kind: Any) -> Iterator[type]:
    """A type's dataclasses: itself, those of its fields, and those inside tuples and unions."""
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from dataclasses_of(hint)
    for argument in typing.get_args(kind):
        yield from dataclasses_of(argument)


KINDS = list(dict.fromkeys(kind for config in OBJECTIVES for kind in dataclasses_of(config)))


@pytest.mark.parametrize("name", MODELS)
def test_configuration_survives_json(name: str) -> None:
    config = TrainConfig(
        data=DataConfig(folder="images", buckets=((32, 32), (24, 40)), flip_probability=0.25),
        model=MODELS[name],
        mesh=MeshConfig(data=2, fsdp=4),
        training=TrainingConfig(trainable=("^unet/", "^vae/"), init_from=("weights.safetensors",)),
        validation=ValidationConfig(every_steps=None, prompts=("a", "b"), sizes=((32, 32), (24, 40))),
    )
    value = configuration.to_json(config)
    restored = configuration.from_json(value, TrainConfig)
    assert restored == config
    assert hash(restored) == hash(config)  # lists in the place of tuples would compare unequal, and not hash
    assert configuration.to_json(restored) == value


def edited(path: str, value: Any) -> Any:
    """The JSON of a configuration with one value set, or added, at a path with dots."""
    tree = configuration.to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    *parents, leaf = path.split(".")
    node = tree
    for name in parents:
        node = node[name]
    node[leaf] = value
    return tree


@pytest.mark.parametrize("path", ["stepz", "training.stepz", "model.unet.stepz"])
def test_unknown_key_in_json_is_refused_by_name(path: str) -> None:
    with pytest.raises(InputError, match="stepz"):
        configuration.from_json(edited(path, 1), TrainConfig)


def test_mistyped_value_in_json_is_refused_by_path() -> None:
    with pytest.raises(InputError, match=r"training\.steps"):
        configuration.from_json(edited("training.steps", "many"), TrainConfig)


def test_missing_value_in_json_is_refused_by_name() -> None:
    value = configuration.to_json(TrainConfig(DataConfig("images")))
    del value["data"]
    with pytest.raises(InputError, match="data"):
        configuration.from_json(value, TrainConfig)


@pytest.mark.parametrize("value", [None, 5, "text", []])
def test_json_that_is_no_configuration_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="not a TrainConfig"):
        configuration.from_json(value, TrainConfig)


def written(folder: Path, body: str) -> Path:
    path = folder / "config.py"
    path.write_text(f"from sdxl_jax.config import *\nfrom sdxl_jax.data.pipeline import DataConfig\n{body}\n")
    return path


def test_configuration_file_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "def get_config():\n    return TrainConfig(DataConfig('images'))")
    assert configuration.load(path) == TrainConfig(DataConfig("images"))


def test_configuration_file_may_give_enums_by_value() -> None:
    data = DataConfig("images")
    object.__setattr__(data, "crop", "centre")  # these tests check types, which a user's Python does not
    read = configuration.from_json(configuration.to_json(data), DataConfig)
    assert read.crop is CropMode.CENTRE
    object.__setattr__(data, "crop", "center")
    with pytest.raises(InputError, match="crop"):
        configuration.from_json(configuration.to_json(data), DataConfig)


def test_choices_of_the_data_are_their_values_in_json_and_on_the_command_line() -> None:
    value = configuration.to_json(DataConfig("images"))
    assert (value["crop"], value["small_buckets"], value["on_refused"]) == ("random", "pad", "error")
    given = ["--folder", "images", "--crop", "centre", "--small-buckets", "merge", "--on-refused", "skip"]
    data = parsing.parse(DataConfig, given, "data inspect")
    assert (data.crop, data.small_buckets, data.on_refused) == (CropMode.CENTRE, SmallBuckets.MERGE, OnRefused.SKIP)


def test_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no configuration file .*absent\.py.*Give a Python file with get_config"):
        configuration.load(tmp_path / "absent.py")


def test_file_without_get_config_says_what_to_define(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.py has no get_config\(\)\. Define it; it returns a .*TrainConfig"):
        configuration.load(written(tmp_path, "config = 1"))


def test_get_config_of_another_type_says_which(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"get_config\(\) of .*config\.py returned dict, expected a TrainConfig"):
        configuration.load(written(tmp_path, "def get_config():\n    return {}"))


UNKNOWN_FIELDS = {
    "TrainConfig(DataConfig('p'), trainings=None)": "training",
    "TrainConfig(DataConfig('p', batchsize=3))": "batch_size",
    "TrainConfig(DataConfig('p'), training=TrainingConfig(step=3))": "steps",
    "TrainConfig(DataConfig('p'), model=ModelConfig(text_towers=()))": "text",
}
LOAD_EACH = """
import sys
from pathlib import Path
from sdxl_jax import config, errors
for path in sys.argv[1:]:
    try:
        config.load(Path(path))
    except errors.InputError as error:
        print(error)
"""


def test_unknown_field_in_a_file_names_the_nearest_first(tmp_path: Path) -> None:
    # In a process of its own: Python's own message names the class, that of the shape checker does not.
    paths = []
    for number, expression in enumerate(UNKNOWN_FIELDS):
        (tmp_path / str(number)).mkdir()
        paths.append(str(written(tmp_path / str(number), f"def get_config():\n    return {expression}")))
    command = [sys.executable, "-c", LOAD_EACH, *paths]
    messages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for path, message, nearest in zip(paths, messages, UNKNOWN_FIELDS.values(), strict=True):
        assert message.startswith(path)
        assert re.search(rf"nearest first: {nearest}[,.]", message), message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def get_config(:", r"SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("def get_config():\n    return undefined", "undefined"),
        ("def get_config():\n    return TrainConfig()", "data"),
    ],
)
def test_file_that_does_not_run_says_why(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"config\.py.*{said}"):
        configuration.load(written(tmp_path, body))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_line_of_explanation(kind: type) -> None:
    classes = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    bodies = [
        node.body
        for base in classes
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(base.__module__))))
        if isinstance(node, ast.ClassDef) and node.name == base.__name__
    ]
    assert len(bodies) == len(classes)
    explained = {
        field.target.id
        for body in bodies
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
    assert {field.name for field in dataclasses.fields(kind)} - explained == set()


def test_the_walk_over_dataclasses_reaches_every_level() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert names >= {"TrainConfig", "DataConfig", "ModelConfig", "UNetConfig", "Tower", "ClipTextConfig", "EmaConfig"}


@pytest.mark.parametrize("entry", [*MAY_CHANGE, *SAME_WITHIN_ROUNDING])
def test_what_may_change_exists(entry: str) -> None:
    kind: Any = TrainConfig
    for name in entry.split("."):
        kind = typing.get_type_hints(kind)[name]


@pytest.mark.parametrize(
    "path", ["checkpoint.keep", "data.folder", "mesh.fsdp", "training.init_from", "validation.steps"]
)
def test_resume_may_change_what_does_not_change_learning(path: str) -> None:
    old = configuration.to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    new = edited(path, 12345)
    assert configuration.differences(old, new)
    assert configuration.blocking_differences(old, new) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("data.batch_size", 12, "data.batch_size: 8 -> 12"),
        ("training.seed", 0.5, "training.seed: 0 -> 0.5"),
        ("training.added", 1, "training.added: None -> 1"),
        ("model.vae.groups", 1, "model.vae.groups: 2 -> 1"),
        ("model.micro", None, "model.micro: {"),
    ],
)
def test_resume_may_not_change_what_changes_learning(path: str, value: Any, line: str) -> None:
    old = configuration.to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    blocking = configuration.blocking_differences(old, edited(path, value))
    assert len(blocking) == 1
    assert blocking[0].startswith(line)


def test_names_of_what_may_change_are_no_prefixes() -> None:
    """`data.folder` allows neither `data.folders` nor all of `data`."""
    assert configuration.blocking_differences({"data": {"folders": 1}}, {"data": {"folders": 2}})
    assert configuration.blocking_differences({"data": 1}, {"data": 2})


def test_defaults_are_sdxl_base() -> None:
    assert TrainConfig(DataConfig("images")).model == ModelConfig() == model.SDXL_BASE


def test_a_run_of_before_captions_of_several_lines_were_asked_about_goes_on(tmp_path: Path) -> None:
    config = TrainConfig(DataConfig(folder="images"))
    saved = configuration.to_json(config)
    assert saved["data"].pop("caption_lines") == "lines"
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    assert check_run(config, tmp_path) == []
    whole = dataclasses.replace(config, data=DataConfig(folder="images", caption_lines=CaptionLines.WHOLE))
    with pytest.raises(InputError, match=r"data\.caption_lines: lines -> whole"):
        check_run(whole, tmp_path)


RENAMED_FIELDS = [
    (("training", "trains"), ("training", "trainable"), ["^vae/"]),
    (("model", "no_prompt"), ("model", "unconditional"), "empty"),
    (("hosts",), ("processes",), {"join_timeout_seconds": 7.0}),
]


@pytest.mark.parametrize(("old", "new", "value"), RENAMED_FIELDS, ids=lambda each: ".".join(each) if each else "")
def test_saved_configuration_is_read_with_the_old_name_of_a_renamed_field(
    old: tuple[str, ...], new: tuple[str, ...], value: Any
) -> None:
    saved = configuration.to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    group = saved if len(old) == 1 else saved[old[0]]
    del group[new[-1]]
    group[old[-1]] = value
    read = configuration.to_json(configuration.from_json(saved, TrainConfig))
    assert (read if len(new) == 1 else read[new[0]])[new[-1]] == value


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("TrainingConfig", "trains", "trainable"),
        ("ModelConfig", "no_prompt", "unconditional"),
        ("TrainConfig", "hosts", "processes"),
    ],
)
def test_configuration_file_with_the_old_name_of_a_field_is_told_the_new_one(kind: str, old: str, new: str) -> None:
    message = f"{kind}.__init__() got an unexpected keyword argument {old!r}"  # as Python says it
    assert configuration._nearest_field(message) == f". It is called {new} now"
