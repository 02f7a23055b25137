"""Adapters merged into a model's parameters: LoRA, LoHa, LoKr, DoRA, differences, from files.

Reading is in `adapter_files`, the formulas are in `adapters`. A merged adapter may be removed again, where its change
is a sum.
"""

import math
from dataclasses import replace
from pathlib import Path, PurePath

from sdxl_jax.adapters import changes
from sdxl_jax.adapters.changes import Lora
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files.paths import AnyPath, located
from sdxl_jax.model import Adapter, Model, ModelConfig
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.weights import descriptions
from sdxl_jax.weights.adapter_files.reading import describe, notes, read, resolve
from sdxl_jax.weights.lazy import Changed, Leaf, Weights

__all__ = ["Lora", "add", "describe", "listing", "merge", "notes", "parse_option", "read", "remove", "resolve"]


def add(model: Model, lora: Lora | str | PurePath, scale: float = 1.0, name: str | None = None) -> Model:
    """The model with a LoRA merged into it; the given model is not changed, and shares the unchanged parameters.

    scale: strength, 1 as trained; several LoRAs add up. name: for `remove`, default the file's. Sums are float32;
    parameters keep their dtype and sharding.

    Raises InputError for what `read` and `resolve` refuse, for a name that the model has already, and for a few-step
    LoRA of another preset than the model's.
    """
    lora = lora if isinstance(lora, Lora) else read(lora)
    name = lora.name if name is None else name
    if any(adapter.name == name for adapter in model.adapters):
        raise InputError(f"The model has a LoRA named {name} already. Remove it first, or give this one another name")
    if not math.isfinite(scale):
        raise InputError(
            f"The scale of {name} is not finite. Give a number, 1 for the strength that it was trained with"
        )
    params = changes.merged(model.params, resolve(lora, model.config), scale)
    return Model(_with_preset(model.config, lora), params, (*model.adapters, Adapter(name, scale, lora)))


def remove(model: Model, name: str) -> Model:
    """The model without one of its LoRAs, which is subtracted.

    Exact to rounding: adding and subtracting each round by half a unit in the last place, together 1.2e-7 of the larger
    of a weight and its sum in float32, 8e-3 in bfloat16. To restore the exact weights, keep the original model: `add`
    does not change it.

    Raises InputError if the model has no LoRA of that name, and for one whose change is not a sum (a DoRA).
    """
    adapter = next((adapter for adapter in model.adapters if adapter.name == name), None)
    if adapter is None:
        names_of_all = nearest_first(name, [adapter.name for adapter in model.adapters])
        known = f"Give one of: {', '.join(names_of_all)}" if names_of_all else "It has none"
        raise InputError(f"The model has no LoRA named {name}. {known}")
    rest = tuple(other for other in model.adapters if other is not adapter)
    resolved = resolve(adapter.lora, model.config)
    if not all(changes.are_sums(rows) for rows in resolved.values()):
        raise InputError(
            f"{name} rescales or replaces weights, which cannot be undone. Keep the model from before: `add` does not "
            "change it"
        )
    config, said = model.config, descriptions.distilled_for(adapter.lora.metadata)
    if said and config.sampling is not None and config.sampling.preset == said.get("preset"):
        config = replace(config, sampling=presets.with_preset(config.sampling, None))
    return Model(config, changes.merged(model.params, resolved, -adapter.scale), rest)


def merge(weights: Weights, lora: Lora, scale: float) -> Weights:
    """Merges a LoRA into lazy weights: each parameter is changed when it is read. Raises InputError as `resolve`, for
    a part that is missing, and for a few-step LoRA of another preset than the model's."""
    resolved = resolve(lora, weights.config)
    if absent := [path for path in resolved if path not in weights.leaves]:
        raise InputError(
            f"{lora.name} changes {absent[0].split('/')[0]}, a part that the weights do not have. Give a whole model"
        )

    def changed(path: str, leaf: Leaf) -> Changed:
        return Changed(leaf, lambda value: changes.changed(value, resolved[path], scale), leaf.dtype)

    leaves = {path: changed(path, leaf) if path in resolved else leaf for path, leaf in weights.leaves.items()}
    merged = (*weights.provenance.merged, f"{lora.name} × {scale:g}")
    # The licence of the result depends on the LoRA's, which its file does not say.
    return replace(
        weights,
        config=_with_preset(weights.config, lora),
        leaves=leaves,
        licence=None,
        provenance=replace(weights.provenance, merged=merged),
    )


def _with_preset(config: ModelConfig, lora: Lora) -> ModelConfig:
    """With the preset of a few-step LoRA, if its metadata says it; otherwise as it was. Raises InputError for a model
    that has another one already, or the same for another number of steps."""
    said = descriptions.distilled_for(lora.metadata)
    before, given = config.sampling or SamplingDefaults(), said.get("preset")
    if before.preset is not None and given is not None:
        own, its = _distilled_for(before.preset, before.steps), _distilled_for(given, said.get("steps"))
        numbers = {before.steps, said.get("steps")} - {None}
        if not presets.same_kind(before.preset, given) or (presets.find(given).of_one_number and len(numbers) > 1):
            raise InputError(
                f"{lora.name} is of {its} by its metadata, but the model is of {own} already, by its files or another "
                "LoRA: weights distilled in two ways do not add up. Leave the LoRA out, or give a base without "
                f"preset {before.preset}"
            )
    return replace(config, sampling=presets.with_stated(config.sampling, said)) if said else config


def _distilled_for(preset: str, steps: int | None) -> str:
    return f"preset {preset}" + ("" if steps is None else f" with {steps} steps")


def listing(model: Model) -> list[str]:
    """One line per LoRA: "style.safetensors × 0.8: 264 modules of unet, 72 of text_encoder, ranks 4 to 32"."""
    return [f"{adapter.name} × {adapter.scale:g}: {describe(adapter.lora)}" for adapter in model.adapters]


def parse_option(text: str) -> tuple[AnyPath, float]:
    """(file, scale) of FILE or FILE:SCALE, as on the command line. A local file whose name has a colon is found if it
    exists. Raises InputError for a scale that is not a number."""
    path, colon, scale = text.rpartition(":")
    if not colon or scale.startswith("//") or Path(text).exists():
        return located(text, "the LoRA"), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise InputError(
            f"--lora {text}: there is no such file, and it is not FILE:SCALE with a number for the scale. Give e.g. "
            "style.safetensors:0.8"
        )
    return located(path, "the LoRA"), number
