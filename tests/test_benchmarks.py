"""That the benchmarks beside torch run, and measure the same work on both sides. What they measure is not tested."""

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
def test_models_that_are_measured_are_valid(sample: Any, size: str) -> None:
    sample.model_config(size).check()


@pytest.mark.slow
def test_operations_of_an_image_are_those_of_the_unet_twice_a_step(sample: Any) -> None:
    """The base at 1024²: 6.76 TFLOP an evaluation (docs/guides/scale.md), as it is rounded there. What is besides, the
    text encoders and the decode, is less than a single step."""
    given = ["--size", "full", "--side", "1024", "--steps"]
    config = sample.model_config("full")
    of_20, of_21 = (sample.flops(config, sample.arguments([*given, steps])) for steps in ("20", "21"))
    assert of_21 - of_20 == pytest.approx(2 * 6.76e12, rel=0.005 / 6.76)
    assert 0 < of_20 - 20 * (of_21 - of_20) < of_21 - of_20


def test_published_figure_stands_beside_its_own_settings_alone(sample: Any) -> None:
    same = ["--size", "full", "--side", "1024", "--steps", "20", "--guidance", "8"]
    assert sample.comparable(sample.arguments(same))
    for changed in (["--size", "small"], ["--side", "512"], ["--steps", "30"], ["--guidance", "1"]):
        assert not sample.comparable(sample.arguments([*same, *changed]))


@pytest.mark.slow
def test_sample_benchmark_draws_the_same_images_on_both_sides() -> None:
    """In float32, where rounding may make one level, but of few bytes: of 0.02 % in a run of three steps."""
    for library in ("torch", "diffusers"):
        pytest.importorskip(library)
    command = [sys.executable, str(SAMPLE), "--size", "tiny", "--eager", "--steps", "3", "--rounds", "1"]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert re.search(r"^ratio: \d+\.\d+ times", shown, re.MULTILINE), shown
    found = re.search(r"at most (\d+) of 255 levels apart, ([\d.]+)% of the bytes", shown)
    assert found is not None, shown
    assert int(found[1]) <= 1
    assert float(found[2]) < 1
