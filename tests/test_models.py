"""The networks without a reference: their sizes, and what must hold whatever the weights are.

Agreement with diffusers and transformers is in `parity/`. Sizes here are tiny, except where only shapes are traced.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.models import attention, clip, layers, unet, vae
from sdxl_jax.models.initialisers import Parameter, sample
from sdxl_jax.models.layers import Compute, Dtype, Remat

UNET = unet.UNetConfig((16, 32), 1, (0, 3), 2, (1, 2), 12, 24, groups=8)
VAE = vae.VaeConfig((16, 32), 1, groups=8)
TOWER = clip.ClipTextConfig(24, 3, 2, 48, clip.Activation.QUICK_GELU, 20, 60, 50)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_params(abstract: Callable[..., Params], config: Any, seed: int = 0) -> Params:
    """Parameters without zeros, scaled so that activations keep their size. Nothing is compiled for it."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Parameter) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            stacked = any(key.key in ("transformer_blocks", "layers") for key in path)
            return jnp.asarray(noise / math.sqrt(math.prod(leaf.shape[stacked:-1])))
        return jnp.asarray(0.1 * noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, abstract(config))


def unet_inputs() -> dict[str, jax.Array]:
    """latent, timestep, context and vector of a batch of two; 5 rows do not halve evenly."""
    rng = np.random.default_rng(0)
    shapes = {"latent": (2, 5, 8, 4), "context": (2, 7, 12), "vector": (2, 24)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    return {**arrays, "timestep": jnp.array([3, 987])}


def apply_unet(compute: Compute) -> Callable[[Params], jax.Array]:
    apply = functools.partial(unet.apply, UNET, compute=compute)
    return lambda params: apply(params, **unet_inputs())  # pyright: ignore[reportArgumentType] (as if it named parts)


# Compiling is most of the time that this file takes: each of these is compiled once, and with little optimisation.
FAST_COMPILATION = {"xla_backend_optimization_level": 0}


@functools.cache
def compiled_unet(compute: Compute) -> Callable[..., jax.Array]:
    apply = functools.partial(unet.apply, UNET, compute=compute)
    return jax.jit(apply, compiler_options=FAST_COMPILATION)


@functools.cache
def unet_gradient(remat: Remat) -> tuple[jax.Array, Params]:
    """The mean squared prediction at random parameters, and its gradient."""
    apply = apply_unet(Compute(remat=remat))
    gradient = jax.value_and_grad(lambda params: jnp.mean(apply(params) ** 2))
    return jax.jit(gradient, compiler_options=FAST_COMPILATION)(random_params(unet.abstract, UNET))


def relative(ours: jax.Array, expected: jax.Array) -> float:
    return float(jnp.abs(ours - expected).max() / jnp.abs(expected).max())


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)


# Full size: shapes alone, nothing is computed.


