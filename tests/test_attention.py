"""The promises of models.attention: every kernel computes what XLA computes, and is chosen where it can run."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from sdxl_jax import sharding
from sdxl_jax.errors import InputError
from sdxl_jax.models import attention
from sdxl_jax.models.layers import Attention

pytestmark = pytest.mark.usefixtures("quick_compilation")


def inputs(tokens: int, keys: int | None = None, dim: int = 64) -> list[jax.Array]:
    shapes = [(1, tokens, 2, dim), (1, keys or tokens, 2, dim), (1, keys or tokens, 2, dim)]
    return [jax.random.normal(jax.random.key(number), shape) for number, shape in enumerate(shapes)]


@pytest.mark.parametrize("kernel", [Attention.SPLASH, Attention.PAIRS])
@pytest.mark.parametrize("tokens", [pytest.param(200, marks=pytest.mark.slow), 640])
def test_a_tpu_kernel_is_xlas_attention_and_so_are_its_gradients(kernel: Attention, tokens: int) -> None:
    """200 is padded to 256, 640 to 1024: padding must have no effect."""

    def loss(implementation: Attention, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        weights = jnp.cos(jnp.arange(tokens * 128.0)).reshape(1, tokens, 2, 64)
        return jnp.sum(attention.dot_product_attention(query, key, value, implementation) * weights)

    query, key, value = inputs(tokens)
    out, gradients = {}, {}
    for implementation in (Attention.XLA, kernel):
        out[implementation] = attention.dot_product_attention(query, key, value, implementation)
        gradients[implementation] = jax.grad(loss, argnums=(1, 2, 3))(implementation, query, key, value)
    # Sums of a few hundred float32 terms in another order.
    np.testing.assert_allclose(out[kernel], out[Attention.XLA], atol=2e-6)
    for own, plain in zip(gradients[kernel], gradients[Attention.XLA], strict=True):
        np.testing.assert_allclose(own, plain, atol=1e-5)


def loss_of(implementation: Attention, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    out = attention.dot_product_attention(query, key, value, implementation)
    return jnp.sum(out.astype(jnp.float32) ** 2)


@pytest.mark.slow
@pytest.mark.gpu
def test_cudnn_attention_is_xlas_and_so_are_its_gradients() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    arrays = [array.astype(jnp.bfloat16) for array in inputs(1024)]
    gradient = jax.value_and_grad(loss_of, argnums=(1, 2, 3))
    kernel, plain = (gradient(each, *arrays) for each in (Attention.CUDNN, Attention.XLA))
    for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain), strict=True):
        # bfloat16 has 8 bits, and both round the weights to it, at another place.
        assert float(jnp.abs(one - other).max()) < 0.02 * float(jnp.abs(other).max())


def test_cudnn_without_a_gpu_is_refused() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("this is a GPU")
    query, key, value = inputs(128)
    with pytest.raises(
        InputError, match=r"attention=cudnn needs an NVIDIA GPU.*here is cpu\. Set compute.attention=auto"
    ):
        attention.dot_product_attention(query, key, value, Attention.CUDNN)


def test_attention_to_text_is_xlas_whatever_is_asked_for() -> None:
    query, key, value = inputs(128, keys=77)
    outputs = [attention.dot_product_attention(query, key, value, each) for each in (Attention.SPLASH, Attention.CUDNN)]
    plain = attention.dot_product_attention(query, key, value, Attention.XLA)
    for out in outputs:
        np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize(
    ("platform", "tokens", "keys", "dim", "dtype", "expected"),
    [
        ("tpu", 4096, 4096, 64, jnp.bfloat16, Attention.SPLASH),
        ("tpu", 4096, 4096, 128, jnp.bfloat16, Attention.SPLASH),
        ("tpu", 988, 988, 64, jnp.bfloat16, Attention.XLA),  # 832×1216's coarsest level: too short to pay
        ("tpu", 3952, 3952, 64, jnp.bfloat16, Attention.SPLASH),  # its finer one, padded to 4096
        ("tpu", 4096, 77, 64, jnp.bfloat16, Attention.XLA),
        ("tpu", 4096, 4096, 40, jnp.bfloat16, Attention.XLA),  # SD 1.x's finest level
        ("gpu", 4096, 4096, 64, jnp.bfloat16, Attention.CUDNN),
        ("other gpu", 4096, 4096, 64, jnp.bfloat16, Attention.XLA),
        ("gpu", 4096, 4096, 64, jnp.float32, Attention.XLA),
        ("gpu", 4096, 77, 64, jnp.bfloat16, Attention.XLA),
        ("gpu", 4096, 4096, 160, jnp.bfloat16, Attention.XLA),
        ("cpu", 4096, 4096, 64, jnp.bfloat16, Attention.XLA),
    ],
)
def test_kernel_by_platform_and_shape(
    platform: str, tokens: int, keys: int, dim: int, dtype: jnp.dtype, expected: Attention
) -> None:
    query = jax.ShapeDtypeStruct((1, tokens, 10, dim), dtype)
    key = jax.ShapeDtypeStruct((1, keys, 10, dim), dtype)
    assert attention.choose(platform, query, key) is expected


@pytest.mark.parametrize(
    ("capability", "expected"), [("7.5", "other gpu"), ("8.0", "gpu"), ("12.0", "gpu"), ("gfx942", "other gpu")]
)
def test_gpus_without_cudnns_attention_are_not_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, expected: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert attention._platform() == expected


def test_activations_lie_along_the_axes_that_divide_them() -> None:
    mesh = AbstractMesh((2, 2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    batch = ("slice", "data", "fsdp")
    spec = sharding.activation(mesh, (8, 5, 6, 64), "batch", None, "tensor", None)
    assert tuple(spec) == (batch, None, "tensor", None)
    assert tuple(sharding.activation(mesh, (4, 5, 5), "batch", None, "tensor")) == (None, None, None)


def test_a_device_with_an_odd_number_of_heads_has_splash_attention() -> None:
    query = jax.ShapeDtypeStruct((1, 1024, 5, 64), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda x: attention.dot_product_attention(x, x, x, Attention.PAIRS))(query)
    assert "splash_mha_fwd" in str(traced)
