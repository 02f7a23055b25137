"""Prompts as users write them: weights in brackets, more than 75 tokens in chunks, and the states of both."""

import dataclasses
import functools
import itertools
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

from sdxl_jax.arrays import Params
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.prompts import CHUNK, LongPrompts, chunk_ends, weighted_texts
from sdxl_jax.conditioning.text import ContextState, PromptTokens, TextConditioning, Tokenizer, Tower
from sdxl_jax.errors import InputError
from sdxl_jax.models import clip

START, END, A, CAT, COMMA = 49406, 49407, 320, 2368, 267
TOWERS = MODEL.text
TOKENIZER = Tokenizer.of(TOWERS)
CHUNKS = LongPrompts.CHUNKS
ODD_PROMPTS = [
    "",
    "a cat",
    "A  CAT!",
    "don't “quote” me…",
    "漢字 🐈 naïve",
    "1,234.5 x-ray (a) [b]",
    "<|endoftext|> again",
    "\\( :) \\",
    "word " * 100,
    "word, " * 100,
]


def contents(tokens: Any) -> list[list[int]]:
    """The tokens of each chunk of one prompt, int32[chunks, 77]: without start, end and padding."""
    rows = tokens.tolist()
    assert all(row[0] == START for row in rows)
    return [row[1 : len(row) - row[::-1].index(END) - 1] if row[-1] != END else _until_end(row) for row in rows]


def _until_end(row: list[int]) -> list[int]:
    """For a tower that pads with the end token: up to the last other token."""
    return row[1 : 1 + max((place for place in range(1, 77) if row[place] != END), default=0)]


def joined(tokens: Any) -> list[int]:
    return [token for chunk in contents(tokens) for token in chunk]


def counts(tokens: Any) -> list[int]:
    return [len(chunk) for chunk in contents(tokens)]


def with_tokens(tower: Tower, *added: str) -> Tower:
    """The tower with added tokens, and as many rows."""
    size = text.FIRST_ADDED + len(added)
    return dataclasses.replace(tower, added_tokens=added, clip=dataclasses.replace(tower.clip, vocabulary=size))


