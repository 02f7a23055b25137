"""Training of a new token: its vectors alone learn, a run resumes bit for bit, and the files have what was trained."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh
from PIL import Image
from safetensors import safe_open
from test_adapter_training import STEPS, assert_resumes, train

from sdxl_jax import __main__, sharding
from sdxl_jax.adapters import embeddings
from sdxl_jax.adapters.embeddings import TABLE, Norm, TextualInversionConfig
from sdxl_jax.adapters.targets import AdapterConfig, FileDtype
from sdxl_jax.arrays import BaseDtype, flatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import TrainConfig, blocking_differences
from sdxl_jax.data.mixture import Source, Target
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig, OptimiserKind
from sdxl_jax.sharding import AXES, MeshConfig
from sdxl_jax.training import checkpoint
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.textual_inversion import EMBEDDINGS, EmbeddingTraining
from sdxl_jax.weights import lora, textual_inversion
from sdxl_jax.weights.adapter_files import reading
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.eight_bits import is_quantised
from sdxl_jax.weights.load import load_model

pytestmark = pytest.mark.usefixtures("shared_steps", "quick_compilation")

DOG = 1929
MODEL = dataclasses.replace(
    tiny.MODEL,
    unet=dataclasses.replace(
        tiny.MODEL.unet, block_channels=(8,), transformer_depth=(0,), heads=(1,), in_channels=12, out_channels=12
    ),
    vae=WaveletConfig(),
)
"""A transformer in the middle alone, no autoencoder to compile, and two text encoders."""
TOWERS = [tower.name for tower in MODEL.text]
PIVOTAL = TextualInversionConfig(
    token="<dog>", vectors=2, initial="dog", norm=Norm.DEVIATION, rate=0.5, stop=0.5, bundle=True
)
ALONE = TextualInversionConfig(token="<dog>", vectors=2, norm=Norm.MEDIAN)


def make_captions(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("image number", "a photo of <dog>,"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Three steps of two images, of one bucket, with weight decay."""
    folder = tmp_path_factory.mktemp("base")
    convert(tiny.random_model(MODEL, 0), folder / "model", "orbax", False)
    make_captions(tiny.make_folder(folder / "images"))
    config = tiny.train_config(folder / "images", STEPS)
    return dataclasses.replace(
        config,
        model=MODEL,
        data=dataclasses.replace(config.data, buckets=((16, 16),), max_aspect_distance=10.0, batch_size=2),
        optimiser=dataclasses.replace(config.optimiser, learning_rate=1e-2, weight_decay=0.5),
        training=dataclasses.replace(config.training, trainable=(), init_from=(str(folder / "model"),)),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=1, export_every_steps=2),
    )


def pivotal(base: TrainConfig, **options: Any) -> TrainConfig:
    training = dataclasses.replace(base.training, trainable=("^unet/",))
    adapter = AdapterConfig(rank=2, file_dtype=FileDtype.FLOAT32, up_rate=4.0, norm_limit=0.5)
    return dataclasses.replace(
        base, training=training, adapter=adapter, textual_inversion=dataclasses.replace(PIVOTAL, **options)
    )


class Trained:
    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder = config, folder
        model = train(config, folder)
        assert model is not None
        self.model = model

    def state(self, step: int) -> Any:
        abstract, _ = objective_of(self.config).abstract_state(sharding.make_mesh(self.config.mesh))
        return checkpoint.restore(self.folder / "checkpoints", step, abstract)


