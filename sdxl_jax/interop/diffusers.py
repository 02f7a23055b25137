"""The configurations of a diffusers directory, both ways. Weights are not read or written here.

    fields of a part's config.json        ── unet_config, vae_config, clip_config, schedule_config ──▶  our dataclasses
    our dataclasses                       ── unet_fields, vae_fields, clip_fields, scheduler_fields ──▶  fields
    a directory with model_index.json     ── read_model_config ──▶  ModelConfig  ── write_folder ──▶  a directory

What a field means, and what holds where a file leaves it out, follows the constructors of diffusers'
`UNet2DConditionModel`, `AutoencoderKL` and schedulers, and of transformers' `CLIPTextConfig`. A field that asks for
something that is not implemented is refused by its name: a model built without it would run and be wrong. Fields that
only steer numerics, tiling or the choice of a sampler are skipped, as is every name that begins with "_".
"""

import functools
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.text import ContextState, Tower
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import BetaSchedule, ScheduleConfig
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.model import ModelConfig, NoPrompt
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig

Fields = Mapping[str, Any]
"""A parsed config.json."""

# What the fields of a part may say


@dataclass(frozen=True)
class _Known:
    """The fields of one kind of part, by what becomes of them."""

    read: Fields
    """Fields that our configuration has a place for, with their values where a file leaves them out."""
    only: Mapping[str, tuple[Any, ...]]
    """Fields that must have one of these values. The first holds where a file leaves the field out."""
    skipped: str
    """Names of fields that change nothing here."""


def _each(names: str, *accepted: Any) -> dict[str, tuple[Any, ...]]:
    return {name: accepted for name in names.split()}


