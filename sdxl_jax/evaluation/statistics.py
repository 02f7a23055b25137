"""Means and covariances of features: gathered batch by batch in float64, and their files.

    μ = Σf / N        Σ = (Σ f fᵀ − N μ μᵀ) / (N − 1)

A file says with which network and resize mode its features were made, of how many images, and from where. Files of
others do not say all of it:

| file | arrays | resize mode |
|---|---|---|
| ours | those of ADM; `feats` if saved with features; `network`, `resize`, `images`, `source` | said |
| ADM | `mu`, `sigma`; `mu_s`, `sigma_s` of spatial features (sFID); perhaps images, `arr_0` | `tf1` |
| clean-fid | `mu`, `sigma`; in the twin for KID, `…_kid.npz`, `feats` | in the file's name |
| EDM, pytorch-fid | `mu`, `sigma` | unknown: the user says it |

ADM, EDM, clean-fid and pytorch-fid read ours. Pickles are not read: reading one runs the code in it.
"""

import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Float32, Float64, Shaped

from sdxl_jax.errors import InputError, fault
from sdxl_jax.evaluation.distances import frechet
from sdxl_jax.evaluation.settings import ResizeMode
from sdxl_jax.files import atomic

INCEPTION = "inception-2015-12-05"
"""The network of FID: `pool` is 2048 features, `spatial` 2023."""
_CLEAN_FID_MODES = {
    "clean": ResizeMode.CLEAN,
    "legacy_tensorflow": ResizeMode.TF1,
    "legacy_pytorch": ResizeMode.PYTORCH,
}
_CLEAN_FID_NAME = re.compile(rf"_({'|'.join(_CLEAN_FID_MODES)})_(custom|test|train|trainfull|val|trainval70k)_")
_WAITING_ROWS = 1024
"""Features that are multiplied at a time."""
_ROWS = 256
"""Rows of a matrix that processes exchange at a time."""


class Moments:
    """Sums of features and of their products, float64, to which batches are added."""

    def __init__(self, features: int):
        self.count = 0
        self._sum = np.zeros(features)
        self._products = np.zeros((features, features))
        self._waiting = list[Float[np.ndarray, "_batch features"]]()

    def add(self, features: Float[np.ndarray, "batch features"]) -> None:
        """Adds a batch of any size."""
        self.count += len(features)
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= _WAITING_ROWS:
            self._sum_up()

    def _sum_up(self) -> None:
        """Small batches are multiplied together: else the time goes into reading and writing the sums."""
        if self._waiting:
            features = np.concatenate(self._waiting, dtype=np.float64)
            self._waiting.clear()
            self._sum += features.sum(axis=0)
            self._products += features.T @ features

    def merge(self, other: "Moments") -> None:
        """Adds everything that was added to `other`."""
        other._sum_up()
        self.count += other.count
        self._sum += other._sum
        self._products += other._products

    def of_all_processes(self) -> "Moments":
        """The moments of what all JAX processes have added; every process calls it."""
        self._sum_up()
        if jax.process_count() == 1:
            return self
        total = Moments(len(self._sum))
        total.count = int(_summed(np.array([self.count], np.float64))[0])
        total._sum = _summed(self._sum)
        starts = range(0, len(self._sum), _ROWS)
        total._products = np.concatenate([_summed(self._products[start : start + _ROWS]) for start in starts])
        return total

    @property
    def mean(self) -> Float64[np.ndarray, " features"]:
        """Of one image or more."""
        self._sum_up()
        return self._sum / self.count

    @property
    def covariance(self) -> Float64[np.ndarray, "features features"]:
        """Unbiased (N − 1). Of two images or more."""
        mean = self.mean
        return (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)


def _summed(values: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """The sum over processes, as bits: jax alone would round float64 to float32."""
    bits = multihost_utils.process_allgather(np.ascontiguousarray(values).view(np.uint32))
    return np.ascontiguousarray(bits).view(np.float64).sum(axis=0)


class Gaussian(NamedTuple):
    """Mean and covariance of features."""

    mean: Float64[np.ndarray, " features"]
    covariance: Float64[np.ndarray, "features features"]

    @staticmethod
    def of(moments: Moments) -> "Gaussian":
        return Gaussian(moments.mean, moments.covariance)


class Statistics(NamedTuple):
    """What metrics need to know of a set of images."""

    pool: Gaussian
    """Of the network's features, for FID."""
    spatial: Gaussian | None
    """Of Inception's spatial features, for sFID."""
    features: Float32[np.ndarray, "images features"] | None
    """For KID, precision and recall."""
    network: str
    resize: ResizeMode
    images: int | None
    """Number of images; None: the file does not say."""
    source: str


def fid(one: Statistics, other: Statistics) -> float:
    """Fréchet Inception distance. Raises InputError as `check_comparable`."""
    check_comparable(one, other)
    return frechet(*one.pool, *other.pool)


def sfid(one: Statistics, other: Statistics) -> float:
    """FID of spatial features: Nash et al. 2021, arXiv:2103.03841. Raises InputError as `check_comparable`, and where
    one side has no spatial features."""
    check_comparable(one, other)
    return frechet(*check_spatial(one), *check_spatial(other))


def check_spatial(one: Statistics) -> Gaussian:
    """The moments of spatial features. Raises InputError where there are none."""
    if one.spatial is None:
        raise InputError(
            f"sfid needs the moments of spatial features (mu_s, sigma_s), and {one.source} has none. Give its images, "
            "or statistics that ADM or sdxl-jax evaluate has saved"
        )
    return one.spatial


def check_comparable(one: Statistics, other: Statistics) -> None:
    """Raises InputError for statistics of two resize modes or two networks: their distance means nothing."""
    for what, values in (("network", (one.network, other.network)), ("resize mode", (one.resize, other.resize))):
        first, second = (value.value if isinstance(value, ResizeMode) else value for value in values)
        if first != second:
            remedy = f"--resize {second}, or statistics made with {first}" if what == "resize mode" else "those of one"
            raise InputError(
                f"{one.source} has the {what} {first}, {other.source} {second}. They cannot be compared: give {remedy}"
            )


# Files


def save(statistics: Statistics, path: Path) -> None:
    """Writes an .npz, atomically. Features are included where there are any: a file of 8 KB per image."""
    arrays: dict[str, Any] = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    if statistics.features is not None:
        arrays["feats"] = statistics.features
    arrays |= {"network": statistics.network, "resize": statistics.resize.value, "source": statistics.source}
    if statistics.images is not None:
        arrays["images"] = statistics.images
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def holds_statistics(path: Path) -> bool:
    """Whether an .npz has the arrays of `load`, or images alone. Raises InputError as `open_arrays`."""
    with open_arrays(path) as arrays:
        return "mu" in arrays or "feats" in arrays


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """An .npz, of which nothing is read yet. Raises InputError for other files, and for pickles by name."""
    if path.suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path} is a pickle, which is not read: reading it would run the code in it. Give an .npz with mu and "
            "sigma; whoever trusts the file makes one with numpy.savez"
        )
    with path.open("rb") as file:
        try:
            arrays = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise fault(error)(f"{path} cannot be read as .npz ({error}). Give a file of numpy.savez") from error
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds a single array. Give an .npz with mu and sigma, or with images, arr_0")
        with arrays:
            yield arrays


