"""The initial weights of a run: loaded from `training.init_from` and checked against the configuration, else random."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from sdxl_jax.arrays import BaseDtype, Params, flatten, unflatten
from sdxl_jax.config import MEANING, LoopConfig, is_within
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.progress import tqdm
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.weights.eight_bits import quantised
from sdxl_jax.weights.lazy import (
    Cast,
    Initial,
    Leaf,
    Origin,
    SourceLayout,
    Weights,
    WithZeroInputs,
    abstract_leaves,
    lacking_half,
    part_configs,
)
from sdxl_jax.weights.load import load_weights, place
from sdxl_jax.weights.open import OpenOptions, open_model

_FIELD = "training.init_from"
_OF_MODEL = "Give one that was trained as the configuration's model: the same networks, latents and noise schedule"
"""Remedy for a model that the run reads beside its initial weights, a teacher."""
FIRST = "unet/conv_in/kernel"
"""The parameter that has the UNet's inputs."""


def check_initial(
    training: LoopConfig,
    model: ModelConfig,
    parts: Collection[str],
    *,
    measures_scale: bool = False,
    field: str = _FIELD,
) -> dict[str, ModelConfig]:
    """Raises InputError wherever `initial_weights` would; reads only the files' headers. Returns the configuration of
    the model that each part is from. field: that the paths are from, for messages."""
    opened = _opened(training, model, parts, measures_scale, field)
    return {part: weights.config for weights in opened for part in weights.parts}


def initial_weights(
    training: LoopConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    parts: Collection[str],
    measures_scale: bool = False,
    base_dtype: BaseDtype = BaseDtype.FLOAT32,
    progress: bool = True,
    notes: bool = True,
) -> dict[str, Shaped[jax.Array, "..."]]:
    """The parameters that `training.init_from` gives, by path, with their shardings.

    model: the model to initialise; only its `parts` are used. measures_scale: whether the latent scale is measured
    after training, so that the one before it may be any. base_dtype: how they are kept. notes: whether to say how the
    files' models differ from this one. Raises InputError for a path without a model, and for a part that the model does
    not have, or has with another configuration.
    """
    initial = dict[str, jax.Array]()
    for path, weights in zip(training.init_from, _opened(training, model, parts, measures_scale), strict=True):
        for line in _meaning_differences(weights, model) if notes else ():
            tqdm.write(f"  note: the UNet of {path} was trained with a different {line} (there -> in this run)")
        if notes and (lines := _sampling_differences(weights, model)):
            tqdm.write(
                f"  note: {path} has other sampling defaults, {'; '.join(lines)} (there -> in this run and the models "
                "that it saves). Set model.sampling in the configuration to keep them"
            )
        if isinstance(weights.leaves.get(FIRST), WithZeroInputs):
            tqdm.write(
                f"  note: the UNet of {path} sees the latent alone; its inputs for mask and masked image begin at zero"
            )
        initial |= flatten(load_weights(_kept(weights, base_dtype), mesh, progress).params)
    return initial


def random_weights(
    training: LoopConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    parts: Sequence[str],
    given: Collection[str],
    base_dtype: BaseDtype = BaseDtype.FLOAT32,
    progress: bool = True,
) -> dict[str, Shaped[jax.Array, "..."]]:
    """The parameters that have random initial values, by path, with their shardings: all of `parts` but those at the
    paths in `given`."""
    weights = _random(model, parts, training.seed)
    leaves = {path: leaf for path, leaf in weights.leaves.items() if path not in given}
    return place(_kept(dataclasses.replace(weights, leaves=leaves), base_dtype), mesh, "initialising", progress)


