"""Directories of diffusers, read and written: model_index.json, and each part's configuration. The weights themselves
are not read or written here.

    a directory  ── read_model_config ──▶  ModelConfig  ── write_folder ──▶  a directory
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.text import ContextState, Tower, clip_vocabulary
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.model import ModelConfig, UnconditionalKind
from sdxl_jax.models.clip import ClipTextConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import PLAYGROUND_GUIDANCE, SamplingDefaults
from sdxl_jax.weights.formats import diffusers_sampling, json_files, tokenizers
from sdxl_jax.weights.formats.diffusers_fields import (
    VERSION,
    clip_config,
    clip_fields,
    component_kind,
    is_distilled,
    noise_config,
    schedule_config,
    scheduler_fields,
    unet_config,
    unet_fields,
    unet_surroundings,
    vae_config,
    vae_fields,
)
from sdxl_jax.weights.formats.json_files import Fields

_PIPELINES = {
    "StableDiffusionPipeline": False,
    "StableDiffusionImg2ImgPipeline": False,
    "StableDiffusionInpaintPipeline": False,
    "StableDiffusionXLPipeline": True,
    "StableDiffusionXLImg2ImgPipeline": True,
    "StableDiffusionXLInpaintPipeline": True,
}
"""Pipeline classes that are implemented, and whether each is of SDXL's family."""
_TOKENIZER = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def _read_index(directory: AnyPath) -> dict[str, Any]:
    index = json_files.read(directory / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in _PIPELINES:
        raise InputError(
            f"{directory / 'model_index.json'} has _class_name={name}, which is not implemented. Use a model of one of "
            f"these classes (nearest first): {', '.join(nearest_first(name, _PIPELINES))}"
        )
    return index


def _components(index: Fields) -> list[str]:
    """Names of the components that a model_index.json lists and that are not null."""
    return [name for name, value in index.items() if isinstance(value, list) and None not in value]


def unused_components(directory: AnyPath) -> tuple[str, ...]:
    """Components of a diffusers directory that are not implemented here, such as safety_checker and image_encoder."""
    index = _read_index(directory)
    towers = ("text_encoder", "text_encoder_2") if _PIPELINES[index["_class_name"]] else ("text_encoder",)
    used = {"unet", "vae", "scheduler", *towers, *(_TOKENIZER[tower] for tower in towers)}
    return tuple(sorted(set(_components(index)) - used))


def _read_component(directory: AnyPath, name: str, kind: str) -> tuple[dict[str, Any], str]:
    """A part's fields and the path of its config.json."""
    path = directory / name / "config.json"
    fields = json_files.read(path)
    if component_kind(fields) != kind:
        given = fields.get("_class_name") or fields.get("architectures") or fields.get("model_type")
        classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL or AutoencoderTiny"}.get(kind, "CLIPTextModel")
        raise InputError(
            f"{path} describes {json.dumps(given)}; implemented is {classes}. Use a model with such a component"
        )
    return fields, str(path)


def _scheduler(directory: AnyPath, is_xl: bool) -> tuple[Fields, str]:
    """The scheduler's fields, with what the pipeline's class overrides, and the path of their file."""
    path = directory / "scheduler" / "scheduler_config.json"
    fields = json_files.read(path)
    # diffusers' pipelines of SD 1.x and 2.x set these two, whatever the file says.
    return (fields if is_xl else {**fields, "steps_offset": 1, "clip_sample": False}), str(path)


def unfollowed(directory: AnyPath) -> tuple[str, ...]:
    """Notes on sampling settings of a diffusers directory that are not followed."""
    fields, where = _scheduler(directory, _PIPELINES[_read_index(directory)["_class_name"]])
    zero_terminal_snr = schedule_config(fields, where)[0].zero_terminal_snr
    return diffusers_sampling.read(fields, where, zero_terminal_snr, is_distilled(fields))[1]


def read_model_config(directory: AnyPath) -> ModelConfig:
    """The configuration of a diffusers directory: SDXL, its refiner, SD 1.x or 2.x, inpainting variants included."""
    index = _read_index(directory)
    is_xl = _PIPELINES[index["_class_name"]]
    towers = []
    for name in ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",):
        if not is_xl or name in _components(index):
            clip = clip_config(*_read_component(directory, name, "text_encoder"))
            pad, added = tokenizers.read(directory / _TOKENIZER[name], clip.vocabulary)
            towers.append(Tower(name, clip, pad, ContextState.PENULTIMATE if is_xl else ContextState.LAST, added))

    fields, where = _read_component(directory, "unet", "unet")
    unet = unet_config(fields, where)
    # Without a size, diffusers' default: 128 latent positions for SDXL, 64 for earlier models.
    dim, (height, width) = unet_surroundings(fields, where, 128 if is_xl else 64)
    vae = vae_config(*_read_component(directory, "vae", "vae"))
    micro = None
    if is_xl:
        pooled = (towers[-1].clip.projection_dim or 0) if towers else 0
        has_score = index.get("requires_aesthetics_score") or unet.vector_dim == pooled + 5 * dim
        micro = MicroConfig(Numbers.SIZE_CROP_AESTHETIC if has_score else Numbers.SIZE_CROP_TARGET, dim)
    scheduling, scheduler = _scheduler(directory, is_xl)
    schedule, prediction = schedule_config(scheduling, scheduler)
    noise = noise_config(scheduling, scheduler)
    distilled = is_distilled(scheduling)
    sampling = diffusers_sampling.read(scheduling, scheduler, schedule.zero_terminal_snr, distilled)[0]
    said = presets.named(index.get("_name_or_path"), fields.get("_name_or_path"))
    if not said and is_xl and diffusers_sampling.is_turbo(scheduling, height, width):
        said = {"preset": "turbo"}
    if said and (sampling is None or sampling.preset != said["preset"]):
        sampling = presets.with_stated(sampling, said)
    if prediction is Prediction.EDM and isinstance(vae, VaeConfig) and vae.latent_mean is not None:
        sampling = replace(sampling or SamplingDefaults(), guidance=PLAYGROUND_GUIDANCE)
    zeros = is_xl and index.get("force_zeros_for_empty_prompt", True)
    config = ModelConfig(
        unet=unet,
        vae=vae,
        text=tuple(towers),
        micro=micro,
        schedule=schedule,
        prediction=prediction,
        distilled=distilled,
        noise=noise,
        sampling=sampling,
        unconditional=UnconditionalKind.ZEROS if zeros else UnconditionalKind.EMPTY,
        default_size=(height * vae.downsampling, width * vae.downsampling),
    )
    try:
        config.check()
    except InputError as error:
        raise InputError(f"The parts of {directory} do not fit together: {error}") from error
    return config


def as_diffusers_has_it(config: ModelConfig) -> ModelConfig:
    """The same model as diffusers' pipelines express it.

    `StableDiffusionPipeline` reads only a tower's last states. A tower that is read at its normed penultimate states
    (SD 2.x) lacks the last layer there, and the projection after it.
    """

    def shortened(tower: Tower) -> Tower:
        if tower.context is not ContextState.PENULTIMATE_NORMED:
            return tower
        clip = replace(tower.clip, layers=tower.clip.layers - 1, projection_dim=None)
        return replace(tower, clip=clip, context=ContextState.LAST)

    return config if config.micro is not None else replace(config, text=tuple(map(shortened, config.text)))


def _pipeline(config: ModelConfig) -> str:
    """The class that can run this model. Raises InputError if diffusers has none."""

    def refused(given: str, expected: str) -> InputError:
        return InputError(
            f"{given}, which diffusers' pipelines cannot express. They need {expected}. Change the model, or choose "
            "--to orbax"
        )

    is_xl = config.micro is not None
    names = tuple(tower.name for tower in config.text)
    known = [("text_encoder", "text_encoder_2"), ("text_encoder_2",)] if is_xl else [("text_encoder",)]
    if names not in known:
        expected = " or ".join(" and ".join(each) for each in known)
        raise refused(f"model.text has towers named {', '.join(names) or '(none)'}", f"towers named {expected}")
    state = ContextState.PENULTIMATE if is_xl else ContextState.LAST
    for tower in config.text:
        if tower.context is not state:
            raise refused(f"model.text: {tower.name} has context={tower.context.value}", f"context={state.value}")
        # The pooled vector is taken from the first tower that has a projection.
        if tower.clip.projection_dim is not None and not (is_xl and tower is config.text[-1]):
            given = f"model.text: {tower.name} has projection_dim={tower.clip.projection_dim}"
            raise refused(given, "projection_dim=None")
        if tower.clip.vocabulary != len(clip_vocabulary()[0]) + len(tower.added_tokens):
            raise refused(
                f"model.text: {tower.name} has vocabulary={tower.clip.vocabulary} and {len(tower.added_tokens)} added "
                "tokens",
                f"a vocabulary of {len(clip_vocabulary()[0])} and the added tokens",
            )
    if config.unconditional is UnconditionalKind.ALL_ZEROS:
        raise refused("model.unconditional=all_zeros", "unconditional=zeros or empty")
    if config.micro is not None and config.micro.numbers is Numbers.SIZE_CROP:
        raise refused("model.micro.numbers=size_crop", "size_crop_target or size_crop_aesthetic")
    if not is_xl and config.unconditional is UnconditionalKind.ZEROS:
        raise refused("model.unconditional=zeros in a model with model.micro=None", "unconditional=empty")
    if any(side % config.vae.downsampling for side in config.default_size):
        height, width = config.default_size
        raise refused(f"model.default_size={height} {width}", f"multiples of {config.vae.downsampling}")
    latent = config.vae.latent_channels
    tasks = {latent: "", 2 * latent + 1: "Inpaint"}
    if config.unet.in_channels not in tasks:
        expected = f"in_channels={' or '.join(map(str, tasks))}"
        raise refused(f"model.unet.in_channels={config.unet.in_channels}", expected)
    task = tasks[config.unet.in_channels]
    if config.is_refiner:
        task = task or "Img2Img"  # the base's class has no aesthetic score
    return f"StableDiffusion{'XL' if is_xl else ''}{task}Pipeline"


def write_folder(config: ModelConfig, directory: Path) -> None:
    """Writes model_index.json, the scheduler, the tokenizers and the config.json of every part: all but the weights.

    The weights that belong in it are those of `as_diffusers_has_it(config)`.
    """
    config = as_diffusers_has_it(config)
    config.check()
    pipeline = _pipeline(config)
    scheduler = scheduler_fields(config.schedule, config.prediction, config.distilled, config.sampling, config.noise)
    index: dict[str, Any] = {
        "_class_name": pipeline,
        **VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae_fields(config.vae)["_class_name"]],
    }
    if config.micro is None:
        index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index["requires_safety_checker"] = False
    else:
        index |= {name: [None, None] for name in ("text_encoder", "tokenizer")}
        index["force_zeros_for_empty_prompt"] = config.unconditional is UnconditionalKind.ZEROS
        index["add_watermarker"] = None
        if pipeline != "StableDiffusionXLPipeline":
            index["requires_aesthetics_score"] = config.is_refiner
    height, width = (side // config.vae.downsampling for side in config.default_size)
    files: dict[str, Fields | str] = {
        "scheduler/scheduler_config.json": scheduler,
        "unet/config.json": unet_fields(config.unet, config.micro, (height, width)),
        "vae/config.json": vae_fields(config.vae, max(config.default_size)),
    }
    for tower in config.text:
        fields = clip_fields(tower.clip)
        index[tower.name] = ["transformers", *fields["architectures"]]
        index[_TOKENIZER[tower.name]] = ["transformers", "CLIPTokenizer"]
        files[f"{tower.name}/config.json"] = fields
        files |= {f"{_TOKENIZER[tower.name]}/{name}": file for name, file in tokenizers.files(tower).items()}
    for name, file in {"model_index.json": index, **files}.items():
        json_files.write(directory / name, file)


def write_component(
    config: UNetConfig | AnyVaeConfig | ClipTextConfig, directory: Path, micro: MicroConfig | None = MicroConfig()
) -> None:
    """Writes directory/config.json of one part alone. micro: as for `unet_fields`."""
    match config:
        case UNetConfig():
            fields = unet_fields(config, micro)
        case ClipTextConfig():
            fields = clip_fields(config)
        case _:
            fields = vae_fields(config)
    json_files.write(directory / "config.json", fields)
