"""Tiny models of every supported family, and their files in the layouts of other projects.

For tests of reading and converting. Values depend on model and seed alone, so that the same model in two layouts has
the same parameters. Sizes are such that they can be detected from a file: norms of 32 groups, heads of 64 features or
a single head.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sdxl_jax.arrays import Params, unflatten
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.initialisers import Parameter
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import SD_VAE, SDXL_VAE, AnyVaeConfig, VaeConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.formats import diffusers
from sdxl_jax.weights.lazy import part_configs
from sdxl_jax.weights.names import Dialect, Naming, PartConfig

Arrays = dict[str, np.ndarray]
DTYPES = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_VAE = VaeConfig((32, 32), 1)
_QUICK = ClipTextConfig(8, 2, 1, 16)
_GELU = ClipTextConfig(8, 2, 1, 16, Activation.GELU, 8)
_UNET = UNetConfig((32, 64), 1, (0, 2), 2, (1, 1), 16, 8 + 6 * 4)
_CONV = UNetConfig((32, 32), 1, (1, 0), 1, (8, 8), 8, None, conv_projection=True)
_LINEAR = UNetConfig((32, 32, 32, 32), 2, (1, 1, 1, 0), 1, (1, 1, 1, 1), 8, None)


def _like(preset: ModelConfig, unet: UNetConfig, *towers: ClipTextConfig, **changes: Any) -> ModelConfig:
    text = tuple(dataclasses.replace(tower, clip=clip) for tower, clip in zip(preset.text, towers, strict=True))
    scale = (SDXL_VAE if preset.micro else SD_VAE).scale
    micro = preset.micro and MicroConfig(preset.micro.numbers, 4)
    vae = dataclasses.replace(_VAE, scale=scale)
    return dataclasses.replace(preset, unet=unet, vae=vae, text=text, micro=micro, **changes)


def inpainting(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, in_channels=9))


BASE = _like(SDXL_BASE, _UNET, _QUICK, _GELU)
_REFINER_UNET = dataclasses.replace(_UNET, block_channels=(32, 64, 64), transformer_depth=(0, 1, 0), middle_depth=1)
_REFINER_UNET = dataclasses.replace(_REFINER_UNET, heads=(1, 1, 1), context_dim=8, vector_dim=8 + 5 * 4)
STABLE_1 = _like(SD1, _CONV, _QUICK)
STABLE_2 = _like(SD2, _LINEAR, _GELU)
MODELS: dict[str, ModelConfig] = {
    "SDXL base": BASE,
    "SDXL refiner": _like(SDXL_REFINER, _REFINER_UNET, _GELU),
    "SDXL inpainting": inpainting(BASE),
    "SD 1.x": STABLE_1,
    "SD 1.x inpainting": inpainting(STABLE_1),
    "SD 2.x": STABLE_2,
    "SD 2.x v": dataclasses.replace(STABLE_2, prediction=Prediction.V, default_size=(768, 768)),
}
assert MODELS["SDXL refiner"].micro == MicroConfig(Numbers.SIZE_CROP_AESTHETIC, 4)


Part = UNetConfig | AnyVaeConfig | ClipTextConfig
"""As `ModelConfig` has them."""


def with_weights(config: Part) -> PartConfig:
    assert not isinstance(config, WaveletConfig)
    return config


def part_params(config: Part, dtype: Any = np.float32, seed: int = 0) -> Params:
    """Random parameters, a tenth of the standard normal: float16 holds sums of them."""

    def one(path: str, leaf: Parameter) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        return (0.1 * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)

    return unflatten({path: one(path, leaf) for path, leaf in names.abstract(with_weights(config)).items()})


def tensors(config: Part, naming: Naming, dtype: Any = np.float32, seed: int = 0) -> Arrays:
    """Random weights of one part, in the layout of a file."""
    return names.to_tensors(names.table(with_weights(config), naming), part_params(config, dtype, seed))


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(arrays), path, metadata)
    return path


def original(config: ModelConfig) -> dict[str, Naming]:
    """The parts' names in Stability's files."""
    clip, openclip = (Dialect.TRANSFORMERS, "transformer."), (Dialect.OPENCLIP, "model.")
    match list(part_configs(config)):
        case ["unet", "vae", "text_encoder", "text_encoder_2"]:
            towers = {
                "text_encoder": (*clip, "conditioner.embedders.0."),
                "text_encoder_2": (*openclip, "conditioner.embedders.1."),
            }
        case ["unet", "vae", "text_encoder_2"]:
            towers = {"text_encoder_2": (*openclip, "conditioner.embedders.0.")}
        case _:
            towers = {"text_encoder": (*(clip if config.unet.conv_projection else openclip), "cond_stage_model.")}
    return {
        "unet": Naming(Dialect.ORIGINAL, "model.diffusion_model."),
        "vae": Naming(Dialect.ORIGINAL, "first_stage_model.", conv_attention=True),
        **{name: Naming(dialect, prefix + inner) for name, (dialect, inner, prefix) in towers.items()},
    }


POSITION_IDS = np.arange(77, dtype=np.int64)[None]
BESIDE_DIFFUSERS = {"text_model.embeddings.position_ids": POSITION_IDS}


def beside_original(config: ModelConfig, dtype: Any = np.float32) -> Arrays:
    """Tensors other than weights in published single files."""
    found = {
        "alphas_cumprod": np.linspace(1, 0, 1000, dtype=np.float32),
        "model_ema.decay": np.array(0.9999, np.float32),
        "model_ema.num_updates": np.array(5, np.int32),
        "model_ema.diffusion_modelinput_blocks00weight": np.full((32, config.unet.in_channels, 3, 3), 0.5, dtype),
        "first_stage_model.loss.logvar": np.array(0.25, np.float32),
    }
    for naming in original(config).values():
        if naming.dialect is Dialect.TRANSFORMERS:
            found[f"{naming.prefix}text_model.embeddings.position_ids"] = POSITION_IDS
        if naming.dialect is Dialect.OPENCLIP:
            found[f"{naming.prefix}logit_scale"] = np.array(4.6, dtype)
    if config.prediction is Prediction.V:
        found["v_pred"] = np.zeros(0, np.float32)
    return found


def single_file(
    path: Path,
    config: ModelConfig,
    dtype: Any = np.float32,
    beside: bool = True,
    seed: int = 0,
    **metadata: str,
) -> Path:
    """A model in Stability's layout. beside: with the tensors of `beside_original`."""
    arrays = beside_original(config, dtype) if beside else {}
    for part, naming in original(config).items():
        arrays |= tensors(part_configs(config)[part], naming, dtype, seed)
    return save(path, arrays, {"format": "pt", **metadata})


