"""Prompts to token ids to text states: tokenise, encode, for one or two CLIP towers.

    "a cat" ── tokenizer ── [start, 320, 2368, end, padding …] ── tower ── states [77, width], pooled

SDXL concatenates the states of two towers along the features; the pooled vector is the projected one of the last tower.
Towers differ in what they pad with: CLIP-L with end-of-text, bigG with 0. The vocabulary is CLIP's own, shipped with
the package, or the `vocab.json` and `merges.txt` of a folder. The byte-pair encoding is built from the
parts of the package tokenizers as transformers' `CLIPTokenizer` is, which is what users of diffusers get; it differs
from OpenAI's on curly quotes, HTML entities and full-width characters.

A tower may have added tokens beyond that vocabulary, learnt by textual inversion (Gal et al. 2022, arXiv:2208.01618).
They are found anywhere in a prompt, in any case, even within a word. Tokens `<tok>`, `<tok>_1`, `<tok>_2` are the
vectors of one concept, as diffusers writes it: `<tok>` in a prompt stands for all of them, in order.

Prompts of more than 75 tokens and prompts with weights (their syntax: `prompts`) are for sampling:

    "a (red:1.3) car, …" ── Tokenizer.prompts ── chunks of 77 tokens ── encode_prompts ── states [chunks · 77, width]

Each chunk is encoded on its own, and the states are concatenated along the tokens; the pooled vector is the first
chunk's. A weight moves a token's state away from that of the empty prompt at the same position: empty + weight ·
(state − empty). It does not change the pooled vector. Both as in ComfyUI, `comfy/sd1_clip.py`, `encode_token_weights`.
"""

import enum
import functools
import gzip
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int32, Key, Num
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE

from sdxl_jax.arrays import Params, TokenIds, type_of_array
from sdxl_jax.conditioning.dropout import dropped_rows
from sdxl_jax.conditioning.prompts import (
    CHUNK,
    LongPrompts,
    WeightedText,
    check_text,
    chunk_ends,
    weighted_texts,
)
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
    """Before the last layer, after the final norm: SD 2.x."""
    LAST = "last"
    """After the last layer, after the final norm: SD 1.x."""


@dataclass(frozen=True)
class Tower:
    """One text encoder."""

    name: str
    """Its key in the parameters and the token ids: text_encoder, text_encoder_2, as in diffusers."""
    clip: ClipTextConfig
    """What its weights depend on."""
    pad_token: int
    """Token that fills a prompt up to 77."""
    context: ContextState = ContextState.PENULTIMATE
    """The states that the UNet attends to."""
    added_tokens: tuple[str, ...] = ()
    """Tokens beyond CLIP's vocabulary, in the order of their rows 49408, 49409, … of the token embedding."""


START_OF_TEXT, END_OF_TEXT = 49406, 49407
FIRST_ADDED = END_OF_TEXT + 1
"""Id of the first of a tower's added tokens, and its row of the token embedding."""
_START, _END = "<|startoftext|>", "<|endoftext|>"
SDXL_BASE_TEXT = (Tower("text_encoder", CLIP_L, END_OF_TEXT), Tower("text_encoder_2", CLIP_BIGG, 0))
SDXL_REFINER_TEXT = (Tower("text_encoder_2", CLIP_BIGG, 0),)
SD1_TEXT = (Tower("text_encoder", CLIP_L, END_OF_TEXT, ContextState.LAST),)
SD2_TEXT = (Tower("text_encoder", CLIP_H, 0, ContextState.PENULTIMATE_NORMED),)


class PromptTokens(NamedTuple):
    """A batch of tokenised prompts, keyed by tower name. Every prompt has the same number of chunks."""

    tokens: dict[str, Int32[type_of_array, "batch chunks 77"]]
    """Each chunk with start, end and padding; chunks beyond a prompt's own are those of the empty prompt."""
    weights: dict[str, Float[type_of_array, "batch chunks 77"]] | None = None
    """Weight of each token, 1 for start, end and padding. None: unweighted, and nothing is computed for it."""

    @property
    def chunks(self) -> int:
        """1 for a model without text encoders."""
        return next((tokens.shape[1] for tokens in self.tokens.values()), 1)


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary, tokens with their ids in order, and its merges, as the lines of merges.txt."""
    merges = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += [_START, _END]
    return {token: token_id for token_id, token in enumerate(tokens)}, merges


_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What byte pairs are merged within: Radford et al.'s `simple_tokenizer.py`."""


