"""`convert`: a model from one layout to another, one parameter at a time.

    orbax         one checkpoint of our parameter tree, for `load_model` and for Orbax's own `load`
    diffusers     a directory that `DiffusionPipeline.from_pretrained` loads: weights, configurations, tokenizers
    single-file   one .safetensors in Stability's original layout, for ComfyUI and the like; of a tiny autoencoder, one
                  of its halves

The way back is exact, bit for bit and name for name: a layout remembers how its source named and shaped its tensors,
and carries those along that have no place in our model. Where a destination has no place for them either, that is said.
The destination appears when it is whole; until then it stands beside its place under another name.
"""

import contextlib
import dataclasses
import enum
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files.paths import local
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.formats import diffusers, orbax, safetensors
from sdxl_jax.weights.lazy import (
    Carried,
    FirstLayers,
    Found,
    InMemory,
    Leaf,
    Weights,
    in_memory,
    lacking_half,
    part_configs,
    stored_dtypes,
)
from sdxl_jax.weights.load import bar
from sdxl_jax.weights.names import Dialect, Naming
from sdxl_jax.weights.open import METADATA, describe, open_model


class Layout(enum.Enum):
    ORBAX = "orbax"
    DIFFUSERS = "diffusers"
    SINGLE_FILE = "single-file"


@dataclasses.dataclass(frozen=True)
class Written:
    """What a conversion did."""

    parts: tuple[str, ...]
    tensors: int
    size: int
    """Bytes of the weights."""
    left_out: tuple[str, ...]
    """Tensors of the source that the destination has no place for."""


def convert(
    source: str | Path | Model | Weights, destination: str | Path, to: Layout | str, progress: bool = True
) -> Written:
    """Writes a model in a layout.

    source: what a MODEL argument takes; or a model in memory; or what `open.open_model` found, perhaps changed.
    destination: a new directory; for a single file, a new .safetensors file. to: "orbax", "diffusers", "single-file".

    Raises InputError before anything is written if there is something at the destination, or if the layout cannot hold
    the model, and MachineError if the disk has too little room; nothing is left after by a conversion that fails.
    """
    to, destination = Layout(to), local(destination, "the destination")
    match source:
        case Weights():
            weights = source
        case Model():
            weights = in_memory(source)
        case _:
            weights = open_model(source)
    write = {Layout.ORBAX: _orbax, Layout.DIFFUSERS: _diffusers, Layout.SINGLE_FILE: _single_file}[to]
    if to is Layout.SINGLE_FILE and destination.suffix != ".safetensors":
        raise InputError(f"A single file is a .safetensors file; given: {destination}. Use {destination}.safetensors")
    if destination.exists():
        raise InputError(f"{destination} is there already. Remove it, or choose another place")
    _check_room(weights, destination)
    with _staged(destination) as staging, bar(weights, "converting", progress) as shown:
        written = write(weights, staging / destination.name, shown)
        _copy_licences(weights, staging / destination.name)
    return written