# How weights are written


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("[[cat]]", [("cat", 1 / 1.21)]),
        ("(cat:1.2)", [("cat", 1.2)]),
        ("(cat:.5)", [("cat", 0.5)]),
        ("(cat: +2. )", [("cat", 2)]),
        ("(cat:5e-1)", [("cat", 0.5)]),
        ("(cat:0)", [("cat", 0)]),
        ("(cat:-1)", [("cat", -1)]),
        ("a (red:1.3) car, [old]", [("a ", 1), ("red", 1.3), (" car, ", 1), ("old", 1 / 1.1)]),
        # Within each other they multiply.
        ("((a:1.2) b:0.5)", [("a", 0.6), (" b", 0.5)]),
        ("([a] b)", [("a", 1), (" b", 1.1)]),
        ("(a (b [c]))", [("a ", 1.1), ("b ", 1.21), ("c", 1.1)]),
        # Neighbours of one weight are one piece; brackets of weight 1 or around nothing are as if not there.
        ("(sun:1)flower", [("sunflower", 1)]),
        ("sun()[](:2)flower", [("sunflower", 1)]),
        ("(sun)(flower)", [("sunflower", 1.1)]),
        # A colon without a number and the end after it is text, and so is what is escaped.
        ("a: b, (c:d), (at 10:30am)", [("a: b, ", 1), ("c:d", 1.1), (", ", 1), ("at 10:30am", 1.1)]),
        ("(cat:)", [("cat:", 1.1)]),
        ("10:30 1.5", [("10:30 1.5", 1)]),
        (r"a \(b\) \[c\] d\:e", [("a (b) [c] d:e", 1)]),
        (r"(16\:9)", [("16:9", 1.1)]),
        (r"(a \(b\):1.5)", [("a (b)", 1.5)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"back\slash\n", [(r"back\slash\n", 1)]),
        ("(two\nlines)", [("two\nlines", 1.1)]),
    ],
)
def test_weights_are_read_as_they_are_written(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = weighted_texts(prompt)
    assert [piece.text for piece in found] == [words for words, _ in expected]
    # To the last bit of float32: two roundings of float64 are far below it.
    assert [piece.weight for piece in found] == [float(np.float32(weight)) for _, weight in expected]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat", r"character 3 .* '\.*a \(cat', \( is never closed. Close it, or write \\\("),
        ("(a [cat)", r"character 8 .*\) does not close the \[ at character 4, which is open. Write \\\)"),
        ("[[cat]", r"character 1 .*\[ is never closed"),
        ("cat)", r"character 4 .*\) closes nothing. Write \\\)"),
        ("happy :-)", r"character 9 .*\) closes nothing"),
        ("cat:1.2)", r"character 8 .*\) closes nothing"),
        ("x" * 50 + "]" + "y" * 50, "character 51 .* '…" + "x" * 20 + "]" + "y" * 20 + r"…', \] closes nothing"),
        ("[cat:0.8]", r"character 5 .*0.8 stands in square brackets. Give it in round brackets, \(word:0.8\)"),
        ("[from:to:10]", r"character 9 .*10 stands in square brackets"),
        ("(cat:1,2)", r"character 5 .*1,2 is not a number. Give one such as 1.2, or write \\:"),
        ("(cat:1.2.3)", r"1.2.3 is not a number"),
        ("(cat:--1)", r"--1 is not a number"),
        ("a (at 10:30)", r"character 4 .*the weight is 30. Give −10 to 10 .*, or write \\: for a colon"),
        ("(cat:1e99)", r"the weight is 1e\+99"),
        ("(cat:1e999)", r"the weight is not finite. Give"),
        ("(a (cat:5):-5)", r"character 5 .*the weight is -25"),
        ("(" * 400 + "cat" + ")" * 400, r"character 401 .*the weight is 3.6\d*e\+16"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused_with_the_place(prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        weighted_texts(prompt)
    with pytest.raises(InputError, match=message):
        TOKENIZER.prompts(["fine", prompt], weighted=True)
    TOKENIZER.prompts(["fine", prompt])  # brackets are text by default


# Tokens and their weights


@pytest.mark.parametrize("weighted", [False, True])
def test_one_chunk_has_the_tokens_of_the_plain_tokenizer(weighted: bool) -> None:
    prompts = [prompt for prompt in ODD_PROMPTS if not (weighted and set(prompt) & set("()[]\\"))]
    plain, read = TOKENIZER(prompts), TOKENIZER.prompts(prompts, weighted=weighted)
    assert read.chunks == 1
    for name in plain:
        np.testing.assert_array_equal(read.tokens[name][:, 0], plain[name])
        assert read.tokens[name].dtype == np.int32
    if not weighted:
        assert read.weights is None
        return
    assert read.weights is not None
    for name in plain:
        assert read.weights[name].shape == read.tokens[name].shape
        assert read.weights[name].dtype == np.float32
        assert (read.weights[name] == 1).all()


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a (red:1.3) car, [old]", "a red car, old"),
        ("(a cat), (((on a mat))).", "a cat, on a mat."),
        ("a(cat)!", "a cat!"),
        ('"(cat:0.5)" [it]\'s (a:1.2) dog', '"cat" it\'s a dog'),
        ("(A Cat:1.4),(DOG:0.7),\n[ 漢字 ]", "A Cat,DOG,\n 漢字 "),
        (r"saber \(fate\) (smiling:1.2)", "saber (fate) smiling"),
        ("un(happy:1)", "unhappy"),
        ("(masterpiece:1.2), (best quality:1.2), (8k)", "masterpiece, best quality, 8k"),
    ],
)
def test_brackets_leave_the_tokens_as_they_are(prompt: str, plain: str) -> None:
    read = TOKENIZER.prompts([prompt], weighted=True)
    for name, tokens in TOKENIZER([plain]).items():
        np.testing.assert_array_equal(read.tokens[name][:, 0], tokens)


def test_a_bracket_within_a_word_or_a_run_of_punctuation_divides_it() -> None:
    for prompt, parts in [("(sun)flower", "sun flower"), ("(wow!)!", "wow! !")]:
        found = TOKENIZER.prompts([prompt], weighted=True).tokens
        undivided = TOKENIZER([prompt.replace("(", "").replace(")", "")])["text_encoder"]
        assert not np.array_equal(found["text_encoder"][:, 0], undivided)
        for name, tokens in TOKENIZER([parts]).items():
            np.testing.assert_array_equal(found[name][:, 0], tokens)


def test_every_token_has_its_pieces_weight_and_what_frames_them_has_1() -> None:
    read = TOKENIZER.prompts(["a (red:1.5) cat, ((extraordinarily))", "cat"], weighted=True)
    assert read.weights is not None
    words = TOKENIZER(["extraordinarily"])["text_encoder"][0].tolist().index(END) - 1
    expected = [1, 1, 1.5, 1, 1] + [1.21] * words + [1] * (77 - 5 - words)
    for name in read.tokens:
        np.testing.assert_array_equal(read.weights[name][0, 0], np.array(expected, np.float32))
        np.testing.assert_array_equal(read.weights[name][1], 1)


def test_weights_follow_each_towers_own_words() -> None:
    towers = with_tokens(TOWERS[0], "<tok>", "<tok>_1"), with_tokens(TOWERS[1], "<tok>", "<tok>_1", "<tok>_2")
    read = Tokenizer.of(towers).prompts(["a (<TOK>:1.5) cat"], weighted=True)
    assert read.weights is not None
    assert read.tokens["text_encoder"][0, 0, :6].tolist() == [START, A, 49408, 49409, CAT, END]
    assert read.weights["text_encoder"][0, 0, :6].tolist() == [1, 1, 1.5, 1.5, 1, 1]
    assert read.tokens["text_encoder_2"][0, 0, :7].tolist() == [START, A, 49408, 49409, 49410, CAT, END]
    assert read.weights["text_encoder_2"][0, 0, :7].tolist() == [1, 1, 1.5, 1.5, 1.5, 1, 1]


def test_what_is_cut_is_counted_without_the_brackets() -> None:
    prompts = ["(cat:1.2) " * 80, "cat " * 75, ""]
    assert TOKENIZER.truncated(prompts, weighted=True) == [5, 0, 0]
    assert TOKENIZER.truncated(prompts)[0] > 80, "as text, brackets and numbers are tokens too"
    cut = TOKENIZER.prompts(prompts, weighted=True)
    assert cut.weights is not None
    assert contents(cut.tokens["text_encoder"][0]) == [[CAT] * 75]
    np.testing.assert_array_equal(cut.weights["text_encoder"][0, 0], np.array([1] + [1.2] * 75 + [1], np.float32))


# Chunks


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (0, [0]),
        (1, [1]),
        (74, [74]),
        (75, [75]),
        (76, [75, 1]),
        (150, [75, 75]),
        (151, [75, 75, 1]),
        (400, [75, 75, 75, 75, 75, 25]),
    ],
)
def test_chunks_are_filled_one_after_the_other(words: int, expected: list[int]) -> None:
    read = TOKENIZER.prompts(["cat " * words], CHUNKS)
    assert read.chunks == len(expected)
    for (name, pad, _), chunks in itertools.product(TOKENIZER.towers, [read.tokens]):
        rows = [[START] + [CAT] * count + [END] + [pad] * (75 - count) for count in expected]
        assert chunks[name].tolist() == [rows]


def test_shorter_prompts_are_filled_with_the_empty_prompt() -> None:
    prompts = ["cat " * 151, "cat", "", "cat " * 76]
    read = TOKENIZER.prompts(prompts, CHUNKS, weighted=True)
    more = TOKENIZER.prompts(prompts[1:3], CHUNKS, chunks=3)
    assert (read.chunks, more.chunks) == (3, 3)
    assert TOKENIZER.prompts(prompts, CHUNKS, chunks=2).chunks == 3, "at least so many"
    assert TOKENIZER.prompts(["cat"], chunks=2).chunks == 2
    for name, empty in TOKENIZER([""]).items():
        np.testing.assert_array_equal(read.tokens[name][1, 1:], empty.repeat(2, axis=0))
        np.testing.assert_array_equal(read.tokens[name][2], empty.repeat(3, axis=0))
        np.testing.assert_array_equal(read.tokens[name][3, 2:], empty)
        np.testing.assert_array_equal(more.tokens[name], read.tokens[name][1:3])
        assert read.weights is not None
        assert (read.weights[name] == 1).all()
    assert {chunks.shape for chunks in TOKENIZER.prompts([], CHUNKS).tokens.values()} == {(0, 1, 77)}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # The 56th of 75 is the first of the last 20. The comma stays before the break.
        (55, 100, [56, 75, 25]),
        (54, 100, [75, 75, 5]),
        (74, 1, [75, 1]),
        (75, 1, [75, 2]),
        (60, 14, [75]),
        (60, 15, [61, 15]),
    ],
)
def test_a_chunk_ends_after_a_comma_if_there_is_one_near_its_end(before: int, after: int, expected: list[int]) -> None:
    prompt = "cat " * before + ", " + "cat " * after
    chunks = TOKENIZER.prompts([prompt], CHUNKS).tokens["text_encoder_2"][0]
    assert counts(chunks) == expected
    assert joined(chunks) == [CAT] * before + [COMMA] + [CAT] * after


