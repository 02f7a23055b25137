"""Writing adapter files, in the spelling that most programs read, with the metadata that they look for.

| spelling | kinds | read by |
|---|---|---|
| kohya | LoRA of linear layers and convolutions | ComfyUI, A1111, Forge, sd-scripts, diffusers |
| kohya | LoHa, LoKr, DoRA, middle factors, differences, in LyCORIS' tensors | ComfyUI, A1111, Forge, LyCORIS |
| kohya | OFT, BOFT, GLoRA, IA³, in LyCORIS' tensors: converted files | LyCORIS; most by ComfyUI and A1111 |
| peft | LoRA, and DoRA along the outputs | diffusers, PEFT |

Stacked layers are written one by one. A1111 shows a LoRA with metadata among those of SD 1.x unless
`ss_base_model_version` begins with sdxl_; its name in prompts is `ss_output_name`. Sources: sd-scripts'
`train_network.py` and `library/sai_model_spec.py`, diffusers' `loaders/lora_base.py`.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sdxl_jax.adapters import dora, kinds
from sdxl_jax.adapters.changes import Resolved, float32
from sdxl_jax.adapters.kinds import Factors, Kind
from sdxl_jax.errors import InputError
from sdxl_jax.files import atomic
from sdxl_jax.model import ModelConfig
from sdxl_jax.weights.adapter_files.metadata import Named, family, hash_of, modelspec
from sdxl_jax.weights.adapter_files.names import Spelling, Written, written_modules
from sdxl_jax.weights.adapter_files.reading import SETTINGS
from sdxl_jax.weights.adapter_files.tensors import MAGNITUDE, suffix, theirs
from sdxl_jax.weights.formats import safetensors
from sdxl_jax.weights.names import Place


def write(
    path: Path,
    resolved: Resolved,
    config: ModelConfig,
    spelling: Spelling = Spelling.KOHYA,
    dtype: np.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    bundled: Mapping[str, Shaped[np.ndarray, "..."]] | None = None,
) -> int:
    """Writes a file atomically; returns the number of its tensors.

    resolved: changes with our axes (`reading.resolve`, or `adapters.changes.untree` of what was trained). dtype: of
    the tensors; None: as they are. metadata: what is known besides, e.g. that of a file which is converted; it stays
    where it does not speak of the adapter's own shape. bundled: embeddings to go into the file.

    Raises InputError for changes that the spelling cannot hold, and for numbers beyond float16.
    """
    tensors = named(resolved, config, spelling)
    for name, value in {**tensors, **(bundled or {})}.items():
        tensors[name] = value if dtype is None else _cast(name, value, dtype)
    described = dict(metadata or {})
    described.pop(SETTINGS, None)
    if spelling is Spelling.KOHYA:
        described |= kohya_metadata(resolved, config, path.stem, described)
        described["sshs_model_hash"] = hash_of(tensors)
        described["modelspec.hash_sha256"] = f"0x{described['sshs_model_hash']}"
    else:
        described[SETTINGS] = json.dumps(peft_settings(resolved, config), sort_keys=True)
    described["format"] = "pt"
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial, safetensors.Writer(partial, shapes, described) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    return len(tensors)


def named(resolved: Resolved, config: ModelConfig, spelling: Spelling) -> Named:
    """The tensors of a file by name. Raises InputError for changes that the spelling cannot hold."""
    modules, found = written_modules(config, spelling), Named()
    for path, rows in resolved.items():
        for layer, factors in rows:
            written = modules[Place(path, layer)]
            if path.endswith(("bias", "scale")):
                is_norm = Place(path.rpartition("/")[0] + "/scale", layer) in modules
                found |= _of_vector(written, path, factors, spelling, is_norm)
            elif spelling is Spelling.KOHYA:
                found |= _kohya(written, factors)
            else:
                found |= _peft(written, factors)
    return found


def _of_vector(written: Written, path: str, factors: Factors, spelling: Spelling, is_norm: bool) -> Named:
    """The difference of a bias, or of a norm's scale."""
    if spelling is Spelling.PEFT or "diff" not in factors:
        raise InputError(_NO_PLACE.format(module=written.module, what="a difference of a bias or a norm"))
    name = suffix("bias" if path.endswith("bias") else "diff", is_norm)
    return {f"{written.module}.{name}": np.asarray(factors["diff"])}


_NO_PLACE = (
    "{module} has {what}, for which PEFT's LoRA files have no place. Write kohya's spelling, or resize it to plain "
    "LoRA (sdxl-jax lora resize)"
)


