"""Prompts to token numbers to text states, for one or two CLIP towers.

    "a cat" ── tokenizer ── [start, 320, 2368, end, padding …] ── tower ── states [77, width], pooled

SDXL concatenates the states of two towers along the features; the pooled vector is the projected one of the last tower.
Towers differ in what they pad with: CLIP-L with end-of-text, bigG with 0. The vocabulary is CLIP's own, shipped with
the package, or the `vocab.json` and `merges.txt` of a folder. The byte-pair encoding is transformers' `CLIPTokenizer`,
which is what users of diffusers get; it differs from OpenAI's on curly quotes, HTML entities and full-width characters.
"""

import enum
import functools
import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, Key
from tokenizers import pre_tokenizers

# transformers would advise to install torch, of which its tokenizers have no need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import CLIPTokenizer

from sdxl_jax.arrays import Params, TokenIds
from sdxl_jax.errors import InputError
from sdxl_jax.models import clip
from sdxl_jax.models.clip import CLIP_BIGG, CLIP_H, CLIP_L, ClipTextConfig
from sdxl_jax.models.layers import Compute

TOKENS = 77
_MERGES = Path(__file__).with_name("clip_merges.txt.gz")


class ContextState(enum.Enum):
    """Which of a tower's states the UNet attends to."""

    PENULTIMATE = "penultimate"
    """Before the last layer, not normed: SDXL."""
    PENULTIMATE_NORMED = "penultimate_normed"
    """Before the last layer, behind the final norm: SD 2.x."""
    LAST = "last"
    """After the last layer, behind the final norm: SD 1.x."""


@dataclass(frozen=True)
class Tower:
    """One text encoder."""

    name: str
    """Its key among the parameters and the token numbers: text_encoder, text_encoder_2, as in diffusers."""
    clip: ClipTextConfig
    """What its weights depend on."""
    pad_token: int
    """Token that fills a prompt up to 77."""
    context: ContextState = ContextState.PENULTIMATE
    """The states that the UNet attends to."""


END_OF_TEXT = 49407
SDXL_BASE_TEXT = (Tower("text_encoder", CLIP_L, END_OF_TEXT), Tower("text_encoder_2", CLIP_BIGG, 0))
SDXL_REFINER_TEXT = (Tower("text_encoder_2", CLIP_BIGG, 0),)
SD1_TEXT = (Tower("text_encoder", CLIP_L, END_OF_TEXT, ContextState.LAST),)
SD2_TEXT = (Tower("text_encoder", CLIP_H, 0, ContextState.PENULTIMATE_NORMED),)


@functools.cache
def _byte_pair_encoder(folder: str | None) -> CLIPTokenizer:
    """transformers' tokenizer over the shipped vocabulary, or that of a folder."""
    if folder is None:
        merges = [tuple(line.split()) for line in gzip.decompress(_MERGES.read_bytes()).decode().splitlines()]
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges)]
        words += ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: number for number, word in enumerate(words)}
        return CLIPTokenizer(vocab=vocabulary, merges=merges)  # pyright: ignore[reportArgumentType] (pairs are taken)
    paths = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise InputError(f"{folder} has no {' and no '.join(missing)}. Expected a tokenizer folder with both files")
    vocabulary = json.loads(paths[0].read_text())
    lines = [line for line in paths[1].read_text().splitlines() if line and not line.startswith("#version")]
    merges = [tuple(line.split()) for line in lines]
    return CLIPTokenizer(vocab=vocabulary, merges=merges)  # pyright: ignore[reportArgumentType] (as above)


@dataclass(frozen=True)
class Tokenizer:
    """Prompts to token numbers, for every tower of a model. Pickles, so that data workers can have it."""

    pad_tokens: tuple[tuple[str, int], ...]
    """(tower, padding token) pairs."""
    vocabulary: str | None = None
    """Folder with `vocab.json` and `merges.txt`; None: CLIP's vocabulary, which is shipped."""

    @classmethod
    def of(cls, towers: tuple[Tower, ...], vocabulary: str | None = None) -> "Tokenizer":
        return cls(tuple((tower.name, tower.pad_token) for tower in towers), vocabulary)

    def __call__(self, prompts: list[str]) -> dict[str, Int32[np.ndarray, "batch 77"]]:
        """One entry a tower: start, the prompt's tokens (truncated to 75), end, padding."""
        encoded = self._encode(prompts, truncation=True, max_length=TOKENS)
        return {
            name: np.array([row + [pad] * (TOKENS - len(row)) for row in encoded], np.int32).reshape(-1, TOKENS)
            for name, pad in self.pad_tokens
        }

    def truncated(self, prompts: list[str]) -> list[int]:
        """For each prompt, how many of its tokens are beyond the 75 that a tower reads."""
        return [max(0, len(row) - TOKENS) for row in self._encode(prompts, verbose=False)]

    def _encode(self, prompts: list[str], **options: Any) -> list[list[int]]:
        # transformers fails on an empty list.
        return _byte_pair_encoder(self.vocabulary)(prompts, **options)["input_ids"] if prompts else []


class TextCondition(NamedTuple):
    """What the UNet is told about the prompt, float32."""

    context: Float[jax.Array, "batch tokens features"]
    """States that it attends to."""
    pooled: Float[jax.Array, "batch projection"] | None
    """One vector a prompt, for the conditioning vector; None for models without it."""


def encode(
    towers: tuple[Tower, ...], params: Params, tokens: Mapping[str, TokenIds], compute: Compute = Compute()
) -> TextCondition:
    """Runs every tower. params and tokens are keyed by tower name; other keys are not read."""
    states = [clip.apply(tower.clip, params[tower.name], jnp.asarray(tokens[tower.name]), compute) for tower in towers]
    context = [getattr(state, tower.context.value) for tower, state in zip(towers, states, strict=True)]
    return TextCondition(jnp.concatenate(context, axis=-1), states[-1].projected)


def zeros_like(condition: TextCondition) -> TextCondition:
    """No prompt, as SDXL base was trained on: the embeddings are zero, which is not the embedding of ""."""
    return jax.tree.map(jnp.zeros_like, condition)


def drop(
    condition: TextCondition, without: TextCondition, keys: Key[jax.Array, " batch"], probability: float
) -> TextCondition:
    """Replaces each example's text by `without` (batch 1) with the given probability, so that the network learns what
    guidance compares with. keys: one an example. It is the embeddings that change, all of an example at once."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)

    def choose(yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(dropped.reshape(-1, *[1] * (yes.ndim - 1)), no, yes)

    return jax.tree.map(choose, condition, without)