def test_a_word_is_not_divided_unless_it_fills_a_chunk() -> None:
    word = "pneumonoultramicroscopicsilicovolcanoconiosis"
    (pieces_of_word,) = contents(TOKENIZER.prompts([word]).tokens["text_encoder_2"][0])
    size = len(pieces_of_word)
    assert size > 5
    for before in (75 - size, 75 - size + 1, 74):
        chunks = TOKENIZER.prompts(["cat " * before + word + " cat"], CHUNKS).tokens["text_encoder_2"][0]
        first = before if before + size > 75 else 75
        assert counts(chunks) == [first, before + size + 1 - first]
    endless = TOKENIZER.prompts(["cat " + "漢" * 100], CHUNKS).tokens["text_encoder_2"][0]
    whole = TOKENIZER._tokenised(["cat " + "漢" * 100], False)[()][0][0]
    assert counts(endless)[0] == 1, "what may begin a chunk of its own does so"
    assert set(counts(endless)[1:-1]) == {75}
    assert joined(endless) == whole


def test_the_vectors_of_a_concept_are_not_divided() -> None:
    towers = tuple(with_tokens(tower, "<other>", "<tok>", "<tok>_1", "<tok>_2", "<tok>_3") for tower in TOWERS)
    concept = [49409, 49410, 49411, 49412]
    tokenizer = Tokenizer.of(towers)
    for before, first in [(71, 75), (72, 72), (74, 74), (75, 75)]:
        for written in ("<tok>", "<TOK>"):
            read = tokenizer.prompts(["cat " * before + f"{written} <other>"], CHUNKS)
            for chunks in read.tokens.values():
                assert counts(chunks[0]) == [first, before + 5 - first]
                assert joined(chunks[0]) == [CAT] * before + concept + [49408]
    # Two of them side by side may be parted, and one that fills more than a chunk must be.
    chunks = tokenizer.prompts(["<tok>" * 20], CHUNKS).tokens["text_encoder"][0]
    assert counts(chunks) == [72, 8]
    names = "<big>", *(f"<big>_{number}" for number in range(1, 80))
    large = Tokenizer.of(tuple(with_tokens(tower, *names) for tower in TOWERS))
    assert counts(large.prompts(["<big>"], CHUNKS).tokens["text_encoder"][0]) == [75, 5]


