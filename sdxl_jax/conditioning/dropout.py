"""Conditioning dropout: which examples of a batch lose a condition, so that the network learns the unconditional
prediction of classifier-free guidance. Each condition is dropped on its own, with keys of its own."""

import jax
from jaxtyping import Bool, Key


def dropped_rows(keys: Key[jax.Array, " batch"], probability: float) -> Bool[jax.Array, " batch"]:
    """True with the given probability. keys: one per example, so that a row does not depend on its neighbours."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
