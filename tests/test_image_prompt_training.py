"""Training with image prompts: embeddings in the cache, in the place of the pooled text, and which rows train."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_dtypes import bfloat16
from test_encoding import MODEL

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, EncodedBatch, MicroConditioning, flatten
from sdxl_jax.conditioning.text import TextConditioning, Tokenizer
from sdxl_jax.config import ImagePromptConfig, TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1
from sdxl_jax.optim.optimiser import OptimiserConfig, OptimiserKind, make_optimiser
from sdxl_jax.sampling.image_prompts import encode_images
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import encoding, loop
from sdxl_jax.training.objectives import image_prompts, objective_of
from sdxl_jax.weights.clip_vision import open_tower
from sdxl_jax.weights.load import load_model

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")

POOLED = 8
ROWS_ALONE = (f"^{image_prompts.KERNEL}$",)


def with_(config: TrainConfig, group: str, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Eight images of one bucket, encoded; the rows that read the pooled vector are trained, with weight decay."""
    home = tmp_path_factory.mktemp("home")
    base = dataclasses.replace(tiny.train_config(tiny.make_folder(home / "images"), 2), model=MODEL)
    base = with_(base, "data", buckets=((32, 32),), max_aspect_distance=1.0, cache=str(home / "cache"))
    base = with_(with_(base, "data", crops_per_image=1), "training", trainable=ROWS_ALONE)
    base = with_(base, "optimiser", weight_decay=0.1, warmup_steps=0)
    tower = tiny.write_image_tower(home / "tower.safetensors", POOLED)
    prompt = ImagePromptConfig(encoder=str(tower), pooled_rows_alone=True)
    return dataclasses.replace(base, image_prompt=prompt)


@pytest.fixture(scope="module")
def dataset(config: TrainConfig) -> BucketedDataset:
    encoding.encode(config, batch_size=4, progress=False)
    params = encoding._encoder_params(config, sharding.make_mesh(MeshConfig()), progress=False)
    return encoding.from_cache(config, BucketedDataset(config.data, Tokenizer.of(MODEL.text)), params)


def test_a_cache_holds_the_embedding_of_each_crop(config: TrainConfig, dataset: BucketedDataset) -> None:
    batch = next(iter(dataset.iterate()))
    pixels = dataclasses.replace(config.data, cache=None)
    images = next(iter(BucketedDataset(pixels, Tokenizer.of(MODEL.text)).iterate())).image
    assert batch.encoded is not None and images is not None and config.image_prompt is not None
    tower = open_tower(config.image_prompt.encoder)
    expected = encode_images(tower.config, tower.load(), list(images))
    found = batch.encoded.image_embedding
    assert isinstance(found, np.ndarray) and found.dtype == bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7, atol=1e-5)
    objective = objective_of(config)
    abstract = objective.abstract_batch(sharding.make_mesh(MeshConfig()), dataset.buckets[0], len(images))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), batch
    )


@pytest.mark.slow
def test_pooled_rows_alone_leaves_every_other_bit(
    config: TrainConfig, dataset: BucketedDataset, tmp_path: Path
) -> None:
    loop.train(config, tmp_path / "run", progress=False)
    objective = objective_of(config)
    mesh = sharding.make_mesh(MeshConfig())
    abstract, _ = objective.abstract_state(mesh)
    start, frozen = objective.fresh_state(mesh, abstract, {}, progress=False)
    before = flatten(objective.model(start, frozen).params)
    for raw in (True, False):
        after = flatten(load_model(tmp_path / "run", raw=raw, progress=False).params)
        assert after.keys() == before.keys()
        for path, value in after.items():
            rest = slice(POOLED, None) if path == image_prompts.KERNEL else slice(None)
            ours, theirs = (np.asarray(each) for each in (value, before[path]))
            assert ours[rest].tobytes() == theirs[rest].tobytes(), path
        rows = (np.asarray(each[image_prompts.KERNEL])[:POOLED] for each in (after, before))
        assert (np.subtract(*rows) != 0).all()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line[name] > 0 for line in lines for name in ImagePromptConfig.NORMS)


