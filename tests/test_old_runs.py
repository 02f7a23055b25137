"""Runs of earlier versions can be sampled, converted, loaded, and resumed.

The run is that of tests/data/README.md. Only commands are used, so that names within the code may change.
"""

import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import call
from data import make_run
from PIL import Image

import sdxl_jax

ARCHIVE = Path(__file__).parent / "data" / "run_c97d0f8.tar.xz"
KEYS = ("step", "loss", "grad_norm", "learning_rate", "bucket", "images_seen", "replaced")
"""Keys of a line of metrics.jsonl other than times."""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive, which tests do not change."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
        archive.extractall(folder, **safe)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of each step, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in KEYS} for line in lines]


def test_sample_generates_the_image_of_the_old_code(old: Path, tmp_path: Path) -> None:
    done = call("sample", old / "run", "--out", tmp_path / "sampled", *make_run.SAMPLE)
    assert done.code == 0, done.err
    latents, expected = np.load(tmp_path / "sampled" / "latents.npy"), np.load(old / "latents.npy")
    # float32 over four steps; another kind of CPU sums in another order.
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with Image.open(tmp_path / "sampled" / "000000.png") as image:
        difference = np.asarray(image).astype(int) - np.load(old / "image.npy")
    assert np.abs(difference).max() <= 1  # where a value is half-way between two levels


@pytest.mark.slow
@pytest.mark.parametrize("layout", make_run.LAYOUTS)
def test_convert_writes_the_weights_of_the_old_code_bit_for_bit(layout: str, old: Path, tmp_path: Path) -> None:
    written = tmp_path / make_run.LAYOUTS[layout]
    done = call("convert", old / "run", written, "--to", layout)
    assert done.code == 0, done.err
    assert make_run.hashes(written) == read(old / "weights.json")[layout]
    model, converted = sdxl_jax.load_model(old / "run"), sdxl_jax.load_model(written)
    assert model.config.text == make_run.MODEL.text
    jax.tree.map(np.testing.assert_array_equal, model.params, converted.params)


@pytest.mark.slow
def test_run_resumed_by_todays_code_repeats_the_metrics_of_the_old_code(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json is accepted too, whatever fields have been renamed or added since."""
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    shutil.copytree(old / run, run)
    make_run.write_images(Path("images"))
    Path("config.py").write_text("from data.make_run import config as get_config\n")
    done = call("train", "config.py", "--run-dir", run, "--from-step", 2)
    assert done.code == 0, done.err
    resumed, original = metrics(run), metrics(old / "run")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for new, was in zip(resumed, original, strict=True):
        assert (new["bucket"], new["images_seen"]) == (was["bucket"], was["images_seen"])
        for name in set(KEYS) - {"bucket"}:
            # float32 sums are in another order on another CPU, even one of the same name: 1.2e-7 was seen.
            assert math.isclose(new[name], was[name], rel_tol=1e-5), (name, new, was)
