"""LoKr: ΔW = alpha / rank · w1 ⊗ w2, the Kronecker product of a small and a large matrix.

    kernel [in, out] = [in_1 · in_2, out_1 · out_2]     w1 [in_1, out_1]     w2 [(height, width,) in_2, out_2]

Either is whole, or LoRA's product: w1_down · w1_up, w2_down (· w2_mid) · w2_up. If both are whole there is no rank, and
ΔW = w1 ⊗ w2. Yeh et al. 2023, arXiv:2309.14859; LyCORIS `modules/lokr.py`, whose w1_b is w1_down, w1_a w1_up and t2
w2_mid.
"""

import math
import operator
from typing import NamedTuple

from jaxtyping import Float

from sdxl_jax.adapters import lora
from sdxl_jax.adapters.lora import Product, kaiming_uniform
from sdxl_jax.arrays import Distribution, Parameter, type_of_array


class Part(NamedTuple):
    """w1 or w2: whole, or its factors."""

    whole: Float[type_of_array, "..."] | None = None
    down: Float[type_of_array, "..."] | None = None
    up: Float[type_of_array, "..."] | None = None
    mid: Float[type_of_array, "..."] | None = None

    @property
    def matrix(self) -> Float[type_of_array, "..."]:
        if self.whole is not None:
            return self.whole
        assert self.down is not None and self.up is not None, "a part is whole, or down and up"
        return lora.product(self.down, self.up, self.mid)

    @property
    def shape(self) -> tuple[int, ...]:
        """Raises ValueError for factors that do not fit together."""
        if self.whole is not None:
            return self.whole.shape
        assert self.down is not None and self.up is not None, "a part is whole, or down and up"
        return lora.shape(self.down, self.up, self.mid)


def split(size: int, factor: int | None = None) -> tuple[int, int]:
    """(smaller, larger): the two divisors of an axis. factor: the smaller one, or the larger; if it does not divide the
    axis, the largest divisor up to it. None: the pair that is nearest to a square. LyCORIS `factorization`."""
    if factor is not None and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = min(math.isqrt(size), factor or size)
    smaller = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return smaller, size // smaller


def abstract(
    shape: tuple[int, ...],
    rank: int,
    factor: int | None = None,
    full_matrix: bool = False,
    decompose_both: bool = False,
    middle: bool = False,
) -> dict[str, Parameter]:
    """The factors of a kernel and how they begin, as in LyCORIS: w2 or w2_up … is zero, and so is ΔW.

    factor: of `split`, for both axes. full_matrix: w1 and w2 whole. decompose_both: w1 as factors too. A part whose
    half width the rank reaches is whole, as in LyCORIS. middle: w2 with a middle factor, for windows above 1×1.
    """
    *window, inputs, outputs = shape
    (in_1, in_2), (out_1, out_2) = split(inputs, factor), split(outputs, factor)
    found: dict[str, Parameter] = {}
    if decompose_both and not full_matrix and rank < max(in_1, out_1) / 2:
        found["w1_down"] = Parameter((in_1, rank), kaiming_uniform(in_1))
        found["w1_up"] = Parameter((rank, out_1), kaiming_uniform(rank))
    else:
        found["w1"] = Parameter((in_1, out_1), kaiming_uniform(in_1))
    if full_matrix or rank >= max(in_2, out_2) / 2:
        return found | {"w2": Parameter((*window, in_2, out_2), Distribution())}
    if middle and math.prod(window) > 1:
        found["w2_down"] = Parameter((in_2, rank), Distribution())
        found["w2_mid"] = Parameter((*window, rank, rank), kaiming_uniform(math.prod(window) * rank))
        return found | {"w2_up": Parameter((rank, out_2), kaiming_uniform(out_2))}
    found["w2_down"] = Parameter((*window, in_2, rank), Distribution())
    return found | {"w2_up": Parameter((rank, out_2), kaiming_uniform(rank))}


def product(one: Part, two: Part) -> Float[type_of_array, "..."]:
    """w1 ⊗ w2: element (in_1 · n_2 + in_2, out_1 · m_2 + out_2) is w1[in_1, out_1] · w2[in_2, out_2]."""
    w1, w2 = one.matrix, two.matrix
    outer = w1[:, None, :, None] * w2[..., None, :, None, :]
    return outer.reshape(_kernel_shape(w1.shape, w2.shape))


def shape(one: Part, two: Part) -> tuple[int, ...]:
    """The kernel's shape. Raises ValueError for factors that do not fit together."""
    if len(one.shape) != 2:
        raise ValueError("w1 is not a matrix")
    return _kernel_shape(one.shape, two.shape)


def _kernel_shape(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return (*second[:-2], first[0] * second[-2], first[1] * second[-1])


def side(
    x: Float[type_of_array, "... _in"], one: Part, two: Part, convolve: Product = operator.matmul
) -> Float[type_of_array, "... _out"]:
    """What ΔW makes of the layer's input, without ΔW, before alpha / rank: w2 on the rows of [in_1, in_2], then w1."""
    (in_1, _), (in_2, _) = one.shape, two.shape[-2:]
    rows = x.reshape(*x.shape[:-1], in_1, in_2)
    if is_convolution := len(two.shape) == 4:  # the rows beside the batch: in_1 is no axis of the window
        rows = rows.swapaxes(-2, -3).swapaxes(-3, -4)
        batch = rows.shape[:2]
        rows = rows.reshape(-1, *rows.shape[2:])
    if two.whole is not None:
        rows = convolve(rows, two.whole)
    else:
        assert two.down is not None and two.up is not None, "a part is whole, or down and up"
        rows = lora.side(rows, two.down, two.up, two.mid, convolve)
    if is_convolution:
        rows = rows.reshape(*batch, *rows.shape[1:]).swapaxes(-4, -3).swapaxes(-3, -2)
    rows = one.matrix.swapaxes(-1, -2) @ rows
    return rows.reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
