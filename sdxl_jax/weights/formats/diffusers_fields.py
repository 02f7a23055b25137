"""Fields of a part's config.json as diffusers and transformers have them, read and written.

    unet_config, vae_config, clip_config, schedule_config      fields to our dataclasses
    unet_fields, vae_fields, clip_fields, scheduler_fields     and back

The meaning of a field, and its default where a file leaves it out, follow the constructors of diffusers'
`UNet2DConditionModel`, `AutoencoderKL`, `AutoencoderTiny` and schedulers, and of transformers' `CLIPTextConfig`. A
field with a value that is not implemented is refused by its name: a model built without it would run and be wrong.
Fields that only affect numerics or tiling are skipped, as is every name that begins with "_"; those about how a model
is sampled are read by `diffusers_sampling`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_jax.conditioning.micro import MicroConfig
from sdxl_jax.conditioning.text import END_OF_TEXT
from sdxl_jax.diffusion.continuous import EdmConfig, FlowConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import BetaSchedule, ScheduleConfig
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.unet import ClassConfig, ClassPlace, UNetConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.weights.formats import diffusers_sampling
from sdxl_jax.weights.formats.json_files import Fields

# Known fields of each part, and their values


@dataclass(frozen=True)
class _Known:
    """The fields of one kind of part, by how they are treated."""

    read: Fields
    """Fields that our configuration has a place for, with their defaults."""
    only: Mapping[str, tuple[Any, ...]]
    """Fields that must have one of these values. The first is the default."""
    skipped: str
    """Names of fields that have no effect here."""


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
        "num_class_embeds": None,
        "time_cond_proj_dim": None,
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
        **_each("class_embed_type cross_attention_norm encoder_hid_dim encoder_hid_dim_type", None),
        **_each("reverse_transformer_layers_per_block time_embedding_act_fn", None),
        **_each("time_embedding_dim timestep_post_act", None),
    },
    # The second line: fields that diffusers' moving average leaves in the networks that it saves.
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
        "latents_mean": None,
        "latents_std": None,
    },
    only={
        **_each("act_fn", "silu"),
        **_each("in_channels out_channels", 3),
        **_each("shift_factor", None),
        **_each("use_quant_conv use_post_quant_conv mid_block_add_attention", True),
    },
    skipped="force_upcast sample_size torch_dtype",
)
_TINY_VAE = _Known(
    read={
        "encoder_block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "latent_channels": 4,
    },
    only={
        **_each("act_fn", "relu"),
        **_each("upsample_fn", "nearest"),
        **_each("in_channels out_channels", 3),
        **_each("upsampling_scaling_factor", 2),
        **_each("scaling_factor", 1),
        **_each("shift_factor", 0, None),
    },
    # The first two are for keeping latents as bytes; the third repeats the decoder's.
    skipped="latent_magnitude latent_shift block_out_channels force_upcast torch_dtype",
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


_EDM = _Known(
    read={"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
    only={"prediction_type": ("epsilon", "v_prediction"), "sigma_schedule": ("karras", "exponential")},
    skipped="",
)
_FLOW_MATCH = _Known(
    read={"shift": 1.0},
    only={
        **_each("num_train_timesteps", 1000),
        **_each("use_dynamic_shifting invert_sigmas stochastic_sampling", False, None),
        **_each("use_karras_sigmas use_exponential_sigmas use_beta_sigmas", False, None),
        **_each("shift_terminal", None, 0),
    },
    skipped="",
)


_FLOW_SOLVER = _Known(
    read={"flow_shift": 1.0},
    only={**_each("num_train_timesteps", 1000), **_each("use_dynamic_shifting", False, None)},
    skipped="",
)
"""Of solvers whose files have both prediction_type=flow_prediction and use_flow_sigmas=true."""


def _refused(where: str, name: str, value: Any, accepted: str) -> InputError:
    return InputError(
        f"{where} has {name}={json.dumps(value)}, which is not implemented; implemented is {accepted}. Use a model "
        "trained with that, or correct the file if it is wrong"
    )


def _checked(known: _Known, fields: Fields, where: str) -> dict[str, Any]:
    """The values of all fields of `known.read` and `known.only`. Raises InputError for what is not implemented."""
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
    """A field with one integer per level; a single number counts for all levels, if their number is given."""
    value = fields[name]
    listed = [value] * levels if levels and not isinstance(value, list) else value
    if not (isinstance(listed, list) and listed and all(type(entry) is int and entry > 0 for entry in listed)):
        raise _refused(where, name, value, "a whole number above 0" + ("" if levels == 1 else ", or a list of them"))
    if levels is not None and len(listed) != levels:
        raise InputError(
            f"{where} has {name}={json.dumps(value)}, expected {levels} numbers, one per level. Correct the file"
        )
    return tuple(listed)


def _number(fields: Fields, name: str, where: str, levels: int = 1) -> int:
    """A field with one integer, the same for all levels if it is a list."""
    value, *rest = _numbers(fields, name, where, levels)
    if any(other != value for other in rest):
        raise _refused(where, name, fields[name], "one number for all levels")
    return value


# Reading: from the fields


_CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "AutoencoderTiny": "vae"}


def component_kind(fields: Fields) -> str | None:
    """What a config.json describes: "unet", "vae", "text_encoder", or None for anything else."""
    if (name := fields.get("_class_name")) is not None:
        return _CLASSES.get(name) if isinstance(name, str) else None
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
        raise _refused(where, "down_block_types", down, "DownBlock2D or CrossAttnDownBlock2D, one per level")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    if up != mirrored:
        raise _refused(where, "up_block_types", up, f"the mirror of down_block_types, here {', '.join(mirrored)}")
    depths = _numbers(given, "transformer_layers_per_block", where, levels)
    # diffusers' own misnomer: attention_head_dim is the number of heads, not their width.
    heads = "attention_head_dim" if given["num_attention_heads"] is None else "num_attention_heads"
    has_vector = given["addition_embed_type"] is not None
    return UNetConfig(
        block_channels=channels,
        resnets_per_block=_number(given, "layers_per_block", where, levels),
        transformer_depth=tuple(depth if "Attn" in kind else 0 for depth, kind in zip(depths, down, strict=True)),
        middle_depth=depths[-1],
        heads=_numbers(given, heads, where, levels),
        context_dim=_number(given, "cross_attention_dim", where, levels),
        vector_dim=_number(given, "projection_class_embeddings_input_dim", where) if has_vector else None,
        conv_projection=not given["use_linear_projection"],
        in_channels=_number(given, "in_channels", where),
        out_channels=_number(given, "out_channels", where),
        groups=_number(given, "norm_num_groups", where),
        classes=None
        if given["num_class_embeds"] is None
        else ClassConfig(_number(given, "num_class_embeds", where), ClassPlace.TIMESTEP),
        guidance_dim=None if given["time_cond_proj_dim"] is None else _number(given, "time_cond_proj_dim", where),
    )


def unet_surroundings(fields: Fields, where: str, default: int) -> tuple[int, tuple[int, int]]:
    """(width of one number's embedding, latent (height, width) of images) of a UNet's file, which are not properties of
    its weights.

    default: height and width where the file leaves them out.
    """
    given = _checked(_UNET, fields, where)
    height, width = _numbers({"sample_size": given["sample_size"] or default}, "sample_size", where, 2)
    return (_number(given, "addition_time_embed_dim", where) if given["addition_time_embed_dim"] else 0), (
        height,
        width,
    )


def vae_config(fields: Fields, where: str) -> AnyVaeConfig:
    """vae/config.json, of either kind. where: its path, for messages."""
    if fields.get("_class_name") == "AutoencoderTiny":
        return _tiny_vae_config(fields, where)
    given = _checked(_VAE, fields, where)
    channels = _numbers(given, "block_out_channels", where)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if given[name] != [kind] * len(channels):
            raise _refused(where, name, given[name], f"{kind}, once per level")
    scale = given["scaling_factor"]
    if type(scale) not in (int, float) or not scale > 0:
        raise _refused(where, "scaling_factor", scale, "a number above 0")
    config = VaeConfig(
        block_channels=channels,
        resnets_per_block=_number(given, "layers_per_block", where),
        latent_channels=_number(given, "latent_channels", where),
        scale=float(scale),
        groups=_number(given, "norm_num_groups", where),
        latent_mean=_per_channel(given, "latents_mean", where),
        latent_std=_per_channel(given, "latents_std", where),
    )
    config.check(where)
    return config


def _per_channel(fields: Fields, name: str, where: str) -> tuple[float, ...] | None:
    """A field with one number per channel of the latent, or null."""
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, list) or any(type(each) not in (int, float) for each in value):
        raise _refused(where, name, value, "a list of numbers, one per channel, or null")
    return tuple(map(float, value))


def _tiny_vae_config(fields: Fields, where: str) -> TinyVaeConfig:
    given = _checked(_TINY_VAE, fields, where)
    encoder, decoder = (_numbers(given, f"num_{half}_blocks", where) for half in ("encoder", "decoder"))
    if len(encoder) != len(decoder):
        raise _refused(where, "num_encoder_blocks", list(encoder), f"as many levels as the decoder's {len(decoder)}")
    # diffusers' layers between the levels keep the number of channels, which must then be one.
    channels = _number(given, "decoder_block_out_channels", where, len(decoder))
    if _number(given, "encoder_block_out_channels", where, len(encoder)) != channels:
        raise _refused(where, "encoder_block_out_channels", given["encoder_block_out_channels"], "the decoder's")
    return TinyVaeConfig(channels, encoder, decoder, _number(given, "latent_channels", where))


def clip_config(fields: Fields, where: str) -> ClipTextConfig:
    """text_encoder/config.json, or a whole CLIP's, of which the text tower is read. where: its path, for messages.

    Every file has a projection_dim, but only the architectures that are named for it have a projection.
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
        # 2 is an error in the official files: their models pool at end-of-text, at the time the largest id.
        end_token=END_OF_TEXT if end == 2 else end,
    )


