"""Losses of a student that is trained against a critic.

    hinge      critic    Σ over heads of mean relu(1 − D(x)) + mean relu(1 + D(y))        student   −Σ mean D(y)
    softplus   critic    mean softplus(−D(x)) + mean softplus(D(y))                       student   mean softplus(−D(y))
    R1         ½ Σ over heads of mean over images of ‖∂ΣD(f)/∂f‖²,  f the features of images that a head judges
    distribution matching   ½ mean (y − stop(y − g))²,   g = (x̂₀ of the fake score − x̂₀ of the teacher) / mean |y − x̂₀|

x are images of the data, y those of the student. Hinge: Lim & Ye, arXiv:1705.02894, as in ADD (Sauer et al.,
arXiv:2311.17042, eq. 3 and 4). R1: Mescheder et al., arXiv:1801.04406, eq. 9, at the heads' inputs. Distribution
matching: Yin et al., arXiv:2311.18828, eq. 7 and 8, in the numbers of DMD2's code (arXiv:2405.14867): the gradient of
the loss with respect to y is g, over the number of elements.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import type_of_array

Array = jax.Array
Logits = Sequence[Float[Array, "batch positions"]]
"""Of each head."""
Features = tuple[Float[type_of_array, "batch *positions channels"], ...]


def hinge(real: Logits, fake: Logits) -> Float[Array, ""]:
    """The critic's loss. No gradient from logits beyond ±1."""
    each = [jax.nn.relu(1 - x).mean() + jax.nn.relu(1 + y).mean() for x, y in zip(real, fake, strict=True)]
    return jnp.sum(jnp.stack(each))


def hinge_of_student(fake: Logits) -> Float[Array, ""]:
    """The student's loss."""
    return -jnp.sum(jnp.stack([y.mean() for y in fake]))


def softplus(real: Float[Array, "batch logits"], fake: Float[Array, "batch logits"]) -> Float[Array, ""]:
    """The critic's loss: cross-entropy."""
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


def softplus_of_student(fake: Float[Array, "batch logits"]) -> Float[Array, ""]:
    """The student's loss."""
    return jax.nn.softplus(-fake).mean()


def r1(logits: Callable[[Features], Logits], features: Features) -> Float[Array, ""]:
    """The penalty on the heads' gradient at the features of images of the data."""
    gradient = jax.grad(lambda f: sum(each.sum() for each in logits(f)))(features)
    return sum(0.5 * jnp.square(each).sum() / len(each) for each in gradient)  # pyright: ignore[reportReturnType]


def matching_gradient(
    latent: Float[Array, "batch height width channels"],
    real: Float[Array, "batch height width channels"],
    fake: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height width channels"]:
    """The direction g that leads away from what the student makes too often: the difference of the two scores, of each
    image in units of the teacher's correction. real, fake: x₀ by teacher and fake score at the latent, noised. 0 where
    the teacher corrects nothing."""
    scale = jnp.abs(latent - real).mean((1, 2, 3), keepdims=True)
    return jnp.where(scale > 0, (fake - real) / jnp.where(scale > 0, scale, 1), 0)


def distribution_matching(
    latent: Float[Array, "batch height width channels"],
    real: Float[Array, "batch height width channels"],
    fake: Float[Array, "batch height width channels"],
) -> Float[Array, ""]:
    """The student's loss. Its value is ½ mean g², its gradient with respect to the latent g; none goes through the
    scores."""
    gradient = jax.lax.stop_gradient(matching_gradient(latent, real, fake))
    return 0.5 * jnp.square(latent - jax.lax.stop_gradient(latent - gradient)).mean()