@pytest.mark.parametrize(
    ("abstract", "config", "expected"),
    [
        (unet.abstract, unet.SDXL_BASE, 2_567_463_684),
        (unet.abstract, unet.SDXL_REFINER, 2_259_526_660),
        pytest.param(unet.abstract, unet.SD1, 859_520_964, marks=pytest.mark.slow),
        pytest.param(unet.abstract, unet.SD2, 865_910_724, marks=pytest.mark.slow),
        (vae.abstract, vae.SDXL_VAE, 83_653_863),
        (clip.abstract, clip.CLIP_L, 123_060_480),
        (clip.abstract, clip.CLIP_BIGG, 694_659_840),
    ],
    ids=["UNet base", "UNet refiner", "UNet SD 1.x", "UNet SD 2.x", "VAE", "CLIP-L", "CLIP-bigG"],
)
def test_full_size_has_the_published_number_of_parameters(abstract: Any, config: Any, expected: int) -> None:
    params = abstract(config)
    assert layers.count(params) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (unet.SDXL_BASE, 128),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((unet.SDXL_REFINER, 128), (unet.SD1, 64), (unet.SD2, 96))
        ),
    ],
    ids=["base", "refiner", "SD 1.x", "SD 2.x"],
)
def test_full_size_unet_predicts_the_shape_of_its_latent(config: unet.UNetConfig, side: int) -> None:
    compute = Compute(Dtype.BFLOAT16, remat=Remat.BLOCK)
    vector = None if config.vector_dim is None else jax.ShapeDtypeStruct((2, config.vector_dim), jnp.float32)
    out = jax.eval_shape(
        functools.partial(unet.apply, config, compute=compute),
        unet.abstract(config),
        jax.ShapeDtypeStruct((2, side, side, 4), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.ShapeDtypeStruct((2, 77, config.context_dim), jnp.float32),
        vector,
    )
    assert (out.shape, out.dtype) == ((2, side, side, 4), jnp.float32)


def test_full_size_autoencoder_and_towers_have_the_published_shapes() -> None:
    compute = Compute(Dtype.BFLOAT16)
    params = vae.abstract(vae.SDXL_VAE)
    image = jax.ShapeDtypeStruct((2, 1024, 768, 3), jnp.float32)
    posterior = jax.eval_shape(functools.partial(vae.encode, vae.SDXL_VAE, compute=compute), params, image)
    assert posterior.mean.shape == posterior.log_variance.shape == (2, 128, 96, 4)
    decoded = jax.eval_shape(functools.partial(vae.decode, vae.SDXL_VAE, compute=compute), params, posterior.mean)
    assert (decoded.shape, decoded.dtype) == ((2, 1024, 768, 3), jnp.float32)

    tokens = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    for config, width, projection in (
        (clip.CLIP_L, 768, None),
        (clip.CLIP_H, 1024, 1024),
        (clip.CLIP_BIGG, 1280, 1280),
    ):
        tower = functools.partial(clip.apply, config, compute=compute)
        states = jax.eval_shape(tower, clip.abstract(config), tokens)
        for state in (states.penultimate, states.penultimate_normed, states.last):
            assert (state.shape, state.dtype) == ((2, 77, width), jnp.float32)
        assert states.pooled.shape == (2, width)
        assert projection is None if states.projected is None else states.projected.shape == (2, projection)


# How a network is computed changes nothing but rounding.


@pytest.mark.slow
def test_unrolled_scan_has_the_same_parameters_and_the_same_result() -> None:
    def fresh(compute: Compute) -> Params:
        return jax.eval_shape(unet.UNet(UNET, compute).init, jax.random.key(0), **unet_inputs())["params"]

    scanned, unrolled = fresh(Compute()), fresh(Compute(unroll=True))
    assert jax.tree.map(lambda leaf: leaf.shape, scanned) == jax.tree.map(lambda leaf: leaf.shape, unrolled)
    params = random_params(unet.abstract, UNET)
    # 1e-6: the compiler may fuse the copies differently, and so round differently.
    results = (compiled_unet(Compute(unroll=unroll))(params, **unet_inputs()) for unroll in (True, False))
    assert relative(*results) < 1e-6


ONE_LEVEL = unet.UNetConfig((8,), 1, (1,), 1, (2,), 4, None, groups=4)
"""One scan on the way down, one in the middle, two on the way up."""


def one_level_inputs() -> list[jax.Array]:
    """The same example twice."""
    rng = np.random.default_rng(0)
    latent, context = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((1, 4, 4, 4), (1, 3, 4)))
    return [jnp.repeat(array, 2, axis=0) for array in (latent, jnp.array([500]), context)]


@pytest.mark.slow
def test_text_that_was_projected_before_gives_the_same_prediction() -> None:
    config = dataclasses.replace(ONE_LEVEL, transformer_depth=(2,), middle_depth=3)
    params, (latent, timestep, context) = random_params(unet.abstract, config), one_level_inputs()
    context = context.at[1].add(1)
    apply = jax.jit(functools.partial(unet.apply, config), compiler_options=FAST_COMPILATION)
    text = unet.project_text(params, context)
    assert {leaf.shape for leaf in jax.tree.leaves(text)} == {(2, 2, 3, 8), (2, 3, 3, 8)}
    # 1e-6: the compiler may fuse the products differently.
    assert relative(apply(params, latent, timestep, text), apply(params, latent, timestep, context)) < 1e-6


