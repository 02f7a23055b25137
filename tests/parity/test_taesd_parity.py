"""The tiny autoencoder against diffusers' `AutoencoderTiny`, with random and with the published weights."""

import functools

import jax
import numpy as np
import pytest
import real_data
import reference
from agreement import Agree
from reference import torch

from sdxl_jax.arrays import unflatten
from sdxl_jax.models import taesd, vae
from sdxl_jax.weights.open import open_model


@pytest.fixture(scope="module")
def pair() -> reference.Pair:
    return reference.tiny_vae_pair(reference.TINY_VAE)


def _both_ways(config: taesd.TinyVaeConfig, pair: reference.Pair, image: np.ndarray) -> list[tuple]:
    """(what, ours, theirs): the encoder of an image, the decoder of what torch's encoder gives."""
    with torch.no_grad():
        latent = pair.model.encode(reference.to_torch(image)).latents
        decoded = pair.model.decode(latent).sample
    ours = jax.jit(functools.partial(vae.encode, config))(pair.params, image).mean
    theirs = reference.from_torch(latent)
    back = jax.jit(functools.partial(vae.decode, config))(pair.params, theirs)
    return [("encoder", ours, theirs), ("decoder", back, reference.from_torch(decoded))]


def test_tiny_vae_matches_diffusers(pair: reference.Pair, agree: Agree) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (2, 40, 72, 3)).astype(np.float32)
    for what, ours, theirs in _both_ways(reference.TINY_VAE, pair, image):
        agree(f"tiny VAE {what}", ours, theirs, 1e-5)


def test_published_tiny_vae_matches_diffusers(agree: Agree) -> None:
    """5e-5 of the maximum, and 1e-5 of the whole: trained weights cancel more than random ones, and torch's own float32
    is 1.5e-5 of the maximum away from its float64, 2e-6 of the whole, as ours is."""
    files = real_data.files("taesdxl/taesdxl_decoder.safetensors", "taesdxl/taesdxl_encoder.safetensors")
    weights = open_model(files[0], parts_from=files[1:])
    params = unflatten({path: leaf.read().astype(np.float32) for path, leaf in weights.leaves.items()})["vae"]
    assert weights.config.vae == taesd.TAESDXL
    pair = reference.tiny_vae_with(taesd.TAESDXL, params)
    for what, ours, theirs in _both_ways(taesd.TAESDXL, pair, real_data.photograph(256)):
        agree(f"TAESDXL {what}", ours, theirs, 5e-5)
        assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) < 1e-5
