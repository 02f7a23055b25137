"""The kinds of adapters: which factors a parameter's change has, how they begin, and what they do.

A tree of adapters has the paths of the parameters that it changes, and at each the change's factors by name:

    {"unet": {"mid_block": {"attentions_0": {"transformer_blocks": {"attn1": {"to_q": {"kernel":
        {"down": [layers, in, rank], "up": [layers, rank, out], "alpha": [layers]}}}}}}}}

| kind | factors |
|---|---|
| `LORA` | down, up, with or without mid |
| `LOHA` | down_1, up_1, down_2, up_2, with or without mid_1 and mid_2 |
| `LOKR` | w1, or w1_down and w1_up; w2, or w2_down and w2_up, with or without w2_mid |
| `DIFFERENCE` | diff: of any parameter, so also of biases and norms |
| `OFT`, `BOFT` | blocks, or stages; with or without rescale |
| `GLORA` | input_down, input_up, down, up, with or without mid |
| `IA3` | relative [in, 1] or [1, out], with the window's axes of size 1 |
| `REPLACEMENT` | replacement: the parameter itself |

The names of the factors say the kind. The first three have alpha, which is not trained, and may have a magnitude: that
is DoRA. The last five are read from files, and never trained; how they change a parameter depends on it. Functions here
take the factors of one parameter without the axis of stacked layers, numpy or jax arrays; `jax.vmap` takes them over
layers, as the scan over blocks does. Formulas are in the module of each kind.
"""

import enum
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from sdxl_jax.adapters import dora, glora, loha, lokr, lora, oft
from sdxl_jax.adapters.lokr import Part
from sdxl_jax.adapters.lora import Product
from sdxl_jax.arrays import Distribution, Parameter, type_of_array
from sdxl_jax.errors import InputError

Factors = Mapping[str, Float[type_of_array, "..."]]
"""The factors of one parameter's change by name."""


class Kind(enum.Enum):
    """What a change of a parameter consists of."""

    LORA = "lora"
    """A product of two narrow factors."""
    LOHA = "loha"
    """The elementwise product of two such products."""
    LOKR = "lokr"
    """A Kronecker product."""
    DIFFERENCE = "difference"
    """The whole difference."""
    REPLACEMENT = "replacement"
    """The changed parameter itself."""
    OFT = "oft"
    """Rotated outputs."""
    BOFT = "boft"
    """Outputs that are rotated in stages."""
    GLORA = "glora"
    """Low-rank changes of the input and of the product."""
    IA3 = "ia3"
    """Rescaled inputs or outputs: W' = W · (1 + relative). Liu et al. 2022, arXiv:2205.05638; LyCORIS
    `modules/ia3.py`."""


TRAINED = (Kind.LORA, Kind.LOHA, Kind.LOKR, Kind.DIFFERENCE)
"""The kinds that are trained here."""
FROZEN = ("alpha",)
"""Factors that are not trained."""
_NAMES = {
    Kind.GLORA: {"input_down", "input_up"},
    Kind.OFT: {"blocks"},
    Kind.BOFT: {"stages"},
    Kind.IA3: {"relative", "on_input"},
    Kind.LORA: {"down", "up", "mid"},
    Kind.LOHA: {f"{name}_{half}" for name in ("down", "up", "mid") for half in (1, 2)},
    Kind.LOKR: {"w1", "w2", *(f"{part}_{name}" for part in ("w1", "w2") for name in ("down", "up", "mid"))},
    Kind.DIFFERENCE: {"diff"},
    Kind.REPLACEMENT: {"replacement"},
}
_SCALED = {
    Kind.LORA: ("up",),
    Kind.LOHA: ("up_1",),
    Kind.LOKR: ("w1", "w1_up"),
    Kind.GLORA: ("up", "input_up"),
    Kind.DIFFERENCE: ("diff",),
}
"""The factors that alpha / rank is multiplied into. Of the trained kinds one of them is there: ΔW is linear in it."""
_OF_RANKS = ("up", "up_1", "w2_up", "w1_up")
"""Factors whose last axis but one is that of ranks, the one whose rank alpha is divided by first."""


