"""The benchmarks against torch run, and measure the same work on both sides. Their figures are not tested."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SAMPLE = Path(__file__).parents[1] / "benchmarks" / "sample.py"
ACCELERATOR = SAMPLE.with_name("accelerator.py")


def module_of(path: Path) -> Any:
    """A benchmark as a module: it imports neither jax nor torch until it measures."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sample() -> Any:
    return module_of(SAMPLE)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds its own folder
    return module_of(ACCELERATOR)


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
def test_measured_models_are_valid(sample: Any, size: str) -> None:
    sample.model_config(size).check()


@pytest.mark.slow
def test_flops_per_image_are_two_unet_evaluations_per_step(sample: Any) -> None:
    """The base at 1024²: 6.76 TFLOP per evaluation (docs/guides/scale.md, rounded). The rest, text encoders and decode,
    is less than one step."""
    given = ["--size", "full", "--side", "1024", "--steps"]
    config = sample.model_config("full")
    of_20, of_21 = (sample.image_flops(config, sample.arguments([*given, steps])) for steps in ("20", "21"))
    assert of_21 - of_20 == pytest.approx(2 * 6.76e12, rel=0.005 / 6.76)
    assert 0 < of_20 - 20 * (of_21 - of_20) < of_21 - of_20


def test_published_figure_is_reported_for_its_own_settings_only(sample: Any) -> None:
    same = ["--size", "full", "--side", "1024", "--steps", "20", "--guidance", "8"]
    assert sample.comparable(sample.arguments(same))
    for changed in (["--size", "small"], ["--side", "512"], ["--steps", "30"], ["--guidance", "1"]):
        assert not sample.comparable(sample.arguments([*same, *changed]))


@pytest.mark.slow
def test_sample_benchmark_generates_the_same_images_on_both_sides() -> None:
    """In float32, where rounding changes few bytes, by one level: 0.02 % in a run of three steps."""
    for library in ("torch", "diffusers"):
        pytest.importorskip(library)
    command = [sys.executable, str(SAMPLE), "--size", "tiny", "--eager", "--steps", "3", "--rounds", "1"]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert re.search(r"^ratio: \d+\.\d+ times", report, re.MULTILINE), report
    found = re.search(r"at most (\d+) of 255 levels apart, ([\d.]+)% of the bytes", report)
    assert found is not None, report
    assert int(found[1]) <= 1
    assert float(found[2]) < 1


STUB = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text('{"what": "step", "result": "measured", "note": "", "seconds": 0.5, "images_per_second": 2.0}\\n')
with out.open("a") as file:
    file.write('{"what": "step", "result": "measured", "note": "gemm 50%"}\\n')
"""


def test_a_piece_that_fails_or_hangs_costs_itself_alone_and_what_no_longer_fits_is_named(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "stub.py"
    monkeypatch.setattr(accelerator, "__file__", str(stub))
    piece = accelerator.Piece(lambda *_: None, least=10, limit=30)

    def rows(ending: str, left: float = 60.0, **changed: Any) -> list[dict[str, Any]]:
        stub.write_text(STUB + ending)
        return list(accelerator.run("piece", piece._replace(**changed), left, False))

    step = {"what": "step", "result": "measured", "note": "gemm 50%", "seconds": 0.5, "images_per_second": 2.0}
    assert rows("") == [step]
    assert rows("raise SystemExit('RESOURCE_EXHAUSTED: out of memory')") == [
        step,
        {"what": "piece", "result": "FAILED", "note": "exit code 1: RESOURCE_EXHAUSTED: out of memory"},
    ]
    assert rows("time.sleep(60)", limit=1.0) == [step, {"what": "piece", "result": "FAILED", "note": "ended after 1 s"}]
    (late,) = rows("", left=9.0)
    assert late == {"what": "piece", "result": "left out", "note": "9 s left; raise --minutes"}
    (missing,) = rows("", needs=("no_such_package",))
    assert missing["note"] == "no_such_package is not installed"


def test_the_table_of_an_accelerator_compares_with_diffusers(accelerator: Any) -> None:
    rows = [
        {"what": "step", "result": "measured", "note": "", "images_per_second": 3.0, "seconds": 0.5, "mfu": None},
        {"what": "step, diffusers", "result": "measured", "note": "", "images_per_second": 2.0},
        {"what": "attention", "result": "passed", "note": "error 2e-3"},
    ]
    accelerator.compare(rows)
    assert list(accelerator.table(rows))[2:] == [
        "| step | measured | 0.5000 | 3.000 |  |  | 1.50 |  |",
        "| step, diffusers | measured |  | 2.000 |  |  |  |  |",
        "| attention | passed |  |  |  |  |  | error 2e-3 |",
    ]


@pytest.mark.slow
def test_every_piece_for_an_accelerator_runs_on_a_cpu(tmp_path: Path) -> None:
    for library in ("torch", "diffusers"):
        pytest.importorskip(library)
    report = tmp_path / "rows.json"
    command = [sys.executable, str(ACCELERATOR), "--quick", "--minutes", "20", "--json", str(report)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = json.loads(report.read_text())
    assert {row["result"] for row in rows} == {"passed", "measured"}, done.stdout
    assert done.returncode == 0
    measured = {row["what"]: row for row in rows if "images_per_second" in row}
    for what in ("train step 1024², batch 4", "image 1024², batch 1", "image 1024², batch 8"):
        assert measured[what]["ratio"] > 0
    assert len(measured["train step 1024², batch 4"]["costs"]) == 3
