"""What files say of the model that they hold: our own metadata, modelspec, marks among the tensors, licence files.

our own files          metadata under the key "sdxl_jax": the whole configuration
other people's files   modelspec.prediction_type in the metadata: epsilon, v, flow;
                       empty tensors v_pred and ztsnr, as in ComfyUI;
                       edm_vpred.sigma_max, edm_mean, … of EDM's noise levels;
                       titles of published few-step models (`samplers.presets.named`);
                       for SD 2.x neither: there ComfyUI's test of one norm decides
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Float

from sdxl_jax.diffusion.continuous import EdmConfig, FlowConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import PLAYGROUND_GUIDANCE, SamplingDefaults, Sigmas
from sdxl_jax.weights.detect import FoundPart
from sdxl_jax.weights.lazy import SourceLayout, Weights, part_configs
from sdxl_jax.weights.names import Naming

METADATA = "sdxl_jax"
"""Key of the metadata by which files and checkpoints that we write describe their model."""

# ---- our own files ---------------------------------------------------------------------------------------------------


def describe(weights: Weights) -> dict[str, Any]:
    """The metadata of a file that we write; `read_description` reads it."""
    return {"format": 1, "model": to_json(weights.config), "parts": list(weights.parts)}


def read_description(
    text: str, namings: list[tuple[type, Naming]], path: AnyPath
) -> tuple[ModelConfig, dict[str, FoundPart]]:
    """Configuration and parts of a file that we wrote, from its metadata.

    Raises InputError for metadata that cannot be read, and for other parts than those of the tensors.
    """
    try:
        described = json.loads(text)
        config, parts = from_json(described["model"], ModelConfig), list(described["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} describes its model in its metadata, but the description cannot be read ({error}). Convert the "
            "model again with this version"
        ) from error
    configs = part_configs(config)
    kinds = [kind for kind, _ in namings]
    if [type(configs.get(part)) for part in parts] != kinds:
        raise InputError(
            f"{path} says in its metadata that it holds {', '.join(parts)}, but its tensors are those of "
            f"{', '.join(kind.__name__.removesuffix('Config') for kind in kinds)}. Convert the model again"
        )
    named = zip(parts, namings, strict=True)
    return config, {part: FoundPart(configs[part], naming) for part, (_, naming) in named}


# ---- other people's files --------------------------------------------------------------------------------------------


def check_groups(parts: Mapping[str, FoundPart], path: AnyPath) -> None:
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


_VPRED, _LATENTS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min"), ("edm_mean", "edm_std")
"""Tensors by which ComfyUI recognises the kind of CosXL (EDM's noise levels, v-prediction), and that of Playground v2.5
(EDM's preconditioning, normalised latents)."""
_PLAYGROUND_SCALE = 0.5


def check_noise(tensors: Iterable[str], path: AnyPath) -> None:
    """Raises InputError for marks of continuous noise levels that are unknown, incomplete, or of two kinds."""
    marks = sorted(name for name in tensors if name.startswith("edm_"))
    if marks not in ([], sorted(_VPRED), [_VPRED[0]], sorted(_LATENTS)):
        raise InputError(
            f"{path} holds {', '.join(marks[:4])}: marks of EDM noise levels that do not go together. Known are "
            f"{' with '.join(_VPRED)} (CosXL), and {' with '.join(_LATENTS)} (Playground v2.5). Download the file "
            "again, or use the program that it was made for"
        )


def _with_edm(weights: Weights) -> Weights:
    """With the noise levels that the marks of a file say, and the latents of Playground v2.5."""
    marks = {name: tensor for (_, name), tensor in weights.carried.items() if name.startswith("edm_")}
    config = weights.config
    # As they are written: float32's 0.002 is 0.0020000000949949026, with which no configuration would agree.
    values = {name: [float(str(value)) for value in tensor.read().reshape(-1)] for name, tensor in marks.items()}
    if "edm_mean" in values:
        if not isinstance(config.vae, VaeConfig):
            raise InputError(
                "The file's edm_mean and edm_std are of an autoencoder that is not in it. Give a whole model"
            )
        mean, std = (tuple(values[name]) for name in _LATENTS)
        vae = dataclasses.replace(config.vae, scale=_PLAYGROUND_SCALE, latent_mean=mean, latent_std=std)
        vae.check("model.vae")
        config = dataclasses.replace(config, vae=vae, noise=EdmConfig(), prediction=Prediction.EDM)
        config = dataclasses.replace(config, sampling=SamplingDefaults("dpmpp_2m", guidance=PLAYGROUND_GUIDANCE))
    else:
        # sigma_min has a default in ComfyUI, too; levels even in log σ are diffusers' and its own for CosXL.
        low = values[_VPRED[1]][0] if _VPRED[1] in values else EdmConfig().sigma_min
        noise = EdmConfig(low, values[_VPRED[0]][0], 1.0)
        noise.check("edm_vpred")
        config = dataclasses.replace(config, noise=noise, prediction=Prediction.V)
        config = dataclasses.replace(config, sampling=SamplingDefaults(sigmas=Sigmas.EXPONENTIAL))
    return dataclasses.replace(weights, config=config, noise_is_known=True)


def edm_marks(config: ModelConfig) -> dict[str, Float[np.ndarray, "..."]]:
    """The tensors that `_with_edm` reads, of a model with such noise levels; others have none."""
    found = {}
    if isinstance(config.noise, EdmConfig) and config.prediction is Prediction.V:
        values = config.noise.sigma_max, config.noise.sigma_min
        found |= {name: np.array(value, np.float32) for name, value in zip(_VPRED, values, strict=True)}
    if isinstance(config.noise, EdmConfig) and isinstance(config.vae, VaeConfig) and config.vae.latent_mean is not None:
        latents = config.vae.latent_mean, config.vae.latent_std
        found |= {
            name: np.array(value, np.float32).reshape(1, -1, 1, 1)
            for name, value in zip(_LATENTS, latents, strict=True)
        }
    return found


def predicting(config: ModelConfig, prediction: Prediction, path: str | PurePath) -> ModelConfig:
    """A model with the prediction that the user gives for it, which overrides the files'. Flow matching has the noise
    levels with it. path: for messages. Raises InputError for another one than that of continuous noise levels that the
    files say."""
    if config.noise is not None and prediction is not config.prediction:
        raise InputError(
            f"--prediction {prediction.value} contradicts {path}, whose files say {type(config.noise).__name__} noise "
            f"levels with prediction {config.prediction.value}. Leave --prediction out (in Python: prediction=)"
        )
    if config.noise is None and prediction is Prediction.FLOW:
        # Nothing of a discrete schedule stays: samplers of the files may visit whole timesteps.
        changes: Any = {"noise": FlowConfig(), "schedule": ScheduleConfig(), "distilled": False, "sampling": None}
        return dataclasses.replace(config, prediction=prediction, **changes)
    config = dataclasses.replace(config, prediction=prediction)
    config.check_noise()
    return config


_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps"), Prediction.EPSILON),
    **dict.fromkeys(("v", "v_pred", "vpred"), Prediction.V),
    **dict.fromkeys(("flow", "flow_matching", "rectified_flow"), Prediction.FLOW),
}
"""Of modelspec.prediction_type, in small letters, with underscores, and without "_prediction" at the end."""


def with_marks(
    weights: Weights, metadata: Mapping[str, str], path: AnyPath, prediction: Prediction | None, remedy: str
) -> Weights:
    """A file's weights with the preset, the prediction and the schedule that its metadata, its marks or a norm imply.

    prediction: the user's, which counts before the file's. remedy: how the user gives it, for messages. Raises
    InputError for a modelspec.prediction_type that is not known.
    """
    if said := distilled_for(metadata):
        sampling = presets.with_stated(weights.config.sampling, said)
        weights = dataclasses.replace(weights, config=dataclasses.replace(weights.config, sampling=sampling))
    marks = {name for _, name in weights.carried}
    if any(name.startswith("edm_") for name in marks):
        return _with_edm(weights)
    stated = metadata.get("modelspec.prediction_type", "")
    predicted = _PREDICTIONS.get(stated.lower().replace("-", "_").removesuffix("_prediction"))
    if stated and predicted is None and prediction is None and "unet" in weights.parts:
        raise InputError(
            f"{path} says in its metadata that it predicts {stated} (modelspec.prediction_type), which is not known; "
            f"known are epsilon, v and flow. If it is one of these, or if the metadata is wrong, {remedy}"
        )
    if predicted is Prediction.FLOW and prediction in (None, predicted):
        return dataclasses.replace(weights, config=predicting(weights.config, predicted, path), noise_is_known=True)
    network = weights.config.unet
    is_sd2 = network.vector_dim is None and not network.conv_projection
    if "v_pred" in marks or predicted is Prediction.V:
        schedule = dataclasses.replace(weights.config.schedule, zero_terminal_snr="ztsnr" in marks)
        size = (768, 768) if is_sd2 else weights.config.default_size
        config = dataclasses.replace(weights.config, prediction=Prediction.V, schedule=schedule, default_size=size)
        return dataclasses.replace(weights, config=config)
    norm = weights.leaves.get("unet/up_blocks_3/attentions_2/transformer_blocks/norm1/bias")
    if stated or norm is None or not is_sd2 or network.in_channels != 4:
        # By convention ε in a whole model; a UNet alone may have any prediction.
        is_whole = weights.origin.layout is SourceLayout.SINGLE_FILE
        return dataclasses.replace(weights, noise_is_known=bool(stated) or is_whole)
    # The norm differs in spread between the published ε and v weights of SD 2.x.
    spread = float(np.std(norm.read().astype(np.float32)))
    found = Prediction.V if spread > 0.09 else Prediction.EPSILON
    size = (768, 768) if found is Prediction.V else (512, 512)
    note = (
        f"SD 2.x files do not say what the UNet predicts; taken for {found.value}, because the spread of a norm is "
        f"{spread:.3f} (above 0.09: v). --prediction overrides it"
    )
    config = dataclasses.replace(weights.config, prediction=found, default_size=size)
    return dataclasses.replace(weights, config=config, notes=(*weights.notes, note))


def distilled_for(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata says its weights were distilled for (`presets.stated`): ours, or the preset of published
    ones that are named there. Raises InputError for ours that cannot be read."""
    if (text := metadata.get(presets.STATED)) is not None:
        try:
            return presets.stated(from_json(json.loads(text), SamplingDefaults))
        except ValueError as error:
            raise InputError(
                f"The metadata {presets.STATED} is no JSON ({error}). Write the file again with this version"
            ) from error
    return presets.named(metadata.get("modelspec.title"), metadata.get("ss_output_name"))


# ---- licences --------------------------------------------------------------------------------------------------------


def licences_in(path: AnyPath) -> tuple[AnyPath, ...]:
    """Licence files of a model: in its directory; beside a file, its own (NAME.LICENSE) before its folder's."""
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.iterdir() if file.is_file() and _LICENCE.search(file.name))
    if path.is_dir():
        return tuple(file for file in files if file.name[0] != ".")
    own = [file for file in files if file.name.startswith(f"{path.stem}.")]
    return tuple(own or [file for file in files if _LICENCE.match(file.name) and file.name[0] != "."])


def stated_licence(path: AnyPath) -> str | None:
    """The licence that a model's card states, an identifier of Hugging Face such as openrail++; None if it states none.
    The card is README.md in a directory; beside a file, its own (NAME.md) before its folder's."""
    cards = [path / "README.md"] if path.is_dir() else [path.with_suffix(".md"), path.parent / "README.md"]
    card = next((card for card in cards if card.is_file()), None)
    if card is None:
        return None
    try:
        with card.open("rb") as file:
            found = _FRONT_MATTER.match(file.read(100_000).decode(errors="replace"))
    except OSError:  # a card that cannot be read states nothing; the weights may be fine
        return None
    stated = found and _STATED_LICENCE.search(found["fields"])
    return stated["licence"] if stated and stated["licence"] not in ("other", "unknown") else None


_FRONT_MATTER = re.compile(r"---\s*\n(?P<fields>.*?)\n---", re.DOTALL)
_STATED_LICENCE = re.compile(r"""^license:\s*(["']?)(?P<licence>[\w.+-]+)\1\s*$""", re.MULTILINE)
_LICENCE = re.compile(r"(^|\.)(licen[cs]e|copying|notice)([._-][\w.-]*)?$", re.IGNORECASE)
