"""The text towers against transformers: all five states of each. Tolerance: see `agreement.TOLERANCE`."""

import functools

import jax
import numpy as np
import pytest
import reference
from agreement import Agree
from reference import ADDED, END, START, torch

from sdxl_jax.models import clip


def prompts() -> np.ndarray:
    """Tokens of six prompts, int32[6, 77], one a row."""
    tokens = np.random.default_rng(0).integers(1, START, (6, 77)).astype(np.int32)
    tokens[:, 0] = START
    tokens[0, 5:] = END  # a short prompt, padded with the end token as CLIP-L does
    tokens[1, 12], tokens[1, 13:] = END, 0  # padded with 0 as bigG does
    tokens[2, 76] = END  # a long one, cut to 77 with the end token last
    tokens[3, 1:] = END  # the empty prompt
    tokens[4, 3], tokens[4, 9:] = ADDED, END  # an added token: larger than the end token, and not the end
    tokens[5, 2], tokens[5, 76] = ADDED, END
    return tokens


@pytest.mark.parametrize("name", reference.TOWERS)
def test_text_tower_matches_transformers(name: str, agree: Agree) -> None:
    config = reference.TOWERS[name]
    pair = reference.tower_pair(config)
    tokens = prompts()
    with_projection = config.projection_dim is not None
    # transformers 5 has no `text_model` inside the tower without a projection; 4 has.
    inner = getattr(pair.model, "text_model", pair.model)
    with torch.no_grad():
        theirs = pair.model(torch.from_numpy(tokens).long(), output_hidden_states=True)
        penultimate = theirs.hidden_states[-2]
        normed = inner.final_layer_norm(penultimate)
        pooled = inner(torch.from_numpy(tokens).long()).pooler_output

    ours = jax.jit(functools.partial(clip.apply, config))(pair.params, tokens)

    agree(f"{name}: penultimate", ours.penultimate, penultimate)
    agree(f"{name}: penultimate normed", ours.penultimate_normed, normed)
    agree(f"{name}: last", ours.last, theirs.last_hidden_state)
    agree(f"{name}: pooled", ours.pooled, pooled)
    assert (ours.projected is not None) == with_projection
    if with_projection:
        agree(f"{name}: projected", ours.projected, theirs.text_embeds)
