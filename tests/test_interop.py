"""The tables of names: complete, invertible, and clear about what does not fit.

Agreement with the names that diffusers and transformers write is tested in `parity/`; here some names of the weight
files on the hub are looked up.
"""

import functools
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.interop import names
from sdxl_jax.models import clip, layers, unet, vae

UNET = unet.UNetConfig((16, 32), 1, (0, 3), 2, (1, 2), 12, 24, groups=8)
VAE = vae.VaeConfig((16, 32), 1, groups=8)
TOWER = clip.ClipTextConfig(24, 3, 2, 48, clip.Activation.QUICK_GELU, 20, 60, 50)
MODELS = {
    "UNet": (unet.init, UNET, names.UNET),
    "SDXL base": (unet.init, unet.SDXL_BASE, names.UNET),
    "SD 1.x": (unet.init, unet.SD1, names.UNET),
    "VAE": (vae.init, VAE, names.VAE),
    "SDXL VAE": (vae.init, vae.SDXL_VAE, names.VAE),
    "tower": (clip.init, TOWER, names.CLIP_TEXT),
    "CLIP-L": (clip.init, clip.CLIP_L, names.CLIP_TEXT),
    "CLIP-H": (clip.init, clip.CLIP_H, names.CLIP_TEXT),
    "CLIP-bigG": (clip.init, clip.CLIP_BIGG, names.CLIP_TEXT),
}
TINY = ("UNet", "VAE", "tower")


@functools.cache
def abstract(name: str) -> Params:
    init, config, _ = MODELS[name]
    return layers.abstract(lambda key: init(key, config))


def table(name: str) -> names.Table:
    return names.table(abstract(name), MODELS[name][2])


def random_params(name: str, dtype: Any = np.float32) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), abstract(name))


def tensors(name: str) -> dict[str, np.ndarray]:
    return names.to_tensors(table(name), random_params(name))


@pytest.mark.parametrize("name", MODELS)
def test_table_lists_each_parameter_once(name: str) -> None:
    params, entries = abstract(name), table(name)
    paths = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    assert [entry.path for entry in entries] == paths
    repeated = [tensor for tensor, times in Counter(t for entry in entries for t in entry.names).items() if times > 1]
    assert not repeated
    assert all(len(entry.names) == (entry.shape[0] if entry.stacked else 1) for entry in entries)
    assert layers.count(params) == sum(int(np.prod(entry.shape)) for entry in entries)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("SDXL base", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"),
        ("SDXL base", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias"),
        ("SDXL base", "up_blocks.0.upsamplers.0.conv.weight"),
        ("SDXL base", "add_embedding.linear_1.weight"),
        ("SD 1.x", "down_blocks.0.downsamplers.0.conv.bias"),
        ("SDXL VAE", "encoder.mid_block.attentions.0.to_out.0.weight"),
        ("SDXL VAE", "post_quant_conv.bias"),
        ("CLIP-L", "text_model.encoder.layers.11.self_attn.q_proj.weight"),
        ("CLIP-L", "text_model.embeddings.position_embedding.weight"),
        ("CLIP-bigG", "text_projection.weight"),
    ],
)
def test_names_are_those_of_the_weight_files(name: str, tensor: str) -> None:
    assert tensor in {written for entry in table(name) for written in entry.names}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", TINY)
def test_parameters_return_bit_for_bit(name: str, dtype: Any) -> None:
    params = random_params(name, dtype)
    written = names.to_tensors(table(name), params)
    returned = names.from_tensors(table(name), written)
    assert jax.tree.structure(returned) == jax.tree.structure(params)
    for mine, expected in zip(jax.tree.leaves(returned), jax.tree.leaves(params), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_array_equal(mine, expected)
    assert all(tensor.flags.c_contiguous for tensor in written.values())


def test_stacked_layers_keep_their_order() -> None:
    params = random_params("UNet")
    written = names.to_tensors(table("UNet"), params)
    stacked = params["mid_block"]["attentions_0"]["transformer_blocks"]["attn1"]["to_q"]["kernel"]
    for layer in range(2):
        tensor = written[f"mid_block.attentions.0.transformer_blocks.{layer}.attn1.to_q.weight"]
        np.testing.assert_array_equal(tensor, stacked[layer].T)


def test_convolutions_are_written_output_first() -> None:
    params = random_params("UNet")
    written = names.to_tensors(table("UNet"), params)
    np.testing.assert_array_equal(written["conv_in.weight"], params["conv_in"]["kernel"].transpose(3, 2, 0, 1))


def test_missing_tensor_is_named_with_its_nearest_names() -> None:
    given = tensors("UNet")
    given["mid_block.resnets.0.conv1.wieght"] = given.pop("mid_block.resnets.0.conv1.weight")
    with pytest.raises(InputError, match=r"1 tensors? .*missing.* mid_block\.resnets\.0\.conv1\.weight") as error:
        names.from_tensors(table("UNet"), given)
    assert "mid_block.resnets.0.conv1.wieght" in str(error.value)


def test_surplus_tensor_is_named_with_its_nearest_names() -> None:
    given = tensors("UNet")
    given["mid_block.resnets.0.conv3.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match=r"1 tensors? .*unknown.* mid_block\.resnets\.0\.conv3\.weight") as error:
        names.from_tensors(table("UNet"), given)
    assert "mid_block.resnets.0.conv1.weight" in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("conv_in.weight", lambda array: array[:, :, :, 0]),
        ("conv_in.weight", lambda array: array[:-1]),
        ("conv_in.bias", lambda array: array[None]),
        ("time_embedding.linear_1.weight", lambda array: array.T),
        ("mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight", lambda array: array[:, :-1]),
        ("mid_block.attentions.0.transformer_blocks.1.norm1.weight", lambda array: array[None]),
    ],
)
def test_tensor_of_another_shape_is_named(tensor: str, change: Any) -> None:
    given = tensors("UNet")
    given[tensor] = change(given[tensor])
    with pytest.raises(InputError) as error:
        names.from_tensors(table("UNet"), given)
    assert tensor in str(error.value)
    assert str(given[tensor].shape) in str(error.value)


@pytest.mark.parametrize("prefixed", [True, False])
def test_tower_takes_names_with_and_without_text_model(prefixed: bool) -> None:
    params = random_params("tower")
    given = names.to_tensors(table("tower"), params)
    if not prefixed:
        given = {name.removeprefix("text_model."): tensor for name, tensor in given.items()}
    returned = names.from_tensors(table("tower"), given)
    for mine, expected in zip(jax.tree.leaves(returned), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_tower_ignores_the_buffer_of_older_files(prefix: str) -> None:
    given = tensors("tower")
    if not prefix:
        given = {name.removeprefix("text_model."): tensor for name, tensor in given.items()}
    given[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    names.from_tensors(table("tower"), given)
