"""Textual inversion: which files are read, how they change the model, and how prompts are tokenised afterwards."""

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from tiny import MODEL

from sdxl_jax import __main__, sharding
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer, Tower
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.models import clip
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.sampling.generate import Generated, encode_prompt
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.weights import textual_inversion

START, END, A, CAT, COMMA = 49406, 49407, 320, 2368, 267
FIRST = Tower("text_encoder", ClipTextConfig(8, 2, 2, 16), END)
SECOND = Tower("text_encoder_2", ClipTextConfig(12, 2, 2, 16, Activation.GELU, 8), 0)
ROWS = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)


def make_model(*towers: Tower) -> Model:
    """Text encoders alone, every parameter random, numpy."""
    rng = np.random.default_rng(0)
    shapes = {tower.name: clip.abstract(tower.clip) for tower in towers}
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    return Model(dataclasses.replace(MODEL, text=towers), params)


@pytest.fixture(scope="module")
def sdxl() -> Model:
    return make_model(FIRST, SECOND)


@pytest.fixture(scope="module")
def sd1() -> Model:
    return make_model(FIRST)


def with_tokens(tower: Tower, *added: str) -> Tower:
    """The tower with added tokens, and as many rows."""
    size = text.FIRST_ADDED + len(added)
    return dataclasses.replace(tower, added_tokens=added, clip=dataclasses.replace(tower.clip, vocabulary=size))


def embedding(model: Model, tower: str) -> Any:
    return model.params[tower]["token_embedding"]["embedding"]


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, path)
    return path


def for_sdxl(path: Path, vectors: int = 2) -> Path:
    return write(path, {"clip_l": ROWS[:vectors, :8], "clip_g": ROWS[:vectors, 8:]})


def tokens_of(tower: Tower, *prompts: str) -> list[list[int]]:
    """Without start, end and padding."""
    rows = Tokenizer.of((tower,))(list(prompts))[tower.name].tolist()
    assert all(row[0] == START for row in rows)
    return [row[1 : row.index(END)] for row in rows]


# How prompts are read


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [A, CAT]),
        ("<one>", [49411]),
        ("<tok>", [49408, 49409, 49410]),
        ("a <tok>, a <tok>", [A, 49408, 49409, 49410, COMMA, A, 49408, 49409, 49410]),
        ("<tok>cat<one>", [49408, 49409, 49410, CAT, 49411]),
        ("<tok>_1", [49409]),
        ("A <TOK> <One>", [A, 49408, 49409, 49410, 49411]),
        ("a Big-Toy,", [A, 49412, 49413, COMMA]),
        ("a big-toy,", [A, 49412, 49413, COMMA]),
        ("tok", [27010]),
    ],
)
def test_a_concept_in_a_prompt_becomes_all_of_its_tokens(prompt: str, expected: list[int]) -> None:
    tower = with_tokens(FIRST, "<tok>", "<tok>_1", "<tok>_2", "<one>", "Big-Toy", "Big-Toy_1")
    assert tokens_of(tower, prompt) == [expected]


def test_each_tower_reads_its_own_tokens_and_truncation_counts_them() -> None:
    towers = with_tokens(FIRST, "<tok>", "<tok>_1"), with_tokens(SECOND, "<other>", "<tok>", "<tok>_1", "<tok>_2")
    tokenizer = Tokenizer.of(towers)
    long = "cat " * 73
    prompts = ["<tok>", long, long + "<tok>", "cat"]
    tokens = tokenizer(prompts)
    assert tokens["text_encoder"][0, :5].tolist() == [START, 49408, 49409, END, END]
    assert tokens["text_encoder_2"][0, :6].tolist() == [START, 49409, 49410, 49411, END, 0]
    assert tokens["text_encoder"][2, 73:].tolist() == [CAT, 49408, 49409, END]
    assert tokens["text_encoder_2"][2, 73:].tolist() == [CAT, 49409, 49410, END]
    assert tokenizer.truncated(prompts) == [0, 0, 1, 0]
    assert tokenizer.truncated([]) == []
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    np.testing.assert_array_equal(copy(prompts)["text_encoder_2"], tokens["text_encoder_2"])


def test_added_tokens_do_not_leak_into_other_models() -> None:
    plain = tokens_of(FIRST, "a <tok>")
    assert tokens_of(with_tokens(FIRST, "<tok>"), "a <tok>") != plain
    assert tokens_of(FIRST, "a <tok>") == plain


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (dataclasses.replace(FIRST, added_tokens=("<a>", "<b>")), r"2 added tokens, but .*49408. Set it to 49410"),
        (with_tokens(FIRST, "<a>", "<b>", "<a>"), r"added tokens '<a>', which are repeated, CLIP's own"),
        (with_tokens(FIRST, "<a>", "cat"), r"added tokens 'cat', .* Give each another name"),
        (with_tokens(FIRST, "", " <a>"), r"added tokens '', ' <a>', .* begin or end in a space"),
    ],
)
def test_added_tokens_that_cannot_work_are_refused_with_the_configuration(tower: Tower, message: str) -> None:
    second = MODEL.text[1]
    dataclasses.replace(MODEL, text=(with_tokens(FIRST, "<a>", "<b>"), second)).check()
    with pytest.raises(InputError, match=f"text_encoder has .*{message}"):
        dataclasses.replace(MODEL, text=(tower, second)).check()


