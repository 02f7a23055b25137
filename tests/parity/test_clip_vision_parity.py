"""The image towers of CLIP against transformers: all states, preprocessing, files of both layouts.

1e-5 of the maximum. Weights are random, and such that a wrong eps or activation shows (`reference.randomise`).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference
from agreement import Agree
from PIL import Image
from reference import torch, transformers

from sdxl_jax.models import clip_vision
from sdxl_jax.models.clip import Activation
from sdxl_jax.models.clip_vision import ClipVisionConfig
from sdxl_jax.sampling import clip_images
from sdxl_jax.weights import clip_vision as towers
from sdxl_jax.weights import names
from sdxl_jax.weights.names import Dialect, Naming

TINY = ClipVisionConfig(52, 2, 4, 208, Activation.GELU, 40, 28, 14)
"""Of bigG's proportions: heads of 13."""
QUICK = ClipVisionConfig(48, 3, 3, 192, Activation.QUICK_GELU, 24, 32, 8)
WIDE = ClipVisionConfig(1664, 2, 16, 8192, Activation.GELU, 1280)
"""bigG's widths."""


def described(config: ClipVisionConfig) -> Any:
    fields = {
        name: value for name, value in towers._fields(config).items() if name not in ("architectures", "model_type")
    }
    return transformers.CLIPVisionConfig(**fields)


def check_states(config: ClipVisionConfig, agree: Agree) -> None:
    model = transformers.CLIPVisionModelWithProjection(described(config))
    pair = reference.pair_of(model, config, Dialect.TRANSFORMERS, 0)
    pixels = np.random.default_rng(0).normal(size=(2, config.side, config.side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = pair.model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
        pooled = model.vision_model.post_layernorm(theirs.last_hidden_state[:, 0])
    ours = jax.jit(functools.partial(clip_vision.encode, config))(pair.params, pixels)
    name = f"image tower of width {config.width}"
    agree(f"{name}: penultimate", ours.penultimate, theirs.hidden_states[-2], 1e-5)
    agree(f"{name}: last", ours.last, theirs.last_hidden_state, 1e-5)
    agree(f"{name}: pooled", ours.pooled, pooled, 1e-5)
    agree(f"{name}: embedding", ours.embedding, theirs.image_embeds, 1e-5)


@pytest.mark.parametrize("config", [TINY, QUICK], ids=["gelu", "quick gelu"])
def test_image_tower_matches_transformers(config: ClipVisionConfig, agree: Agree) -> None:
    check_states(config, agree)


@pytest.mark.slow
def test_image_tower_of_bigg_s_widths_matches_transformers(agree: Agree) -> None:
    check_states(WIDE, agree)


def test_preprocessing_is_that_of_transformers() -> None:
    processor = transformers.CLIPImageProcessorPil if hasattr(transformers, "CLIPImageProcessorPil") else None
    processor = processor or transformers.CLIPImageProcessor
    prepare = processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for height, width in ((70, 45), (45, 71), (32, 32), (20, 31)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
        theirs = prepare(images=Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        ours = clip_images.preprocess(image, 32)
        np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, atol=1e-6)


def test_directory_of_transformers_there_and_back_is_bit_identical(tmp_path: Path) -> None:
    """Read from what transformers saves, written in both layouts, read again, and loaded by transformers."""
    model = transformers.CLIPVisionModelWithProjection(described(QUICK))
    reference.randomise(model, 0)
    model.save_pretrained(tmp_path / "saved")
    tower = towers.open_tower(tmp_path / "saved")
    assert tower.config == QUICK
    towers.write(tower, tmp_path / "openclip.safetensors", Dialect.OPENCLIP)
    (tmp_path / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    again = towers.open_tower(tmp_path / "openclip.safetensors")
    assert again.naming == Naming(Dialect.OPENCLIP, "visual.") and again.config == QUICK
    towers.write(again, tmp_path / "image_encoder", Dialect.TRANSFORMERS)
    loaded = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_the_tables_have_every_tensor_of_transformers() -> None:
    model = transformers.CLIPVisionModelWithProjection(described(TINY))
    table = names.table(TINY, Naming(Dialect.TRANSFORMERS))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {entry.name: entry.shape for entry in table.entries}
