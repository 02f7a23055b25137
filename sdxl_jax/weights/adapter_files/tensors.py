"""Tensors of adapter files: which factor of `adapters.kinds` each is, and its axes, in both directions.

| factor | tensor | axes there |
|---|---|---|
| down, up, mid | lora_down.weight, lora_up.weight, lora_mid.weight | [rank, in, …], [out, rank, …], [rank, rank, …] |
| down_n, up_n, mid_n | hada_wn_b, hada_wn_a, hada_tn | [rank, in · window], [out, rank], [rank, rank, …] |
| w1, w1_down, w1_up | lokr_w1, lokr_w1_b, lokr_w1_a | [out_1, in_1], [rank, in_1], [out_1, rank] |
| w2, w2_down, w2_up, w2_mid | lokr_w2, lokr_w2_b, lokr_w2_a, lokr_t2 | as those of w1, with the window; |
| magnitude | dora_scale | [1, in, …], [out, 1, …] or [out] |
| diff, bias | diff, diff_b; of norms w_norm, b_norm | the parameter's |
| replacement | set_weight | the parameter's |
| blocks, stages, rescale | oft_blocks with three axes, with four; rescale | as they are; [out, 1, …] |
| input_down, input_up; down, up, mid | GLoRA's a2.weight, a1.weight; b2.weight, b1.weight, bm.weight | as LoRA's |
| relative | IA³'s weight, beside on_input: 1 or 0 | [in] or [out], of a convolution [1, in or out, 1, 1] |

… is the window of a convolution. Old files of GLoRA have a1 and a2, b1 and b2 the other way round. Beside a middle
factor, LoHa's and LoKr's up is [rank, out]. Sides of a LoRA have many more spellings, which `parse` knows. Sources:
LyCORIS' `modules/` and ComfyUI's `comfy/weight_adapter/`.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Shaped

from sdxl_jax.adapters import dora
from sdxl_jax.adapters.kinds import Factors, Kind
from sdxl_jax.weights.names import Entry

SUFFIXES = {
    **{"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha"},
    **{f"down_{half}": f"hada_w{half}_b" for half in (1, 2)},
    **{f"up_{half}": f"hada_w{half}_a" for half in (1, 2)},
    **{f"mid_{half}": f"hada_t{half}" for half in (1, 2)},
    **{part: f"lokr_{part}" for part in ("w1", "w2")},
    **{f"{part}_down": f"lokr_{part}_b" for part in ("w1", "w2")},
    **{f"{part}_up": f"lokr_{part}_a" for part in ("w1", "w2")},
    **{"w2_mid": "lokr_t2", "magnitude": "dora_scale"},
    **{"diff": "diff", "bias": "diff_b", "replacement": "set_weight"},
    **{"blocks": "oft_blocks", "stages": "oft_blocks", "rescale": "rescale"},
    **{"input_down": "a2.weight", "input_up": "a1.weight", "relative": "weight", "on_input": "on_input"},
}
"""How kohya's and LyCORIS' files spell each factor: what is written."""
_OF_NORMS = {"diff": "w_norm", "bias": "b_norm"}
_OF_GLORA = {"down": "b2.weight", "up": "b1.weight", "mid": "bm.weight"}
_SUFFIX = {
    suffix: factor
    for names in (SUFFIXES, _OF_NORMS, _OF_GLORA)
    for factor, suffix in names.items()
    if factor not in ("stages", "relative")  # by axes: `with_our_names`; beside on_input: `parse`
}
_SIDE = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"  # with or without the adapter's name
    r"|(?:[._]lora|\.lora_linear_layer)\.(?P<diffusers>down|up)\.weight)"
)
MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of magnitudes, which are [out], of a convolution [1, out, 1, 1]."""
RESHAPED = "reshape_weight"
"""ComfyUI's name of the shape that a weight is enlarged to before it is changed. It is no factor."""
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
_WINDOWED = ("down", "mid", "down_1", "mid_1", "down_2", "mid_2", "w2", "w2_down", "w2_mid")
"""Factors that have the window of a convolution, unless a middle factor has it."""
_SINGLE = {"diff": "weight", "bias": "bias", "replacement": "weight"}


def parse(name: str, beside: Collection[str] = ()) -> tuple[str, str] | None:
    """(module, factor) of a tensor's name; None for one that is not of an adapter. beside: all names of the file."""
    for suffix, factor in _SUFFIX.items():
        if name.endswith(f".{suffix}"):
            module = name.removesuffix(f".{suffix}")
            if factor == "diff" and module.endswith(".bias"):  # ComfyUI: diffusion_model.out.2.bias.diff
                return module.removesuffix(".bias"), "bias"
            return module, factor
    if match := _SIDE.fullmatch(name):
        return match["module"], match["diffusers"] or {"A": "down", "B": "up"}[match["peft"]]
    if match := _MAGNITUDE.fullmatch(name):
        return match["module"], "magnitude"
    if name.endswith(f".{RESHAPED}"):
        return name.removesuffix(f".{RESHAPED}"), RESHAPED
    if (module := name.removesuffix(".weight")) != name and f"{module}.on_input" in beside:
        return module, "relative"
    return None