@dataclass(frozen=True)
class Settings:
    """The factors of a new adapter."""

    kind: Kind = Kind.LORA
    """LORA, LOHA, LOKR or DIFFERENCE."""
    rank: int = 16
    """Width of the factors: more learns more, and makes a larger file."""
    alpha: float = 16.0
    """ΔW is scaled by alpha / rank: more learns faster, as a larger learning rate does."""
    rank_stabilised: bool = False
    """ΔW is scaled by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732). Files hold alpha · √rank, for readers that
    divide by the rank."""
    middle: bool = False
    """Convolutions with a middle factor: much smaller files."""
    factor: int | None = None
    """LOKR: the smaller divisor of each axis; None: nearest to a square. Larger: a larger w1, a smaller w2."""
    full_matrix: bool = False
    """LOKR: w1 and w2 whole. rank and alpha then have no effect."""
    decompose_both: bool = False
    """LOKR: w1 as a product too, where its rank is less than half its width."""
    magnitude: dora.Axis | None = None
    """DoRA, with magnitudes along this axis; IN is read alike by most programs."""

    def check(self) -> None:
        """Raises InputError for numbers that are out of range."""
        if self.kind not in TRAINED:
            raise InputError(
                f"{self.kind.value} is not trained, but read from files. Give lora, loha, lokr or difference"
            )
        if self.rank < 1 or (self.factor is not None and self.factor < 1):
            raise InputError(f"An adapter has rank={self.rank} and factor={self.factor}. Give 1 or more")
        check_alpha(self.alpha, "An adapter")
        if self.kind is Kind.DIFFERENCE and self.magnitude is not None:
            raise InputError("DoRA rescales the change of a low-rank adapter. Give lora, loha or lokr with magnitude")


