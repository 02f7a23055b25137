"""LoRA files, merged into a model's parameters: W' = W + Σ scale · (alpha / rank) · up · down.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, section 4.1) changes a linear layer or a convolution by a product
of two small factors, down [rank, in, …] and up [out, rank]. Merged, it costs nothing when pictures are made. Read are
safetensors of

    kohya (sd-scripts)   lora_unet_input_blocks_4_1_…_attn1_to_k.lora_down.weight, .lora_up.weight, .alpha; the UNet in
                         Stability's names or in diffusers', the text encoders as lora_te_, lora_te1_, lora_te2_
    diffusers            unet.down_blocks.1.….attn1.to_k.lora_A.weight, .lora_B.weight, or .lora.down.weight and older
                         spellings; text_encoder., text_encoder_2.; alpha as a tensor or in the header's metadata
    PEFT                 a folder of the UNet: adapter_model.safetensors and adapter_config.json

Names with underscores cannot be parsed back, so every name that the model's modules have in any of these is listed, and
a file's are looked up. Whatever else a file may hold (LoHa, LoKr, DoRA, Tucker, biases, …) is refused: a merge is whole
or not at all. Facts from sd-scripts' `networks/lora.py`, diffusers' `loaders/` and peft's `tuners/lora`.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files import text as texts
from sdxl_jax.files.paths import local
from sdxl_jax.model import Adapter, Model, ModelConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.formats.safetensors import Tensor, open_file
from sdxl_jax.weights.lazy import Changed, Leaf, Weights
from sdxl_jax.weights.names import Dialect, Entry, Naming


class Factors(NamedTuple):
    """What changes one layer. In a file's order [rank, in, …] and [out, rank, …], or in ours, [… in, rank] and
    [rank, out]."""

    down: Float[np.ndarray, "*_down"]
    up: Float[np.ndarray, "*_up"]
    alpha: float
    """The change is up · down · alpha / rank."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A file, read."""

    name: str
    """The file's, or the folder's."""
    modules: Mapping[str, Factors]
    """By the file's names of modules: float32, in the file's shapes."""

    @property
    def ranks(self) -> list[int]:
        """All that there are, ascending."""
        return sorted({factors.down.shape[0] for factors in self.modules.values()})


Resolved = dict[str, list[tuple[int | None, Factors]]]

# Prefixes in files, and what stands behind them. PEFT's own files and diffusers' oldest have the UNet alone.
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_PEFT = "base_model.model."
_DOTTED = {
    **{"unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"},
    **{_PEFT: "unet", "": "unet"},
}
_DOTTED_DIALECTS = (Dialect.DIFFUSERS, Dialect.TRANSFORMERS, Dialect.TRANSFORMERS_5)
# diffusers until 0.22: attn1.processor.to_out_lora, self_attn.to_q_lora. The regular expression below drops the _lora.
_OLD = ((r"(attn\d\.to_out)\.0$", r"\1"), (r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1"))

_FACTOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<kohya>down|up)"
    r"|\.lora_(?P<peft>[AB])(?:\.(?!weight$)[^.]+)?"  # with or without the adapter's name
    r"|(?:[._]lora|\.lora_linear_layer)\.(?P<diffusers>down|up))\.weight"
)
_OTHERS = {  # looked for in a tensor's name, as regular expressions
    "lora_mid": "the core of a Tucker decomposition (LyCORIS)",
    "hada_": "a LoHa's (LyCORIS)",
    "lokr_": "a LoKr's (LyCORIS)",
    "dora_scale|lora_magnitude_vector": "a DoRA's: it changes the length of the weights as well",
    "oft_": "an OFT's: it turns the weights",
    "lora_embedding_": "a change of an embedding",
    r"\.diff(_b)?$": "a whole difference of weights or of a bias, not a product",
    r"\.lora_.*bias$": "a change of a bias",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that take something out of the base model's weights, which are then not those of the hub."""
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_FAMILIES = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|lora_te3_": "SD 3",
    r"^transformer\.|^lora_transformer_": "a diffusion transformer such as SD 3 or Flux",
}
_CONTEXTS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL base", 1280: "the SDXL refiner"}


