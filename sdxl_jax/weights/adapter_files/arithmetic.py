"""Arithmetic of adapters: extracting one from two models, merging several into one, resizing.

Each changes the rank of a matrix ΔW, of a convolution [height · width · in, out]: its singular value decomposition
without the smallest values is the nearest matrix of that rank (Eckart & Young 1936). Everything is float64 inside. The
values of a product of narrow factors are those of a core as narrow as the rank; of other matrices, the square roots of
the eigenvalues of the smaller of W Wᵀ and Wᵀ W, which float64 gives to all digits of float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sdxl_jax.adapters import kinds, loha
from sdxl_jax.adapters.changes import Resolved, float32
from sdxl_jax.adapters.kinds import Factors, Kind
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.progress import tqdm
from sdxl_jax.weights.adapter_files.names import layers_of
from sdxl_jax.weights.lazy import Leaf, Weights


@dataclass(frozen=True)
class Limit:
    """How much of a change is kept."""

    rank: int | None = None
    """At most this rank."""
    energy: float | None = None
    """At least this share of the sum of squares, 0 to 1, of each layer, if the rank allows."""

    def check(self) -> None:
        """Raises InputError for numbers that are out of range, and where both are missing."""
        if self.rank is None and self.energy is None:
            raise InputError("Neither a rank nor a share of energy is given. Give --rank 32, --energy 0.95, or both")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank={self.rank}. Give 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy={self.energy:g}. Give a share above 0, up to 1: 0.95 keeps 95 %")

    def of(self, squares: Float[np.ndarray, " values"]) -> int:
        """The rank for singular values with these squares, descending."""
        rank = len(squares)
        if self.energy is not None:
            shares = np.cumsum(squares) / np.sum(squares)
            rank = 1 + int(np.searchsorted(shares, self.energy * (1 - 1e-12)))
        return max(1, min(rank, len(squares), self.rank or rank))


_VECTORS = ("bias", "scale")
"""Ends of the paths of biases and norms."""
ALL = Limit()
"""Everything that is not rounding."""


@dataclass(frozen=True)
class Result:
    """An adapter that was computed."""

    resolved: Resolved
    energy: Mapping[tuple[str, int | None], float]
    """The share of the sum of squares that is kept, by (path, layer); empty where nothing was cut."""
    narrower: int = 0
    """Layers whose own width is less than the rank that was asked for; they are exact."""
    left_out: int = 0
    """Biases and norms that differ and are not in the adapter."""


# ---- low rank --------------------------------------------------------------------------------------------------------

Pair = tuple[Float[np.ndarray, "... _in _rank"], Float[np.ndarray, "_rank _out"]]


def truncated(weight: Float[np.ndarray, "... _in _out"], limit: Limit) -> tuple[Pair, float]:
    """((down, up), the share of energy kept): the nearest product of the limit's rank, float32."""
    flat = weight.reshape(-1, weight.shape[-1]).astype(np.float64)
    is_wide = flat.shape[0] <= flat.shape[1]
    squares, vectors = np.linalg.eigh(flat @ flat.T if is_wide else flat.T @ flat)
    squares, vectors = squares[::-1].clip(0), vectors[:, ::-1]
    rank, kept = _rank(squares, limit, max(flat.shape))
    vectors, roots = vectors[:, :rank], squares[:rank].clip(np.finfo(np.float64).tiny) ** 0.25
    # Both sides get the root of each value, as large as each other.
    if is_wide:
        down, up = vectors * roots, (vectors.T @ flat) / roots[:, None]
    else:
        down, up = (flat @ vectors) / roots, roots[:, None] * vectors.T
    return _pair(down, up, weight.shape), kept


def narrowed(
    down: Float[np.ndarray, "... _in rank"], up: Float[np.ndarray, "rank _out"], limit: Limit
) -> tuple[Pair, float]:
    """`truncated` for down · up, without the product."""
    left, left_core = np.linalg.qr(down.reshape(-1, down.shape[-1]).astype(np.float64))
    right, right_core = np.linalg.qr(up.T.astype(np.float64))
    one, values, other = np.linalg.svd(left_core @ right_core.T)
    rank, kept = _rank(values**2, limit, max(len(left), len(right)))
    roots = np.sqrt(values[:rank])
    first, second = left @ one[:, :rank] * roots, (roots[:, None] * other[:rank]) @ right.T
    return _pair(first, second, (*down.shape[:-1], up.shape[-1])), kept


