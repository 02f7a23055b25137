"""LoRA files, merged into a model's parameters. The formulas are in `adapters.lora`.

A file names each module by a prefix, which identifies the network, a dialect, which identifies the module, and a side:

    kohya (sd-scripts)   lora_unet_input_blocks_4_1_…_attn1_to_k.lora_down.weight, .lora_up.weight, .alpha; the UNet in
                         Stability's names or in diffusers', the text encoders as lora_te_, lora_te1_, lora_te2_
    diffusers            unet.down_blocks.1.….attn1.to_k.lora_A.weight, .lora_B.weight, or .lora.down.weight and older
                         spellings; text_encoder., text_encoder_2.; alpha as a tensor or in the header's metadata
    PEFT                 a folder of the UNet: adapter_model.safetensors and adapter_config.json
    OneTrainer           unet.input_blocks.4.1.….lora_down.weight; clip_l., clip_g.
    ComfyUI              diffusion_model.input_blocks.4.1.….lora_up.weight; text_encoders.clip_l.transformer.…
    LyCORIS              lycoris_down_blocks_1_….lora_down.weight

Tools mix them, so the three are independent here. Names with underscores cannot be parsed back, so a table of all names
of the model's modules with every prefix is made, in which a file's names are looked up. Embeddings bundled in the file
(bundle_emb.NAME.clip_l) are for `textual_inversion`. Other contents (LoHa, LoKr, DoRA, Tucker, biases, …) are refused:
a file is merged completely or not at all. Sources: sd-scripts' `networks/lora.py`, diffusers' `loaders/`, peft's
`tuners/lora` and ComfyUI's `comfy/lora.py`.
"""

import contextlib
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from sdxl_jax.adapters.lora import Factors, Lora, Resolved, change, merged, summed
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.files.text import read_text
from sdxl_jax.model import Adapter, Model, ModelConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.formats.safetensors import Tensor, open_file
from sdxl_jax.weights.lazy import Changed, Leaf, Weights
from sdxl_jax.weights.names import Dialect, Entry, Naming
from sdxl_jax.weights.textual_inversion import BUNDLED

_PEFT = "base_model.model."
_UNDERSCORED = {
    **{"lora_unet_": "unet", "lycoris_": "unet"},
    **{"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"},
}
_DOTTED = {
    **{"unet.": "unet", "diffusion_model.": "unet", "model.diffusion_model.": "unet", _PEFT: "unet", "": "unet"},
    **{"text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"},
    **{"clip_l.": "text_encoder", "clip_h.": "text_encoder", "clip_g.": "text_encoder_2"},
    **{f"{place}clip_l.transformer.": "text_encoder" for place in ("", "text_encoders.")},
    **{f"{place}clip_h.transformer.": "text_encoder" for place in ("", "text_encoders.")},
    **{f"{place}clip_g.transformer.": "text_encoder_2" for place in ("", "text_encoders.")},
    **{"cond_stage_model.transformer.": "text_encoder", "cond_stage_model.model.": "text_encoder"},
    **{"conditioner.embedders.0.transformer.": "text_encoder", "conditioner.embedders.1.model.": "text_encoder_2"},
}
"""Prefixes of module names in files, and the part whose module it is; with an underscored prefix, the name has
underscores for its dots. PEFT's own files and the oldest of diffusers have the UNet alone."""
_PREFIXES = dict(sorted((_UNDERSCORED | _DOTTED).items(), key=lambda item: -len(item[0])))
_DIALECTS = {
    "unet": (Dialect.DIFFUSERS, Dialect.ORIGINAL),
    "text": (Dialect.TRANSFORMERS, Dialect.TRANSFORMERS_5, Dialect.OPENCLIP),
}
# diffusers until 0.22: attn1.processor.to_out_lora, self_attn.to_q_lora. The regular expression below drops the _lora.
_OLD = ((r"(attn\d\.to_out)\.0$", r"\1"), (r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1"))

_FACTOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<kohya>down|up)"
    r"|\.lora_(?P<peft>[AB])(?:\.(?!weight$)[^.]+)?"  # with or without the adapter's name
    r"|(?:[._]lora|\.lora_linear_layer)\.(?P<diffusers>down|up))\.weight"
)
_OTHERS = {  # regular expressions, searched in a tensor's name
    "lora_mid": "the core of a Tucker decomposition (LyCORIS)",
    "hada_": "a LoHa's (LyCORIS)",
    "lokr_": "a LoKr's (LyCORIS)",
    "dora_scale|lora_magnitude_vector": "a DoRA's: it rescales the weights as well",
    "oft_": "an OFT's: it rotates the weights",
    "lora_embedding_": "a change of an embedding",
    r"\.diff(_b)?$": "a full difference of weights or of a bias, not a low-rank product",
    r"\.lora_.*bias$": "a change of a bias",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that change the base model's weights, which are then not the published ones."""
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_FAMILIES = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|lora_te3_": "SD 3",
    r"^transformer\.|^lora_transformer_": "a diffusion transformer such as SD 3 or Flux",
}
_CONTEXTS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL base", 1280: "the SDXL refiner"}