def read(path: str | Path) -> Lora:
    """A LoRA file; or a folder with one of PEFT's or diffusers' names in it.

    Raises InputError for a file that is missing, damaged or a pickle, or that holds anything but plain LoRA.
    """
    file = path = local(path, "the LoRA")
    if path.is_dir():
        file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} has no {' and no '.join(_FOLDER_FILES)}. Name a LoRA's .safetensors file")
    tensors, metadata = open_file(file)
    settings = _parsed(metadata.get("lora_adapter_metadata", "{}"), file)
    config = path / "adapter_config.json"
    if config.is_file():
        settings |= {_PEFT + key: value for key, value in _parsed(texts.read_text(config), config).items()}
    for key, value in settings.items():
        if key.endswith("init_lora_weights") and str(value).startswith(_BASE_CHANGING):
            raise InputError(
                f"{path} was begun by {value}, which changes the base model's own weights. Save it as plain LoRA (PEFT:"
                " path_initial_model_for_weight_conversion)"
            )

    pairs, alphas = _sorted_out(file, tensors)
    modules = {}
    for module, pair in pairs.items():
        down, up = (pair[side].read().astype(np.float32) for side in ("down", "up"))
        alpha = alphas[module].read().item() if module in alphas else _alpha(module, len(down), settings)
        modules[module] = Factors(down, up, float(alpha))
    return Lora(path.name, modules)


def _sorted_out(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(down and up by module, alpha by module). Raises InputError for other tensors and for half a pair."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            side = match["kohya"] or match["diffusers"] or {"A": "down", "B": "up"}[match["peft"]]
            pair = pairs.setdefault(match["module"], {})
            if side in pair:
                raise InputError(
                    f"{file} has {pair[side].name} and {name}, of two LoRAs. Merge them one file at a time"
                )
            pair[side] = tensor
        elif name.endswith(".alpha") and math.prod(tensor.shape) == 1:
            alphas[name.removesuffix(".alpha")] = tensor
        else:
            what = next((what for mark, what in _OTHERS.items() if re.search(mark, name)), "nothing that a LoRA has")
            raise InputError(
                f"{file} has the tensor {name} {tensor.shape}, which is {what}. Only plain LoRA (down, up, alpha) can "
                "be merged, and nothing was. Merge this file into a checkpoint with the tool that it was made for, and "
                "load that"
            )
    for module in [*pairs, *alphas]:
        if missing := {"down", "up"} - pairs.get(module, {}).keys():
            has = next(iter(pairs.get(module, {}).values()), alphas.get(module))
            assert has is not None
            raise InputError(f"{file} has {has.name}, but no {' and no '.join(sorted(missing))} with it. Fetch it anew")
        if any(len(tensor.shape) not in (2, 4) or 0 in tensor.shape for tensor in pairs[module].values()):
            shapes = " and ".join(f"{tensor.name} {tensor.shape}" for tensor in pairs[module].values())
            raise InputError(f"{file} has {shapes}. Expected two factors of a linear layer or of a convolution")
    if not pairs:
        raise InputError(
            f"{file} has no LoRA: {len(tensors)} tensors, no pair of down and up. Is it another kind of file?"
        )
    return pairs, alphas


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} has settings of its LoRA that are no JSON ({error}). Fetch it anew") from error
    return parsed if isinstance(parsed, dict) else {}


