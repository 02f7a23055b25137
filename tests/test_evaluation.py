"""The mathematics of evaluation: resizes, moments, distances and metrics of pairs, against closed forms, other ways to
the same number, and small programs written out here.

Against torch-fidelity 0.4.0 and scikit-image 0.26, compared once: `tf1` and `clean` bit for bit, `pytorch` to 1e-5 of
−1..1, FID, KID, Inception Score to 2e-7 relative, precision and recall exactly, SSIM and PSNR to 1e-14.
"""

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.evaluation import distances, image_metrics, resize
from sdxl_jax.evaluation.settings import ResizeMode
from sdxl_jax.evaluation.statistics import Moments

RNG = np.random.default_rng(0)


def normal(count: int, features: int, mean: float = 0.4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((features, features)) / features**0.5
    return (rng.standard_normal((count, features)) @ mixing + mean).astype(np.float32)


def moments(features: np.ndarray, batch: int) -> Moments:
    found = Moments(features.shape[1])
    for start in range(0, len(features), batch):
        found.add(features[start : start + batch])
    return found


# Resizes


def bilinear(image: np.ndarray, half: float) -> np.ndarray:
    """By the definition, one output at a time, in float64. half: 0.5 for half-pixel centres."""
    height, width, _ = image.shape
    out = np.zeros((299, 299, 3))
    for i in range(0, 299, 7):
        for j in range(0, 299, 7):
            y, x = (max((k + half) * n / 299 - half, 0.0) for k, n in ((i, height), (j, width)))
            top, left = int(y), int(x)
            for row, weight_y in ((top, 1 - y + top), (min(top + 1, height - 1), y - top)):
                for column, weight_x in ((left, 1 - x + left), (min(left + 1, width - 1), x - left)):
                    out[i, j] += weight_y * weight_x * image[row, column]
    return out[::7, ::7]


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (400, 611), (1, 5)])
def test_bilinear_resizes_follow_their_definitions(size: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    tf1 = resize.prepare(image, ResizeMode.TF1)[::7, ::7]
    assert tf1 == pytest.approx((bilinear(image, 0.0) - 128) / 128, abs=2e-4)  # float32 coordinates, as in TensorFlow
    pytorch = resize.prepare(image, ResizeMode.PYTORCH)[::7, ::7]
    assert pytorch == pytest.approx(bilinear(image, 0.5) / 127.5 - 1, abs=2e-4)
    if size != (299, 299):
        assert np.abs(tf1 - pytorch).max() > 0.01


def test_clean_resize_is_antialiased_and_not_rounded() -> None:
    stripes = np.zeros((1196, 1196, 3), np.uint8)
    stripes[:, ::2] = 255
    clean = resize.prepare(stripes, ResizeMode.CLEAN)
    assert np.abs(clean[:, 2:-2] - (127.5 - 128) / 128).max() < 0.01
    assert resize.prepare(stripes, ResizeMode.TF1).min() > 0.9, "the other modes alias: white is what they hit"
    noise = resize.prepare(RNG.integers(0, 256, (500, 500, 3), np.uint8), ResizeMode.CLEAN) * 128 + 128
    assert noise.dtype == np.float32 and np.abs(noise - noise.round()).mean() > 0.1
    assert noise.min() >= 0 and noise.max() <= 255


def test_an_image_of_the_networks_size_is_only_normalised() -> None:
    image = RNG.integers(0, 256, (299, 299, 3), np.uint8)
    expected = (image.astype(np.float32) - 128) / 128
    for mode in (ResizeMode.TF1, ResizeMode.CLEAN):
        assert np.array_equal(resize.prepare(image, mode), expected)


@pytest.mark.parametrize("size", [(100, 300), (301, 64), (64, 64), (65, 130)])
def test_centred_square_is_the_middle_of_the_resized_image(size: tuple[int, int]) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, size[1])[None, :, None], (*size, 3)).round().astype(np.uint8)
    square = resize.centred_square(ramp, 64)
    assert square.shape == (64, 64, 3)
    assert square[:, :, 0].mean() == pytest.approx(127.5, abs=1.5)


