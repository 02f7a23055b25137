"""The file of a training, read by diffusers, against the adapter as it was trained: beside the kernels of the UNet."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree

from sdxl_jax import sharding
from sdxl_jax.adapters.targets import AdapterConfig, FileDtype, Layers
from sdxl_jax.arrays import unflatten
from sdxl_jax.config import TrainConfig, TrainingConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.models import unet
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.adapters import AdapterTraining

lora_parity: Any = pytest.importorskip("test_lora_parity")  # skipped without torch, diffusers and peft

# A whole UNet, of which both sides sum the products of narrow factors in another order: some roundings of 6e-8,
# enlarged by norms. A file that diffusers reads in part is off by some tenths.
TOLERANCE = 1e-5


@pytest.mark.slow
def test_unet_with_the_file_of_a_training_is_the_same_in_diffusers(agree: Agree, tmp_path: Path) -> None:
    model, path = lora_parity.SDXL, tmp_path / "run.safetensors"
    adapter = AdapterConfig(
        rank=3, alpha=2.0, conv_rank=1, conv_alpha=4.0, layers=Layers.BLOCKS, file_dtype=FileDtype.FLOAT32
    )
    config = TrainConfig(DataConfig("unused"), model=model, training=TrainingConfig(), adapter=adapter)
    training, rng = AdapterTraining(config, adapter), np.random.default_rng(3)
    factors = {
        name: np.full(leaf.shape, leaf.distribution.mean, np.float32)
        if name.endswith("alpha")
        else 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        for name, leaf in training.abstract.items()
    }
    whole = unflatten(factors)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    training.export(whole, path, 1, mesh, is_first=True)

    pipe, given = lora_parity.pipeline(model), lora_parity.inputs()
    params = jax.tree.map(jnp.asarray, lora_parity.parameters(model, pipe)["unet"])
    numbers = np.asarray(unet.sinusoidal_embedding(jnp.zeros((2, 6)), 4)).reshape(2, -1)
    arrays = given.latent, given.timestep, given.context, np.concatenate([given.pooled, numbers], -1)
    apply = jax.jit(functools.partial(unet.apply, model.unet))
    with_adapter = apply(params, *map(jnp.asarray, arrays), adapters=whole["unet"])
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    theirs = lora_parity.their_output(pipe, given)
    assert np.abs(theirs - np.asarray(apply(params, *map(jnp.asarray, arrays)))).max() > 0.1 * np.abs(theirs).max()
    agree("LoRA as trained, its file in diffusers", with_adapter, theirs, TOLERANCE)