def with_our_names(factors: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """A file's factors of one module. Their axes say whether it is an OFT or a BOFT, an old GLoRA or a new one."""
    found = dict(factors)
    if "blocks" in found and found["blocks"].ndim == 4:
        found["stages"] = found.pop("blocks")
    if {"input_down", "input_up", "down", "up"} <= found.keys():
        down, up, input_down, input_up = (found[name].shape for name in ("down", "up", "input_down", "input_up"))
        is_new = down[0] == up[1] == input_down[0] == input_up[1]
        is_old = down[1] == up[0] == input_down[1] == input_up[0]
        if is_old and not (is_new and down[0] <= down[1]):  # of a square weight both hold: the rank is less
            for one, other in (("down", "up"), ("input_down", "input_up")):
                found[one], found[other] = found[other], found[one]
    return found


def suffix(factor: str, is_norm: bool = False, kind: Kind = Kind.LORA) -> str:
    """How a factor is spelt in a file that we write. kind: of its change."""
    own = _OF_NORMS if is_norm else _OF_GLORA if kind is Kind.GLORA else {}
    return own.get(factor, SUFFIXES[factor])


def ours(factors: Mapping[str, Shaped[np.ndarray, "..."]], entry: Entry) -> dict[str, Shaped[np.ndarray, "..."]]:
    """A file's factors of one weight with our axes; dtypes are kept. A 1×1 convolution and a linear layer stand for
    each other. Raises ValueError for shapes that cannot be of this weight."""
    window, ones = entry.shape[2 : len(entry.axes)], (1,) * (len(entry.axes) - 2)
    found = {}
    for name, value in factors.items():
        if name == "alpha":
            found[name] = value.reshape(())
        elif name in _SINGLE:
            found[name] = entry.ours(value.reshape(entry.shape))
        elif name == "magnitude":
            found[name] = _our_magnitude(value, entry)
        elif name == "rescale":
            found[name] = value.reshape(*ones, 1, -1)
        elif name == "relative":
            found[name] = value.reshape(*ones, *((-1, 1) if factors["on_input"].item() else (1, -1)))
        elif name == "on_input":
            continue
        elif name in ("blocks", "stages") or _is_turned(name, factors):
            found[name] = value
        else:
            sizes = window if _has_window(name, factors) else ()
            found[name] = np.moveaxis(value.reshape(value.shape[0], -1, *sizes), (0, 1), (-1, -2))
    return found


def _our_magnitude(value: Shaped[np.ndarray, "..."], entry: Entry) -> Shaped[np.ndarray, "..."]:
    outputs, inputs = entry.shape[:2]
    ones = (1,) * (len(entry.axes) - 2)
    if value.ndim > 1 and value.shape[0] == 1 and value.size == inputs:
        return value.reshape(*ones, inputs, 1)
    return value.reshape(*ones, 1, outputs)


def theirs(factors: Factors, entry: Entry) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The reverse of `ours`, with the axes of kohya's and LyCORIS' files; dtypes are kept."""
    ones = (1,) * (len(entry.shape) - 2)
    found = {}
    for name, each in factors.items():
        value = np.asarray(each)
        if name == "alpha":
            found[name] = value
        elif name in _SINGLE:
            found[name] = entry.theirs(value)
        elif name == "rescale":
            found[name] = value.reshape(-1, 1, *ones)
        elif name == "relative":
            found[name] = value.reshape((1, -1, *ones) if ones else -1)
            found["on_input"] = np.array(int(dora.axis_of(value.shape) is dora.Axis.IN))
        elif name == "magnitude":
            size = value.size
            found[name] = value.reshape(*((1, size) if dora.axis_of(value.shape) is dora.Axis.IN else (size, 1)), *ones)
        elif name in ("blocks", "stages") or _is_turned(name, factors):
            found[name] = value
        else:
            turned = np.moveaxis(value, (-1, -2), (0, 1))
            if name in ("down_1", "down_2", "w2_down"):  # LyCORIS has these as matrices
                turned = turned.reshape(len(turned), -1)
            elif name in ("down", "up", "input_down", "input_up") and turned.ndim == 2:
                turned = turned.reshape(*turned.shape, *ones)
            found[name] = turned
    return {name: np.ascontiguousarray(value) if value.ndim else value for name, value in found.items()}


def _mid_beside(name: str, factors: Mapping[str, object]) -> bool:
    """Whether a factor has a middle factor beside it."""
    mid = {"down": "mid", "down_1": "mid_1", "up_1": "mid_1", "down_2": "mid_2", "up_2": "mid_2"}
    return (mid | {"w2_down": "w2_mid", "w2_up": "w2_mid"}).get(name, "") in factors


def _has_window(name: str, factors: Mapping[str, object]) -> bool:
    return name in _WINDOWED and not _mid_beside(name, factors)


def _is_turned(name: str, factors: Mapping[str, object]) -> bool:
    """Whether a file has [rank, out] where others have [out, rank]."""
    return name in ("up_1", "up_2", "w2_up") and _mid_beside(name, factors)
