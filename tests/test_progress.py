"""The promises of progress: a bar for people, lines without carriage returns for a log, JSON for Cloud Logging."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_jax import progress
from sdxl_jax.errors import InputError
from sdxl_jax.progress import LogFormat, log_format, report_error, tqdm


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (progress.VARIABLE, "K_SERVICE", "CLOUD_RUN_JOB", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


def steps(stream: io.StringIO, count: int = 5, **options: object) -> list[str]:
    """What a bar prints over some steps, each with a loss."""
    with tqdm(total=count, desc="training", unit="step", file=stream, mininterval=0, **options) as bar:
        for step in range(count):
            bar.fields = {"step": step + 1}
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    return stream.getvalue().splitlines()


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    steps(stream)
    assert "\r" in stream.getvalue() and "100%|" in stream.getvalue()


def test_a_notebook_gets_a_bar() -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    steps(stream)
    assert "\r" in stream.getvalue()


def test_a_log_gets_the_first_line_and_the_last() -> None:
    stream = io.StringIO()
    first, last = steps(stream)
    assert first.startswith("training: 1/5 [") and first.endswith(", loss 0]")
    assert last.startswith("training: 5/5 [") and last.endswith(", loss 4]")
    assert "\r" not in stream.getvalue() and "|" not in stream.getvalue()


def test_a_log_gets_a_line_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(1010, 10)  # 10 s per step
    monkeypatch.setattr(progress.time, "time", lambda: next(times))
    stream = io.StringIO()
    with tqdm(total=9, file=stream, mininterval=0) as bar:
        for _ in range(9):
            bar.update()
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["1", "4", "7", "9"]


def test_work_shorter_than_its_delay_prints_nothing_and_none_is_no_reason_to() -> None:
    stream = io.StringIO()
    assert steps(stream, delay=60, disable=None) == []
    assert len(steps(stream, disable=None)) == 2


def test_cloud_logging_gets_objects_with_severity_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K_SERVICE", "trainer")
    stream = io.StringIO()
    first, last = map(json.loads, steps(stream))
    tqdm.write("  a note\nof two lines, ε", file=stream)
    note = json.loads(stream.getvalue().splitlines()[-1])
    assert first["severity"] == "INFO" and first["message"].startswith("training: 1/5")
    assert (last["activity"], last["step"], last["done"], last["total"], last["unit"]) == ("training", 5, 5, 5, "step")
    assert note.keys() == {"severity", "message", "time"} and note["message"] == "a note\nof two lines, ε"


def test_kubernetes_has_cloud_logging_on_googles_machines_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "_PRODUCT", tmp_path / "product_name")
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert steps(io.StringIO())[0].startswith("training: 1/5")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert json.loads(steps(io.StringIO())[0])["done"] == 1
    (tmp_path / "product_name").write_text("m5.large\n")
    assert steps(io.StringIO())[0].startswith("training: 1/5")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_the_chosen_format_beats_the_place(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K_SERVICE", "trainer")
    with log_format(LogFormat.TEXT):
        assert steps(stream)[-1].startswith("training: 5/5")
    with log_format(LogFormat.JSON), log_format(LogFormat.AUTO):  # auto changes nothing
        assert json.loads(steps(stream)[-1])["done"] == 5


def test_an_error_is_an_entry_of_that_severity(capsys: pytest.CaptureFixture[str]) -> None:
    report_error("error: no room")
    with log_format(LogFormat.JSON):
        report_error("error: no room")
    plain, entry = capsys.readouterr().err.splitlines()
    assert plain == "error: no room"
    assert json.loads(entry)["severity"] == "ERROR" and json.loads(entry)["message"] == plain


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.VARIABLE, "yaml")
    with pytest.raises(InputError, match=r"SDXL_JAX_LOG_FORMAT=yaml. Give one of auto, text, json"):
        steps(io.StringIO())


def test_messages_reach_a_pipe_at_once() -> None:
    """A killed process loses what its buffers hold."""
    program = "import os; from sdxl_jax.progress import tqdm; tqdm.write('started'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "started\n"