_UNET = _Known(
    read={
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "use_linear_projection": False,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    },
    only={
        **_each("act_fn", "silu"),
        **_each("addition_embed_type", None, "text_time"),
        **_each("attention_type resnet_time_scale_shift", "default"),
        **_each("conv_in_kernel conv_out_kernel", 3),
        **_each("downsample_padding mid_block_scale_factor resnet_out_scale_factor", 1),
        **_each("dropout freq_shift", 0),
        **_each("flip_sin_to_cos", True),
        **_each("mid_block_type", "UNetMidBlock2DCrossAttn"),
        **_each("norm_eps", 1e-5),
        **_each("time_embedding_type", "positional"),
        **_each("center_input_sample class_embeddings_concat dual_cross_attention only_cross_attention", False, None),
        **_each("resnet_skip_time_act", False, None),
        **_each("mid_block_only_cross_attention", None, False),
        **_each("class_embed_type cross_attention_norm encoder_hid_dim encoder_hid_dim_type num_class_embeds", None),
        **_each("reverse_transformer_layers_per_block time_cond_proj_dim time_embedding_act_fn", None),
        **_each("time_embedding_dim timestep_post_act", None),
    },
    # The second line is what diffusers' moving average leaves behind in the networks that it saves.
    skipped="upcast_attention addition_embed_type_num_heads torch_dtype "
    "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup",
)
_VAE = _Known(
    read={
        "block_out_channels": [64],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    only={
        **_each("act_fn", "silu"),
        **_each("in_channels out_channels", 3),
        **_each("shift_factor latents_mean latents_std", None),
        **_each("use_quant_conv use_post_quant_conv mid_block_add_attention", True),
    },
    skipped="force_upcast sample_size torch_dtype",
)
_CLIP = _Known(
    read={
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "eos_token_id": 49407,
    },
    only={
        "hidden_act": ("quick_gelu", "gelu"),
        "layer_norm_eps": (1e-5,),
        "max_position_embeddings": (77,),
    },
    # From the second line on: what older transformers wrote for every model, mostly about generating text.
    skipped="architectures model_type projection_dim dropout attention_dropout initializer_factor initializer_range "
    "bos_token_id pad_token_id torch_dtype dtype transformers_version tokenizer_class return_dict tie_word_embeddings "
    "id2label label2id length_penalty max_length num_beam_groups num_beams num_return_sequences repetition_penalty "
    "temperature top_k top_p typical_p",
)
_SCHEDULER = _Known(
    read={"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "rescale_betas_zero_snr": False},
    only={
        "beta_schedule": ("linear", "scaled_linear"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_type": ("discrete",),
        "trained_betas": (None,),
        "use_flow_sigmas": (False, None),
    },
    skipped="",
)


def _refused(where: str, name: str, value: Any, accepted: str) -> InputError:
    return InputError(
        f"{where} has {name}={json.dumps(value)}, which is not implemented here; implemented is {accepted}. Use a "
        "model that was trained so, or correct the file if it is wrong"
    )


def _checked(known: _Known, fields: Fields, where: str) -> dict[str, Any]:
    """Every field of `known.read` and `known.only`, given or not. Raises InputError for what is not implemented."""
    names = {*known.read, *known.only, *known.skipped.split()}
    for name, value in fields.items():
        if name.startswith("_"):
            continue
        if name in known.only and value not in known.only[name]:
            raise _refused(where, name, value, " or ".join(map(json.dumps, known.only[name])))
        if name not in names and value not in (None, False, [], {}):
            near = ", ".join(nearest_first(name, names)[:3])
            raise InputError(
                f"{where} has {name}={json.dumps(value)}, an unknown field. Nearest known names: {near}. Correct its "
                "name, or remove it if the model works without"
            )
    defaults = {**known.read, **{name: accepted[0] for name, accepted in known.only.items()}}
    return {name: fields.get(name, default) for name, default in defaults.items()}


def _numbers(fields: Fields, name: str, where: str, levels: int | None = None) -> tuple[int, ...]:
    """A field with one whole number a level; a single number stands for all levels, where their count is given."""
    value = fields[name]
    listed = [value] * levels if levels and not isinstance(value, list) else value
    if not (isinstance(listed, list) and listed and all(type(entry) is int and entry > 0 for entry in listed)):
        raise _refused(where, name, value, "a whole number above 0" + ("" if levels == 1 else ", or a list of them"))
    if levels is not None and len(listed) != levels:
        raise InputError(f"{where} has {name}={value}, where {levels} numbers are expected. Give as many")
    return tuple(listed)


def _number(fields: Fields, name: str, where: str, levels: int = 1) -> int:
    """A field with one whole number, the same for all levels if it is a list."""
    value, *rest = _numbers(fields, name, where, levels)
    if any(other != value for other in rest):
        raise _refused(where, name, fields[name], "one number for all levels")
    return value


# Each part: from the fields


def component_kind(fields: Fields) -> str | None:
    """What a config.json describes: "unet", "vae", "text_encoder", or None for anything else."""
    if (name := fields.get("_class_name")) is not None:
        return {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}.get(name) if isinstance(name, str) else None
    # The model type comes second: safety checkers have "clip" there too.
    if architectures := fields.get("architectures"):
        towers = {"CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"}
        return "text_encoder" if isinstance(architectures, list) and architectures[0] in towers else None
    return "text_encoder" if fields.get("model_type") in ("clip_text_model", "clip") else None


def unet_config(fields: Fields, where: str) -> UNetConfig:
    """unet/config.json. where: its path, for messages."""
    given = _checked(_UNET, fields, where)
    channels = _numbers(given, "block_out_channels", where)
    levels = len(channels)
    down, up = given["down_block_types"], given["up_block_types"]
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D")
    if not isinstance(down, list) or len(down) != levels or any(kind not in blocks for kind in down):
        raise _refused(where, "down_block_types", down, "DownBlock2D or CrossAttnDownBlock2D, one a level")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    if up != mirrored:
        raise _refused(where, "up_block_types", up, f"the mirror of down_block_types, here {mirrored}")
    depths = _numbers(given, "transformer_layers_per_block", where, levels)
    # diffusers' own misnomer: attention_head_dim is the number of heads, not their width.
    heads = "attention_head_dim" if given["num_attention_heads"] is None else "num_attention_heads"
    told = given["addition_embed_type"] is not None
    return UNetConfig(
        block_channels=channels,
        resnets_per_block=_number(given, "layers_per_block", where, levels),
        transformer_depth=tuple(depth if "Attn" in kind else 0 for depth, kind in zip(depths, down, strict=True)),
        middle_depth=depths[-1],
        heads=_numbers(given, heads, where, levels),
        context_dim=_number(given, "cross_attention_dim", where, levels),
        vector_dim=_number(given, "projection_class_embeddings_input_dim", where) if told else None,
        conv_projection=not given["use_linear_projection"],
        in_channels=_number(given, "in_channels", where),
        out_channels=_number(given, "out_channels", where),
        groups=_number(given, "norm_num_groups", where),
    )


def vae_config(fields: Fields, where: str) -> VaeConfig:
    """vae/config.json. where: its path, for messages."""
    given = _checked(_VAE, fields, where)
    channels = _numbers(given, "block_out_channels", where)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if given[name] != [kind] * len(channels):
            raise _refused(where, name, given[name], f"{kind}, once a level")
    scale = given["scaling_factor"]
    if type(scale) not in (int, float) or not scale > 0:
        raise _refused(where, "scaling_factor", scale, "a number above 0")
    return VaeConfig(
        block_channels=channels,
        resnets_per_block=_number(given, "layers_per_block", where),
        latent_channels=_number(given, "latent_channels", where),
        scale=float(scale),
        groups=_number(given, "norm_num_groups", where),
    )


def clip_config(fields: Fields, where: str) -> ClipTextConfig:
    """text_encoder/config.json, or a whole CLIP's, of which the text half counts. where: its path, for messages.

    Every file has a projection_dim, but a projection only goes with the architectures that are named for it.
    """
    architectures = fields.get("architectures") or []
    nested = fields.get("text_config")
    described = fields if nested is None else {**nested, **(fields.get("text_config_dict") or {})}
    given = _checked(_CLIP, described, where if nested is None else f"{where}, text_config,")
    projected = nested is not None or {"CLIPTextModelWithProjection", "CLIPModel"} & set(architectures)
    end = _number(given, "eos_token_id", where)
    return ClipTextConfig(
        width=_number(given, "hidden_size", where),
        layers=_number(given, "num_hidden_layers", where),
        heads=_number(given, "num_attention_heads", where),
        mlp_width=_number(given, "intermediate_size", where),
        activation=Activation(given["hidden_act"]),
        projection_dim=_number({"projection_dim": 512, **fields}, "projection_dim", where) if projected else None,
        vocabulary=_number(given, "vocab_size", where),
        # 2 is a mistake in the official files: their models pool at end-of-text, then the largest number.
        end_token=text.END_OF_TEXT if end == 2 else end,
    )


def schedule_config(fields: Fields, where: str) -> tuple[ScheduleConfig, Prediction]:
    """scheduler/scheduler_config.json: what the weights were trained with. The choice of a sampler is skipped."""
    kind = str(fields.get("_class_name"))
    if kind.startswith(("EDM", "FlowMatch")):
        raise _refused(where, "_class_name", kind, "any scheduler with betas, such as EulerDiscreteScheduler")
    # The classes whose own defaults are other than 0.0001, 0.02, linear.
    if kind.startswith(("Heun", "KDPM2", "DPMSolverSDE", "LCM", "TCD")):
        fields = {"beta_start": 0.00085, "beta_end": 0.012, **fields}
    if kind.startswith(("LCM", "TCD")):
        fields = {"beta_schedule": "scaled_linear", **fields}
    ours = {name: fields[name] for name in (*_SCHEDULER.read, *_SCHEDULER.only) if name in fields}
    given = _checked(_SCHEDULER, ours, where)
    for name in ("beta_start", "beta_end"):
        if type(given[name]) not in (int, float) or not 0 < given[name] < 1:
            raise _refused(where, name, given[name], "a number between 0 and 1")
    schedule = ScheduleConfig(
        timesteps=_number(given, "num_train_timesteps", where),
        beta_start=float(given["beta_start"]),
        beta_end=float(given["beta_end"]),
        betas=BetaSchedule(given["beta_schedule"]),
        zero_terminal_snr=bool(given["rescale_betas_zero_snr"]),
    )
    return schedule, Prediction(given["prediction_type"])


# Each part: back to the fields

_VERSION = {"_diffusers_version": "0.19.0"}
"""The version whose files these are like; diffusers treats those of older ones differently."""


def _written(known: _Known) -> dict[str, Any]:
    """The fields in which every network of ours is alike."""
    return {
        name: accepted[0] for name, accepted in known.only.items() if len(accepted) == 1 and accepted[0] is not None
    }


def unet_fields(
    config: UNetConfig, micro: MicroConfig | None = MicroConfig(), sample_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """unet/config.json. micro: what makes up the vector, if there is one. sample_size: of the latent, height, width."""
    if config.transformer_depth[-1] not in (0, config.middle_depth):
        raise InputError(
            f"model.unet.transformer_depth ends with {config.transformer_depth[-1]} and model.unet.middle_depth is "
            f"{config.middle_depth}, which diffusers cannot tell apart. Only a model where they are equal, or where "
            "the last level has 0, can be written for diffusers"
        )
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_depth]
    told = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": None if micro is None else micro.embedding_dim,
        "projection_class_embeddings_input_dim": config.vector_dim,
    }
    # One number for a square, as in the official files. (With two, diffusers' SDXL pipelines must be told a size.)
    size = sample_size and (sample_size[0] if sample_size[0] == sample_size[1] else list(sample_size))
    return {
        "_class_name": "UNet2DConditionModel",
        **_VERSION,
        **_written(_UNET),
        "sample_size": size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "block_out_channels": list(config.block_channels),
        "layers_per_block": config.resnets_per_block,
        "norm_num_groups": config.groups,
        "cross_attention_dim": config.context_dim,
        # A level without attention has 1, which nothing reads; the last number is also the middle's.
        "transformer_layers_per_block": [*(depth or 1 for depth in config.transformer_depth[:-1]), config.middle_depth],
        "attention_head_dim": list(config.heads),
        "use_linear_projection": not config.conv_projection,
        **({} if config.vector_dim is None else told),
    }


def vae_fields(config: VaeConfig, sample_size: int = 1024) -> dict[str, Any]:
    """vae/config.json. sample_size: pixels along a side of the tiles that diffusers can decode in."""
    levels = len(config.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        **_VERSION,
        **_written(_VAE),
        "block_out_channels": list(config.block_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.resnets_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        "sample_size": sample_size,
        "force_upcast": True,  # SDXL's first autoencoder overflows in float16
    }


def clip_fields(config: ClipTextConfig) -> dict[str, Any]:
    """text_encoder/config.json."""
    return {
        "architectures": ["CLIPTextModel" if config.projection_dim is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "projection_dim": config.projection_dim or config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.tokens,
        "hidden_act": config.activation.value,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": text.END_OF_TEXT - 1,
        "eos_token_id": config.end_token,
    }


def scheduler_fields(schedule: ScheduleConfig, prediction: Prediction) -> dict[str, Any]:
    """scheduler/scheduler_config.json: the sampler of the official SDXL files, or DDIM for zero terminal SNR."""
    fields = {
        "_class_name": "EulerDiscreteScheduler",
        **_VERSION,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.betas.value,
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": prediction.value,
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    }
    if not schedule.zero_terminal_snr:
        return fields
    # Euler's sigma is infinite where nothing of the image is left, and diffusers puts 4096 in its place. DDIM works
    # with α and σ, which are 0 and 1 there. "trailing", so that the first step is that timestep: Lin et al.,
    # arXiv:2305.08891, section 3.3.
    unread = ("interpolation_type", "skip_prk_steps", "use_karras_sigmas")
    ddim = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**{name: value for name, value in fields.items() if name not in unread}, **ddim}


def write_component(
    config: UNetConfig | VaeConfig | ClipTextConfig, directory: Path, micro: MicroConfig | None = MicroConfig()
) -> None:
    """directory/config.json of one part alone. micro: as for `unet_fields`."""
    match config:
        case UNetConfig():
            fields = unet_fields(config, micro)
        case VaeConfig():
            fields = vae_fields(config)
        case ClipTextConfig():
            fields = clip_fields(config)
    _write(directory / "config.json", fields)


# Files


def _read(path: Path, optional: bool = False) -> dict[str, Any]:
    """A JSON file with an object."""
    if not path.is_file():
        if optional:
            return {}
        raise InputError(f"{path} is missing. Download the model's directory whole, with its .json and .txt files")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). Download it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds {json.dumps(fields)[:50]}, not an object {{…}}. Download it again")
    return fields


def _write(path: Path, fields: Fields | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = fields if isinstance(fields, str) else json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    path.write_text(written, encoding="utf-8")


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's words with their numbers, in order, and its merges, as lines."""
    merges = gzip.decompress(text._MERGES.read_bytes()).decode().splitlines()
    vocabulary = text._byte_pair_encoder(None).get_vocab()
    return dict(sorted(vocabulary.items(), key=lambda entry: entry[1])), merges


def _word(token: Any) -> str | None:
    """A token of a tokenizer's files: a string, or an object with its "content"."""
    return token["content"] if isinstance(token, dict) else token


def _read_tokenizer(directory: Path, vocabulary_size: int) -> tuple[int, tuple[str, ...]]:
    """(padding token, added tokens), once the rest is seen to be CLIP's own.

    Of several files that name the padding, the one counts that transformers' `from_pretrained` heeds.
    """
    try:
        return _parsed_tokenizer(directory, vocabulary_size)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory} has a file of another form than transformers writes ({error!r}). Download it again"
        ) from error


def _parsed_tokenizer(directory: Path, vocabulary_size: int) -> tuple[int, tuple[str, ...]]:
    whole = _read(directory / "tokenizer.json", optional=True)
    if whole:
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    else:
        vocabulary = _read(directory / "vocab.json")
        if not (path := directory / "merges.txt").is_file():
            raise InputError(f"{path} is missing. Download the model's directory whole, with its .json and .txt files")
        lines = path.read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    if (vocabulary, merges) != _clip_vocabulary():
        raise InputError(
            f"{directory} has {len(vocabulary)} words and {len(merges)} merges that are not CLIP's own "
            f"{len(_clip_vocabulary()[0])} and {len(_clip_vocabulary()[1])}; other vocabularies are not implemented. "
            "Use a model with CLIP's tokenizer"
        )
    settings = _read(directory / "tokenizer_config.json", optional=True)
    entries = [(entry["id"], entry["content"]) for entry in whole.get("added_tokens", [])]
    entries += [(int(number), _word(token)) for number, token in settings.get("added_tokens_decoder", {}).items()]
    entries += [(number, word) for word, number in _read(directory / "added_tokens.json", optional=True).items()]
    if wrong := sorted({word for number, word in entries if vocabulary.get(word, number) != number}):
        raise InputError(f"{directory} gives words of CLIP's other numbers: {wrong[:3]}. Give added tokens new names")
    added = sorted({(number, word) for number, word in entries if word not in vocabulary})
    words = {word: number for number, word in added}
    numbers = list(range(len(vocabulary), vocabulary_size))
    if [number for number, _ in added] != numbers or len(words) < len(added):
        expected = f"{numbers[0]} to {numbers[-1]}, each once" if numbers else "none"
        raise InputError(
            f"{directory} has the added tokens {added}, but the text encoder's vocab_size={vocabulary_size} "
            f"has room for {expected}. Save tokenizer and text encoder together again"
        )
    # Files that list added_tokens_decoder are read without special_tokens_map.json, others with it before all else.
    special = {} if "added_tokens_decoder" in settings else _read(directory / "special_tokens_map.json", optional=True)
    named = (_word(source.get("pad_token")) for source in (special, settings, whole.get("padding") or {}))
    pad = next((word for word in named if word is not None), "<|endoftext|>")
    if pad not in vocabulary and pad not in words:
        raise InputError(f"{directory} pads with {pad!r}, which is none of its words. Correct pad_token")
    return {**vocabulary, **words}[pad], tuple(words)


def _tokenizer_files(tower: Tower) -> dict[str, Fields | str]:
    """The files of a tokenizer's folder, in the form that every version of transformers reads."""
    vocabulary, merges = _clip_vocabulary()
    words = [*vocabulary, *tower.added_tokens]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = words[tower.pad_token]
    files: dict[str, Fields | str] = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": text.TOKENS,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
    }
    if tower.added_tokens:
        first = len(vocabulary)
        files["added_tokens.json"] = {word: first + index for index, word in enumerate(tower.added_tokens)}
    return files


