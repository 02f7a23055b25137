"""Published weights and photographs for tests, in the folder of the environment variable SDXL_JAX_TEST_DATA; and the
weights of metrics, in that of SDXL_JAX_TEST_METRICS."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float32, UInt8
from PIL import Image

from sdxl_jax.evaluation import weights

_VARIABLE = "SDXL_JAX_TEST_DATA"


def files(*names: str) -> list[Path]:
    """Files of the folder. Skips the test if one is missing, and names it."""
    folder = Path(os.environ.get(_VARIABLE, ""))
    if _VARIABLE not in os.environ:
        pytest.skip(f"{', '.join(names)}: {_VARIABLE} is not set")
    if missing := [name for name in names if not (folder / name).exists()]:
        pytest.skip(f"{', '.join(missing)} missing in {folder} ({_VARIABLE})")
    return [folder / name for name in names]


def photograph(side: int, number: int = 15) -> Float32[np.ndarray, "1 side side 3"]:
    """A photograph of COCO, −1..1: its left or upper square, resized."""
    (folder,) = files("coco363/val2017")
    with Image.open(sorted(folder.glob("*.jpg"))[number]) as opened:
        image = opened.convert("RGB")
    square = min(image.size)
    pixels = image.crop((0, 0, square, square)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(pixels, np.float32)[None] / 127.5 - 1


def metric_file(name: str) -> Path:
    """A file of the folder of the environment variable SDXL_JAX_TEST_METRICS, by default where `sdxl-jax evaluate
    --fetch-weights` keeps the weights of metrics. Skips the test if it is missing, and names it."""
    # Not `cache_folder`: tests have a cache of their own.
    folder = Path(os.environ.get("SDXL_JAX_TEST_METRICS", Path.home() / ".cache" / "sdxl_jax" / "metrics"))
    if not (folder / name).exists():
        pytest.skip(f"{name} missing in {folder} (SDXL_JAX_TEST_METRICS)")
    return folder / name


def metric_params(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Published weights of a metric's network, by their name in `evaluation.weights`."""
    path = metric_file(f"{name}.safetensors")
    monkeypatch.setattr(weights, "folder", lambda: path.parent)
    return weights.load(name)


def photographs(count: int) -> list[UInt8[np.ndarray, "height width 3"]]:
    """The first photographs of COCO's validation set, 0..255, of their own sizes."""
    (folder,) = files("coco363/val2017")
    opened = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))[:count]]
    return [np.asarray(image) for image in opened]
