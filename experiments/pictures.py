"""Pictures with one object each, on a plain background, for the experiments that measure where it is or how bright."""

import io
import zipfile
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_jax.quickstart import run


class Picture(NamedTuple):
    pixels: UInt8[np.ndarray, "side side 3"]
    background: UInt8[np.ndarray, " 3"]


def square_pictures(side: int) -> list[Picture]:
    """The quickstart's nearly square pictures, reduced, in order of their names; no subject twice."""
    found = []
    with zipfile.ZipFile(run.IMAGES_ZIP) as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith(".jpg") and "-small" not in name]
        for name in names:
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            if 0.85 < image.width / image.height < 1.18:
                corner = np.asarray(image)[:3, :3].reshape(-1, 3)
                pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX))
                found.append(Picture(pixels, np.median(corner, axis=0).astype(np.uint8)))
    return found