# Files


@pytest.mark.parametrize("key", ["<tok>", "emb_params", "clip_l", "clip_g"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_form_of_file_is_read(key: str, dtype: Any, tmp_path: Path) -> None:
    safetensors.flax.save_file({key: jnp.asarray(ROWS, dtype)}, tmp_path / "x.safetensors")
    (found,) = textual_inversion.read(tmp_path / "x.safetensors").items()
    assert found[0] == key
    assert found[1].dtype == np.float32
    np.testing.assert_array_equal(found[1], jnp.asarray(ROWS, dtype).astype(jnp.float32))


def test_a_single_vector_may_have_one_axis(tmp_path: Path) -> None:
    assert textual_inversion.read(write(tmp_path / "x.safetensors", {"<tok>": ROWS[0]}))["<tok>"].shape == (1, 20)
    assert sorted(textual_inversion.read(for_sdxl(tmp_path / "y.safetensors"))) == ["clip_g", "clip_l"]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
def test_pickled_files_are_refused_unread_with_the_reason_and_the_remedy(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pickle, which can run any program .* Convert it to \.safetensors"):
        textual_inversion.read(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"<a>": ROWS, "<b>": ROWS}, r'holds 2 arrays \(<a>, <b>\) and is not .*Expected {"<token>": vectors}'),
        ({str(number): ROWS for number in range(9)}, r"holds 9 arrays \(.* …\)"),
        ({"<a>": np.ones((2, 8), np.int32)}, r"<a> of shape \(2, 8\) and dtype int32. Give"),
        ({"<a>": np.ones((2, 8, 1), np.float32)}, r"<a> of shape \(2, 8, 1\)"),
        ({"<a>": np.ones((0, 8), np.float32)}, r"<a> of shape \(0, 8\)"),
        ({"<a>": np.full((1, 8), np.nan, np.float32)}, r"<a> with non-finite numbers \(NaN or inf\)"),
    ],
)
def test_a_file_of_something_else_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        textual_inversion.read(write(tmp_path / "x.safetensors", arrays))


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = for_sdxl(tmp_path / "whole.safetensors").read_bytes()
    cases = {"cut": whole[:-7], "empty": b"", "text": b"no safetensors at all"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in [*cases, "absent.safetensors", "."]:
        with pytest.raises(InputError, match="cannot be read as a safetensors file"):
            textual_inversion.read(tmp_path / name)


# The model


def test_a_concept_is_added_to_every_text_encoder_of_a_new_model(sdxl: Model, tmp_path: Path) -> None:
    before = {tower: embedding(sdxl, tower).copy() for tower in sdxl.params}
    model = textual_inversion.add(sdxl, for_sdxl(tmp_path / "my-style.safetensors", 3))
    for number, rows in enumerate((ROWS[:, :8], ROWS[:, 8:])):
        tower = model.config.text[number]
        assert tower.added_tokens == ("my-style", "my-style_1", "my-style_2")
        assert tower.clip.vocabulary == 49411
        np.testing.assert_array_equal(embedding(model, tower.name)[:49408], before[tower.name])
        np.testing.assert_array_equal(embedding(model, tower.name)[49408:], rows)
        np.testing.assert_array_equal(embedding(sdxl, tower.name), before[tower.name])
        old, new = sdxl.params[tower.name], model.params[tower.name]
        assert all(new[key] is old[key] for key in old if key != "token_embedding"), "nothing is copied"
    assert textual_inversion.names(model) == {"my-style": 3}
    assert textual_inversion.names(sdxl) == {}


@pytest.mark.parametrize(
    ("key", "token", "expected"),
    [
        ("<tok>", None, "<tok>"),
        ("<tok>", "<mine>", "<mine>"),
        ("emb_params", None, "the-file.v2"),
        ("emb_params", "<mine>", "<mine>"),
        ("clip_l", None, "the-file.v2"),
    ],
)
def test_a_concept_is_called_as_asked_or_as_the_file_says(
    key: str, token: str | None, expected: str, sd1: Model, tmp_path: Path
) -> None:
    model = textual_inversion.add(sd1, write(tmp_path / "the-file.v2.safetensors", {key: ROWS[:1, :8]}), token)
    assert textual_inversion.names(model) == {expected: 1}


def test_embeddings_that_travel_in_a_lora_are_found_by_their_name(sdxl: Model, tmp_path: Path) -> None:
    tensors = {"unet.x.lora_down.weight": ROWS}
    for name, rows in (("<a.fox>", ROWS[:1]), ("zz9", ROWS[:2])):
        tensors |= {f"bundle_emb.{name}.clip_l": rows[:, :8], f"bundle_emb.{name}.clip_g": rows[:, 8:]}
    path = write(tmp_path / "x.safetensors", tensors)
    assert textual_inversion.names(textual_inversion.add(sdxl, path, "<a.fox>")) == {"<a.fox>": 1}
    assert textual_inversion.names(textual_inversion.add(sdxl, path, "<zz9>")) == {"<zz9>": 2}
    with pytest.raises(
        InputError, match=r"several embeddings: <a\.fox>, zz9\. Give the name .*: --embedding .*:<a\.fox>"
    ):
        textual_inversion.add(sdxl, path)
    one = write(tmp_path / "one.safetensors", {name: value for name, value in tensors.items() if "zz9" not in name})
    assert textual_inversion.names(textual_inversion.add(sdxl, one)) == {"<a.fox>": 1}
    assert textual_inversion.names(textual_inversion.add(sdxl, one, "<mine>")) == {"<mine>": 1}


def test_rows_have_the_dtype_and_the_place_of_those_that_were_there(sd1: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"<tok>": ROWS[:2, :8]})
    mesh = sharding.make_mesh(MeshConfig())
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    placed = Model(sd1.config, jax.tree.map(lambda leaf: leaf, sd1.params))
    old = jax.device_put(jnp.asarray(embedding(sd1, "text_encoder"), jnp.bfloat16), place)
    placed.params["text_encoder"]["token_embedding"]["embedding"] = old
    for model in (
        textual_inversion.add(placed, path),
        textual_inversion.remove(textual_inversion.add(placed, path), "<tok>"),
    ):
        assert embedding(model, "text_encoder").dtype == jnp.bfloat16
        assert embedding(model, "text_encoder").sharding == place
    process = textual_inversion.add(sd1, path)
    assert isinstance(embedding(process, "text_encoder"), np.ndarray)
    assert embedding(textual_inversion.remove(process, "<tok>"), "text_encoder").dtype == np.float32


