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

from sdxl_jax.models.layers import KERNEL_SCALE
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
        leaves[path], leaves[path.removesuffix("kernel") + KERNEL_SCALE] = _Values(leaf, scales), scales
    return replace(weights, leaves=leaves)


def is_quantised(path: str) -> bool:
    """Whether the parameter at this path is a kernel that is stored in eight bits."""
    return bool(_LAYERS.search(path)) and not _KEPT.search(path)


def round_to_int8(
    kernel: Float[np.ndarray, "*axes features_out"],
) -> tuple[Int8[np.ndarray, "*axes features_out"], Float32[np.ndarray, "*layers features_out"]]:
    """(values, scale) of a kernel, or of stacked ones, which have an axis of layers in front: scales of each layer."""
    wide = kernel.astype(np.float32)
    stacked = wide.ndim in (3, 5)
    scale = np.abs(wide).max(axis=tuple(range(int(stacked), wide.ndim - 1)), keepdims=True) / np.float32(127)
    values = np.rint(wide / np.where(scale > 0, scale, 1)).astype(np.int8)
    return values, scale.reshape(*wide.shape[: int(stacked)], wide.shape[-1])


@dataclass
class _Scales:
    """Scales of a kernel. They are made with its values, which are read first."""

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
    leaf: Leaf
    scales: _Scales

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8)

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        values, self.scales.known = round_to_int8(self.leaf.read())
        return values if index is None else values[index]


def error(weights: Mapping[str, Leaf]) -> dict[str, float]:
    """‖kernel − rounded‖ / ‖kernel‖ of each kernel that would be stored in eight bits."""
    found = {}
    for path, leaf in weights.items():
        if is_quantised(path):
            kernel = leaf.read().astype(np.float32)
            values, scale = round_to_int8(kernel)
            between = (1,) * (kernel.ndim - scale.ndim)
            rounded = values * scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])
            found[path] = float(np.linalg.norm(kernel - rounded) / max(np.linalg.norm(kernel), 1e-30))
    return found