# Directories

_PIPELINES = {
    "StableDiffusionPipeline": False,
    "StableDiffusionImg2ImgPipeline": False,
    "StableDiffusionInpaintPipeline": False,
    "StableDiffusionXLPipeline": True,
    "StableDiffusionXLImg2ImgPipeline": True,
    "StableDiffusionXLInpaintPipeline": True,
}
"""Whether a class in model_index.json is of SDXL's family."""
_TOKENIZER = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def _read_index(directory: Path) -> dict[str, Any]:
    index = _read(directory / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in _PIPELINES:
        raise InputError(
            f"{directory / 'model_index.json'} has _class_name={name}, which is not implemented. Implemented are, "
            f"nearest first: {', '.join(nearest_first(name, _PIPELINES))}"
        )
    return index


def _components(index: Fields) -> list[str]:
    """Names of the parts that a model_index.json lists and that are not null."""
    return [name for name, value in index.items() if isinstance(value, list) and None not in value]


def unused_components(directory: Path) -> tuple[str, ...]:
    """Parts of a diffusers directory that no model here has a use for, such as safety_checker and image_encoder."""
    index = _read_index(directory)
    towers = ("text_encoder", "text_encoder_2") if _PIPELINES[index["_class_name"]] else ("text_encoder",)
    used = {"unet", "vae", "scheduler", *towers, *(_TOKENIZER[tower] for tower in towers)}
    return tuple(sorted(set(_components(index)) - used))


def _read_component(directory: Path, name: str, kind: str) -> tuple[dict[str, Any], str]:
    """A part's fields and the path of its config.json."""
    path = directory / name / "config.json"
    fields = _read(path)
    if component_kind(fields) != kind:
        given = fields.get("_class_name") or fields.get("architectures") or fields.get("model_type")
        classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}.get(kind, "CLIPTextModel")
        raise InputError(f"{path} describes {json.dumps(given)}, expected {classes}. Other classes are not implemented")
    return fields, str(path)


