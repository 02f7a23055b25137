"""Previews of unfinished images, in one PNG that is rewritten after every step."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.sampling import previews
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png

if TYPE_CHECKING:
    from sdxl_jax.model import Model, ModelConfig
    from sdxl_jax.sampling.generate import StepState


class Previews:
    """Previews from latents: by a linear map to colours, or with a tiny autoencoder, which gives the full size."""

    def __init__(self, config: "ModelConfig", autoencoder: AnyPath | None = None):
        """autoencoder: TAESDXL's decoder. Raises InputError where neither fits the model's latents."""
        self._tiny = None if autoencoder is None else _load(autoencoder, config)
        if self._tiny is None and not _has_sdxl_latents(config):
            raise InputError(
                "The preview in colours is for SDXL's latents, and this model has others. Give its tiny autoencoder "
                "(TAESD) as --preview-autoencoder FILE, or leave --preview out"
            )

    def decode(self, state: "StepState") -> UInt8[np.ndarray, "images height width 3"]:
        """Preview images of the network's current prediction."""
        if self._tiny is None:
            return previews.latent_to_rgb(np.asarray(state.x0, np.float32))
        from sdxl_jax.models.layers import Compute
        from sdxl_jax.sampling import program

        config, params = self._tiny.config, self._tiny.params["vae"]
        return np.asarray(program.STAGED.decode(params, state.x0, config=config, compute=Compute(), tile=None)[0])

    def write(self, path: Path, state: "StepState") -> None:
        """Rewrites the preview PNG, a contact sheet of the batch."""
        images = self.decode(state)
        captions = [f"{state.first + k}: step {state.step} of {state.steps}" for k in range(len(images))]
        sheet = contact_sheet(list(images), captions, min(4, len(images)), scale=max(1, 256 // max(images.shape[1:3])))
        save_png(sheet, path)


def _has_sdxl_latents(config: "ModelConfig") -> bool:
    """By the autoencoder's configuration; the quickstart's autoencoder, for one, needs another map to colours."""
    from sdxl_jax.models.taesd import TinyVaeConfig
    from sdxl_jax.models.vae import VaeConfig

    return config.vae in (VaeConfig(), TinyVaeConfig())


def _load(path: AnyPath, config: "ModelConfig") -> "Model":
    from sdxl_jax.weights.load import load_model

    model = load_model(path, progress=False)
    if "vae" not in model.params or model.config.vae.latent_channels != config.vae.latent_channels:
        raise InputError(
            f"--preview-autoencoder {path} is not an autoencoder for this model's latents. Give TAESDXL's decoder"
        )
    return model