def read(given: str | PurePath) -> Lora:
    """A LoRA file; or a folder with one of PEFT's or diffusers' names in it. Local, or in a bucket.

    Raises InputError for a file that is missing, damaged or a pickle, or that holds anything but plain LoRA;
    MachineError for a bucket that does not answer.
    """
    path = located(given, "the LoRA")
    with buckets.answering(path, "the LoRA") if in_bucket(path) else contextlib.nullcontext():
        return _read(path)


def _read(path: AnyPath) -> Lora:
    file = path
    if path.is_dir():
        file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} has no {' and no '.join(_FOLDER_FILES)}. Give a LoRA's .safetensors file")
    tensors, metadata = open_file(file)
    settings = _parsed(metadata.get("lora_adapter_metadata", "{}"), file)
    config = path / "adapter_config.json"
    if config.is_file():
        settings |= {_PEFT + key: value for key, value in _parsed(read_text(config), config).items()}
    for key, value in settings.items():
        if key.endswith("init_lora_weights") and str(value).startswith(_BASE_CHANGING):
            raise InputError(
                f"{path} was initialised by {value}, which changes the base model's weights. Save it as plain LoRA "
                "(PEFT: path_initial_model_for_weight_conversion)"
            )

    bundled = [found["name"] for name in tensors if (found := BUNDLED.fullmatch(name))]
    tensors = {name: tensor for name, tensor in tensors.items() if not BUNDLED.fullmatch(name)}
    pairs, alphas = _pairs(file, tensors)
    modules = {}
    for module, pair in pairs.items():
        down, up = (pair[side].read().astype(np.float32) for side in ("down", "up"))
        alpha = alphas[module].read().item() if module in alphas else _alpha(module, len(down), settings)
        modules[module] = Factors(down, up, float(alpha))
    return Lora(path.name, modules, file, tuple(dict.fromkeys(bundled)))


def _pairs(file: AnyPath, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(down and up by module, alpha by module). Raises InputError for other tensors and for incomplete pairs."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            side = match["kohya"] or match["diffusers"] or {"A": "down", "B": "up"}[match["peft"]]
            pair = pairs.setdefault(match["module"], {})
            if side in pair:
                raise InputError(
                    f"{file} has {pair[side].name} and {name}, of two LoRAs. Give each LoRA as a file of its own"
                )
            pair[side] = tensor
        elif name.endswith(".alpha") and math.prod(tensor.shape) == 1:
            alphas[name.removesuffix(".alpha")] = tensor
        else:
            unknown = "not a tensor of a LoRA"
            kind = next((kind for mark, kind in _OTHERS.items() if re.search(mark, name)), unknown)
            raise InputError(
                f"{file} has the tensor {name} {tensor.shape}, which is {kind}. Only plain LoRA (down, up, alpha) can "
                "be merged, and nothing was. Merge this file into a checkpoint with the tool that it was made for, and "
                "load that"
            )
    for module in [*pairs, *alphas]:
        if missing := {"down", "up"} - pairs.get(module, {}).keys():
            has = next(iter(pairs.get(module, {}).values()), alphas.get(module))
            assert has is not None
            raise InputError(
                f"{file} has {has.name}, but no {' and no '.join(sorted(missing))} with it. Download it again"
            )
        if any(len(tensor.shape) not in (2, 4) or 0 in tensor.shape for tensor in pairs[module].values()):
            shapes = " and ".join(f"{tensor.name} {tensor.shape}" for tensor in pairs[module].values())
            raise InputError(
                f"{file} has {shapes}. Expected two factors of a linear layer or of a convolution, of 2 or 4 axes. "
                "Download it again, or give another LoRA"
            )
    if not pairs:
        raise InputError(
            f"{file} is not a LoRA: of its {len(tensors)} tensors none are pairs of down and up. Give a LoRA's "
            ".safetensors file"
        )
    return pairs, alphas


def _parsed(text: str, path: AnyPath) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} has settings of its LoRA that are not valid JSON ({error}). Download it again"
        ) from error
    return parsed if isinstance(parsed, dict) else {}


