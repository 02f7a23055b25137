"""The Inception network whose features FID compares: the one of 5 December 2015, up to its last pooling.

    image 299×299, −1..1 ── stem ── mixed … mixed_10 ── mean over 8×8 positions ── 2048 features

It differs from later networks of that name: an average near the edge is over the positions that there are, and the last
block pools by the maximum. Convolutions have the names of the original graph. Its batch normalisation, without a scale
and with ε = 0.001, is folded into them (`fold`).

Sources: Szegedy et al. (arXiv:1512.00567), whose figures 5 to 7 are the blocks; Heusel et al. (arXiv:1706.08500), who
compare these features. Not here: the classifier, which the weights that can be had lack, and the resize to 299×299
with its normalisation, which decide the score as much as the network does (`evaluation.resize`).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from sdxl_jax.arrays import Params
from sdxl_jax.models import initialisers

SIDE = 299
"""Pixels of the image's sides."""
_EPSILON = 1e-3
"""Of the batch normalisation."""
_SPATIAL = 7
"""Channels of mixed_6/conv that sFID compares, of 192."""
_PRECISION = jax.lax.Precision.HIGHEST
"""float32 on every platform: the products of TPUs and GPUs are of fewer digits by default."""
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
"""Compiler options for a CPU: XLA's own convolutions, with which the network takes 65 ms per image on two cores; with
those of YNNPACK, XLA's default, 90 ms."""
_Size = tuple[int, int]


class Features(NamedTuple):
    """What is compared of each image."""

    pool: Float[jax.Array, "batch 2048"]
    """pool_3: FID, KID, precision and recall."""
    spatial: Float[jax.Array, "batch 2023"]
    """The first 7 channels of mixed_6/conv at 17×17 positions, row by row: sFID."""


class _Conv(nn.Module):
    """Parameters of a convolution."""

    features: int
    size: _Size

    @nn.compact
    def __call__(self, channels: int) -> tuple[Any, Any]:
        shape = (*self.size, channels, self.features)
        return self.param("kernel", initialisers.lecun_normal, shape), self.param(
            "bias", initialisers.zeros, (self.features,)
        )


def _conv(
    x: Float[jax.Array, "batch height width channels"], name: str, features: int, size: _Size, stride: int | None = None
) -> Float[jax.Array, "batch height_out width_out features"]:
    """Convolution and ReLU in the scope of a module. stride: None to keep height and width; else without padding."""
    kernel, bias = _Conv(features, size, name=name)(x.shape[-1])
    padding = "SAME" if stride is None else "VALID"
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride or 1,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_PRECISION
    )
    return nn.relu(x + bias)


def _tower(
    x: Float[jax.Array, "batch height width channels"], name: str, *layers: tuple[int, _Size, int | None]
) -> Float[jax.Array, "batch height_out width_out features"]:
    """The convolutions after the first of a tower, each (features, size, stride)."""
    for number, (features, size, stride) in enumerate(layers, 1):
        x = _conv(x, f"{name}_conv_{number}", features, size, stride)
    return x


def _heads(
    x: Float[jax.Array, "batch height width channels"], features: dict[str, int], pooled: str | None = None
) -> list[Float[jax.Array, "batch height width features"]]:
    """1×1 convolutions of the same map and their ReLUs, computed as one product.

    features: of each, by name. pooled: the one whose input is averaged over 3×3 positions. It is averaged after the
    product, which gives the same and has fewer channels.
    """
    kernels, biases = zip(
        *(_Conv(count, (1, 1), name=name)(x.shape[-1]) for name, count in features.items()), strict=True
    )
    together = jnp.matmul(x, jnp.concatenate([kernel[0, 0] for kernel in kernels], axis=-1), precision=_PRECISION)
    parts = jnp.split(together, np.cumsum(list(features.values()))[:-1], axis=-1)
    return [
        nn.relu((_average(part) if name == pooled else part) + bias)
        for name, part, bias in zip(features, parts, biases, strict=True)
    ]


