"""`open_model`: what is at a path, found out, not asked. Configuration and parameters, of which only headers are read.

    a run directory, or RUN/checkpoints/STEP in one   the averaged weights
    an Orbax checkpoint                               that `sdxl-jax convert --to orbax` wrote
    a diffusers directory                             model_index.json; whole, sharded, or variant files
    a .safetensors file                               a whole model in Stability's original layout
    one network alone                                 UNet, VAE or text encoder: a directory or a file
    half a network                                    encoder or decoder of a tiny VAE: a file

`load` reads the parameters to devices, `convert` writes them in another layout.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sdxl_jax import model as models
from sdxl_jax.arrays import flatten
from sdxl_jax.conditioning.text import ContextState, Tower
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files.paths import local
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.clip import ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
from sdxl_jax.weights import detect, names
from sdxl_jax.weights.formats import diffusers, diffusers_fields, json_files, orbax, run, safetensors
from sdxl_jax.weights.formats.safetensors import Tensor
from sdxl_jax.weights.lazy import (
    Carried,
    Found,
    Initial,
    InMemory,
    Leaf,
    Origin,
    Weights,
    lacking_half,
    leaves_of,
    part_configs,
)
from sdxl_jax.weights.names import Dialect, Naming, PartConfig

METADATA = "sdxl_jax"
"""Where files and checkpoints that we write say what they hold."""


@dataclasses.dataclass(frozen=True)
class OpenOptions:
    """What the user may say of a model that is opened."""

    variant: str | None = None
    """Which of several files of a diffusers directory: "fp16" for *.fp16.safetensors; None: the files without one."""
    prediction: Prediction | None = None
    """What the UNet outputs, where the files do not tell; None: as they tell."""
    allow_partial: bool = False
    """Take what fits; what is missing has its initial value. Otherwise it is an error."""
    has_options: bool = True
    """Whether the user can say these things where the model is opened. A training run cannot be told them, and its
    messages name `sdxl-jax convert`, which can."""

    def way_out(self, path: Path, option: str) -> str:
        """How the user says one of these things of a path. option: as on the command line."""
        if self.has_options:
            return f"give {option} (in Python: {option.split()[0].removeprefix('--').replace('-', '_')}=…)"
        return f"make a new model with `sdxl-jax convert {path} NEW --to orbax {option}`, and train from that"


def open_model(
    path: str | Path, open_options: OpenOptions = OpenOptions(), parts_from: Sequence[str | Path] = ()
) -> Weights:
    """What is at a path: configuration and parameters that are not read yet.

    Raises InputError as `load_model`.
    """
    weights = _open(local(path, "the model"), open_options)
    for other in parts_from:
        weights = _with_parts(weights, _open(local(other, "the model of other parts"), open_options), other)
    if open_options.prediction is None:
        return weights
    # What the user says has the last word.
    return dataclasses.replace(weights, config=dataclasses.replace(weights.config, prediction=open_options.prediction))


def _open(path: Path, open_options: OpenOptions) -> Weights:
    absolute = path.absolute()
    if absolute.name.isdecimal() and absolute.parent.name == "checkpoints":
        return _open_run(absolute.parents[1], int(absolute.name))
    if path.is_file():
        return _open_file(path, open_options)
    if not path.is_dir():
        safetensors.refuse_pickle(path)
        raise InputError(f"There is nothing at {path}. Expected {_EXPECTED}")
    if (path / "model_index.json").is_file():
        return _open_diffusers(path, open_options)
    if orbax.is_checkpoint(path):
        return _open_orbax(path)
    if (path / "config.json").is_file():
        if (kind := diffusers_fields.component_kind(json_files.read(path / "config.json"))) is not None:
            return _open_component(path, kind, open_options)
        return _open_run(path, None)
    if pickles := sorted(file for file in path.iterdir() if file.suffix.lower() in safetensors.PICKLES):
        safetensors.refuse_pickle(pickles[0])
    files = sorted(file.name for file in path.glob("*.safetensors"))
    hint = f" It has {', '.join(files[:3])}: give the file itself" if files else ""
    raise InputError(f"There is no model at {path}. Expected {_EXPECTED}.{hint}")


_EXPECTED = (
    "a run directory of `sdxl-jax train`, or RUN/checkpoints/STEP in one; an Orbax checkpoint of `sdxl-jax convert`; a "
    "diffusers directory (model_index.json); a .safetensors file; or one network's directory or file"
)


# ---- our own layouts -------------------------------------------------------------------------------------------------


def _open_run(run_dir: Path, step: int | None) -> Weights:
    """The averaged weights of a step, or the parameters where the run has no average. step: None for the newest."""
    trained = run.trained(run_dir)
    config = trained.config
    newest = run.latest_step(run_dir / "checkpoints")
    asked, step = step, newest if step is None else step
    if step is None or newest is None:
        raise InputError(f"{run_dir} has no checkpoint yet. Train on, or wait for the first")
    path = run_dir / "checkpoints" / str(step)
    if not path.is_dir():
        raise InputError(f"{run_dir} has no checkpoint of step {step}. Its newest is that of {newest}")
    state = orbax.leaves(path, run.metadata(path)[0])
    sampled = "ema/" if any(name.startswith("ema/") for name in state) else "params/"
    leaves = {name.removeprefix(sampled): leaf for name, leaf in state.items() if name.startswith(sampled)}
    if leaves.keys() != _expected(config, trained.parts).keys():
        leaves |= orbax.leaves(run_dir / "frozen", orbax.metadata(run_dir / "frozen")[0])
    steps = trained.steps
    notes = (f"{run_dir} is at step {step} of {steps}",) if asked is None and step < steps else ()
    return Weights(
        config, _complete(config, leaves, path, trained.parts), Origin(Found.RUN), {}, licences_in(run_dir), notes
    )


def _open_orbax(path: Path) -> Weights:
    tree, custom = orbax.metadata(path)
    described = custom.get(METADATA)
    if not isinstance(described, dict) or "model" not in described:
        raise InputError(
            f"{path} is an Orbax checkpoint, but not one of a model: it does not say which. Give one of `sdxl-jax "
            "convert --to orbax`, or the run directory that it belongs to"
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
    config: ModelConfig, leaves: Mapping[str, Leaf], where: Path, parts: Sequence[str] | None = None
) -> dict[str, Leaf]:
    """The parameters in our order. Raises InputError unless they are just those of the configuration."""
    expected = _expected(config, parts)
    have, want = ({path: tuple(leaf.shape) for path, leaf in tree.items()} for tree in (leaves, expected))
    if different := differences(have, want):
        raise InputError(
            f"The checkpoint {where} does not fit this configuration: {len(different)} arrays differ, the first is "
            f"{different[0]} (stored -> expected). Restore the files of the run, or convert the model again"
        )
    return {path: leaves[path] for path in expected}


def _expected(config: ModelConfig, parts: Sequence[str] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by path, or those of them that are below some keys."""
    below = tuple(f"{part}/" for part in (part_configs(config) if parts is None else parts))
    return {
        f"{part}/{path}": leaf
        for part, part_config in part_configs(config).items()
        for path, leaf in names.abstract(part_config).items()
        if f"{part}/{path}".startswith(below)
    }