def abstract_base(model: ModelConfig, base_dtype: BaseDtype) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a frozen model by path, none of them made."""
    kept = _kept(_random(model, tuple(part_configs(model)), seed=0), base_dtype)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in kept.leaves.items()}


def _random(model: ModelConfig, parts: Sequence[str], seed: int) -> Weights:
    leaves = {path: Initial(leaf, path, seed) for path, leaf in abstract_leaves(model, parts).items()}
    return Weights(model, leaves, Origin(SourceLayout.MEMORY))


def _kept(weights: Weights, base_dtype: BaseDtype) -> Weights:
    """The same parameters as a run keeps them: the autoencoder in float32, the others in this dtype."""
    is_quantised = base_dtype is BaseDtype.INT8
    leaves = dict[str, Leaf]()
    for path, leaf in (quantised(weights) if is_quantised else weights).leaves.items():
        dtype = np.dtype(np.float32 if path.startswith("vae/") else base_dtype.dtype)
        same = leaf.dtype == dtype or (is_quantised and path not in weights.leaves) or leaf.dtype == np.int8
        leaves[path] = leaf if same else Cast(leaf, dtype, path)
    return dataclasses.replace(weights, leaves=leaves)


def placed_network(name: str, leaves: Mapping[str, Leaf], mesh: Mesh) -> Params:
    """A network that is not a part of the model, on the devices that the sharding rules of NAME/… give it. leaves: its
    parameters, by path."""
    named = {f"{name}/{path}": leaf for path, leaf in leaves.items()}
    weights = Weights(ModelConfig(), named, Origin(SourceLayout.MEMORY))
    return unflatten(place(weights, mesh, f"loading {name}", progress=False))[name]


def _opened(
    training: LoopConfig, model: ModelConfig, parts: Collection[str], measures_scale: bool, field: str = _FIELD
) -> list[Weights]:
    """The weights at each path of `training.init_from`, opened but not read: those of `parts` that are to be loaded,
    once checked that they fit. field: that the paths are from, for messages."""
    opened: list[Weights] = []
    known, selected = part_configs(model), training.init_parts
    if unknown := [part for part in selected or () if part not in known]:
        raise InputError(
            f"training.init_parts has {', '.join(unknown)}, which this model does not have. Give some of "
            f"{', '.join(known)}"
        )
    missing = set(selected or ())
    for path in training.init_from:
        try:
            weights = open_model(path, OpenOptions(has_options=False))
        except InputError as error:
            raise InputError(
                f"{field}={path} cannot be opened: {error}. If it is the run of an earlier stage, train "
                "that first (docs/guides/recipe.md). Published weights have to be downloaded first"
            ) from error
        if selected is not None:
            weights = _only(weights, selected)
            missing -= set(weights.parts)
        if unknown := [part for part in weights.parts if part not in known]:
            remedy = f"Select the parts to load with training.init_parts, from {', '.join(known)}"
            raise InputError(
                f"{path} in {field} holds {', '.join(unknown)}, which this model does not have. "
                f"{remedy if field == _FIELD else _OF_MODEL}"
            )
        weights = _with_inputs(_only(weights, parts), model)
        for part in weights.parts:
            if different := _part_differences(part, weights, model, measures_scale):
                remedy = f"Set {_field_of(part, model, parts)} to the file's configuration, "
                remedy += f"or leave the {part} out of training.init_parts"
                raise InputError(
                    f"The {part} in {path} ({field}) has a different configuration: {'; '.join(different)} "
                    f"(in the file -> in this run). {remedy if field == _FIELD else _OF_MODEL}"
                )
        _check_meaning(path, weights, training, model, field)
        opened.append(weights)
    lacking = [lacking_half(weights) for weights in opened if "vae" in weights.parts]
    trained = any(re.search(pattern, f"vae/{lacking[0]}/conv_out/kernel") for pattern in training.trainable if lacking)
    if lacking and None not in lacking and len(set(lacking)) == 1 and not trained:
        raise InputError(
            f"training.init_from={','.join(training.init_from)} holds a tiny autoencoder without its {lacking[0]}, "
            f"which would have random weights. Add the {lacking[0]}'s file (taesdxl_{lacking[0]}.safetensors)"
        )
    if missing:
        raise InputError(
            f"training.init_parts has {', '.join(sorted(missing))}, which is not in training.init_from="
            f"{','.join(training.init_from)}. Add a model that has it, or leave it out"
        )
    return opened


def _part_differences(part: str, weights: Weights, model: ModelConfig, measures_scale: bool) -> list[str]:
    """`field: there -> here` for every field of a part's configuration that differs, as far as the file records it."""
    have, want = (to_json(part_configs(config)[part]) for config in (weights.config, model))
    if part == "vae" and (measures_scale or not weights.scale_is_known):
        have["scale"] = want["scale"]
    if part == "vae" and (half := lacking_half(weights)) is not None:
        have[f"{half}_blocks"] = want.get(f"{half}_blocks")  # not in the other half's file
    if part == "unet" and isinstance(weights.leaves.get(FIRST), WithZeroInputs):
        have["in_channels"] = want["in_channels"]
    return differences(have, want)


def _meaning_differences(weights: Weights, model: ModelConfig) -> list[str]:
    """`field: there -> here` for every field in `MEANING` with which the UNet was trained differently, as far as the
    file records it."""
    if "unet" not in weights.parts or not weights.noise_is_known:
        return []
    there, here = ({name: to_json(config)[name] for name in MEANING} for config in (weights.config, model))
    return differences(there, here)


def _sampling_differences(weights: Weights, model: ModelConfig) -> list[str]:
    """`field: there -> here` for the weights' own sampling defaults, if their UNet is loaded."""
    if "unet" not in weights.parts or not weights.noise_is_known:
        return []
    there, here = (to_json(each.sampling or SamplingDefaults()) for each in (weights.config, model))
    return differences(there, here)


def _check_meaning(path: str, weights: Weights, training: LoopConfig, model: ModelConfig, field: str) -> None:
    """Raises InputError if the UNet was trained with another prediction, schedule or the like than this run's, unless
    `training.init_changes` names it."""
    changed = [line for line in _meaning_differences(weights, model) if not is_within(line, training.init_changes)]
    if changed:
        names = dict.fromkeys(re.split(r"[.:]", line)[0] for line in changed)
        remedy = f"Set {' and '.join(f'model.{name}' for name in names)} to the value there. To change it on "
        remedy += f"purpose: --training.init-changes {' '.join(names)}"
        raise InputError(
            f"The UNet of {path} ({field}) was trained with a different {'; '.join(changed)} (there -> in "
            f"this run). {remedy if field == _FIELD else _OF_MODEL}"
        )


def _with_inputs(weights: Weights, model: ModelConfig) -> Weights:
    """A UNet that sees the latent alone with zeros for the mask and the masked image, if the model's sees them."""
    alone = weights.config.unet.in_channels == model.vae.latent_channels
    if not model.sees_mask or FIRST not in weights.leaves or not alone:
        return weights
    first = WithZeroInputs(weights.leaves[FIRST], model.unet.in_channels)
    return dataclasses.replace(weights, leaves={**weights.leaves, FIRST: first})


def _only(weights: Weights, parts: Collection[str]) -> Weights:
    leaves = {path: leaf for path, leaf in weights.leaves.items() if path.split("/")[0] in parts}
    return dataclasses.replace(weights, leaves=leaves)


def _field_of(part: str, model: ModelConfig, parts: Collection[str]) -> str:
    """The configuration field of a part. parts: those of the objective; the autoencoder's own has no other."""
    if set(parts) == {"vae"}:
        return "vae"
    names = [tower.name for tower in model.text]
    return f"model.text[{names.index(part)}].clip" if part in names else f"model.{part}"
