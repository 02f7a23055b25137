"""The model card of a converted model: README.md in a directory, NAME.md beside a single file.

Markdown with YAML front matter, as the Hugging Face Hub reads it (https://huggingface.co/docs/hub/model-cards): what
the model is, which run or file it is from, its licence, how to load it. The licence is the one that the source's own
card states; otherwise `license: other`, which the Hub has for licences that it does not list. It is never guessed.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models.clip import ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.weights.lazy import Layout, Weights, part_configs, stored_dtypes
from sdxl_jax.weights.names import PartConfig

WRITTEN_BY = "Written by `sdxl-jax convert`"
"""In every card that we write: a conversion replaces such a card, and no other."""

_LIBRARIES = {
    Layout.ORBAX: "sdxl_jax",
    Layout.DIFFUSERS: "diffusers",
    Layout.SINGLE_FILE: "diffusion-single-file",
}
_PREDICTIONS = {
    Prediction.EPSILON: "epsilon (the noise)",
    Prediction.V: "v_prediction (the velocity)",
    Prediction.X0: "sample (x₀)",
    Prediction.EDM: "edm (F of EDM's preconditioning)",
    Prediction.FLOW: "flow (ε − x₀)",
}
_CLIP_WIDTHS = {768: "CLIP ViT-L", 1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG"}


def path_of(made: Path) -> Path:
    """Where the card of a converted directory or file is."""
    return made / "README.md" if made.is_dir() else made.with_suffix(".md")


def card(weights: Weights, layout: Layout, name: str, licences: Sequence[str]) -> str:
    """The text of a card. name: of the directory or file. licences: names of the licence files beside it."""
    version = metadata.version("sdxl_jax")
    sections = [
        _front_matter(weights, layout, licences),
        f"# {name}",
        f"{_summary(weights)}. {WRITTEN_BY} of sdxl_jax {version}.",
        "\n".join(f"- {fact}" for fact in _facts(weights)),
        "## Licence",
        _licence(weights, licences),
        "## How to load it",
        *_how_to_load(weights, layout, name),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(weights: Weights, layout: Layout, licences: Sequence[str]) -> str:
    lines = [f"license: {weights.licence or 'other'}"]
    if weights.licence is None and licences:
        lines.append(f"license_link: {json.dumps(licences[0])}")  # a JSON string is a YAML string too
    lines.append(f"library_name: {_LIBRARIES[layout]}")
    if _is_whole(weights):
        needs_image = weights.config.is_refiner or weights.config.sees_mask
        task = "text-to-image" if weights.config.text else "unconditional-image-generation"  # the nearest to classes
        lines.append(f"pipeline_tag: {'image-to-image' if needs_image else task}")
    is_xl = weights.config.micro is not None and bool(weights.config.text)
    lines += ["tags:", f"- stable-diffusion{'-xl' if is_xl else ''}", "- sdxl_jax"]
    return "\n".join(["---", *lines, "---"])


def _is_whole(weights: Weights) -> bool:
    return set(weights.parts) == set(part_configs(weights.config))


# ---- what the model is -----------------------------------------------------------------------------------------------


def family(config: ModelConfig) -> str:
    """ "SDXL base", "SDXL refiner", "SD 1.x" or "SD 2.x", by the UNet; whether it is one for inpainting, or of another
    size than the published one."""
    if not config.text:
        return "class-conditional diffusion (sgm's ImageNet models)"
    if config.micro is not None:
        name, published = ("SDXL refiner", SDXL_REFINER) if config.is_refiner else ("SDXL base", SDXL_BASE)
    else:
        name, published = ("SD 1.x", SD1) if config.unet.conv_projection else ("SD 2.x", SD2)
    own = dataclasses.replace(config.unet, in_channels=published.unet.in_channels)
    size = "" if own == published.unet else ", of another size than the published one"
    return f"{name}{' for inpainting' if config.sees_mask else ''}{size}"


def _summary(weights: Weights) -> str:
    if _is_whole(weights):
        return f"A latent diffusion model of images: {family(weights.config)}"
    configs = part_configs(weights.config)
    described = [_part_summary(configs[part], weights) for part in weights.parts]
    return f"{' and '.join(described)}: {'one part' if len(described) == 1 else 'parts'} of a latent diffusion model"


def _part_summary(part_config: PartConfig, weights: Weights) -> str:
    match part_config:
        case UNetConfig():
            return f"The UNet of a model of the family {family(weights.config)}"
        case TinyVaeConfig():
            return "A tiny autoencoder (TAESD)"
        case ClipTextConfig():
            known = _CLIP_WIDTHS.get(part_config.width)
            return f"A CLIP text encoder{f', as wide as {known}' if known else ''}"
        case _:
            return f"An autoencoder (KL, latents × {part_config.scale:g})"


def _facts(weights: Weights) -> Iterator[str]:
    """Lines of a list: parts, sizes, what the UNet predicts, where the weights are from."""
    total = 0
    for part in weights.parts:
        leaves = [leaf for path, leaf in weights.leaves.items() if path.startswith(f"{part}/")]
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        dtypes = sorted({str(dtype) for leaf in leaves for dtype in stored_dtypes(leaf)})
        yield f"Part `{part}`: {count:,} parameters, {' and '.join(dtypes)}"
        total += count
    if len(weights.parts) > 1:
        yield f"Together: {total:,} parameters, {weights.size / 1e9:.2f} GB"
    config = weights.config
    if "unet" in weights.parts:
        terminal = ", zero terminal SNR" if config.schedule.zero_terminal_snr else ""
        known = "" if weights.noise_is_known else "; the source does not say so, this is the family's"
        yield f"Prediction: {_PREDICTIONS[config.prediction]}{terminal}{known}"
        if config.noise is not None:
            yield f"Noise levels: continuous, {config.noise}"
        if config.unet.classes is not None:
            yield f"Classes of images: {config.unet.classes.number:,}"
        if config.distilled:
            yield "Distilled: guidance is in the weights"
        height, width = config.default_size
        yield f"Resolution: {height} × {width} pixels (height × width) by default"
    yield from _sources(weights)


def _sources(weights: Weights) -> Iterator[str]:
    source = weights.provenance
    if source.step is not None:
        average = "averaged weights (EMA)" if source.has_average else "weights"
        yield f"Source: {average} of the run `{source.name}` at step {source.step} of {source.steps}"
        if source.commit is not None:
            yield f"Trained with the source tree at commit {source.commit}"
    elif source.name is not None:
        yield f"Source: `{source.name}`"
    if source.parts_from:
        yield f"Parts replaced by those of {', '.join(f'`{name}`' for name in source.parts_from)}"
    if source.merged:
        yield f"LoRA merged into the weights: {', '.join(source.merged)}"


def _licence(weights: Weights, licences: Sequence[str]) -> str:
    stated = f"The model card of the source states the licence `{weights.licence}`." if weights.licence else ""
    if licences:
        files = f"Licence files carried over from the source: {', '.join(f'`{name}`' for name in licences)}."
    else:
        files = (
            "No licence file was found beside the source. The terms are those of the model that these weights were "
            "made from: look them up before you use or publish the weights."
        )
    return f"{stated} {files}".strip()


# ---- how to load it --------------------------------------------------------------------------------------------------


def _how_to_load(weights: Weights, layout: Layout, name: str) -> Iterator[str]:
    yield _code("python", "import sdxl_jax", "", f"model = sdxl_jax.load_model({json.dumps(name)})")
    path = f"'{name}'" if any(character.isspace() for character in name) else name
    request = '--prompt "a photograph of a red fox"' if weights.config.text else "--class 0"
    prompt = f"{request} --out images"
    if _is_whole(weights):
        yield _code("sh", f"sdxl-jax sample {path} {prompt}")
    else:
        yield "As a part of another model, MODEL:"
        yield _code("sh", f"sdxl-jax sample MODEL --parts-from {path} {prompt}")
    match layout:
        case Layout.DIFFUSERS:
            kind = _diffusers_class(weights)
            module = "transformers" if kind.startswith("CLIP") else "diffusers"
            yield f"With {module}:"
            load = f"model = {kind}.from_pretrained({json.dumps(name)})"
            yield _code("python", f"from {module} import {kind}", "", load)
        case Layout.SINGLE_FILE if weights.config.unet.classes is None:
            yield f"With ComfyUI: put the file into its folder `models/{_comfyui_folder(weights)}`."
        case Layout.ORBAX:
            yield "The parameters alone, a nested dict of arrays, with Orbax:"
            load = f"params = ocp.load(Path({json.dumps(name)}).absolute())"
            yield _code("python", "from pathlib import Path", "", "from orbax.checkpoint import v1 as ocp", "", load)


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _only_part(weights: Weights) -> PartConfig | None:
    """The configuration of the only part; None for several parts."""
    part, *others = weights.parts
    return None if others else part_configs(weights.config)[part]


def _diffusers_class(weights: Weights) -> str:
    """The class of diffusers or transformers that loads the directory."""
    match _only_part(weights):
        case None:
            return "DiffusionPipeline"
        case UNetConfig():
            return "UNet2DConditionModel"
        case TinyVaeConfig():
            return "AutoencoderTiny"
        case ClipTextConfig(projection_dim=None):
            return "CLIPTextModel"
        case ClipTextConfig():
            return "CLIPTextModelWithProjection"
        case _:
            return "AutoencoderKL"


def _comfyui_folder(weights: Weights) -> str:
    match _only_part(weights):
        case None:
            return "checkpoints"
        case UNetConfig():
            return "diffusion_models"
        case TinyVaeConfig():
            return "vae_approx"
        case ClipTextConfig():
            return "text_encoders"
        case _:
            return "vae"
