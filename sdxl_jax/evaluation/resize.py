"""The sizes at which metrics see an image: the three resizes of FID to 299×299, and a centred square.

| mode | resize to 299×299 | normalisation | as in |
|---|---|---|---|
| `tf1` | bilinear, source coordinate i·in/299 (no half-pixel shift), not antialiased | (x − 128)/128 | ADM, EDM |
| `clean` | bicubic, antialiased, per channel in float32, clipped to 0..255, not rounded | (x − 128)/128 | clean-fid |
| `pytorch` | bilinear with half-pixel centres, not antialiased | x/127.5 − 1 | pytorch-fid |

The same images differ by several FID between modes where they are downscaled, so no number is without its mode, and
statistics of two modes are never compared. Images are uint8 before any of it: real images are, so samples are rounded
first. Parmar et al. 2022, arXiv:2104.11222.

numpy and Pillow, which release the interpreter's lock: images are resized in threads.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from sdxl_jax.evaluation.settings import ResizeMode

INCEPTION_SIDE = 299
_STEPS = np.arange(INCEPTION_SIDE, dtype=np.float32)


def prepare(image: UInt8[np.ndarray, "height width 3"], mode: ResizeMode) -> Float32[np.ndarray, "299 299 3"]:
    """An image 0..255 as FID's network takes it: resized and normalised to about −1..1."""
    match mode:
        case ResizeMode.TF1:
            return (_tf1(image) - 128) / 128
        case ResizeMode.CLEAN:
            return (_clean(image) - 128) / 128
        case ResizeMode.PYTORCH:
            return _pytorch(image) / np.float32(127.5) - 1


class _Corners(NamedTuple):
    """For each output along an axis: its two neighbours, and the weight of the second."""

    low: Int64[np.ndarray, " side"]
    high: Int64[np.ndarray, " side"]
    weight: Float32[np.ndarray, " side"]


def _corners(source: Float32[np.ndarray, " side"], length: int) -> _Corners:
    """source: coordinates in an axis of that length, 0 or more. float32, as in both libraries."""
    low = np.floor(source).astype(np.int64)
    return _Corners(low, np.minimum(low + 1, length - 1), source - low.astype(np.float32))


def _needed_rows(
    image: UInt8[np.ndarray, "height width 3"], down: _Corners
) -> tuple[Float32[np.ndarray, "rows width 3"], _Corners]:
    """The rows that an output needs, and where each output's neighbours are among them."""
    rows, place = np.unique(np.concatenate([down.low, down.high]), return_inverse=True)
    low, high = np.split(place, 2)
    return image[rows].astype(np.float32), _Corners(low, high, down.weight)


def _tf1(image: UInt8[np.ndarray, "height width 3"]) -> Float32[np.ndarray, "299 299 3"]:
    down, across = (_corners(_STEPS * np.float32(length / INCEPTION_SIDE), length) for length in image.shape[:2])
    lines, place = _needed_rows(image, down)
    first = lines[:, across.low]
    lines = first + (lines[:, across.high] - first) * across.weight[:, None]
    first = lines[place.low]
    return first + (lines[place.high] - first) * down.weight[:, None, None]


def _pytorch(image: UInt8[np.ndarray, "height width 3"]) -> Float32[np.ndarray, "299 299 3"]:
    half = np.float32(0.5)
    down, across = (
        _corners(((_STEPS + half) * np.float32(length / INCEPTION_SIDE) - half).clip(0), length)
        for length in image.shape[:2]
    )
    lines, place = _needed_rows(image, down)
    lines = lines[:, across.low] * (1 - across.weight)[:, None] + lines[:, across.high] * across.weight[:, None]
    lower, upper = (weight[:, None, None] for weight in (1 - down.weight, down.weight))
    return lines[place.low] * lower + lines[place.high] * upper


def _clean(image: UInt8[np.ndarray, "height width 3"]) -> Float32[np.ndarray, "299 299 3"]:
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    channels = [Image.fromarray(np.ascontiguousarray(image[..., channel], np.float32)) for channel in range(3)]
    resized = [np.asarray(each.resize(size, Image.Resampling.BICUBIC)) for each in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


def centred_square(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The centred square of an image whose short side is first resized to `side` (Pillow's antialiased bicubic): what
    tables of autoencoders are computed on."""
    height, width = image.shape[:2]
    size = width * side // min(height, width), height * side // min(height, width)  # rounded down, as torchvision does
    resized = Image.fromarray(image)
    if size != resized.size:
        resized = resized.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))
