"""Distances between two sets of images, as functions of their features: FID, KID, precision and recall, CMMD; and the
scores of one set from class probabilities.

    FID     |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½                  Heusel et al. 2017, arXiv:1706.08500
    KID     unbiased MMD² with the kernel (xᵀy/d + 1)³                    Bińkowski et al. 2018, arXiv:1801.01401
    P, R    share of one set within the other's k-nearest-neighbour balls Kynkäänniemi et al. 2019, arXiv:1904.06991
    CMMD    1000 · MMD² with a Gaussian kernel, of CLIP embeddings        Jayasumana et al. 2024, arXiv:2401.09603
    IS      exp of the mean KL(p(class | image) ‖ p(class))               Salimans et al. 2016, arXiv:1606.03498

numpy in float64. Random subsets and their seeds are those of torch-fidelity, so that its numbers are repeated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

SEED = 2020
_CHUNK_BYTES = 1 << 28
"""Of a matrix of distances that is held at a time."""


class MeanDeviation(NamedTuple):
    """A score's mean over subsets of the images, and its population standard deviation."""

    mean: float
    deviation: float


class PrecisionRecall(NamedTuple):
    """Precision falls where samples are unlike the reference, recall where they are less varied. 0..1."""

    precision: float
    """Share of the samples inside a ball of the reference."""
    recall: float
    """Share of the reference inside a ball of the samples."""


def frechet(
    mean_1: Float64[np.ndarray, " features"],
    covariance_1: Float64[np.ndarray, "features features"],
    mean_2: Float64[np.ndarray, " features"],
    covariance_2: Float64[np.ndarray, "features features"],
) -> float:
    """Fréchet distance of two normal distributions: of Inception features, FID.

    (Σ₁Σ₂)^½ has the trace of (A Σ₂ A)^½ with A = Σ₁^½, and symmetric matrices have real eigenvalues. It holds for
    singular covariances (fewer images than features) without a constant on the diagonal: what rounding makes of their
    zeros is left out, as its root would be large.
    """
    values, vectors = np.linalg.eigh(covariance_1)
    positive = values > _rounding(values)
    half = vectors[:, positive] * np.sqrt(values[positive])  # A in the basis of the eigenvectors
    products = np.linalg.eigvalsh(half.T @ covariance_2 @ half)
    shared = np.sqrt(products[products > _rounding(products)]).sum()
    difference = mean_1 - mean_2
    return float(difference @ difference + np.trace(covariance_1) + np.trace(covariance_2) - 2 * shared)


def _rounding(eigenvalues: Float64[np.ndarray, " values"]) -> float:
    """The size of rounding errors in eigenvalues of a matrix that has none below 0."""
    return float(eigenvalues.max(initial=0)) * len(eigenvalues) * float(np.finfo(np.float64).eps)


def kid(
    samples: Float[np.ndarray, "samples features"],
    reference: Float[np.ndarray, "reference features"],
    subsets: int = 100,
    subset_size: int = 1000,
) -> MeanDeviation:
    """Kernel inception distance, × 1 (papers often print × 10³): mean over random subsets without replacement.

    subset_size: no more than the images of the smaller set are used.
    """
    size = min(subset_size, len(samples), len(reference))
    rng = np.random.RandomState(SEED)
    values = np.empty(subsets)
    for number in range(subsets):
        x = samples[rng.choice(len(samples), size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        # The sums over pairs of different images: without the diagonals.
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
        values[number] = within / (size * (size - 1)) - 2 * _cubic(x, y).mean()
    return MeanDeviation(float(values.mean()), float(values.std()))


def _cubic(
    x: Float64[np.ndarray, "one features"], y: Float64[np.ndarray, "other features"]
) -> Float64[np.ndarray, "one other"]:
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel


def precision_recall(
    samples: Float[np.ndarray, "samples features"], reference: Float[np.ndarray, "reference features"], k: int = 3
) -> PrecisionRecall:
    """Precision and recall. The ball of an image reaches to its k-th nearest neighbour of the same set, the image
    itself not counted. Each set has more than k images."""
    return PrecisionRecall(
        precision=_share_within(samples, reference, _squared_radii(reference, k)),
        recall=_share_within(reference, samples, _squared_radii(samples, k)),
    )


def _squared_radii(features: Float[np.ndarray, "images features"], k: int) -> Float64[np.ndarray, " images"]:
    chunks = _squared_distances(features, features)
    return np.concatenate([np.partition(chunk, k, axis=1)[:, k] for chunk in chunks])


def _share_within(
    points: Float[np.ndarray, "points features"],
    centres: Float[np.ndarray, "centres features"],
    squared_radii: Float64[np.ndarray, " centres"],
) -> float:
    """The share of the points that are in a ball."""
    inside = [(chunk <= squared_radii).any(axis=1) for chunk in _squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared_distances(
    x: Float[np.ndarray, "one features"], y: Float[np.ndarray, "other features"]
) -> Iterator[Float64[np.ndarray, "_chunk other"]]:
    """Squared Euclidean distances, some rows at a time: |x|² + |y|² − 2xᵀy."""
    origin = y.mean(axis=0, dtype=np.float64)  # less is cancelled around it
    y = y - origin
    squared = np.square(y).sum(axis=1)
    rows = max(1, _CHUNK_BYTES // (8 * len(y)))
    for start in range(0, len(x), rows):
        part = x[start : start + rows] - origin
        distances = part @ y.T
        distances *= -2
        distances += np.square(part).sum(axis=1)[:, None]
        distances += squared
        yield np.maximum(distances, 0, out=distances)


def mmd(x: Float[np.ndarray, "one features"], y: Float[np.ndarray, "other features"], sigma: float = 10.0) -> float:
    """1000 · MMD² with a Gaussian kernel, the biased estimate (pairs of an image with itself included): of CLIP
    embeddings of unit length, CMMD."""
    within = _gaussian_mean(x, x, sigma) + _gaussian_mean(y, y, sigma)
    return 1000 * (within - 2 * _gaussian_mean(x, y, sigma))


def _gaussian_mean(x: Float[np.ndarray, "one features"], y: Float[np.ndarray, "other features"], sigma: float) -> float:
    total = sum(np.exp(chunk / (-2 * sigma**2)).sum() for chunk in _squared_distances(x, y))
    return float(total / (len(x) * len(y)))


def inception_score(
    logits: Float[np.ndarray, "images classes"], splits: int = 10, shuffle: bool = True
) -> MeanDeviation:
    """exp of the mean KL divergence of an image's classes from those of its split; mean and deviation over splits.

    With the logits of Inception's own head (without bias), the Inception Score. With those of any other classifier the
    same formula is another score: a probe score.
    """
    if shuffle:
        logits = logits[np.random.RandomState(SEED).permutation(len(logits))]
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for split in range(splits):
        part = log_p[split * len(log_p) // splits : (split + 1) * len(log_p) // splits]
        p = np.exp(part)
        mean = p.mean(axis=0)
        divergence = (p * (part - np.log(np.maximum(mean, np.finfo(np.float64).tiny)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return MeanDeviation(float(np.mean(scores)), float(np.std(scores)))
