"""New rows of the token embeddings, which textual inversion learns. The configuration of their training.

Gal et al. 2022, arXiv:2208.01618: a new token stands for what a few images show, and its embedding vectors are all that
is learnt. Beside a text encoder they are an adapter of its table, at the path of the table:

    {"text_encoder": {"token_embedding": {"embedding": {"rows": [vectors, features]}}}}

They are looked up for the tokens after the table's own (`models.layers.looked_up`). Without a rule, vectors grow longer
than those of words, and outweigh the rest of a prompt; after each step they may be pulled back:

    MEDIAN     e ← e · median ‖w‖ / ‖e‖         each vector; w: the rows of the table. OneTrainer,
                                                `AdditionalEmbeddingWrapper.py`
    DEVIATION  e ← e · (std(w) / std(e))^0.1    all vectors of a text encoder together. diffusers,
                                                `train_dreambooth_lora_sdxl_advanced.py`
"""

import enum
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import BaseDtype
from sdxl_jax.errors import InputError, check_ranges

ROWS = "rows"
"""Name of new rows in a tree of adapters, at the path of the table."""
TABLE = "token_embedding/embedding"
"""Path of the table in a text encoder's parameters."""
_PULL = 0.1
"""Of DEVIATION: how much of the way back, in logarithms, a step takes."""
_LEAST = 1e-12
"""Norms and deviations are at least this: zeros stay zeros."""


class Norm(enum.Enum):
    """How the vectors are kept near those of words after each step."""

    FREE = "free"
    """Not at all."""
    MEDIAN = "median"
    """Each vector gets the median norm of the table's rows, as in OneTrainer."""
    DEVIATION = "deviation"
    """The vectors of a text encoder are scaled together a tenth of the way to the standard deviation of its table, as
    in diffusers' pivotal tuning."""


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig:
    """Training of a new token's embedding vectors, in every text encoder of the model; with `adapter` too, this is
    pivotal tuning."""

    token: str
    """The new token, e.g. "<dog>": captions and prompts contain it. It must not be a word of CLIP's vocabulary."""
    vectors: int = 1
    """Number of vectors per text encoder. More learn more, and take as many of a prompt's 75 tokens."""
    initial: str | None = None
    """Words whose vectors the new ones begin as, e.g. "dog": one token each, in turn. None: random ones, normal, with
    the standard deviation of the table."""
    norm: Norm = Norm.FREE
    """How the vectors are kept near those of words after each step."""
    rate: float = 1.0
    """The learning rate of the vectors is multiplied by it. Higher: they learn faster."""
    stop: float = 1.0
    """Share of the steps after which the vectors stay as they are, to the bit, above 0 to 1; with an adapter, which
    learns on."""
    bundle: bool = False
    """The adapter's file holds the vectors as well, as OneTrainer writes them; diffusers refuses such a file."""
    base_dtype: BaseDtype = BaseDtype.FLOAT32
    """Dtype of the frozen UNet and text encoders without an adapter, as adapter.base_dtype with one."""

    def check(self) -> None:
        """Raises InputError for numbers out of range."""
        check_ranges([("textual_inversion.vectors", self.vectors, 1, 75)])
        check_ranges([("textual_inversion.rate", self.rate, 0, math.inf)], above_low=True, below_high=True)
        check_ranges([("textual_inversion.stop", self.stop, 0, 1)], above_low=True)
        if self.initial is not None and not self.initial.strip():
            raise InputError(
                'textual_inversion.initial="" has no words. Give one, e.g. dog, or leave it out (None): random vectors'
            )


def target(norm: Norm, table: Float[jax.Array, "vocabulary features"]) -> Float[jax.Array, ""]:
    """What `pulled_back` needs to know of the table: its rows' median norm, or its standard deviation."""
    table = table.astype(jnp.float32)
    return jnp.median(jnp.linalg.norm(table, axis=-1)) if norm is Norm.MEDIAN else jnp.std(table, ddof=1)


def pulled_back(
    norm: Norm, rows: Float[jax.Array, "vectors features"], target: Float[jax.Array, ""]
) -> Float[jax.Array, "vectors features"]:
    """The vectors after a step, near those of words."""
    match norm:
        case Norm.FREE:
            return rows
        case Norm.MEDIAN:
            return rows * (target / jnp.linalg.norm(rows, axis=-1, keepdims=True).clip(_LEAST))
        case Norm.DEVIATION:
            return rows * (target / jnp.std(rows, ddof=1).clip(_LEAST)) ** _PULL
