"""Continuous noise laws, EDM and flow matching; and how a network is called at a noise level, whatever the law.

    EDM    x = x₀ + σ ε,            σ_min ≤ σ ≤ σ_max    Karras et al., arXiv:2206.00364
    flow   x = (1 − s) x₀ + s ε,    0 ≤ s ≤ 1            Lipman et al., arXiv:2210.02747; Esser et al., arXiv:2403.03206

Both are the discrete schedule's x_t = α x₀ + σ_t ε with α² + σ_t² = 1, times a number: 1/α for EDM, where σ = σ_t / α,
and 1/(α + σ_t) for flow, where s = σ_t / (α + σ_t). So samplers, the loss and all else keep x_t, α and σ_t, and
`Scales` has what the laws differ in, as factors of x_t. Nothing in it is infinite where α = 0, which is flow's s = 1.

The discrete schedule's own numbers are in `schedule`, its predictions in `parameterisation`. Not here: which noise
levels are sampled (`samplers/steps.py`) and trained (`training_levels`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from sdxl_jax.arrays import type_of_array
from sdxl_jax.diffusion.parameterisation import Denoised, Prediction, denoised
from sdxl_jax.errors import InputError

Array = jax.Array

Numbers = Float[type_of_array, "..."] | float
"""Numbers of one level or of several, float64 of numpy or float32 of jax."""


@dataclass(frozen=True)
class EdmConfig:
    """Levels of σ in x₀ + σ ε. The network predicts EDM's F, or v (CosXL, with sigma_data 1). The defaults are Karras's
    and Playground v2.5's."""

    sigma_min: float = 0.002
    """Lowest σ that is sampled. Lower: finer detail of the last steps."""
    sigma_max: float = 80.0
    """Highest σ that is sampled. Higher: less of the image is left there."""
    sigma_data: float = 0.5
    """Standard deviation of the latents that the network was trained for. It sets how its output is scaled."""

    def level(self, sigma: Any) -> tuple[Any, Any]:
        """(α, σ_t) of σ."""
        alpha = 1 / (1 + sigma**2) ** 0.5
        return alpha, sigma * alpha

    def check(self, name: str) -> None:
        """Raises InputError for numbers that are no noise levels. name: of the field, for messages."""
        if not 0 < self.sigma_min < self.sigma_max < float("inf") or not 0 < self.sigma_data < float("inf"):
            raise InputError(
                f"{name}.sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g}, sigma_data={self.sigma_data:g}. "
                "Give numbers above 0, with sigma_min below sigma_max"
            )


@dataclass(frozen=True)
class FlowConfig:
    """Levels of s in (1 − s) x₀ + s ε. The network predicts ε − x₀, and is given 1000 s as its timestep."""

    shift: float = 1.0
    """Shift of the levels that are sampled and trained. Higher: more of them are noisy; 1 is no shift, 3 is SD 3's. For
    an image of k times the side that the model was trained for: k times the shift."""

    def shifted(self, s: Any) -> Any:
        """s ↦ shift · s / (1 + (shift − 1) s). Esser et al., eq. 23."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def level(self, s: Any) -> tuple[Any, Any]:
        """(α, σ_t) of s."""
        norm = ((1 - s) ** 2 + s**2) ** 0.5
        return (1 - s) / norm, s / norm

    def check(self, name: str) -> None:
        """Raises InputError for a shift that is none. name: of the field, for messages."""
        if not 0 < self.shift < float("inf"):
            raise InputError(f"{name}.shift={self.shift:g}. Give a number above 0; 1 is no shift")


ContinuousConfig = EdmConfig | FlowConfig


class Scales(NamedTuple):
    """How a network F is called at a level, as factors of x_t:

    x₀ = skip · x_t + output · F,   ε = noise_skip · x_t + noise_output · F,   with F of input · x_t
    """

    input: Any
    """c_in."""
    skip: Any
    """c_skip."""
    output: Any
    """c_out."""
    noise_skip: Any
    noise_output: Any


def scales(law: ContinuousConfig, prediction: Prediction, alpha: Numbers, sigma_t: Numbers) -> Scales:
    """Karras et al., table 1, for EDM and, with the sign of c_out, for v; flow as in Esser et al., section 2."""
    if isinstance(law, FlowConfig):
        norm = 1 / (alpha + sigma_t)
        return Scales(norm, norm, -sigma_t * norm, norm, alpha * norm)
    data, sign = law.sigma_data, -1.0 if prediction is Prediction.V else 1.0
    square = sigma_t**2 + (alpha * data) ** 2
    root = square**0.5
    return Scales(
        1 / root,
        data**2 * alpha / square,
        sign * data * sigma_t / root,
        sigma_t / square,
        -sign * data * alpha / root,
    )


def noise_input(law: ContinuousConfig, level: Float[type_of_array, " levels"]) -> Float[type_of_array, " levels"]:
    """c_noise: what the network is given as its timestep at σ (EDM) or s (flow)."""
    if isinstance(law, FlowConfig):
        return 1000.0 * level
    return 0.25 * (np.log(level) if isinstance(level, np.ndarray) else jnp.log(level))


def target(
    law: ContinuousConfig, prediction: Prediction, x0: Any, epsilon: Any, alpha: Numbers, sigma_t: Numbers
) -> Any:
    """The regression target, arrays as x₀: the F with which `Scales` gives this x₀ and this ε. In the terms of Karras
    et al., eq. 7, (x₀ − c_skip (x₀ + σ ε)) / c_out, without its division by small numbers at low σ."""
    if isinstance(law, FlowConfig):
        return epsilon - x0
    data, sign = law.sigma_data, -1.0 if prediction is Prediction.V else 1.0
    root = (sigma_t**2 + (alpha * data) ** 2) ** 0.5
    return sign * (sigma_t / data * x0 - alpha * data * epsilon) / root


def predicted(
    network: Callable[[Any, Any], Float[Array, "batch height width channels"]],
    x_t: Float[Array, "batch height width channels"],
    timestep: Shaped[type_of_array, "..."] | float,
    prediction: Prediction,
    law: ContinuousConfig | None,
    alpha: Float[type_of_array, "..."],
    sigma_t: Float[type_of_array, "..."],
) -> Denoised:
    """x₀ and ε by a network at one noise level. timestep: the schedule's, or the law's `noise_input`. law: None is the
    discrete schedule."""
    if law is None:
        return denoised(prediction, network(x_t, timestep), x_t, alpha, sigma_t)
    scale = scales(law, prediction, alpha, sigma_t)
    output = network(scale.input * x_t, timestep)
    return Denoised(scale.skip * x_t + scale.output * output, scale.noise_skip * x_t + scale.noise_output * output)