def read_model_config(directory: Path) -> ModelConfig:
    """The configuration of a diffusers directory: of SDXL, its refiner, SD 1.x or 2.x, inpainting variants included."""
    index = _read_index(directory)
    is_xl = _PIPELINES[index["_class_name"]]
    towers = []
    for name in ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",):
        if not is_xl or name in _components(index):
            clip = clip_config(*_read_component(directory, name, "text_encoder"))
            pad, added = _read_tokenizer(directory / _TOKENIZER[name], clip.vocabulary)
            towers.append(Tower(name, clip, pad, ContextState.PENULTIMATE if is_xl else ContextState.LAST, added))

    fields, where = _read_component(directory, "unet", "unet")
    unet, given = unet_config(fields, where), _checked(_UNET, fields, where)
    vae = vae_config(*_read_component(directory, "vae", "vae"))
    micro = None
    if is_xl:
        dim = _number(given, "addition_time_embed_dim", where)
        pooled = (towers[-1].clip.projection_dim or 0) if towers else 0
        has_score = index.get("requires_aesthetics_score") or unet.vector_dim == pooled + 5 * dim
        micro = MicroConfig(Numbers.SIZE_CROP_AESTHETIC if has_score else Numbers.SIZE_CROP_TARGET, dim)
    # Without a size, diffusers' own: 128 latent positions for SDXL, 64 before.
    size = {"sample_size": given["sample_size"] or (128 if is_xl else 64)}
    height, width = _numbers(size, "sample_size", where, 2)
    scheduler = directory / "scheduler" / "scheduler_config.json"
    schedule, prediction = schedule_config(_read(scheduler), str(scheduler))
    zeros = is_xl and index.get("force_zeros_for_empty_prompt", True)
    config = ModelConfig(
        unet=unet,
        vae=vae,
        text=tuple(towers),
        micro=micro,
        schedule=schedule,
        prediction=prediction,
        no_prompt=NoPrompt.ZEROS if zeros else NoPrompt.EMPTY,
        default_size=(height * vae.downsampling, width * vae.downsampling),
    )
    try:
        config.check()
    except InputError as error:
        raise InputError(f"The parts of {directory} do not fit together: {error}") from error
    return config


