"""The autoencoder against diffusers: both moments, and the decoder. Tolerance: see `agreement.TOLERANCE`."""

import functools

import jax
import numpy as np
import pytest
import reference
from agreement import Agree
from reference import torch

from sdxl_jax.models import vae


@pytest.fixture(scope="module")
def pair() -> reference.Pair:
    return reference.vae_pair(reference.VAE)


def test_vae_encoder_matches_diffusers(pair: reference.Pair, agree: Agree) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (2, 40, 72, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = pair.model.encode(reference.to_torch(image)).latent_dist
    ours = jax.jit(functools.partial(vae.encode, reference.VAE))(pair.params, image)
    agree("VAE encoder: mean", ours.mean, reference.from_torch(theirs.mean))
    agree("VAE encoder: log variance", ours.log_variance, reference.from_torch(theirs.logvar))


def test_vae_decoder_matches_diffusers(pair: reference.Pair, agree: Agree) -> None:
    latent = np.random.default_rng(0).standard_normal((2, 5, 9, 4), np.float32)
    with torch.no_grad():
        theirs = pair.model.decode(reference.to_torch(latent)).sample
    ours = jax.jit(functools.partial(vae.decode, reference.VAE))(pair.params, latent * reference.VAE.scale)
    agree("VAE decoder", ours, reference.from_torch(theirs))