@functools.cache
def _encoder(folder: str | None, added: tuple[str, ...] = ()) -> Encoder:
    """Text to start, tokens, end, over the shipped vocabulary, or that of a folder, with added tokens after it."""
    encoder = Encoder(_byte_pairs(folder))
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    encoder.add_special_tokens([_START, _END])
    start, end = ((token, encoder.encode(token).ids[0]) for token in (_START, _END))
    encoder.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    encoder.add_tokens(list(added))
    return encoder


@functools.cache
def _byte_pairs(folder: str | None) -> BPE:
    """The vocabulary and its merges, which take a tenth of a second to build: encoders share them."""
    if folder is None:
        vocabulary, lines = clip_vocabulary()
    else:
        paths = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(
                f"{folder} has no {' and no '.join(missing)}. Give a tokenizer folder with vocab.json and merges.txt"
            )
        vocabulary = json.loads(paths[0].read_text())
        lines = [line for line in paths[1].read_text().splitlines() if line and not line.startswith("#version")]
    merges = [tuple(line.split()) for line in lines]
    return BPE(vocabulary, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=_END)  # pyright: ignore[reportArgumentType] (pairs are taken)


def can_be_added(word: str) -> bool:
    """Whether the word can be an added token: not empty, no space around it, UTF-8, not in CLIP's own vocabulary."""
    usable = word == word.strip() != "" and not any("\ud800" <= character <= "\udfff" for character in word)
    return usable and _encoder(None).token_to_id(word) is None


def concept_tokens(token: str, added: tuple[str, ...]) -> tuple[str, ...]:
    """The tokens of a concept whose first is `token`: it, and token_1, token_2, … up to the first that is not added."""
    rest = (f"{token}_{number}" for number in itertools.count(1))
    return (token, *itertools.takewhile(added.__contains__, rest))


def concepts(added: tuple[str, ...]) -> dict[str, int]:
    """A tower's concepts by their first token, which prompts use, and the number of vectors of each."""
    runs = {token: concept_tokens(token, added) for token in added}
    later = {token for run in runs.values() for token in run[1:]}
    return {token: len(run) for token, run in runs.items() if token not in later}


def _encode(prompts: list[str], folder: str | None, added: tuple[str, ...]) -> list[list[int]]:
    """Start, tokens, end of each prompt, with all tokens of the concepts that it names."""
    encoder = _encoder(folder, added)
    several = {token: " ".join(concept_tokens(token, added)) for token, count in concepts(added).items() if count > 1}
    if several:
        prompts = [_with_all_tokens(prompt, encoder, several) for prompt in prompts]
    return [each.ids for each in encoder.encode_batch(prompts)]


def _with_all_tokens(prompt: str, encoder: Encoder, expanded: Mapping[str, str]) -> str:
    """The prompt with "<tok> <tok>_1 <tok>_2" for "<tok>", as diffusers' `maybe_convert_prompt` does it.

    The text is changed, not the token ids, so that a prompt that names `<tok>_1` itself gives the same as there.
    Added tokens are found in any case; diffusers then replaces only those in lower case, and uses the first vector
    alone of the others. Here case matters to neither.
    """
    found = set(encoder.encode(prompt).ids)
    for token, every in expanded.items():
        if encoder.token_to_id(token) in found:
            prompt = re.sub(re.escape(token), lambda _: every, prompt, flags=re.IGNORECASE)  # noqa: B023 (used at once)
    return prompt