def check_alpha(alpha: float, where: str) -> None:
    """Raises InputError for an alpha that is not above 0. where: begins the message."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(
            f"{where} has alpha {alpha:g}. Give a number above 0: the change is scaled by alpha / rank, and a negative "
            "strength is given where it is applied"
        )


def abstract(settings: Settings, path: str, shape: tuple[int, ...], layers: int | None = None) -> dict[str, Parameter]:
    """The factors of a parameter, none of them made (`initialisers.sample` makes them). The change begins at zero.

    path: of the parameter, for messages. shape: of one layer. layers: how many are stacked; None: it is not stacked.
    A magnitude is declared as ones: it begins as `dora.norm` of the base's kernel.

    Raises InputError for settings that `Settings.check` refuses, and for a rank above the width of the layer.
    """
    settings.check()
    if settings.kind is Kind.DIFFERENCE or len(shape) < 2:
        found = {"diff": Parameter(shape, Distribution())}
    else:
        found = _factors(settings, path, shape)
        stored = settings.alpha * (math.sqrt(settings.rank) if settings.rank_stabilised else 1)
        found["alpha"] = Parameter((), Distribution(stored))
        if settings.magnitude is not None:
            found["magnitude"] = Parameter(dora.magnitude_shape(shape, settings.magnitude), Distribution(1.0))
    lead = () if layers is None else (layers,)
    return {name: Parameter((*lead, *each.shape), each.distribution) for name, each in found.items()}


def _factors(settings: Settings, path: str, shape: tuple[int, ...]) -> dict[str, Parameter]:
    rank, middle = settings.rank, settings.middle
    if rank > (width := min(math.prod(shape[:-1]), shape[-1])) and not settings.full_matrix:
        whole = ", set full_matrix=True for whole matrices" if settings.kind is Kind.LOKR else ""
        raise InputError(
            f"An adapter of rank {rank} is to change {path} {shape}, whose own rank is at most {width}. Give a rank up "
            f"to {width}{whole}, or leave this layer out"
        )
    if settings.kind is Kind.LOKR:
        options = settings.factor, settings.full_matrix, settings.decompose_both, middle
        return lokr.abstract(shape, rank, *options)
    return (lora if settings.kind is Kind.LORA else loha).abstract(shape, rank, middle)


def kind_of(factors: Collection[str]) -> Kind:
    """By the names of the factors, of which some may be missing."""
    return next((kind for kind, names in _NAMES.items() if not names.isdisjoint(factors)), Kind.LORA)


def with_ranks(factors: Collection[str]) -> str | None:
    """The factor whose last axis but one is that of the ranks; None for kinds without, and a LOKR of two whole
    matrices."""
    return next((name for name in _OF_RANKS if name in factors), None)


def linear_in(factors: Collection[str]) -> str:
    """The factor in which ΔW is linear, of a trained kind: ΔW is scaled where it is."""
    return next(name for name in _SCALED[kind_of(factors)] if name in factors)


def rank_of(factors: Factors) -> int | None:
    """The rank that alpha is divided by; None for kinds without one, and a LOKR of two whole matrices."""
    name = with_ranks(factors)
    return None if name is None else factors[name].shape[-2]


def shape_of(factors: Factors) -> tuple[int, ...]:
    """The shape of the parameter. Raises ValueError for factors that do not fit together."""
    match kind_of(factors):
        case Kind.LORA:
            found = lora.shape(*_half(factors))
        case Kind.LOHA:
            found = loha.shape(_half(factors, "_1"), _half(factors, "_2"))
        case Kind.LOKR:
            found = lokr.shape(*_parts(factors))
        case Kind.DIFFERENCE:
            found = factors["diff"].shape
        case Kind.REPLACEMENT:
            found = factors["replacement"].shape
        case Kind.GLORA:
            found = glora.shape(factors["input_down"], factors["input_up"], *_half(factors))
        case Kind.OFT | Kind.BOFT | Kind.IA3:
            raise AssertionError("the factors are of one axis alone")
    if "magnitude" in factors:
        expected = [dora.magnitude_shape(found, axis) for axis in dora.Axis]
        if factors["magnitude"].shape not in expected:
            raise ValueError("magnitudes of another shape")
    return found


def check_fits(factors: Factors, shape: tuple[int, ...]) -> None:
    """Raises ValueError for factors that cannot be of a parameter of this shape."""
    kind = kind_of(factors)
    if kind in (Kind.OFT, Kind.BOFT):
        oft.check_fits(factors, shape[-1])
    elif kind is Kind.IA3:
        if factors["relative"].shape not in [dora.magnitude_shape(shape, axis) for axis in dora.Axis]:
            raise ValueError("factors of another size")
    elif shape_of(factors) != shape:
        raise ValueError(f"the weight would be {shape_of(factors)}")


def _half(
    factors: Factors, suffix: str = ""
) -> tuple[Float[type_of_array, "..."], Float[type_of_array, "..."], Float[type_of_array, "..."] | None]:
    return factors[f"down{suffix}"], factors[f"up{suffix}"], factors.get(f"mid{suffix}")


def _parts(factors: Factors) -> tuple[Part, Part]:
    one, two = ([factors.get(f"{part}{name}") for name in ("", "_down", "_up", "_mid")] for part in ("w1", "w2"))
    return Part(*one), Part(*two)


def scaled(factors: Factors) -> dict[str, Float[type_of_array, "..."]]:
    """The factors with alpha / rank multiplied into one of them, and without alpha."""
    rank, names = rank_of(factors), _SCALED.get(kind_of(factors), ())
    scale = 1 if rank is None else factors["alpha"] / rank
    return {
        name: value * scale if name in names and rank is not None else value
        for name, value in factors.items()
        if name != "alpha"
    }


def delta(factors: Factors) -> Float[type_of_array, "..."]:
    """ΔW, scaled, without the magnitude of a DoRA. Of the trained kinds."""
    each = scaled(factors)
    match kind_of(each):
        case Kind.LORA:
            return lora.product(*_half(each))
        case Kind.LOHA:
            return loha.product(_half(each, "_1"), _half(each, "_2"))
        case Kind.LOKR:
            return lokr.product(*_parts(each))
        case Kind.DIFFERENCE:
            return each["diff"]
        case _:
            raise AssertionError("what is no sum has no ΔW of its own")


def is_sum(factors: Mapping[str, object]) -> bool:
    """Whether the changed parameter is W + ΔW, with a ΔW that does not depend on W."""
    return "magnitude" not in factors and kind_of(factors) in TRAINED


def changed(
    value: Float[type_of_array, "*shape"], factors: Factors, strength: float = 1.0
) -> Float[type_of_array, "*shape"]:
    """The changed parameter, float32 as its arguments: W + strength · (W' − W), as ComfyUI has it. A replacement takes
    the parameter's place whatever the strength."""
    if is_sum(factors):
        return value + strength * delta(factors)
    match kind_of(factors):
        case Kind.REPLACEMENT:
            return factors["replacement"]
        case Kind.OFT | Kind.BOFT:
            whole = oft.changed(np.asarray(value), factors)
        case Kind.GLORA:
            each = scaled(factors)
            whole = glora.changed(value, each["input_down"], each["input_up"], *_half(each))
        case Kind.IA3:
            whole = value * (1 + factors["relative"])
        case _:
            whole = dora.changed(value, delta(factors), factors["magnitude"])
    return whole if strength == 1 else value + strength * (whole - value)


def side(
    x: Float[type_of_array, "... _in"], factors: Factors, convolve: Product = operator.matmul
) -> Float[type_of_array, "... _out"]:
    """What ΔW makes of a layer's input, in its dtype, by products as narrow as the factors; without the magnitude of a
    DoRA. convolve: the layer's own product."""
    each = {name: value.astype(x.dtype) for name, value in scaled(factors).items()}
    match kind_of(each):
        case Kind.LORA:
            return lora.side(x, *_half(each), convolve)
        case Kind.LOHA:
            return loha.side(x, _half(each, "_1"), _half(each, "_2"), convolve)
        case Kind.LOKR:
            return lokr.side(x, *_parts(each), convolve)
        case Kind.DIFFERENCE:
            return convolve(x, each["diff"])
        case _:
            raise AssertionError("what is no sum is not applied beside a layer")


def applied(
    x: Float[type_of_array, "... _in"],
    base: Callable[[type_of_array], type_of_array],
    factors: Factors,
    convolve: Product = operator.matmul,
    kernel: Float[type_of_array, "*kernel"] | None = None,
) -> Float[type_of_array, "... _out"]:
    """The output of a changed layer, without its bias and without the changed kernel.

    base: the frozen product, x -> x · W. kernel: W, which a DoRA needs for its norm. Gradients flow through the
    factors, the magnitude and x, not through the norm.
    """
    if "magnitude" not in factors:
        return base(x) + side(x, factors, convolve)
    assert kernel is not None, "a DoRA needs the kernel"
    axis = dora.axis_of(factors["magnitude"].shape)
    scale = dora.scale(factors["magnitude"], _norm(factors, kernel, axis)).reshape(-1).astype(x.dtype)
    if axis is dora.Axis.IN:
        x = x * scale
        return base(x) + side(x, factors, convolve)
    return (base(x) + side(x, factors, convolve)) * scale


def _norm(factors: Factors, kernel: Float[type_of_array, "*kernel"], axis: dora.Axis) -> Float[type_of_array, "..."]:
    """‖W + ΔW‖: of a LoRA without ΔW, of other kinds with it."""
    kernel = kernel.astype(np.float32)
    each = {
        name: jax.lax.stop_gradient(value) if isinstance(value, jax.Array) else value for name, value in factors.items()
    }
    if kind_of(each) is not Kind.LORA:
        return dora.norm(kernel + delta(each), axis)
    down, up, mid = _half(scaled(each))
    return dora.norm_with_lora(kernel, down if mid is None else down @ mid, up, axis)
