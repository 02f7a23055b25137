"""Images while they come into being, in one PNG that is written again after every step."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from sdxl_jax.errors import InputError
from sdxl_jax.sampling import previews
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png

if TYPE_CHECKING:
    from sdxl_jax.model import Model, ModelConfig
    from sdxl_jax.sampling.generate import StepState


class Previews:
    """Looks at latents: by colours, or with a tiny autoencoder, which gives the image at full size."""

    def __init__(self, config: "ModelConfig", autoencoder: Path | None = None):
        """autoencoder: TAESDXL's decoder. Raises InputError where neither fits the model's latents."""
        self._tiny = None if autoencoder is None else _load(autoencoder, config)
        if self._tiny is None and not _is_sdxl(config):
            raise InputError(
                "Previews by colour are for SDXL's latents, and this model has others. Give its tiny autoencoder "
                "(TAESD) as --preview-autoencoder FILE, or leave --preview out"
            )

    def look(self, seen: "StepState") -> UInt8[np.ndarray, "images height width 3"]:
        """The images as the network now sees them finished."""
        if self._tiny is None:
            return previews.latent_to_rgb(np.asarray(seen.x0, np.float32))
        from sdxl_jax.models.layers import Compute
        from sdxl_jax.sampling import program

        config, params = self._tiny.config, self._tiny.params["vae"]
        return np.asarray(program.STAGED.decode(params, seen.x0, config=config, compute=Compute(), tile=None)[0])

    def write(self, path: Path, seen: "StepState") -> None:
        images = self.look(seen)
        captions = [f"{seen.first + k}: step {seen.step} of {seen.steps}" for k in range(len(images))]
        sheet = contact_sheet(list(images), captions, min(4, len(images)), scale=max(1, 256 // max(images.shape[1:3])))
        save_png(sheet, path)


def _is_sdxl(config: "ModelConfig") -> bool:
    """By the scale of its latents, which is SDXL's alone; the quickstart's autoencoder has its own colours."""
    from sdxl_jax.models.taesd import TinyVaeConfig
    from sdxl_jax.models.vae import VaeConfig

    return config.vae in (VaeConfig(), TinyVaeConfig())


def _load(path: Path, config: "ModelConfig") -> "Model":
    from sdxl_jax.weights.load import load_model

    model = load_model(path, progress=False)
    if "vae" not in model.params or model.config.vae.latent_channels != config.vae.latent_channels:
        raise InputError(
            f"--preview-autoencoder {path} is no autoencoder of this model's latents. Give TAESDXL's decoder"
        )
    return model
