"""Adapters against LyCORIS: the tensors that are written here, in LyCORIS' own modules.

The reference is what its modules do to an input. (Its merged weights are none: those of LoHa and LoKr are scaled by
alpha / rank twice, in version 4.1.3.) Its own reading has all DoRAs along the outputs, and takes another axis for the
rank of a LoKr with a middle factor: modules of these two are made here, from the settings. LyCORIS is not in the
extras: `pip install lycoris-lora`.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
from agreement import Agree
from test_adapters import KINDS, random

from sdxl_jax.adapters import dora, kinds
from sdxl_jax.adapters.changes import Resolved
from sdxl_jax.adapters.dora import Axis
from sdxl_jax.adapters.kinds import Kind, Settings
from sdxl_jax.weights.adapter_files.export import named
from sdxl_jax.weights.adapter_files.names import Spelling, written_modules
from sdxl_jax.weights.names import Place

torch = pytest.importorskip("torch")
modules = pytest.importorskip("lycoris.modules")

# float32 sums of some hundred products in another order; a DoRA divides by a norm of them, beside epsilon. A scale that
# is missed, or a norm along another axis, is off by some tenths.
TOLERANCE = 2e-6
LAYERS = {
    "linear": (Place("unet/up_blocks_0/attentions_1/transformer_blocks/ff/proj_in/kernel", 0), (16, 128)),
    "convolution": (Place("unet/up_blocks_1/resnets_1/conv1/kernel", None), (3, 3, 16, 8)),
}
CASES = [
    (kind, layer, axis)
    for kind, settings in KINDS.items()
    for layer in LAYERS
    for axis in (None, *Axis)
    if (axis is None or settings.kind is not Kind.DIFFERENCE) and (layer == "convolution" or not settings.middle)
]


def tensors_of(place: Place, factors: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(module, its tensors), as they are written."""
    resolved: Resolved = {place.path: [(place.layer, {name: np.asarray(value) for name, value in factors.items()})]}
    tensors = named(resolved, tiny.MODEL, Spelling.KOHYA)
    return next(iter(tensors)).split(".")[0], {name: torch.from_numpy(each.copy()) for name, each in tensors.items()}


def their_weight(place: Place, kernel: Any) -> Any:
    return torch.from_numpy(
        np.array(written_modules(tiny.MODEL, Spelling.KOHYA)[place].entry.theirs(np.asarray(kernel)))
    )


def layer_of(weight: Any) -> Any:
    """torch's layer without a bias."""
    outputs, inputs, *window = weight.shape
    made = (
        torch.nn.Conv2d(inputs, outputs, window, padding=1, bias=False)
        if window
        else torch.nn.Linear(inputs, outputs, False)
    )
    made.weight.data = weight
    return made


def from_settings(settings: Settings, module: str, tensors: dict[str, Any], layer: Any) -> Any:
    """LyCORIS' module with the tensors."""
    kind = {Kind.LORA: modules.LoConModule, Kind.LOHA: modules.LohaModule, Kind.LOKR: modules.LokrModule}[settings.kind]
    options = {
        "use_tucker": settings.middle,
        "weight_decompose": settings.magnitude is not None,
        "wd_on_out": settings.magnitude is Axis.OUT,
        "bypass_mode": False,
    }
    if settings.kind is Kind.LOKR:
        options |= {
            "factor": settings.factor or -1,
            "full_matrix": settings.full_matrix,
            "decompose_both": settings.decompose_both,
        }
    made = kind(module, layer, 1, settings.rank, settings.alpha, **options)
    made.load_state_dict({name.removeprefix(f"{module}."): each for name, each in tensors.items()})
    return made


def is_read(settings: Settings, layer: str) -> bool:
    """Whether LyCORIS makes the module from the tensors alone."""
    return settings.magnitude is not Axis.IN and not (
        settings.kind is Kind.LOKR and settings.middle and layer == "convolution"
    )


@pytest.mark.parametrize(("kind", "layer", "axis"), CASES)
def test_modules_of_lycoris_with_our_tensors_have_our_output(
    agree: Agree, kind: str, layer: str, axis: Axis | None
) -> None:
    settings, (place, shape) = dataclasses.replace(KINDS[kind], magnitude=axis), LAYERS[layer]
    rng = np.random.default_rng(1)
    factors, kernel = random(settings, shape), rng.standard_normal(shape, np.float32)
    if axis is not None:  # near the kernel's norms, as trained ones are
        factors["magnitude"] = dora.norm(kernel, axis) * rng.uniform(0.5, 1.5, factors["magnitude"].shape).astype("f")
    module, tensors = tensors_of(place, factors)
    theirs = layer_of(their_weight(place, kernel))
    x = torch.from_numpy(rng.standard_normal((2, 16, 5, 5) if layer == "convolution" else (3, 16), np.float32))
    with torch.no_grad():
        if is_read(settings, layer):
            made = modules.make_module(*modules.get_module(tensors, module), module, theirs)
        else:
            with pytest.raises((RuntimeError, AttributeError)):
                modules.make_module(*modules.get_module(tensors, module), module, theirs)
            made = from_settings(settings, module, tensors, theirs)
        if settings.kind is Kind.DIFFERENCE:
            made.apply_to()
        expected = made(x)
        ours = layer_of(their_weight(place, kinds.changed(kernel, factors)))(x)
    agree(f"{kind} {axis} of a {layer} in LyCORIS", ours, expected, TOLERANCE)