def diffusers_namings(config: ModelConfig) -> dict[str, Naming]:
    def dialect(part_config: PartConfig) -> Dialect:
        return Dialect.TRANSFORMERS if isinstance(part_config, ClipTextConfig) else Dialect.DIFFUSERS

    return {part: Naming(dialect(part_config)) for part, part_config in part_configs(config).items()}


def weights_name(part: str) -> str:
    return "diffusion_pytorch_model" if part in ("unet", "vae") else "model"


def diffusers_folder(
    path: Path, config: ModelConfig, dtype: Any = np.float32, seed: int = 0, namings: Mapping[str, Naming] | None = None
) -> Path:
    """A model in diffusers' layout. namings: of parts with other names than today's."""
    diffusers.write_folder(config, path)
    config = diffusers.as_diffusers_has_it(config)
    for part, naming in (diffusers_namings(config) | dict(namings or {})).items():
        arrays = tensors(part_configs(config)[part], naming, dtype, seed)
        if naming.dialect is Dialect.TRANSFORMERS:
            arrays |= BESIDE_DIFFUSERS
        save(path / part / f"{weights_name(part)}.safetensors", arrays, {"format": "pt"})
    return path


def shard(path: Path, count: int = 2, variant: str = "") -> Path:
    """Splits a file into shards with an index, as diffusers and transformers do. Returns the path of the index."""
    arrays, places = read(path), {}
    dot = f".{variant}" if variant else ""
    stem = path.name.removesuffix(".safetensors").removesuffix(dot)
    for number in range(count):
        name = f"{stem}{dot}-{number + 1:05}-of-{count:05}.safetensors"
        mine = {key: arrays[key] for key in sorted(arrays)[number::count]}
        save(path.with_name(name), mine, {"format": "pt"})
        places |= dict.fromkeys(mine, name)
    index = path.with_name(f"{stem}.safetensors.index{dot}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    path.unlink()
    return index


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Metadata and data of a safetensors file, read without the library."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


_CODES = {"F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I8": "int8", "F64": "float64"}


def read(path: Path) -> Arrays:
    """The tensors of a file."""
    header, data = _header(path)
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data[slice(*entry["data_offsets"])],
            DTYPES["bfloat16"] if entry["dtype"] == "BF16" else np.dtype(_CODES[entry["dtype"]]),
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def metadata(path: Path) -> dict[str, str]:
    return _header(path)[0].get("__metadata__", {})


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file, or of all files below a directory: dtype, shape and bits by FILE:NAME."""
    files = [(path, "")] if path.is_file() else [(f, str(f.relative_to(path))) for f in path.rglob("*.safetensors")]
    return {
        f"{place}:{name}": (str(array.dtype), array.shape, array.tobytes())
        for file, place in files
        for name, array in read(file).items()
    }


Edit = Callable[[Arrays], object]


def edit(path: Path, change: Edit) -> None:
    """Changes a file's tensors in place."""
    arrays, saved = read(path), metadata(path)
    change(arrays)
    save(path, arrays, saved)