# Moments


def test_streamed_moments_are_those_of_two_passes() -> None:
    features = normal(50_000, 24)
    streamed = moments(features, 333)  # the last batch is ragged
    exact = features.astype(np.float64)
    assert len(streamed._waiting) > 0, "some batches are not summed up yet"
    assert streamed.count == 50_000
    assert streamed.mean == pytest.approx(exact.mean(axis=0), rel=1e-6)
    assert streamed.covariance == pytest.approx(np.cov(exact, rowvar=False), rel=1e-6, abs=1e-9)


def test_moments_of_parts_are_merged() -> None:
    features = normal(100, 5)
    one, other = moments(features[:37], 10), moments(features[37:], 100)
    one.merge(other)
    whole = moments(features, 64)
    assert one.count == 100
    assert one.mean == pytest.approx(whole.mean, rel=1e-12)
    assert one.covariance == pytest.approx(whole.covariance, rel=1e-9, abs=1e-12)


# Distances


def test_fid_of_diagonal_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    means, variances = rng.standard_normal((2, 20)), rng.random((2, 20)) + 0.1
    rotation, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    covariances = [(rotation * variance) @ rotation.T for variance in variances]
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(variances[0]) - np.sqrt(variances[1])).sum()
    assert distances.frechet(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "other"), [(30, 45), (3, 2), (300, 200)])
def test_fid_of_singular_covariances_equals_the_nuclear_norm(count: int, other: int) -> None:
    """tr (Σ₁Σ₂)^½ is the sum of the singular values of X₁X₂ᵀ / √((N₁ − 1)(N₂ − 1)), X centred: no root of a matrix."""
    x, y = normal(count, 64, seed=1), normal(other, 64, mean=0.5, seed=2)
    one, two = moments(x, 7), moments(y, 7)
    centred = [each.astype(np.float64) - each.mean(axis=0, dtype=np.float64) for each in (x, y)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / ((count - 1) * (other - 1)) ** 0.5
    traces = np.trace(one.covariance) + np.trace(two.covariance)
    expected = np.square(one.mean - two.mean).sum() + traces - 2 * shared
    found = distances.frechet(one.mean, one.covariance, two.mean, two.covariance)
    assert found == pytest.approx(expected, rel=1e-6)
    assert distances.frechet(one.mean, one.covariance, one.mean, one.covariance) == pytest.approx(0, abs=1e-9)


def test_kid_is_unbiased_and_has_the_written_out_value() -> None:
    x, y = normal(40, 8, seed=1), normal(40, 8, seed=2)
    kernel = [[((a.astype(float) @ b.astype(float)) / 8 + 1) ** 3 for b in (*x, *y)] for a in (*x, *y)]
    k = np.array(kernel)
    xx, yy, xy = k[:40, :40], k[40:, 40:], k[:40, 40:]
    expected = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (40 * 39) - 2 * xy.mean()
    found = distances.kid(x, y, subsets=3, subset_size=1000)
    assert found.mean == pytest.approx(expected, rel=1e-9), "a subset of all images is all of them"
    assert found.deviation == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    same = [distances.kid(*rng.standard_normal((2, 50, 8)), subsets=1).mean for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300**0.5, "its mean over samples of one distribution is 0"
    assert min(same) < 0


def test_recall_falls_for_a_mode_collapsed_set_and_precision_for_noise() -> None:
    rng = np.random.default_rng(0)
    modes = np.repeat(np.eye(4) * 20, 50, axis=0)
    reference = modes + rng.standard_normal((200, 4))
    collapsed = modes[:50] + rng.standard_normal((50, 4))
    precision, recall = distances.precision_recall(collapsed, reference)
    assert precision > 0.9 and recall < 0.3
    scattered = np.concatenate([reference[::2], 100 * rng.standard_normal((100, 4))])
    precision, recall = distances.precision_recall(scattered, reference)
    assert precision < 0.6 and recall > 0.9
    assert distances.precision_recall(reference, reference) == (1.0, 1.0)


def test_balls_reach_to_the_third_neighbour_without_the_image_itself() -> None:
    reference = np.array([[0.0], [1.0], [2.0], [4.0], [100.0]])
    inside = {4.0: 1.0, 4.1: 1.0, 195.9: 1.0, 196.1: 1.0, 199.1: 0.0}
    for place, expected in inside.items():
        samples = np.array([[place], [1e4], [2e4], [3e4], [4e4]])
        assert distances.precision_recall(samples, reference).precision == expected / 5, place


def test_distances_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(50, 6, seed=1), normal(40, 6, seed=2)
    whole = distances.precision_recall(x, y), distances.mmd(x, y)
    monkeypatch.setattr(distances, "_CHUNK_BYTES", 8 * 40 * 7)
    assert distances.precision_recall(x, y) == whole[0]
    assert distances.mmd(x, y) == pytest.approx(whole[1], rel=1e-12)


def test_mmd_is_the_biased_estimate_times_1000() -> None:
    x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (normal(9, 5), normal(7, 5, seed=3)))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a[:, None] - b[None]).sum(axis=2, dtype=np.float64) / 200).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert distances.mmd(x, y) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert distances.mmd(x, x) == pytest.approx(0, abs=1e-9)


