"""What the UNet is conditioned on: token ids, text states, and the numbers of sizes and crops."""

import dataclasses
import functools
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL

from sdxl_jax import model as models
from sdxl_jax.arrays import MicroConditioning, Params
from sdxl_jax.conditioning import micro, text
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.text import SDXL_BASE_TEXT, ContextState, TextConditioning, Tokenizer, Tower, can_be_added
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models import clip, initialisers
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.layers import Compute, Dtype, EmbeddingMlp

PRESETS = {"SDXL base": SDXL_BASE, "SDXL refiner": SDXL_REFINER, "SD 1.x": SD1, "SD 2.x": SD2}
START, END = 49406, 49407
ODD_PROMPTS = [
    "",
    "a cat",
    "A  CAT!",
    "don't “quote” me…",
    "漢字 🐈 naïve",
    "1,234.5 x-ray",
    "<|endoftext|> again",
    "word " * 100,
]


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(SDXL_BASE.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped vocabulary as `vocab.json` and `merges.txt`, as OpenAI numbers it: bytes, bytes that end a word,
    merges, and the two special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = gzip.decompress(Path(text.__file__).with_name("clip_merges.txt.gz").read_bytes()).decode().splitlines()
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    words = characters + [character + "</w>" for character in characters]
    words += [line.replace(" ", "") for line in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def test_shipped_vocabulary_is_clips(folder: Path, tokenizer: Tokenizer) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert len(vocabulary) == 49408
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (START, END)
    tokens = tokenizer(["a cat"])["text_encoder"][0]
    assert tokens[:4].tolist() == [START, vocabulary["a</w>"], vocabulary["cat</w>"], END] == [START, 320, 2368, END]


def test_a_prompt_is_start_words_end_and_each_towers_own_padding(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(ODD_PROMPTS)
    assert list(tokens) == ["text_encoder", "text_encoder_2"]
    for name, pad in {"text_encoder": END, "text_encoder_2": 0}.items():
        assert tokens[name].shape == (len(ODD_PROMPTS), 77)
        assert tokens[name].dtype == np.int32
        assert (tokens[name][:, 0] == START).all()
        assert tokens[name][1].tolist() == [START, 320, 2368, END] + [pad] * 73
        assert tokens[name][0].tolist() == [START, END] + [pad] * 75
    # The towers read the same words: only after the end do they differ.
    for row in range(len(ODD_PROMPTS)):
        one, two = tokens["text_encoder"][row], tokens["text_encoder_2"][row]
        different = np.flatnonzero(one != two)
        assert (different > np.argmax(one == END)).all()
        assert (one[different] == END).all()
        assert (two[different] == 0).all()


def test_a_long_prompt_keeps_its_end_and_says_what_was_cut(tokenizer: Tokenizer) -> None:
    word = "cat "
    counts = [0, 1, 74, 75, 76, 77, 200]
    prompts = [word * count for count in counts]
    for tokens in tokenizer(prompts).values():
        for row, count in zip(tokens, counts, strict=True):
            kept = min(count, 75)
            assert (row[1 : 1 + kept] == 2368).all()
            assert row[1 + kept] == END
    assert tokenizer.truncated(prompts) == [max(0, count - 75) for count in counts]


def test_no_prompts_give_no_rows(tokenizer: Tokenizer) -> None:
    assert tokenizer.truncated([]) == []
    assert {tokens.shape for tokens in tokenizer([]).values()} == {(0, 77)}


def test_a_folders_vocabulary_gives_the_same_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.of(SDXL_BASE.text, str(folder))
    for name, tokens in other(ODD_PROMPTS).items():
        np.testing.assert_array_equal(tokens, tokenizer(ODD_PROMPTS)[name])
    assert other.truncated(ODD_PROMPTS) == tokenizer.truncated(ODD_PROMPTS)


@pytest.mark.parametrize("missing", [("merges.txt",), ("vocab.json",), ("vocab.json", "merges.txt")])
def test_a_folder_without_a_file_is_refused_by_the_files_name(missing: tuple[str, ...], tmp_path: Path) -> None:
    for name in {"vocab.json", "merges.txt"} - set(missing):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError) as caught:
        Tokenizer.of(SDXL_BASE.text, str(tmp_path))(["a cat"])
    for name in ("vocab.json", "merges.txt"):
        assert (f"no {name}" in str(caught.value)) == (name in missing)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_pickles_for_the_data_workers(tokenizer: Tokenizer) -> None:
    stored = pickle.dumps(tokenizer)
    assert len(stored) < 1000, "the vocabulary does not travel"
    copy = pickle.loads(stored)
    assert copy == tokenizer
    for name, tokens in copy(ODD_PROMPTS).items():
        np.testing.assert_array_equal(tokens, tokenizer(ODD_PROMPTS)[name])


@pytest.mark.parametrize("vocabulary", ["shipped", "tokenizer", "tokenizer_2"])
def test_tokens_of_1837_prompts_match_transformers(vocabulary: str) -> None:
    root = os.environ.get("SDXL_JAX_TEST_DATA")
    path = Path(root or "", "clip_tokenizer")
    if not root or not (path / "clip_tokens_reference.json").is_file():
        pytest.skip("set SDXL_JAX_TEST_DATA to a folder with clip_tokenizer/clip_tokens_reference.json")
    reference = json.loads((path / "clip_tokens_reference.json").read_text())
    prompts, expected = reference["prompts"], reference["transformers_fast_v4_and_v5"]
    assert len(prompts) == len(expected) == 1837

    ours = Tokenizer.of(SDXL_BASE.text, None if vocabulary == "shipped" else str(path / vocabulary))(prompts)

    for tokens in ours.values():
        # The reference ends with the first end-of-text, which three prompts have in their midst.
        to_first_end = [row[: row.index(END) + 1] for row in tokens.tolist()]
        wrong = [prompt for prompt, one, other in zip(prompts, to_first_end, expected, strict=True) if one != other]
        assert not wrong


# Sizes and crops


def geometry(count: int = 3, seed: int = 0) -> MicroConditioning:
    rng = np.random.default_rng(seed)
    pairs = [rng.integers(1, 8193, (count, 2), np.int32) for _ in range(3)]
    return MicroConditioning(pairs[0], pairs[1], pairs[2], rng.uniform(1, 10, count).astype(np.float32))


def embedded(number: Any, dim: int = 256) -> np.ndarray:
    """[cos, sin] of number · 10000^(−i/half), in float64."""
    angles = float(number) * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)])


