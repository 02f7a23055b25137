"""Exit codes, for scripts: 0 done, 2 the user's input, 1 the machine, 143 and 130 stopped with work left.

Runs of several processes: test_processes.py. Training that is stopped: test_killing.py.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiling
import pytest
import tiny
from command import call

from sdxl_jax.commands import signals
from sdxl_jax.commands import train as train_command
from sdxl_jax.errors import InputError, Interrupted, MachineError, ProcessFailed, exit_code, fault
from sdxl_jax.files.paths import local

CONFIG = """
from pathlib import Path

import killing


def get_config():
    return killing.train_config(Path({folder!r}), 2)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with images/ and config.py."""
    tiny.make_folder(tmp_path / "images", images=8)
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path / "images")))
    return tmp_path


# The table


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (MachineError("x"), 1),
        (ProcessFailed("x", 2), 2),
        (ProcessFailed("x", 1), 1),
        (Interrupted("SIGTERM"), 143),
        (Interrupted("SIGINT on process 1"), 130),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(2), 2),
        (SystemExit("words"), 1),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2),
        (FileNotFoundError(errno.ENOENT, "x"), 2),
        (PermissionError(errno.EACCES, "x"), 2),
        (NotADirectoryError(errno.ENOTDIR, "x"), 2),
        (OSError("a damaged file"), 2),
        *((OSError(number, "x"), 1) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENFILE)),
        (TimeoutError(errno.ETIMEDOUT, "x"), 1),
        (ZeroDivisionError(), 1),
    ],
    ids=repr,
)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_full_disk_is_recognised_in_errors_that_are_not_oserrors() -> None:
    assert (
        fault(ValueError("RESOURCE_EXHAUSTED: writing x [OS error 28: ENOSPC No space left on device]")) is MachineError
    )
    assert fault(RuntimeError("Input/output error; reading x")) is MachineError
    assert fault(ValueError("it is damaged")) is InputError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("what was given"), 2, "error: what was given\n"),
        (MachineError("no room"), 1, "error: no room\n"),
        (ProcessFailed("Process 1 stopped: full", 1), 1, "error: Process 1 stopped: full\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "has free space"),
        (ValueError("tensorstore: No space left on device"), 1, "has free space"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "Check that the path exists"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 2, "the package wandb is not installed"),
    ],
    ids=repr,
)
def test_command_that_fails_reports_one_message(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, message: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(train_command, "run", fails)
    outcome = call("train", "config.py")
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    debugged = call("train", "config.py", "--debug")
    assert debugged.code == code
    assert "Traceback" in debugged.err


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(train_command, "run", fails)
    with pytest.raises(ZeroDivisionError):
        call("train", "config.py")


# Paths of other file systems


SCHEMES = ["gs://bucket/x", "s3://bucket/x", "https://example.org/x"]
URL = "s3://bucket/x"


def commands(home: Path, url: str) -> dict[str, list[object]]:
    """A command for each argument and option that is a path."""
    train: list[object] = ["train", home / "config.py"]
    sample: list[object] = ["--prompt", "x", "--out", home / "out"]
    return {
        "train RUN": [*train, "--run-dir", url],
        "data.folder": [*train, "--run-dir", home / "run", "--data.folder", url],
        "data.cache": [*train, "--run-dir", home / "run", "--data.cache", url, "--data.crops-per-image", 1],
        "training.init_from": [*train, "--run-dir", home / "run", "--training.init-from", url],
        "training.compilation_cache": [*train, "--run-dir", home / "run", "--training.compilation-cache", url],
        "encode": ["data", "encode", home / "config.py", "--data.cache", url, "--data.crops-per-image", 1],
        "build SRC": ["data", "build", url, home / "shards"],
        "build DST": ["data", "build", home / "images", url],
        "inspect": ["data", "inspect", url],
        "inspect --dump": ["data", "inspect", home / "images", "--dump", 1, url],
        "sample MODEL": ["sample", url, *sample],
        "sample --out": ["sample", home / "run", "--prompt", "x", "--out", url],
        "sample --refiner": ["sample", home / "run", *sample, "--refiner", url],
        "sample --lora": ["sample", home / "run", *sample, "--lora", f"{url}:0.5"],
        "convert SRC": ["convert", url, home / "made", "--to", "orbax"],
        "convert DST": ["convert", home / "images", url, "--to", "orbax"],
        "serve": ["serve", url],
        "quickstart": ["quickstart", "--run-dir", url],
    }


@pytest.mark.parametrize("option", commands(Path(), ""))
def test_path_of_another_scheme_is_refused_by_every_option(
    home: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no folder named s3: is created."""
    monkeypatch.chdir(home)
    outcome = call(*commands(home, URL)[option])
    assert outcome.code == 2, outcome
    assert "s3://bucket/x" in outcome.err
    assert "Copy it to a local folder first" in outcome.err
    assert sorted(path.name for path in home.iterdir()) == ["config.py", "images"]


