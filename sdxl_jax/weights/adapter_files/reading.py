"""Reading adapter files: LoRA, LoHa, LoKr, DoRA, OFT, BOFT, GLoRA, IA³, differences; and which of a model's parameters
they change.

Names of modules are in `names`, tensors in `tensors`, formulas in `adapters`. Embeddings bundled in the file
(bundle_emb.NAME.clip_l) are for `textual_inversion`. Other contents are refused: a file is read completely or not at
all.
"""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sdxl_jax.adapters import kinds
from sdxl_jax.adapters.changes import Lora, Module, Resolved
from sdxl_jax.adapters.kinds import Kind
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, absolute, in_bucket, located
from sdxl_jax.files.text import read_text
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.weights.adapter_files.names import PEFT, Target, known_modules, part_of, prefix_of
from sdxl_jax.weights.adapter_files.tensors import MAGNITUDE, RESHAPED, ours, parse, with_our_names
from sdxl_jax.weights.formats.safetensors import Tensor, open_file
from sdxl_jax.weights.textual_inversion import BUNDLED

SETTINGS = "lora_adapter_metadata"
"""Key of the header's metadata with PEFT's settings, as diffusers writes them."""
_OTHERS = {  # regular expressions, searched in a tensor's name
    "oft_": "an OFT's, in PEFT's spelling",
    "ia3_": "an IA³'s, in PEFT's spelling",
    "lora_embedding_": "a change of an embedding",
    r"\.lora_.*bias$": "the bias of a LoRA's factor",
    r"\.weight$": "of a model",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that change the base model's weights, which are then not the published ones."""
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_FAMILIES = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|lora_te3_": "SD 3",
    r"^lora_prior_": "Stable Cascade",
    r"^transformer\.|^lora_transformer_": "a diffusion transformer such as SD 3 or Flux",
}
_CONTEXTS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL base", 1280: "the SDXL refiner"}
_AGAIN = "Download it again, or give another file"


def read(given: str | PurePath) -> Lora:
    """An adapter file; or a folder with one of PEFT's or diffusers' names in it. Local, or in a bucket.

    Raises InputError for a file that is missing, damaged or a pickle, that holds anything but adapters, incomplete
    ones, non-finite numbers, or an alpha that is not above 0; MachineError for a bucket that does not answer.
    """
    path = located(given, "the LoRA")
    with buckets.answering(path, "the LoRA") if in_bucket(path) else contextlib.nullcontext():
        return _read(path)


