"""The training loss: noise an image, weigh the squared error of the prediction.

    L = E w(t) ‖target − network(α_t x₀ + σ_t ε, t)‖²,   t uniform over the timesteps

Options: offset noise, min-SNR-γ weights. The network is a function that is passed in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from sdxl_jax.diffusion.parameterisation import Prediction, target
from sdxl_jax.diffusion.schedule import Schedule

Array = jax.Array


@dataclass(frozen=True)
class LossConfig:
    """How the error is weighed and the noise is drawn."""

    min_snr_gamma: float | None = None
    """Weigh ε-errors by min(SNR, γ) / SNR; 5 is usual. Lower: the nearly clean timesteps count less. None: all
    alike."""
    offset_noise: float = 0.0
    """Strength of noise that is one number a channel. Higher: overall brightness is learnt better; SDXL uses 0.05 in
    its last stage."""


def min_snr_weight(
    snr: Float[np.ndarray, " timesteps"], gamma: float, prediction: Prediction
) -> Float[np.ndarray, " timesteps"]:
    """Min-SNR-γ, Hang et al. 2023, arXiv:2303.09556, section 3.4: the weight min(SNR, γ) of an error in x₀, expressed
    as the weight of an error in what the network predicts.

    ‖Δx₀‖² = ‖Δε‖² / SNR = ‖Δv‖² / (SNR + 1). An SNR of 0 (zero terminal SNR) is allowed: the weight of ε is 1 there,
    its limit.
    """
    clipped = np.minimum(snr, gamma)
    match prediction:
        case Prediction.EPSILON:
            return np.divide(clipped, snr, out=np.ones_like(snr), where=snr > 0)
        case Prediction.V:
            return clipped / (snr + 1)
        case Prediction.X0:
            return clipped


def draw_noise(key: Key[Array, ""], shape: tuple[int, ...], offset: float) -> Float[Array, "height width channels"]:
    """Standard normal noise for one latent of shape [height, width, channels], plus `offset` × one normal number a
    channel.

    Offset noise: Guttenberg 2023, "Diffusion with Offset Noise"; SDXL's stage 3 (arXiv:2307.01952, section 2.5).
    """
    noise_key, offset_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, shape)
    if offset:
        noise += offset * jax.random.normal(offset_key, (1, 1, shape[-1]))
    return noise


def diffusion_loss(
    network: Callable[[Array, Array], Array],
    x0: Float[Array, "batch height width channels"],
    keys: Key[Array, " batch"],
    schedule: Schedule,
    prediction: Prediction,
    config: LossConfig,
) -> Float[Array, ""]:
    """Mean weighted squared error over the batch.

    network(x_t, timestep [batch]) -> prediction; x0: scaled latents; keys: one an example, so that what an example
    draws does not depend on how the batch is cut into micro-batches or spread over devices.
    """

    def draw(key: Array) -> tuple[Array, Array]:
        time_key, noise_key = jax.random.split(key)
        timestep = jax.random.randint(time_key, (), 0, len(schedule.alpha_bar))
        return timestep, draw_noise(noise_key, x0.shape[1:], config.offset_noise)

    timestep, epsilon = jax.vmap(draw)(keys)

    def at_timestep(values: Float[np.ndarray, " timesteps"]) -> Float[Array, "batch 1 1 1"]:
        return jnp.asarray(values, jnp.float32)[timestep][:, None, None, None]

    alpha, sigma_t = at_timestep(schedule.alpha), at_timestep(schedule.sigma_t)
    output = network(alpha * x0 + sigma_t * epsilon, timestep)
    error = (output - target(prediction, x0, epsilon, alpha, sigma_t)) ** 2
    if config.min_snr_gamma is not None:
        error *= at_timestep(min_snr_weight(schedule.snr, config.min_snr_gamma, prediction))
    return error.mean()