def _average(
    x: Float[jax.Array, "batch height width channels"],
) -> Float[jax.Array, "batch height width channels"]:
    """Mean over the positions of a window of 3×3 that lie in the map."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _halve(
    x: Float[jax.Array, "batch height width channels"],
) -> Float[jax.Array, "batch height_out width_out channels"]:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _join(*maps: Any) -> Float[jax.Array, "batch height width channels"]:
    return jnp.concatenate(maps, axis=-1)


class _Mixed35(nn.Module):
    """Blocks of 35×35 positions."""

    pooled: int

    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch height width channels"]) -> Any:
        widths = {"conv": 64, "tower_conv": 48, "tower_1_conv": 64, "tower_2_conv": self.pooled}
        conv, tower, tower_1, tower_2 = _heads(x, widths, "tower_2_conv")
        tower = _tower(tower, "tower", (64, (5, 5), None))
        tower_1 = _tower(tower_1, "tower_1", (96, (3, 3), None), (96, (3, 3), None))
        return _join(conv, tower, tower_1, tower_2)


class _To17(nn.Module):
    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch height width channels"]) -> Any:
        conv = _conv(x, "conv", 384, (3, 3), 2)
        (tower,) = _heads(x, {"tower_conv": 64})
        return _join(conv, _tower(tower, "tower", (96, (3, 3), None), (96, (3, 3), 2)), _halve(x))


class _Mixed17(nn.Module):
    """Blocks of 17×17 positions. Returns the output of its `conv`, too."""

    width: int

    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch height width channels"]) -> Any:
        width, row, column = self.width, (1, 7), (7, 1)
        widths = {"conv": 192, "tower_conv": width, "tower_1_conv": width, "tower_2_conv": 192}
        conv, tower, tower_1, tower_2 = _heads(x, widths, "tower_2_conv")
        tower = _tower(tower, "tower", (width, row, None), (192, column, None))
        one_by_one = (width, column, None), (width, row, None), (width, column, None), (192, row, None)
        return _join(conv, tower, _tower(tower_1, "tower_1", *one_by_one), tower_2), conv


class _To8(nn.Module):
    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch height width channels"]) -> Any:
        tower, tower_1 = _heads(x, {"tower_conv": 192, "tower_1_conv": 192})
        tower = _tower(tower, "tower", (320, (3, 3), 2))
        tower_1 = _tower(tower_1, "tower_1", (192, (1, 7), None), (192, (7, 1), None), (192, (3, 3), 2))
        return _join(tower, tower_1, _halve(x))


class _Mixed8(nn.Module):
    """Blocks of 8×8 positions."""

    by_maximum: bool
    """Whether the pooled branch takes the maximum."""

    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch height width channels"]) -> Any:
        widths = {"conv": 320, "tower_conv": 384, "tower_1_conv": 448}
        if self.by_maximum:
            conv, tower, tower_1 = _heads(x, widths)
            (tower_2,) = _heads(nn.max_pool(x, (3, 3), padding="SAME"), {"tower_2_conv": 192})
        else:
            conv, tower, tower_1, tower_2 = _heads(x, {**widths, "tower_2_conv": 192}, "tower_2_conv")
        tower_1 = _tower(tower_1, "tower_1", (384, (3, 3), None))
        split = [
            _conv(each, f"{name}_mixed_conv{suffix}", 384, size)
            for name, each in (("tower", tower), ("tower_1", tower_1))
            for suffix, size in (("", (1, 3)), ("_1", (3, 1)))
        ]
        return _join(conv, *split, tower_2)


class _Inception(nn.Module):
    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch 299 299 3"]) -> Features:
        x = _conv(x, "conv", 32, (3, 3), 2)
        x = _conv(x, "conv_1", 32, (3, 3), 1)
        x = _halve(_conv(x, "conv_2", 64, (3, 3)))
        x = _conv(x, "conv_3", 80, (1, 1))
        x = _halve(_conv(x, "conv_4", 192, (3, 3), 1))
        for name, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            x = _Mixed35(pooled, name=name)(x)
        x = _To17(name="mixed_3")(x)
        spatial = None
        for name, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            x, conv = _Mixed17(width, name=name)(x)
            spatial = conv[..., :_SPATIAL] if name == "mixed_6" else spatial
        x = _To8(name="mixed_8")(x)
        x = _Mixed8(by_maximum=False, name="mixed_9")(x)
        x = _Mixed8(by_maximum=True, name="mixed_10")(x)
        assert spatial is not None
        return Features(x.mean((1, 2)), spatial.reshape(len(x), -1))


def features(params: Params, x: Float[jax.Array, "batch 299 299 3"]) -> Features:
    """The features of images that were resized and normalised (`evaluation.resize.prepare`), about −1..1."""
    return _Inception().apply({"params": params}, x)  # pyright: ignore[reportReturnType]


@functools.cache
def abstract() -> Params:
    """The parameters and how they begin (`initialisers.Parameter`)."""
    return initialisers.abstract(_Inception(), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))


def fold(
    weight: Float32[np.ndarray, "features channels height width"],
    beta: Float32[np.ndarray, " features"],
    mean: Float32[np.ndarray, " features"],
    variance: Float32[np.ndarray, " features"],
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Kernel and bias of a convolution with the batch normalisation after it, (x − mean) / √(variance + ε) + beta."""
    scale = 1 / np.sqrt(np.float64(variance) + _EPSILON)
    kernel = np.transpose(weight * scale[:, None, None, None], (2, 3, 1, 0))
    return {"kernel": kernel.astype(np.float32), "bias": (beta - mean * scale).astype(np.float32)}
