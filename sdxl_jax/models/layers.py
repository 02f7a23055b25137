"""Primitives shared by the UNet, the autoencoder and the text towers, and the options of how to compute.

Everything is NHWC. Parameters are float32; activations have the dtype of `Compute`; statistics of norms, the softmax
and sinusoidal embeddings are float32 whatever the activations are. Names of parameters follow diffusers where it has
one.
"""

import enum
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Num, Shaped

from sdxl_jax.adapters import kinds
from sdxl_jax.adapters.embeddings import ROWS
from sdxl_jax.adapters.lora import Product
from sdxl_jax.arrays import Params, flatten, type_of_array, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers
from sdxl_jax.sharding import constrain


class Dtype(enum.Enum):
    """Dtype of activations. Parameters stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Attention(enum.Enum):
    """Which implementation computes softmax(q kᵀ) v. See `attention.dot_product_attention`."""

    AUTO = "auto"
    """By platform and shape: the platform's kernel where there is one for the shape and it pays, XLA elsewhere."""
    XLA = "xla"
    """Runs everywhere, and materialises the scores: 640 MiB per image in each layer of 4096 tokens and 10 heads."""
    SPLASH = "splash"
    """The TPU kernel of jax.experimental.pallas, for self-attention; elsewhere it is interpreted, very slowly."""
    PAIRS = "pairs"
    """The TPU kernel of models/pair_attention.py, for self-attention with an even number of heads of 64, which saves
    copies; elsewhere it is interpreted, very slowly. What it does not fit is SPLASH's. AUTO does not choose it: it is
    compiled for TPUs in the tests, and has run on none yet."""
    CUDNN = "cudnn"
    """cuDNN's kernel, on NVIDIA GPUs from Ampere, for self-attention in bfloat16."""


class Remat(enum.Enum):
    """Rematerialisation: what the backward pass recomputes instead of keeping, for residual and transformer blocks.
    From less time to less memory."""

    NONE = "none"
    """Nothing."""
    DOTS = "dots"
    """Norms and activation functions: results of matrix products, convolutions and attention are kept."""
    BLOCK = "block"
    """Whole blocks: their inputs alone are kept. About a third more time."""
    OFFLOAD = "offload"
    """As BLOCK, and inputs of transformer blocks are offloaded to host memory. On a CPU that is the same memory."""


_FEW_POSITIONS, _MANY_CHANNELS = 512, 256
"""Where a CPU convolves by one product: up to so many positions, from so many channels on."""
KEPT = "kept"
"""Checkpoint name of values that `Remat.DOTS` keeps although no matrix product made them: attention's."""
TEXT = "text"
"""Collection of what cross-attention makes of the text, where it was computed before. See `unet.project_text`."""
ADAPTERS = "adapters"
"""Collection of adapters: at the path of a kernel, the factors of its change (`adapters.kinds`); at that of a table of
embeddings, rows for more tokens (`adapters.embeddings`)."""
SCALES, KERNEL_SCALE = "scales", "kernel_scale"
"""Collection of the scales of kernels in eight bits, one per output channel (`weights.eight_bits`); and a parameter's
name for them, beside its kernel."""
ENTERING = "entering"
"""Checkpoint name of the inputs of transformer blocks, which `Remat.OFFLOAD` moves to host memory."""