@dataclass(frozen=True)
class Tokenizer:
    """Prompts to token ids, for every tower of a model. It can be pickled."""

    towers: tuple[tuple[str, int, tuple[str, ...]], ...]
    """(name, padding token, added tokens) per tower."""
    vocabulary: str | None = None
    """Folder with `vocab.json` and `merges.txt`; None: CLIP's vocabulary, which is shipped."""

    @classmethod
    def of(cls, towers: tuple[Tower, ...], vocabulary: str | None = None) -> "Tokenizer":
        return cls(tuple((tower.name, tower.pad_token, tower.added_tokens) for tower in towers), vocabulary)

    def __call__(self, prompts: list[str]) -> dict[str, Int32[np.ndarray, "batch 77"]]:
        """One entry per tower: start, the prompt's tokens (truncated to 75), end, padding."""
        return {name: np.asarray(tokens[:, 0]) for name, tokens in self.prompts(prompts).tokens.items()}

    def prompts(
        self,
        prompts: list[str],
        long: LongPrompts = LongPrompts.TRUNCATE,
        weighted: bool = False,
        chunks: int | None = None,
    ) -> PromptTokens:
        """Prompts for `encode_prompts`. By default one chunk each, with the tokens of `__call__`.

        Args:
            long: how tokens beyond the first 75 are treated.
            weighted: whether brackets are weights, with the syntax of `prompts`, or text.
            chunks: least number of chunks. A prompt and a negative prompt must have the same number: that of the longer
                one.

        Towers with different added tokens split a long prompt at different positions.
        Raises InputError for brackets that are not weights.
        """
        tokenised = self._tokenised(prompts, weighted)
        ends = {added: [self._ends(tokens, added, long) for tokens, _ in rows] for added, rows in tokenised.items()}
        chunks = max([chunks or 1, *(len(each) for rows in ends.values() for each in rows)])
        empty = _encode([""], self.vocabulary, ())[0]
        tokens, weights = {}, {}
        for name, pad, added in self.towers:
            filled = tokens[name] = np.full((len(prompts), chunks, TOKENS), pad, np.int32)
            filled_weights = weights[name] = np.ones(filled.shape, np.float32)
            filled[..., : len(empty)] = empty
            for row, (token_ids, token_weights) in enumerate(tokenised[added]):
                for chunk, (start, end) in enumerate(itertools.pairwise([0, *ends[added][row]])):
                    count = end - start
                    filled[row, chunk, 1 : count + 2] = [*token_ids[start:end], empty[-1]]
                    filled_weights[row, chunk, 1 : count + 1] = token_weights[start:end]
        return PromptTokens(tokens, weights if weighted else None)

    def truncated(self, prompts: list[str], weighted: bool = False) -> list[int]:
        """Number of each prompt's tokens beyond the 75 that a tower reads; the most of any tower."""
        tokenised = self._tokenised(prompts, weighted).values()
        if not tokenised:  # no text encoders, which truncate nothing
            return [0] * len(prompts)
        return [max(0, *(len(tokens) - CHUNK for tokens, _ in rows)) for rows in zip(*tokenised, strict=True)]

    def _tokenised(
        self, prompts: list[str], weighted: bool
    ) -> dict[tuple[str, ...], list[tuple[list[int], list[float]]]]:
        """By added tokens: all tokens of each prompt, without start and end, and their weights."""
        split = [weighted_texts(prompt) if weighted else [WeightedText(prompt, 1.0)] for prompt in prompts]
        encoded = self._encoded([piece.text for row in split for piece in row])
        tokenised = {}
        for added, every in encoded.items():
            rest = iter(every)
            rows = [[(next(rest)[1:-1], piece.weight) for piece in row] for row in split]
            tokenised[added] = [
                ([token for tokens, _ in row for token in tokens], [weight for tokens, weight in row for _ in tokens])
                for row in rows
            ]
        return tokenised

    def _ends(self, tokens: list[int], added: tuple[str, ...], long: LongPrompts) -> list[int]:
        """Where the chunks of a prompt end."""
        if len(tokens) <= CHUNK:
            return [len(tokens)]
        if long is LongPrompts.TRUNCATE:
            return [CHUNK]
        encoder = _encoder(self.vocabulary, added)
        texts = [encoder.id_to_token(token) or "" for token in tokens]
        successor = dict(pair for token in concepts(added) for pair in itertools.pairwise(concept_tokens(token, added)))
        joined = [
            successor.get(token) == following if token in added else not token.endswith("</w>")
            for token, following in zip(texts, [*texts[1:], ""], strict=True)
        ]
        return chunk_ends(joined, [token == ",</w>" for token in texts])

    def _encoded(self, prompts: list[str]) -> dict[tuple[str, ...], list[list[int]]]:
        """Token ids by added tokens; towers with the same added tokens share one entry, encoded once."""
        for prompt in prompts:
            check_text(prompt, "A prompt")
        return {added: _encode(prompts, self.vocabulary, added) for added in {each[2] for each in self.towers}}