def test_the_refiner_reads_its_half_of_a_file_of_two(tmp_path: Path) -> None:
    refiner = make_model(SECOND)
    model = textual_inversion.add(refiner, for_sdxl(tmp_path / "x.safetensors"), "<tok>")
    np.testing.assert_array_equal(embedding(model, "text_encoder_2")[49408:], ROWS[:2, 8:])


def test_a_concept_that_equals_known_words_says_what_they_say(sdxl: Model, tmp_path: Path) -> None:
    # Vectors of "a" and "cat" under another name: the same states, pooled at the same end of text.
    halves = {key: embedding(sdxl, tower)[[A, CAT]] for key, tower in textual_inversion.TOWERS.items()}
    model = textual_inversion.add(sdxl, write(tmp_path / "x.safetensors", halves), "<tok>")
    expected = encode_prompt(sdxl, ["a cat", "a cat, a cat"])
    given = encode_prompt(model, ["<tok>", "<TOK>,<tok>"])
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_concept_that_is_removed_leaves_the_others_as_they_were(sdxl: Model, tmp_path: Path) -> None:
    one, two = for_sdxl(tmp_path / "one.safetensors", 3), for_sdxl(tmp_path / "two.safetensors", 2)
    both = textual_inversion.add(textual_inversion.add(sdxl, one, "<one>"), two, "<two>")
    assert textual_inversion.names(both) == {"<one>": 3, "<two>": 2}
    for gone, rest, path in (("<one>", "<two>", two), ("<two>", "<one>", one)):
        model, alone = textual_inversion.remove(both, gone), textual_inversion.add(sdxl, path, rest)
        assert model.config == alone.config
        jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)
    none = textual_inversion.remove(textual_inversion.remove(both, "<one>"), "<two>")
    assert none.config == sdxl.config
    jax.tree.map(np.testing.assert_array_equal, none.params, sdxl.params)


@pytest.mark.parametrize("token", ["<ome>", "<one>_1", ""])
def test_removing_what_is_not_there_lists_what_is(token: str, sdxl: Model, tmp_path: Path) -> None:
    path = for_sdxl(tmp_path / "x.safetensors")
    model = textual_inversion.add(textual_inversion.add(sdxl, path, "<other>"), path, "<one>")
    listed = "<one>, <other>" if token else "<o.*>, <o.*>"
    with pytest.raises(InputError, match=f"no textual inversion {token!r}. Give one of \\(nearest first\\): {listed}"):
        textual_inversion.remove(model, token)
    with pytest.raises(InputError, match="It has none"):
        textual_inversion.remove(sdxl, token)


