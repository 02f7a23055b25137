"""Weights in eight bits: kernels as int8, with one scale for each output channel.

    kernel ≈ values · scale        values int8, −127 to 127; scale float32, of an output channel: max |kernel| / 127

A product with such a kernel is that with its integers, times the scales: no kernel of another dtype is kept
(`models.layers`). Rounding is to nearest, so that no weight is off by more than half a scale. What changes every
position or every channel at once stays as it is: the first and the last convolution, and what embeds timesteps and
conditioning; so do norms, biases, embeddings, and the autoencoder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Float32, Int8, Shaped

from sdxl_jax.models.layers import KERNEL_SCALE, dequantised
from sdxl_jax.weights.lazy import Index, Leaf, Weights

_LAYERS = re.compile(r"^(unet|text_encoder(_2)?)/.*/kernel$")
_KEPT = re.compile(r"^unet/(conv_in|conv_out|time_embedding|add_embedding)/|/(time_emb_proj|text_projection)/")


def quantised(weights: Weights) -> Weights:
    """The same model with the kernels of its UNet and text encoders in eight bits; read, and rounded, on demand."""
    leaves: dict[str, Leaf] = {}
    for path, leaf in weights.leaves.items():
        if not is_quantised(path):
            leaves[path] = leaf
            continue
        scales = _Scales(leaf)
        leaves[path], leaves[scale_path(path)] = _Values(leaf, scales), scales
    return replace(weights, leaves=leaves)


def scale_path(path: str) -> str:
    """Of the scales of a kernel at this path."""
    return path.removesuffix("kernel") + KERNEL_SCALE


def with_numbers(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The reverse of `quantised`, rounding aside: kernels in float32, without scales."""
    scales = {scale_path(path) for path in leaves if path.endswith("/kernel")} & leaves.keys()
    return {
        path: _Numbers(leaf, leaves[scale_path(path)]) if scale_path(path) in scales else leaf
        for path, leaf in leaves.items()
        if path not in scales
    }


def is_quantised(path: str) -> bool:
    """Whether the parameter at this path is a kernel that is stored in eight bits."""
    return bool(_LAYERS.search(path)) and not _KEPT.search(path)


def round_to_int8(
    kernel: Float[np.ndarray, "*axes features_out"],
) -> tuple[Int8[np.ndarray, "*axes features_out"], Float32[np.ndarray, "*layers features_out"]]:
    """(values, scale) of a kernel, or of stacked ones, which have an axis of layers in front: scales of each layer."""
    wide = kernel.astype(np.float32)
    scale = np.abs(wide).max(axis=_within_layer(wide.ndim)) / np.float32(127)
    return _rounded(wide, scale), scale


def _within_layer(axes: int) -> tuple[int, ...]:
    """The axes of a kernel with so many that one scale is for: not that of layers, and not the last."""
    return tuple(range(int(axes in (3, 5)), axes - 1))


def _rounded(
    kernel: Float32[np.ndarray, "*axes features_out"], scale: Float32[np.ndarray, "*layers features_out"]
) -> Int8[np.ndarray, "*axes features_out"]:
    wide = np.expand_dims(scale, _within_layer(kernel.ndim))
    return np.rint(kernel / np.where(wide > 0, wide, 1)).astype(np.int8)


@dataclass
class _Scales:
    """Scales of a kernel, all of which is read for them, once."""

    leaf: Leaf
    known: Float32[np.ndarray, "*layers features_out"] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.leaf.shape
        return (*shape[: len(shape) in (3, 5)], shape[-1])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        if self.known is None:
            self.known = round_to_int8(self.leaf.read())[1]
        return self.known if index is None else self.known[index]


@dataclass(frozen=True)
class _Values:
    """Values of a kernel: all of it is read once, and then the slices that are asked for."""

    leaf: Leaf
    scales: _Scales

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8)

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        if self.scales.known is None or index is None:
            values, self.scales.known = round_to_int8(self.leaf.read())
            return values if index is None else values[index]
        ours = (*index[: self.scales.known.ndim - 1], index[-1])
        return _rounded(self.leaf.read(index).astype(np.float32), self.scales.known[ours])


@dataclass(frozen=True)
class _Numbers:
    """A kernel in float32, of its values in eight bits and their scales."""

    values: Leaf
    scales: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        scales = self.scales.read(None if index is None else (*index[: len(self.scales.shape) - 1], index[-1]))
        return np.asarray(dequantised(self.values.read(index), scales))


def error(weights: Mapping[str, Leaf]) -> dict[str, float]:
    """‖kernel − rounded‖ / ‖kernel‖ of each kernel that would be stored in eight bits."""
    found = {}
    for path, leaf in weights.items():
        if is_quantised(path):
            kernel = leaf.read().astype(np.float32)
            rounded = dequantised(*round_to_int8(kernel))
            found[path] = float(np.linalg.norm(kernel - rounded) / max(np.linalg.norm(kernel), 1e-30))
    return found
