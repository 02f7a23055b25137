"""PatchGAN: the discriminator of an autoencoder's adversarial loss. It judges patches of 70×70 pixels.

    image −1..1 ── conv 4×4, stride 2 ── (conv, stride 2, norm) × (layers − 1) ── conv, norm ── conv ── logits

Every convolution has a padding of 1 and is followed by LeakyReLU 0.2, except the last. Layer n has
base_channels · min(2ⁿ, 8) channels. 256×256 pixels give 30×30 logits; the defaults have 2,765,633 parameters.

Sources: Isola et al., arXiv:1611.07004; taming-transformers `discriminator/model.py`, whose layer numbers the names of
the parameters have. Running statistics and ActNorm's initial values are results, not side effects: everything here is
a pure function. Everything is float32.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from sdxl_jax.arrays import Image, Params
from sdxl_jax.models.initialisers import Distribution, Parameter

_SLOPE = 0.2
_DEVIATION = 0.02
"""Of the initial kernels, and of the initial scales of batch norm around 1."""
_EPSILON = 1e-5
_MOMENTUM = 0.1
"""Share of a batch's statistics in the running ones."""
_GROUPS = 32


class Norm(enum.Enum):
    """The norm after a convolution."""

    BATCH = "batch"
    """Statistics of the batch, over all devices. The convolutions before it have no bias."""
    GROUP = "group"
    """Group norm with up to 32 groups: an image's logits do not depend on its neighbours in the batch."""
    ACT = "act"
    """ActNorm: a shift and a scale per channel, which make the first batch's mean 0 and deviation 1, and are then
    learned. Kingma & Dhariwal, arXiv:1807.03039."""


@dataclass(frozen=True)
class PatchGanConfig:
    """What the discriminator's weights depend on."""

    base_channels: int = 64
    """Channels of the first layer. Higher: a stronger discriminator, slower by the square."""
    layers: int = 3
    """Layers of stride 2. Higher: larger patches: 16, 34, 70, 142 pixels for 1, 2, 3, 4."""
    norm: Norm = Norm.BATCH
    """The norm between the convolutions."""

    @property
    def smallest(self) -> int:
        """Pixels of an image's shorter side that are needed for one logit."""
        return 3 * 2**self.layers


class _Layer(NamedTuple):
    name: str
    channels_in: int
    channels: int
    stride: int
    bias: bool
    norm: str | None
    """Name of the norm after it."""


def _layers(config: PatchGanConfig) -> list[_Layer]:
    channels = [config.base_channels * min(2**n, 8) for n in range(config.layers + 1)]
    found = [_Layer("main_0", 3, channels[0], 2, True, None)]
    bias = config.norm is not Norm.BATCH
    for n in range(1, config.layers + 1):
        stride = 2 if n < config.layers else 1
        found.append(_Layer(f"main_{3 * n - 1}", channels[n - 1], channels[n], stride, bias, f"main_{3 * n}"))
    return [*found, _Layer(f"main_{3 * config.layers + 2}", channels[-1], 1, 1, True, None)]