def _kohya(written: Written, factors: Factors) -> Named:
    tensors = theirs(factors, written.entry)
    if kinds.kind_of(factors) is Kind.LOKR and "alpha" not in tensors:  # of two whole matrices: not used, but expected
        tensors["alpha"] = np.array(1, np.float32)
    kind = kinds.kind_of(factors)
    return {f"{written.module}.{suffix(factor, kind=kind)}": value for factor, value in tensors.items()}


def _peft(written: Written, factors: Factors) -> Named:
    if kinds.kind_of(factors) is not Kind.LORA:
        raise InputError(_NO_PLACE.format(module=written.module, what=f"the kind {kinds.kind_of(factors).value}"))
    if "magnitude" in factors and dora.axis_of(factors["magnitude"].shape) is dora.Axis.IN:
        raise InputError(_NO_PLACE.format(module=written.module, what="a DoRA along the inputs"))
    if "mid" in factors:
        folded = np.asarray(float32(factors)["down"] @ float32(factors)["mid"]).astype(factors["down"].dtype)
        factors = {**{name: value for name, value in factors.items() if name != "mid"}, "down": folded}
    tensors = theirs(factors, written.entry)
    found = {f"{written.module}.lora_A.weight": tensors["down"], f"{written.module}.lora_B.weight": tensors["up"]}
    if "magnitude" in tensors:
        shape = (-1,) if len(written.entry.shape) == 2 else (1, -1, 1, 1)
        found[f"{written.module}.{MAGNITUDE}"] = tensors["magnitude"].reshape(shape)
    return found


def _cast(name: str, value: Shaped[np.ndarray, "*shape"], dtype: np.dtype) -> Shaped[np.ndarray, "*shape"]:
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise InputError(
            f"{name} has values up to {np.abs(value.astype(np.float32)).max():.3g}; {dtype} cannot hold them. Use "
            "bfloat16 or float32"
        )
    return cast


# ---- metadata --------------------------------------------------------------------------------------------------------


_ALGORITHMS = (Kind.LOHA, Kind.LOKR, Kind.GLORA, Kind.OFT, Kind.BOFT, Kind.IA3, Kind.LORA)
"""Whose names LyCORIS' metadata has; the first that there is."""


def kohya_metadata(resolved: Resolved, config: ModelConfig, name: str, known: Mapping[str, str]) -> dict[str, str]:
    """The metadata that sd-scripts writes and that other programs read. known: what is known already, which stays where
    it does not speak of the adapter's own shape."""
    rows = [factors for each in resolved.values() for _, factors in each]
    ranks = Counter(str(rank) for factors in rows if (rank := kinds.rank_of(factors)) is not None)
    alphas = Counter(f"{float(factors['alpha']):g}" for factors in rows if "alpha" in factors)
    found = {kinds.kind_of(factors) for factors in rows}
    lycoris = found != {Kind.LORA} or any("mid" in factors or "magnitude" in factors for factors in rows)
    algorithm = next((kind.value for kind in _ALGORITHMS if kind in found), "full")
    defaults = {
        "ss_base_model_version": family(config)[0],
        "ss_network_args": json.dumps({"algo": algorithm} if lycoris else {}),
        **modelspec(config, "lora"),
    }
    return {
        **{key: value for key, value in defaults.items() if key not in known},
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": next(iter(ranks)) if len(ranks) == 1 else "Dynamic" if ranks else "1",
        "ss_network_alpha": next(iter(alphas)) if len(alphas) == 1 else "Dynamic" if alphas else "1",
        "ss_output_name": name,
        "modelspec.title": name,
    }


def peft_settings(resolved: Resolved, config: ModelConfig) -> dict[str, Any]:
    """PEFT's settings of each part, as diffusers has them in a file's header: ranks and alphas that differ are patterns
    of names."""
    modules = written_modules(config, Spelling.PEFT)
    parts: dict[str, dict[str, tuple[int, float]]] = {}
    with_magnitude: set[str] = set()
    for path, rows in resolved.items():
        for layer, factors in rows:
            part, _, name = modules[Place(path, layer)].module.partition(".")
            name = name.removeprefix("text_model.")  # PEFT's names match with and without it, as transformers' do
            parts.setdefault(part, {})[name] = kinds.rank_of(factors) or 1, float(factors["alpha"])
            with_magnitude |= {part} if "magnitude" in factors else set()
    settings: dict[str, Any] = {}
    for part, found in parts.items():
        rank, alpha = (Counter(each[n] for each in found.values()).most_common(1)[0][0] for n in (0, 1))
        values = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: own for name, (own, _) in found.items() if own != rank},
            "alpha_pattern": {name: own for name, (_, own) in found.items() if own != alpha},
            "target_modules": sorted(found),
            "use_dora": part in with_magnitude,
        }
        settings |= {f"{part}.{key}": value for key, value in values.items()}
    return settings
