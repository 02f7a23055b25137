"""The tables of names against the state dicts of diffusers and transformers: nothing lost, nothing changed."""

import numpy as np
import pytest
import reference

from sdxl_jax.weights import names

MODELS = {
    **{f"UNet {name}": (reference.unet_pair, config) for name, config in reference.UNETS.items()},
    "VAE": (reference.vae_pair, reference.VAE),
    **{name: (reference.tower_pair, config) for name, config in reference.TOWERS.items()},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("UNet SD 1") else []) for name in MODELS]
)
def test_weights_return_bit_for_bit(name: str) -> None:
    build, config = MODELS[name]
    pair = build(config)
    theirs = reference.weights(pair.model)
    returned = names.to_tensors(pair.table, pair.params)
    assert returned.keys() == theirs.keys()
    for key, value in theirs.items():
        assert returned[key].dtype == value.dtype
        np.testing.assert_array_equal(returned[key], value, err_msg=key)