def test_towers_that_differ_in_their_words_have_the_same_number_of_chunks() -> None:
    towers = TOWERS[0], with_tokens(TOWERS[1], "cat", *(f"cat_{number}" for number in range(1, 5)))
    read = Tokenizer.of(towers).prompts(["dog " * 74 + "cat"], CHUNKS, weighted=True)
    assert [counts(chunks[0]) for chunks in read.tokens.values()] == [[75, 0], [74, 5]]


def test_chunk_ends_lose_nothing_whatever_words_and_commas_do() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(0, 500))
        within_words, commas = (rng.random(size) < rng.random() for _ in range(2))
        ends = chunk_ends(within_words.tolist(), commas.tolist())
        lengths = np.diff([0, *ends])
        assert ends[-1] == size
        assert (lengths <= CHUNK).all()
        assert (lengths > 0).all() or ends == [0]


def real_prompts() -> list[str]:
    folder = Path(os.environ.get("SDXL_JAX_TEST_DATA", ""), "prompts")
    files = [folder / name for name in ("dpg_bench_prompts.json", "drawbench_upsampled.txt", "dalle3_eval.txt")]
    if not all(file.is_file() for file in files):
        pytest.skip(f"SDXL_JAX_TEST_DATA names no folder with prompts/{files[0].name} and two more")
    prompts = list(json.loads(files[0].read_text()).values())
    return [*prompts, *(line for file in files[1:] for line in file.read_text().splitlines())]