@pytest.mark.parametrize("kind", [OptimiserKind.ADAMW, OptimiserKind.LION, OptimiserKind.MUON, OptimiserKind.PRODIGY])
def test_no_optimiser_moves_a_row_that_is_not_trained(kind: OptimiserKind) -> None:
    """Not even the sign of a zero."""
    rate = 1.0 if kind is OptimiserKind.PRODIGY else 1e-2
    optimiser = make_optimiser(OptimiserConfig(kind=kind, learning_rate=rate, weight_decay=0.1, warmup_steps=0), 10)
    optimiser = image_prompts.updating_pooled_rows(optimiser, 2)
    kernel = np.array([[1.0, 2.0], [3.0, -1.0], [-0.0, 4.0], [0.0, 1.0]], np.float32)
    params = {"unet": {"add_embedding": {"linear_1": {"kernel": jnp.asarray(kernel)}}}}

    def loss(params: Any) -> jax.Array:
        return (image_prompts.pooled_rows(params, 2)["unet"]["add_embedding"]["linear_1"]["kernel"] ** 2).sum()

    gradient = jax.grad(loss)(params)
    assert not np.asarray(flatten(gradient)[image_prompts.KERNEL])[2:].any()
    updates, _ = optimiser.update(gradient, optimiser.init(params), params)
    after = np.asarray(flatten(jax.tree.map(jnp.add, params, updates))[image_prompts.KERNEL])
    assert after[2:].tobytes() == kernel[2:].tobytes()
    assert (after[:2] != kernel[:2]).all()


def test_the_text_is_dropped_from_its_share_of_the_examples_and_the_image_from_none() -> None:
    count = 2000
    zeros, embedding = np.zeros((count, 2), np.int32), np.full((count, 3), 2.0, bfloat16)
    encoded = EncodedBatch(np.zeros((count, 1, 1, 4)), np.zeros((count, 1, 1, 4)), None, embedding, embedding)
    micro, examples = MicroConditioning(zeros, zeros, zeros), np.arange(count, dtype=np.int32)
    batch = Batch(None, {}, micro, examples, np.zeros(count, bool), encoded)
    prompt = TextConditioning(jnp.ones((count, 5, 2)), jnp.ones((count, 3)))
    keys = jax.random.split(jax.random.key(0), count)
    found = image_prompts.conditioned(prompt, batch, keys, ImagePromptConfig(text_dropout=0.3))
    assert found.context is not None and found.pooled is not None
    np.testing.assert_array_equal(found.pooled, 2)
    kept = np.asarray(found.context).reshape(count, -1)
    assert set(kept.ravel()) == {0.0, 1.0}
    np.testing.assert_array_equal(kept.min(axis=1), kept.max(axis=1))
    assert np.mean(kept) == pytest.approx(0.7, abs=0.03)  # three standard errors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"cache": None}}, "image_prompt needs data.cache"),
        ({"image_prompt": {"text_dropout": 1.5}}, "image_prompt.text_dropout"),
        ({"training": {"trainable": ("^unet/add_embedding/",)}}, "and nothing else, but training.trainable="),
        (
            {"optimiser": {"kind": OptimiserKind.SCHEDULE_FREE, "weight_decay": None}, "ema": {"decay": None}},
            "which the average of optimiser.kind=schedule_free does not",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    changes: dict[str, dict[str, Any]], expected: str, config: TrainConfig
) -> None:
    for group, fields in changes.items():
        config = with_(config, group, **fields)
    if config.optimiser.kind is OptimiserKind.SCHEDULE_FREE:
        from sdxl_jax.optim.ema import EmaKind

        config = with_(config, "ema", kind=EmaKind.OPTIMISER)
    with pytest.raises(InputError) as refused:
        objective_of(config).check()
    assert expected in str(refused.value)


def test_models_and_image_towers_that_do_not_fit_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this model has no pooled text"):
        dataclasses.replace(config, model=SD1).check()
    other = tiny.write_image_tower(tmp_path / "other.safetensors", 12)
    with pytest.raises(InputError, match="embeddings have a width of 12, the model's pooled text 8"):
        encoding.image_tower(with_(config, "image_prompt", encoder=str(other)))
    with pytest.raises(InputError, match=r"image_prompt\.encoder=absent: There is nothing at"):
        objective_of(with_(config, "image_prompt", encoder="absent")).check_start()


def test_a_cache_of_another_image_tower_is_refused(
    config: TrainConfig, dataset: BucketedDataset, tmp_path: Path
) -> None:
    params = encoding._encoder_params(config, sharding.make_mesh(MeshConfig()), progress=False)
    plain = BucketedDataset(config.data, Tokenizer.of(MODEL.text))
    other = tiny.write_image_tower(tmp_path / "other.safetensors", POOLED, seed=1)
    with pytest.raises(InputError, match=r"(?s)made from something else.*weights\.image_encoder\.values"):
        encoding.from_cache(with_(config, "image_prompt", encoder=str(other)), plain, params)
    with pytest.raises(InputError, match=r"(?s)made from something else.*weights\.image_encoder"):
        encoding.from_cache(dataclasses.replace(config, image_prompt=None), plain, params)
