"""Heads that judge features of frozen or trained networks: those of ADD, on several layers of an image network, and
that of DMD2, on the middle of a UNet.

    ADD   features of a layer ── conv 1 ── residual conv 9, around the edge ── conv 1 ─┬─ logit per position
          condition (text, image) ── linear ───────────────────────────────────────────┘   by projection
          every conv has spectral norm; after the first two batch norm and LeakyReLU 0.2
    DMD2  features of the middle ── (conv 4, stride 2, norm, SiLU) × layers ── conv 4, norm, SiLU ── conv 1 ── logits

ADD (Sauer et al., arXiv:2311.17042) takes its heads over from StyleGAN-T (Sauer et al., arXiv:2301.09515, section 4.2),
where features are tokens; here features with rows and columns have 3×3 convolutions in the place of 9. The conditional
logit is ⟨h, W c⟩ / √64 (Miyato & Koyama, arXiv:1802.05637). Spectral norm divides a kernel by its largest singular
value, one step of the power iteration per update of the heads (Miyato et al., arXiv:1802.05957); batch norm has the
statistics of virtual batches of 8 images, in training and after it: no image's logits depend on the batch size.
DMD2: Yin et al., arXiv:2405.14867, section 4.3.

Heads are pure functions of parameters, which begin as torch's convolutions do. Everything is float32.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import Params, type_of_array
from sdxl_jax.models.initialisers import Distribution, Parameter
from sdxl_jax.models.patchgan import group_norm

_SLOPE = 0.2
_EPSILON = 1e-5
_PROJECTION = 64
"""Features that are multiplied by those of the condition."""
_VIRTUAL_BATCH = 8
"""Images of a virtual batch of batch norm."""

Positions = Float[type_of_array, "batch *positions channels"]


def _torch_conv(shape: tuple[int, ...]) -> Params:
    """Kernel and bias of a convolution, as torch's begin: uniform, ±1 / √fan-in."""
    width = Distribution(half_width=1 / math.sqrt(math.prod(shape[:-1])))
    return {"kernel": Parameter(shape, width), "bias": Parameter(shape[-1:], width)}


def _norm(channels: int) -> Params:
    return {"scale": Parameter((channels,), Distribution(1.0)), "bias": Parameter((channels,), Distribution())}