def _alpha(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """From PEFT's settings, "unet.lora_alpha" and so on; the rank where there are none: the change is up · down."""
    prefix = next(prefix for prefix in _DOTTED if module.startswith(prefix))
    patterns = settings.get(prefix + "alpha_pattern") or {}
    of_module = (value for pattern, value in patterns.items() if _matches(pattern, module.removeprefix(prefix)))
    alpha = float(next(of_module, settings.get(prefix + "lora_alpha", rank)))
    # rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by √rank.
    return alpha * math.sqrt(rank) if settings.get(prefix + "use_rslora") else alpha


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT takes a key of alpha_pattern, a regular expression, for this module: peft `get_pattern_key`."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return module == pattern


@functools.cache
def known_modules(config: ModelConfig) -> dict[str, tuple[str, Entry]]:
    """All names in LoRA files of the model's linear layers and convolutions: (part, the weight's entry)."""
    found: dict[str, tuple[str, Entry]] = {}
    namings: list[tuple[str, Any, Dialect]] = [
        *(("unet", config.unet, dialect) for dialect in (Dialect.ORIGINAL, Dialect.DIFFUSERS)),
        *((tower.name, tower.clip, dialect) for tower in config.text for dialect in _DOTTED_DIALECTS[1:]),
    ]
    for part, network, dialect in namings:
        dotted = [prefix for prefix, owner in _DOTTED.items() if owner == part and dialect in _DOTTED_DIALECTS]
        # lora_te_ is the text encoder of a model that has one: of another model, where there are two.
        kohya = [p for p, owner in _KOHYA.items() if owner == part and (p != "lora_te_" or len(config.text) == 1)]
        for entry in names.table(network, Naming(dialect)).entries:
            if not entry.places[0].path.endswith("kernel"):
                continue
            module = entry.name.removesuffix(".weight")
            aliases = {module, *(re.sub(pattern, new, module) for pattern, new in _OLD)}
            spelt = [prefix + alias for prefix in dotted for alias in aliases]
            for name in [*spelt, *(prefix + module.replace(".", "_") for prefix in kohya)]:
                assert found.setdefault(name, (part, entry))[1].places == entry.places, f"{name} is ambiguous"
    return found


def resolve(lora: Lora, config: ModelConfig) -> Resolved:
    """Where a LoRA changes the model: our path, "unet/…/kernel" -> (layer of a stacked parameter or None, factors with
    our axes: down [in, rank] or [height, width, in, rank], up [rank, out]).

    Raises InputError for modules that the model does not have, and for factors that do not fit.
    """
    known, resolved, taken = known_modules(config), Resolved(), {}
    found = {module: known.get(module.replace(".processor.", ".")) for module in lora.modules}
    if strange := [module for module, place in found.items() if place is None]:
        raise InputError(_strange(lora, strange, known, config))
    for module, place in found.items():
        assert place is not None
        part, entry = place
        (target,) = entry.places
        factors = lora.modules[module]
        # A 1×1 convolution and a linear layer are the same sums: either may stand for the other.
        down, up = (value.squeeze((2, 3)) if value.shape[2:] == (1, 1) else value for value in factors[:2])
        kernel = entry.shape[2:]
        expected = (down.shape[0], entry.shape[1], *(() if kernel == (1, 1) else kernel))
        if down.shape != expected or up.shape != (entry.shape[0], down.shape[0]):
            raise InputError(
                f"{lora.name}: {module} has down {factors.down.shape} and up {factors.up.shape}, but the model's weight"
                f" there is {entry.shape} ({part}/{target.path}).{_family(lora, config)} Nothing was merged"
            )
        # The same module in two spellings: files that have both hold the same twice.
        if (first := taken.setdefault((part, target), module)) != module:
            if not all(np.array_equal(a, b) for a, b in zip(factors, lora.modules[first], strict=True)):
                raise InputError(f"{lora.name}: {module} and {first} are one module, and differ. Remove one")
            continue
        down = np.moveaxis(down.reshape(*down.shape[:2], *kernel), (0, 1), (-1, -2))
        oriented = Factors(down, up.T, factors.alpha)
        resolved.setdefault(f"{part}/{target.path}", []).append((target.layer, oriented))
    return resolved


def _strange(lora: Lora, strange: list[str], known: Mapping[str, Any], config: ModelConfig) -> str:
    """What to say of modules that the model does not have."""
    family = _family(lora, config)
    message = (
        f"{lora.name} changes {len(strange)} modules, of {len(lora.modules)}, that this model does not have. The first "
        f"is {strange[0]} (down {lora.modules[strange[0]].down.shape})."
    )
    if not family:
        style = next(prefix for prefix in (*_KOHYA, *_DOTTED) if strange[0].startswith(prefix))
        alike = [name for name in known if style and name.startswith(style)] or list(known)
        family = f" Nearest known names: {', '.join(nearest_first(strange[0], alike)[:3])}."
    return f"{message}{family} Nothing was merged"


def _family(lora: Lora, config: ModelConfig) -> str:
    """A sentence on which model the LoRA is for, where that is plain and it is another one."""
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
        "the kind of model that it was trained on."
    )


