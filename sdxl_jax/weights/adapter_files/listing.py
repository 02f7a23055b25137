"""What an adapter file holds, for people and programs: `sdxl-jax lora list`."""

from collections import Counter
from typing import Any

from sdxl_jax.adapters.changes import Lora
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.weights.adapter_files.names import known_modules
from sdxl_jax.weights.adapter_files.reading import config_of, describe, kinds_in, notes
from sdxl_jax.weights.card import family
from sdxl_jax.weights.lazy import part_configs

_NUMBERS = ("alpha", "on_input")
"""Factors that are a single number."""
_LONGEST = 100
"""Characters of a value of metadata that are shown."""


def listing(lora: Lora, config: ModelConfig | None) -> dict[str, Any]:
    """The contents of a file, as JSON. config: of the model that it is for; None: the published one that it fits.

    A file that fits no published model is listed too, with the reason.
    """
    problem = None
    if config is None:
        try:
            config = config_of(lora)
        except InputError as error:
            problem = str(error)
    modules = lora.modules.values()
    found: dict[str, Any] = {
        "file": str(lora.source or lora.name),
        "summary": describe(lora),
        "kinds": kinds_in(lora),
        "ranks": _counted(module.rank for module in modules if module.rank is not None),
        "alphas": _counted(_alpha(module) for module in modules if module.rank is not None),
        "dtypes": _counted(
            str(v.dtype) for module in modules for name, v in module.factors.items() if name not in _NUMBERS
        ),
        "model": None if config is None else family(config),
        "matched": {} if config is None else _matched(lora, config),
        "problem": problem,
        "embeddings": list(lora.embeddings),
        "notes": notes(lora),
        "metadata": dict(sorted(lora.metadata.items())),
    }
    if config is not None:
        known = known_modules(config)
        found["unmatched"] = [name for name in lora.modules if name.replace(".processor.", ".") not in known]
    return found


def _alpha(module: Any) -> str:
    alpha = module.factors["alpha"].item() if "alpha" in module.factors else module.alpha
    return "none: the rank" if alpha is None else f"{alpha:g}"


def _counted(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _matched(lora: Lora, config: ModelConfig) -> dict[str, list[int]]:
    """For each part, how many of its linear layers and convolutions the file changes, and how many it has."""
    known = known_modules(config)
    kernels = {(t.part, t.weight.places[0]) for t in known.values() if t.weight.places[0].path.endswith("kernel")}
    changed = {
        (target.part, target.weight.places[0])
        for module in lora.modules
        if (target := known.get(module.replace(".processor.", "."))) is not None
    }
    return {
        part: [sum(each[0] == part for each in found) for found in (changed & kernels, kernels)]
        for part in part_configs(config)
        if part != "vae"
    }


def text(found: dict[str, Any]) -> str:
    """A listing as lines."""
    lines = [f"{found['file']}: {found['summary']}"]

    def row(name: str, value: str) -> None:
        lines.extend([f"  {name:<10}  {value}"] if value else [])

    row("model", found["model"] or f"none that is known: {found['problem']}")
    row("changed", ", ".join(f"{n} of {total} layers of {part}" for part, (n, total) in found["matched"].items()))
    for name in ("kinds", "ranks", "alphas", "dtypes"):
        row(name, ", ".join(f"{value} × {count}" for value, count in found[name].items()))
    if unmatched := found.get("unmatched"):
        row("unmatched", f"{len(unmatched)} modules: {', '.join(unmatched[:4])}{' …' if unmatched[4:] else ''}")
    row("embeddings", ", ".join(found["embeddings"]))
    for each in found["notes"]:
        row("note", each)
    for key, value in found["metadata"].items():
        row("metadata", f"{key}: {value[:_LONGEST]}{' …' if len(value) > _LONGEST else ''}")
    return "\n".join(lines)
