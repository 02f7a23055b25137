"""The benchmarks against torch run, and measure the same work on both sides. Their figures are not tested."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SAMPLE = Path(__file__).parents[1] / "benchmarks" / "sample.py"


@pytest.fixture(scope="module")
def sample() -> Any:
    """benchmarks/sample.py as a module: it imports neither jax nor torch until it measures."""
    spec = importlib.util.spec_from_file_location("sample_benchmark", SAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
