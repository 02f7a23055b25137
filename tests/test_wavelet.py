"""The exact autoencoder: an orthonormal transform, undone without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.errors import InputError
from sdxl_jax.models import vae
from sdxl_jax.models.wavelet import WaveletConfig, inverse, transform


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_transform_is_orthonormal_and_undone(levels: int) -> None:
    config = WaveletConfig(levels, 2.5)
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    latent = transform(config, image)
    assert latent.shape == (2, 8 // config.downsampling, 12 // config.downsampling, config.latent_channels)
    assert float(jnp.sum(latent**2)) == pytest.approx(float(jnp.sum(image**2)), rel=1e-5)
    np.testing.assert_allclose(inverse(config, latent), image, atol=1e-5)
    posterior = vae.encode(config, {}, image)
    scaled = vae.scaled_sample(config, posterior, jax.random.split(jax.random.key(1), 2))
    np.testing.assert_allclose(scaled, 2.5 * latent, rtol=1e-6)
    np.testing.assert_allclose(vae.decode(config, {}, scaled), image, atol=1e-5)
    np.testing.assert_allclose(vae.decode_tiled(config, {}, scaled), image, atol=1e-5)


def test_bands_are_mean_horizontal_vertical_and_diagonal_detail() -> None:
    left, top = np.array([[1, -1], [1, -1]]), np.array([[1, 1], [-1, -1]])
    for number, block in enumerate((np.ones((2, 2)), left, top, left * top)):
        latent = transform(WaveletConfig(), jnp.asarray(np.repeat(block[None, ..., None], 3, axis=-1), jnp.float32))
        np.testing.assert_array_equal(latent[0, 0, 0], np.repeat(2.0 * (np.arange(4) == number), 3))


@pytest.mark.parametrize("wrong", [WaveletConfig(-1), WaveletConfig(1, 0.0), WaveletConfig(1, float("inf"))])
def test_numbers_out_of_range_are_refused(wrong: WaveletConfig) -> None:
    WaveletConfig(0).check("model.vae")
    with pytest.raises(InputError, match=r"model\.vae has levels"):
        wrong.check("model.vae")