def test_inception_score_is_the_number_of_classes_that_are_certain_and_even() -> None:
    certain = np.tile(np.eye(5) * 50, (40, 1))
    assert distances.inception_score(certain, splits=1) == pytest.approx((5.0, 0.0), rel=1e-6)
    assert distances.inception_score(np.ones((40, 5)), splits=2) == pytest.approx((1.0, 0.0), abs=1e-12)
    extreme = np.array([[0.0, -2000.0], [-2000.0, 0.0]] * 10)
    assert distances.inception_score(extreme, splits=1).mean == pytest.approx(2.0)


# Pairs


def test_psnr_is_of_each_image() -> None:
    one = np.full((3, 12, 12, 3), 100, np.uint8)
    other = one.copy()
    other[1] += 10
    other[2, 0, 0, 0] = 0
    found = image_metrics.psnr(one, other)
    assert found[0] == np.inf
    assert found[1] == pytest.approx(10 * np.log10(255**2 / 100))
    assert found[2] == pytest.approx(10 * np.log10(255**2 / (100**2 / 432)))
    assert image_metrics.psnr(other, one) == pytest.approx(found)


def test_ssim_is_the_mean_of_windows_that_lie_inside() -> None:
    one = RNG.integers(0, 256, (14, 13, 3), np.uint8)
    other = np.clip(one + RNG.integers(-40, 40, one.shape), 0, 255).astype(np.uint8)
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / line.sum() ** 2
    values = []
    for top in range(4):
        for left in range(3):
            x, y = (image[top : top + 11, left : left + 11].astype(float) for image in (one, other))
            mean_x, mean_y = (window * x).sum(axis=(0, 1)), (window * y).sum(axis=(0, 1))
            var_x, var_y = (window * x * x).sum(axis=(0, 1)) - mean_x**2, (window * y * y).sum(axis=(0, 1)) - mean_y**2
            both = (window * x * y).sum(axis=(0, 1)) - mean_x * mean_y
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            top_part = (2 * mean_x * mean_y + c1) * (2 * both + c2)
            values.append(top_part / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    assert image_metrics.ssim(one[None], other[None]) == pytest.approx([np.mean(values)], rel=1e-9)
    assert image_metrics.ssim(one[None], one[None]) == pytest.approx([1.0])


def test_metrics_of_pairs_fall_with_blur_and_noise() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (12, 12, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    original = np.asarray(image)[None]
    noises = [np.clip(original + RNG.normal(0, sigma, original.shape), 0, 255).astype(np.uint8) for sigma in (2, 8, 32)]
    for metric in (image_metrics.psnr, image_metrics.ssim):
        values = [metric(original, noisy)[0] for noisy in noises]
        assert values == sorted(values, reverse=True)
