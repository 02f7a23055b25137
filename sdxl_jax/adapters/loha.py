"""LoHa: ΔW = alpha / rank · (down_1 · up_1) ⊙ (down_2 · up_2), the elementwise product of two LoRAs.

Its rank is up to rank². Axes are LoRA's, with or without middle factors. Hyeon-Woo et al. 2021 (FedPara),
arXiv:2108.06098; LyCORIS `modules/loha.py`, whose w1_b and w1_a are down_1 and up_1, and t1 mid_1.
"""

import math
import operator

from jaxtyping import Float

from sdxl_jax.adapters import lora
from sdxl_jax.adapters.lora import Product
from sdxl_jax.arrays import Distribution, Parameter, type_of_array

Half = tuple[
    Float[type_of_array, "... _in _rank"],
    Float[type_of_array, "_rank _out"],
    Float[type_of_array, "_height _width _rank _rank"] | None,
]
"""(down, up, mid) of one of the two."""


def abstract(shape: tuple[int, ...], rank: int, middle: bool = False) -> dict[str, Parameter]:
    """The factors of a kernel and how they begin, as in LyCORIS: up_2 is zero, and so is ΔW."""
    deviations = {"down_1": 1.0, "down_2": 1.0, "up_1": 0.1, "up_2": 0.0, "mid_1": 0.1, "mid_2": 0.1}
    shapes = {
        f"{name}_{half}": each.shape for half in (1, 2) for name, each in lora.abstract(shape, rank, middle).items()
    }
    return {name: Parameter(each, Distribution(deviation=deviations[name])) for name, each in shapes.items()}


def product(one: Half, two: Half) -> Float[type_of_array, "..."]:
    """ΔW before alpha / rank."""
    return lora.product(*one) * lora.product(*two)


def shape(one: Half, two: Half) -> tuple[int, ...]:
    """The kernel's shape. Raises ValueError for factors that do not fit together."""
    found = lora.shape(*one)
    if lora.shape(*two) != found:
        raise ValueError("two halves of different shapes")
    return found


def as_lora(one: Half, two: Half) -> tuple[Float[type_of_array, "... _in _rank2"], Float[type_of_array, "_rank2 _out"]]:
    """(down, up) of the LoRA of rank² with the same product: a row of its down is the outer product of the rows of
    down_1 and down_2, a column of its up that of the columns of up_1 and up_2."""
    (down_1, up_1, mid_1), (down_2, up_2, mid_2) = one, two
    down_1, down_2 = (down if mid is None else down @ mid for down, mid in ((down_1, mid_1), (down_2, mid_2)))
    down, up = down_1[..., :, None] * down_2[..., None, :], up_1[:, None, :] * up_2[None, :, :]
    rank = math.prod(up.shape[:2])
    return down.reshape(*down.shape[:-2], rank), up.reshape(rank, up.shape[-1])


def side(
    x: Float[type_of_array, "... _in"], one: Half, two: Half, convolve: Product = operator.matmul
) -> Float[type_of_array, "... _out"]:
    """What ΔW makes of the layer's input, before alpha / rank: without ΔW, by a LoRA of rank². That is less work than
    ΔW while rank² is small beside the layer's width."""
    return lora.side(x, *as_lora(one, two), None, convolve)