def as_diffusers_has_it(config: ModelConfig) -> ModelConfig:
    """The same model, told as diffusers' pipelines tell it.

    `StableDiffusionPipeline` reads a tower's last states alone. A tower that is read at its normed penultimate states
    (SD 2.x) is there one that lacks the last layer, and the projection behind it.
    """

    def shortened(tower: Tower) -> Tower:
        if tower.context is not ContextState.PENULTIMATE_NORMED:
            return tower
        clip = replace(tower.clip, layers=tower.clip.layers - 1, projection_dim=None)
        return replace(tower, clip=clip, context=ContextState.LAST)

    return config if config.micro is not None else replace(config, text=tuple(map(shortened, config.text)))


def _pipeline(config: ModelConfig) -> str:
    """The class that can run this model. Raises InputError if diffusers has none."""

    def refused(what: str, expected: str) -> InputError:
        return InputError(f"{what}, which diffusers' pipelines cannot express. They need {expected}")

    is_xl = config.micro is not None
    names = tuple(tower.name for tower in config.text)
    known = [("text_encoder", "text_encoder_2"), ("text_encoder_2",)] if is_xl else [("text_encoder",)]
    if names not in known:
        raise refused(f"model.text has the names {names}", " or ".join(map(str, known)))
    state = ContextState.PENULTIMATE if is_xl else ContextState.LAST
    for tower in config.text:
        if tower.context is not state:
            raise refused(f"model.text: {tower.name} has context={tower.context.value}", state.value)
        # The pooled vector is taken from the first tower that has a projection.
        if tower.clip.projection_dim is not None and not (is_xl and tower is config.text[-1]):
            raise refused(f"model.text: {tower.name} has projection_dim={tower.clip.projection_dim}", "None")
        if tower.clip.vocabulary != len(_clip_vocabulary()[0]) + len(tower.added_tokens):
            raise refused(
                f"model.text: {tower.name} has vocabulary={tower.clip.vocabulary} and {len(tower.added_tokens)} added "
                "tokens",
                f"a vocabulary of {len(_clip_vocabulary()[0])} and the added tokens",
            )
    if not is_xl and config.no_prompt is NoPrompt.ZEROS:
        raise refused("model.no_prompt=zeros in a model with model.micro=None", "no_prompt=empty")
    if any(side % config.vae.downsampling for side in config.default_size):
        raise refused(f"model.default_size={config.default_size}", f"multiples of {config.vae.downsampling}")
    latent = config.vae.latent_channels
    tasks = {latent: "", 2 * latent + 1: "Inpaint"}
    if config.unet.in_channels not in tasks:
        raise refused(f"model.unet.in_channels={config.unet.in_channels}", " or ".join(map(str, tasks)))
    task = tasks[config.unet.in_channels]
    if config.micro is not None and config.micro.numbers is Numbers.SIZE_CROP_AESTHETIC:
        task = task or "Img2Img"  # the base's class has no aesthetic score
    return f"StableDiffusion{'XL' if is_xl else ''}{task}Pipeline"


def write_folder(config: ModelConfig, directory: Path) -> None:
    """model_index.json, the scheduler, the tokenizers and the config.json of every part: all but the weights.

    The weights that belong in it are those of `as_diffusers_has_it(config)`.
    """
    config = as_diffusers_has_it(config)
    config.check()
    pipeline = _pipeline(config)
    scheduler = scheduler_fields(config.schedule, config.prediction)
    index: dict[str, Any] = {
        "_class_name": pipeline,
        **_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if config.micro is None:
        index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index["requires_safety_checker"] = False
    else:
        index |= {name: [None, None] for name in ("text_encoder", "tokenizer")}
        index["force_zeros_for_empty_prompt"] = config.no_prompt is NoPrompt.ZEROS
        index["add_watermarker"] = None
        if pipeline != "StableDiffusionXLPipeline":
            index["requires_aesthetics_score"] = config.micro.numbers is Numbers.SIZE_CROP_AESTHETIC
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
        files |= {f"{_TOKENIZER[tower.name]}/{name}": file for name, file in _tokenizer_files(tower).items()}
    for name, file in {"model_index.json": index, **files}.items():
        _write(directory / name, file)
