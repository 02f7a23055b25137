"""DoRA: W' = magnitude · (W + ΔW) / ‖W + ΔW‖: direction and magnitude of a weight are learnt separately.

The norm is that of each input (axis IN, magnitude [in, 1]) or of each output (OUT, magnitude [1, out]) over all other
axes of the kernel; ΔW is that of any other kind. Magnitudes begin as the norm of W, so that W' = W. Liu et al. 2024,
arXiv:2402.09353.

The axis IN is read alike by LyCORIS (wd_on_out=False), OneTrainer, ComfyUI and A1111. PEFT, and LyCORIS by default,
have the axis OUT, as here; ComfyUI divides it by the norm of W alone.
"""

import enum
import math

import jax
import numpy as np
from jaxtyping import Float

from sdxl_jax.arrays import type_of_array

_EPSILON = np.finfo(np.float32).eps
"""Added to norms, as in LyCORIS and ComfyUI: a row of zeros stays one."""


class Axis(enum.Enum):
    """The axis of a kernel along which magnitudes lie."""

    IN = "in"
    OUT = "out"


def magnitude_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Of the magnitudes of a kernel."""
    ones = (1,) * (len(shape) - 2)
    return (*ones, shape[-2], 1) if axis is Axis.IN else (*ones, 1, shape[-1])


def axis_of(magnitude: tuple[int, ...]) -> Axis:
    """The axis along which magnitudes of this shape lie."""
    return Axis.IN if magnitude[-1] == 1 else Axis.OUT


def norm(weight: Float[type_of_array, "*kernel"], axis: Axis) -> Float[type_of_array, "..."]:
    """‖weight‖ over all axes but one, which are kept with size 1: the magnitudes with which a training begins."""
    axes = (*range(weight.ndim - 2), -1 if axis is Axis.IN else -2)
    return (weight * weight).sum(axis=axes, keepdims=True) ** 0.5


def changed(
    kernel: Float[type_of_array, "*kernel"],
    delta: Float[type_of_array, "*kernel"],
    magnitude: Float[type_of_array, "..."],
) -> Float[type_of_array, "*kernel"]:
    """W'. Everything is float32."""
    weight = kernel + delta
    return weight * (magnitude / (norm(weight, axis_of(magnitude.shape)) + _EPSILON))


def scale(magnitude: Float[type_of_array, "..."], norms: Float[type_of_array, "..."]) -> Float[type_of_array, "..."]:
    """magnitude / norm. The norm is a constant for the gradient, as in PEFT and OneTrainer."""
    return magnitude / ((jax.lax.stop_gradient(norms) if isinstance(norms, jax.Array) else norms) + _EPSILON)


def norm_with_lora(
    kernel: Float[type_of_array, "*kernel"],
    down: Float[type_of_array, "*window_in _rank"],
    up: Float[type_of_array, "_rank _out"],
    axis: Axis,
) -> Float[type_of_array, "..."]:
    """‖W + down · up‖ without the sum: ‖W‖² + 2 ⟨W, ΔW⟩ + ‖ΔW‖², each by products as narrow as the rank."""
    *window, inputs, outputs = kernel.shape
    flat, narrow = kernel.reshape(-1, outputs), down.reshape(-1, down.shape[-1])
    if axis is Axis.OUT:
        crossed, own = narrow.T @ flat, (narrow.T @ narrow) @ up
        squares = (flat * flat).sum(axis=0) + (up * (2 * crossed + own)).sum(axis=0)
    else:
        crossed, own = flat @ up.T, narrow @ (up @ up.T)
        rows = (flat * flat).sum(axis=1) + (narrow * (2 * crossed + own)).sum(axis=1)
        squares = rows.reshape(math.prod(window), inputs).sum(axis=0)
    return squares.clip(0).reshape(magnitude_shape(kernel.shape, axis)) ** 0.5
