"""Class conditioning: the number of an image's class becomes one vector, by a table among the UNet's parameters.

    label ── row of the table ─┬─ ClassPlace.TOKEN      one more token of the context, after the text's
                               └─ ClassPlace.TIMESTEP   added to the embedding of the timestep

The unconditional embedding, of a dropped class, is zeros, as in sgm (`GeneralConditioner`, which multiplies a dropped
embedding by 0); it is no row of the table, so a table has as many rows as there are classes. latent-diffusion has one
row more, for no class.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32, Key

from sdxl_jax.arrays import Params, type_of_array
from sdxl_jax.conditioning.dropout import dropped_rows
from sdxl_jax.errors import InputError
from sdxl_jax.models.unet import CLASS_TABLES, ClassConfig

NO_CLASS = -1
"""The label of an image without a class, or with a dropped one."""


def embed(
    classes: ClassConfig, unet_params: Params, label: Int32[type_of_array, " batch"]
) -> Float[jax.Array, "batch features"]:
    """The class embeddings of labels: zeros for `NO_CLASS`."""
    table = unet_params[CLASS_TABLES[classes.place]]["embedding"]
    rows = jnp.take(table, jnp.maximum(label, 0), axis=0)
    return jnp.where((jnp.asarray(label) == NO_CLASS)[:, None], 0.0, rows).astype(jnp.float32)


def with_token(
    context: Float[jax.Array, "batch tokens features"] | None, embedding: Float[jax.Array, "batch features"]
) -> Float[jax.Array, "batch tokens_and_class features"]:
    """The context with the class as its last token; None: a model without text, whose only token it is."""
    token = embedding[:, None]
    return token if context is None else jnp.concatenate([context, token], axis=1)


def drop(
    label: Int32[type_of_array, " batch"], keys: Key[jax.Array, " batch"], probability: float
) -> Int32[jax.Array, " batch"]:
    """Conditioning dropout: `NO_CLASS` in place of each label with the given probability. keys: one per example."""
    return jnp.where(dropped_rows(keys, probability), NO_CLASS, label)


def caption(prompt: str | None, label: int | None) -> str:
    """Prompt and class in words, to print below an image."""
    return "\n".join(filter(None, [prompt, None if label is None else f"class {label}"]))


def check(classes: ClassConfig | None, given: Iterable[int | None]) -> None:
    """Raises InputError for a class that the model does not have. None: no class."""
    for label in given:
        if label is None:
            continue
        if classes is None:
            raise InputError(
                f"Class {label} is asked for, but the model is not conditioned on classes. Leave the class out, or "
                "give a class-conditional model"
            )
        if not 0 <= label < classes.number:
            raise InputError(
                f"Class {label} is asked for, but the model has the classes 0 to {classes.number - 1}. Give one of them"
            )