def _convolution(params: Params, x: Any, stride: int, padding: int) -> Any:
    """Of two axes of positions: [batch, rows, columns, channels]."""
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (stride,) * 2, [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return x + params["bias"]


def sum_of_products(params: Params, x: Positions) -> Any:
    """A convolution of one or two axes of positions, without padding, as one product for each position of the kernel.
    R1 needs its second derivative, for which XLA has no fast convolution on CPUs: 15 times slower."""
    kernel = params["kernel"]
    reach = kernel.shape[:-2]
    sizes = [size - width + 1 for size, width in zip(x.shape[1:-1], reach, strict=True)]
    found = params["bias"]
    for at in itertools.product(*map(range, reach)):
        part = x[(slice(None), *(slice(first, first + size) for first, size in zip(at, sizes, strict=True)))]
        found = found + part @ kernel[at]
    return found


# ---- ADD -------------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = ("conv_1", "conv_9", "logits")
"""Of one head."""


@dataclass(frozen=True)
class FeatureHeads:
    """The heads of ADD's discriminator, one for each layer of features."""

    channels: tuple[int, ...]
    """Channels of each layer."""
    axes: int
    """1 for features that are tokens, 2 for rows and columns."""
    condition_dim: int = 0
    """Width of the condition; 0: unconditional."""

    def abstract(self) -> Params:
        """The parameters, none of them made: {"head_0": {"conv_1": …}, …}."""
        found: Params = {}
        wide = (9,) if self.axes == 1 else (3, 3)
        for number, channels in enumerate(self.channels):
            head = {
                "conv_1": _torch_conv((*(1,) * self.axes, channels, channels)),
                "norm_1": _norm(channels),
                "conv_9": _torch_conv((*wide, channels, channels)),
                "norm_9": _norm(channels),
                "logits": _torch_conv((*(1,) * self.axes, channels, _PROJECTION if self.condition_dim else 1)),
            }
            if self.condition_dim:
                head["condition"] = _torch_conv((self.condition_dim, _PROJECTION))
            found[f"head_{number}"] = head
        return found

    def carried(self) -> Params:
        """What is carried from step to step, as it begins: the left singular vector of each kernel, as the power
        iteration has it so far."""
        found: Params = {}
        for name, head in self.abstract().items():
            vectors = {conv: head[conv]["kernel"].shape[-1] for conv in _CONVOLUTIONS}
            # Normal numbers, not ones: a vector without a part along the singular one would never find it.
            keys = jax.random.split(jax.random.key(0), len(vectors))
            found[name] = {
                conv: _unit(jax.random.normal(key, (size,)))
                for key, (conv, size) in zip(keys, vectors.items(), strict=True)
            }
        return found

    def normalised(self, params: Params, carried: Params) -> tuple[Params, Params]:
        """(the parameters with kernels divided by their spectral norms, the vectors after one step of the power
        iteration). Gradients go through kernels and norms, not through the vectors."""
        divided: Params = {name: dict(head) for name, head in params.items()}
        after: Params = {name: dict(head) for name, head in carried.items()}
        for name, head in params.items():
            for conv in _CONVOLUTIONS:
                matrix = head[conv]["kernel"].reshape(-1, head[conv]["kernel"].shape[-1])
                fixed = jax.lax.stop_gradient(matrix)
                right = _unit(fixed @ carried[name][conv])
                after[name][conv] = left = _unit(right @ fixed)
                divided[name][conv] = {**head[conv], "kernel": head[conv]["kernel"] / (right @ matrix @ left)}
        return divided, after

    def logits(
        self,
        normalised: Params,
        features: tuple[Positions, ...],
        condition: Float[type_of_array, "batch condition"] | None,
    ) -> list[Float[jax.Array, "batch positions"]]:
        """Logits of each head, one per position, higher for what looks more real. normalised: parameters of
        `normalised`. condition: None exactly for unconditional heads."""
        assert (condition is None) == (self.condition_dim == 0), "a condition is given exactly if the heads have one"
        found = []
        for number, x in enumerate(features):
            head = normalised[f"head_{number}"]
            x = _activated(head, "1", x, 0)
            x = (x + _activated(head, "9", x, head["conv_9"]["kernel"].shape[0] // 2)) / math.sqrt(2)
            x = sum_of_products(head["logits"], x).reshape(len(x), -1, head["logits"]["kernel"].shape[-1])
            if condition is not None:
                wanted = condition @ head["condition"]["kernel"] + head["condition"]["bias"]
                x = jnp.einsum("bpf,bf->bp", x, wanted) / math.sqrt(_PROJECTION)
            found.append(x.reshape(len(x), -1))
        return found


def _unit(vector: Float[jax.Array, " size"]) -> Float[jax.Array, " size"]:
    return vector / (jnp.linalg.norm(vector) + 1e-12)


def _activated(head: Params, name: str, x: Positions, padding: int) -> Any:
    """Convolution around the edge, batch norm, LeakyReLU."""
    around = [(0, 0), *[(padding, padding)] * (x.ndim - 2), (0, 0)]
    x = sum_of_products(head[f"conv_{name}"], jnp.pad(x, around, mode="wrap") if padding else x)
    x = _virtual_batch_norm(head[f"norm_{name}"], x)
    return jnp.where(x > 0, x, _SLOPE * x)


def _virtual_batch_norm(params: Params, x: Positions) -> Any:
    """Batch norm with the statistics of up to 8 consecutive images; of equally many, if 8 do not divide the batch."""
    size = next(size for size in range(min(_VIRTUAL_BATCH, len(x)), 0, -1) if len(x) % size == 0)
    grouped = x.reshape(len(x) // size, -1, x.shape[-1])
    centred = grouped - grouped.mean(1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + _EPSILON)
    return scaled.reshape(x.shape) * params["scale"] + params["bias"]


# ---- DMD2 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiddleHead:
    """The head of DMD2's discriminator, on features of the middle of a UNet. At 1024×1024 those of SDXL are 32×32, and
    three layers leave one logit."""

    channels: int = 1280
    """Channels of the middle."""
    layers: int = 3
    """Convolutions of stride 2."""

    @property
    def smallest(self) -> int:
        """Rows, or columns, of the features that are needed for one logit."""
        return 4 * 2**self.layers

    def abstract(self) -> Params:
        """The parameters, none of them made."""
        found: Params = {}
        for number in range(self.layers + 1):
            found[f"conv_{number}"] = _torch_conv((4, 4, self.channels, self.channels))
            found[f"norm_{number}"] = _norm(self.channels)
        return {**found, "conv_out": _torch_conv((1, 1, self.channels, 1))}

    def logits(
        self, params: Params, features: Float[jax.Array, "batch rows columns channels"]
    ) -> Float[jax.Array, "batch logits"]:
        """Higher for what looks more real; one per image where the features are as large as `smallest`."""
        x = jnp.asarray(features, jnp.float32)
        for number in range(self.layers + 1):
            last = number == self.layers
            x = _convolution(params[f"conv_{number}"], x, stride=4 if last else 2, padding=0 if last else 1)
            x = jax.nn.silu(group_norm(params[f"norm_{number}"], x))
        return sum_of_products(params["conv_out"], x).reshape(len(x), -1)
