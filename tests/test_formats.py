"""The tables of names: complete, invertible, and clear about what does not fit.

Agreement with the names that diffusers and transformers write is tested in `parity/`; here some names of the weight
files on the hub are looked up.
"""

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from sdxl_jax.arrays import Params, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import clip, layers, unet, vae
from sdxl_jax.weights import names
from sdxl_jax.weights.names import Dialect, Naming, PartConfig

UNET = unet.UNetConfig((16, 32), 1, (0, 3), 2, (1, 2), 12, 24, groups=8)
VAE = vae.VaeConfig((16, 32), 1, groups=8)
TOWER = clip.ClipTextConfig(24, 3, 2, 48, clip.Activation.QUICK_GELU, 20, 60, 50)
MODELS: dict[str, PartConfig] = {
    "UNet": UNET,
    "SDXL base": unet.SDXL_BASE,
    "SD 1.x": unet.SD1,
    "VAE": VAE,
    "SDXL VAE": vae.SDXL_VAE,
    "tower": TOWER,
    "CLIP-L": clip.CLIP_L,
    "CLIP-H": clip.CLIP_H,
    "CLIP-bigG": clip.CLIP_BIGG,
}
NAMINGS = {
    unet.UNetConfig: (Naming(Dialect.DIFFUSERS), Naming(Dialect.ORIGINAL, "model.diffusion_model.")),
    vae.VaeConfig: (
        Naming(Dialect.DIFFUSERS),
        Naming(Dialect.DIFFUSERS_OLD),
        Naming(Dialect.DIFFUSERS, conv_attention=True),
        Naming(Dialect.ORIGINAL, "first_stage_model.", conv_attention=True),
        Naming(Dialect.ORIGINAL),
    ),
    clip.ClipTextConfig: (
        Naming(Dialect.TRANSFORMERS),
        Naming(Dialect.TRANSFORMERS_5),
        Naming(Dialect.OPENCLIP, "conditioner.embedders.1.model."),
    ),
}
ALL = [(name, naming) for name, config in MODELS.items() for naming in NAMINGS[type(config)]]
TINY = [(name, naming) for name, naming in ALL if name in ("UNet", "VAE", "tower")]


def table(name: str, naming: Naming | None = None) -> names.Table:
    return names.table(MODELS[name], naming or NAMINGS[type(MODELS[name])][0])


def random_params(name: str, dtype: Any = np.float32) -> Params:
    rng = np.random.default_rng(0)
    abstract = unflatten(names.abstract(MODELS[name]))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), abstract)


def tensors(name: str) -> dict[str, np.ndarray]:
    return names.to_tensors(table(name), random_params(name))


@pytest.mark.parametrize(("name", "naming"), ALL)
def test_table_covers_each_parameter_once(name: str, naming: Naming) -> None:
    params, found = names.abstract(MODELS[name]), table(name, naming)
    places = Counter(place for entry in found.entries for place in entry.places)
    assert max(places.values()) == 1
    assert len({entry.name for entry in found.entries}) == len(found.entries)
    for path, rows in found.by_path.items():
        layers_of_it = [entry.places[number].layer for entry, number in rows]
        assert layers_of_it in ([None], list(range(params[path].shape[0])))
    assert layers.count(dict(params)) == sum(int(np.prod(entry.shape)) for entry in found.entries)


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
    assert tensor in table(name).by_name


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("name", "naming"), TINY)
def test_parameters_return_bit_for_bit(name: str, naming: Naming, dtype: Any) -> None:
    params = random_params(name, dtype)
    written = names.to_tensors(table(name, naming), params)
    returned = names.from_tensors(table(name, naming), written)
    assert jax.tree.structure(returned) == jax.tree.structure(params)
    for mine, expected in zip(jax.tree.leaves(returned), jax.tree.leaves(params), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_array_equal(mine, expected)
    assert all(tensor.flags.c_contiguous for tensor in written.values())


def test_openclip_keeps_queries_keys_and_values_in_one_tensor_and_its_projection_untransposed() -> None:
    params = random_params("tower")
    written = names.to_tensors(table("tower", Naming(Dialect.OPENCLIP)), params)
    layer = params["layers"]
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        fused = written["transformer.resblocks.2.attn.in_proj_weight"]
        np.testing.assert_array_equal(fused[part * 24 : (part + 1) * 24], layer[name]["kernel"][2].T)
        fused = written["transformer.resblocks.0.attn.in_proj_bias"]
        np.testing.assert_array_equal(fused[part * 24 : (part + 1) * 24], layer[name]["bias"][0])
    np.testing.assert_array_equal(written["text_projection"], params["text_projection"]["kernel"])


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
    with pytest.raises(
        InputError, match=r"tensors are missing, the first is mid_block\.resnets\.0\.conv1\.weight"
    ) as error:
        names.from_tensors(table("UNet"), given)
    assert "mid_block.resnets.0.conv1.wieght" in str(error.value)


def test_surplus_tensor_is_named_with_its_nearest_names() -> None:
    given = tensors("UNet")
    given["mid_block.resnets.0.conv3.weight"] = np.zeros(3, np.float32)
    with pytest.raises(
        InputError, match=r"1 tensors are unknown, the first is mid_block\.resnets\.0\.conv3\.weight"
    ) as error:
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
