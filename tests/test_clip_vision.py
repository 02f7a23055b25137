"""Image towers of CLIP: their sizes, and files of them."""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import clip_vision, initialisers, layers
from sdxl_jax.models.clip import Activation
from sdxl_jax.models.clip_vision import VISION_BIGG, VISION_H, VISION_L, VISION_L_336, ClipVisionConfig
from sdxl_jax.weights import clip_vision as towers
from sdxl_jax.weights import names
from sdxl_jax.weights.names import Dialect, Naming

TINY = ClipVisionConfig(128, 2, 2, 256, Activation.GELU, 40, 28, 14)


@pytest.mark.parametrize(
    ("config", "count", "positions"),
    [
        (VISION_L, 303_966_208, 257),
        (VISION_L_336, 304_293_888, 577),
        (VISION_H, 632_076_800, 257),
        (VISION_BIGG, 1_844_907_264, 257),
    ],
    ids=["L", "L-336", "H", "bigG"],
)
def test_image_towers_have_the_sizes_of_the_published_ones(
    config: ClipVisionConfig, count: int, positions: int
) -> None:
    assert layers.count(clip_vision.abstract(config)) == count
    assert config.positions == positions


def tensors(dialect: Dialect, dtype: type) -> dict[str, np.ndarray]:
    flat = {
        path: initialisers.sample(leaf, 0, path).astype(dtype)
        for path, leaf in flatten(clip_vision.abstract(TINY)).items()
    }
    prefix = "visual." if dialect is Dialect.OPENCLIP else ""
    return names.to_tensors(names.table(TINY, Naming(dialect, prefix)), unflatten(flat))


@pytest.mark.parametrize("dialect", [Dialect.TRANSFORMERS, Dialect.OPENCLIP])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_file_there_and_back_is_bit_identical(dialect: Dialect, dtype: type, tmp_path: Path) -> None:
    given = tensors(dialect, dtype)
    save_file(given, tmp_path / "tower.safetensors")
    other = Dialect.OPENCLIP if dialect is Dialect.TRANSFORMERS else Dialect.TRANSFORMERS
    towers.write(towers.open_tower(tmp_path / "tower.safetensors"), tmp_path / "other.safetensors", other)
    towers.write(towers.open_tower(tmp_path / "other.safetensors"), tmp_path / "back.safetensors", dialect)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == given.keys()
    for name, value in given.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name].view(np.uint8), value.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("dialect", [Dialect.TRANSFORMERS, Dialect.OPENCLIP])
def test_the_image_tower_of_a_whole_clip_is_read(dialect: Dialect, tmp_path: Path) -> None:
    given = tensors(dialect, np.float32)
    of_text = {
        Dialect.TRANSFORMERS: ("text_model.final_layer_norm.bias", "text_projection.weight"),
        Dialect.OPENCLIP: ("ln_final.bias", "token_embedding.weight", "transformer.resblocks.0.ln_1.bias"),
    }[dialect]
    buffers = ("logit_scale", "vision_model.embeddings.position_ids")[: 2 if dialect is Dialect.TRANSFORMERS else 1]
    save_file(given | {name: np.zeros(3, np.float32) for name in (*of_text, *buffers)}, tmp_path / "clip.safetensors")
    tower = towers.open_tower(tmp_path / "clip.safetensors")
    assert tower.config == TINY
    kernel = tower.load()["patch_embedding"]["kernel"]
    name = "conv1.weight" if dialect is Dialect.OPENCLIP else "patch_embedding.weight"
    (weight,) = (value for key, value in given.items() if key.endswith(name))
    np.testing.assert_array_equal(kernel, jnp.transpose(weight, (2, 3, 1, 0)))


def test_files_that_hold_no_image_tower_or_a_part_of_one_are_refused(tmp_path: Path) -> None:
    save_file({"text_projection.weight": np.zeros((2, 2), np.float32)}, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="holds 1 tensors, but no image tower"):
        towers.open_tower(tmp_path / "text.safetensors")
    part = tensors(Dialect.TRANSFORMERS, np.float32)
    del part["vision_model.encoder.layers.1.self_attn.q_proj.bias"]
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(
        InputError, match=r"1 of \d+ tensors are missing, the first is vision_model\.encoder\.layers\.1"
    ):
        towers.open_tower(tmp_path / "part.safetensors")
    del part["vision_model.embeddings.patch_embedding.weight"]
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="patch_embedding"):
        towers.open_tower(tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="There is nothing at"):
        towers.open_tower(tmp_path / "nothing")
