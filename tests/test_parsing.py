"""Options and a configuration on one command line: two dataclasses, the configuration's own type."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sdxl_jax.commands import parsing
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.errors import InputError
from sdxl_jax.sampling.options import Options as SamplingOptions


@dataclass(frozen=True)
class Inner:
    size: int = 1
    """A size."""


@dataclass(frozen=True)
class Base:
    data: Inner = field(default_factory=Inner)
    """The data."""


@dataclass(frozen=True)
class Other(Base):
    loss: Inner = field(default_factory=Inner)
    """A field that the base does not have."""


@dataclass(frozen=True)
class Options:
    """What the command does."""

    run_dir: Path = Path("runs")
    """Run directory."""
    size: int = 8
    """A size, not that of `data`."""


def test_flags_of_options_and_configuration_are_parsed_together() -> None:
    arguments = ["--run-dir", "elsewhere", "--data.size", "3", "--loss.size", "4", "--size", "5"]
    options, config = parsing.parse_with_config(Options(), Other(), arguments, "command")
    assert options == Options(Path("elsewhere"), 5)
    assert config == Other(Inner(3), Inner(4))
    assert parsing.parse_with_config(Options(size=7), Base(Inner(6)), [], "command") == (
        Options(size=7),
        Base(Inner(6)),
    )


def test_help_of_both_has_no_prefixes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsing.parse_with_config(Options(), Other(), ["--help"], "command")
    output = capsys.readouterr().out
    assert left.value.code == 0
    for words in ("What the command does.", "--run-dir PATH", "--size INT", "--data.size INT", "--loss.size INT"):
        assert words in output
    assert "options.run-dir" not in output
    assert "config." not in output


def test_configuration_of_a_command_comes_first() -> None:
    assert parsing.config_path(["a.py", "--help"], "train", "usage") == Path("a.py")
    for arguments in ([], ["--run-dir", "x"]):
        with pytest.raises(InputError, match="The first argument of train is a configuration file"):
            parsing.config_path(arguments, "train", "usage")


def test_help_without_a_command_imports_nothing_heavy() -> None:
    program = "import sys; from sdxl_jax.__main__ import main; main(['--help']); "
    program += "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "usage: sdxl-jax COMMAND" in done.stdout
    assert not set(done.stderr.split()) & {"jax", "flax", "numpy", "tyro", "grain", "tqdm"}


@pytest.mark.parametrize(
    ("flag", "new"),
    [
        ("--training.trains=^vae/", "--training.trainable"),
        ("--model.no-prompt", "--model.unconditional"),
        ("--hosts.join-timeout-seconds", "--processes"),
    ],
)
def test_flag_of_a_renamed_field_is_refused_with_the_new_name(flag: str, new: str) -> None:
    config = TrainConfig(DataConfig("images"))
    with pytest.raises(InputError, match=f"is called {new} now"):
        parsing.parse_with_config(Options(), config, [flag, "1"], "train")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "steps",
            "many",
            "steps is \"many\", expected a whole number (invalid literal for int() with base 10: 'many')",
        ),
        (
            "height",
            "tall",
            "height is \"tall\", expected a whole number (invalid literal for int() with base 10: 'tall')",
        ),
        ("guidance", "1 2", 'guidance is "1 2", expected a number (Unrecognized options: 2)'),
        ("guidance_interval", [0.5], "guidance_interval is [0.5], expected 2 values, each a number (Missing value"),
        ("seed", "", 'seed is "", expected a whole number (Missing value. Expected 1 values)'),
        ("crop", "3x4", "crop is \"3x4\", expected TOP,LEFT in pixels (the value '3x4'"),
        ("original-size", "9", 'original-size is "9", expected HxW in pixels'),
        ("sigmas", "x", "sigmas is \"x\", expected one of schedule, karras, exponential (invalid choice 'x')"),
        (
            "pag_parts",
            ["up", "x"],
            'pag_parts is ["up", "x"], expected any number of values, each one of down, mid, up',
        ),
        ("sequential", "yes", 'sequential is "yes", expected true or false'),
        ("steps", "--help", 'steps is "--help", expected a whole number'),
    ],
)
def test_a_value_that_cannot_be_parsed_is_refused_with_name_value_and_expectation(
    name: str, value: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as refused:
        parsing.from_mapping(SamplingOptions(), {"first_index": 3, name: value}, "line 2")
    assert str(refused.value).startswith(f"line 2: {expected}")
    assert capsys.readouterr() == ("", "")
