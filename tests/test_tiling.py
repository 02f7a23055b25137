"""A decode in tiles is the decode of the whole: no seams, no other colours, sizes that tiles do not divide."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_data
from test_models import random_params, relative

from sdxl_jax import arrays
from sdxl_jax.errors import InputError
from sdxl_jax.models import attention, taesd, tiling, vae
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
from sdxl_jax.quickstart import autoencoder
from sdxl_jax.weights.load import load_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

LARGE, TINY = VaeConfig((16, 32), 1, groups=8), TinyVaeConfig(8, (1, 1, 1), (1, 2, 1))
TILES = {LARGE: 32, TINY: 40}


def latent_of(*shape: int) -> jax.Array:
    """A gradient plus noise, so that tiles differ in mean and variance."""
    rows, columns = np.linspace(-1, 1, shape[1])[:, None, None], np.linspace(-1, 1, shape[2])[:, None]
    noise = np.random.default_rng(0).standard_normal(shape) * (1.5 + rows)
    return jnp.asarray(2 * rows + columns + noise, jnp.float32)


@functools.cache
def decoders(config: AnyVaeConfig, compute: Compute = Compute()) -> tuple:
    whole = jax.jit(functools.partial(vae.decode, config, compute=compute))
    return whole, jax.jit(functools.partial(vae.decode_tiled, config, compute=compute, tile=TILES[config]))


@pytest.mark.parametrize("config", [LARGE, pytest.param(TINY, marks=pytest.mark.slow)], ids=["large", "tiny"])
@pytest.mark.parametrize("size", [(29, 50), pytest.param((61, 9), marks=pytest.mark.slow)])
def test_tiles_give_the_image_of_the_whole(config: AnyVaeConfig, size: tuple[int, int]) -> None:
    params, latent = random_params(vae.abstract, config), latent_of(2, *size, 4)
    whole, tiled = (decode(params, latent) for decode in decoders(config))
    assert tiled.shape == whole.shape
    # The same sums in float32, and moments of norms added up in another order.
    assert relative(tiled, whole) < 1e-5
    # Which is not so of independent tiles, whose norms see other moments and whose borders see zeros.
    part = decoders(config)[0](params, latent[:, :8])
    assert relative(part, whole[:, : part.shape[1]]) > 1e-2


@pytest.mark.slow
def test_tiles_in_bfloat16_differ_by_its_rounding() -> None:
    params, latent, compute = random_params(vae.abstract, LARGE), latent_of(1, 29, 50, 4), Compute(Dtype.BFLOAT16)
    whole, tiled = (decode(params, latent) for decode in decoders(LARGE, compute))
    exact = decoders(LARGE)[0](params, latent)
    assert jnp.abs(tiled - exact).mean() < 1.2 * jnp.abs(whole - exact).mean()
    assert tiled.dtype == jnp.float32


def test_rematerialisation_does_not_matter_to_tiles() -> None:
    params, latent = random_params(vae.abstract, LARGE), latent_of(1, 29, 50, 4)
    again = jax.eval_shape(decoders(LARGE, Compute(remat=Remat.BLOCK))[1], params, latent)
    assert again.shape == (1, 58, 100, 3)


def test_tiles_take_less_memory_than_the_whole() -> None:
    """Here 12 tiles, with what is kept whole beside them: the features of a level at half the image's sides."""
    config = dataclasses.replace(LARGE, block_channels=(16, 16))
    params = vae.abstract(config)
    latent = jax.ShapeDtypeStruct((1, 96, 128, 4), jnp.float32)
    tiled = functools.partial(vae.decode_tiled, config, tile=64)

    def temporary(decode: Callable[..., jax.Array]) -> int:
        analysis = jax.jit(decode).lower(params, latent).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(tiled) < temporary(functools.partial(vae.decode, config)) / 3


def test_image_that_fits_one_tile_is_decoded_whole() -> None:
    params, latent = random_params(vae.abstract, LARGE), latent_of(1, 8, 16, 4)
    whole, tiled = (decode(params, latent) for decode in decoders(LARGE))
    assert relative(tiled, whole) < 1e-6
    traced = jax.make_jaxpr(functools.partial(vae.decode_tiled, LARGE, tile=32))(params, latent)
    assert not {"scan", "while"} & {equation.primitive.name for equation in traced.jaxpr.eqns}


def test_tile_that_is_all_border_is_refused() -> None:
    params, latent = random_params(vae.abstract, LARGE), latent_of(1, 29, 50, 4)
    with pytest.raises(InputError, match=r"A tile of 16 positions.*borders of 6 positions.*Give tiles of 24"):
        vae.decode_tiled(LARGE, params, latent, tile=16)


@pytest.mark.parametrize(
    ("length", "size", "border"), [(100, 32, 4), (33, 32, 8), (57, 32, 8), (500, 40, 7), (9, 9, 2)]
)
@pytest.mark.parametrize("factor", [1, 2])
def test_every_position_is_of_one_tile_and_of_no_border(length: int, size: int, border: int, factor: int) -> None:
    axis = tiling.Axis.of(length, size, border)
    kept, last = np.zeros(length * factor, int), len(axis.starts) - 1
    for number, (start, own) in enumerate(zip(axis.starts, axis.own(factor), strict=True)):
        kept[start * factor : (start + axis.size) * factor] += own
        assert number == 0 or not own[: border * factor].any()
        assert number == last or not own[len(own) - border * factor :].any()
    assert (kept == 1).all()
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.size == length


@pytest.mark.parametrize("at_once", [8, 7, 100])
def test_attention_in_parts_is_that_of_all(at_once: int) -> None:
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 24, 2, 8))
    whole = attention.dot_product_attention(query, key, value, Attention.XLA)
    parts = attention.chunked_attention(query, key, value, Attention.AUTO, at_once)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_trained_autoencoder_decodes_a_real_image_in_tiles() -> None:
    """Measured: 0.0001 of 255 levels at most. Moments of the image shrunk to a tile give up to 18."""
    config, params = autoencoder.load()
    params = jax.tree.map(jnp.asarray, params)
    image = jnp.asarray(real_data.photograph(256)[:, :200])
    latent = jax.jit(lambda x: vae.encode(config, params, x).mean * config.scale)(image)
    whole = jax.jit(lambda z: vae.decode(config, params, z))(latent)
    tiled = jax.jit(lambda z: vae.decode_tiled(config, params, z, tile=96))(latent)
    assert jnp.abs(tiled - whole).max() * 127.5 < 0.002
    assert (arrays.to_bytes(tiled) != arrays.to_bytes(whole)).mean() < 1e-3  # halves that round the other way


def test_published_tiny_autoencoder_decodes_in_tiles_exactly() -> None:
    (file,) = real_data.files("taesdxl/taesdxl_decoder.safetensors")
    params = load_model(file, np.float32, progress=False).params["vae"]
    latent = latent_of(1, 24, 33, 4)
    whole = jax.jit(functools.partial(vae.decode, taesd.TAESDXL))(params, latent)
    tiled = jax.jit(functools.partial(vae.decode_tiled, taesd.TAESDXL, tile=96))(params, latent)
    assert relative(tiled, whole) < 1e-5
