"""A linear softmax classifier of Inception's features, for the probe score: what stands for the Inception Score where
Inception's own head is not to be had."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

_STEPS, _RATE, _DECAY = 500, 0.01, 1e-4

Probe = Callable[[Float[np.ndarray, "images features"]], Float[np.ndarray, "images classes"]]
"""Features to logits."""


def trained_probe(
    features: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"], classes: int
) -> Probe:
    """Trained on all images at once, with weight decay."""
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-3
    x, y = jnp.asarray((features - mean) / deviation), jax.nn.one_hot(labels, classes)
    optimiser = optax.adamw(_RATE, weight_decay=_DECAY)
    start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy(x @ params["kernel"] + params["bias"], y).mean()

    def step(carry: tuple[dict[str, jax.Array], optax.OptState], _: None) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=_STEPS))(
        (start, optimiser.init(start))
    )
    kernel, bias = (np.asarray(params[name]) for name in ("kernel", "bias"))
    return lambda rows: (rows - mean) / deviation @ kernel + bias
