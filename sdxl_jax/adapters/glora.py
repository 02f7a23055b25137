"""GLoRA: W' = W + A · W + B: a low-rank change of the layer's input, and one of its product.

    A = alpha / rank · input_down [in, rank] · input_up [rank, in]        B = LoRA's alpha / rank · down · mid · up

Chavan et al. 2023, arXiv:2306.07967, with the two terms that LyCORIS has (`modules/glora.py`): a2 is input_down, a1
input_up, b2 down, b1 up and bm mid.
"""

from jaxtyping import Float

from sdxl_jax.adapters import lora
from sdxl_jax.arrays import type_of_array


def changed(
    kernel: Float[type_of_array, "*window inputs outputs"],
    input_down: Float[type_of_array, "inputs _rank"],
    input_up: Float[type_of_array, "_rank inputs"],
    down: Float[type_of_array, "..."],
    up: Float[type_of_array, "..."],
    mid: Float[type_of_array, "..."] | None = None,
) -> Float[type_of_array, "*window inputs outputs"]:
    """W', with alpha / rank in the factors."""
    return kernel + input_down @ (input_up @ kernel) + lora.product(down, up, mid)


def shape(
    input_down: Float[type_of_array, "..."],
    input_up: Float[type_of_array, "..."],
    down: Float[type_of_array, "..."],
    up: Float[type_of_array, "..."],
    mid: Float[type_of_array, "..."] | None = None,
) -> tuple[int, ...]:
    """The kernel's shape. Raises ValueError for factors that do not fit together."""
    found = lora.shape(down, up, mid)
    if input_down.shape[::-1] != input_up.shape or input_down.shape != (found[-2], up.shape[0]):
        raise ValueError("changes of the input of another shape")
    return found