def expected_vector(numbers: Numbers, pooled: np.ndarray, sizes: MicroConditioning) -> np.ndarray:
    """The vector, in the order in which SDXL's authors wrote it down, in float64."""
    rows = []
    for row, start in enumerate(pooled):
        (height, width), (top, left) = sizes.original_size[row], sizes.crop_top_left[row]
        assert sizes.aesthetic_score is not None
        last = sizes.target_size[row] if numbers is Numbers.SIZE_CROP_TARGET else [sizes.aesthetic_score[row]]
        rows.append(np.concatenate([start, *map(embedded, [height, width, top, left, *last])]))
    return np.stack(rows)


# float32 angles of up to 8192 are off by up to 8192 · 6e-8, twice: a frequency and a product. A number that was
# rounded, as bfloat16 does it, is off by 1 in its first angle, and by 0.8 in its first cosine or sine.
ANGLE_TOLERANCE = 2e-3


@pytest.mark.parametrize(("numbers", "width"), [(Numbers.SIZE_CROP_TARGET, 2816), (Numbers.SIZE_CROP_AESTHETIC, 2560)])
def test_the_vector_is_the_pooled_text_and_each_number_in_sdxls_order(numbers: Numbers, width: int) -> None:
    # Other trainers feed sizes as (width, height), or the crop on the wrong axis.
    pooled, sizes = np.random.default_rng(1).standard_normal((3, 1280), np.float32), geometry()
    vector = micro.vector(MicroConfig(numbers), jnp.asarray(pooled), sizes)
    assert vector.shape == (3, width) == (3, 1280 + MicroConfig(numbers).vector_dim)
    assert vector.dtype == jnp.float32
    np.testing.assert_array_equal(vector[:, :1280], pooled)
    np.testing.assert_allclose(vector, expected_vector(numbers, pooled, sizes), atol=ANGLE_TOLERANCE)