# Refused


def test_a_file_of_another_family_is_refused_with_both_widths(sdxl: Model, sd1: Model, tmp_path: Path) -> None:
    sd2 = write(tmp_path / "sd2.safetensors", {"<tok>": ROWS[:, :10]})
    larger = write(tmp_path / "larger.safetensors", {"clip_l": ROWS[:, :8], "clip_g": ROWS[:, :16]})
    both = for_sdxl(tmp_path / "sdxl.safetensors")
    for model, path, held, expected in [
        (sd1, sd2, "<tok> 10", "text_encoder 8"),
        (sdxl, sd2, "<tok> 10", "text_encoder 8, text_encoder_2 12"),
        (sdxl, larger, "clip_g 16.*", "text_encoder 8, text_encoder_2 12"),
        (sd1, both, "clip_g 12, clip_l 8", "text_encoder 8"),
        (make_model(SECOND), larger, "clip_g 16.*", "text_encoder_2 12"),
    ]:
        message = f"{path.name} was made for another family .* vectors are .*{held}, .* text encoders {expected}"
        with pytest.raises(InputError, match=message):
            textual_inversion.add(model, path, "<tok>")


@pytest.mark.parametrize(
    ("key", "columns", "given", "missing"),
    [
        ("<tok>", slice(0, 8), "text_encoder", "text_encoder_2"),
        ("emb_params", slice(8, 20), "text_encoder_2", "text_encoder"),
        ("clip_l", slice(0, 8), "text_encoder", "text_encoder_2"),
        ("clip_g", slice(8, 20), "text_encoder_2", "text_encoder"),
    ],
)
def test_a_file_for_one_of_two_text_encoders_is_refused_by_the_others_name(
    key: str, columns: slice, given: str, missing: str, sdxl: Model, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", {key: ROWS[:, columns]})
    with pytest.raises(InputError, match=f"vectors for {given}, but none for this model's {missing}. Use one"):
        textual_inversion.add(sdxl, path, "<tok>")


@pytest.mark.parametrize(
    ("there", "token", "vectors"),
    [
        ("<tok>", "<tok>", 1),
        ("<Tok>", "<tOK>", 2),
        ("<tok>", "<tok>_1", 1),  # would be a second vector of <tok>
        ("<tok>_1", "<tok>", 1),  # the other way round
        ("<tok>_1", "<tok>", 2),
    ],
)
def test_a_token_that_is_there_already_is_refused(
    there: str, token: str, vectors: int, sdxl: Model, tmp_path: Path
) -> None:
    path = for_sdxl(tmp_path / "x.safetensors", vectors)
    model = textual_inversion.add(sdxl, for_sdxl(tmp_path / "first.safetensors", 1), there)
    with pytest.raises(
        InputError, match=f'already has a token {token!r}.* it has {there}. Give .*token="…".*FILE:NAME'
    ):
        textual_inversion.add(model, path, token)
    assert textual_inversion.names(textual_inversion.add(model, path, "<new>")) == {there: 1, "<new>": vectors}


@pytest.mark.parametrize("token", ["cat", "cat</w>", "<|endoftext|>", "", " <tok>", "<tok>\n"])
def test_a_token_that_clip_knows_or_that_cannot_be_found_is_refused(token: str, sdxl: Model, tmp_path: Path) -> None:
    path = for_sdxl(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors cannot have the token .* Give another name"):
        textual_inversion.add(sdxl, path, token)


# The command line


def test_sample_draws_with_the_embeddings_it_is_given(
    sdxl: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = []

    def generate(model: Model, prompts: list[str], **options: object) -> Generated:
        used.append(model)
        return Generated(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 1, 1, 4), np.float32))

    monkeypatch.setattr("sdxl_jax.weights.open.open_model", lambda *_: SimpleNamespace(config=sdxl.config))
    monkeypatch.setattr("sdxl_jax.weights.load.load_weights", lambda *_: sdxl)
    monkeypatch.setattr("sdxl_jax.sampling.generate.generate", generate)
    one, two = for_sdxl(tmp_path / "one.safetensors", 1), for_sdxl(tmp_path / "two:2.safetensors", 2)
    command = ["sample", str(tmp_path), "--prompt", "a <x>", "--out", str(tmp_path / "out"), "--embedding"]
    assert __main__.main([*command, f"{one}:<x>", "--embedding", str(two), "--embedding", f"{two}:<y>"]) == 0
    assert textual_inversion.names(used[0]) == {"<x>": 1, "two:2": 2, "<y>": 2}
    assert __main__.main([*command, f"{tmp_path / 'absent.safetensors'}:<x>", "--overwrite"]) == 2
    assert "absent.safetensors cannot be read as a safetensors file" in capsys.readouterr().err
