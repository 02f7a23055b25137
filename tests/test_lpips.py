"""LPIPS and `psim`: what holds for any weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers, layers, lpips
from sdxl_jax.models.lpips import Backbone


def initial(backbone: Backbone) -> Params:
    parameters = flatten(lpips.abstract(backbone))
    return unflatten({path: jnp.asarray(initialisers.sample(leaf, 0, path)) for path, leaf in parameters.items()})


def test_equal_images_are_at_distance_0_with_a_finite_gradient_of_0() -> None:
    """A black image and biases of zero have positions whose features are all zero, where a norm has no gradient."""
    params = initial(Backbone.ALEX)
    params["backbone"]["conv_0"]["bias"] = jnp.full(64, -9.0)
    x = jnp.linspace(-1, 1, 31 * 31 * 3, dtype=jnp.float32).reshape(1, 31, 31, 3)
    value, gradient = jax.jit(jax.value_and_grad(lambda y: lpips.lpips(Backbone.ALEX, params, x, y).sum()))(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_the_parameters_are_those_of_the_published_networks() -> None:
    """13 and 5 convolutions, counted by hand; w has as many numbers as the five layers have channels."""
    vgg, alex = lpips.abstract(Backbone.VGG), lpips.abstract(Backbone.ALEX)
    assert layers.count(vgg["backbone"]) == 14_714_688
    assert layers.count(alex["backbone"]) == 2_469_696
    assert [vgg[f"layer_{n}"]["scale"].shape for n in range(5)] == [(64,), (128,), (256,), (512,), (512,)]
    assert [alex[f"layer_{n}"]["scale"].shape for n in range(5)] == [(64,), (192,), (384,), (256,), (256,)]


@pytest.mark.parametrize(("backbone", "side"), [(Backbone.VGG, 16), (Backbone.ALEX, 31)])
def test_images_without_a_position_in_the_last_layer_are_refused(backbone: Backbone, side: int) -> None:
    params = lpips.abstract(backbone)

    def distance(height: int) -> jax.ShapeDtypeStruct:
        image = jax.ShapeDtypeStruct((3, height, 40, 3), jnp.float32)
        given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        return jax.eval_shape(lambda params, x: lpips.lpips(backbone, params, x, x), given, image)

    assert distance(side).shape == (3,)
    with pytest.raises(InputError, match=rf"images of {side} pixels and more; these are {side - 1}×40"):
        distance(side - 1)