def _rank(squares: Float[np.ndarray, " values"], limit: Limit, size: int) -> tuple[int, float]:
    """(rank, share of energy). Values that are rounding of float32 data do not count."""
    total = float(squares.sum())
    if total == 0:
        return 1, 1.0
    count = int((squares > squares[0] * size * float(np.finfo(np.float64).eps)).sum())
    rank = min(limit.of(squares), max(1, count))
    return rank, float(squares[:rank].sum()) / total


def _pair(down: Float[np.ndarray, "_rows rank"], up: Float[np.ndarray, "rank out"], shape: tuple[int, ...]) -> Pair:
    return down.reshape(*shape[:-1], down.shape[-1]).astype(np.float32), up.astype(np.float32)


def _factors(pair: Pair) -> Factors:
    """A LoRA whose alpha is its rank: the change is down · up."""
    down, up = pair
    return {"down": down, "up": up, "alpha": np.array(len(up), np.float32)}


# ---- extract ---------------------------------------------------------------------------------------------------------


def extracted(
    base: Weights, tuned: Weights, limit: Limit, *, differences_too: bool = False, progress: bool = True
) -> Result:
    """The adapter that makes one model of another, read one parameter at a time. Embeddings of tokens are not compared.

    differences_too: biases and norms as differences. Raises InputError for models of different architectures, without a
    common part, or that are equal, and for limits that `Limit.check` refuses.
    """
    limit.check()
    _check_same(base, tuned)
    layers = layers_of(base.config)
    paths = [path for path in layers if path in base.leaves and path in tuned.leaves]
    kernels = [path for path in paths if path.endswith("kernel")]
    total = sum(layers[path] or 1 for path in kernels)
    resolved: Resolved = {}
    energy: dict[tuple[str, int | None], float] = {}
    narrower = left_out = 0
    with tqdm(total=total, desc="extracting", unit="layer", disable=not progress, mininterval=0.5) as shown:
        for path in kernels:
            count = layers[path]
            for layer in range(count) if count is not None else (None,):
                delta = _difference(base.leaves[path], tuned.leaves[path], layer)
                if np.any(delta):
                    pair, energy[path, layer] = truncated(delta, limit)
                    resolved.setdefault(path, []).append((layer, _factors(pair)))
                    narrower += _is_narrower(delta.shape, limit)
                shown.update()
    for path in paths:
        if path.endswith(_VECTORS) and np.any(delta := _difference(base.leaves[path], tuned.leaves[path], None)):
            if differences_too:
                rows = [(None, delta)] if layers[path] is None else list(enumerate(delta))
                resolved[path] = [(layer, {"diff": each}) for layer, each in rows if np.any(each)]
            else:
                left_out += 1
    if not resolved:
        raise InputError(
            "The two models have the same weights wherever an adapter changes them, so there is nothing to extract. "
            "Give a base model and one that was trained from it"
        )
    return Result(with_one_alpha(resolved), energy, narrower, left_out)


def _is_narrower(shape: tuple[int, ...], limit: Limit) -> bool:
    """Whether a layer's own width is less than the limit's rank."""
    return limit.rank is not None and limit.rank > min(math.prod(shape[:-1]), shape[-1])


def _check_same(base: Weights, tuned: Weights) -> None:
    parts = [part for part in base.parts if part in tuned.parts and part != "vae"]
    if not parts:
        raise InputError(
            f"The models have the parts {', '.join(base.parts)} and {', '.join(tuned.parts)}. Give two models that "
            "both have a UNet or a text encoder"
        )
    shapes = (
        {
            path: tuple(leaf.shape)
            for path, leaf in each.leaves.items()
            if path.split("/")[0] in parts and path.endswith(("kernel", *_VECTORS))  # words may have been added
        }
        for each in (base, tuned)
    )
    if different := differences(*shapes):
        raise InputError(
            f"The models are of different architectures: {len(different)} parameters differ in shape, the first is "
            f"{different[0]} (base -> trained). Give a base model and one that was trained from it"
        )


def _difference(base: Leaf, tuned: Leaf, layer: int | None) -> Float[np.ndarray, "..."]:
    """Of a parameter, or of one layer of a stacked one, float32."""
    index = None if layer is None else (slice(layer, layer + 1), *(slice(0, size) for size in base.shape[1:]))
    one, other = (leaf.read(index).astype(np.float32) for leaf in (base, tuned))
    delta = other - one
    if not np.isfinite(delta).all():
        raise InputError("A model has non-finite numbers (NaN or inf) in its weights. Give another one")
    return delta if layer is None else delta[0]


# ---- merge and resize ------------------------------------------------------------------------------------------------