# ---- other people's layouts ------------------------------------------------------------------------------------------


def _open_diffusers(path: Path, open_options: OpenOptions) -> Weights:
    config = diffusers.read_model_config(path)
    leaves, carried, namings, notes = {}, {}, {}, []
    configs = part_configs(config)
    # As in diffusers, some parts may lack a variant that others have.
    lacking = [part for part in configs if open_options.variant not in _variants(path / part)]
    lacking = lacking if len(lacking) < len(configs) else []
    for part, part_config in configs.items():
        variant = open_options.variant
        if variant is not None and part in lacking:
            notes.append(f"{path / part} has no variant {variant}; its files without a variant are read")
            variant = None
        tensors = _weight_files(path / part, dataclasses.replace(open_options, variant=variant))
        found = _match(part, part_config, None, tensors, path / part, open_options)
        leaves |= found.leaves
        notes += found.notes
        namings[part] = found.naming
        carried |= {(part, name): tensor for name, tensor in found.carried.items()}
    notes += diffusers.unfollowed(path)
    if unused := diffusers.unused_components(path):
        notes.append(f"not read, because nothing here uses it: {', '.join(unused)}")
    return Weights(config, leaves, Origin(Found.DIFFUSERS, namings), carried, licences_in(path), tuple(notes))


def _open_component(path: Path, kind: str, open_options: OpenOptions) -> Weights:
    """One network's directory, as diffusers and transformers write it."""
    part_config = _component_config(path / "config.json", kind)
    tensors = _weight_files(path, open_options)
    part, config = _around(part_config)
    if kind == "unet" and config.micro is not None:
        dim, _ = diffusers_fields.unet_surroundings(json_files.read(path / "config.json"), str(path), 128)
        config = dataclasses.replace(config, micro=dataclasses.replace(config.micro, embedding_dim=dim))
    found = _match(part, part_config, None, tensors, path, open_options)
    carried = {("", name): tensor for name, tensor in found.carried.items()}
    origin = Origin(Found.COMPONENT, {part: found.naming})
    return Weights(
        config, found.leaves, origin, carried, licences_in(path), tuple(found.notes), tells_noise=kind != "unet"
    )


