"""Published weights and photographs for tests, in the folder of the environment variable SDXL_JAX_TEST_DATA."""

import os
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float32
from PIL import Image

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
