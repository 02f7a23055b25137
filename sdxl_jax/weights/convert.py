"""`convert`: a model from one layout to another, one parameter at a time, with a model card.

    orbax         one checkpoint of our parameter tree, for `load_model` and for Orbax's own `load`
    diffusers     a directory that `DiffusionPipeline.from_pretrained` loads: weights, configurations, tokenizers
    single-file   one .safetensors in Stability's original layout, for ComfyUI and the like; of a tiny autoencoder, one
                  of its halves

The conversion back is exact, bit for bit and name for name: a layout records how its source named and shaped its
tensors, and carries along those that have no place in our model. Those that the destination has no place for either are
reported. The write is atomic: a directory beside the destination, renamed when it is complete. The model card and the
source's licence files go into the directory, or beside the file.

A destination in a bucket (gs://…) is written to a temporary local directory and then uploaded, last the object without
which none of it is taken for a model.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

import numpy as np
from etils import epath

from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.progress import tqdm
from sdxl_jax.weights import card, names
from sdxl_jax.weights.descriptions import METADATA, describe, edm_marks
from sdxl_jax.weights.formats import diffusers, orbax, safetensors
from sdxl_jax.weights.formats.checkpoints import COMMITTED
from sdxl_jax.weights.lazy import (
    Carried,
    FirstLayers,
    InMemory,
    Layout,
    Leaf,
    SourceLayout,
    Weights,
    in_memory,
    lacking_half,
    part_configs,
    stored_dtypes,
)
from sdxl_jax.weights.load import bar
from sdxl_jax.weights.names import Dialect, Naming
from sdxl_jax.weights.open import open_model
from sdxl_jax.weights.writing import listed, tensors_of, write_leaves


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of a conversion."""

    parts: tuple[str, ...]
    tensors: int
    size: int
    """Bytes of the weights."""
    left_out: tuple[str, ...]
    """Tensors of the source that the destination has no place for."""


def convert(
    source: str | PurePath | Model | Weights, destination: str | PurePath, to: Layout | str, progress: bool = True
) -> Written:
    """Writes a model in a layout.

    source: what a MODEL argument takes; or a model in memory; or the result of `open.open_model`, perhaps changed.
    destination: a new directory; for a single file, a new .safetensors file. to: "orbax", "diffusers", "single-file".

    Raises InputError before anything is written if the destination exists, or if the layout cannot hold the model, and
    MachineError if the disk has too little room, or the bucket does not answer. A conversion that fails leaves no
    files.
    """
    to, destination = Layout(to), located(destination, _WHAT)
    if in_bucket(destination):
        buckets.check_writable(destination.parent, _WHAT)
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
    if _exists(destination):
        raise InputError(f"{destination} exists already. Remove it, or choose another destination")
    if to is Layout.SINGLE_FILE:
        _check_card(destination.with_suffix(".md"))
    with _staged(destination, weights, progress) as staging:
        made = staging / destination.name
        with bar(weights, "converting", progress) as shown:
            written = write(weights, made, shown)
        licences = _copy_licences(weights, made)
        card.path_of(made).write_text(card.card(weights, to, destination.name, licences), encoding="utf-8")
    return written


_WHAT = "the destination"


def _exists(destination: AnyPath) -> bool:
    if in_bucket(destination):
        return buckets.version(destination, _WHAT) is not None or bool(buckets.files(destination, _WHAT))
    return destination.exists()


def _check_card(path: AnyPath) -> None:
    """Raises InputError where the model card would replace a file that is not one of ours."""
    content = _content(path)
    if content is not None and card.WRITTEN_BY not in content.decode(errors="replace"):
        raise InputError(
            f"{path} exists already, and is not a model card of `sdxl-jax convert`, which would be written there. Move "
            "it, or give the file another name"
        )


def _content(path: AnyPath) -> bytes | None:
    """Of a file; b"" for a folder, None where there is nothing."""
    if in_bucket(path):
        return buckets.read_bytes(path, "a file beside the model")
    return path.read_bytes() if path.is_file() else b"" if path.exists() else None


