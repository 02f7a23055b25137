"""Heads that judge features: their definitions, and what they do not depend on."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import random

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import discriminator_heads, image_features, unet
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.models.discriminator_heads import FeatureHeads, MiddleHead
from sdxl_jax.models.image_features import DinoV2Features, FeatureNetwork, VggFeatures
from sdxl_jax.models.initialisers import sample
from sdxl_jax.models.layers import count
from sdxl_jax.training.objectives.distillation import losses

TINY_DINO = DinoV2Features(DinoV2Config(width=8, layers=2, heads=2, mlp_width=16, side=28, patch=14), (0, 2))


def drawn(abstract: Params) -> Params:
    return unflatten({path: jnp.asarray(sample(leaf, 0, path)) for path, leaf in flatten(abstract).items()})


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return random.normal(random.key(seed), shape)


def heads_with(axes: int, condition_dim: int) -> tuple[FeatureHeads, Params, tuple[jax.Array, ...], Any]:
    """Heads on two layers of 16 images, their parameters, features and a condition."""
    heads = FeatureHeads((6, 4), axes, condition_dim)
    sizes = [(12,), (10,)] if axes == 1 else [(6, 5), (3, 4)]
    features = tuple(normal(16, *size, width) for size, width in zip(sizes, heads.channels, strict=True))
    return heads, drawn(heads.abstract()), features, normal(16, condition_dim, seed=1) if condition_dim else None


@pytest.mark.parametrize("axes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_heads_give_one_logit_per_position_of_each_layer(axes: int) -> None:
    heads, params, features, condition = heads_with(axes, 3)
    normalised, _ = heads.normalised(params, heads.carried())
    logits = heads.logits(normalised, features, condition)
    assert [each.shape for each in logits] == ([(16, 12), (16, 10)] if axes == 1 else [(16, 30), (16, 12)])


def test_kernels_are_divided_by_their_largest_singular_value_after_some_updates() -> None:
    heads, params, _, _ = heads_with(2, 3)
    carried = heads.carried()
    for _ in range(60):
        normalised, carried = heads.normalised(params, carried)
    for head in normalised.values():
        for name in ("conv_1", "conv_9", "logits"):
            kernel = np.asarray(head[name]["kernel"])
            assert np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2) == pytest.approx(1, abs=1e-3), name


def test_the_projection_is_the_product_with_the_condition() -> None:
    """Logits are linear in W c + b, and 0 where that is 0."""
    heads, params, features, condition = heads_with(1, 3)
    params["head_0"]["condition"] = {"kernel": jnp.zeros((3, 64)), "bias": jnp.zeros(64)}
    normalised, _ = heads.normalised(params, heads.carried())
    zero, other = heads.logits(normalised, features, condition)
    assert not zero.any() and other.any()
    normalised["head_1"]["condition"] = jax.tree.map(lambda x: 2 * x, normalised["head_1"]["condition"])
    np.testing.assert_allclose(heads.logits(normalised, features, condition)[1], 2 * other, rtol=1e-5)


def test_an_image_s_logits_depend_on_its_virtual_batch_alone() -> None:
    heads, params, features, condition = heads_with(1, 3)
    normalised, _ = heads.normalised(params, heads.carried())
    whole = heads.logits(normalised, features, condition)
    half = heads.logits(normalised, tuple(each[:8] for each in features), condition[:8])
    for one, other in zip(whole, half, strict=True):
        np.testing.assert_allclose(one[:8], other, rtol=1e-4, atol=1e-5)
    changed = tuple(each.at[9].add(1.0) for each in features)
    for one, other in zip(whole, heads.logits(normalised, changed, condition), strict=True):
        np.testing.assert_array_equal(one[:8], other[:8])
        assert (np.asarray(one[8:]) != np.asarray(other[8:])).any()


def test_convolutions_go_around_the_edge() -> None:
    """Tokens moved around a circle give the same logits, moved alike."""
    heads, params, features, condition = heads_with(1, 3)
    normalised, _ = heads.normalised(params, heads.carried())
    moved = heads.logits(normalised, tuple(jnp.roll(each, 5, axis=1) for each in features), condition)
    for one, other in zip(heads.logits(normalised, features, condition), moved, strict=True):
        np.testing.assert_allclose(jnp.roll(one, 5, axis=1), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reach", [(9,), (3, 2), (1, 1)])
def test_sums_of_products_are_convolutions(reach: tuple[int, ...]) -> None:
    x = normal(2, *(12, 10)[: len(reach)], 3)
    params = {"kernel": normal(*reach, 3, 5, seed=1), "bias": normal(5, seed=2)}
    letters = "HW"[: len(reach)]
    layout = f"N{letters}C", f"{letters}IO", f"N{letters}C"
    wanted = jax.lax.conv_general_dilated(x, params["kernel"], (1,) * len(reach), "VALID", dimension_numbers=layout)
    found = discriminator_heads.sum_of_products(params, x)
    np.testing.assert_allclose(found, wanted + params["bias"], atol=1e-5)  # sums of up to 27 products in another order


@pytest.mark.parametrize("axes", [1, 2])
def test_r1_needs_no_second_derivative_of_a_convolution_which_is_slow_on_cpus(axes: int) -> None:
    heads, params, features, condition = heads_with(axes, 3)
    normalised, _ = heads.normalised(params, heads.carried())

    def penalty(normalised: Params) -> jax.Array:
        return jnp.asarray(losses.r1(lambda given: heads.logits(normalised, given, condition), features))

    operations = str(jax.make_jaxpr(jax.grad(penalty))(normalised))
    assert "dot_general" in operations
    assert "conv_general_dilated" not in operations


def test_the_head_on_the_middle_has_the_published_sizes() -> None:
    """Four convolutions of 4×4 with 1280 channels, norms, and one logit of 32×32 features."""
    head = MiddleHead()
    assert head.smallest == 32
    assert count(head.abstract()) == 4 * (16 * 1280 * 1280 + 1280) + 4 * 2 * 1280 + 1281
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), head.abstract())
    features = jax.ShapeDtypeStruct((2, 32, 32, 1280), jnp.float32)
    assert jax.eval_shape(head.logits, params, features).shape == (2, 1)


@pytest.mark.slow
def test_the_middle_of_a_unet_is_what_its_way_up_begins_with() -> None:
    """Features do not depend on parameters of the way up, and the prediction depends on them all."""
    model = tiny.random_model(tiny.MODEL, 0)
    config, params = tiny.MODEL.unet, model.params["unet"]
    given = normal(2, 4, 6, 4), jnp.array([3, 999]), normal(2, 5, 16), normal(2, 32)
    found = jax.jit(lambda params: unet.middle_features(config, params, *given))(params)
    assert found.shape == (2, 2, 3, 16) and found.dtype == jnp.float32
    below = {name: value for name, value in params.items() if not name.startswith(("up_", "conv_out", "conv_norm"))}
    np.testing.assert_array_equal(found, jax.jit(lambda p: unet.middle_features(config, p, *given))(below))
    noticed = jax.grad(lambda p: jnp.square(unet.middle_features(config, p, *given)).sum())(params)
    assert jnp.abs(noticed["mid_block"]["resnets_1"]["conv2"]["kernel"]).max() > 0
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(noticed["up_blocks_0"]))


@pytest.mark.slow
@pytest.mark.parametrize("network", [TINY_DINO, VggFeatures()], ids=["dinov2", "vgg"])
def test_networks_of_features_are_what_they_say(network: FeatureNetwork) -> None:
    """Their channels, axes and embedding; and a gradient that reaches the image from each."""
    params = drawn(network.abstract())
    image = jax.random.uniform(random.key(0), (2, 32, 40, 3), minval=-1)
    features = network(params, image)
    assert tuple(each.shape[-1] for each in features.layers) == network.channels
    assert all(each.ndim == 2 + network.axes for each in features.layers)
    assert features.embedding.shape == (2, network.embedding_dim)
    gradient = jax.grad(lambda x: sum(jnp.square(each).sum() for each in network(params, x).layers))(image)
    assert math.isfinite(float(jnp.abs(gradient).sum())) and bool((jnp.abs(gradient).sum((1, 2, 3)) > 0).all())


def test_layers_that_a_network_does_not_have_are_refused() -> None:
    with pytest.raises(InputError, match="has 2 layers"):
        DinoV2Features(TINY_DINO.config, (0, 3)).check()
    with pytest.raises(InputError, match="after layer none"):
        DinoV2Features(TINY_DINO.config, ()).check()


def test_five_heads_on_dinov2_s_are_as_many_parameters_as_the_definition_says() -> None:
    channels = (384,) * len(image_features.DINOV2_LAYERS)
    heads = FeatureHeads(channels, 1, 768)
    each = (384 * 384 + 384) + 768 + (9 * 384 * 384 + 384) + 768 + (384 * 64 + 64) + (768 * 64 + 64)
    assert count(heads.abstract()) == 5 * each
    assert discriminator_heads._PROJECTION == 64
