"""The promises of sdxl_jax.weights.lora: every spelling, every kind of layer, whole or not at all. No torch.

That the sums are those of diffusers is shown in `parity/test_lora_parity.py`.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import MODEL

from sdxl_jax import model as models
from sdxl_jax.adapters import changes as adapter_changes
from sdxl_jax.adapters.changes import Lora, Module
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.weights import lora, names
from sdxl_jax.weights.adapter_files.names import known_modules
from sdxl_jax.weights.adapter_files.reading import resolve
from sdxl_jax.weights.names import Dialect, Entry, Naming

Tensors = dict[str, np.ndarray]
SD1 = dataclasses.replace(
    MODEL,
    unet=dataclasses.replace(MODEL.unet, conv_projection=True, vector_dim=None, context_dim=8),
    text=MODEL.text[:1],
    micro=None,
)
# One module in every spelling: stacked linear, linear, convolution, text.
TO_K, TO_OUT = (
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out",
)
SPELLINGS = {
    "unet/down_blocks_1/attentions_0/transformer_blocks/attn1/to_k/kernel": (
        ("lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_k.lora_{side}.weight"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_k.lora_{side}.weight"),
        (f"unet.{TO_K}.lora_{{letter}}.weight"),
        (f"unet.{TO_K}.lora_{{letter}}.default.weight"),
        (f"unet.{TO_K}.lora.{{side}}.weight"),
        (f"unet.{TO_K.replace('attn1', 'attn1.processor')}_lora.{{side}}.weight"),
        (f"{TO_K.replace('attn1', 'attn1.processor')}_lora.{{side}}.weight"),
        (f"base_model.model.{TO_K}.lora_{{letter}}.weight"),
    ),
    "unet/mid_block/attentions_0/transformer_blocks/attn2/to_out/kernel": (
        ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.lora_{side}.weight"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_{side}.weight"),
        (f"unet.{TO_OUT}.0.lora_{{letter}}.weight"),
        (f"unet.{TO_OUT.replace('attn2', 'attn2.processor')}_lora.{{side}}.weight"),
    ),
    "unet/up_blocks_0/upsample/conv/kernel": (
        ("lora_unet_output_blocks_1_2_conv.lora_{side}.weight"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv.lora_{side}.weight"),
        ("unet.up_blocks.0.upsamplers.0.conv.lora_{letter}.weight"),
    ),
    "text_encoder/layers/q_proj/kernel": (
        ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_{side}.weight"),
        ("lora_te1_encoder_layers_1_self_attn_q_proj.lora_{side}.weight"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_{letter}.weight"),
        ("text_encoder.encoder.layers.1.self_attn.q_proj.lora_{letter}.weight"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{side}.weight"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.{side}.weight"),
    ),
    "text_encoder_2/text_projection/kernel": (
        ("lora_te2_text_projection.lora_{side}.weight"),
        ("text_encoder_2.text_projection.lora_{letter}.weight"),
        ("text_encoder_2.text_projection.lora.{side}.weight"),
    ),
}


def modules(config: ModelConfig, kohya: Dialect) -> Iterator[tuple[str, Entry]]:
    """sd-scripts' name of every linear layer and convolution."""
    parts: dict[str, Any] = {"unet": config.unet} | {tower.name: tower.clip for tower in config.text}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for part, network in parts.items():
        naming = Naming(kohya if part == "unet" else Dialect.TRANSFORMERS)
        for entry in names.table(network, naming).entries:
            if entry.places[0].path.endswith("kernel"):
                yield prefixes[part] + entry.name.removesuffix(".weight").replace(".", "_"), entry


def factors(entry: Entry, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) in torch's shapes."""
    rng = np.random.default_rng(seed)
    outputs, inputs, *kernel = entry.shape
    down = rng.standard_normal((rank, inputs, *kernel), np.float32)
    return down, rng.standard_normal((outputs, rank, *([1] * len(kernel))), np.float32)