def test_real_prompts_lose_and_double_no_token() -> None:
    prompts = real_prompts()
    read = TOKENIZER.prompts(prompts, CHUNKS)
    expected = text._encode(prompts, None, ())
    assert read.chunks > 1
    assert sum(len(row) > 77 for row in expected) > 100, "many are longer than a chunk"
    for chunks in read.tokens.values():
        for row, whole in zip(chunks, expected, strict=True):
            assert joined(row) == whole[1:-1]


def test_real_prompts_with_weights_have_the_tokens_of_the_plain_ones() -> None:
    # Every other word in brackets: words stand alone, and what is punctuation goes with the word.
    special = str.maketrans({character: "\\" + character for character in "()[]:\\"})
    prompts = [" ".join(prompt.split()) for prompt in real_prompts()[::4]]
    escaped = [prompt.translate(special).split(" ") for prompt in prompts]
    weighted = [
        " ".join(f"({word}:1.2)" if place % 2 else word for place, word in enumerate(words)) for words in escaped
    ]
    plain = TOKENIZER.prompts(prompts, CHUNKS)
    read = TOKENIZER.prompts(weighted, CHUNKS, weighted=True)
    assert read.weights is not None
    for name in plain.tokens:
        np.testing.assert_array_equal(read.tokens[name], plain.tokens[name])
        assert set(np.unique(read.weights[name])) == {np.float32(1), np.float32(1.2)}
    assert TOKENIZER.truncated(weighted, weighted=True) == TOKENIZER.truncated(prompts)


# States


@pytest.fixture(scope="module")
def params() -> Params:
    """Every parameter random, nothing compiled for it."""
    rng = np.random.default_rng(0)
    shapes = {tower.name: clip.abstract(tower.clip) for tower in TOWERS}
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), shapes)


@functools.partial(jax.jit, static_argnames="towers")
def states(params: Params, prompts: PromptTokens, towers: tuple[Tower, ...] = TOWERS) -> TextConditioning:
    return text.encode_prompts(towers, params, prompts)


plain_states = jax.jit(functools.partial(text.encode, TOWERS))

PROMPTS = ["a cat", "", "cat, " * 60, "a dog " * 20]


def test_one_chunk_without_weights_is_the_plain_states_bit_for_bit(params: Params) -> None:
    expected = plain_states(params, TOKENIZER(PROMPTS))
    given = states(params, TOKENIZER.prompts(PROMPTS))
    assert given.context.shape == (4, 77, 16)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


