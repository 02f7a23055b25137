"""The weights that a run starts from: those of `training.init_from`, checked against the configuration."""

import dataclasses
import re
from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax.arrays import flatten
from sdxl_jax.config import MEANING, LoopConfig, is_within
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.weights.lazy import Weights, cast, lacking_half, part_configs
from sdxl_jax.weights.load import load_weights
from sdxl_jax.weights.open import OpenOptions, open_model


def check_initial(training: LoopConfig, model: ModelConfig, parts: Collection[str]) -> None:
    """Raises InputError where `initial_weights` would; only headers are read."""
    _opened(training, model, parts)


def initial_weights(
    training: LoopConfig, model: ModelConfig, mesh: Mesh, *, parts: Collection[str], progress: bool = True
) -> dict[str, jax.Array]:
    """The parameters that `training.init_from` gives, by path, float32 and where they belong.

    model: what is wanted, of which `parts` count. Raises InputError for a path without a model, and for a part that the
    model lacks, or has otherwise.
    """
    initial: dict[str, jax.Array] = {}
    for path, weights in zip(training.init_from, _opened(training, model, parts), strict=True):
        for line in _other_meaning(weights, model):
            tqdm.write(f"  note: the UNet of {path} was trained with another {line} (there -> in this run)")
        if lines := _other_sampling(weights, model):
            tqdm.write(
                f"  note: {path} says that it is sampled with another {'; '.join(lines)} (there -> in this run, and of "
                "what it makes). model.sampling in the configuration keeps what is there"
            )
        initial |= flatten(load_weights(cast(weights, np.dtype(np.float32)), mesh, progress).params)
    return initial


def _opened(training: LoopConfig, model: ModelConfig, parts: Collection[str]) -> list[Weights]:
    """What is at each path of `training.init_from`, not read yet: of `parts` what is to be taken, and fits."""
    opened: list[Weights] = []
    wanted, taken = part_configs(model), training.init_parts
    if unknown := [part for part in taken or () if part not in wanted]:
        raise InputError(
            f"training.init_parts has {', '.join(unknown)}, which this model does not have. Its parts are "
            f"{', '.join(wanted)}"
        )
    missing = set(taken or ())
    for path in training.init_from:
        try:
            weights = open_model(path, OpenOptions(has_options=False))
        except InputError as error:
            raise InputError(
                f"training.init_from={path} cannot be opened: {error}. If it is the run of the stage before, train "
                "that first (docs/guides/recipe.md); weights of others are downloaded first"
            ) from error
        if taken is not None:
            weights = _only(weights, taken)
            missing -= set(weights.parts)
        if unknown := [part for part in weights.parts if part not in wanted]:
            raise InputError(
                f"{path} in training.init_from holds {', '.join(unknown)}, which this model does not have. Choose with "
                f"training.init_parts what is to be taken of {', '.join(wanted)}"
            )
        weights = _only(weights, parts)
        for part in weights.parts:
            have, want = (to_json(configs[part]) for configs in (part_configs(weights.config), wanted))
            if not weights.tells_scale:
                have["scale"] = want["scale"]
            if part == "vae" and (half := lacking_half(weights)) is not None:
                have[f"{half}_blocks"] = want.get(f"{half}_blocks")  # which the other half's file does not tell
            if different := differences(have, want):
                raise InputError(
                    f"The {part} in {path} (training.init_from) is not this model's: {'; '.join(different)} (in the "
                    f"file -> in the model). Set {_field_of(part, model)} to the file's configuration, or leave the "
                    f"{part} out of training.init_parts"
                )
        _check_meaning(path, weights, training, model)
        opened.append(weights)
    lacking = [lacking_half(weights) for weights in opened if "vae" in weights.parts]
    if lacking and None not in lacking and len(set(lacking)) == 1:
        raise InputError(
            f"training.init_from={training.init_from} holds a tiny autoencoder without its {lacking[0]}, which "
            f"would have random weights. Add the {lacking[0]}'s file (taesdxl_{lacking[0]}.safetensors)"
        )
    if missing:
        raise InputError(
            f"training.init_parts wants {', '.join(sorted(missing))}, which none of training.init_from="
            f"{training.init_from} holds. Add a model with it, or leave it out"
        )
    return opened


def _other_meaning(weights: Weights, model: ModelConfig) -> list[str]:
    """`field: there -> here` of all that the UNet's weights were trained with otherwise, as far as the file tells."""
    if "unet" not in weights.parts or not weights.tells_noise:
        return []
    there, here = ({name: to_json(config)[name] for name in MEANING} for config in (weights.config, model))
    return differences(there, here)


def _other_sampling(weights: Weights, model: ModelConfig) -> list[str]:
    """`field: there -> here` of how the weights say that they are sampled, where their UNet is taken."""
    if "unet" not in weights.parts or not weights.tells_noise:
        return []
    there, here = (to_json(each.sampling or SamplingDefaults()) for each in (weights.config, model))
    return differences(there, here)


def _check_meaning(path: str, weights: Weights, training: LoopConfig, model: ModelConfig) -> None:
    """Raises InputError where the weights mean something else than this run would take them for, unless that is
    named."""
    changed = [line for line in _other_meaning(weights, model) if not is_within(line, training.init_changes)]
    if changed:
        names = dict.fromkeys(re.split(r"[.:]", line)[0] for line in changed)
        raise InputError(
            f"The UNet of {path} (training.init_from) was trained with another {'; '.join(changed)} (there -> in this "
            f"run). Set {' and '.join(f'model.{name}' for name in names)} to what is there. To make another model of "
            f"it on purpose: --training.init-changes {' '.join(names)}"
        )


def _only(weights: Weights, parts: Collection[str]) -> Weights:
    leaves = {path: leaf for path, leaf in weights.leaves.items() if path.split("/")[0] in parts}
    return dataclasses.replace(weights, leaves=leaves)


def _field_of(part: str, model: ModelConfig) -> str:
    """Where a part's configuration stands."""
    names = [tower.name for tower in model.text]
    return f"model.text[{names.index(part)}].clip" if part in names else f"model.{part}"