def noise_config(fields: Fields, where: str) -> EdmConfig | FlowConfig | None:
    """scheduler/scheduler_config.json: the continuous noise levels that the weights were trained with; None: discrete
    ones."""
    kind = str(fields.get("_class_name"))
    known = _FLOW_MATCH if kind in _FLOW_CLASSES else _EDM if kind in _EDM_CLASSES else None
    if fields.get("prediction_type") == "flow_prediction" and fields.get("use_flow_sigmas") is True:
        known = _FLOW_SOLVER
    if known is None:
        if kind.startswith(("EDM", "FlowMatch")):
            raise _refused(where, "_class_name", kind, " or ".join((*_EDM_CLASSES, *_FLOW_CLASSES)))
        return None
    given = _checked(known, {name: fields[name] for name in (*known.read, *known.only) if name in fields}, where)
    for name in known.read:
        if type(given[name]) not in (int, float):
            raise _refused(where, name, given[name], "a number")
    numbers = {name: float(given[name]) for name in known.read}
    noise = EdmConfig(**numbers) if known is _EDM else FlowConfig(*numbers.values())
    noise.check(where)
    return noise


_EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler",)


def schedule_config(fields: Fields, where: str) -> tuple[ScheduleConfig, Prediction]:
    """scheduler/scheduler_config.json: the schedule and prediction that the weights were trained with. With continuous
    noise levels (`noise_config`) the schedule is the default one, which is not used."""
    kind = str(fields.get("_class_name"))
    if (noise := noise_config(fields, where)) is not None:
        if isinstance(noise, FlowConfig):
            return ScheduleConfig(), Prediction.FLOW
        return ScheduleConfig(), Prediction.V if fields.get("prediction_type") == "v_prediction" else Prediction.EDM
    # The classes whose defaults are not 0.0001, 0.02, linear.
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


