"""Previews of latents without an autoencoder."""

import jax.numpy as jnp
import numpy as np
import pytest
import real_data

from sdxl_jax.errors import InputError
from sdxl_jax.models import vae
from sdxl_jax.sampling import previews
from sdxl_jax.weights.load import load_model


def test_colours_have_the_size_of_the_latent_and_stay_within_bytes() -> None:
    latent = np.zeros((2, 3, 5, 4), np.float32)
    latent[1, ..., 0] = [-100, -1, 0, 1, 100]
    colours = previews.latent_to_rgb(latent)
    assert (colours.shape, colours.dtype) == ((2, 3, 5, 3), np.uint8)
    np.testing.assert_array_equal(colours[0, 0, 0], [136, 126, 114])  # the mean of photographs, near grey
    assert (np.diff(colours[1, 0].astype(int), axis=0) > 0).all()  # the first channel is brightness
    assert colours[1, 0, 0].max() == 0 and colours[1, 0, -1].min() == 255


@pytest.mark.parametrize("channels", [3, 16])
def test_latents_of_another_space_are_refused(channels: int) -> None:
    with pytest.raises(InputError, match=f"have {channels} channels; the preview in colours is for SDXL's, of 4"):
        previews.latent_to_rgb(np.zeros((1, 2, 2, channels), np.float32))


def test_colours_are_those_of_the_photograph() -> None:
    """The fit's residual is 22 levels over all photographs, of a deviation of 66."""
    (file,) = real_data.files("taesdxl/taesdxl_encoder.safetensors")
    model = load_model(file, np.float32, progress=False)
    image = real_data.photograph(128)
    latent = np.asarray(vae.encode(model.config.vae, model.params["vae"], jnp.asarray(image)).mean)
    blocks = (image.reshape(16, 8, 16, 8, 3).mean((1, 3)) + 1) * 127.5
    error = np.sqrt(np.mean((previews.latent_to_rgb(latent)[0] - blocks) ** 2))
    assert error < 30 and error < blocks.std() / 2