def _component_config(path: Path, kind: str) -> PartConfig:
    read = {
        "unet": diffusers_fields.unet_config,
        "vae": diffusers_fields.vae_config,
        "text_encoder": diffusers_fields.clip_config,
    }[kind]
    return read(json_files.read(path), str(path))


def _around(part_config: PartConfig) -> tuple[str, ModelConfig]:
    """(key of the part, the nearest published model with that part in it) of a network alone."""
    match part_config:
        case UNetConfig():
            return "unet", dataclasses.replace(detect.nearest(part_config, ()), unet=part_config)
        case VaeConfig():
            base = models.SD1 if part_config.scale == models.SD1.vae.scale else models.SDXL_BASE
            return "vae", dataclasses.replace(base, vae=part_config)
        case TinyVaeConfig():
            return "vae", dataclasses.replace(models.SDXL_BASE, vae=part_config)
        case ClipTextConfig():
            base = detect.nearest(None, [part_config])
            tower = detect.by_width(base.text, part_config)
            towers = tuple(detect.with_clip(t, part_config) if t.name == tower.name else t for t in base.text)
            return tower.name, dataclasses.replace(base, text=towers)


def _open_file(path: Path, open_options: OpenOptions) -> Weights:
    """A safetensors file of a whole model, or of one network, in anybody's naming."""
    tensors, metadata = safetensors.open_file(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    namings = detect.namings(shapes)
    if not namings:
        near = nearest_first("model.diffusion_model.time_embed.0.weight", tensors)[:1]
        raise InputError(
            f"{path} holds {len(tensors)} tensors{f', such as {near[0]},' if near else ''} but no UNet, VAE or CLIP "
            "text encoder that is known. A LoRA or a textual inversion is no model by itself: with a model, "
            "`sdxl-jax sample` takes them as --lora or --embedding"
        )
    notes: list[str] = []
    tells_scale = True
    _check_noise(tensors, path)
    if METADATA in metadata:
        config, parts = _described(metadata[METADATA], namings, path)
    else:
        config, parts = detect.assemble(detect.find(shapes))
        alone = next(iter(parts)) if len(parts) == 1 else None
        beside = path.parent / "config.json"
        fields = json_files.read(beside, optional=True) if alone is not None else {}
        kind = diffusers_fields.component_kind(fields)
        if kind is not None and isinstance(part_config := _component_config(beside, kind), namings[0][0]):
            alone, config = _around(part_config)
            parts = {alone: detect.Found(part_config, namings[0][1])}
        elif alone == "vae" and isinstance(config.vae, VaeConfig):
            tells_scale = False
            notes.append(f"{path} does not say the scale of its latents, as a directory with config.json does")
        _check_groups(parts, path)
    carried = {name: tensor for name, tensor in tensors.items() if detect.is_carried(name)}
    leaves, matched = _match_parts(
        parts, {name: tensors[name] for name in tensors.keys() - carried.keys()}, path, open_options
    )
    notes += matched
    if ema := [name for name in carried if name.startswith("model_ema.")]:
        notes.append(f"{len(ema)} tensors of a moving average (model_ema) are not used")
    layout = Found.SINGLE_FILE if "unet" in parts and len(parts) > 1 else Found.PART
    origin = Origin(layout, {part: place.naming for part, place in parts.items()})
    named: dict[tuple[str, str], Carried] = {("", name): tensor for name, tensor in carried.items()}
    ordered = {path: leaves[path] for part in part_configs(config) for path in leaves if path.startswith(f"{part}/")}
    weights = Weights(config, ordered, origin, named, licences_in(path), tuple(notes), tells_scale)
    if METADATA in metadata:
        return weights
    if set(parts) == set(part_configs(config)):
        try:
            config.check()
        except InputError as error:
            raise InputError(f"The parts of {path} do not fit together: {error}") from error
    return _marked(weights, metadata, path, open_options)


def _match_parts(
    parts: dict[str, detect.Found], tensors: dict[str, Tensor], path: Path, open_options: OpenOptions
) -> tuple[dict[str, Leaf], list[str]]:
    """(leaves, notes) of the parts of a file, which share its tensors out."""
    leaves, notes, left = dict[str, Leaf](), list[str](), set(tensors)
    # Parts without a prefix take what nobody else owns.
    for part, place in sorted(parts.items(), key=lambda item: -len(item[1].naming.prefix)):
        own = {name: tensors[name] for name in left if place.owns(name)}
        left -= own.keys()
        matched = _match(part, place.config, place.naming, own, path, open_options)
        leaves |= matched.leaves
        notes += matched.notes
    if left:
        first = sorted(left)[0]
        message = f"{path} has {len(left)} tensors that no part of the model owns, the first is {first}"
        if not open_options.allow_partial:
            raise names.Mismatch(
                f"{message}. It may have additions that are not implemented. {_partial(path, open_options)}"
            )
        notes.append(f"{message}; left out")
    return leaves, notes


def _described(
    description: str, namings: list[tuple[type, Naming]], path: Path
) -> tuple[ModelConfig, dict[str, detect.Found]]:
    """Configuration and parts of a file that we wrote, which says what it is."""
    try:
        described = json.loads(description)
        config, parts = from_json(described["model"], ModelConfig), list(described["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} says in its metadata what it is, but not readably ({error}). Convert it again"
        ) from error
    configs = part_configs(config)
    kinds = [kind for kind, _ in namings]
    if [type(configs.get(part)) for part in parts] != kinds:
        raise InputError(
            f"{path} says that it holds {', '.join(parts)}, but its tensors are those of "
            f"{', '.join(kind.__name__.removesuffix('Config') for kind in kinds)}. Convert it again"
        )
    named = zip(parts, namings, strict=True)
    return config, {part: detect.Found(configs[part], naming) for part, (_, naming) in named}


def describe(weights: Weights) -> dict:
    """What a file that we write says of itself; `_described` reads it."""
    return {"format": 1, "model": to_json(weights.config), "parts": list(weights.parts)}


def _check_groups(parts: Mapping[str, detect.Found], path: Path) -> None:
    """Raises InputError for networks whose norms cannot have the number of groups that all published ones have."""
    for part, place in parts.items():
        if isinstance(place.config, UNetConfig | VaeConfig):
            groups = place.config.groups
            if uneven := [channels for channels in place.config.block_channels if channels % groups]:
                raise InputError(
                    f"The {part} in {path} has layers of {', '.join(map(str, uneven))} channels, which the {groups} "
                    "groups of the published models' norms do not divide. The file does not say how many groups it "
                    "has. Give it as a diffusers directory, whose config.json says so (norm_num_groups), or as a file "
                    "of `sdxl-jax convert`, with its metadata"
                )


def _check_noise(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError for a model of continuous noise levels, by the marks that ComfyUI goes by."""
    if marks := sorted(name for name in tensors if name.startswith("edm_")):
        kind = "of the kind of CosXL (EDM noise levels, v-prediction)"
        if {"edm_mean", "edm_std"} & set(marks):
            kind = "of the kind of Playground v2.5 (EDM preconditioning, normalised latents)"
        raise InputError(
            f"{path} holds {', '.join(marks[:4])}: a model {kind}. Its noise is another than that of the models that "
            "are implemented, which have 1000 discrete timesteps, and under theirs it would make wrong images. Use a "
            "model of SDXL's own noise schedule, or the program that this one was made for"
        )


def _marked(weights: Weights, metadata: Mapping[str, str], path: Path, open_options: OpenOptions) -> Weights:
    """What other people's files say of their noise: by metadata (modelspec), by marks among the tensors; SD 2.x by
    neither, there ComfyUI's test decides, a norm that differs in spread between the published ε and v weights."""
    marks = {name for _, name in weights.carried}
    said = metadata.get("modelspec.prediction_type", "")
    if said and open_options.prediction is None and "unet" in weights.parts and not said.startswith(("eps", "v")):
        raise InputError(
            f"{path} says in its metadata that it predicts {said} (modelspec.prediction_type), which is not "
            f"implemented; implemented are epsilon and v. If it is wrong, {open_options.way_out(path, '--prediction NAME')}"
        )
    network = weights.config.unet
    is_sd2 = network.vector_dim is None and not network.conv_projection
    if "v_pred" in marks or said.startswith("v"):
        schedule = dataclasses.replace(weights.config.schedule, zero_terminal_snr="ztsnr" in marks)
        size = (768, 768) if is_sd2 else weights.config.default_size
        config = dataclasses.replace(weights.config, prediction=Prediction.V, schedule=schedule, default_size=size)
        return dataclasses.replace(weights, config=config)
    norm = weights.leaves.get("unet/up_blocks_3/attentions_2/transformer_blocks/norm1/bias")
    if said or norm is None or not is_sd2 or network.in_channels != 4:
        # By convention ε in a whole model; a UNet alone may be any.
        return dataclasses.replace(weights, tells_noise=bool(said) or weights.origin.layout is Found.SINGLE_FILE)
    spread = float(np.std(norm.read().astype(np.float32)))
    prediction = Prediction.V if spread > 0.09 else Prediction.EPSILON
    size = (768, 768) if prediction is Prediction.V else (512, 512)
    note = (
        f"SD 2.x files do not tell what the UNet predicts; taken for {prediction.value}, because the spread of a norm "
        f"is {spread:.3f} (above 0.09: v). --prediction says otherwise"
    )
    config = dataclasses.replace(weights.config, prediction=prediction, default_size=size)
    return dataclasses.replace(weights, config=config, notes=(*weights.notes, note))


@dataclasses.dataclass(frozen=True)
class _Matched:
    leaves: dict[str, Leaf]
    carried: dict[str, Tensor]
    naming: Naming
    notes: list[str]


def _partial(path: Path, open_options: OpenOptions) -> str:
    return f"To load what fits, and leave the rest out, {open_options.way_out(path, '--allow-partial')}"


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
    where: Path,
    open_options: OpenOptions,
) -> _Matched:
    """A part's parameters among the tensors that ought to be its own. naming: None to find it out."""
    carried = {name: tensor for name, tensor in tensors.items() if detect.is_carried(name)}
    own = {name: tensor for name, tensor in tensors.items() if name not in carried}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if naming is None:
        namings = [naming for kind, naming in detect.namings(shapes) if kind is type(part_config)]
        naming = namings[0] if namings else Naming(_FIRST_CHOICE[type(part_config)])
    table = names.table(part_config, naming)
    notes = []
    if open_options.allow_partial:
        fit = {name for name in own if name in table.by_name and table.by_name[name].shape == shapes[name]}
        if unfit := sorted(own.keys() - fit):
            notes.append(f"{where}: {len(unfit)} tensors do not fit and are left out: {', '.join(unfit)}")
        own = {name: own[name] for name in own if name in fit}
    else:
        try:
            names.compare(table, shapes, str(where))
        except names.Mismatch as error:
            raise names.Mismatch(f"{error}. {_partial(where, open_options)}") from error
    leaves = leaves_of(part, table, own, where)
    if missing := [path for path in table.abstract if f"{part}/{path}" not in leaves]:
        leaves |= {f"{part}/{path}": _initial(part_config, path) for path in missing}
        notes.append(f"{where}: {len(missing)} parameters have their initial values: {', '.join(missing)}")
    return _Matched({f"{part}/{path}": leaves[f"{part}/{path}"] for path in table.abstract}, carried, naming, notes)


def _initial(part_config: PartConfig, path: str) -> Initial:
    """The value that a fresh model has, of one parameter alone: the others are not computed."""
    shape = names.abstract(part_config)[path].shape
    make = jax.jit(lambda key: flatten(names.init(part_config)(key))[path])
    return Initial(tuple(shape), lambda: np.asarray(make(jax.random.key(0))))


def _variants(folder: Path) -> dict[str, dict[str, Path]]:
    """The weight files of one network's directory, by variant ("" for those without): whole, index, a shard.

    Raises InputError for a directory without weights, or with pickles alone.
    """
    if not folder.is_dir():
        raise InputError(f"There is no directory {folder}, which model_index.json lists. Fetch it")
    variants: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        if found := _WEIGHTS.fullmatch(file.name):
            kind = "index" if found["index"] else "shard" if found["shard"] else "whole"
            variants.setdefault(found["variant"] or found["late"] or "", {})[kind] = file
    if not variants:
        if pickles := [file for file in sorted(folder.iterdir()) if file.suffix.lower() in safetensors.PICKLES]:
            safetensors.refuse_pickle(pickles[0])
        raise InputError(f"{folder} has no weights (*.safetensors). Fetch them")
    return variants


def _weight_files(folder: Path, open_options: OpenOptions) -> dict[str, Tensor]:
    """The tensors of one network's directory: of one file, or of its shards.

    Raises InputError as `_variants`, and for a directory without the variant, or with several to choose from.
    """
    choices, variant = _variants(folder), open_options.variant
    known = ", ".join(name or "(none)" for name in choices)
    if variant is None:
        variant = "" if "" in choices else next(iter(choices)) if len(choices) == 1 else None
        if variant is None:
            raise InputError(
                f"{folder} has several variants, {known}. Choose one: {open_options.way_out(folder, '--variant NAME')}"
            )
    elif variant not in choices:
        raise InputError(f"{folder} has no variant {variant}. It has: {known}")
    files = choices[variant]
    if "index" in files:
        return safetensors.open_index(files["index"])[0]
    if "whole" in files:
        return safetensors.open_file(files["whole"])[0]
    raise InputError(f"{folder} has shards, such as {files['shard'].name}, but no index that lists them. Fetch it")


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<late>\w+))?\.json)?"
)


