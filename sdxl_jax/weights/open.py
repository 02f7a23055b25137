"""`open_model`: the model at a path, whose layout is detected. Only headers are read: configuration, names and shapes.

    a run directory, or RUN/checkpoints/STEP in one   the averaged weights
    an Orbax checkpoint                               that `sdxl-jax convert --to orbax` wrote
    a diffusers directory                             model_index.json; whole, sharded, or variant files
    a .safetensors file                               a whole model in Stability's original layout
    one network alone                                 UNet, VAE or text encoder: a directory or a file
    half a network                                    encoder or decoder of a tiny VAE: a file

`load` reads the parameters to devices, `convert` writes them in another layout, `parts` replaces parts by another
model's. What files say about their model is in `descriptions`, what names and shapes imply in `detect`.

In a bucket (gs://…), checkpoints and small files are read where they are; .safetensors files are copied to the local
disk first (`formats.local_copies`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np

from sdxl_jax.adapters import changes
from sdxl_jax.adapters.embeddings import TABLE
from sdxl_jax.arrays import BaseDtype, unflatten
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, absolute, in_bucket, located
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json
from sdxl_jax.model import SD1, SDXL_BASE, ModelConfig
from sdxl_jax.models.clip import ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.weights import descriptions, detect, names
from sdxl_jax.weights.adapter_files.names import layers_of
from sdxl_jax.weights.descriptions import METADATA, licences_in
from sdxl_jax.weights.detect import FoundPart
from sdxl_jax.weights.eight_bits import with_numbers
from sdxl_jax.weights.formats import checkpoints, diffusers, diffusers_fields, json_files, orbax, run, safetensors
from sdxl_jax.weights.formats.safetensors import Tensor
from sdxl_jax.weights.lazy import (
    Carried,
    Cast,
    Changed,
    Initial,
    InMemory,
    Leaf,
    Origin,
    Provenance,
    SourceLayout,
    Weights,
    WithRows,
    abstract_leaves,
    leaves_of,
    part_configs,
)
from sdxl_jax.weights.names import Dialect, Naming, PartConfig
from sdxl_jax.weights.parts import with_parts


@dataclasses.dataclass(frozen=True)
class OpenOptions:
    """What the user may say about a model where its files leave it open."""

    variant: str | None = None
    """Variant of a diffusers directory's weight files: "fp16" for *.fp16.safetensors; None: the files without one."""
    prediction: Prediction | None = None
    """What the UNet outputs, where the files do not say; None: as they say."""
    allow_partial: bool = False
    """Load the tensors that fit, with initial values for missing parameters. Otherwise a misfit is an error."""
    raw: bool = False
    """Of a run: the trained weights instead of their average."""
    has_options: bool = True
    """Whether the user can give these where the model is opened. A training run does not take them, and its messages
    name `sdxl-jax convert`, which does."""

    def remedy(self, path: AnyPath, option: str) -> str:
        """How the user gives one of these for a path. option: as on the command line."""
        if self.has_options:
            return f"give {option} (in Python: {option.split()[0].removeprefix('--').replace('-', '_')}=…)"
        return f"make a new model with `sdxl-jax convert {path} NEW --to orbax {option}`, and train from that"


def open_model(
    path: str | PurePath, options: OpenOptions = OpenOptions(), parts_from: Sequence[str | PurePath] = ()
) -> Weights:
    """The model at a path: its configuration, and parameters that are not read yet.

    Raises InputError and MachineError as `load_model`.
    """
    weights = _open(located(path, "the model"), options)
    for other in parts_from:
        weights = with_parts(weights, _open(located(other, "the model of other parts"), options), other)
    if options.raw and weights.origin.layout is not SourceLayout.RUN:
        raise InputError(f"--weights raw has no effect on {path}, which is not a training run. Leave it out")
    if options.prediction is None:
        return weights
    config = descriptions.predicting(weights.config, options.prediction, path)
    return dataclasses.replace(weights, config=config)


