"""Names of modules in adapter files: all that are read, and those that are written.

A name is a prefix, which identifies the network, and the module's name in a dialect:

    kohya (sd-scripts)   lora_unet_input_blocks_4_1_…_attn1_to_k: the UNet in Stability's names or in diffusers', the
                         text encoders as lora_te_, lora_te1_, lora_te2_
    diffusers            unet.down_blocks.1.….attn1.to_k and older spellings; text_encoder., text_encoder_2.
    PEFT                 base_model.model.down_blocks.1.…: the UNet
    OneTrainer           unet.input_blocks.4.1.…; clip_l., clip_g.
    ComfyUI              diffusion_model.input_blocks.4.1.…; text_encoders.clip_l.transformer.…
    SimpleTuner          lycoris_down_blocks_1_…

Tools mix them, so both are independent here. Names with underscores cannot be parsed back, so a table of all names of
the model's modules with every prefix is made, in which a file's names are looked up. Sources: sd-scripts'
`networks/lora.py`, diffusers' `loaders/`, peft's `tuners/lora`, ComfyUI's `comfy/lora.py` and A1111's
`extensions-builtin/Lora/networks.py`.
"""

import functools
import re
from typing import Any, NamedTuple

from sdxl_jax.adapters.targets import Spelling
from sdxl_jax.model import ModelConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.lazy import part_configs
from sdxl_jax.weights.names import Dialect, Entry, Naming, Place, Table

PEFT = "base_model.model."
_UNDERSCORED = {
    **{"lora_unet_": "unet", "lycoris_": "unet"},
    **{"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"},
}
_DOTTED = {
    **{"unet.": "unet", "diffusion_model.": "unet", "model.diffusion_model.": "unet", PEFT: "unet", "": "unet"},
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
PREFIXES = dict(sorted((_UNDERSCORED | _DOTTED).items(), key=lambda item: -len(item[0])))
_DIALECTS = {
    "unet": (Dialect.DIFFUSERS, Dialect.ORIGINAL),
    "text": (Dialect.TRANSFORMERS, Dialect.TRANSFORMERS_5, Dialect.OPENCLIP),
}
# diffusers until 0.22: attn1.processor.to_out_lora, self_attn.to_q_lora. Reading drops the _lora.
_OLD = ((r"(attn\d\.to_out)\.0$", r"\1"), (r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1"))


class Target(NamedTuple):
    """The module of a name."""

    part: str
    weight: Entry
    """A linear layer's or convolution's kernel, or a norm's scale."""
    bias: Entry | None


def part_of(module: str) -> str:
    """The part whose module a file's name is, by its prefix."""
    return PREFIXES[prefix_of(module)]


def prefix_of(module: str) -> str:
    return next(prefix for prefix in PREFIXES if module.startswith(prefix))


@functools.cache
def known_modules(config: ModelConfig) -> dict[str, Target]:
    """All names that files have for the model's linear layers, convolutions and norms. Every dialect is known with
    every prefix: tools adopted each other's prefixes, and kept their own names of modules."""
    found: dict[str, Target] = {}
    namings: list[tuple[str, Any, Dialect]] = [
        *(("unet", config.unet, dialect) for dialect in _DIALECTS["unet"]),
        *((tower.name, tower.clip, dialect) for tower in config.text for dialect in _DIALECTS["text"]),
    ]
    for part, network, dialect in namings:
        table = names.table(network, Naming(dialect))
        own = [prefix for prefix in PREFIXES if _owner(prefix, config) == part]
        for entry in table.entries:
            # OpenCLIP's fused queries, keys and values are not a module.
            if not entry.places[0].path.endswith(("kernel", "scale")) or len(entry.places) > 1:
                continue
            module = entry.name.removesuffix(".weight")
            target = Target(part, entry, table.by_name.get(f"{module}.bias"))
            aliases = {module, *(re.sub(pattern, new, module) for pattern, new in _OLD)}
            for prefix in own:
                spelt = [module.replace(".", "_")] if prefix in _UNDERSCORED else aliases
                for name in spelt:
                    first = found.setdefault(prefix + name, target)
                    assert (first.part, first.weight.places) == (part, entry.places), f"{name}: two"
    return found


def _owner(prefix: str, config: ModelConfig) -> str | None:
    """The part of a model whose modules a prefix is for; None if it is of another family."""
    part, towers = PREFIXES[prefix], [tower.name for tower in config.text]
    if part == "text_encoder" and len(towers) == 1:  # the refiner's only one is called text_encoder_2
        return towers[0]
    if prefix == "lora_te_" and len(towers) > 1:
        return None
    return part


class Written(NamedTuple):
    """How one of our parameters is named in a file that we write."""

    module: str
    entry: Entry
    """Its tensor in the naming of which `module` is made."""


@functools.cache
def written_modules(config: ModelConfig, spelling: Spelling) -> dict[Place, Written]:
    """For each parameter, or layer of a stacked one, the name of its module and its tensor. Paths begin with the part.

    The UNets of SDXL have Stability's names in kohya's spelling, those of SD 1.x and 2.x diffusers', as sd-scripts has
    them.
    """
    kohya = spelling is Spelling.KOHYA
    dialect = Dialect.ORIGINAL if kohya and config.micro is not None else Dialect.DIFFUSERS
    one = len(config.text) == 1
    numbers = {"text_encoder": "te1", "text_encoder_2": "te2"}
    found: dict[Place, Written] = {}
    for part, network in part_configs(config).items():
        if part == "vae":
            continue
        table: Table = names.table(network, Naming(dialect if part == "unet" else Dialect.TRANSFORMERS))
        short = "unet" if part == "unet" else "te" if one else numbers[part]
        prefix = f"lora_{short}_" if kohya else f"{'text_encoder' if one and part != 'unet' else part}."
        for entry in table.entries:
            (place,) = entry.places
            module = re.sub(r"\.(weight|bias)$", "", entry.name)
            name = prefix + (module.replace(".", "_") if kohya else module)
            found[Place(f"{part}/{place.path}", place.layer)] = Written(name, entry)
    return found


def layers_of(config: ModelConfig) -> dict[str, int | None]:
    """For each parameter that an adapter may change, how many layers are stacked in it; None for one that is not."""
    count: dict[str, int | None] = {}
    for place in written_modules(config, Spelling.KOHYA):
        before = count.get(place.path) or 0
        count[place.path] = None if place.layer is None else max(before, place.layer + 1)
    return count