def test_few_positions_with_many_channels_are_convolved_alike_by_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 3, 5, 256), (3, 3, 256, 7)))
    module = layers.conv(7, "conv", Compute())

    def convolved() -> tuple[Any, set[str]]:
        apply = functools.partial(module.apply, {"params": {"kernel": kernel, "bias": jnp.zeros(7)}})
        return apply(x), {equation.primitive.name for equation in equations(jax.make_jaxpr(apply)(x).jaxpr)}

    product, names = convolved()
    assert "dot_general" in names and "conv_general_dilated" not in names
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    expected, names = convolved()
    assert "conv_general_dilated" in names and "dot_general" not in names
    # 1e-6: sums of 2304 products in another order.
    assert relative(product, expected) < 1e-6


def test_gelu_is_exact() -> None:
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    expected = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.astype(float)])
    # Near −1 erf errs by a few of its roundings, of 2⁻²⁴, and it counts x/2 times.
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, rtol=3e-7, atol=16 * 2**-24)


def test_perturbed_rows_lose_their_self_attention_and_the_others_nothing() -> None:
    params, inputs = random_params(unet.abstract, ONE_LEVEL), one_level_inputs()
    program = jax.jit(functools.partial(unet.apply, ONE_LEVEL, perturbed_parts=tuple(unet.UNetPart)))
    none = program(params, *inputs, perturbed=jnp.array([False, False]))
    one = program(params, *inputs, perturbed=jnp.array([False, True]))
    np.testing.assert_array_equal(one[0], none[0])
    assert relative(one[1], none[1]) > 1e-2


def test_self_attention_is_perturbed_in_the_named_parts_alone_and_by_default_nowhere() -> None:
    """The choice between value and attention is one operation in the body of a scan."""
    params, inputs = unet.abstract(ONE_LEVEL), one_level_inputs()

    def choices(perturbed: jax.Array | None, *parts: unet.UNetPart) -> int:
        apply = functools.partial(unet.apply, ONE_LEVEL, perturbed_parts=parts)
        jaxpr = jax.make_jaxpr(apply)(params, *inputs, perturbed=perturbed)
        return sum(equation.primitive.name == "select_n" for equation in equations(jaxpr.jaxpr))

    rows, (down, middle, up) = jnp.array([False, True]), unet.UNetPart
    assert choices(None, *unet.UNetPart) == 0
    assert [choices(rows, part) for part in (down, middle, up)] == [1, 1, 2]
    assert choices(rows, up, down) == 3


def test_a_part_without_attention_cannot_be_perturbed() -> None:
    config = unet.UNetConfig((8,), 1, (0,), 1, (1,), 4, None, groups=4)
    inputs = jnp.ones((1, 2, 2, 4)), jnp.ones(1), jnp.ones((1, 1, 4))
    for parts, given in (((unet.UNetPart.MIDDLE, unet.UNetPart.UP), "mid, up"), ((), "nothing")):
        with pytest.raises(InputError, match=rf"perturbed in {given}\. This UNet has attention in mid: name"):
            unet.apply(config, {}, *inputs, perturbed=jnp.array([True]), perturbed_parts=parts)


@pytest.mark.slow
def test_rematerialised_blocks_give_the_same_output_and_gradient() -> None:
    (kept, kept_gradient), (again, again_gradient) = unet_gradient(Remat.NONE), unet_gradient(Remat.BLOCK)
    assert relative(again, kept) < 1e-6
    # 2e-5: the same sums, fused differently, and some gradients are small differences of large sums.
    worst = max(jax.tree.leaves(jax.tree.map(relative, again_gradient, kept_gradient)))
    assert worst < 2e-5


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rematerialised_blocks_keep_far_less_for_the_backward_pass(unroll: bool) -> None:
    params = unet.abstract(UNET)

    def kept(remat: Remat) -> int:
        """Numbers kept between the forward and the backward pass, the parameters not counted."""
        apply = apply_unet(Compute(remat=remat, unroll=unroll))
        backward = jax.eval_shape(lambda params: jax.vjp(apply, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward)) - layers.count(params)

    assert kept(Remat.BLOCK) < kept(Remat.NONE) / 3
    jaxpr = jax.make_jaxpr(apply_unet(Compute(remat=Remat.BLOCK, unroll=unroll)))(params)
    rematerialised = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("remat2", "checkpoint")]
    assert len(rematerialised) == 12  # 8 residual blocks, and the bodies of 4 scans: one down, one middle, two up


