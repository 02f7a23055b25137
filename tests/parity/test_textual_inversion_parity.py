"""Textual inversion against diffusers: one file, loaded there with `load_textual_inversion` and here with `add`.

Token numbers must be the same, text states agree to 1e-5 of the largest: these towers are small, and an embedding is
looked up, not computed.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference
from agreement import Agree
from reference import diffusers, torch
from safetensors.torch import load_file, save_file
from tiny import MODEL

from sdxl_jax import sharding
from sdxl_jax.adapters.embeddings import TextualInversionConfig
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import ContextState, Tokenizer, Tower
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import Model
from sdxl_jax.models import clip
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.textual_inversion import EmbeddingTraining
from sdxl_jax.weights import textual_inversion

END = text.END_OF_TEXT
CLIP_L = Tower("text_encoder", ClipTextConfig(48, 3, 3, 96), END)
CLIP_G = Tower("text_encoder_2", ClipTextConfig(64, 3, 4, 128, Activation.GELU, 40), 0)
TOLERANCE = 1e-5

TOKEN = "<my-toy>"
PROMPTS = [
    "",
    "a cat",
    TOKEN,
    f"{TOKEN} on the beach",
    f"a photo of {TOKEN}",
    f"a photo of {TOKEN} in the rain",
    f"{TOKEN} beside {TOKEN}",
    f"{TOKEN}{TOKEN}",
    f"({TOKEN}:1.2), \"{TOKEN}\"; it's {TOKEN}'s.",
    f"pre{TOKEN}post",
    f"{TOKEN}! wow!",
    f"  {TOKEN}\n\t{TOKEN} ",
    f"{TOKEN}_1",
    f"{TOKEN}_2 {TOKEN}_17",
    f"{TOKEN} and {TOKEN}_1",
    "<my-toy, my-toy>, <my -toy>",
    "word " * 73 + TOKEN,
    f"{TOKEN} " * 40,
    f"漢字{TOKEN}🐈 naïve",
]


class Pipeline(diffusers.loaders.TextualInversionLoaderMixin):
    """As much of a pipeline as loading an embedding needs."""

    hf_device_map = None

    def __init__(self, towers: list[Any], tokenizers: list[Any]) -> None:
        self.text_encoder, self.tokenizer = towers[0], tokenizers[0]
        self.towers, self.tokenizers = towers, tokenizers
        self.components: dict[str, Any] = {}

    def tokens(self, number: int, prompts: list[str]) -> Any:
        """As diffusers' pipelines turn prompts into tokens."""
        tokenizer = self.tokenizers[number]
        options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        return tokenizer(self.maybe_convert_prompt(prompts, tokenizer), **options).input_ids


def tokenizer(tower: Tower) -> Any:
    """transformers' own, over CLIP's vocabulary. The padding is set afterwards: given from the start, it is a special
    word, and every "!" of a prompt would be read as the padding of the second tower, 0, not as CLIP's own 256."""
    encoder = reference.clip_tokenizer()
    encoder.pad_token = encoder.convert_ids_to_tokens(tower.pad_token)
    return encoder


def pair(towers: tuple[Tower, ...]) -> tuple[Pipeline, Model]:
    """The same random text encoders on both sides."""
    pairs = [reference.tower_pair(tower.clip, seed) for seed, tower in enumerate(towers)]
    params = {tower.name: pair.params for tower, pair in zip(towers, pairs, strict=True)}
    model = Model(dataclasses.replace(MODEL, text=towers), params)
    return Pipeline([pair.model for pair in pairs], [tokenizer(tower) for tower in towers]), model