def combined(adapters: Sequence[tuple[Resolved, float]], limit: Limit | None = None, progress: bool = True) -> Result:
    """One adapter that does what several with their strengths do together. limit: of each layer; None: exact, the ranks
    of a layer add up.

    LoHa and LoKr become LoRA, exactly. Raises InputError for what is not a sum (a DoRA), and without a limit for a
    kernel with a difference in one file and a product in another.
    """
    if limit is not None:
        limit.check()
    grouped: dict[tuple[str, int | None], list[tuple[Factors, float]]] = {}
    for resolved, strength in adapters:
        for path, rows in resolved.items():
            for layer, factors in rows:
                if not kinds.is_sum(factors):
                    raise InputError(
                        f"{path} is rescaled (DoRA, IA³), rotated (OFT, BOFT), changed by a GLoRA or replaced, which "
                        "depends on the base model. Merge the file into the base (sdxl-jax convert --lora), and "
                        "extract an adapter from the two"
                    )
                grouped.setdefault((path, layer), []).append((float32(factors), strength))
    result: Resolved = {}
    energy: dict[tuple[str, int | None], float] = {}
    narrower = 0
    desc = "merging" if len(adapters) > 1 else "resizing"
    for (path, layer), each in tqdm(grouped.items(), desc=desc, unit="layer", disable=not progress, mininterval=0.5):
        if path.endswith("kernel"):
            factors, kept = _combined_kernel(path, each, limit)
            if limit is not None:
                energy[path, layer] = kept
                narrower += _is_narrower(kinds.shape_of(factors), limit)
        else:
            factors = {"diff": _total(each)}
        result.setdefault(path, []).append((layer, factors))
    return Result(with_one_alpha(result), energy, narrower)


def _combined_kernel(path: str, each: Sequence[tuple[Factors, float]], limit: Limit | None) -> tuple[Factors, float]:
    """(the factors of one kernel, share of energy kept)."""
    whole = [kinds.kind_of(factors) is Kind.DIFFERENCE for factors, _ in each]
    if any(whole):
        if limit is None and not all(whole):
            raise InputError(
                f"{path} has a whole difference in one file and a low-rank change in another, which no file can hold "
                "together. Give --rank or --energy: both become one low-rank change"
            )
        if limit is None:
            return {"diff": _total(each)}, 1.0
        pair, kept = truncated(_total(each), limit)
        return _factors(pair), kept
    pairs = [(down, np.float32(strength) * up) for factors, strength in each for down, up in [as_lora(factors)]]
    down, up = np.concatenate([one for one, _ in pairs], -1), np.concatenate([other for _, other in pairs])
    if limit is None:
        return _factors((down, up)), 1.0
    if len(up) >= min(math.prod(down.shape[:-1]), up.shape[-1]):  # not narrow: the product is smaller
        pair, kept = truncated(down @ up, limit)
    else:
        pair, kept = narrowed(down, up, limit)
    return _factors(pair), kept


def with_one_alpha(resolved: Resolved) -> Resolved:
    """The same changes with the largest rank as the alpha of every LoRA; both sides have the rest of the scale, for the
    small numbers of float16. Where alphas differ, diffusers takes the most frequent one for attention and text layers.
    """
    largest = max((kinds.rank_of(factors) or 0 for rows in resolved.values() for _, factors in rows), default=0)

    def one(factors: Factors) -> Factors:
        if kinds.kind_of(factors) is not Kind.LORA:
            return factors
        root = np.sqrt(np.float32(factors["alpha"]) / np.float32(largest))
        sides = {name: factors[name] * root for name in ("down", "up")}
        return {**factors, **sides, "alpha": np.array(largest, np.float32)}

    return {path: [(layer, one(factors)) for layer, factors in rows] for path, rows in resolved.items()}


def _total(each: Sequence[tuple[Factors, float]]) -> Float[np.ndarray, "..."]:
    """The sum of whole changes with their strengths."""
    return np.sum([np.float32(strength) * np.asarray(kinds.delta(factors)) for factors, strength in each], axis=0)


def as_lora(factors: Factors) -> Pair:
    """(down, up) of a change that is a product, a LoHa or a LoKr: exact to rounding. alpha / rank is in up."""
    each = kinds.scaled(factors)
    match kinds.kind_of(each):
        case Kind.LORA:
            down, mid = each["down"], each.get("mid")
            return np.asarray(down if mid is None else down @ mid), np.asarray(each["up"])
        case Kind.LOHA:
            halves = [(each[f"down_{n}"], each[f"up_{n}"], each.get(f"mid_{n}")) for n in (1, 2)]
            down, up = loha.as_lora(*halves)
            if len(up) < min(math.prod(down.shape[:-1]), up.shape[-1]):
                return np.asarray(down), np.asarray(up)
    return truncated(np.asarray(kinds.delta(factors)), ALL)[0]