@pytest.mark.parametrize("url", SCHEMES)
def test_every_scheme_is_refused_in_text_and_in_a_path(url: str) -> None:
    for given in (url, Path(url)):
        with pytest.raises(InputError, match=f"the model is {url}. Expected a path .* Copy it to a local folder first"):
            local(given, "the model")


@pytest.mark.parametrize(
    "path", ["x", "/x/y", "./a:b/c", "a:b", "C:/x", "x/gs://y", "style.safetensors:0.8", "12:30/x"]
)
def test_file_names_with_colons_are_accepted(path: str) -> None:
    assert local(path, "x") == Path(path)


def test_python_functions_refuse_paths_of_another_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_jax import convert, load_model, train
    from sdxl_jax.data.build.build import build
    from sdxl_jax.weights.open import open_model

    monkeypatch.chdir(tmp_path)
    config = tiny.train_config(tiny.make_folder(tmp_path / "images"))
    calls: list[Callable[[], Any]] = [
        lambda: train(config, URL),
        lambda: load_model(URL),
        lambda: open_model(URL),
        lambda: convert("model", URL, "orbax"),
        lambda: build(str(tmp_path / "images"), Path(URL)),
    ]
    for refused in calls:
        with pytest.raises(InputError, match="s3://bucket/x"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


# Signals


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_work_without_a_loop_is_stopped_with_the_signals_code(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `data encode` and `data build`, which keep finished work."""
    before = [signal.getsignal(each) for each, _ in SIGNALS]
    cleaned = False
    with pytest.raises(Interrupted) as stopped, signals.stop():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned = True
    assert cleaned
    assert stopped.value.code == code
    assert "what was finished is kept. Run the same command to resume" in capsys.readouterr().err
    assert [signal.getsignal(each) for each, _ in SIGNALS] == before


SLOW_BUILD = """
import sys, time
from sdxl_jax import __main__ as command
from sdxl_jax.data.build import destinations

write = destinations._write_part


def slow(*arguments):
    print("a piece", flush=True)
    time.sleep(60)


destinations._write_part = slow
sys.argv[1:] = ["data", "build", *sys.argv[1:], "--workers", "0"]
command.program()
"""

EARLY = """
import sys, time
from sdxl_jax import __main__ as command
from sdxl_jax.commands import train


def slow(*_):
    print("importing", flush=True)
    time.sleep(60)


train.run = slow
sys.argv[1:] = ["train", "config.py"]
command.program()
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("program", ["build", "train"])
def test_process_that_is_stopped_early_ends_with_the_signals_code(
    home: Path, program: str, number: int, code: int
) -> None:
    source = {"build": SLOW_BUILD, "train": EARLY}[program]
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(home / "images"), str(home / "shards")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"stopped by {signal.Signals(number).name}" in err


# A pipe that closes


@pytest.mark.slow
def test_closed_pipe_does_not_end_training(home: Path, compiled: Path) -> None:
    """`sdxl-jax train … 2>&1 | head -1` finishes, with exit code 0."""
    environment = compiling.environment(compiled)
    command = [sys.executable, "-m", "sdxl_jax", "train", str(home / "config.py"), "--run-dir", str(home / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"{\n"
    process.stdout.close()  # as `head` does
    assert process.wait(600) == 0
    assert len((home / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_closed_pipe_keeps_the_exit_code_of_other_commands(home: Path) -> None:
    for given, code in (([str(home / "images")], 0), (["no-such-folder"], 2)):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "sdxl_jax", "data", "inspect", *given]
        process = subprocess.Popen(command, stdout=writer, stderr=writer, cwd=Path(__file__).parents[1])
        os.close(writer)
        assert process.wait(120) == code