@pytest.fixture(scope="module")
def trained(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Pivotal tuning that is not interrupted."""
    return Trained(pivotal(base), tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.slow
def test_run_that_was_stopped_twice_is_the_straight_one_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    assert_resumes(trained.config, trained.folder, tmp_path / "run")
    one, other = (folder / "run_emb.safetensors" for folder in (trained.folder, tmp_path / "run"))
    assert one.read_bytes() == other.read_bytes()


def test_vectors_and_adapter_learn_and_the_model_itself_stays_to_the_bit(trained: Trained) -> None:
    """With weight decay on. No moment of the optimiser has the shape of a table."""
    before, after = (load_model(path).params for path in (trained.config.training.init_from[0], trained.folder))
    for tower in TOWERS:
        old, new = (np.asarray(flatten(params[tower])[TABLE]) for params in (before, after))
        assert old[: text.FIRST_ADDED].tobytes() == new[: text.FIRST_ADDED].tobytes()
        assert len(new) == len(old) + 2
        assert (new[text.FIRST_ADDED :] != old[DOG]).any()
    state = trained.state(STEPS)
    assert set(state.params) == {"adapters", EMBEDDINGS}
    assert max(leaf.size for leaf in jax.tree.leaves(state)) < text.FIRST_ADDED
    first, last = (flatten(trained.state(step).params["adapters"]) for step in (1, STEPS))
    assert all((np.asarray(first[path]) != np.asarray(last[path])).any() for path in first)


def test_vectors_stop_at_their_share_of_the_steps_and_the_adapter_learns_on(trained: Trained) -> None:
    """Half of three steps: two."""
    one, two, three = (trained.state(step).params for step in (1, 2, STEPS))
    for path, value in flatten(two[EMBEDDINGS]).items():
        assert (np.asarray(flatten(one[EMBEDDINGS])[path]) != np.asarray(value)).any()
        assert np.asarray(value).tobytes() == np.asarray(flatten(three[EMBEDDINGS])[path]).tobytes()
    changed = [(np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (two, three)), strict=True)]
    assert sum(changed) == len(flatten(two["adapters"]))


def test_the_run_is_the_base_with_its_two_files(trained: Trained) -> None:
    """The base with the adapter's and the embedding's file is the run, to the bit; so are the vectors in the bundle."""
    start, run = load_model(trained.config.training.init_from[0]), load_model(trained.folder)
    assert textual_inversion.names(run) == {"<dog>": 2} == textual_inversion.names(trained.model)
    file = reading.read(trained.folder)
    assert file.embeddings == ("<dog>",)
    for source in (trained.folder / "run_emb.safetensors", trained.folder / "run.safetensors", trained.folder):
        model = textual_inversion.add(lora.add(start, file), source, "<dog>")
        assert model.config == run.config
        for path, value in flatten(run.params).items():
            np.testing.assert_array_equal(flatten(model.params)[path], value, err_msg=path)


def test_files_say_what_they_are(trained: Trained) -> None:
    names = {path.name for path in (trained.folder / "adapters").iterdir()}
    assert names == {"run-00000002.safetensors", "run-00000002_emb.safetensors"}
    with safe_open(trained.folder / "run_emb.safetensors", "np") as opened:
        metadata, shapes = opened.metadata(), {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 (no dict)
    widths = [tower.clip.width for tower in MODEL.text]
    assert shapes == dict(zip(("clip_l", "clip_g"), ([2, width] for width in widths), strict=True))
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert (metadata["modelspec.title"], metadata["modelspec.trigger_phrase"]) == ("run_emb", "<dog>")
    assert metadata["ss_steps"] == "3"


# What a step is made of


def with_token(config: TrainConfig, given: TextualInversionConfig = ALONE, **options: Any) -> TrainConfig:
    return dataclasses.replace(config, textual_inversion=dataclasses.replace(given, **options))


def training(given: TextualInversionConfig) -> EmbeddingTraining:
    config = dataclasses.replace(tiny.train_config(Path("unused"), 10), model=MODEL, textual_inversion=given)
    return EmbeddingTraining(config, given)


def one_device() -> Any:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def test_text_states_beside_the_tables_are_those_of_the_grown_tables() -> None:
    model, given = tiny.random_model(MODEL, 0), training(ALONE)
    vectors, _ = given.fresh(model.params, one_device())
    grown = given.merged(model, vectors)
    tokens = given.tokenizer(["a photo of <dog>", "a cat", "<DOG>, <dog>_1"])

    @jax.jit
    def beside(vectors: Any) -> Any:
        return text.encode(MODEL.text, model.params, tokens, adapters=given.changes(vectors))

    expected = jax.jit(lambda params: text.encode(grown.config.text, params, tokens))(grown.params)
    for one, other in zip(beside(vectors), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_vectors_have_a_gradient_where_a_prompt_has_the_token_and_only_there() -> None:
    model, given = tiny.random_model(MODEL, 0), training(ALONE)
    vectors, _ = given.fresh(model.params, one_device())

    @jax.jit
    @jax.grad
    def gradient(vectors: Any, tokens: Any) -> Any:
        states = text.encode(MODEL.text, model.params, tokens, adapters=given.changes(vectors))
        return sum(jnp.sum(state**2) for state in states if state is not None)

    for prompt, expected in (("a <dog>", [True, True]), ("a <dog>_1", [False, True]), ("a dog", [False, False])):
        for rows in flatten(gradient(vectors, given.tokenizer([prompt]))).values():
            assert np.asarray(rows).any(axis=1).tolist() == expected


def test_new_vectors_are_those_of_the_words_in_turn_or_random_ones() -> None:
    model = tiny.random_model(MODEL, 0)
    words = dataclasses.replace(ALONE, vectors=3, initial="golden retriever")
    ids = Tokenizer.of(MODEL.text)([words.initial or ""])["text_encoder"][0, 1:3]
    for settings in (words, dataclasses.replace(ALONE, vectors=3)):
        given = training(settings)
        found, targets = given.fresh(model.params, one_device())
        for tower in TOWERS:
            table = np.asarray(flatten(model.params[tower])[TABLE])
            rows = np.asarray(found[EMBEDDINGS][tower]["embedding"])
            median = np.median(np.linalg.norm(table, axis=-1))
            np.testing.assert_allclose(targets[EMBEDDINGS][tower]["target"], median, rtol=1e-6)
            if given.initial is not None:
                np.testing.assert_array_equal(rows, table[ids[[0, 1, 0]]])
            else:
                assert 0.6 < rows.std() / table.std() < 1.5 and len({*rows[:, 0].tolist()}) == 3


def test_deviation_of_random_vectors_is_that_of_the_table() -> None:
    table = np.random.default_rng(0).standard_normal((500, 20), np.float32) * 0.3
    assert float(embeddings.target(Norm.DEVIATION, jnp.asarray(table))) == pytest.approx(table.std(ddof=1), rel=1e-5)


@pytest.mark.parametrize("norm", Norm)
def test_vectors_are_pulled_back_as_other_trainers_do(norm: Norm) -> None:
    rng = np.random.default_rng(0)
    table, rows = rng.standard_normal((50, 8), np.float32), 3 * rng.standard_normal((2, 8)).astype(np.float32)
    expected = {
        Norm.FREE: rows,
        Norm.MEDIAN: rows / np.linalg.norm(rows, axis=1)[:, None] * np.median(np.linalg.norm(table, axis=1)),
        Norm.DEVIATION: rows * (table.std(ddof=1) / rows.std(ddof=1)) ** 0.1,
    }[norm]
    found = embeddings.pulled_back(norm, jnp.asarray(rows), embeddings.target(norm, jnp.asarray(table)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isfinite(embeddings.pulled_back(norm, jnp.zeros((2, 8)), jnp.float32(1))).all()


def test_updates_have_their_own_rate_and_end_before_gradients_are_limited() -> None:
    given = training(TextualInversionConfig(token="<dog>", rate=0.5, stop=0.2))  # two of ten steps
    ones = {"adapters": {"unet": {"kernel": {"up": jnp.ones((2, 2))}}}}
    params: Any = ones | {EMBEDDINGS: {tower: {"embedding": jnp.ones((1, 8))} for tower in TOWERS}}
    limited = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_schedule(lambda _: -1.0))
    optimiser = given.updating(limited)
    assert isinstance(optimiser, optax.GradientTransformationExtraArgs)
    state, found = optimiser.init(params), []
    for _ in range(3):
        updates, state = optimiser.update(params, state, params, frozen={})
        found.append(jax.tree.map(lambda leaf: float(leaf.reshape(-1)[0]), updates))
    norm = np.sqrt(4 + 2 * 8)
    for updates in found[:2]:
        assert updates["adapters"]["unet"]["kernel"]["up"] == pytest.approx(-1 / norm)
        assert updates[EMBEDDINGS]["text_encoder"]["embedding"] == pytest.approx(-0.5 / norm)
    assert found[2][EMBEDDINGS]["text_encoder"]["embedding"] == 0
    assert found[2]["adapters"]["unet"]["kernel"]["up"] == pytest.approx(-1 / 2)


@pytest.mark.parametrize("kind", OptimiserKind)
def test_state_of_every_optimiser_has_its_place_on_a_mesh(base: TrainConfig, kind: OptimiserKind) -> None:
    """Vectors are split as the tables are."""
    own = kind is OptimiserKind.SCHEDULE_FREE
    config = dataclasses.replace(
        with_token(base, norm=Norm.FREE if own else Norm.MEDIAN),
        optimiser=OptimiserConfig(kind, 1.0 if kind is OptimiserKind.PRODIGY else 1e-3),
        ema=EmaConfig(EmaKind.OPTIMISER) if own else base.ema,
    )
    objective = objective_of(config)
    objective.check()
    state, frozen = objective.abstract_state(AbstractMesh((1, 2, 2, 1), AXES))
    for path, leaf in flatten(state.params[EMBEDDINGS]).items():
        assert leaf.sharding.spec == flatten(frozen[path.split("/")[0]])[TABLE].sharding.spec


def test_program_and_state_without_a_new_token_are_those_of_before(base: TrainConfig) -> None:
    """The rules of an objective read frozen parameters through an argument that other optimisers ignore."""
    config = dataclasses.replace(base, training=dataclasses.replace(base.training, trainable=("^unet/",)))
    objective = objective_of(config)
    assert objective.model_config is config.model
    given = jnp.ones(3)
    plain, extra = objective.optimiser, optax.with_extra_args_support(objective.optimiser)
    state = plain.init({"kernel": given})
    one = jax.make_jaxpr(lambda g: plain.update({"kernel": g}, state, {"kernel": given}))(given)
    other = jax.make_jaxpr(lambda g: extra.update({"kernel": g}, state, {"kernel": given}, frozen={}))(given)
    assert str(one) == str(other)


# Refusals


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"token": "dog"}, r"textual_inversion cannot have the token 'dog': it is in CLIP's own vocabulary"),
        ({"token": "<dog> "}, r"cannot have the token '<dog> ': .* Give another name: textual_inversion\.token"),
        ({"token": ""}, r"cannot have the token ''"),
        ({"initial": "golden retriever", "vectors": 1}, r"is 2 tokens of CLIP's vocabulary, more than .*vectors=1"),
        ({"initial": " "}, r'textual_inversion\.initial="" has no words'),
        ({"vectors": 0}, r"textual_inversion\.vectors=0"),
        ({"rate": 0.0}, r"textual_inversion\.rate=0\.0"),
        ({"stop": 0.0}, r"textual_inversion\.stop=0\.0"),
        ({"stop": 0.5}, r"textual_inversion\.stop has no effect without an adapter"),
        ({"bundle": True}, r"textual_inversion\.bundle has no effect without an adapter"),
    ],
)
def test_settings_that_do_not_fit_are_refused(base: TrainConfig, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        objective_of(with_token(base, **given)).check()


def test_what_cannot_be_combined_is_refused(base: TrainConfig) -> None:
    config = with_token(base)
    trainable = dataclasses.replace(base.training, trainable=("^unet/",))
    cached = dataclasses.replace(base.data, cache="cache", crops_per_image=1)
    own = {"optimiser": OptimiserConfig(OptimiserKind.SCHEDULE_FREE), "ema": EmaConfig(EmaKind.OPTIMISER)}
    wide = dataclasses.replace(
        MODEL.text[0], clip=dataclasses.replace(MODEL.text[0].clip, vocabulary=text.FIRST_ADDED + 8)
    )
    spare = dataclasses.replace(MODEL, text=(wide, *MODEL.text[1:]))
    for changed, expected in (
        (dataclasses.replace(config, training=trainable), r"training\.trainable=\^unet/ has no effect with .* alone"),
        (dataclasses.replace(config, data=cached), r"data\.cache=cache holds the text states of before training"),
        (dataclasses.replace(config, **own), r"the average of optimiser\.kind=schedule_free does not allow"),
        (dataclasses.replace(config, model=spare), r"text_encoder has 8 rows without a token at the end"),
        (pivotal(base, base_dtype=BaseDtype.BFLOAT16), r"base_dtype has no effect beside an adapter"),
    ):
        with pytest.raises(InputError, match=expected):
            objective_of(changed).check()


def test_vectors_that_stop_early_keep_their_number_of_steps_when_a_run_is_resumed(trained: Trained) -> None:
    longer = dataclasses.replace(trained.config.training, steps=STEPS + 1)
    with pytest.raises(InputError, match=r"training\.steps: 3 -> 4"):
        train(dataclasses.replace(trained.config, training=longer), trained.folder)
    bundle = pivotal(trained.config, bundle=False)
    assert not blocking_differences(to_json(trained.config), to_json(bundle))


def test_a_token_that_the_model_has_already_is_refused(base: TrainConfig) -> None:
    config = with_token(base)
    model = objective_of(config).model_config
    for token in ("<dog>", "<DOG>", "<dog>_1"):
        with pytest.raises(InputError, match=r"the model already has a token"):
            objective_of(with_token(dataclasses.replace(config, model=model), token=token)).check()
    other = objective_of(with_token(dataclasses.replace(config, model=model), token="<cat>"))
    other.check()
    assert other.model_config.text[0].added_tokens == ("<dog>", "<dog>_1", "<cat>", "<cat>_1")


def test_images_without_the_token_in_a_caption_are_refused_before_anything_is_written(
    base: TrainConfig, tmp_path: Path
) -> None:
    config = with_token(base, token="<cat>")
    template = 'set data\\.caption_template, e\\.g\\. "a photo of <cat>, {caption}"'
    with pytest.raises(InputError, match=f"No caption in .* contains '<cat>', .*{template}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    data = dataclasses.replace(base.data, caption_template="a photo of <CAT>, {caption}")
    for given, images in ((config, data), (with_token(base), base.data)):
        objective_of(given).check_data(BucketedDataset(images, objective_of(given).tokenizer))


def test_an_embedding_of_another_width_is_not_that_of_this_model(trained: Trained) -> None:
    wide = dataclasses.replace(MODEL.text[0], clip=dataclasses.replace(MODEL.text[0].clip, width=24))
    model = Model(dataclasses.replace(MODEL, text=(wide, MODEL.text[1])), {})
    with pytest.raises(InputError, match=r"was made for another family of models: the widths of its vectors are"):
        textual_inversion.add(model, trained.folder / "run_emb.safetensors")


# Alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "base_dtype"), [(1, BaseDtype.BFLOAT16), (2, BaseDtype.BFLOAT16), (1, BaseDtype.INT8)]
)
def test_vectors_alone_learn_and_resume(
    base: TrainConfig, tmp_path: Path, accumulate: int, base_dtype: BaseDtype
) -> None:
    optimiser = dataclasses.replace(base.optimiser, accumulate=accumulate)
    config = dataclasses.replace(with_token(base, base_dtype=base_dtype), optimiser=optimiser)
    run = Trained(config, tmp_path / "straight" / "run")
    assert_resumes(config, run.folder, tmp_path / "stopped" / "run")
    assert set(run.state(STEPS).params) == {EMBEDDINGS}
    start = load_model(config.training.init_from[0], dtype="bfloat16")
    added = textual_inversion.add(start, run.folder / "run.safetensors", "<dog>")
    opened = load_model(run.folder, dtype="bfloat16")
    assert added.config == opened.config
    for path, value in flatten(opened.params).items():
        expected, found = (np.asarray(each, np.float32) for each in (flatten(added.params)[path], value))
        if base_dtype is BaseDtype.INT8 and is_quantised(path):  # half a scale, and bfloat16's digits
            largest = np.abs(expected).max(initial=1e-30)
            assert np.abs(found - expected).max(initial=0) < (0.5 / 127 + 1e-2) * largest, path
        else:
            np.testing.assert_array_equal(expected, found, err_msg=path)


@pytest.mark.slow
def test_the_frozen_model_of_prior_preservation_knows_the_new_word(base: TrainConfig, tmp_path: Path) -> None:
    """Its prediction is finite, and where the adapter changes nothing yet it is the model's own: the loss is 0."""
    source = Source(str(base.data.folder), target=Target.BASE)
    config = pivotal(base)
    assert config.adapter is not None
    adapter = dataclasses.replace(config.adapter, up_rate=1.0, norm_limit=None)
    data = dataclasses.replace(base.data, folder=None, sources=(source,))
    train(dataclasses.replace(config, data=data, adapter=adapter), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0, abs=1e-9) and np.isfinite(losses).all() and len(losses) == STEPS


@pytest.mark.slow
def test_a_run_samples_its_new_word_and_so_do_its_validation_images(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder, run)
    command = ["sample", str(run), "--prompt", "a photo of <dog>", "--prompt", "a photo of", "--steps", "2"]
    command += ["--height", "32", "--width", "32", "--out", str(tmp_path / "images")]
    assert __main__.main(command) == 0
    one, other = (np.asarray(Image.open(tmp_path / "images" / f"00000{number}.png")) for number in (0, 1))
    assert (one != other).any()
    validation = dataclasses.replace(
        trained.config.validation, every_steps=STEPS, prompts=("a photo of <dog>",), sizes=((32, 32),), steps=2
    )
    train(dataclasses.replace(trained.config, validation=validation), run)
    assert [path.name for path in (run / "samples").iterdir()] == ["step_00000003.png"]