def _product(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy: keep the results of matrix products and convolutions."""
    return primitive.name in ("dot_general", "conv_general_dilated")


@dataclass(frozen=True)
class Compute:
    """How a network is computed: nothing here changes its parameters."""

    dtype: Dtype = Dtype.FLOAT32
    """Dtype of activations. bfloat16 halves their memory and runs on the matrix units of TPUs and GPUs."""
    attention: Attention = Attention.AUTO
    """Attention kernel."""
    remat: Remat = Remat.NONE
    """What the backward pass recomputes instead of keeping."""
    unroll: bool = False
    """Unroll the scan over a level's transformer blocks: longer compilation, a little faster on some devices. The
    parameter tree is the same."""
    compiler_options: tuple[str, ...] = ()
    """NAME=VALUE of XLA, for the train step. Those that begin with xla_tpu_ or xla_gpu_ are left out on other devices.
    xla_tpu_scoped_vmem_limit_kib=65536 gives v5p's fusions more of the memory on chip: about 10 % on convolutions."""

    def options(self, platform: str) -> dict[str, str]:
        """`compiler_options` for a platform ("cpu", "gpu", "tpu"). Raises InputError for one without a value."""
        others = tuple(f"xla_{other}_" for other in ("tpu", "gpu") if other != platform)
        pairs = [option.partition("=") for option in self.compiler_options]
        if wrong := [name for name, found, _ in pairs if not found]:
            raise InputError(f"compute.compiler_options has {wrong[0]!r}, which has no value. Give NAME=VALUE")
        return {name: value for name, _, value in pairs if not name.startswith(others)}

    @property
    def activations(self) -> Any:
        return jnp.dtype(self.dtype.value)

    def block(self, module: type[nn.Module], in_scan: bool = False) -> type[nn.Module]:
        """The module class, rematerialised if so configured."""
        policies = jax.checkpoint_policies
        match self.remat:
            case Remat.NONE:
                return module
            case Remat.DOTS:
                policy = policies.save_from_both_policies(_product, policies.save_only_these_names(KEPT))
            case Remat.BLOCK:
                policy = None
            case Remat.OFFLOAD:
                policy = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=[ENTERING],
                    offload_src="device",
                    offload_dst="pinned_host",
                )
        # Outside a scan XLA would see that the second computation equals the first, and keep the first.
        return nn.remat(module, prevent_cse=not in_scan, policy=policy)


def sinusoidal_embedding(values: Num[jax.Array, "*axes"], dim: int) -> Float[jax.Array, "*axes {dim}"]:
    """[cos(vω₀) … cos(vω_h), sin(vω₀) … sin(vω_h)] with ω_i = 10000^(−i/h), h = dim/2, in float32.

    Integers up to 8192 are exact: they are float32 before the first product, never bfloat16, which would turn 333
    into 332. The half-and-half order [cos, sin] is that of sgm `modules/diffusionmodules/util.py:timestep_embedding`.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_embedding(scale: Float[jax.Array, "*axes"], dim: int) -> Float[jax.Array, "*axes {dim}"]:
    """[sin(vω₀) … sin(vω_h), cos(vω₀) … cos(vω_h)] with v = 1000 (scale − 1), ω_i = 10000^(−i/(h − 1)), h = dim/2, in
    float32: other than `sinusoidal_embedding` in order and frequencies. scale: of guidance, where 1 is none.

    Luo et al., arXiv:2310.04378, section 4.3, in the numbers of diffusers' `get_guidance_scale_embedding`.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = 1000.0 * (scale.astype(jnp.float32)[..., None] - 1.0) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def variables(params: Params, adapters: Params | None = None) -> dict[str, Params]:
    """What a network is applied to: its parameters, and the adapters of its kernels, which `dense` and `conv` apply
    beside them, with the rows that `looked_up` has beside a table, and the scales of kernels in eight bits. Changes of
    biases and norms, small arrays, are added here."""
    flat, beside = flatten(params), dict[str, Any]()
    scales = {path: flat.pop(path) for path in list(flat) if path.endswith(f"/{KERNEL_SCALE}")}
    by_kernel = {path.replace(KERNEL_SCALE, "kernel"): leaf for path, leaf in scales.items()}
    more = {SCALES: unflatten(by_kernel)} if scales else {}
    if adapters is None:
        return {"params": unflatten(flat) if scales else params, **more}
    for path, factor in flatten(adapters).items():
        parameter = path.rpartition("/")[0]
        if parameter.endswith(("kernel", "/embedding")):
            beside[path] = factor
        else:
            flat[parameter] = flat[parameter] + factor
    return {"params": unflatten(flat), ADAPTERS: unflatten(beside), **more}


