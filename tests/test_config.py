"""sdxl_jax.config: configurations are read back as written, and errors name the field and the remedy."""

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

from sdxl_jax.commands import parsing
from sdxl_jax.config import (
    MAY_CHANGE,
    SAME_WITHIN_ROUNDING,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
    _nearest_field,
    blocking_differences,
    load,
)
from sdxl_jax.data.captions import CaptionLines
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives import OBJECTIVES
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import AdversarialDiffusionConfig
from sdxl_jax.training.objectives.distillation.teacher import DistillationConfig
from sdxl_jax.training.run_directory import check_run

MODELS = {
    "tiny": tiny.MODEL,
    "SDXL base": SDXL_BASE,
    "SDXL refiner": SDXL_REFINER,
    "SD 1": SD1,
    "SD 2": SD2,
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
def test_configuration_is_equal_after_json_and_back(name: str) -> None:
    config = TrainConfig(
        data=DataConfig(folder="images", buckets=((32, 32), (24, 40)), flip_probability=0.25),
        model=MODELS[name],
        mesh=MeshConfig(data=2, fsdp=4),
        training=TrainingConfig(trainable=("^unet/", "^vae/"), init_from=("weights.safetensors",)),
        validation=ValidationConfig(every_steps=None, prompts=("a", "b"), sizes=((32, 32), (24, 40))),
    )
    value = to_json(config)
    restored = from_json(value, TrainConfig)
    assert restored == config
    assert hash(restored) == hash(config)  # lists in place of tuples would be unequal and not hashable
    assert to_json(restored) == value


def edited(path: str, value: Any) -> Any:
    """The JSON of a configuration with one value set, or added, at a path with dots."""
    tree = to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    *parents, leaf = path.split(".")
    node = tree
    for name in parents:
        node = node[name]
    node[leaf] = value
    return tree


@pytest.mark.parametrize("path", ["stepz", "training.stepz", "model.unet.stepz"])
def test_unknown_key_in_json_is_refused_by_name(path: str) -> None:
    with pytest.raises(InputError, match="stepz"):
        from_json(edited(path, 1), TrainConfig)


def test_mistyped_value_in_json_is_refused_by_path() -> None:
    with pytest.raises(InputError, match=r"training\.steps"):
        from_json(edited("training.steps", "many"), TrainConfig)


def test_missing_value_in_json_is_refused_by_name() -> None:
    value = to_json(TrainConfig(DataConfig("images")))
    del value["data"]
    with pytest.raises(InputError, match="data"):
        from_json(value, TrainConfig)


@pytest.mark.parametrize("value", [None, 5, "text", []])
def test_json_that_is_not_a_configuration_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="not a TrainConfig"):
        from_json(value, TrainConfig)


def written(folder: Path, body: str) -> Path:
    path = folder / "config.py"
    path.write_text(f"from sdxl_jax.config import *\nfrom sdxl_jax.data.pipeline import DataConfig\n{body}\n")
    return path


def test_configuration_file_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "def get_config():\n    return TrainConfig(DataConfig('images'))")
    assert load(path) == TrainConfig(DataConfig("images"))


def test_configuration_file_may_give_enums_by_value() -> None:
    data = DataConfig("images")
    object.__setattr__(data, "crop", "centre")  # past the type checks of the test run, which users do not have
    read = from_json(to_json(data), DataConfig)
    assert read.crop is CropMode.CENTRE
    object.__setattr__(data, "crop", "center")
    with pytest.raises(InputError, match="crop"):
        from_json(to_json(data), DataConfig)


def test_choices_of_the_data_are_their_values_in_json_and_on_the_command_line() -> None:
    value = to_json(DataConfig("images"))
    assert (value["crop"], value["small_buckets"], value["on_refused"]) == ("random", "pad", "error")
    given = ["--folder", "images", "--crop", "centre", "--small-buckets", "merge", "--on-refused", "skip"]
    data = parsing.parse(DataConfig, given, "data inspect")
    assert (data.crop, data.small_buckets, data.on_refused) == (CropMode.CENTRE, SmallBuckets.MERGE, OnRefused.SKIP)