def _read(path: AnyPath) -> Lora:
    file = path
    if path.is_dir():
        named = (
            *_FOLDER_FILES,
            f"{absolute(path).name}.safetensors",
        )  # the last of a training run: RUN/RUN.safetensors
        file = next((path / name for name in named if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} has no {' and no '.join(named)}. Give a LoRA's .safetensors file")
    tensors, metadata = open_file(file)
    settings = _settings(path, file, metadata)
    bundled = {name: tensor for name, tensor in tensors.items() if BUNDLED.fullmatch(name)}
    embeddings = dict.fromkeys(match["name"] for name in bundled if (match := BUNDLED.fullmatch(name)))
    grouped = _grouped(file, {name: tensor for name, tensor in tensors.items() if name not in bundled})
    modules = {}
    for module, found in grouped.items():
        factors = with_our_names({factor: _finite(file, tensor) for factor, tensor in found.items()})
        modules[module] = Module(factors, _alpha(module, factors, settings))
        _check_alpha(file, found, modules[module])
    kept = {name: tensor.read() for name, tensor in bundled.items()}
    return Lora(path.name, modules, file, tuple(embeddings), kept, metadata)


def _settings(path: AnyPath, file: AnyPath, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings, from the header or beside the file, keys with the prefix of their modules."""
    settings = _parsed(metadata.get(SETTINGS, "{}"), file)
    config = path / "adapter_config.json"
    if config.is_file():
        settings |= {PEFT + key: value for key, value in _parsed(read_text(config), config).items()}
    for key, value in settings.items():
        if key.endswith("init_lora_weights") and str(value).startswith(_BASE_CHANGING):
            raise InputError(
                f"{path} was initialised by {value}, which changes the base model's weights. Save it as plain LoRA "
                "(PEFT: path_initial_model_for_weight_conversion)"
            )
    return settings


def _parsed(text: str, path: AnyPath) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} has settings of its LoRA that are not valid JSON ({error}). Download it again"
        ) from error
    return parsed if isinstance(parsed, dict) else {}


def _grouped(file: AnyPath, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and factor. Raises InputError for other tensors and for incomplete modules."""
    grouped: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        parsed = parse(name, tensors)
        if parsed is None or (parsed[1] == "alpha" and math.prod(tensor.shape) != 1):
            unknown.append(tensor)
            continue
        module, factor = parsed
        found = grouped.setdefault(module, {})
        if factor in found:
            raise InputError(
                f"{file} has {found[factor].name} and {name}, of two LoRAs. Give each LoRA as a file of its own"
            )
        found[factor] = tensor
    if unknown and grouped:
        raise InputError(_unknown_tensors(file, unknown))
    if not grouped:
        raise InputError(
            f"{file} is not a LoRA: of its {len(tensors)} tensors none are those of an adapter. Give a LoRA's "
            ".safetensors file"
        )
    for module, found in grouped.items():
        _check_whole(file, module, found)
    return grouped


def _unknown_tensors(file: AnyPath, unknown: Sequence[Tensor]) -> str:
    kind = next((kind for mark, kind in _OTHERS.items() if re.search(mark, unknown[0].name)), "not one of an adapter")
    more = f" (and {len(unknown) - 1} others: {', '.join(each.name for each in unknown[1:4])} …)" if unknown[1:] else ""
    return (
        f"{file} has the tensor {unknown[0].name} {unknown[0].shape}{more}, which is {kind}. LoRA, LoHa, LoKr, DoRA, "
        "OFT, BOFT, GLoRA, IA³ and differences can be merged, and nothing was. Merge this file into a checkpoint with "
        "the tool that it was made for, and load that"
    )


def _check_whole(file: AnyPath, module: str, found: Mapping[str, Tensor]) -> None:
    """Raises InputError for a module with half of a change, or with two of one weight."""
    first = next(iter(found.values()))
    weight = found.keys() - {"alpha", "bias", RESHAPED}
    axes = {"blocks": (3, 4)}
    if empty := [
        tensor
        for factor, tensor in found.items()
        if 0 in tensor.shape or len(tensor.shape) not in axes.get(factor, (0, 1, 2, 4))
    ]:
        raise InputError(f"{file} has {empty[0].name} {empty[0].shape}, which has no place in a layer. {_AGAIN}")
    if not weight and "bias" in found:
        return
    kind = kinds.kind_of(found)
    needed = _needed(kind, found.keys())
    if missing := sorted(needed - found.keys()):
        raise InputError(f"{file} has {first.name}, but no {' and no '.join(missing)} with it. {_AGAIN}")
    if surplus := weight - needed - _OPTIONAL.get(kind, set()):
        one, other = found[min(surplus)].name, found[min(needed)].name
        raise InputError(f"{file} has {one} and {other}, two changes of one weight of {module}. {_AGAIN}")


_OPTIONAL = {
    **{Kind.LORA: {"mid", "magnitude"}, Kind.LOHA: {"magnitude"}, Kind.LOKR: {"w2_mid", "magnitude"}},
    **{Kind.OFT: {"rescale"}, Kind.GLORA: {"mid"}},
}
"""Factors that a kind may have."""


def _needed(kind: Kind, found: Collection[str]) -> set[str]:
    """Factors that a kind must have, where a module has the factors `found`."""
    match kind:
        case Kind.LORA:
            return {"down", "up"}
        case Kind.LOHA:
            middle = {"mid_1", "mid_2"}
            return {"down_1", "up_1", "down_2", "up_2"} | (middle if middle & set(found) else set())
        case Kind.LOKR:
            parts = [(part,) if part in found else (f"{part}_down", f"{part}_up") for part in ("w1", "w2")]
            return {factor for part in parts for factor in part}
        case Kind.DIFFERENCE:
            return {"diff"}
        case Kind.REPLACEMENT:
            return {"replacement"}
        case Kind.OFT | Kind.BOFT:
            return {"blocks"}
        case Kind.GLORA:
            return {"input_down", "input_up", "down", "up"}
        case Kind.IA3:
            return {"relative", "on_input"}


def _finite(file: AnyPath, tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    """A tensor's values. Raises InputError if they are not finite."""
    value = tensor.read()
    if MAGNITUDE in tensor.name:  # along the outputs, also where a convolution's have the shape of inputs
        value = value.reshape(-1)
    if not np.isfinite(value.astype(np.float32)).all():
        raise InputError(f"{file} has {tensor.name} with non-finite numbers (NaN or inf). {_AGAIN}")
    return value


def _check_alpha(file: AnyPath, found: Mapping[str, Tensor], module: Module) -> None:
    """Raises InputError for an alpha that is not above 0, where there is a rank that it is divided by."""
    if "alpha" in found and module.rank is not None:
        kinds.check_alpha(module.factors["alpha"].item(), f"{file}: {found['alpha'].name}")
    elif module.alpha is not None:
        kinds.check_alpha(module.alpha, f"{file}: the settings of {next(iter(found.values())).name}")


def _alpha(module: str, factors: Mapping[str, Shaped[np.ndarray, "..."]], settings: Mapping[str, Any]) -> float | None:
    """Alpha from PEFT's settings, "unet.lora_alpha" and so on; None where a tensor says it, or nothing does."""
    if "alpha" in factors or "down" not in factors:
        return None
    prefix, rank = prefix_of(module), factors["down"].shape[0]
    patterns = settings.get(prefix + "alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if _matches(pattern, module.removeprefix(prefix)))
    alpha = next(matching, settings.get(prefix + "lora_alpha"))
    if alpha is None:
        return None
    # rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by √rank.
    return float(alpha) * (math.sqrt(rank) if settings.get(prefix + "use_rslora") else 1)


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT applies a key of alpha_pattern, a regular expression, to this module: peft `get_pattern_key`."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return module == pattern


# ---- which parameters ------------------------------------------------------------------------------------------------


def resolve(lora: Lora, config: ModelConfig) -> Resolved:
    """The parameters of a model that an adapter changes, with its factors.

    Raises InputError for modules that the model does not have, and for factors that do not fit.
    """
    known, first_names = known_modules(config), {}
    resolved: Resolved = {}
    found = {module: known.get(module.replace(".processor.", ".")) for module in lora.modules}
    if unknown := [module for module, target in found.items() if target is None]:
        raise InputError(_unknown_modules(lora, unknown, known, config))
    for module, target in found.items():
        assert target is not None
        (place,) = target.weight.places
        # The same module in two spellings: files that have both hold the same factors twice.
        if (first := first_names.setdefault((target.part, place), module)) != module:
            if not _are_equal(lora.modules[module], lora.modules[first]):
                raise InputError(
                    f"{lora.name}: {module} and {first} are names of one module, and their factors differ. Remove one "
                    "of them from the file"
                )
            continue
        _resolve_one(resolved, lora, module, target, config)
    return resolved


def _are_equal(one: Module, other: Module) -> bool:
    return (
        one.alpha == other.alpha
        and one.factors.keys() == other.factors.keys()
        and all(np.array_equal(value, other.factors[name]) for name, value in one.factors.items())
    )


def _resolve_one(resolved: Resolved, lora: Lora, module: str, target: Target, config: ModelConfig) -> None:
    """Adds the changes of one module."""
    found = lora.modules[module]
    weight = {name: value for name, value in found.factors.items() if name not in ("bias", RESHAPED)}
    if RESHAPED in found.factors:
        _check_size(lora, module, target, found.factors[RESHAPED])
    if weight.keys() - {"alpha"}:
        entry = target.weight
        (place,) = entry.places
        try:
            factors = ours(weight, entry)
            kinds.check_fits(factors, entry.ours(np.broadcast_to(np.float32(0), entry.shape)).shape)
        except ValueError as error:
            raise InputError(_misfit(lora, module, target, config, "")) from error
        if (rank := kinds.rank_of(factors)) is not None and "alpha" not in factors:
            factors["alpha"] = np.array(rank if found.alpha is None else found.alpha, np.float32)
        resolved.setdefault(f"{target.part}/{place.path}", []).append((place.layer, factors))
    if "bias" in found.factors:
        value, entry = found.factors["bias"], target.bias
        if entry is None or value.size != math.prod(entry.shape):
            raise InputError(_misfit(lora, module, target, config, "bias"))
        (place,) = entry.places
        row = (place.layer, {"diff": value.reshape(entry.shape)})
        resolved.setdefault(f"{target.part}/{place.path}", []).append(row)


def _check_size(lora: Lora, module: str, target: Target, given: Shaped[np.ndarray, "..."]) -> None:
    """Raises InputError for a change of an enlarged weight. given: the shape that it has."""
    given_shape, shape = (np.trim_zeros(np.ravel(sizes) - 1, "b") + 1 for sizes in (given, target.weight.shape))
    if not np.array_equal(given_shape, shape):  # but for the ones of a 1×1 convolution
        raise InputError(
            f"{lora.name}: {module} changes a weight that is enlarged to {tuple(np.ravel(given).tolist())} "
            f"({RESHAPED}), and the model's is {target.weight.shape}. Give the adapter to a model of that shape. "
            "Nothing was merged"
        )


def _misfit(lora: Lora, module: str, target: Target, config: ModelConfig, what: str) -> str:
    """The message about factors of another shape. what: "bias", or "" for the weight."""
    entry = target.bias if what else target.weight
    factors = lora.modules[module].factors
    shown = " and ".join(
        f"{name} {value.shape}" for name, value in factors.items() if name != "alpha" and (name == "bias") == bool(what)
    )
    path = f"{target.part}/{target.weight.places[0].path}"
    expected = f"the model's weight there is {entry.shape} ({path})" if entry else f"{path} has no bias in the model"
    remedy = _family(lora, config) or " Give a LoRA for this model."
    return f"{lora.name}: {module} has {shown}, but {expected}.{remedy} Nothing was merged"


def _unknown_modules(lora: Lora, unknown: list[str], known: Mapping[str, Any], config: ModelConfig) -> str:
    """The message about modules that the model does not have."""
    family = _family(lora, config)
    factors = lora.modules[unknown[0]].factors
    factor = next((factor for factor in factors if factor != "alpha"), "alpha")
    message = (
        f"{lora.name} changes {len(unknown)} modules, of {len(lora.modules)}, that this model does not have. The first "
        f"is {unknown[0]} ({factor} {factors[factor].shape})."
    )
    if not family:
        prefix = prefix_of(unknown[0])
        with_prefix = [name for name in known if prefix and name.startswith(prefix)] or list(known)
        nearest = ", ".join(nearest_first(unknown[0], with_prefix)[:3])
        family = f" Nearest known names: {nearest}. Give a LoRA for this model."
    return f"{message}{family} Nothing was merged"


def _family(lora: Lora, config: ModelConfig) -> str:
    """A sentence on which model the LoRA is for, if that is evident and it is another one."""
    for pattern, family in _FAMILIES.items():
        if any(re.search(pattern, module) for module in lora.modules):
            return f" It looks like a LoRA for {family}: load it with a model of that kind."
    width = _context_width(lora)
    if width is None or width == config.unet.context_dim:
        return ""
    kind = f", as in {_CONTEXTS[width]}" if width in _CONTEXTS else ""
    return (
        f" It reads text states {width} wide{kind}; this model's are {config.unet.context_dim} wide. Load it with "
        "a model of the family that it was trained on."
    )


def _context_width(lora: Lora) -> int | None:
    """The width of the text states that its keys and values read; None where it has none as plain LoRA."""
    widths = (
        found.factors["down"].shape[1]
        for module, found in lora.modules.items()
        if re.search(r"attn2[._](processor\.)?to_[kv]", module) and "down" in found.factors
    )
    return next(widths, None)


def config_of(lora: Lora) -> ModelConfig:
    """The published model that an adapter fits. Raises InputError, as of SDXL base, if it fits none."""
    for config in (SDXL_BASE, SD1, SD2, SDXL_REFINER):
        if _context_width(lora) in (None, config.unet.context_dim):
            with contextlib.suppress(InputError):
                resolve(lora, config)
                return config
    try:
        resolve(lora, SDXL_BASE)
    except InputError as error:
        raise InputError(
            f"{str(error).removesuffix(' Nothing was merged')} If it is for a model of your own, give that: --model"
        ) from error
    raise AssertionError("SDXL base was the first to be tried")


# ---- for people ------------------------------------------------------------------------------------------------------


def describe(lora: Lora) -> str:
    """ "264 modules of unet, 72 of text_encoder, ranks 4 to 32"; with the kinds where they are not plain LoRA alone."""
    parts = Counter(part_of(module) for module in lora.modules)
    (first, count), *rest = sorted(parts.items(), key=lambda item: item[0] != "unet")
    listed = [f"{count} modules of {first}", *(f"{count} of {part}" for part, count in rest)]
    if ranks := lora.ranks:
        listed.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    if (found := kinds_in(lora)).keys() != {Kind.LORA.value}:
        listed.append(", ".join(f"{count} × {kind}" for kind, count in found.items()))
    return ", ".join(listed)


def kinds_in(lora: Lora) -> dict[str, int]:
    """The number of changes of each kind, e.g. {"lora": 722, "bias": 12}."""
    return dict(Counter(kind for module in lora.modules.values() for kind in module.labels).most_common())


def notes(lora: Lora) -> list[str]:
    """Messages for the user about an adapter that is merged."""
    found = []
    if lora.embeddings:
        found.append(
            f"{lora.name} also holds the embeddings {', '.join(lora.embeddings)}, which are not merged: sdxl-jax "
            f"sample takes them as --embedding {lora.source}:{lora.embeddings[0]}"
        )
    magnitudes = [module.factors["magnitude"] for module in lora.modules.values() if "magnitude" in module.factors]
    if any(value.shape[0] != 1 or value.ndim == 1 for value in magnitudes):
        found.append(
            f"{lora.name} is a DoRA along the outputs: merged as LyCORIS and PEFT train it. ComfyUI and A1111 divide "
            "by other norms"
        )
    return found