def test_every_integer_up_to_8192_arrives_exactly() -> None:
    # Other trainers cast sizes to bfloat16 before the embedding: 333 becomes 332, 1023 becomes 1024.
    every = np.arange(8193, dtype=np.int32)
    pairs = np.stack([every, every[::-1]], axis=1)
    sizes = MicroConditioning(pairs, pairs, pairs)
    vector = np.asarray(micro.vector(MicroConfig(), jnp.zeros((8193, 0)), sizes)).reshape(8193, 6, 256)
    expected = np.stack([embedded(number) for number in every])
    np.testing.assert_allclose(vector[:, 0], expected, atol=ANGLE_TOLERANCE)
    np.testing.assert_allclose(vector[:, 1], expected[::-1], atol=ANGLE_TOLERANCE)
    neighbours = np.abs(np.diff(expected, axis=0)).max(axis=1)
    assert neighbours.min() > 100 * ANGLE_TOLERANCE, "the tolerance distinguishes every integer from the next"


def test_333_is_not_332_when_the_network_computes_in_bfloat16() -> None:
    assert jnp.bfloat16(333) == jnp.bfloat16(332), "the trap is there"
    mlp = EmbeddingMlp(16, Compute(dtype=Dtype.BFLOAT16))
    pairs = np.array([[333, 500], [332, 500]], np.int32)
    condition = models.condition(
        dataclasses.replace(MODEL, micro=MicroConfig()),
        TextConditioning(jnp.zeros((2, 77, 16)), jnp.zeros((2, 8))),
        MicroConditioning(pairs, pairs, pairs),
    )
    assert condition.vector is not None
    assert condition.vector.dtype == jnp.float32
    declared = initialisers.abstract(mlp, jax.ShapeDtypeStruct(condition.vector.shape, jnp.float32))
    params = jax.tree_util.tree_map_with_path(lambda path, one: initialisers.sample(one, 0, str(path)), declared)
    outputs: Any = mlp.apply({"params": params}, condition.vector)
    scale = float(jnp.abs(outputs).max())
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 0.05 * scale


def test_each_number_has_a_place_of_its_own_in_the_vector() -> None:
    fields = ("original_size", "crop_top_left", "target_size")
    base = MicroConditioning(*(np.full((1, 2), 64, np.int32) for _ in fields))
    before = np.asarray(micro.vector(MicroConfig(), jnp.zeros((1, 5)), base))[0]
    places = []
    for field in fields:
        for axis in (0, 1):
            pair = np.full((1, 2), 64, np.int32)
            pair[0, axis] = 333
            after = np.asarray(micro.vector(MicroConfig(), jnp.zeros((1, 5)), base._replace(**{field: pair})))[0]
            changed = np.flatnonzero(after != before)
            places.append({int(place - 5) // 256 for place in changed})
    assert places == [{0}, {1}, {2}, {3}, {4}, {5}]


# Text states


def random_tower(config: ClipTextConfig, seed: int) -> Params:
    """Every parameter random, nothing compiled for it."""
    rng = np.random.default_rng(seed)
    shapes = clip.abstract(config)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), shapes)


@pytest.fixture(scope="module")
def towers() -> tuple[Tower, ...]:
    """Two towers of different width, so that no shapes match by chance."""
    first = Tower("text_encoder", ClipTextConfig(8, 3, 2, 16), END)
    return (first, Tower("text_encoder_2", ClipTextConfig(12, 3, 2, 16, Activation.GELU, 10), 0))


@pytest.fixture(scope="module")
def states(towers: tuple[Tower, ...], tokenizer: Tokenizer) -> tuple[dict[str, Any], Params, dict[str, np.ndarray]]:
    """Each tower's states on its own, its parameters, and the tokens."""
    tokens = tokenizer(["a cat", "", "word " * 100])
    params = {tower.name: random_tower(tower.clip, seed) for seed, tower in enumerate(towers)}
    alone = {each.name: clip.apply(each.clip, params[each.name], jnp.asarray(tokens[each.name])) for each in towers}
    return alone, params, tokens


def test_context_joins_the_towers_in_order_and_the_last_gives_the_pooled(towers: Any, states: Any) -> None:
    alone, params, tokens = states
    condition = text.encode(towers, params, tokens)
    first, second = alone["text_encoder"], alone["text_encoder_2"]
    assert condition.context is not None and condition.context.shape == (3, 77, 8 + 12)
    # The same programs, run again: bit for bit.
    np.testing.assert_array_equal(condition.context[..., :8], first.penultimate)
    np.testing.assert_array_equal(condition.context[..., 8:], second.penultimate)
    np.testing.assert_array_equal(condition.pooled, second.projected)
    assert not np.allclose(first.penultimate, first.last, atol=0.01), "the states that must not be mixed up differ"