def kohya_file(path: Path, config: ModelConfig, dialect: Dialect = Dialect.ORIGINAL) -> Path:
    """Every module, ranks 1 to 3, alphas 1 and 2."""
    tensors: Tensors = {}
    for number, (name, entry) in enumerate(sorted(modules(config, dialect), key=lambda row: row[1].places[0].path)):
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors(entry, 1 + number % 3, number)
        tensors[f"{name}.alpha"] = np.array(1 + number % 2, np.float32)
    save_file(tensors, path)
    return path


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    parts: dict[str, Any] = {"unet": config.unet} | {tower.name: tower.clip for tower in config.text}
    return {f"{part}/{path}": leaf.shape for part in parts for path, leaf in names.abstract(parts[part]).items()}


def random_model(config: ModelConfig, dtype: Any = jnp.float32) -> Model:
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.standard_normal(shape), dtype) for path, shape in shapes(config).items()}
    return Model(config, unflatten(params))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of every module of the tiny SDXL."""
    return kohya_file(tmp_path_factory.mktemp("lora") / "style.safetensors", MODEL)


def small(path: Path, spelling: str, down: np.ndarray, up: np.ndarray, **more: Any) -> Path:
    """A file of one module."""
    sides = {"down": ("down", "A", down), "up": ("up", "B", up)}
    tensors = {spelling.format(side=side, letter=letter): value for side, letter, value in sides.values()}
    save_file(tensors | more.pop("tensors", {}), path, **more)
    return path


def changes(path: Path, config: ModelConfig = MODEL) -> Tensors:
    """Our path -> change."""
    resolved, every = resolve(lora.read(path), config), shapes(config)
    return {name: adapter_changes.change(rows, every[name]) for name, rows in resolved.items()}


def entry_of(path: str, layer: int | None, config: ModelConfig = MODEL) -> Entry:
    found = [
        target.weight
        for target in known_modules(config).values()
        if f"{target.part}/{target.weight.places[0].path}" == path
    ]
    return next(entry for entry in found if entry.places[0].layer == layer)


@pytest.mark.parametrize("path", SPELLINGS)
def test_every_spelling_names_the_same_module(tmp_path: Path, path: str) -> None:
    layers = {3: None, 1: None}.get(len(shapes(MODEL)[path]))
    stacked = "transformer_blocks" in path or "/layers/" in path
    layer = (0 if "mid_block" in path else 1) if stacked else layers
    entry = entry_of(path, layer)
    down, up = factors(entry, 2, 0)
    product = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
    for number, spelling in enumerate(SPELLINGS[path]):
        change = changes(small(tmp_path / f"{number}.safetensors", spelling, down, up))
        assert list(change) == [path], spelling
        expected = np.zeros(shapes(MODEL)[path], np.float32)
        expected[... if layer is None else layer] = entry.ours(product)
        np.testing.assert_allclose(change[path], expected, rtol=1e-5, atol=1e-6, err_msg=spelling)


SIDES = ("lora_{side}", "lora_{letter}", "lora.{side}")
"""kohya and OneTrainer, PEFT, diffusers."""
MIXED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unet/down_blocks_1/attentions_0/transformer_blocks/attn1/to_k/kernel": (
        ("lora_unet_", "lycoris_", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", ""),
        (TO_K, "input_blocks.3.1.transformer_blocks.1.attn1.to_k"),
    ),
    "unet/up_blocks_0/upsample/conv/kernel": (
        ("lora_unet_", "lycoris_", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", ""),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
    ),
    "text_encoder/layers/out_proj/kernel": (
        ("lora_te1_", "text_encoder.", "clip_l.", "text_encoders.clip_l.transformer.", "clip_l.transformer."),
        (
            "text_model.encoder.layers.1.self_attn.out_proj",
            "encoder.layers.1.self_attn.out_proj",
            "transformer.resblocks.1.attn.out_proj",
        ),
    ),
    "text_encoder_2/layers/fc1/kernel": (
        ("lora_te2_", "text_encoder_2.", "clip_g.", "clip_g.transformer.", "text_encoders.clip_g.transformer."),
        (
            "text_model.encoder.layers.1.mlp.fc1",
            "encoder.layers.1.mlp.fc1",
            "transformer.resblocks.1.mlp.c_fc",
        ),
    ),
}


@pytest.mark.parametrize("path", MIXED)
def test_every_dialect_after_every_prefix_gives_the_same_change(tmp_path: Path, path: str) -> None:
    prefixes, dialects = MIXED[path]
    down, up = factors(entry_of(path, None if "conv" in path else 1), 2, 0)
    found = []
    for prefix, dialect, side in itertools.product(prefixes, dialects, SIDES):
        module = dialect.replace(".", "_") if prefix.endswith("_") else dialect
        file = small(tmp_path / "x.safetensors", f"{prefix}{module}.{side}.weight", down, up)
        found.append(changes(file))
        assert list(found[-1]) == [path], (prefix, dialect, side)
        np.testing.assert_array_equal(found[-1][path], found[0][path], err_msg=f"{prefix}{module}.{side}")


def test_lora_with_embeddings_is_merged_and_they_are_offered(tmp_path: Path) -> None:
    one = np.ones((1, 8), np.float32)
    more: Tensors = {f"bundle_emb.{name}.{key}": one for name in ("a.fox", "b") for key in ("clip_l", "clip_g")}
    down, up = np.ones((1, 16), np.float32), np.ones((16, 1), np.float32)
    file = small(tmp_path / "x.safetensors", f"unet.{TO_K}.lora_{{letter}}.weight", down, up, tensors=more)
    read = lora.read(file)
    assert read.embeddings == ("a.fox", "b")
    assert len(changes(file)) == 1
    assert lora.notes(read) == [
        "x.safetensors also holds the embeddings a.fox, b, which are not merged: sdxl-jax sample takes them as "
        f"--embedding {file}:a.fox"
    ]


@pytest.mark.parametrize("config", [MODEL, SD1], ids=["SDXL", "SD 1.x"])
def test_both_spellings_of_the_unet_give_every_module_the_same_change(tmp_path: Path, config: ModelConfig) -> None:
    ours = changes(kohya_file(tmp_path / "a.safetensors", config, Dialect.ORIGINAL), config)
    theirs = changes(kohya_file(tmp_path / "b.safetensors", config, Dialect.DIFFUSERS), config)
    assert ours.keys() == {path for path in shapes(config) if path.endswith("kernel")}
    assert ours.keys() == theirs.keys()
    for path, change in ours.items():
        np.testing.assert_array_equal(change, theirs[path])
        assert change.shape == shapes(config)[path]
        assert all(np.abs(part).max() > 0 for part in change.reshape(len(change), -1)), path


@pytest.mark.parametrize(
    ("config", "unet", "text"),
    [(models.SDXL_BASE, 722, (72, 192)), (models.SD1, 192, (72,)), (models.SD2, 192, (144,))],
    ids=["SDXL base", "SD 1", "SD 2"],
)
def test_the_count_of_modules_is_that_of_sd_scripts(config: ModelConfig, unet: int, text: tuple[int, ...]) -> None:
    # What its log says of the transformers' layers: "create LoRA for U-Net: 722 modules". SD 2 has 24 text layers here,
    # of which sd-scripts uses and trains 23.
    kernels = [target for target in known_modules(config).values() if target.weight.places[0].path.endswith("kernel")]
    places = {(target.part, *target.weight.places) for target in kernels}
    assert sum(part == "unet" and "/attentions_" in place.path for part, place in places) == unet
    for tower, count in zip(config.text, text, strict=True):
        assert sum(part == tower.name and place.path.startswith("layers/") for part, place in places) == count


BLOCKS = "attentions_0/transformer_blocks"


@pytest.mark.parametrize(
    ("name", "path", "layer"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k", f"down_blocks_1/{BLOCKS}/attn1/to_k", 1),
        ("lora_unet_output_blocks_5_1_proj_out", "up_blocks_1/attentions_2/proj_out", None),
        ("lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj", f"mid_block/{BLOCKS}/ff/proj_in", 9),
        ("lora_unet_input_blocks_6_0_op", "down_blocks_1/downsample", None),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "down_blocks_0/resnets_0/time_emb_proj", None),
        ("lora_unet_output_blocks_3_0_skip_connection", "up_blocks_1/resnets_0/conv_shortcut", None),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", "layers/fc1", 11),
        ("lora_te2_text_model_encoder_layers_31_self_attn_out_proj", "layers/out_proj", 31),
    ],
)  # fmt: skip
def test_names_of_real_sdxl_files_are_known(name: str, path: str, layer: int | None) -> None:
    (place,) = known_modules(models.SDXL_BASE)[name].weight.places
    assert (place.path, place.layer) == (f"{path}/kernel", layer)


ALPHA = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def _settings(**values: Any) -> dict[str, Any]:
    return {"metadata": {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in values.items()})}}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 1),
        ({"tensors": {f"{ALPHA}.alpha": np.array(2, np.float16)}}, 0.5),
        ({"tensors": {f"{ALPHA}.alpha": np.array([1], np.float32)}}, 0.25),
        (_settings(r=4, lora_alpha=8), 2),
        (_settings(r=4, lora_alpha=8, use_rslora=True), 4),
        (_settings(r=4, lora_alpha=8, alpha_pattern={"attn2.to_q": 1, "attn1.to_q": 6}), 1.5),
        (_settings(r=4, lora_alpha=8, alpha_pattern={r"^mid_block\..*\.to_q": 3}), 0.75),
        (_settings(r=4, lora_alpha=8, alpha_pattern={"to_q(": 3}), 2),
        (_settings(r=4, lora_alpha=8) | {"tensors": {f"{ALPHA}.alpha": np.array(2, np.float16)}}, 0.5),
        ({"metadata": {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 8})}}, 1),
    ],
)  # fmt: skip
def test_the_change_is_scaled_by_alpha_over_rank(tmp_path: Path, more: dict[str, Any], expected: float) -> None:
    path = "unet/mid_block/attentions_0/transformer_blocks/attn1/to_q/kernel"
    entry = entry_of(path, 0)
    down, up = factors(entry, 4, 0)
    change = changes(small(tmp_path / "x.safetensors", ALPHA + ".lora_{letter}.weight", down, up, **more))[path][0]
    np.testing.assert_allclose(change, expected * entry.ours(up @ down), rtol=1e-5, atol=1e-6)


def test_a_peft_folder_has_its_alpha_in_adapter_config(tmp_path: Path) -> None:
    path = "unet/mid_block/attentions_0/transformer_blocks/attn1/to_q/kernel"
    entry = entry_of(path, 0)
    down, up = factors(entry, 4, 0)
    name = ALPHA.replace("unet.", "base_model.model.") + ".lora_{letter}.weight"
    small(tmp_path / "adapter_model.safetensors", name, down, up)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    change = changes(tmp_path)[path][0]
    np.testing.assert_allclose(change, 0.5 * entry.ours(up @ down), rtol=1e-5, atol=1e-6)
    assert lora.read(tmp_path).name == tmp_path.name


@pytest.mark.parametrize("config", [MODEL, SD1], ids=["linear here", "convolution here"])
@pytest.mark.parametrize("ones", [(), (1, 1)], ids=["linear in the file", "convolution in the file"])
def test_a_linear_layer_and_a_1x1_convolution_stand_for_each_other(
    tmp_path: Path, config: ModelConfig, ones: tuple[int, ...]
) -> None:
    path = "unet/down_blocks_1/attentions_0/proj_in/kernel"
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((3, 16), np.float32), rng.standard_normal((16, 3), np.float32)
    name = "lora_unet_down_blocks_1_attentions_0_proj_in.lora_{side}.weight"
    file = small(tmp_path / "x.safetensors", name, down.reshape(3, 16, *ones), up.reshape(16, 3, *ones))
    change = changes(file, config)[path]
    assert change.shape == shapes(config)[path]
    np.testing.assert_allclose(change.reshape(16, 16), (up @ down).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_files_of_every_precision_keep_it_and_change_weights_in_float32(tmp_path: Path, dtype: Any) -> None:
    entry = entry_of("unet/mid_block/attentions_0/transformer_blocks/attn1/to_q/kernel", 0)
    down, up = (value.astype(dtype) for value in factors(entry, 2, 0))
    file = small(tmp_path / "x.safetensors", ALPHA + ".lora_{letter}.weight", down, up)
    read = lora.read(file).modules[ALPHA].factors
    assert read["down"].dtype == read["up"].dtype == dtype
    (change,) = changes(file).values()
    assert change.dtype == np.float32
    np.testing.assert_allclose(
        change[0], entry.ours(up.astype(np.float32) @ down.astype(np.float32)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("x.oft_R.default.weight", "an OFT's, in PEFT's spelling"),
        ("x.ia3_l", "an IA³'s, in PEFT's spelling"),
        ("x.lora_B.bias", "the bias of a LoRA's factor"),
        ("x.lora_embedding_A", "a change of an embedding"),
        ("model.diffusion_model.out.2.weight", "of a model"),
        ("model.diffusion_model.out.2.bias", "not one of an adapter"),
    ],
)
def test_what_is_not_of_a_known_kind_is_refused_by_its_tensor(tmp_path: Path, tensor: str, what: str) -> None:
    more = {"tensors": {tensor: np.zeros((2, 2), np.float32)}}
    file = small(tmp_path / "x.safetensors", "x.lora_{side}.weight", np.ones((1, 2)), np.ones((2, 1)), **more)
    with pytest.raises(InputError, match=rf"{re.escape(tensor)} \(2, 2\), which is .*{what}.*nothing was"):
        lora.read(file)


def test_all_unknown_tensors_are_counted_and_the_first_named(tmp_path: Path) -> None:
    more: Tensors = {f"x.oft_{number}": np.zeros((2, 2), np.float32) for number in range(6)}
    file = small(tmp_path / "x.safetensors", "x.lora_{side}.weight", np.ones((1, 2)), np.ones((2, 1)), tensors=more)
    with pytest.raises(InputError, match=r"x\.oft_0 \(2, 2\) \(and 5 others: x\.oft_1, x\.oft_2, x\.oft_3 …\)"):
        lora.read(file)


@pytest.mark.parametrize("alpha", [0.0, -4.0])
def test_an_alpha_that_is_not_above_zero_is_refused(tmp_path: Path, alpha: float) -> None:
    one = np.ones((1, 1), np.float32)
    file = small(
        tmp_path / "x.safetensors", "x.lora_{side}.weight", one, one, tensors={"x.alpha": np.array(alpha, np.float16)}
    )
    with pytest.raises(InputError, match=rf"x\.alpha has alpha {alpha:g}\. Give a number above 0"):
        lora.read(file)
    file = small(tmp_path / "x.safetensors", "unet.x.lora_{letter}.weight", one, one, **_settings(lora_alpha=alpha))
    with pytest.raises(InputError, match=rf"settings of unet\.x\.lora_A\.weight has alpha {alpha:g}"):
        lora.read(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tensor", ["x.lora_down.weight", "x.alpha"])
def test_numbers_that_are_not_finite_are_refused_by_their_tensor(tmp_path: Path, tensor: str, value: float) -> None:
    one = np.ones((1, 1), np.float32)
    tensors = {f"x.{name}": one for name in ("lora_down.weight", "lora_up.weight", "alpha")} | {tensor: one * value}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=rf"has {re.escape(tensor)} with non-finite numbers"):
        lora.read(tmp_path / "x.safetensors")


def test_two_changes_of_one_weight_are_refused(tmp_path: Path) -> None:
    more: Tensors = {"x.diff": np.zeros((2, 2), np.float32)}
    file = small(tmp_path / "x.safetensors", "x.lora_{side}.weight", np.ones((1, 2)), np.ones((2, 1)), tensors=more)
    with pytest.raises(InputError, match=r"x\.diff and x\.lora_down\.weight, two changes of one weight of x"):
        lora.read(file)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    halves = {"x.lora_down.weight": "up", "x.lora_B.weight": "down", "x.alpha": "down and no up"}
    halves |= {"x.hada_w1_a": "down_1 and no down_2 and no up_2", "x.lokr_w1": "w2_down and no w2_up"}
    halves |= {"x.lokr_w2_a": "w1_down and no w1_up and no w2_down", "x.dora_scale": "down and no up"}
    for name, missing in halves.items():
        save_file({name: np.ones((1, 1), np.float32)}, file)
        with pytest.raises(InputError, match=rf"has {re.escape(name)}, but no {missing} with it"):
            lora.read(file)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    one = np.ones((1, 1), np.float32)
    save_file({f"x.lora_{side}.{name}.weight": one for side in "AB" for name in ("a", "b")}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.lora_A\.a\.weight and x\.lora_A\.b\.weight, of two LoRAs"):
        lora.read(tmp_path / "x.safetensors")


def test_factors_of_neither_two_nor_four_axes_are_refused(tmp_path: Path) -> None:
    file = small(tmp_path / "x.safetensors", "x.lora_{side}.weight", np.ones((2, 3, 3)), np.ones((2, 2)))
    with pytest.raises(InputError, match=r"x\.lora_down\.weight \(2, 3, 3\).*has no place in a layer"):
        lora.read(file)


def test_files_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    (tmp_path / "adapter_config.json").write_text("{")
    for name in ("style.pt", "style.bin", "style.ckpt"):
        (tmp_path / name).write_bytes(b"\x80")
        with pytest.raises(InputError, match=r"pickle.*safetensors"):
            lora.read(tmp_path / name)
    for name, message in {
        "empty.safetensors": "is not a LoRA: of its 0 tensors",
        "cut.safetensors": "cut.safetensors",
        "missing.safetensors": "missing.safetensors",
        "": "has no adapter_model.safetensors and no pytorch_lora_weights.safetensors",
    }.items():
        with pytest.raises(InputError, match=message):
            lora.read(tmp_path / name)
    one = np.ones((1, 1), np.float32)
    small(tmp_path / "adapter_model.safetensors", "base_model.model.x.lora_{letter}.weight", one, one)
    with pytest.raises(InputError, match=r"adapter_config\.json has settings of its LoRA that are not valid JSON"):
        lora.read(tmp_path)


def test_initialisations_that_change_the_base_are_refused(tmp_path: Path) -> None:
    one, more = np.ones((1, 1), np.float32), _settings(lora_alpha=1, init_lora_weights="pissa_niter_4")
    file = small(tmp_path / "x.safetensors", "unet.x.lora_{letter}.weight", one, one, **more)
    with pytest.raises(InputError, match=r"initialised by pissa_niter_4.*plain LoRA"):
        lora.read(file)


def test_an_unknown_module_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_3_1_transformer_blocks_7_attn1_to_k"
    file = small(tmp_path / "x.safetensors", name + ".lora_{side}.weight", np.ones((1, 16)), np.ones((16, 1)))
    nearest = r"Nearest known names: lora_unet_input_blocks_3_1_transformer_blocks_[01]_attn1_to_k"
    with pytest.raises(InputError, match=rf"1 modules, of 1, .*{name} .*{nearest}.*Nothing was merged"):
        resolve(lora.read(file), MODEL)


def test_a_module_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_proj_in"
    for down, up in (((2, 12), (16, 2)), ((2, 16), (12, 2)), ((2, 16), (16, 3)), ((2, 16, 3, 3), (16, 2, 1, 1))):
        file = small(tmp_path / "x.safetensors", name + ".lora_{side}.weight", np.ones(down), np.ones(up))
        shown = rf"{name} has down {re.escape(str(down))} and up {re.escape(str(up))}.* is \(16, 16\) \(unet/"
        with pytest.raises(InputError, match=shown):
            resolve(lora.read(file), MODEL)


@pytest.mark.parametrize(
    ("module", "width", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", 3072, "It looks like a LoRA for Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, "It looks like a LoRA for Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, "It looks like a LoRA for SD 3"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "diffusion transformer"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, "768 wide, as in SD 1.x"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k", 1024, "as in SD 2.x"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", 1280, "as in the SDXL refiner"),
    ],
)
def test_the_error_for_a_lora_of_another_family_names_it(module: str, width: int, message: str) -> None:
    factors = {"down": np.ones((4, width), np.float32), "up": np.ones((640, 4), np.float32)}
    with pytest.raises(InputError, match=message):
        resolve(Lora("x", {module: Module(factors)}), models.SDXL_BASE)


def test_a_module_in_two_spellings_counts_once_and_must_agree(tmp_path: Path) -> None:
    names_ = [f"lora_unet_{name}_attentions_0_proj_in" for name in ("mid_block",)] + [
        "lora_unet_middle_block_1_proj_in"
    ]
    down, up = np.ones((1, 16), np.float32), np.ones((16, 1), np.float32)
    tensors = {f"{name}.lora_{side}.weight": v for name in names_ for side, v in (("down", down), ("up", up))}
    save_file(tensors, tmp_path / "x.safetensors")
    (change,) = changes(tmp_path / "x.safetensors").values()
    np.testing.assert_array_equal(change, np.ones((16, 16)))
    tensors[f"{names_[0]}.lora_up.weight"] = 2 * up
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="are names of one module, and their factors differ"):
        changes(tmp_path / "x.safetensors")


def test_adding_changes_what_it_should_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    model = random_model(MODEL)
    before = {path: np.asarray(value) for path, value in flatten(model.params).items()}
    added = flatten(lora.add(model, whole, 0.5).params)
    change = changes(whole)
    for path, value in flatten(model.params).items():
        np.testing.assert_array_equal(value, before[path])
        if path in change:
            np.testing.assert_allclose(added[path], before[path] + 0.5 * change[path], rtol=1e-6, atol=1e-6)
        else:
            assert added[path] is value


def test_a_lora_that_does_not_fit_is_not_merged_in_part(whole: Path) -> None:
    read = lora.read(whole)
    modules = {**read.modules, "lora_unet_nowhere": next(iter(read.modules.values()))}
    model = random_model(MODEL)
    before = flatten(model.params)
    with pytest.raises(InputError, match="Nothing was merged"):
        lora.add(model, Lora("x", modules))
    assert all(flatten(model.params)[path] is value for path, value in before.items())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_and_place_are_kept(whole: Path, dtype: Any) -> None:
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.P())
    model = random_model(MODEL, dtype)
    model = model._replace(params=jax.device_put(model.params, place))
    for value in jax.tree.leaves(lora.add(model, whole).params):
        assert value.dtype == dtype
        assert value.sharding == place


def test_numpy_parameters_stay_numpy(whole: Path) -> None:
    model = random_model(MODEL)
    numpy = model._replace(params=jax.tree.map(np.asarray, model.params))
    ours, theirs = flatten(lora.add(numpy, whole, 0.3).params), flatten(lora.add(model, whole, 0.3).params)
    for path, value in ours.items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_allclose(value, theirs[path], rtol=2e-7, atol=1e-6)  # XLA may fuse multiply and add


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2.4e-7), pytest.param(jnp.bfloat16, 1.6e-2, marks=pytest.mark.slow)]
)
def test_removing_gives_back_the_parameters_to_rounding(whole: Path, dtype: Any, tolerance: float) -> None:
    # Four roundings, each of half a unit in the last place of a weight or of a sum.
    model = random_model(MODEL, dtype)
    first = lora.add(model, whole, 0.8, "first")
    both = lora.add(first, whole, -0.3, "second")
    assert [adapter.name for adapter in both.adapters] == ["first", "second"]
    again = lora.remove(lora.remove(both, "first"), "second")
    assert again.adapters == ()
    for (path, value), merged, other in zip(
        flatten(model.params).items(),
        flatten(first.params).values(),
        flatten(both.params).values(),
        strict=True,
    ):
        largest = max(float(np.abs(np.asarray(x, np.float32)).max()) for x in (value, merged, other))
        difference = np.abs(np.asarray(flatten(again.params)[path], np.float32) - np.asarray(value, np.float32)).max()
        assert difference <= tolerance * largest, path


def test_names_of_adapters_are_unique_and_known(whole: Path) -> None:
    model = lora.add(random_model(MODEL), whole)
    with pytest.raises(InputError, match=r"a LoRA named style\.safetensors already.*another name"):
        lora.add(model, whole)
    twice = lora.add(model, whole, name="again")
    with pytest.raises(InputError, match=r"no LoRA named agian\. Give one of: again, style\.safetensors"):
        lora.remove(twice, "agian")
    with pytest.raises(InputError, match=r"no LoRA named x\. It has none"):
        lora.remove(random_model(MODEL), "x")
    with pytest.raises(InputError, match=r"scale of .* is not finite"):
        lora.add(model, whole, float("nan"), "other")


def test_the_listing_says_what_was_merged(whole: Path) -> None:
    model = lora.add(lora.add(random_model(MODEL), whole, 0.8), whole, 1.0, "again")
    what = "115 modules of unet, 12 of text_encoder, 13 of text_encoder_2, ranks 1 to 3"
    assert lora.listing(model) == [f"style.safetensors × 0.8: {what}", f"again × 1: {what}"]
    factors = {"down": np.ones((4, 2), np.float32), "up": np.ones((2, 4), np.float32)}
    one = Lora("x", {"text_encoder.y": Module(factors)})
    assert lora.describe(one) == "1 modules of text_encoder, rank 4"
    assert lora.listing(random_model(MODEL)) == []


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(tmp_path)
    return lambda name: Path(name).touch()


def test_an_option_is_a_file_with_or_without_a_scale(inside: Callable[[str], None]) -> None:
    inside("odd:0.5")
    inside("a:b.safetensors")
    for text, expected in {
        "style.safetensors": ("style.safetensors", 1.0),
        "style.safetensors:0.8": ("style.safetensors", 0.8),
        "folder/style.safetensors:-1": ("folder/style.safetensors", -1.0),
        "odd:0.5": ("odd:0.5", 1.0),
        "odd:0.5:2": ("odd:0.5", 2.0),
        "a:b.safetensors": ("a:b.safetensors", 1.0),
    }.items():
        assert lora.parse_option(text) == (Path(expected[0]), expected[1])
    for text in ("style.safetensors:strong", "style.safetensors:", "style.safetensors:nan", ":0.5"):
        with pytest.raises(InputError, match="FILE:SCALE"):
            lora.parse_option(text)


def test_a_lora_for_the_only_text_encoder_of_another_model_is_refused(tmp_path: Path) -> None:
    entry = entry_of("text_encoder/layers/q_proj/kernel", 1)
    name = "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_{side}.weight"
    file = small(tmp_path / "sd1.safetensors", name, *factors(entry, 2, 0))
    with pytest.raises(InputError, match="lora_te_text_model_encoder_layers_1_self_attn_q_proj"):
        changes(file)