def _alpha(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Alpha from PEFT's settings, "unet.lora_alpha" and so on; without settings the rank: the change is up · down."""
    prefix = next(prefix for prefix in _PREFIXES if module.startswith(prefix))
    patterns = settings.get(prefix + "alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if _matches(pattern, module.removeprefix(prefix)))
    alpha = float(next(matching, settings.get(prefix + "lora_alpha", rank)))
    # rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by √rank.
    return alpha * math.sqrt(rank) if settings.get(prefix + "use_rslora") else alpha


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT applies a key of alpha_pattern, a regular expression, to this module: peft `get_pattern_key`."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return module == pattern


@functools.cache
def known_modules(config: ModelConfig) -> dict[str, tuple[str, Entry]]:
    """All names that LoRA files have for the model's linear layers and convolutions: (part, the weight's entry). Every
    dialect is known with every prefix: tools adopted each other's prefixes, and kept their own names of modules."""
    found: dict[str, tuple[str, Entry]] = {}
    namings: list[tuple[str, Any, Dialect]] = [
        *(("unet", config.unet, dialect) for dialect in _DIALECTS["unet"]),
        *((tower.name, tower.clip, dialect) for tower in config.text for dialect in _DIALECTS["text"]),
    ]
    for part, network, dialect in namings:
        # lora_te_ is the text encoder of a model that has one; in a model with two, it is of another family.
        own = [p for p, owner in _PREFIXES.items() if owner == part and (p != "lora_te_" or len(config.text) == 1)]
        for entry in names.table(network, Naming(dialect)).entries:
            # OpenCLIP's fused queries, keys and values are not a module.
            if not entry.places[0].path.endswith("kernel") or len(entry.places) > 1:
                continue
            module = entry.name.removesuffix(".weight")
            aliases = {module, *(re.sub(pattern, new, module) for pattern, new in _OLD)}
            for prefix in own:
                spelt = [module.replace(".", "_")] if prefix in _UNDERSCORED else aliases
                for name in spelt:
                    assert found.setdefault(prefix + name, (part, entry))[1].places == entry.places, f"{name}: two"
    return found


def resolve(lora: Lora, config: ModelConfig) -> Resolved:
    """The parameters of a model that a LoRA changes, with its factors.

    Raises InputError for modules that the model does not have, and for factors that do not fit.
    """
    known, first_names = known_modules(config), {}
    resolved: Resolved = {}
    found = {module: known.get(module.replace(".processor.", ".")) for module in lora.modules}
    if unknown := [module for module, place in found.items() if place is None]:
        raise InputError(_unknown_modules(lora, unknown, known, config))
    for module, place in found.items():
        assert place is not None
        part, entry = place
        (target,) = entry.places
        factors = lora.modules[module]
        # A 1×1 convolution and a linear layer are equivalent: either may be given for the other.
        down, up = (value.squeeze((2, 3)) if value.shape[2:] == (1, 1) else value for value in factors[:2])
        kernel = entry.shape[2:]
        expected = (down.shape[0], entry.shape[1], *(() if kernel == (1, 1) else kernel))
        if down.shape != expected or up.shape != (entry.shape[0], down.shape[0]):
            remedy = _family(lora, config) or " Give a LoRA for this model."
            raise InputError(
                f"{lora.name}: {module} has down {factors.down.shape} and up {factors.up.shape}, but the model's weight"
                f" there is {entry.shape} ({part}/{target.path}).{remedy} Nothing was merged"
            )
        # The same module in two spellings: files that have both hold the same factors twice.
        if (first := first_names.setdefault((part, target), module)) != module:
            if not all(np.array_equal(a, b) for a, b in zip(factors, lora.modules[first], strict=True)):
                raise InputError(
                    f"{lora.name}: {module} and {first} are names of one module, and their factors differ. Remove one "
                    "of them from the file"
                )
            continue
        down = np.moveaxis(down.reshape(*down.shape[:2], *kernel), (0, 1), (-1, -2))
        oriented = Factors(down, up.T, factors.alpha)
        resolved.setdefault(f"{part}/{target.path}", []).append((target.layer, oriented))
    return resolved


def _unknown_modules(lora: Lora, unknown: list[str], known: Mapping[str, Any], config: ModelConfig) -> str:
    """The message about modules that the model does not have."""
    family = _family(lora, config)
    message = (
        f"{lora.name} changes {len(unknown)} modules, of {len(lora.modules)}, that this model does not have. The first "
        f"is {unknown[0]} (down {lora.modules[unknown[0]].down.shape})."
    )
    if not family:
        prefix = next(prefix for prefix in _PREFIXES if unknown[0].startswith(prefix))
        with_prefix = [name for name in known if prefix and name.startswith(prefix)] or list(known)
        nearest = ", ".join(nearest_first(unknown[0], with_prefix)[:3])
        family = f" Nearest known names: {nearest}. Give a LoRA for this model."
    return f"{message}{family} Nothing was merged"


def _family(lora: Lora, config: ModelConfig) -> str:
    """A sentence on which model the LoRA is for, if that is evident and it is another one."""
    for pattern, family in _FAMILIES.items():
        if any(re.search(pattern, module) for module in lora.modules):
            return f" It looks like a LoRA for {family}: load it with a model of that kind."
    widths = [
        f.down.shape[1] for module, f in lora.modules.items() if re.search(r"attn2[._](processor\.)?to_[kv]", module)
    ]
    if not widths or widths[0] == config.unet.context_dim:
        return ""
    kind = f", as in {_CONTEXTS[widths[0]]}" if widths[0] in _CONTEXTS else ""
    return (
        f" It reads text states {widths[0]} wide{kind}; this model's are {config.unet.context_dim} wide. Load it with "
        "a model of the family that it was trained on."
    )


def add(model: Model, lora: Lora | str | PurePath, scale: float = 1.0, name: str | None = None) -> Model:
    """The model with a LoRA merged into it; the given model is not changed, and shares the unchanged parameters.

    scale: strength, 1 as trained; several LoRAs add up. name: for `remove`, default the file's. Sums are float32;
    parameters keep their dtype and sharding.

    Raises InputError for what `read` and `resolve` refuse, and for a name that the model has already.
    """
    lora = lora if isinstance(lora, Lora) else read(lora)
    name = lora.name if name is None else name
    if any(adapter.name == name for adapter in model.adapters):
        raise InputError(f"The model has a LoRA named {name} already. Remove it first, or give this one another name")
    if not math.isfinite(scale):
        raise InputError(
            f"The scale of {name} is not finite. Give a number, 1 for the strength that it was trained with"
        )
    params = merged(model.params, resolve(lora, model.config), scale)
    return Model(model.config, params, (*model.adapters, Adapter(name, scale, lora)))


def remove(model: Model, name: str) -> Model:
    """The model without one of its LoRAs, which is subtracted.

    Exact to rounding: adding and subtracting each round by half a unit in the last place, together 1.2e-7 of the larger
    of a weight and its sum in float32, 8e-3 in bfloat16. To restore the exact weights, keep the original model: `add`
    does not change it.

    Raises InputError if the model has no LoRA of that name.
    """
    adapter = next((adapter for adapter in model.adapters if adapter.name == name), None)
    if adapter is None:
        names_of_all = nearest_first(name, [adapter.name for adapter in model.adapters])
        known = f"Give one of: {', '.join(names_of_all)}" if names_of_all else "It has none"
        raise InputError(f"The model has no LoRA named {name}. {known}")
    rest = tuple(other for other in model.adapters if other is not adapter)
    resolved = resolve(adapter.lora, model.config)
    return Model(model.config, merged(model.params, resolved, -adapter.scale), rest)


def merge(weights: Weights, lora: Lora, scale: float) -> Weights:
    """Merges a LoRA into lazy weights: each parameter is changed when it is read. Raises InputError as `resolve`, and
    for a part that is missing."""
    resolved = resolve(lora, weights.config)
    if absent := [path for path in resolved if path not in weights.leaves]:
        raise InputError(
            f"{lora.name} changes {absent[0].split('/')[0]}, a part that the weights do not have. Give a whole model"
        )

    def changed(path: str, leaf: Leaf) -> Changed:
        return Changed(
            leaf, lambda value: np.asarray(summed(value, change(resolved, path, leaf.shape, scale))), leaf.dtype
        )

    leaves = {path: changed(path, leaf) if path in resolved else leaf for path, leaf in weights.leaves.items()}
    merged = (*weights.provenance.merged, f"{lora.name} × {scale:g}")
    # The licence of the result depends on the LoRA's, which its file does not say.
    return replace(weights, leaves=leaves, licence=None, provenance=replace(weights.provenance, merged=merged))


def describe(lora: Lora) -> str:
    """ "264 modules of unet, 72 of text_encoder, ranks 4 to 32"."""
    parts = Counter(
        next(part for prefix, part in _PREFIXES.items() if module.startswith(prefix)) for module in lora.modules
    )
    (first, count), *rest = sorted(parts.items(), key=lambda item: item[0] != "unet")
    ranks = lora.ranks
    listed = [f"{count} modules of {first}", *(f"{count} of {part}" for part, count in rest)]
    return ", ".join([*listed, f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"])


def notes(lora: Lora) -> list[str]:
    """Messages for the user about a LoRA that is merged."""
    if not lora.embeddings:
        return []
    return [
        f"{lora.name} also holds the embeddings {', '.join(lora.embeddings)}, which are not merged: sdxl-jax sample "
        f"takes them as --embedding {lora.source}:{lora.embeddings[0]}"
    ]


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