@pytest.mark.parametrize("choice", ContextState)
def test_each_tower_gives_the_state_that_is_chosen_for_it(choice: ContextState, towers: Any, states: Any) -> None:
    alone, params, tokens = states
    chosen = dataclasses.replace(towers[0], context=choice)
    condition = text.encode((chosen,), params, tokens)
    np.testing.assert_array_equal(condition.context, getattr(alone["text_encoder"], choice.value))
    assert condition.pooled is None
    mixed = text.encode((towers[1], chosen), params, tokens)
    assert condition.context is not None and mixed.context is not None
    np.testing.assert_array_equal(mixed.context[..., :12], alone["text_encoder_2"].penultimate)
    np.testing.assert_array_equal(mixed.context[..., 12:], condition.context)


def test_presets_read_the_states_that_their_weights_were_trained_with() -> None:
    chosen = {name: [tower.context for tower in preset.text] for name, preset in PRESETS.items()}
    assert chosen == {
        "SDXL base": [ContextState.PENULTIMATE, ContextState.PENULTIMATE],
        "SDXL refiner": [ContextState.PENULTIMATE],
        "SD 1.x": [ContextState.LAST],
        "SD 2.x": [ContextState.PENULTIMATE_NORMED],
    }


# Caption dropout


def prompts_of(count: int) -> TextConditioning:
    """Text states that identify their example."""
    number = jnp.arange(1.0, count + 1)
    return TextConditioning(
        jnp.broadcast_to(number[:, None, None], (count, 77, 4)), jnp.broadcast_to(number[:, None], (count, 8))
    )


NOTHING = TextConditioning(jnp.full((1, 77, 4), -1.0), jnp.full((1, 8), -1.0))