def _check_room(weights: Weights, destination: Path) -> None:
    """Raises MachineError where the disk has less room than the weights need."""
    place = next(folder for folder in destination.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(
            f"{destination} cannot be written: {place} is not a directory with write permission. Choose another "
            "destination"
        )
    free = shutil.disk_usage(place).free
    needed = weights.size + sum(math.prod(t.shape) * t.dtype.itemsize for t in weights.carried.values())
    if free < needed:
        raise MachineError(
            f"{place} has {free / 1e9:.2f} GB left, and the model needs {needed / 1e9:.2f} GB. Free space, or choose "
            "another disk or a smaller --dtype"
        )


@contextlib.contextmanager
def _staged(destination: AnyPath, weights: Weights, progress: bool) -> Iterator[Path]:
    """A directory whose files get into place at the end, or are removed."""
    if in_bucket(destination):
        with tempfile.TemporaryDirectory(prefix="sdxl-jax-convert-") as folder:
            _check_room(weights, Path(folder) / destination.name)
            yield Path(folder)
            _upload(Path(folder), destination, progress)
    else:
        _check_room(weights, Path(destination))
        with _beside(Path(destination)) as folder:
            yield folder


def _upload(folder: Path, destination: epath.Path, progress: bool) -> None:
    """The files of a folder to where the destination is. After an error no new object stays in the bucket."""
    made = folder / destination.name
    if orbax.is_checkpoint(made):
        (made / COMMITTED).write_text(f"Written by sdxl-jax convert to {destination}\n")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    # What is last makes it a model: where the model is, its licence and card are too.
    last = [made / name for name in ("config.json", "model_index.json", COMMITTED)] + [made]
    paths.sort(key=lambda path: last.index(path) if path in last else -1)
    sent: list[epath.Path] = []
    with tqdm(
        total=sum(path.stat().st_size for path in paths),
        **{"desc": "uploading", "unit": "B", "unit_scale": True, "disable": not progress, "mininterval": 0.5},
    ) as shown:
        try:
            for path in paths:
                target = destination.parent / path.relative_to(folder).as_posix()
                if buckets.version(target, _WHAT) is None:
                    sent.append(target)
                buckets.upload(path, target, _WHAT, shown.update)
        except BaseException:
            with contextlib.suppress(InputError, MachineError):  # the first error is raised
                for target in reversed(sent):
                    buckets.delete(target, _WHAT)
            raise


@contextlib.contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A directory beside the destination; its files are renamed into place at the end, or removed."""
    parents = [folder for folder in destination.absolute().parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        # The model last: where it is, its licence and card are too.
        for made in sorted(staging.iterdir(), key=lambda made: made.name == destination.name):
            os.replace(made, destination.with_name(made.name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in parents:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails where something was written


def _copy_licences(weights: Weights, made: Path) -> list[str]:
    """Into a directory; beside a file, under its name. Returns the names of the copies."""
    folder, prefix = (made, "") if made.is_dir() else (made.parent, f"{made.stem}.")
    copies = []
    for licence in weights.licences:
        place = folder / f"{prefix}{licence.name}"
        if place.exists():  # of another model, whose parts are in this one
            place = folder / f"{prefix}{licence.parent.name}.{licence.name}"
        place.write_bytes(_content(licence) or b"")
        copies.append(place.name)
    return copies


# ---- orbax -----------------------------------------------------------------------------------------------------------


def _orbax(weights: Weights, destination: Path, shown: tqdm) -> Written:
    _check_stacks(weights)
    metadata = describe(weights) | {
        "origin": to_json(weights.origin),
        "carried": [list(key) for key, tensor in weights.carried.items() if 0 not in tensor.shape],
        # Empty tensors, marks such as v_pred, which Orbax does not save.
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
                f"Layers of {path} are {listed(dtypes)}, and an Orbax checkpoint has them in one array. {_GIVE_DTYPE}"
            )


_GIVE_DTYPE = "Give one dtype for all parameters: --dtype (in Python: load_model with a dtype, and convert the result)"


# ---- diffusers -------------------------------------------------------------------------------------------------------


def _diffusers(weights: Weights, destination: Path, shown: tqdm) -> Written:
    if (half := lacking_half(weights)) is not None:
        raise InputError(
            f"diffusers' AutoencoderTiny needs encoder and decoder, and the {half} is missing. Give it too: "
            f"--parts-from taesdxl_{half}.safetensors"
        )
    alone = len(weights.parts) == 1
    given, weights = weights, weights if alone else _as_diffusers_has_it(weights)
    destination.mkdir()
    configs = part_configs(weights.config)
    if alone:
        diffusers.write_component(configs[weights.parts[0]], destination, weights.config.micro)
    elif missing := [part for part in configs if part not in weights.parts]:
        raise InputError(
            f"A diffusers directory holds a whole model, or one network; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Give --parts-from a model that has what is missing"
        )
    else:
        diffusers.write_folder(weights.config, destination)
    count, left_out = 0, set(weights.carried)
    same_layouts = (SourceLayout.COMPONENT, SourceLayout.PART) if alone else (SourceLayout.DIFFUSERS,)
    for part in weights.parts:
        naming = original = weights.origin.namings.get(part)
        if naming is None or not _is_diffusers(naming):
            dialect = Dialect.DIFFUSERS if part in ("unet", "vae") else Dialect.TRANSFORMERS
            naming = Naming(dialect)
        folder = "" if alone else part
        same = naming == original and weights.origin.layout in same_layouts
        carried = {key: tensor for key, tensor in weights.carried.items() if same and key[0] == folder}
        left_out -= carried.keys()
        before, after = (
            names.table(part_configs(each.config)[part], original or naming).by_name for each in (given, weights)
        )
        left_out |= {(part, name) for name in before.keys() - after.keys()}
        name = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        path = destination / folder / f"{name}.safetensors"
        chosen = dataclasses.replace(weights, carried=carried)
        # transformers refuses files that do not name a framework.
        count += _write_tensors(chosen, {part: naming}, path, {"format": "pt"}, shown)
    return Written(weights.parts, count, weights.size, tuple(sorted(name for _, name in left_out)))


def _is_diffusers(naming: Naming) -> bool:
    others = (Dialect.ORIGINAL, Dialect.OPENCLIP, *names.HALVES)
    return naming.dialect not in others and not naming.prefix and not naming.conv_attention


def _as_diffusers_has_it(weights: Weights) -> Weights:
    """SD 2.x without the last layer of the text encoder, which is not read and which diffusers does not have."""
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
    if added := [token for tower in weights.config.text if tower.name in weights.parts for token in tower.added_tokens]:
        raise InputError(
            f"A single file has no place for added tokens of the vocabulary, such as {added[0]}. Remove them with "
            "sdxl_jax.weights.textual_inversion.remove, or choose --to diffusers"
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
    # A network alone to which others were added is a whole model, whose file has other names.
    alone = weights.origin.layout is SourceLayout.PART and set(weights.parts) == set(weights.origin.namings)
    same = weights.origin.layout is SourceLayout.SINGLE_FILE or alone
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
    """Naming of a tiny autoencoder in a single file. naming: that of the source, if it was a file."""
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
    """The empty tensors by which ComfyUI recognises an SDXL with v-prediction, and one with zero terminal SNR, and
    those of EDM's noise levels. Carried marks stay if they are true of the model; new: add missing marks, if the names
    do not follow another file's."""
    config = weights.config
    new = new and config.micro is not None
    predicts_v = config.prediction is Prediction.V and config.noise is None and "unet" in weights.parts
    marks = {("", "v_pred"): predicts_v, ("", "ztsnr"): predicts_v and config.schedule.zero_terminal_snr}
    valid = {key: tensor for key, tensor in carried.items() if marks.get(key, True)}
    empty = InMemory(np.zeros(0, np.float32))
    continuous = {("", name): InMemory(value) for name, value in edm_marks(config).items() if new}
    return continuous | valid | {key: empty for key, is_true in marks.items() if is_true and new}


def _original_namings(config: ModelConfig) -> Iterator[tuple[str, Naming]]:
    """Namings of the parts in the published single files."""
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
    """Writes some parts and all carried tensors into one file; returns the number of tensors."""
    configs = part_configs(weights.config)
    tables = {part: names.table(configs[part], naming) for part, naming in namings.items()}
    tensors = {name: (tensor.shape, tensor.dtype) for (_, name), tensor in weights.carried.items()}
    for part, table in tables.items():
        tensors |= tensors_of(part, table, weights.leaves, _GIVE_DTYPE)
    with safetensors.Writer(path, tensors, metadata) as writer:
        for part, table in tables.items():
            write_leaves(writer, part, table, weights.leaves, tensors, shown.update)
        for (_, name), tensor in weights.carried.items():
            writer.put(name, tensor.read())
    return len(tensors)