def _open(path: AnyPath, options: OpenOptions) -> Weights:
    """One model, with what its files say of its origin."""
    with buckets.answering(path, "the model") if in_bucket(path) else contextlib.nullcontext():
        weights = _open_layout(path, options)
        source = dataclasses.replace(weights.provenance, name=weights.provenance.name or absolute(path).name)
        return dataclasses.replace(weights, licence=descriptions.stated_licence(path), provenance=source)


def _open_layout(path: AnyPath, options: OpenOptions) -> Weights:
    whole = absolute(path)
    if whole.name.isdecimal() and whole.parent.name == "checkpoints":
        return _open_run(whole.parents[1], int(whole.name), options.raw)
    if path.is_file():
        return _open_file(path, options)
    if not path.is_dir():
        safetensors.refuse_pickle(path)
        raise InputError(f"There is nothing at {path}. Expected {_EXPECTED}")
    if (path / "model_index.json").is_file():
        return _open_diffusers(path, options)
    if orbax.is_checkpoint(path):
        return _open_orbax(path)
    if (path / "config.json").is_file():
        if (kind := diffusers_fields.component_kind(json_files.read(path / "config.json"))) is not None:
            return _open_component(path, kind, options)
        return _open_run(path, None, options.raw)
    if pickles := sorted(file for file in path.iterdir() if file.suffix.lower() in safetensors.PICKLES):
        safetensors.refuse_pickle(pickles[0])
    files = sorted(file.name for file in path.glob("*.safetensors"))
    hint = f". It has {', '.join(files[:3])}: give the file itself" if files else ""
    raise InputError(f"There is no model at {path}. Expected {_EXPECTED}{hint}")


_EXPECTED = (
    "a run directory of `sdxl-jax train`, or RUN/checkpoints/STEP in one; an Orbax checkpoint of `sdxl-jax convert`; a "
    "diffusers directory (model_index.json); a .safetensors file; or one network's directory or file"
)


# ---- our own layouts -------------------------------------------------------------------------------------------------


def _open_run(run_dir: AnyPath, step: int | None, raw: bool) -> Weights:
    """The averaged weights of a checkpoint, or the parameters if the run has no average. step: None for the newest.
    raw: the parameters in any case."""
    trained = run.trained(run_dir)
    config = trained.config
    arrays = checkpoints.arrays(run_dir)
    known = checkpoints.steps(arrays / "checkpoints")
    if not known:
        raise InputError(f"{run_dir} has no checkpoint yet. Resume the run, or wait for its first checkpoint")
    chosen = known[-1] if step is None else step
    path = arrays / "checkpoints" / str(chosen)
    if chosen not in known:
        listed = ", ".join(map(str, known[-8:]))
        raise InputError(f"{run_dir} has no checkpoint of step {chosen}. Give one of its newest: {listed}")
    state = orbax.leaves(path, run.metadata(path)[0])
    has_average = not raw and any(name.startswith("ema/") for name in state)
    prefix = "ema/" if has_average else "params/"
    leaves: dict[str, Leaf] = {
        name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)
    }
    expected = abstract_leaves(config, trained.parts).keys()
    factors = {name: leaf for name, leaf in leaves.items() if name.startswith(_ADAPTERS)}
    vectors = {name: leaf for name, leaf in leaves.items() if name.startswith(_EMBEDDINGS)}
    leaves = {name: leaf for name, leaf in leaves.items() if name not in factors | vectors}
    if leaves.keys() != expected:
        frozen = orbax.leaves(arrays / "frozen", orbax.metadata(arrays / "frozen")[0])
        # Networks of the loss are there too.
        leaves |= {name: leaf for name, leaf in frozen.items() if name.split("/")[0] in part_configs(config)}
        factors |= {name: leaf for name, leaf in frozen.items() if factors and name.startswith(_ADAPTERS)}
    in_eight_bits = {name for name, leaf in leaves.items() if leaf.dtype == np.int8}
    leaves = with_numbers(leaves)
    for name, rows in vectors.items():
        table = f"{name.split('/')[1]}/{TABLE}"
        leaves[table] = WithRows(leaves[table], rows)
    unfinished = step is None and chosen < trained.steps
    notes = (f"{run_dir} is at step {chosen} of {trained.steps}",) if unfinished else ()
    name = absolute(run_dir).name
    merged = (f"{name} × 1",) if factors else ()
    provenance = Provenance(name, chosen, trained.steps, has_average, trained.commit, merged=merged)
    complete = _complete(config, leaves, path, trained.parts)
    complete = _with_adapters(config, complete, factors) if factors else complete
    narrow = np.dtype(BaseDtype.INT8.dtype)  # as what else of such a base there is
    return Weights(
        config,
        {name: Cast(leaf, narrow, name) if name in in_eight_bits else leaf for name, leaf in complete.items()},
        Origin(SourceLayout.RUN),
        licences=licences_in(run_dir),
        notes=notes,
        provenance=provenance,
    )


