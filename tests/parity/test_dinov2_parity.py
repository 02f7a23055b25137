"""DINOv2 against transformers: the states of all layers, positions interpolated for another size, and its files.

1e-5 of the maximum. Weights are random, and such that a wrong eps or activation shows (`reference.randomise`).
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
from agreement import Agree
from reference import torch, transformers

from sdxl_jax.errors import InputError
from sdxl_jax.models import dinov2
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.weights.dinov2 import open_dinov2

TINY = DinoV2Config(width=48, layers=3, heads=3, mlp_width=192, side=56, patch=14)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    described = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14
    )
    model = transformers.Dinov2Model(described)
    reference.randomise(model, 0)
    model.save_pretrained(folder := tmp_path_factory.mktemp("dinov2") / "saved")
    return folder


@pytest.mark.parametrize("size", [(56, 56), (70, 42)], ids=["own size", "interpolated positions"])
def test_dinov2_matches_transformers(saved: Path, size: tuple[int, int], agree: Agree) -> None:
    weights = open_dinov2(saved)
    assert weights.config == TINY
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        model = transformers.Dinov2Model.from_pretrained(saved).eval()
        theirs = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    ours = jax.jit(functools.partial(dinov2.encode, TINY))(weights.load(), pixels)
    for number, (mine, other) in enumerate(zip(ours.layers, theirs.hidden_states, strict=True)):
        agree(f"DINOv2 at {size}: after {number} layers", mine, other, 1e-5)
    agree(f"DINOv2 at {size}: embedding", ours.embedding, theirs.pooler_output, 1e-5)


def test_wrong_directories_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no .*model\.safetensors"):
        open_dinov2(tmp_path)
    fields = json.loads((saved / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "use_swiglu_ffn": True}))
    with pytest.raises(InputError, match="use_swiglu_ffn=True"):
        open_dinov2(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"layer\.3"):
        open_dinov2(tmp_path)