def _check_room(weights: Weights, destination: Path) -> None:
    """Raises MachineError where the disk has less room than the weights need."""
    place = next(folder for folder in destination.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{destination} cannot be written: {place} is no directory that may be written to")
    free = shutil.disk_usage(place).free
    needed = weights.size + sum(math.prod(t.shape) * t.dtype.itemsize for t in weights.carried.values())
    if free < needed:
        raise MachineError(
            f"{place} has {free / 1e9:.2f} GB left, and the model needs {needed / 1e9:.2f} GB. Make room, choose "
            "another disk, or a smaller --dtype"
        )


@contextlib.contextmanager
def _staged(destination: Path) -> Iterator[Path]:
    """A directory beside the destination; what it holds moves there at the end, or is removed."""
    parents = [folder for folder in destination.absolute().parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        # The model last: where it is, its licence is too.
        for made in sorted(staging.iterdir(), key=lambda made: made.name == destination.name):
            os.replace(made, destination.with_name(made.name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in parents:
            with contextlib.suppress(OSError):
                folder.rmdir()  # which it is not where something was written


def _copy_licences(weights: Weights, made: Path) -> None:
    """Into a directory; beside a file, under its name."""
    folder, prefix = (made, "") if made.is_dir() else (made.parent, f"{made.stem}.")
    for licence in weights.licences:
        place = folder / f"{prefix}{licence.name}"
        if place.exists():  # of another model, whose parts are in this one
            place = folder / f"{prefix}{licence.parent.name}.{licence.name}"
        shutil.copyfile(licence, place)


# ---- orbax -----------------------------------------------------------------------------------------------------------


def _orbax(weights: Weights, destination: Path, shown: tqdm) -> Written:
    _check_stacks(weights)
    metadata = describe(weights) | {
        "origin": to_json(weights.origin),
        "carried": [list(key) for key, tensor in weights.carried.items() if 0 not in tensor.shape],
        # Marks such as v_pred, which Orbax does not save.
        "empty": [[*key, t.dtype.name, list(t.shape)] for key, t in weights.carried.items() if 0 in t.shape],
    }
    filled = [tensor for tensor in weights.carried.values() if 0 not in tensor.shape]
    carried = {f"carried/{number}": tensor for number, tensor in enumerate(filled)}
    orbax.write(destination, {**weights.leaves, **carried}, {METADATA: metadata}, shown.update)
    return Written(weights.parts, len(weights.leaves), weights.size, ())


def _check_stacks(weights: Weights) -> None:
    """Raises InputError for layers of several dtypes, which a checkpoint has in one array."""
    for path, leaf in weights.leaves.items():
        if len(dtypes := set(stored_dtypes(leaf))) > 1:
            raise InputError(
                f"Layers of {path} are {_listed(dtypes)}, and an Orbax checkpoint has them in one array. {_SAY_DTYPE}"
            )


def _listed(dtypes: set[np.dtype]) -> str:
    return " and ".join(sorted(map(str, dtypes)))


_SAY_DTYPE = "Say which all parameters shall have: --dtype (in Python: convert what load_model has loaded in a dtype)"


# ---- diffusers -------------------------------------------------------------------------------------------------------


def _diffusers(weights: Weights, destination: Path, shown: tqdm) -> Written:
    if (half := lacking_half(weights)) is not None:
        raise InputError(
            f"diffusers' AutoencoderTiny is encoder and decoder; the {half} is missing. Give --parts-from "
            f"taesdxl_{half}.safetensors"
        )
    alone = len(weights.parts) == 1
    whole, weights = weights, weights if alone else _as_diffusers_has_it(weights)
    destination.mkdir()
    configs = part_configs(weights.config)
    if alone:
        diffusers.write_component(configs[weights.parts[0]], destination, weights.config.micro)
    elif missing := [part for part in configs if part not in weights.parts]:
        raise InputError(
            f"A diffusers directory is a whole model, or one network; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Give --parts-from a model that has what is missing"
        )
    else:
        diffusers.write_folder(weights.config, destination)
    count, left_out = 0, set(weights.carried)
    alike = (Found.COMPONENT, Found.PART) if alone else (Found.DIFFUSERS,)
    for part in weights.parts:
        naming = theirs = weights.origin.namings.get(part)
        if naming is None or not _is_diffusers(naming):
            dialect = Dialect.DIFFUSERS if part in ("unet", "vae") else Dialect.TRANSFORMERS
            naming = Naming(dialect)
        place = "" if alone else part
        same = naming == theirs and weights.origin.layout in alike
        carried = {key: tensor for key, tensor in weights.carried.items() if same and key[0] == place}
        left_out -= carried.keys()
        configs_of = [part_configs(either.config)[part] for either in (whole, weights)]
        had, has = (names.table(config, theirs or naming).by_name for config in configs_of)
        left_out |= {(part, name) for name in had.keys() - has.keys()}
        name = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        path = destination / place / f"{name}.safetensors"
        chosen = dataclasses.replace(weights, carried=carried)
        # transformers refuses files that do not name a framework.
        count += _write_tensors(chosen, {part: naming}, path, {"format": "pt"}, shown)
    return Written(weights.parts, count, weights.size, tuple(sorted(name for _, name in left_out)))


def _is_diffusers(naming: Naming) -> bool:
    others = (Dialect.ORIGINAL, Dialect.OPENCLIP, *names.HALVES)
    return naming.dialect not in others and not naming.prefix and not naming.conv_attention


def _as_diffusers_has_it(weights: Weights) -> Weights:
    """SD 2.x without the text encoder's last layer, which nothing reads and diffusers does not have."""
    config = diffusers.as_diffusers_has_it(weights.config)
    if config == weights.config:
        return weights
    leaves: dict[str, Leaf] = {}
    for part, part_config in part_configs(config).items():
        for path, abstract in names.abstract(part_config).items():
            if (leaf := weights.leaves.get(f"{part}/{path}")) is not None:
                same = leaf.shape == abstract.shape
                leaves[f"{part}/{path}"] = leaf if same else FirstLayers(leaf, abstract.shape[0])
    return dataclasses.replace(weights, config=config, leaves=leaves)


# ---- single file -----------------------------------------------------------------------------------------------------


def _single_file(weights: Weights, destination: Path, shown: tqdm) -> Written:
    if words := [word for tower in weights.config.text if tower.name in weights.parts for word in tower.added_tokens]:
        raise InputError(
            f"A single file has no place for added words of the vocabulary, such as {words[0]}. Take them away with "
            "sdxl_jax.weights.textual_inversion.remove, or write a diffusers directory"
        )
    namings = dict(_original_namings(weights.config))
    if len(weights.parts) == 1 and weights.parts[0] != "unet":
        (part,) = weights.parts
        namings = {part: dataclasses.replace(namings[part], prefix="")}
        match part_configs(weights.config)[part]:
            case ClipTextConfig(activation=Activation.QUICK_GELU):
                namings = {part: Naming(Dialect.TRANSFORMERS)}
            case ClipTextConfig():
                namings = {part: Naming(Dialect.OPENCLIP)}
    # A network alone that others have joined is a whole model, whose file has other names.
    alone = weights.origin.layout is Found.PART and set(weights.parts) == set(weights.origin.namings)
    same = weights.origin.layout is Found.SINGLE_FILE or alone
    if same:
        namings |= weights.origin.namings
    if "vae" in weights.parts and isinstance(weights.config.vae, TinyVaeConfig):
        namings["vae"] = _tiny_naming(weights, namings["vae"])
    carried = {("", name): tensor for (part, name), tensor in weights.carried.items() if same and not part}
    carried = _with_marks(weights, carried, new=not same)
    left_out = tuple(sorted(name for part, name in weights.carried if (part, name) not in carried))
    metadata = {"format": "pt", METADATA: json.dumps(describe(weights))}
    chosen = dataclasses.replace(weights, carried=carried)
    count = _write_tensors(chosen, {part: namings[part] for part in weights.parts}, destination, metadata, shown)
    return Written(weights.parts, count, weights.size, left_out)


def _tiny_naming(weights: Weights, naming: Naming) -> Naming:
    """Of a tiny autoencoder in a single file. naming: that of the file that it came from, if it was one."""
    alone = {"encoder": Naming(Dialect.TAESD_DECODER), "decoder": Naming(Dialect.TAESD_ENCODER)}
    if len(weights.parts) > 1:
        raise InputError(
            "A single file of a whole model has no place for a tiny autoencoder. Give --parts-from the large one, or "
            "choose --to diffusers or --to orbax"
        )
    if (half := lacking_half(weights)) is not None:
        return alone[half]
    if naming.dialect is not Dialect.DIFFUSERS:
        raise InputError(
            "taesd keeps encoder and decoder in two files, whose tensors have the same names. Convert each alone, or "
            "choose --to diffusers or --to orbax for both"
        )
    return naming


def _with_marks(
    weights: Weights, carried: Mapping[tuple[str, str], Carried], new: bool
) -> dict[tuple[str, str], Carried]:
    """The empty tensors by which ComfyUI tells an SDXL that predicts v, and one with zero terminal SNR. Carried ones
    stay where the model is one; `new` ones come where the file does not follow another's."""
    config = weights.config
    new = new and config.micro is not None
    predicts_v = config.prediction is Prediction.V and "unet" in weights.parts
    marks = {("", "v_pred"): predicts_v, ("", "ztsnr"): predicts_v and config.schedule.zero_terminal_snr}
    kept = {key: tensor for key, tensor in carried.items() if marks.get(key, True)}
    empty = InMemory(np.zeros(0, np.float32))
    return kept | {key: empty for key, wanted in marks.items() if wanted and new}


def _original_namings(config: ModelConfig) -> Iterator[tuple[str, Naming]]:
    """As the published single files have it."""
    yield "unet", Naming(Dialect.ORIGINAL, "model.diffusion_model.")
    yield "vae", Naming(Dialect.ORIGINAL, "first_stage_model.", conv_attention=True)
    for number, tower in enumerate(config.text):
        prefix = "cond_stage_model." if config.micro is None else f"conditioner.embedders.{number}."
        # CLIP-L, of SD 1.x and the first of SDXL's two, comes from transformers; ViT-H and bigG from OpenCLIP.
        if config.unet.conv_projection if config.micro is None else tower.name == "text_encoder":
            yield tower.name, Naming(Dialect.TRANSFORMERS, f"{prefix}transformer.")
        else:
            yield tower.name, Naming(Dialect.OPENCLIP, f"{prefix}model.")


def _write_tensors(
    weights: Weights, namings: Mapping[str, Naming], path: Path, metadata: Mapping[str, str], shown: tqdm
) -> int:
    """Some parts and everything carried, in one file; the number of tensors."""
    configs = part_configs(weights.config)
    tables = {part: names.table(configs[part], naming) for part, naming in namings.items()}
    tensors = {name: (tensor.shape, tensor.dtype) for (_, name), tensor in weights.carried.items()}
    for part, table in tables.items():
        for entry in table.entries:
            stored = [(stored_dtypes(weights.leaves[f"{part}/{place.path}"]), place.layer) for place in entry.places]
            dtypes = {each[0 if layer is None or len(each) == 1 else layer] for each, layer in stored}
            if len(dtypes) > 1:
                raise InputError(f"{entry.name} would hold {_listed(dtypes)}. {_SAY_DTYPE}")
            tensors[entry.name] = entry.shape, dtypes.pop()
    with safetensors.Writer(path, tensors, metadata) as writer:
        for part, table in tables.items():
            for our_path, rows in table.by_path.items():
                value = weights.leaves[f"{part}/{our_path}"].read()
                for entry, number in rows:
                    layer = entry.places[number].layer
                    one = (value if layer is None else value[layer]).astype(tensors[entry.name][1], copy=False)
                    writer.put(entry.name, entry.theirs(one), number)
                shown.update(value.nbytes)
        for (_, name), tensor in weights.carried.items():
            writer.put(name, tensor.read())
    return len(tensors)
