"""LoRA: ΔW = alpha / rank · down · up, of two narrow factors.

    down [in, rank]                                         up [rank, out]    a linear layer
    down [height, width, in, rank]                          up [rank, out]    a convolution: a narrow one, then 1×1
    down [in, rank]    mid [height, width, rank, rank]      up [rank, out]    with a middle factor: 1×1, narrow, 1×1

Low-rank adaptation: Hu et al. 2021, arXiv:2106.09685, section 4.1. The middle factor is LyCORIS' (Yeh et al. 2023,
arXiv:2309.14859: a Tucker decomposition).
"""

import math
import operator
from collections.abc import Callable

from jaxtyping import Float

from sdxl_jax.arrays import Distribution, Parameter, type_of_array

Product = Callable[[type_of_array, type_of_array], type_of_array]
"""(input, kernel) -> output: the layer's own product, a matrix product or a convolution with its strides and padding.
"""


def kaiming_uniform(fan_in: int) -> Distribution:
    """torch's `kaiming_uniform_(a=√5)`, with which the factors begin everywhere: uniform within ±1/√fan-in."""
    return Distribution(half_width=1 / math.sqrt(fan_in))


def abstract(shape: tuple[int, ...], rank: int, middle: bool = False) -> dict[str, Parameter]:
    """The factors of a kernel [in, out] or [height, width, in, out], and how they begin: up is zero, and so is ΔW.

    middle: with a middle factor, for windows above 1×1.
    """
    *window, inputs, outputs = shape
    up = Parameter((rank, outputs), Distribution())
    if not middle or math.prod(window) == 1:
        return {"down": Parameter((*window, inputs, rank), kaiming_uniform(math.prod(shape[:-1]))), "up": up}
    mid = Parameter((*window, rank, rank), kaiming_uniform(math.prod(window) * rank))
    return {"down": Parameter((inputs, rank), kaiming_uniform(inputs)), "mid": mid, "up": up}


def product(
    down: Float[type_of_array, "... _in _rank"],
    up: Float[type_of_array, "_rank _out"],
    mid: Float[type_of_array, "_height _width _rank _rank"] | None = None,
) -> Float[type_of_array, "... _in _out"]:
    """down · mid · up, before alpha / rank; numpy or jax arrays."""
    return (down if mid is None else down @ mid) @ up


def shape(
    down: Float[type_of_array, "..."], up: Float[type_of_array, "..."], mid: Float[type_of_array, "..."] | None = None
) -> tuple[int, ...]:
    """The kernel's shape. Raises ValueError for factors that do not fit together."""
    window = () if mid is None else mid.shape[:-2]
    ranks = [down.shape[-1], *(() if mid is None else mid.shape[-2:]), up.shape[0]]
    if up.ndim != 2 or len({*ranks}) != 1 or (mid is not None and (down.ndim, mid.ndim) != (2, 4)):
        raise ValueError("factors of different ranks")
    return (*window, *down.shape[:-1], up.shape[-1])


def side(
    x: Float[type_of_array, "... _in"],
    down: Float[type_of_array, "... _in _rank"],
    up: Float[type_of_array, "_rank _out"],
    mid: Float[type_of_array, "_height _width _rank _rank"] | None = None,
    convolve: Product = operator.matmul,
) -> Float[type_of_array, "... _out"]:
    """What ΔW makes of the layer's input, without ΔW, before alpha / rank."""
    narrow = convolve(x, down) if mid is None else convolve(x @ down, mid)
    return narrow @ up
