"""OFT and BOFT: the outputs of a layer are rotated. W' = W · R, with an orthogonal R, and outputs rescaled after it.

    R = (1 + Q) (1 − Q)⁻¹,  Q = B − Bᵀ                                     Cayley's transform: skew → orthogonal
    OFT     blocks [blocks, size, size]              R is block-diagonal, over consecutive outputs
    BOFT    stages [stages, blocks, size, size]      R is a product: stage n mixes outputs that are 2ⁿ · size / 2 apart
    rescale [1, out]                                 factors of the outputs, in some files

alpha is no scale: where it is above 0, ‖Q‖ is at most alpha · out. Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023,
arXiv:2311.06243; LyCORIS `functional/diag_oft.py` and `boft.py`, in whose layers blocks of OFT are applied transposed.
ComfyUI limits ‖Q‖ to alpha, and leaves out an OFT's rescale.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float


def rotations(blocks: Float[np.ndarray, "*axes size size"], limit: float) -> Float[np.ndarray, "*axes size size"]:
    """R of every block. limit: of ‖Q‖ over all of them; 0: none."""
    skew = blocks - blocks.swapaxes(-1, -2)
    norm = np.linalg.norm(skew)
    if 0 < limit < norm:
        skew = skew * np.float32(limit / norm)
    one = np.eye(blocks.shape[-1], dtype=blocks.dtype)
    return (one + skew) @ np.linalg.inv(one - skew)


def changed(
    kernel: Float[np.ndarray, "*axes outputs"], factors: Mapping[str, Any]
) -> Float[np.ndarray, "*axes outputs"]:
    """W', float32 as its arguments."""
    limit = float(factors["alpha"]) * kernel.shape[-1] if "alpha" in factors else 0.0
    if "blocks" in factors:
        turn = rotations(factors["blocks"], limit)
        rows = kernel.reshape(*kernel.shape[:-1], *turn.shape[:2])
        found = np.einsum("...kn,knm->...km", rows, turn).reshape(kernel.shape)
    else:
        found = kernel
        for stage, turn in enumerate(rotations(factors["stages"], limit)):
            apart = 2**stage * turn.shape[-1] // 2
            pairs = found.reshape(*kernel.shape[:-1], -1, 2, apart).swapaxes(-1, -2)
            rows = pairs.reshape(*kernel.shape[:-1], *turn.shape[:2])
            rows = np.einsum("...kn,kmn->...km", rows, turn).reshape(pairs.shape)
            found = rows.swapaxes(-1, -2).reshape(kernel.shape)
    return found * factors["rescale"] if "rescale" in factors else found


def check_fits(factors: Mapping[str, Any], outputs: int) -> None:
    """Raises ValueError for factors that cannot be of a kernel with so many outputs."""
    *_, count, size, other = factors["blocks" if "blocks" in factors else "stages"].shape
    if size != other or count * size != outputs:
        raise ValueError("blocks of another size")
    # The last stage mixes outputs that are size / 2 · 2ⁿ apart, in pairs.
    if "stages" in factors and (size % 2 or outputs % (size * 2 ** (len(factors["stages"]) - 1))):
        raise ValueError("more stages than the outputs allow")
    if "rescale" in factors and factors["rescale"].size != outputs:
        raise ValueError("factors of other outputs")