def _with_parts(weights: Weights, other: Weights, path: str | Path) -> Weights:
    """A model with another's parts in the place of its own, or beside them."""
    config, mine = weights.config, part_configs(weights.config)
    if unknown := [part for part in other.parts if part not in mine]:
        raise InputError(
            f"{path} holds {', '.join(unknown)}, which the model has no place for. It has {', '.join(mine)}"
        )
    if "unet" in other.parts:
        config = dataclasses.replace(config, unet=other.config.unet)
        if other.tells_noise:
            theirs = other.config
            config = dataclasses.replace(config, prediction=theirs.prediction, schedule=theirs.schedule)
            config = dataclasses.replace(config, distilled=theirs.distilled, sampling=theirs.sampling)
    kept: tuple[str, ...] = ()
    if "vae" in other.parts:
        half = lacking_half(other)
        if half is not None and isinstance(config.vae, TinyVaeConfig):
            kept = tuple(leaf_path for leaf_path in weights.leaves if leaf_path.startswith(f"vae/{half}/"))
        config = dataclasses.replace(config, vae=_other_vae(config.vae, other, half if kept else None, path))
    given = {tower.name: tower for tower in other.config.text if tower.name in other.parts}
    towers = tuple(_replaced(tower, given[tower.name]) if tower.name in given else tower for tower in config.text)
    config = dataclasses.replace(config, text=towers)
    config.check()
    own = {
        leaf_path: leaf
        for leaf_path, leaf in weights.leaves.items()
        if leaf_path in kept or leaf_path.split("/")[0] not in other.parts
    }
    both = {**own, **other.leaves}
    present = tuple(part for part in mine if part in weights.parts or part in other.parts)
    leaves = {leaf_path: both[leaf_path] for leaf_path in _expected(config, present) if leaf_path in both}
    namings = weights.origin.namings
    gone = tuple(namings[part].prefix for part in other.parts if part in namings and namings[part].prefix)
    gone += ("model_ema.", "v_pred", "ztsnr") if "unet" in other.parts else ()
    carried = {
        (part, name): tensor
        for (part, name), tensor in weights.carried.items()
        if part not in other.parts and not name.startswith(gone)
    }
    notes = (*weights.notes, *other.notes)
    licences = tuple(dict.fromkeys((*weights.licences, *other.licences)))
    return dataclasses.replace(weights, config=config, leaves=leaves, carried=carried, notes=notes, licences=licences)


