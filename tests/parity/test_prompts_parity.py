"""Prompts in chunks and with weights against transformers: its tokenizer and towers, and the arithmetic in torch.

Tolerance: see `agreement.TOLERANCE`; a weight of 1.5 adds half of a state to it.
"""

import functools

import jax
import numpy as np
import pytest
import reference
from agreement import Agree
from reference import torch

from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.prompts import LongPrompts
from sdxl_jax.conditioning.text import Tokenizer, Tower
from sdxl_jax.models.clip import Activation, ClipTextConfig

START, END = text.START_OF_TEXT, text.END_OF_TEXT
TOWERS = (
    Tower("text_encoder", ClipTextConfig(48, 3, 3, 96), END),
    Tower("text_encoder_2", ClipTextConfig(64, 3, 4, 128, Activation.GELU, 40), 0),
)
SENTENCE = "a red cat sat on the mat while dark birds flew over old green hills and one dog ran home"
WORDS = SENTENCE.split() * 9
LONG = " ".join(WORDS)
"""180 words of one token each, without a comma: chunks of 75, 75 and 30."""
WEIGHTED = " ".join(f"({word}:1.5)" if word == "cat" else f"[[{word}]]" if word == "dog" else word for word in WORDS)


@pytest.mark.parametrize("weighted", [False, True])
def test_long_and_weighted_prompts_match_transformers(weighted: bool, agree: Agree) -> None:
    pairs = [reference.tower_pair(tower.clip, seed) for seed, tower in enumerate(TOWERS)]
    params = {tower.name: pair.params for tower, pair in zip(TOWERS, pairs, strict=True)}
    words = text._encode([LONG], None, ())[0][1:-1]
    assert len(words) == len(WORDS) == 180
    # float64 weights: what float32 loses is within the tolerance.
    factors = {"cat": 1.5, "dog": 1 / 1.21} if weighted else {}
    factor = [factors.get(word, 1.0) for word in WORDS]

    def expected(pair: reference.Pair, pad: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Chunk by chunk, as one would do it by hand."""
        states, pooled = [], None
        with torch.no_grad():
            empty = pair.model(torch.tensor([[START, END] + [pad] * 75]), output_hidden_states=True).hidden_states[-2]
            for start in range(0, 180, 75):
                chunk = words[start : start + 75]
                rest = 75 - len(chunk)
                out = pair.model(torch.tensor([[START, *chunk, END] + [pad] * rest]), output_hidden_states=True)
                weights = torch.tensor([1.0, *factor[start : start + 75], 1.0] + [1.0] * rest)[None, :, None]
                states.append(empty + weights * (out.hidden_states[-2] - empty))
                if start == 0 and "text_embeds" in out:
                    pooled = out.text_embeds.numpy()
        return torch.cat(states, dim=1).numpy(), pooled

    prompts = Tokenizer.of(TOWERS).prompts([WEIGHTED if weighted else LONG], LongPrompts.CHUNKS, weighted)
    ours = jax.jit(functools.partial(text.encode_prompts, TOWERS))(params, prompts)

    theirs = [expected(pair, tower.pad_token) for tower, pair in zip(TOWERS, pairs, strict=True)]
    what = "180 words" + " with weights" * weighted
    agree(f"{what}: context", ours.context, np.concatenate([context for context, _ in theirs], axis=-1))
    agree(f"{what}: pooled", ours.pooled, theirs[-1][1])