def abstract(config: PatchGanConfig) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`): {"main_0": {"kernel": …, "bias": …}, …}."""
    params: Params = {}
    for layer in _layers(config):
        shape = (4, 4, layer.channels_in, layer.channels)
        params[layer.name] = {"kernel": Parameter(shape, Distribution(0.0, _DEVIATION))}
        if layer.bias:  # as torch's: uniform, ±1 / √fan-in
            width = 1 / math.sqrt(math.prod(shape[:3]))
            params[layer.name]["bias"] = Parameter((layer.channels,), Distribution(half_width=width))
        if layer.norm is not None:
            deviation = _DEVIATION if config.norm is Norm.BATCH else 0.0
            params[layer.norm] = {
                "scale": Parameter((layer.channels,), Distribution(1.0, deviation)),
                "bias": Parameter((layer.channels,), Distribution()),
            }
    return params


def statistics(config: PatchGanConfig) -> Params:
    """What is carried from batch to batch, as it begins: batch norm's running statistics; whether ActNorm is
    initialised; nothing for group norm."""
    match config.norm:
        case Norm.BATCH:
            return {
                layer.norm: {"mean": jnp.zeros(layer.channels), "variance": jnp.ones(layer.channels)}
                for layer in _layers(config)
                if layer.norm is not None
            }
        case Norm.ACT:
            return {"initialised": jnp.zeros((), jnp.int32)}
        case Norm.GROUP:
            return {}


def apply(
    config: PatchGanConfig, params: Params, carried: Params, image: Image, training: bool = True
) -> tuple[Float[jax.Array, "batch rows columns 1"], Params]:
    """(logits, higher for what looks more real; the statistics after this batch).

    image: −1..1. carried: see `statistics`. training: batch norm uses the batch's statistics, else the running ones,
    which then stay as they are.
    """
    after = dict(carried)

    def norm(name: str, x: Float[jax.Array, "batch rows columns channels"]) -> Any:
        if config.norm is not Norm.BATCH:
            return group_norm(params[name], x) if config.norm is Norm.GROUP else _act_norm(params[name], x)
        running = carried[name]
        if not training:
            return _affine(params[name], x, running["mean"], running["variance"])
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        count = math.prod(x.shape[:3])
        unbiased = {"mean": mean, "variance": variance * (count / max(1, count - 1))}
        after[name] = jax.tree.map(lambda old, new: (1 - _MOMENTUM) * old + _MOMENTUM * new, running, unbiased)
        return _affine(params[name], x, mean, variance)

    return _network(config, params, image, norm), jax.lax.stop_gradient(after)


def initialised(config: PatchGanConfig, params: Params, carried: Params, image: Image) -> tuple[Params, Params]:
    """(parameters, statistics) before the first batch: ActNorm's shifts and scales, if they are not initialised yet,
    become those with which this batch has mean 0 and deviation 1 after each of them. Unchanged with other norms."""
    if config.norm is not Norm.ACT:
        return params, carried

    def from_batch() -> Params:
        made = dict(params)

        def norm(name: str, x: Float[jax.Array, "batch rows columns channels"]) -> Any:
            made[name] = {"scale": 1 / (x.std((0, 1, 2), ddof=1) + 1e-6), "bias": -x.mean((0, 1, 2))}
            return _act_norm(made[name], x)

        _network(config, params, image, norm)
        return made

    return (
        jax.lax.cond(carried["initialised"] == 0, from_batch, lambda: params),
        {"initialised": jnp.ones((), jnp.int32)},
    )


def _network(
    config: PatchGanConfig, params: Params, image: Image, norm: Callable[[str, Any], Any]
) -> Float[jax.Array, "batch rows columns 1"]:
    """norm: (the name of one, its input) -> its output."""
    x = jnp.asarray(image, jnp.float32)
    *inner, last = _layers(config)
    for layer in inner:
        x = _convolution(params[layer.name], x, layer.stride)
        if layer.norm is not None:
            x = norm(layer.norm, x)
        x = jnp.where(x > 0, x, _SLOPE * x)
    return _convolution(params[last.name], x, last.stride)


def _convolution(
    params: Params, x: Float[jax.Array, "batch height width channels_in"], stride: int
) -> Float[jax.Array, "batch rows columns channels"]:
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["kernel"], (stride, stride), [(1, 1)] * 2, dimension_numbers=layout)
    return x + params["bias"] if "bias" in params else x


def _affine(
    params: Params,
    x: Float[jax.Array, "batch rows columns channels"],
    mean: Float[jax.Array, "*mean channels"],
    variance: Float[jax.Array, "*mean channels"],
) -> Float[jax.Array, "batch rows columns channels"]:
    return (x - mean) * (params["scale"] * jax.lax.rsqrt(variance + _EPSILON)) + params["bias"]


def group_norm(
    params: Params, x: Float[jax.Array, "batch rows columns channels"]
) -> Float[jax.Array, "batch rows columns channels"]:
    """With up to 32 groups."""
    groups = math.gcd(_GROUPS, x.shape[-1])
    grouped = rearrange(x, "batch rows columns (groups each) -> batch rows columns groups each", groups=groups)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    normalised = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + _EPSILON)
    return normalised.reshape(x.shape) * params["scale"] + params["bias"]


def _act_norm(
    params: Params, x: Float[jax.Array, "batch rows columns channels"]
) -> Float[jax.Array, "batch rows columns channels"]:
    return params["scale"] * (x + params["bias"])