def vectors(count: int, width: int, seed: int) -> Any:
    return 0.1 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def check(what: str, theirs: Pipeline, ours: Model, agree: Agree) -> None:
    """Token numbers of every prompt, and every state of every tower."""
    tokens = Tokenizer.of(ours.config.text)(PROMPTS)
    for number, tower in enumerate(ours.config.text):
        expected = theirs.tokens(number, PROMPTS)
        np.testing.assert_array_equal(tokens[tower.name], expected.numpy())
        assert (tokens[tower.name] > END).any()
        network = theirs.towers[number]
        with torch.no_grad():
            states = network(expected, output_hidden_states=True)
        given = jax.jit(functools.partial(clip.apply, tower.clip))(ours.params[tower.name], tokens[tower.name])
        agree(f"{what}, {tower.name}: penultimate", given.penultimate, states.hidden_states[-2], TOLERANCE)
        agree(f"{what}, {tower.name}: last", given.last, states.last_hidden_state, TOLERANCE)
        if tower.clip.projection_dim is None:
            agree(f"{what}, {tower.name}: pooled", given.pooled, states.pooler_output, TOLERANCE)
        else:
            agree(f"{what}, {tower.name}: projected", given.projected, states.text_embeds, TOLERANCE)


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_for_one_text_encoder_matches_diffusers(count: int, tmp_path: Path, agree: Agree) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_file({TOKEN: vectors(count, 48, 0)}, path)
    save_file({"emb_params": vectors(2, 48, 1)}, tmp_path / "easynegative.safetensors")
    theirs, ours = pair((dataclasses.replace(CLIP_L, context=ContextState.LAST),))

    theirs.load_textual_inversion(str(path.parent))
    ours = textual_inversion.add(ours, path)
    check(f"textual inversion of {count}", theirs, ours, agree)

    # A second one, in the form of AUTOMATIC1111's safetensors, called by a bare word that others may contain.
    theirs.load_textual_inversion(load_file(tmp_path / "easynegative.safetensors"), token="easynegative")
    ours = textual_inversion.add(ours, tmp_path / "easynegative.safetensors")
    prompts = ["easynegative", f"EasyNegatives, {TOKEN}.", f"easynegative, {TOKEN}", f"{TOKEN}easynegative"]
    tokens = Tokenizer.of(ours.config.text)
    lower = [prompt.lower() for prompt in prompts]  # diffusers takes one vector of the two where the case differs
    np.testing.assert_array_equal(tokens(lower)["text_encoder"], theirs.tokens(0, lower).numpy())
    np.testing.assert_array_equal(tokens(prompts)["text_encoder"], tokens(lower)["text_encoder"])


def test_an_embedding_for_both_text_encoders_matches_diffusers(tmp_path: Path, agree: Agree) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"clip_l": vectors(4, 48, 0), "clip_g": vectors(4, 64, 1)}, path)
    theirs, ours = pair((CLIP_L, CLIP_G))

    state = load_file(path)
    for number, key in enumerate(("clip_l", "clip_g")):
        tower, words = theirs.towers[number], theirs.tokenizers[number]
        theirs.load_textual_inversion(state[key], token=TOKEN, text_encoder=tower, tokenizer=words)
    ours = textual_inversion.add(ours, path, TOKEN)

    check("SDXL's textual inversion", theirs, ours, agree)


@pytest.mark.slow
def test_the_file_of_a_training_matches_diffusers(tmp_path: Path, agree: Agree) -> None:
    theirs, ours = pair((CLIP_L, CLIP_G))
    settings = TextualInversionConfig(token=TOKEN, vectors=4)
    config = TrainConfig(DataConfig("unused"), model=ours.config, textual_inversion=settings)
    training, mesh = EmbeddingTraining(config, settings), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    trained, _ = training.fresh(ours.params, mesh)
    training.export(training.on_host(trained, mesh), tmp_path / "run.safetensors", 1)

    state = load_file(tmp_path / "run.safetensors")
    for number, key in enumerate(("clip_l", "clip_g")):
        tower, words = theirs.towers[number], theirs.tokenizers[number]
        theirs.load_textual_inversion(state[key], token=TOKEN, text_encoder=tower, tokenizer=words)

    check("textual inversion as trained", theirs, training.merged(ours, trained), agree)


def test_what_is_left_after_a_removal_matches_diffusers(tmp_path: Path, agree: Agree) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file({"<first>": vectors(1, 48, 0)}, first)
    save_file({TOKEN: vectors(2, 48, 1)}, second)
    theirs, ours = pair((CLIP_L,))
    for path in (first, second):
        theirs.load_textual_inversion(load_file(path))
        ours = textual_inversion.add(ours, path)

    theirs.unload_textual_inversion("<first>")
    ours = textual_inversion.remove(ours, "<first>")

    check("one of two removed", theirs, ours, agree)