def _other_vae(mine: AnyVaeConfig, other: Weights, kept: str | None, path: str | Path) -> AnyVaeConfig:
    """Another autoencoder in the place of a model's. kept: the half of a tiny one that stays, and is joined by it."""
    theirs = other.config.vae
    if isinstance(theirs, VaeConfig):
        # A file that does not tell its scale is taken to have that of the model, which a tiny one does not know.
        known = other.tells_scale or not isinstance(mine, VaeConfig)
        return theirs if known else dataclasses.replace(theirs, scale=mine.scale)
    if kept is None or not isinstance(mine, TinyVaeConfig):
        return theirs
    have, want = ((vae.channels, vae.latent_channels) for vae in (theirs, mine))
    if have != want:
        raise InputError(
            f"{path} has {have[0]} channels and latents of {have[1]}, the {kept} that it joins {want[0]} and "
            f"{want[1]}: halves of two autoencoders. Give both halves of one"
        )
    return dataclasses.replace(theirs, **{f"{kept}_blocks": getattr(mine, f"{kept}_blocks")})


def _replaced(tower: Tower, other: Tower) -> Tower:
    """A model's tower with another's network. SD 2.x's comes with its last layer, which is not read, or without."""
    last = (ContextState.LAST, ContextState.PENULTIMATE_NORMED)
    context = other.context if tower.context in last and other.context in last else tower.context
    return dataclasses.replace(tower, clip=other.clip, context=context, added_tokens=other.added_tokens)


def licences_in(path: Path) -> tuple[Path, ...]:
    """Licence files of what is at a path: in a directory; beside a file, its own (NAME.LICENSE) before its folder's."""
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.iterdir() if file.is_file() and _LICENCE.search(file.name))
    if path.is_dir():
        return tuple(file for file in files if file.name[0] != ".")
    own = [file for file in files if file.name.startswith(f"{path.stem}.")]
    return tuple(own or [file for file in files if _LICENCE.match(file.name) and file.name[0] != "."])


_LICENCE = re.compile(r"(^|\.)(licen[cs]e|copying|notice)([._-][\w.-]*)?$", re.IGNORECASE)