def read_array(arrays: np.lib.npyio.NpzFile, name: str, path: Path) -> Shaped[np.ndarray, "..."]:
    """One array of an .npz. Raises InputError where it is damaged, or would need a pickle to be read."""
    try:
        return arrays[name]
    except ValueError as error:
        raise InputError(
            f"{name} in {path} holds Python objects, which are not read: that would run the code in them. Save it as "
            f"an array of numbers ({error})"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise fault(error)(f"{name} in {path} is damaged ({error}). Replace the file") from error


def load(path: Path, resize: ResizeMode | None = None) -> Statistics:
    """Statistics from an .npz. resize: the mode of files that do not say theirs; it contradicts none that do.

    Raises InputError: no statistics in it, or damaged ones; another mode; an unknown mode and none given.
    """
    with open_arrays(path) as file:
        arrays = {name: read_array(file, name, path) for name in file.files if not name.startswith("arr_")}
    said = _said_mode(arrays, path)
    if said is not None and resize is not None and said is not resize:
        raise InputError(
            f"{path} has the resize mode {said.value}, and {resize.value} is wanted. Give --resize {said.value}, or "
            f"statistics made with {resize.value}"
        )
    if (mode := said or resize) is None:
        raise InputError(
            f"{path} does not say how its images were resized. Say it with --reference-resize: tf1 for files of EDM, "
            "pytorch for those of pytorch-fid"
        )
    features = arrays.get("feats")
    if "mu" not in arrays and features is not None:
        moments = Moments(features.shape[-1])
        moments.add(_checked(features, "feats", path, 2))
        pool = Gaussian.of(moments)
    else:
        pool = _gaussian(arrays, "", path)
        assert pool is not None
    images = int(arrays["images"]) if "images" in arrays else None if features is None else len(features)
    return Statistics(
        pool=pool,
        spatial=_gaussian(arrays, "_s", path),
        features=None if features is None else _checked(features, "feats", path, 2).astype(np.float32),
        network=str(arrays.get("network", INCEPTION)),
        resize=mode,
        images=images,
        source=str(path),
    )


def _said_mode(arrays: dict[str, Any], path: Path) -> ResizeMode | None:
    if "resize" in arrays:
        value = str(arrays["resize"])
        if value not in [mode.value for mode in ResizeMode]:
            known = ", ".join(mode.value for mode in ResizeMode)
            raise InputError(f"{path} has the resize mode {value!r}. Known: {known}. Give statistics with one of these")
        return ResizeMode(value)
    if found := _CLEAN_FID_NAME.search(path.name):
        return _CLEAN_FID_MODES[found[1]]
    return ResizeMode.TF1 if "mu_s" in arrays else None


def _gaussian(arrays: dict[str, Any], suffix: str, path: Path) -> Gaussian | None:
    """None: there are no spatial features."""
    names = f"mu{suffix}", f"sigma{suffix}"
    if missing := [name for name in names if name not in arrays]:
        if suffix and len(missing) == 2:
            return None
        raise InputError(
            f"{path} has no {' and no '.join(missing)}, only {', '.join(arrays) or 'images'}. Give statistics with mu "
            "and sigma"
        )
    mean, covariance = (_checked(arrays[name], name, path, axes) for name, axes in zip(names, (1, 2), strict=True))
    if covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path} has {len(mean)} means and a covariance of {' × '.join(map(str, covariance.shape))}: they are not "
            "of the same features. Replace the file"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _checked(values: Shaped[np.ndarray, "..."], name: str, path: Path, axes: int) -> Float[np.ndarray, "..."]:
    if values.ndim != axes or not np.issubdtype(values.dtype, np.floating) or not np.isfinite(values).all():
        raise InputError(
            f"{name} in {path} is not an array of finite numbers with {axes} axes (dtype {values.dtype}, shape "
            f"{values.shape}). Replace the file"
        )
    return values
