"""Previews of latents without an autoencoder: an image at an eighth of the size, by one linear map per latent pixel.

    rgb = latent · W + b

SDXL's latent is nearly linear in colour: a 4 → 3 map, fitted here, explains most of the mean colour of a block of 8 × 8
pixels. Sharper and slower is the tiny autoencoder (`models/taesd.py`), whose `vae.decode` gives the image at full size.
Other latent spaces (SD 1.x and 2.x, of as many channels) need other numbers, which are not here.
"""

import numpy as np
from jaxtyping import Float, UInt8

from sdxl_jax.errors import InputError

_WEIGHTS = np.array(
    [
        [0.1960, 0.2128, 0.2248],
        [-0.0886, -0.0131, 0.0276],
        [0.0546, 0.0438, -0.0092],
        [-0.1482, -0.1249, -0.1102],
    ],
    np.float32,
)
_BIAS = np.array([0.5336, 0.4948, 0.4473], np.float32)
"""Colours 0..1. Least squares over the latents that TAESDXL's encoder gives 363 photographs of COCO 2017
(`benchmarks/latent_colours.py`). The residual is 22 of 255 levels (root mean square; held out, 22.2), of a deviation of
66: the map explains 87, 90 and 86 % of the variance of red, green and blue."""


def latent_to_rgb(
    latent: Float[np.ndarray, "batch latent_height latent_width channels"],
) -> UInt8[np.ndarray, "batch latent_height latent_width 3"]:
    """Colours 0..255 of SDXL's scaled latents (× 0.13025, as the UNet sees them), one pixel per latent pixel.

    NaN and inf count as 0: `nonfinite` reports them once the batch is done. Raises InputError for latents that do not
    have 4 channels.
    """
    if latent.shape[-1] != len(_WEIGHTS):
        raise InputError(
            f"The latents have {latent.shape[-1]} channels; the preview in colours is for SDXL's, of {len(_WEIGHTS)}. "
            "Decode them with the model's autoencoder"
        )
    finite = np.nan_to_num(np.asarray(latent, np.float32), posinf=0, neginf=0)
    colours = finite @ _WEIGHTS + _BIAS
    return np.round(np.clip(colours, 0, 1) * 255).astype(np.uint8)