class TextConditioning(NamedTuple):
    """Text conditioning: what the UNet receives of the prompt, float32."""

    context: Float[jax.Array, "batch tokens features"] | None
    """States that the UNet attends to; None for models without text encoders."""
    pooled: Float[jax.Array, "batch projection"] | None
    """One vector per prompt, for the conditioning vector; None for models without it."""


def encode(
    towers: tuple[Tower, ...],
    params: Params,
    tokens: Mapping[str, TokenIds],
    compute: Compute = Compute(),
    adapters: Params | None = None,
) -> TextConditioning:
    """Runs every tower. params, tokens and adapters are keyed by tower name; other keys are not read."""
    if not towers:
        return TextConditioning(None, None)
    changes = adapters or {}
    states = [
        clip.apply(tower.clip, params[tower.name], jnp.asarray(tokens[tower.name]), compute, changes.get(tower.name))
        for tower in towers
    ]
    context = [getattr(state, tower.context.value) for tower, state in zip(towers, states, strict=True)]
    return TextConditioning(jnp.concatenate(context, axis=-1), states[-1].projected)


def encode_prompts(
    towers: tuple[Tower, ...], params: Params, prompts: PromptTokens, compute: Compute = Compute()
) -> TextConditioning:
    """`encode` for prompts in chunks, weighted or not: context [batch, chunks · 77, features].

    For one chunk without weights the states are those of `encode`, bit for bit; with weights they still are wherever
    the weight is 1. With weights, the empty prompt is encoded too.
    """
    tokens = {tower.name: _in_a_row(prompts.tokens[tower.name]) for tower in towers}
    context, pooled = encode(towers, params, tokens, compute)
    if context is None:
        return TextConditioning(None, None)
    if prompts.weights is not None:
        empty = encode(towers, params, {tower.name: _empty_prompt(tower) for tower in towers}, compute).context
        assert empty is not None
        each = {tower: _in_a_row(jnp.asarray(prompts.weights[tower.name])) for tower in towers}
        widened = [jnp.repeat(each[tower][..., None], tower.clip.width, axis=-1) for tower in towers]
        weights = jnp.concatenate(widened, axis=-1)
        # Not by the formula alone: empty + 1 · (state − empty) is not quite the state.
        context = jnp.where(weights == 1, context, empty + weights * (context - empty))
    count = prompts.chunks
    context = rearrange(context, "(batch chunks) tokens features -> batch (chunks tokens) features", chunks=count)
    if pooled is not None:
        pooled = rearrange(pooled, "(batch chunks) projection -> batch chunks projection", chunks=count)[:, 0]
    return TextConditioning(context, pooled)


def _in_a_row(chunks: Num[type_of_array, "batch chunks tokens"]) -> Num[type_of_array, "rows tokens"]:
    """Every chunk as a row of its own."""
    return rearrange(chunks, "batch chunks tokens -> (batch chunks) tokens")


def _empty_prompt(tower: Tower) -> Int32[np.ndarray, "1 77"]:
    tokens = np.full((1, TOKENS), tower.pad_token, np.int32)
    tokens[0, :2] = START_OF_TEXT, tower.clip.end_token
    return tokens


def zeros_like(condition: TextConditioning) -> TextConditioning:
    """The unconditional (null) embedding that SDXL base was trained with: zeros, which is not the embedding of ""."""
    return jax.tree.map(jnp.zeros_like, condition)


def drop(
    condition: TextConditioning, unconditional: TextConditioning, keys: Key[jax.Array, " batch"], probability: float
) -> TextConditioning:
    """Conditioning dropout: replaces each example's text by `unconditional` (batch 1) with the given probability, so
    that the network learns the unconditional prediction of classifier-free guidance. keys: one per example. All
    embeddings of an example are replaced together."""
    dropped = dropped_rows(keys, probability)

    def choose(
        given: Float[jax.Array, "batch *features"], null: Float[jax.Array, "1 *features"]
    ) -> Float[jax.Array, "batch *features"]:
        return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), null, given)

    return jax.tree.map(choose, condition, unconditional)