def delta(resolved: Resolved, path: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
    """The change of one parameter, float32 and of its shape, before the user's scale; None if there is none.

    path: "unet/…/kernel". A layer of a stacked parameter that has no factors does not change.
    """
    if path not in resolved:
        return None
    total = np.zeros(shape, np.float32)
    for layer, (down, up, alpha) in resolved[path]:
        np.matmul(down, up * np.float32(alpha / len(up)), out=total if layer is None else total[layer])
    return total


def add(model: Model, lora: Lora | str | Path, scale: float = 1.0, name: str | None = None) -> Model:
    """The model with a LoRA merged into it; the given one stays as it is, and shares what does not change.

    scale: strength, 1 as trained; several LoRAs add up. name: for `remove`, default the file's. Sums are float32, and
    parameters keep their dtype and their place on the devices.

    Raises InputError for what `read` and `resolve` refuse, and for a name that the model has already.
    """
    lora = lora if isinstance(lora, Lora) else read(lora)
    name = lora.name if name is None else name
    if any(adapter.name == name for adapter in model.adapters):
        raise InputError(f"The model has a LoRA named {name} already. Remove it first, or give this one another name")
    if not math.isfinite(scale):
        raise InputError(f"The scale of {name} is {scale}. Give a number, 1 for the strength that it was trained with")
    return Model(model.config, _merged(model, lora, scale), (*model.adapters, Adapter(name, scale, lora)))


def remove(model: Model, name: str) -> Model:
    """The model without one of its LoRAs, which is subtracted again.

    Exact to rounding: adding and subtracting each round by half a unit in the last place, together 1.2e-7 of the larger
    of a weight and its sum in float32, 8e-3 in bfloat16. Who wants the weights of before exactly keeps the model of
    before: `add` does not touch it.

    Raises InputError if the model has no LoRA of that name.
    """
    adapter = next((adapter for adapter in model.adapters if adapter.name == name), None)
    if adapter is None:
        there = ", ".join(nearest_first(name, [adapter.name for adapter in model.adapters])) or "none"
        raise InputError(f"The model has no LoRA named {name}. There are: {there}")
    rest = tuple(other for other in model.adapters if other is not adapter)
    return Model(model.config, _merged(model, adapter.lora, -adapter.scale), rest)


def merge(weights: Weights, lora: Lora, scale: float) -> Weights:
    """The same for a model that is not read yet: each parameter is changed when it is read. Raises InputError as
    `resolve`."""
    resolved = resolve(lora, weights.config)
    if absent := [path for path in resolved if path not in weights.leaves]:
        raise InputError(f"{lora.name} changes {absent[0].split('/')[0]}, which is not there. Give a whole model")

    def changed(path: str, leaf: Leaf) -> Changed:
        return Changed(leaf, lambda value: _sum(value, _change(resolved, path, leaf.shape, scale)), leaf.dtype)

    leaves = {path: changed(path, leaf) if path in resolved else leaf for path, leaf in weights.leaves.items()}
    return replace(weights, leaves=leaves)


def _merged(model: Model, lora: Lora, scale: float) -> dict[str, Any]:
    resolved, flat = resolve(lora, model.config), flatten(model.params)
    for path in resolved:
        value = flat[path]
        change = _change(resolved, path, value.shape, scale)
        if isinstance(value, jax.Array):
            # One parameter at a time: the largest stack of SDXL is 0.5 GB in float32.
            change = jax.device_put(change, value.sharding)
            flat[path] = jax.device_put(_sum_on_devices(value, change), value.sharding)
        else:
            flat[path] = _sum(value, change)
    return unflatten(flat)


def _change(resolved: Resolved, path: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """The change of a parameter that is among `resolved`, with the user's scale."""
    change = delta(resolved, path, shape)
    assert change is not None
    change *= np.float32(scale)
    return change


def _sum(value: Any, change: Any) -> Any:
    """In float32, with the parameter's dtype; arrays of numpy or of jax."""
    return (value.astype(np.float32) + change).astype(value.dtype)


_sum_on_devices = jax.jit(_sum)


def describe(lora: Lora) -> str:
    """ "264 modules of unet, 72 of text_encoder, ranks 4 to 32"."""
    parts = Counter(
        next(part for prefix, part in (_KOHYA | _DOTTED).items() if m.startswith(prefix)) for m in lora.modules
    )
    (first, count), *rest = sorted(parts.items(), key=lambda item: item[0] != "unet")
    ranks = lora.ranks
    listed = [f"{count} modules of {first}", *(f"{count} of {part}" for part, count in rest)]
    return ", ".join([*listed, f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"])


def listing(model: Model) -> list[str]:
    """A line for each LoRA: "style.safetensors × 0.8: 264 modules of unet, 72 of text_encoder, ranks 4 to 32"."""
    return [f"{adapter.name} × {adapter.scale:g}: {describe(adapter.lora)}" for adapter in model.adapters]


def parse_option(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE, as on the command line. A file whose own name has a colon is found if it is there."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise InputError(
            f"{text!r} is no file, and no FILE:SCALE with a number for the scale, such as style.safetensors:0.8"
        )
    return Path(path), number
