"""What the network predicts, and how one prediction becomes another.

With x_t = α x₀ + σ ε and α² + σ² = 1:    v = α ε − σ x₀    (Salimans & Ho, arXiv:2202.00512, appendix D)

    from ε:  x₀ = (x_t − σ ε) / α          from v:  x₀ = α x_t − σ v,  ε = σ x_t + α v
    from x₀: ε = (x_t − α x₀) / σ

α and σ broadcast against the latents: scalars, or [batch, 1, 1, 1].
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import type_of_array

Array = jax.Array


class Prediction(enum.Enum):
    """What the network is trained to output."""

    EPSILON = "epsilon"
    """The noise: SDXL, SD 1.x, SD 2.x base."""
    V = "v_prediction"
    """The velocity: SD 2.x at 768. Well defined at every noise level."""
    X0 = "sample"
    """The image."""
    EDM = "edm"
    """F of EDM's preconditioning: Playground v2.5. Of continuous noise levels alone (`continuous`)."""
    FLOW = "flow"
    """ε − x₀ of flow matching. Of continuous noise levels alone."""


DISCRETE = (Prediction.EPSILON, Prediction.V, Prediction.X0)
"""Those of models with the discrete schedule, which have `target` and `denoised` below."""


class Denoised(NamedTuple):
    """A prediction expressed as x₀ and as the noise ε in x_t."""

    x0: Float[Array, "batch height width channels"]
    epsilon: Float[Array, "batch height width channels"]


def target(
    prediction: Prediction,
    x0: Float[Array, "batch height width channels"],
    epsilon: Float[Array, "batch height width channels"],
    alpha: Float[Array, "#batch #height #width #channels"],
    sigma_t: Float[Array, "#batch #height #width #channels"],
) -> Float[Array, "batch height width channels"]:
    """The regression target: the ideal output for this image and this noise."""
    match prediction:
        case Prediction.EPSILON:
            return epsilon
        case Prediction.V:
            return alpha * epsilon - sigma_t * x0
        case Prediction.X0:
            return x0
        case Prediction.EDM | Prediction.FLOW:
            raise AssertionError(CONTINUOUS)


def denoised(
    prediction: Prediction,
    output: Float[Array, "batch height width channels"],
    x_t: Float[Array, "batch height width channels"],
    alpha: Float[type_of_array, "..."],
    sigma_t: Float[type_of_array, "..."],
) -> Denoised:
    """x₀ and ε of a network's output at x_t.

    From ε, α must not be 0 (zero terminal SNR); from x₀, σ_t must not be 0: the other is undefined there.
    """
    alpha, sigma_t = jnp.asarray(alpha), jnp.asarray(sigma_t)
    match prediction:
        case Prediction.EPSILON:
            return Denoised((x_t - sigma_t * output) / alpha, output)
        case Prediction.V:
            return Denoised(alpha * x_t - sigma_t * output, sigma_t * x_t + alpha * output)
        case Prediction.X0:
            return Denoised(output, (x_t - alpha * output) / sigma_t)
        case Prediction.EDM | Prediction.FLOW:
            raise AssertionError(CONTINUOUS)


CONTINUOUS = "a model that predicts edm or flow has a continuous noise law (`ModelConfig.check`)"