def keys_of(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def is_dropped(condition: TextConditioning) -> np.ndarray:
    """Whether each example is dropped; fails if one is dropped in part, or replaced by another."""
    context, pooled = np.asarray(condition.context), np.asarray(condition.pooled)
    number = np.arange(1.0, len(pooled) + 1)
    dropped = pooled[:, 0] == -1
    expected = np.where(dropped, -1, number)
    np.testing.assert_array_equal(pooled, np.broadcast_to(expected[:, None], pooled.shape))
    np.testing.assert_array_equal(context, np.broadcast_to(expected[:, None, None], context.shape))
    return dropped


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_caption_dropout_drops_its_share_and_an_example_as_a_whole(probability: float) -> None:
    dropped = is_dropped(text.drop(prompts_of(4000), NOTHING, keys_of(4000), probability))
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert dropped.mean() == pytest.approx(probability, abs=5 * error)  # five standard errors; none at 0 and 1


def test_caption_dropout_is_drawn_again_with_other_keys() -> None:
    # A cache elsewhere freezes it: the same captions are missing in every epoch.
    first, second = (is_dropped(text.drop(prompts_of(500), NOTHING, keys_of(500, seed), 0.5)) for seed in (0, 1))
    assert 150 < (first != second).sum() < 350  # 250 are expected, with a standard deviation of 11
    again = is_dropped(text.drop(prompts_of(500), NOTHING, keys_of(500, 0), 0.5))
    np.testing.assert_array_equal(first, again)


def test_an_example_is_dropped_or_not_whatever_its_batch() -> None:
    whole = is_dropped(text.drop(prompts_of(500), NOTHING, keys_of(500), 0.5))
    # Other rows than the first: these would be the same even if they were drawn by their place in the batch.
    part = text.drop(prompts_of(250), NOTHING, keys_of(500)[100:350], 0.5)
    np.testing.assert_array_equal(is_dropped(part), whole[100:350])


def test_a_dropped_caption_is_zero_embeddings_and_leaves_the_sizes_alone() -> None:
    # Elsewhere the condition is dropped by zeroing the numbers: a size of 0 has an embedding that is not 0.
    config = dataclasses.replace(MODEL, micro=MicroConfig())
    prompt, sizes = prompts_of(3), geometry()
    dropped = text.drop(prompt, text.zeros_like(NOTHING), keys_of(3), 1.0)
    kept, without = (models.condition(config, each, sizes) for each in (prompt, dropped))
    assert kept.vector is not None
    assert without.vector is not None
    np.testing.assert_array_equal(without.context, 0)
    np.testing.assert_array_equal(without.vector[:, :8], 0)
    np.testing.assert_array_equal(without.vector[:, 8:], kept.vector[:, 8:])
    zeros = MicroConditioning(*(np.zeros((3, 2), np.int32) for _ in range(3)))
    assert not np.allclose(models.condition(config, dropped, zeros).vector[:, 8:], 0)  # pyright: ignore


def test_without_a_prompt_sdxl_is_told_zeros_and_other_models_the_empty_prompt(
    towers: Any, states: Any, tokenizer: Tokenizer
) -> None:
    _, params, _ = states
    empty = tokenizer([""])
    expected = text.encode(towers, params, empty)
    for unconditional in models.UnconditionalKind:
        config = dataclasses.replace(MODEL, text=towers, unconditional=unconditional)
        nothing = models.unconditional_text(config, params, empty, Compute())
        for ours, encoded in zip(nothing, expected, strict=True):
            assert np.abs(np.asarray(encoded)).max() > 0.1
            np.testing.assert_array_equal(ours, 0 if unconditional is not models.UnconditionalKind.EMPTY else encoded)


# The parts of a model fit together


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together_at_full_size(name: str) -> None:
    config = PRESETS[name]
    config.check()

    def told_to_the_unet(params: Params) -> tuple[Any, jax.Array | None]:
        tokens = {tower.name: jnp.full((1, 77), END, jnp.int32) for tower in config.text}
        pair = jnp.ones((1, 2), jnp.int32)
        sizes = MicroConditioning(pair, pair, pair, jnp.ones(1))
        condition = models.condition(config, text.encode(config.text, params, tokens), sizes)
        return condition.context, condition.vector

    params = {tower.name: clip.abstract(tower.clip) for tower in config.text}
    context, vector = jax.eval_shape(told_to_the_unet, params)  # only shapes are traced
    assert context.shape == (1, 77, config.unet.context_dim)
    assert (None if vector is None else vector.shape[1]) == config.unet.vector_dim


def test_presets_have_the_published_widths() -> None:
    widths = {name: (preset.unet.context_dim, preset.unet.vector_dim) for name, preset in PRESETS.items()}
    assert widths == {
        "SDXL base": (2048, 2816),
        "SDXL refiner": (1280, 2560),
        "SD 1.x": (768, None),
        "SD 2.x": (1024, None),
    }
    scales = {name: preset.vae.scale for name, preset in PRESETS.items()}
    assert scales == {"SDXL base": 0.13025, "SDXL refiner": 0.13025, "SD 1.x": 0.18215, "SD 2.x": 0.18215}


def changed(part: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(MODEL, **{part: dataclasses.replace(getattr(MODEL, part), **changes)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("unet", context_dim=24), r"model.unet.context_dim=24, .* have a width of 16. Set it to 16"),
        (changed("unet", vector_dim=31), r"model.unet.vector_dim=31, .* a width of 32 together. Set it to 32"),
        (changed("micro", numbers=Numbers.SIZE_CROP_AESTHETIC), r"model.unet.vector_dim=32, .* Set it to 28"),
        (
            dataclasses.replace(MODEL, micro=None),
            r"model.unet.vector_dim=32, but .* no micro-conditioning. Set it to None",
        ),
        (changed("vae", latent_channels=8), r"model.vae.latent_channels=8 and model.unet.out_channels=4 differ"),
        (changed("unet", groups=3), "model.unet.block_channels has 8, 16, not divisible by model.unet.groups=3"),
        (changed("vae", groups=3), "model.vae.block_channels has 4, 4, 4, 4, not divisible by model.vae.groups=3"),
        (
            changed("unet", heads=(1, 2, 2)),
            "block_channels, transformer_depth and heads have 2, 2, 3 numbers. Give each",
        ),
        (changed("schedule", zero_terminal_snr=True), r"zero_terminal_snr=True.*Set model.prediction=v_prediction"),
    ],
)
def test_parts_that_do_not_fit_are_named_with_the_remedy(config: ModelConfig, message: str) -> None:
    MODEL.check()
    with pytest.raises(InputError, match=message):
        config.check()


@pytest.mark.parametrize("given", ["caf\udce9", "\ud83d", "a \ude00"])
def test_what_is_not_utf_8_is_refused_wherever_texts_become_tokens(given: str) -> None:
    tokenizer = Tokenizer.of(SDXL_BASE_TEXT)
    for encode in (
        tokenizer,
        tokenizer.prompts,
        tokenizer.truncated,
        functools.partial(tokenizer.prompts, weighted=True),
    ):
        with pytest.raises(InputError, match="A prompt is not UTF-8 text, at character"):
            encode(["a cat", given])
    assert not can_be_added(given)