# Writing: to the fields

VERSION = {"_diffusers_version": "0.19.0"}
"""The version whose file format is written; diffusers treats files of older ones differently."""


def _written(known: _Known) -> dict[str, Any]:
    """The fields that have one value for every network here."""
    return {
        name: accepted[0] for name, accepted in known.only.items() if len(accepted) == 1 and accepted[0] is not None
    }


def unet_fields(
    config: UNetConfig, micro: MicroConfig | None = MicroConfig(), sample_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """unet/config.json. micro: composition of the conditioning vector, if there is one. sample_size: (height, width) of
    the latent."""
    if config.transformer_depth[-1] not in (0, config.middle_depth):
        raise InputError(
            f"model.unet.transformer_depth ends with {config.transformer_depth[-1]} and model.unet.middle_depth is "
            f"{config.middle_depth}, but diffusers has one number for both. Make them equal, or the last level's 0, or "
            "choose --to orbax"
        )
    _check_classes(config)
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_depth]
    vector_fields = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": None if micro is None else micro.embedding_dim,
        "projection_class_embeddings_input_dim": config.vector_dim,
    }
    # One number for a square, as in the official files. (With two, diffusers' SDXL pipelines need an explicit size.)
    size = sample_size and (sample_size[0] if sample_size[0] == sample_size[1] else list(sample_size))
    return {
        "_class_name": "UNet2DConditionModel",
        **VERSION,
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
        # A level without attention has 1, which is not read; the last number is also the middle's.
        "transformer_layers_per_block": [*(depth or 1 for depth in config.transformer_depth[:-1]), config.middle_depth],
        "attention_head_dim": list(config.heads),
        "use_linear_projection": not config.conv_projection,
        **({} if config.vector_dim is None else vector_fields),
        **({} if config.classes is None else {"num_class_embeds": config.classes.number}),
        **({} if config.guidance_dim is None else {"time_cond_proj_dim": config.guidance_dim}),
    }


