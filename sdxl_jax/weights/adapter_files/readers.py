"""Which programs do not read an adapter file, or not all of it: notes for the user who writes one.

A1111 and Forge give each module of a file to the first of their types that accepts its tensors, and fail where none
does: `extensions-builtin/Lora/networks.py`. A bias is read beside the difference of its layer's weight, by the type
"full", and beside the difference of its norm's scale, by "norm"; the types of low-rank changes leave it out.
"""

from collections.abc import Mapping
from typing import Any

from sdxl_jax.adapters import dora, kinds
from sdxl_jax.adapters.kinds import Kind
from sdxl_jax.weights.adapter_files.names import Spelling

Changes = Mapping[str, Mapping[str, Any]]
"""The factors of each parameter, arrays or what declares them, without the axis of stacked layers or with it."""


def notes(changes: Changes, spelling: Spelling) -> list[str]:
    """What other programs do not read of a file with these changes."""
    if spelling is Spelling.PEFT:
        return ["ComfyUI does not read the UNet's attention in PEFT's spelling; kohya's is read by most programs"]
    return [*_of_diffusers(changes), *_of_a1111(changes)]


def _of_diffusers(changes: Changes) -> list[str]:
    found = dict.fromkeys(what for factors in changes.values() for what in _beyond_lora(factors))
    if not found:
        return []
    remedy = "; it reads this DoRA in PEFT's spelling" if set(found) == {"a DoRA along the outputs"} else ""
    return [f"diffusers does not read the file: it has {', '.join(found)}{remedy}"]


def _beyond_lora(factors: Mapping[str, Any]) -> list[str]:
    """What of one parameter's change is not plain LoRA."""
    kind, found = kinds.kind_of(factors), list[str]()
    if kind is not Kind.LORA:
        found.append("differences" if kind is Kind.DIFFERENCE else f"the kind {kind.value}")
    if "mid" in factors:
        found.append("middle factors")
    if "magnitude" in factors:
        axis = dora.axis_of(factors["magnitude"].shape)
        found.append(f"a DoRA along the {axis.value}puts")
    return found


def _of_a1111(changes: Changes) -> list[str]:
    modules: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path, factors in changes.items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = factors
    refused = [module for module, found in modules.items() if found.keys() in ({"bias"}, {"scale"})]
    left_out = [
        module
        for module, found in modules.items()
        if found.keys() == {"kernel", "bias"} and kinds.kind_of(found["kernel"]) is not Kind.DIFFERENCE
    ]
    notes = []
    if refused:
        notes.append(
            f"A1111 and Forge do not load the file: of {len(refused)} modules it changes the bias alone, or a norm's "
            f"scale alone ({refused[0]}). Leave out biases and norms for these programs"
        )
    if left_out:
        notes.append(
            f"A1111 and Forge leave out the biases of {len(left_out)} layers: beside a low-rank change they read none"
        )
    return notes