@pytest.mark.slow
def test_bfloat16_keeps_float32_parameters_and_output() -> None:
    params = random_params(unet.abstract, UNET)
    low, high = (compiled_unet(Compute(dtype))(params, **unet_inputs()) for dtype in (Dtype.BFLOAT16, Dtype.FLOAT32))
    assert low.dtype == high.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4 % a rounding, and some twenty roundings one after the other.
    assert 0 < relative(low, high) < 0.05
    gradient = jax.eval_shape(jax.grad(lambda params: apply_unet(Compute(Dtype.BFLOAT16))(params).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_bfloat16_autoencoder_and_tower_return_float32() -> None:
    compute = Compute(Dtype.BFLOAT16)
    params = random_params(vae.abstract, VAE)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    low, high = (jax.jit(functools.partial(vae.encode, VAE, compute=c))(params, image) for c in (compute, Compute()))
    assert low.mean.dtype == low.log_variance.dtype == jnp.float32
    assert relative(low.mean, high.mean) < 0.05
    params = random_params(clip.abstract, TOWER)
    tokens = jnp.arange(2 * 77, dtype=jnp.int32).reshape(2, 77) % 51
    low, high = (jax.jit(functools.partial(clip.apply, TOWER, compute=c))(params, tokens) for c in (compute, Compute()))
    for mine, expected in zip(low, high, strict=True):
        assert mine.dtype == jnp.float32
        assert relative(mine, expected) < 0.05


@pytest.mark.parametrize("dtype", Dtype)
def test_group_norm_statistics_are_float32(dtype: Dtype) -> None:
    """A mean of 300 beside a deviation of 3, over 8192 numbers: bfloat16 sums stop growing long before their end."""
    compute = Compute(dtype)
    noise = np.random.default_rng(0).standard_normal((1, 64, 64, 8))
    x = jnp.asarray(300 + 3 * noise, compute.activations)
    norm = layers.group_norm(4, 1e-5, "norm", compute)
    out, _ = norm.init_with_output(jax.random.key(0), x)
    exact = np.asarray(x, np.float64).reshape(64 * 64, 4, 2)
    exact = (exact - exact.mean((0, 2), keepdims=True)) / np.sqrt(exact.var((0, 2), keepdims=True) + 1e-5)
    # bfloat16: E[x²] − E[x]² in float32, of a mean a hundred times the deviation; the numbers that come in are rounded
    # to multiples of 2, two thirds of their deviation. float32: the mean's, 8192 sums of about 300, over the deviation.
    tolerance = 2e-2 if dtype is Dtype.BFLOAT16 else 1e-3
    assert out.dtype == compute.activations
    np.testing.assert_allclose(np.asarray(out, np.float64), exact.reshape(x.shape), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_is_float32_in_bfloat16_attention(causal: bool) -> None:
    x = jnp.zeros((2, 6, 2, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x: attention.dot_product_attention(x, x, x, layers.Attention.XLA, causal))(x)
    exponentials = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name in ("exp", "exp2")]
    assert exponentials
    for equation in exponentials:
        assert equation.invars[0].aval.dtype == jnp.float32


# Primitives.


@pytest.mark.parametrize("dim", [256, 320])
def test_sinusoidal_embedding_is_exact_for_every_integer_to_8192(dim: int) -> None:
    values = np.arange(8193)
    given = np.asarray(jax.jit(layers.sinusoidal_embedding, static_argnums=1)(jnp.asarray(values), dim), np.float64)
    exponents = math.log(10000) * np.arange(dim // 2) / (dim // 2)
    angles = values[:, None] * np.exp(-exponents)
    exact = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    # The exponent is rounded three times (ln 10000, product, quotient), frequency and angle by five half units more;
    # cosine and sine move by at most as much as the angle, and are rounded themselves.
    rounding = 2**-24 * (np.tile(angles * (3 * exponents + 5), 2) + 2)
    assert (np.abs(given - exact) <= rounding).all()
    assert len(np.unique(given, axis=0)) == len(values)


@pytest.mark.parametrize("type_of_number", [jnp.int32, jnp.float32])
def test_sinusoidal_embedding_distinguishes_neighbouring_sizes(type_of_number: Any) -> None:
    """333 is 332 and 1023 is 1024 in bfloat16."""
    sizes = jnp.array([332, 333, 1023, 1024], type_of_number)
    embedded = layers.sinusoidal_embedding(sizes, 256)
    assert embedded.dtype == jnp.float32
    assert jnp.abs(embedded[0] - embedded[1]).max() > 0.5
    assert jnp.abs(embedded[2] - embedded[3]).max() > 0.5


@pytest.mark.slow
def test_bfloat16_unet_tells_neighbouring_timesteps_apart() -> None:
    params = random_params(unet.abstract, UNET)
    apply = compiled_unet(Compute(Dtype.BFLOAT16))
    out = [apply(params, **{**unet_inputs(), "timestep": jnp.full(2, timestep)}) for timestep in (332, 333)]
    assert jnp.abs(out[0] - out[1]).max() > 0


def test_sinusoidal_embedding_has_cosines_first() -> None:
    embedded = layers.sinusoidal_embedding(jnp.zeros((2, 3), jnp.int32), 8)
    assert embedded.shape == (2, 3, 8)
    np.testing.assert_array_equal(embedded[..., :4], 1)
    np.testing.assert_array_equal(embedded[..., 4:], 0)


@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_nearest_enlargement_reaches_any_size(size: int) -> None:
    out = layers.nearest(jnp.arange(4.0).reshape(1, 4, 1, 1), size, axis=1)
    np.testing.assert_array_equal(out.ravel(), [i * 4 // size for i in range(size)])


def test_causal_attention_sees_no_later_token() -> None:
    params = random_params(clip.abstract, TOWER)
    tokens = jnp.arange(77, dtype=jnp.int32)[None] % 50
    apply = jax.jit(functools.partial(clip.apply, TOWER))
    before, after = apply(params, tokens).last, apply(params, tokens.at[0, 40].set(13)).last
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert (jnp.abs(before[:, 40:] - after[:, 40:]).max(axis=-1) > 0).all()


def test_log_variance_is_clamped() -> None:
    params = random_params(vae.abstract, VAE)
    quant = params["encoder"]["quant_conv"]
    quant["kernel"] = 100 * quant["kernel"]
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    log_variance = jax.jit(functools.partial(vae.encode, VAE))(params, image).log_variance
    assert (log_variance.min(), log_variance.max()) == (-30, 20)


def test_latent_scale_is_multiplied_on_the_way_in_and_divided_on_the_way_out() -> None:
    config, unscaled = VAE, vae.VaeConfig((16, 32), 1, groups=8, scale=1.0)
    params = random_params(vae.abstract, VAE)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    posteriors = [jax.jit(functools.partial(vae.encode, c))(params, image) for c in (config, unscaled)]
    latent, plain = (
        vae.scaled_sample(c, posterior, keys) for c, posterior in zip((config, unscaled), posteriors, strict=True)
    )
    np.testing.assert_allclose(latent, plain * 0.13025, rtol=1e-6)
    images = [jax.jit(functools.partial(vae.decode, c))(params, x) for c, x in ((config, latent), (unscaled, plain))]
    # 1e-5: (x · 0.13025) / 0.13025 is not always x.
    assert relative(images[0], images[1]) < 1e-5


# Fresh parameters.


def test_fresh_unet_predicts_zero() -> None:
    config = unet.UNetConfig((8,), 1, (1,), 1, (1,), 4, None, groups=4)
    params = jax.tree.map(lambda leaf: jnp.asarray(sample(leaf, 0, "")), unet.abstract(config))
    prediction = jax.jit(functools.partial(unet.apply, config))(
        params, jnp.ones((1, 2, 2, 4)), jnp.ones(1), jnp.ones((1, 1, 4))
    )
    np.testing.assert_array_equal(prediction, 0)
    middle = params["mid_block"]
    for zero in (params["conv_out"], middle["resnets_0"]["conv2"], middle["attentions_0"]["proj_out"]):
        np.testing.assert_array_equal(zero["kernel"], 0)
    assert jnp.abs(params["conv_in"]["kernel"]).max() > 0


@pytest.mark.slow
def test_gradient_reaches_every_parameter_and_every_layer_of_a_stack() -> None:
    """Fresh parameters would not do: after a zero convolution nothing learns in the first step."""
    _, gradient = unet_gradient(Remat.NONE)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = jax.tree_util.keystr(path)
        each = leaf if "transformer_blocks" in name else leaf[None]
        assert all(jnp.abs(layer).max() > 0 for layer in each), f"{name} is not used"


# Annotations of shapes, which are checked where pytest runs with --jaxtyping-packages=sdxl_jax,beartype.beartype.


@pytest.fixture
def checked() -> None:
    if not hasattr(unet.apply, "__wrapped__"):
        pytest.skip("annotations are not checked in this run: --jaxtyping-packages=sdxl_jax,beartype.beartype")


def test_annotations_are_checked_when_the_option_asks_for_it(request: pytest.FixtureRequest) -> None:
    is_checked = "sdxl_jax" in (request.config.getoption("--jaxtyping-packages", default=None) or "")
    assert is_checked == hasattr(unet.apply, "__wrapped__")


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("argument", ["latent", "timestep", "context", "vector"])
def test_array_of_a_wrong_shape_is_refused(argument: str) -> None:
    given = unet_inputs()
    given[argument] = given[argument][:1]  # one example where the others have two
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter") as error:
        unet.apply(UNET, {}, given["latent"], given["timestep"], given["context"], given["vector"])
    assert "batch" in str(error.value)


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("remat", Remat)
def test_array_of_a_wrong_shape_is_refused_inside_a_scan(remat: Remat) -> None:
    """Linen's lifted classes call the same checked method."""
    compute = Compute(remat=remat)
    blocks = attention.stack(attention.TransformerBlock, 2, compute)(2, compute, name="transformer_blocks")
    init = functools.partial(jax.eval_shape, blocks.init, jax.random.key(0))
    init(jnp.zeros((2, 6, 8)), jnp.zeros((2, 7, 12)))
    with pytest.raises(jaxtyping.TypeCheckError):
        init(jnp.zeros((2, 6, 8)), jnp.zeros((3, 7, 12)))
    with pytest.raises(jaxtyping.TypeCheckError):
        init(jnp.zeros((2, 6, 8), jnp.int32), jnp.zeros((2, 7, 12)))


@pytest.mark.usefixtures("checked")
def test_result_of_a_wrong_shape_is_refused() -> None:
    class Flat(nn.Module):
        @nn.compact
        @jaxtyping.jaxtyped(typechecker=__import__("beartype").beartype)
        def __call__(self, x: jaxtyping.Float[jax.Array, "batch n"]) -> jaxtyping.Float[jax.Array, "batch n"]:
            return x[:, 1:]

    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        Flat().init(jax.random.key(0), jnp.zeros((2, 3)))


@pytest.mark.usefixtures("checked")
def test_field_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        layers.Upsample("float32")  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxtyping.TypeCheckError):
        Compute(dtype="float32")  # pyright: ignore[reportArgumentType]


def test_named_tuples_have_the_shapes_that_they_promise() -> None:
    """The import hook does not look into the fields of a NamedTuple: docs/decisions/shape-annotations.md."""

    def check(given: Any) -> None:
        with jaxtyping.jaxtyped("context"):
            for field, hint in get_type_hints(type(given)).items():
                assert isinstance(getattr(given, field), hint), f"{type(given).__name__}.{field}"

    tokens, image = jnp.zeros((2, 77), jnp.int32), jnp.zeros((2, 8, 12, 3))
    jax.eval_shape(lambda params: check(clip.apply(TOWER, params, tokens)), clip.abstract(TOWER))
    jax.eval_shape(lambda params: check(vae.encode(VAE, params, image)), vae.abstract(VAE))