def _check_classes(config: UNetConfig) -> None:
    """Raises InputError for classes and contexts that diffusers' UNet cannot express."""
    if config.classes is not None and config.classes.place is ClassPlace.TOKEN:
        raise InputError(
            "model.unet.classes.place=token: diffusers' UNet has no class token, only classes added to the embedding "
            "of the timestep (place=timestep). Choose --to orbax or --to single-file"
        )
    if config.context_dim is None:
        raise InputError(
            "model.unet.context_dim=None: diffusers' UNet attends to text, and this one to nothing. Choose --to orbax "
            "or --to single-file"
        )


def vae_fields(config: AnyVaeConfig, sample_size: int = 1024) -> dict[str, Any]:
    """vae/config.json. sample_size: pixels along a side of the tiles that diffusers can decode in."""
    if isinstance(config, TinyVaeConfig):
        return {
            "_class_name": "AutoencoderTiny",
            **VERSION,
            **_written(_TINY_VAE),
            "encoder_block_out_channels": [config.channels] * len(config.encoder_blocks),
            "decoder_block_out_channels": [config.channels] * len(config.decoder_blocks),
            "num_encoder_blocks": list(config.encoder_blocks),
            "num_decoder_blocks": list(config.decoder_blocks),
            "latent_channels": config.latent_channels,
        }
    if isinstance(config, WaveletConfig):
        raise InputError("model.vae is the exact autoencoder, which diffusers does not have. Choose --to orbax")
    levels = len(config.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        **VERSION,
        **_written(_VAE),
        "block_out_channels": list(config.block_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.resnets_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        **({} if config.latent_mean is None else {"latents_mean": list(config.latent_mean)}),
        **({} if config.latent_std is None else {"latents_std": list(config.latent_std)}),
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
        "bos_token_id": END_OF_TEXT - 1,
        "eos_token_id": config.end_token,
    }


def is_distilled(fields: Fields) -> bool:
    """Whether scheduler/scheduler_config.json is that of a consistency model, with guidance distilled into its
    weights."""
    return str(fields.get("_class_name")).startswith(("LCM", "TCD"))


def scheduler_fields(
    schedule: ScheduleConfig,
    prediction: Prediction,
    distilled: bool = False,
    sampling: SamplingDefaults | None = None,
    noise: EdmConfig | FlowConfig | None = None,
) -> dict[str, Any]:
    """scheduler/scheduler_config.json: the schedule that the weights were trained with, and how they are sampled.
    sampling None: the sampler of the official SDXL files, LCM for a distilled model, DDIM for zero terminal SNR. noise:
    continuous levels, in the schedule's place.

    Euler's sigma is infinite at zero terminal SNR, and diffusers replaces it by 4096. DDIM works with α and σ, which
    are 0 and 1 there. Its spacing is "trailing", so that the first step is that timestep: Lin et al., arXiv:2305.08891,
    section 3.3.
    """
    if isinstance(noise, FlowConfig):
        flow = {"_class_name": _FLOW_CLASSES[0], **VERSION, "num_train_timesteps": 1000, "shift": noise.shift}
        return dict(sorted(flow.items()))
    if noise is not None:
        edm = {
            **diffusers_sampling.written_edm(sampling or SamplingDefaults()),
            **VERSION,
            "sigma_min": noise.sigma_min,
            "sigma_max": noise.sigma_max,
            "sigma_data": noise.sigma_data,
            "prediction_type": "v_prediction" if prediction is Prediction.V else "epsilon",
        }
        return dict(sorted(edm.items()))
    fields = {
        **diffusers_sampling.written(sampling, schedule.zero_terminal_snr, distilled),
        **VERSION,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.betas.value,
        "beta_start": schedule.beta_start,
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": prediction.value,
        "trained_betas": None,
    }
    if schedule.zero_terminal_snr:
        fields["rescale_betas_zero_snr"] = True
    return dict(sorted(fields.items()))
