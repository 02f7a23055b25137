"""Options stand beside a configuration: one command line, two dataclasses, the configuration's own type."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sdxl_jax.commands import parsing
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.errors import InputError


@dataclass(frozen=True)
class Inner:
    size: int = 1
    """Of it."""


@dataclass(frozen=True)
class Base:
    data: Inner = field(default_factory=Inner)
    """What is read."""


@dataclass(frozen=True)
class Other(Base):
    loss: Inner = field(default_factory=Inner)
    """Of another objective."""


@dataclass(frozen=True)
class Options:
    """What the command does."""

    run_dir: Path = Path("runs")
    """Where."""
    size: int = 8
    """Its own, beside that of `data`."""


def test_flags_of_options_and_configuration_stand_beside_each_other() -> None:
    arguments = ["--run-dir", "elsewhere", "--data.size", "3", "--loss.size", "4", "--size", "5"]
    options, config = parsing.parse_with_config(Options(), Other(), arguments, "command")
    assert options == Options(Path("elsewhere"), 5)
    assert config == Other(Inner(3), Inner(4))
    assert parsing.parse_with_config(Options(size=7), Base(Inner(6)), [], "command") == (
        Options(size=7),
        Base(Inner(6)),
    )


def test_help_of_both_says_nothing_of_their_standing_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsing.parse_with_config(Options(), Other(), ["--help"], "command")
    said = capsys.readouterr().out
    assert left.value.code == 0
    for words in ("What the command does.", "--run-dir PATH", "--size INT", "--data.size INT", "--loss.size INT"):
        assert words in said
    assert "options.run-dir" not in said
    assert "config." not in said


def test_configuration_of_a_command_comes_first() -> None:
    assert parsing.config_path(["a.py", "--help"], "train", "usage") == Path("a.py")
    for arguments in ([], ["--run-dir", "x"]):
        with pytest.raises(InputError, match="The first argument of train is a configuration file"):
            parsing.config_path(arguments, "train", "usage")


def test_help_of_the_whole_imports_nothing_heavy() -> None:
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