_ADAPTERS = "adapters/"
"""What the factors of an adapter that a run trains are below, beside its frozen model."""
_EMBEDDINGS = "embeddings/"
"""The same of the embedding vectors of a new token."""


def _with_adapters(config: ModelConfig, leaves: Mapping[str, Leaf], factors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The base's parameters with the changes of the adapter merged into them as they are read."""
    layers = layers_of(config)
    tree = unflatten({name.removeprefix(_ADAPTERS): leaf.read() for name, leaf in factors.items()})
    resolved = changes.untree(tree, layers)

    def changed(path: str, leaf: Leaf) -> Changed:
        return Changed(leaf, lambda value: changes.changed(value, resolved[path], 1.0), leaf.dtype)

    return {path: changed(path, leaf) if path in resolved else leaf for path, leaf in leaves.items()}


def _open_orbax(path: AnyPath) -> Weights:
    tree, custom = orbax.metadata(path)
    described = custom.get(METADATA)
    if not isinstance(described, dict) or "model" not in described:
        raise InputError(
            f"{path} is an Orbax checkpoint whose metadata does not describe a model. Give one that `sdxl-jax convert "
            "--to orbax` wrote, or the run directory that it belongs to"
        )
    config = from_json(described["model"], ModelConfig)
    found = orbax.leaves(path, tree)
    keys = [(part, name) for part, name in described.get("carried", [])]
    carried: dict[tuple[str, str], Carried] = {key: found.pop(f"carried/{n}") for n, key in enumerate(keys)}
    for part, name, dtype, shape in described.get("empty", []):
        carried[part, name] = InMemory(np.zeros(shape, dtype))
    parts = [part for part in part_configs(config) if part in tree]
    if isinstance(config.vae, TinyVaeConfig) and len(halves := list(tree.get("vae", ()))) == 1:
        parts[parts.index("vae")] = f"vae/{halves[0]}"
    origin = from_json(described["origin"], Origin)
    return Weights(config, _complete(config, found, path, parts), origin, carried, licences_in(path))


def _complete(
    config: ModelConfig, leaves: Mapping[str, Leaf], where: AnyPath, parts: Sequence[str] | None = None
) -> dict[str, Leaf]:
    """The parameters in our order. Raises InputError unless they are exactly those of the configuration."""
    expected = abstract_leaves(config, parts)
    have, want = ({path: tuple(leaf.shape) for path, leaf in tree.items()} for tree in (leaves, expected))
    if different := differences(have, want):
        raise InputError(
            f"The checkpoint {where} does not fit this configuration: {len(different)} arrays differ, the first is "
            f"{different[0]} (stored -> expected). Restore the files of the run, or convert the model again"
        )
    return {path: leaves[path] for path in expected}


# ---- other people's layouts ------------------------------------------------------------------------------------------


def _open_diffusers(path: AnyPath, options: OpenOptions) -> Weights:
    config = diffusers.read_model_config(path)
    leaves, carried, namings, notes = {}, {}, {}, []
    configs = part_configs(config)
    # As in diffusers, some parts may lack a variant that others have.
    lacking = [part for part in configs if options.variant not in _variants(path / part)]
    lacking = lacking if len(lacking) < len(configs) else []
    for part, part_config in configs.items():
        variant = options.variant
        if variant is not None and part in lacking:
            notes.append(f"{path / part} has no variant {variant}; its files without a variant are read")
            variant = None
        tensors = _weight_files(path / part, dataclasses.replace(options, variant=variant))
        found = _match(part, part_config, None, tensors, path / part, options)
        leaves |= found.leaves
        notes += found.notes
        namings[part] = found.naming
        carried |= {(part, name): tensor for name, tensor in found.carried.items()}
    notes += diffusers.unfollowed(path)
    if unused := diffusers.unused_components(path):
        notes.append(f"not read, because nothing here uses it: {', '.join(unused)}")
    return Weights(config, leaves, Origin(SourceLayout.DIFFUSERS, namings), carried, licences_in(path), tuple(notes))


def _open_component(path: AnyPath, kind: str, options: OpenOptions) -> Weights:
    """One network's directory, as diffusers and transformers write it."""
    part_config = _component_config(path / "config.json", kind)
    tensors = _weight_files(path, options)
    part, config = _around(part_config)
    if kind == "unet" and config.micro is not None:
        dim, _ = diffusers_fields.unet_surroundings(json_files.read(path / "config.json"), str(path), 128)
        config = dataclasses.replace(config, micro=dataclasses.replace(config.micro, embedding_dim=dim))
    found = _match(part, part_config, None, tensors, path, options)
    carried = {("", name): tensor for name, tensor in found.carried.items()}
    origin = Origin(SourceLayout.COMPONENT, {part: found.naming})
    return Weights(
        config, found.leaves, origin, carried, licences_in(path), tuple(found.notes), noise_is_known=kind != "unet"
    )


def _component_config(path: AnyPath, kind: str) -> PartConfig:
    read = {
        "unet": diffusers_fields.unet_config,
        "vae": diffusers_fields.vae_config,
        "text_encoder": diffusers_fields.clip_config,
    }[kind]
    return read(json_files.read(path), str(path))


def _around(part_config: PartConfig) -> tuple[str, ModelConfig]:
    """For a network alone: (key of the part, the nearest published model with that part replaced)."""
    match part_config:
        case UNetConfig():
            return "unet", dataclasses.replace(detect.nearest(part_config, ()), unet=part_config)
        case VaeConfig():
            base = SD1 if part_config.scale == SD1.vae.scale else SDXL_BASE
            return "vae", dataclasses.replace(base, vae=part_config)
        case TinyVaeConfig():
            return "vae", dataclasses.replace(SDXL_BASE, vae=part_config)
        case ClipTextConfig():
            base = detect.nearest(None, [part_config])
            tower = detect.by_width(base.text, part_config)
            towers = tuple(detect.with_clip(t, part_config) if t.name == tower.name else t for t in base.text)
            return tower.name, dataclasses.replace(base, text=towers)


def _open_file(path: AnyPath, options: OpenOptions) -> Weights:
    """A safetensors file of a whole model, or of one network, in any known naming."""
    tensors, metadata = safetensors.open_file(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    namings = detect.namings(shapes)
    if not namings:
        near = nearest_first("model.diffusion_model.time_embed.0.weight", tensors)[:1]
        raise InputError(
            f"{path} holds {len(tensors)} tensors{f', such as {near[0]},' if near else ''} but no UNet, VAE or CLIP "
            "text encoder that is known. Give a model's file. A LoRA or a textual inversion is not a model by itself: "
            "`sdxl-jax sample` takes them beside a model, as --lora or --embedding"
        )
    notes: list[str] = []
    scale_is_known = True
    descriptions.check_noise(tensors, path)
    if METADATA in metadata:
        config, parts = descriptions.read_description(metadata[METADATA], namings, path)
    else:
        config, parts = detect.assemble(detect.find(shapes))
        alone = next(iter(parts)) if len(parts) == 1 else None
        beside = path.parent / "config.json"
        fields = json_files.read(beside, optional=True) if alone is not None else {}
        kind = diffusers_fields.component_kind(fields)
        if kind is not None and isinstance(part_config := _component_config(beside, kind), namings[0][0]):
            alone, config = _around(part_config)
            parts = {alone: FoundPart(part_config, namings[0][1])}
        elif alone == "vae" and isinstance(config.vae, VaeConfig):
            scale_is_known = False
            notes.append(f"{path} does not say the scale of its latents, as a directory with config.json does")
        descriptions.check_groups(parts, path)
    carried = {name: tensor for name, tensor in tensors.items() if detect.is_carried(name)}
    leaves, matched = _match_parts(
        parts, {name: tensors[name] for name in tensors.keys() - carried.keys()}, path, options
    )
    notes += matched
    if ema := [name for name in carried if name.startswith("model_ema.")]:
        notes.append(f"{len(ema)} tensors of a moving average (model_ema) are not used")
    layout = SourceLayout.SINGLE_FILE if "unet" in parts and len(parts) > 1 else SourceLayout.PART
    origin = Origin(layout, {part: place.naming for part, place in parts.items()})
    named: dict[tuple[str, str], Carried] = {("", name): tensor for name, tensor in carried.items()}
    ordered = {path: leaves[path] for part in part_configs(config) for path in leaves if path.startswith(f"{part}/")}
    weights = Weights(config, ordered, origin, named, licences_in(path), tuple(notes), scale_is_known)
    if METADATA in metadata:
        return weights
    if set(parts) == set(part_configs(config)):
        try:
            config.check()
        except InputError as error:
            raise InputError(f"The parts of {path} do not fit together: {error}") from error
    remedy = options.remedy(path, "--prediction NAME")
    return descriptions.with_marks(weights, metadata, path, options.prediction, remedy)


def _match_parts(
    parts: dict[str, FoundPart], tensors: dict[str, Tensor], path: AnyPath, options: OpenOptions
) -> tuple[dict[str, Leaf], list[str]]:
    """(leaves, notes) of the parts of a file, each of which owns the tensors with its prefix."""
    leaves, notes, left = dict[str, Leaf](), list[str](), set(tensors)
    # Parts without a prefix own what no other part does.
    for part, place in sorted(parts.items(), key=lambda item: -len(item[1].naming.prefix)):
        own = {name: tensors[name] for name in left if place.owns(name)}
        left -= own.keys()
        matched = _match(part, place.config, place.naming, own, path, options)
        leaves |= matched.leaves
        notes += matched.notes
    if left:
        first = sorted(left)[0]
        message = f"{path} has {len(left)} tensors that no part of the model owns, the first is {first}"
        if not options.allow_partial:
            raise names.Mismatch(
                f"{message}. It may have additions that are not implemented. {_partial_remedy(path, options)}"
            )
        notes.append(f"{message}; left out")
    return leaves, notes


@dataclasses.dataclass(frozen=True)
class _Matched:
    leaves: dict[str, Leaf]
    carried: dict[str, Tensor]
    naming: Naming
    notes: list[str]


def _partial_remedy(path: AnyPath, options: OpenOptions) -> str:
    return f"To load what fits, and leave the rest out, {options.remedy(path, '--allow-partial')}"


_FIRST_CHOICE = {
    UNetConfig: Dialect.DIFFUSERS,
    VaeConfig: Dialect.DIFFUSERS,
    TinyVaeConfig: Dialect.DIFFUSERS,
    ClipTextConfig: Dialect.TRANSFORMERS,
}


def _match(
    part: str,
    part_config: PartConfig,
    naming: Naming | None,
    tensors: Mapping[str, Tensor],
    where: AnyPath,
    options: OpenOptions,
) -> _Matched:
    """A part's parameters among the tensors that should be its own. naming: None to detect it."""
    carried = {name: tensor for name, tensor in tensors.items() if detect.is_carried(name)}
    own = {name: tensor for name, tensor in tensors.items() if name not in carried}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if naming is None:
        namings = [naming for kind, naming in detect.namings(shapes) if kind is type(part_config)]
        naming = namings[0] if namings else Naming(_FIRST_CHOICE[type(part_config)])
    table = names.table(part_config, naming)
    notes = []
    if options.allow_partial:
        fit = {name for name in own if name in table.by_name and table.by_name[name].shape == shapes[name]}
        if unfit := sorted(own.keys() - fit):
            notes.append(f"{where}: {len(unfit)} tensors do not fit and are left out: {', '.join(unfit)}")
        own = {name: own[name] for name in own if name in fit}
    else:
        try:
            names.compare(table, shapes, str(where))
        except names.Mismatch as error:
            raise names.Mismatch(f"{error}. {_partial_remedy(where, options)}") from error
    leaves = leaves_of(part, table, own, where)
    if missing := [path for path in table.abstract if f"{part}/{path}" not in leaves]:
        leaves |= {f"{part}/{path}": Initial(table.abstract[path], f"{part}/{path}", 0) for path in missing}
        notes.append(f"{where}: {len(missing)} parameters have their initial values: {', '.join(missing)}")
    return _Matched({f"{part}/{path}": leaves[f"{part}/{path}"] for path in table.abstract}, carried, naming, notes)


def _variants(folder: AnyPath) -> dict[str, dict[str, AnyPath]]:
    """The weight files of one network's directory, by variant ("" for those without): whole, index, a shard.

    Raises InputError for a directory without weights, or with pickles alone.
    """
    if not folder.is_dir():
        raise InputError(f"There is no directory {folder}, which model_index.json lists. Download it too")
    variants: dict[str, dict[str, AnyPath]] = {}
    for file in sorted(folder.iterdir()):
        if found := _WEIGHTS.fullmatch(file.name):
            kind = "index" if found["index"] else "shard" if found["shard"] else "whole"
            variants.setdefault(found["variant"] or found["late"] or "", {})[kind] = file
    if not variants:
        if pickles := [file for file in sorted(folder.iterdir()) if file.suffix.lower() in safetensors.PICKLES]:
            safetensors.refuse_pickle(pickles[0])
        raise InputError(f"{folder} has no weights (*.safetensors). Download them too")
    return variants


def _weight_files(folder: AnyPath, options: OpenOptions) -> dict[str, Tensor]:
    """The tensors of one network's directory: of one file, or of its shards.

    Raises InputError as `_variants`, and for a directory without the variant, or with several to choose from.
    """
    choices, variant = _variants(folder), options.variant
    known = ", ".join(name or "(none)" for name in choices)
    if variant is None:
        variant = "" if "" in choices else next(iter(choices)) if len(choices) == 1 else None
        if variant is None:
            raise InputError(
                f"{folder} has several variants, {known}. Choose one: {options.remedy(folder, '--variant NAME')}"
            )
    elif variant not in choices:
        raise InputError(f"{folder} has no variant {variant}. Give one of those that it has: {known}")
    files = choices[variant]
    if "index" in files:
        return safetensors.open_index(files["index"])[0]
    if "whole" in files:
        return safetensors.open_file(files["whole"])[0]
    raise InputError(
        f"{folder} has shards, such as {files['shard'].name}, but no index that lists them. Download the "
        "*.safetensors.index.json too"
    )


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<late>\w+))?\.json)?"
)