def _with_adapter(
    layer: nn.Module,
    x: Float[jax.Array, "*axes features_in"],
    product: Callable[[Any], Any],
    convolve: Product = operator.matmul,
) -> Float[jax.Array, "*axes_out features_out"]:
    """A layer's product with its kernel, times the scales of one in eight bits; if the kernel has an adapter, with what
    that adds. convolve: as in `kinds`."""
    if layer.scope is None:  # a layer applied by itself
        return product(x)
    scale = layer.get_variable(SCALES, "kernel") if layer.has_variable(SCALES, "kernel") else None
    product = product if scale is None else _scaled(product, scale)
    if not layer.has_variable(ADAPTERS, "kernel"):
        return product(x)
    factors, kernel = layer.get_variable(ADAPTERS, "kernel"), layer.get_variable("params", "kernel")
    return jnp.asarray(kinds.applied(x, product, factors, convolve, dequantised(kernel, scale)))


def dequantised(
    kernel: Shaped[type_of_array, "*axes features_out"], scale: Float[type_of_array, "*layers features_out"] | None
) -> Float[type_of_array, "*axes features_out"]:
    """A kernel, or stacked ones, as numbers: values in eight bits times their scales, in float32; others as they are,
    without scales."""
    if scale is None:
        return kernel
    between = (1,) * (kernel.ndim - scale.ndim)
    return kernel.astype(jnp.float32) * scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])


def _scaled(product: Callable[[Any], Any], scale: Float[jax.Array, " features_out"]) -> Callable[[Any], Any]:
    return lambda x: (found := product(x)) * scale.astype(found.dtype)


def dense(features: int, name: str, compute: Compute, **options: Any) -> nn.Dense:
    """A linear layer, with the adapter of its kernel if there is one."""

    def product(x: Any, kernel: Any, *dimensions: Any, **precision: Any) -> Any:
        return _with_adapter(layer, x, lambda x: jax.lax.dot_general(x, kernel, *dimensions, **precision))

    initial = {"kernel_init": initialisers.lecun_normal, "bias_init": initialisers.zeros, "dot_general": product}
    layer = nn.Dense(features, name=name, dtype=compute.activations, **{**initial, **options})
    return layer


