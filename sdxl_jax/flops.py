"""FLOPs of a traced program, and the peak FLOPS of chips: together they give the MFU (model FLOPs utilisation).

Counted are matrix products and convolutions, in loops once per iteration. Elementwise operations are not, as is usual
for an MFU.

Chips: peak bfloat16 FLOPs per second and bytes of memory, by jax's name of the device. Peaks are dense (no sparsity)
and per chip, as its maker publishes them:

- TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e ("peak compute per chip (bf16)", "HBM capacity"). The makers'
  GB are GiB there: a compiler for v5e reports 15.75 GiB that programs may use, for v5p 95.74.
- GPU, peak and bandwidth: NVIDIA's data sheets of A100, H100, H200, HGX B200, L4, L40S, A10G, T4 and RTX A6000, and its
  white papers on the GeForce of GA102, Ada and Blackwell (sums in float32, which halve a GeForce's peak); half of what
  is given with sparsity. Bandwidth of A100, H100 and B200, and memory: what CUDA reports, as in XLA's
  target_config/specs and in PyTorch's messages; error correction takes a part of some. A T4 has no units for bfloat16:
  its peak is that of float32, in which XLA computes there.

A device that is not listed, such as any CPU, has no known peak: then no MFU is reported.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

_GIB = 2**30


class Chip(NamedTuple):
    """One chip. A TPU v4 or v5p is one device to jax, though it has two cores."""

    name: str
    flops_per_second: float
    """Peak of bfloat16 products summed in float32."""
    memory_bytes: int
    """HBM. Programs may use a little less."""
    bytes_per_second: float | None = None
    """Bandwidth of the memory; None where no report needs it."""


V4 = Chip("TPU v4", 275e12, 32 * _GIB)
V5E = Chip("TPU v5e", 197e12, 16 * _GIB)
V5P = Chip("TPU v5p", 459e12, 95 * _GIB)
V6E = Chip("TPU v6e", 918e12, 32 * _GIB)

A100_40 = Chip("A100 40 GB", 312e12, 42331013120, 1.5552e12)
A100_80 = Chip("A100 80 GB", 312e12, 85100068864, 2.03904e12)
H100 = Chip("H100 SXM", 989e12, 84942979072, 3.35232e12)
H100_PCIE = Chip("H100 PCIe", 756e12, 84942979072, 2.03904e12)
H200 = Chip("H200 SXM", 989e12, int(139.8 * _GIB), 4.8e12)
B200 = Chip("B200", 2250e12, 191514411008, 7.67232e12)
L4 = Chip("L4", 121e12, int(22.03 * _GIB), 300e9)
L40S = Chip("L40S", 362e12, int(44.4 * _GIB), 864e9)
A10G = Chip("A10G", 70e12, int(22.06 * _GIB), 600e9)
T4 = Chip("T4", 8.1e12, int(14.75 * _GIB), 320e9)
RTX_3090 = Chip("RTX 3090", 71e12, int(23.68 * _GIB), 936e9)
RTX_4090 = Chip("RTX 4090", 165.2e12, int(23.64 * _GIB), 1008e9)
RTX_5090 = Chip("RTX 5090", 209.5e12, int(31.36 * _GIB), 1792e9)
RTX_A6000 = Chip("RTX A6000", 154.8e12, 51041271808, 768e9)

_KINDS: tuple[tuple[str, Chip], ...] = (
    ("TPU v4", V4),
    ("TPU v5 lite", V5E),
    ("TPU v5e", V5E),
    ("TPU v5", V5P),
    ("TPU v5p", V5P),
    ("TPU v6 lite", V6E),
    ("TPU v6e", V6E),
    ("NVIDIA A100-SXM4-40GB", A100_40),
    ("NVIDIA A100-PCIE-40GB", A100_40),
    ("NVIDIA A100-SXM4-80GB", A100_80),
    ("NVIDIA A100 80GB PCIe", A100_80),
    ("NVIDIA H100 80GB HBM3", H100),
    ("NVIDIA H100 PCIe", H100_PCIE),
    ("NVIDIA H200", H200),
    ("NVIDIA B200", B200),
    ("NVIDIA L4", L4),
    ("NVIDIA L40S", L40S),
    ("NVIDIA A10G", A10G),
    ("Tesla T4", T4),
    ("NVIDIA GeForce RTX 3090", RTX_3090),
    ("NVIDIA GeForce RTX 4090", RTX_4090),
    ("NVIDIA GeForce RTX 5090", RTX_5090),
    ("NVIDIA RTX A6000", RTX_A6000),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None where it is not in the table."""
    return dict(_KINDS).get(device_kind)


class Flops(NamedTuple):
    """Floating-point operations, by kind."""

    products: float
    """Matrix products and convolutions, over all devices."""
    kernels: float
    """Attention kernels, including padding."""

    @property
    def total(self) -> float:
        return self.products + self.kernels


_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Products of jax's primitives for cuDNN's attention: scores and result; scores again, and four gradients."""


def count(function: Any, *arguments: Any) -> Flops:
    """FLOPs of one call. function: traceable; arguments: arrays or their `jax.ShapeDtypeStruct`.

    Raises NotImplementedError for a Pallas kernel whose FLOPs are not defined in this module.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: Any) -> Flops:
    """FLOPs of one run of a `jax.extend.core.Jaxpr`."""
    products = kernels = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            products += _dot(equation)
        elif name == "conv_general_dilated":
            products += _convolution(equation)
        elif name == "pallas_call":
            kernels += _kernel(equation)
        elif name in _CUDNN_PRODUCTS:
            (batch, queries, heads, dim), (_, keys, *_) = (v.aval.shape for v in equation.invars[:2])
            kernels += 2.0 * _CUDNN_PRODUCTS[name] * batch * heads * queries * keys * dim
        else:
            times = parameters["length"] if name == "scan" else 1
            if name == "shard_map":  # its body is the work of one device
                times = math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
            inner = [of_jaxpr(body) for body in _bodies(parameters)]
            if name == "cond":
                inner = [max(inner, key=lambda flops: flops.total)]
            products += times * sum(flops.products for flops in inner)
            kernels += times * sum(flops.kernels for flops in inner)
    return Flops(products, kernels)


def _bodies(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, (out,) = equation.invars[0].aval, equation.outvars
    return 2.0 * out.aval.size * math.prod(left.shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel, (out,) = equation.invars[1].aval, equation.outvars
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    # The gradient of a strided convolution has zeros between its inputs, which are not counted.
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2.0 * out.aval.size * kernel.size / features / zeros


def _kernel(equation: Any) -> float:
    name = equation.params["name"]
    if name.startswith("splash_mha_fwd") or name == "pair_attention_fwd":
        products = 2  # scores, result
    # splash's fused kernel also returns the query gradient
    elif name == "pair_attention_bwd" or (name.startswith("splash_mha_dkv") and len(equation.outvars) > 4):
        products = 5  # scores again, and the gradients of weights, queries, keys and values
    else:
        raise NotImplementedError(f"The FLOPs of the kernel {name} are unknown. Add them to sdxl_jax/flops.py")
    query = next(v.aval for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating))
    *outer, tokens, dim = query.shape
    return 2.0 * products * math.prod(outer) * tokens * tokens * dim
