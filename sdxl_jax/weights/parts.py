"""Parts of one model in the place of another's: what `--parts-from` and `parts_from` do.

The UNet brings its prediction and schedule, the autoencoder its scale, a text encoder its added tokens. A half of a
tiny autoencoder joins the half that is there.
"""

import dataclasses
from pathlib import PurePath

from sdxl_jax.conditioning.text import ContextState, Tower
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import absolute, located
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.samplers.presets import stated, with_stated
from sdxl_jax.weights.lazy import Weights, abstract_leaves, lacking_half, part_configs


def with_parts(weights: Weights, other: Weights, path: str | PurePath) -> Weights:
    """A model with another's parts in the place of its own, or added to them. path: of the other, for messages.

    Raises InputError for parts that the model has no place for, and for those that do not fit the others.
    """
    config, own_configs = weights.config, part_configs(weights.config)
    if unknown := [part for part in other.parts if part not in own_configs]:
        raise InputError(
            f"{path} holds {', '.join(unknown)}, which the model has no place for. It has {', '.join(own_configs)}: "
            "give a model or a network with one of these"
        )
    if "unet" in other.parts:
        config = dataclasses.replace(config, unet=other.config.unet)
        config = dataclasses.replace(config, sampling=with_stated(config.sampling, stated(other.config.sampling)))
        if other.noise_is_known:
            config = dataclasses.replace(config, prediction=other.config.prediction, schedule=other.config.schedule)
            config = dataclasses.replace(config, noise=other.config.noise)
            config = dataclasses.replace(config, distilled=other.config.distilled, sampling=other.config.sampling)
    remaining: tuple[str, ...] = ()
    if "vae" in other.parts:
        half = lacking_half(other)
        if half is not None and isinstance(config.vae, TinyVaeConfig):
            remaining = tuple(leaf_path for leaf_path in weights.leaves if leaf_path.startswith(f"vae/{half}/"))
        config = dataclasses.replace(config, vae=_replaced_vae(config.vae, other, half if remaining else None, path))
    given = {tower.name: tower for tower in other.config.text if tower.name in other.parts}
    towers = tuple(_replaced_tower(tower, given[tower.name]) if tower.name in given else tower for tower in config.text)
    config = dataclasses.replace(config, text=towers)
    config.check()
    own = {
        leaf_path: leaf
        for leaf_path, leaf in weights.leaves.items()
        if leaf_path in remaining or leaf_path.split("/")[0] not in other.parts
    }
    both = {**own, **other.leaves}
    present = tuple(part for part in own_configs if part in weights.parts or part in other.parts)
    leaves = {leaf_path: both[leaf_path] for leaf_path in abstract_leaves(config, present) if leaf_path in both}
    namings = weights.origin.namings
    gone = tuple(namings[part].prefix for part in other.parts if part in namings and namings[part].prefix)
    gone += ("model_ema.", "v_pred", "ztsnr", "edm_") if "unet" in other.parts else ()
    carried = {
        (part, name): tensor
        for (part, name), tensor in weights.carried.items()
        if part not in other.parts and not name.startswith(gone)
    }
    notes = (*weights.notes, *other.notes)
    licences = tuple(dict.fromkeys((*weights.licences, *other.licences)))
    licence = weights.licence if weights.licence == other.licence else None
    name = absolute(located(path, "the model of other parts")).name
    provenance = dataclasses.replace(weights.provenance, parts_from=(*weights.provenance.parts_from, name))
    return dataclasses.replace(
        weights,
        config=config,
        leaves=leaves,
        carried=carried,
        licences=licences,
        licence=licence,
        notes=notes,
        provenance=provenance,
    )


def _replaced_vae(own: AnyVaeConfig, other: Weights, remaining: str | None, path: str | PurePath) -> AnyVaeConfig:
    """Another autoencoder in the place of a model's. remaining: the half of a tiny one that stays and is joined."""
    given = other.config.vae
    if isinstance(given, VaeConfig):
        # A file that does not say its scale is taken to have the model's, which a tiny autoencoder does not have.
        known = other.scale_is_known or not isinstance(own, VaeConfig)
        return given if known else dataclasses.replace(given, scale=own.scale)
    if remaining is None or not isinstance(own, TinyVaeConfig) or isinstance(given, WaveletConfig):
        return given
    have, want = ((vae.channels, vae.latent_channels) for vae in (given, own))
    if have != want:
        raise InputError(
            f"{path} has {have[0]} channels and latents of {have[1]}, the {remaining} that it joins {want[0]} and "
            f"{want[1]}: halves of two autoencoders. Give both halves of one"
        )
    return dataclasses.replace(given, **{f"{remaining}_blocks": getattr(own, f"{remaining}_blocks")})


def _replaced_tower(tower: Tower, other: Tower) -> Tower:
    """A model's tower with another's network. SD 2.x's comes with its last layer, which is not read, or without."""
    last = (ContextState.LAST, ContextState.PENULTIMATE_NORMED)
    context = other.context if tower.context in last and other.context in last else tower.context
    return dataclasses.replace(tower, clip=other.clip, context=context, added_tokens=other.added_tokens)