def test_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no configuration file .*absent\.py.*Give a Python file with a function get_config"
    ):
        load(tmp_path / "absent.py")


def test_error_for_a_file_without_get_config_says_what_to_define(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.py has no get_config\(\)\. Define it, and return an? .*TrainConfig"):
        load(written(tmp_path, "config = 1"))


def test_error_for_get_config_of_another_type_names_the_type(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"get_config\(\) of .*config\.py returned dict\. Return a TrainConfig"):
        load(written(tmp_path, "def get_config():\n    return {}"))


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
    # In another process: Python's own message names the class, that of the shape checker does not.
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
    ("body", "reason"),
    [
        ("def get_config(:", r"SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("def get_config():\n    return undefined", "undefined"),
        ("def get_config():\n    return TrainConfig()", "data"),
    ],
)
def test_error_for_a_file_that_does_not_run_has_the_reason(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"config\.py.*{reason}"):
        load(written(tmp_path, body))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_docstring(kind: type) -> None:
    classes = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    bodies = [
        node.body
        for base in classes
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(base.__module__))))
        if isinstance(node, ast.ClassDef) and node.name == base.__name__
    ]
    assert len(bodies) == len(classes)
    documented = {
        field.target.id
        for body in bodies
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
    assert {field.name for field in dataclasses.fields(kind)} - documented == set()


def test_the_walk_over_dataclasses_reaches_every_level() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert names >= {"TrainConfig", "DataConfig", "ModelConfig", "UNetConfig", "Tower", "ClipTextConfig", "EmaConfig"}


@pytest.mark.parametrize("entry", [*MAY_CHANGE, *SAME_WITHIN_ROUNDING])
def test_fields_that_may_change_exist(entry: str) -> None:
    owners = {"teacher": DistillationConfig, "discriminator": AdversarialDiffusionConfig}
    kind: Any = owners.get(entry.split(".")[0], TrainConfig)
    for name in entry.split("."):
        kind = next((each for each in typing.get_args(kind) if dataclasses.is_dataclass(each)), kind)  # … | None
        kind = typing.get_type_hints(kind)[name]


@pytest.mark.parametrize(
    "path", ["checkpoint.keep", "data.folder", "mesh.fsdp", "training.init_from", "validation.steps"]
)
def test_resume_accepts_changes_that_do_not_affect_training(path: str) -> None:
    old = to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    new = edited(path, 12345)
    assert differences(old, new)
    assert blocking_differences(old, new) == []


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
def test_resume_refuses_changes_that_affect_training(path: str, value: Any, line: str) -> None:
    old = to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    blocking = blocking_differences(old, edited(path, value))
    assert len(blocking) == 1
    assert blocking[0].startswith(line)


def test_names_of_fields_that_may_change_are_not_prefixes() -> None:
    """`data.folder` permits neither `data.folders` nor all of `data`."""
    assert blocking_differences({"data": {"folders": 1}}, {"data": {"folders": 2}})
    assert blocking_differences({"data": 1}, {"data": 2})


def test_defaults_are_sdxl_base() -> None:
    assert TrainConfig(DataConfig("images")).model == ModelConfig() == SDXL_BASE


def test_a_run_saved_before_caption_lines_was_an_option_resumes(tmp_path: Path) -> None:
    config = TrainConfig(DataConfig(folder="images"))
    saved = to_json(config)
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
    saved = to_json(TrainConfig(DataConfig("images"), model=tiny.MODEL))
    group = saved if len(old) == 1 else saved[old[0]]
    del group[new[-1]]
    group[old[-1]] = value
    read = to_json(from_json(saved, TrainConfig))
    assert (read if len(new) == 1 else read[new[0]])[new[-1]] == value


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("TrainingConfig", "trains", "trainable"),
        ("ModelConfig", "no_prompt", "unconditional"),
        ("TrainConfig", "hosts", "processes"),
    ],
)
def test_error_for_the_old_name_of_a_field_in_a_file_names_the_new_one(kind: str, old: str, new: str) -> None:
    message = f"{kind}.__init__() got an unexpected keyword argument {old!r}"  # Python's message
    assert _nearest_field(message) == f". It is called {new} now"