@pytest.mark.parametrize("state", [ContextState.PENULTIMATE, ContextState.LAST])
def test_where_the_weight_is_1_states_are_the_unweighted_bit_for_bit(state: ContextState, params: Params) -> None:
    towers = tuple(dataclasses.replace(tower, context=state) for tower in TOWERS)
    plain = states(params, TOKENIZER.prompts(["a red cat " * 40, "dog"], CHUNKS), towers)
    read = TOKENIZER.prompts(["a (red:1.3) cat " * 40, "dog"], CHUNKS, weighted=True)
    assert read.weights is not None
    given = states(params, read, towers)
    weights = read.weights["text_encoder"].reshape(2, -1)
    different = (np.asarray(given.context) != np.asarray(plain.context)).any(axis=-1)
    np.testing.assert_array_equal(different, weights != 1)
    assert different.sum() == 40
    np.testing.assert_array_equal(given.pooled, plain.pooled)


def test_a_weight_moves_a_state_away_from_the_empty_prompts_at_the_same_place(params: Params) -> None:
    words = ["red", "blue", "green", "dark"]
    weights = [0, 0.5, -1, 3]
    written = " ".join(f"({word}:{weight})" for word, weight in zip(words, weights, strict=True))
    prompt, weighted = "cat " * 74 + "dog dog " + " ".join(words), "cat " * 74 + "dog dog " + written
    plain = np.asarray(states(params, TOKENIZER.prompts([prompt, "dog"], CHUNKS)).context)[0]
    given = np.asarray(states(params, TOKENIZER.prompts([weighted, "dog"], CHUNKS, weighted=True)).context)[0]
    empty = np.asarray(plain_states(params, TOKENIZER([""])).context)[0]
    first = 77 + 2  # after the start and the second "dog" in the second chunk
    np.testing.assert_array_equal(given[first], empty[2])
    for number, weight in enumerate(weights):
        expected = empty[2 + number] + weight * (plain[first + number] - empty[2 + number])
        assert np.abs(plain[first + number] - empty[2 + number]).max() > 0.1, "there is something to move"
        # One multiplication and two additions in float32 of numbers up to 10.
        np.testing.assert_allclose(given[first + number], expected, rtol=1e-5, atol=1e-5)


def test_every_chunk_has_the_states_of_its_text_alone_and_the_first_gives_the_pooled(params: Params) -> None:
    long = "zebra " + "one two three four five six seven, " * 20 + "eight nine ten " * 20
    read = TOKENIZER.prompts([long, "dog"], CHUNKS)
    given = states(params, read)
    assert given.context.shape == (2, 77 * read.chunks, 16)
    assert given.pooled is not None
    assert read.chunks == 4
    for row in range(2):
        for chunk in range(read.chunks):
            alone = plain_states(params, {name: tokens[row, chunk][None] for name, tokens in read.tokens.items()})
            part = given.context[row, 77 * chunk : 77 * (chunk + 1)]
            # Another batch size may be summed in another order.
            np.testing.assert_allclose(part, alone.context[0], rtol=1e-5, atol=1e-5)
            same = np.allclose(given.pooled[row], alone.pooled[0], rtol=1e-5, atol=1e-5)  # pyright: ignore
            assert same == (chunk == 0)


def test_towers_are_weighted_each_on_its_own_and_a_pooled_vector_is_not_needed(params: Params) -> None:
    prompts = ["a (red:1.3) cat " * 40, "dog"]
    both = states(params, TOKENIZER.prompts(prompts, CHUNKS, weighted=True))
    alone = (TOWERS[0],)
    given = states(params, Tokenizer.of(alone).prompts(prompts, CHUNKS, weighted=True), alone)
    assert given.pooled is None
    np.testing.assert_allclose(given.context, both.context[..., :8], rtol=1e-5, atol=1e-5)


def test_prompts_of_the_same_shape_compile_nothing_new(params: Params) -> None:
    compiled: Any = states
    compiled(params, TOKENIZER.prompts(["a (cat:1.2)"], weighted=True))
    before = compiled._cache_size()
    compiled(params, TOKENIZER.prompts(["[dogs] and ((rabbits:0.5)), but no cat"], weighted=True))
    assert compiled._cache_size() == before


def test_a_copy_for_another_process_reads_the_same() -> None:
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    for one, other in zip(copy.prompts(PROMPTS, CHUNKS), TOKENIZER.prompts(PROMPTS, CHUNKS), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