def platform() -> str:
    """Platform of the devices that are compiled for: those of the mesh, which need not be attached (AOT compilation),
    else the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _convolve(
    x: Float[jax.Array, "batch height width channels_in"],
    kernel: Float[jax.Array, "rows columns channels_in channels_out"],
    strides: tuple[int, ...],
    padding: list[tuple[int, int]],
    **options: Any,
) -> Float[jax.Array, "batch height_out width_out channels_out"]:
    """`jax.lax.conv_general_dilated`. On a CPU, few positions with many channels are one product instead: of the nine
    shifted inputs, side by side, with the kernel. There it is the faster of the two, forward and backward."""
    plain = (kernel.shape[:2], tuple(strides), list(padding)) == ((3, 3), (1, 1), [(1, 1)] * 2)
    few = math.prod(x.shape[:-1]) <= _FEW_POSITIONS and x.shape[-1] >= _MANY_CHANNELS
    if not (plain and few and platform() == "cpu"):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def conv(features: int, name: str, compute: Compute, size: int = 3, **options: Any) -> nn.Conv:
    """Convolution of size×size that keeps height and width unless `padding` or `strides` say otherwise; with the
    adapter of its kernel if there is one."""

    def product(x: Any, kernel: Any, *window: Any, **more: Any) -> Any:
        def convolve(x: Any, kernel: Any) -> Any:
            return _convolve(x, kernel, *window, **more)

        return _with_adapter(layer, x, lambda x: convolve(x, kernel), convolve)

    initial = {"kernel_init": initialisers.lecun_normal, "bias_init": initialisers.zeros}
    options = {"padding": (size - 1) // 2, "conv_general_dilated": product, **initial, **options}
    layer = nn.Conv(features, (size, size), name=name, dtype=compute.activations, **options)
    return layer


def looked_up(table: nn.Embed, tokens: Int[jax.Array, "*axes"]) -> Float[jax.Array, "*axes features"]:
    """The vectors of tokens. An adapter of the table is rows for the tokens after its own."""
    if not table.has_variable(ADAPTERS, "embedding"):
        return table(tokens)
    rows = table.get_variable(ADAPTERS, "embedding")[ROWS].astype(table.dtype)
    added = tokens - table.num_embeddings
    known = table(jnp.minimum(tokens, table.num_embeddings - 1))
    return jnp.where(added[..., None] < 0, known, rows[jnp.maximum(added, 0)])


def _fast_variance(compute: Compute) -> bool:
    """Whether a norm reads its input once, for E[x²] − E[x]², instead of twice.

    E[x²] − E[x]² loses digits where the mean is large beside the standard deviation. A bfloat16 input has lost many
    more already: with a mean of a hundred standard deviations the error here is 1 %, while the input is rounded to two
    thirds of a standard deviation.
    """
    return compute.dtype is Dtype.BFLOAT16


def group_norm(groups: int, epsilon: float, name: str, compute: Compute) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=epsilon, name=name, **_norm_options(compute))


def layer_norm(name: str, compute: Compute, epsilon: float = 1e-5) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, name=name, **_norm_options(compute))


def _norm_options(compute: Compute) -> dict[str, Any]:
    initial = {"scale_init": initialisers.ones, "bias_init": initialisers.zeros}
    return {"dtype": compute.activations, "use_fast_variance": _fast_variance(compute), **initial}


def gelu(x: Float[jax.Array, "*axes"]) -> Float[jax.Array, "*axes"]:
    """x Φ(x), the exact GELU. Hendrycks & Gimpel 2016, arXiv:1606.08415.

    float32 by erf, as in torch, which costs a CPU less than erfc. In bfloat16 1 + erf would lose its digits.
    """
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class EmbeddingMlp(nn.Module):
    """Linear, SiLU, linear: from a sinusoidal or conditioning vector to the width of the residual blocks' embedding.
    `added` is projected to the vector's width, by zeros in the beginning, and added to it."""

    features: int
    compute: Compute

    @nn.compact
    def __call__(
        self,
        vector: Float[jax.Array, "batch features_in"],
        added: Float[jax.Array, "batch features_added"] | None = None,
    ) -> Float[jax.Array, "batch features_out"]:
        if added is not None:
            projection = dense(
                vector.shape[-1], "cond_proj", self.compute, use_bias=False, kernel_init=initialisers.zeros
            )
            vector = vector + projection(added)
        hidden = dense(self.features, "linear_1", self.compute)(vector)
        return dense(self.features, "linear_2", self.compute)(nn.silu(hidden))


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a shortcut; the embedding, where there is one, is added between the two."""

    features: int
    groups: int
    epsilon: float
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "batch height width channels_in"],
        embedding: Float[jax.Array, "batch embedding"] | None,
    ) -> Float[jax.Array, "batch height width channels_out"]:
        hidden = nn.silu(group_norm(self.groups, self.epsilon, "norm1", self.compute)(x))
        hidden = conv(self.features, "conv1", self.compute)(hidden)
        if embedding is not None:
            shift = dense(self.features, "time_emb_proj", self.compute)(nn.silu(embedding))
            hidden = hidden + shift[:, None, None, :]
        hidden = nn.silu(group_norm(self.groups, self.epsilon, "norm2", self.compute)(hidden))
        # Zero at the start, as sgm's zero_module: a fresh block is its shortcut.
        hidden = conv(self.features, "conv2", self.compute, kernel_init=initialisers.zeros)(hidden)
        if x.shape[-1] != self.features:
            x = conv(self.features, "conv_shortcut", self.compute, size=1)(x)
        return constrain(x + hidden, "batch", None, None, None)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size, then a convolution.

    The size is given because it need not be the double: a height of 9 comes down to 5, and must come back to 9.
    """

    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width channels"], height: int, width: int
    ) -> Float[jax.Array, "batch height_out width_out channels"]:
        x = nearest(x, height, axis=1)
        x = nearest(x, width, axis=2)
        return conv(x.shape[-1], "conv", self.compute)(x)


def nearest(
    x: Float[jax.Array, "batch height width channels"], size: int, axis: int
) -> Float[jax.Array, "batch height_out width_out channels"]:
    """Nearest-neighbour resize of one axis: out[i] = in[⌊i · n / size⌋], as torch's `interpolate(mode="nearest")`."""
    n = x.shape[axis]
    if size == 2 * n:  # the usual case; a repeat is cheaper than a gather, and so is its gradient
        return jnp.repeat(x, 2, axis)
    return jnp.take(x, jnp.arange(size) * n // size, axis)


def count(params: Params) -> int:
    """Number of parameters; abstract ones count too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
