"""The promises of sdxl_jax.training.encoding: training from a cache learns what training from the images learns, and a
cache of another provenance is refused.

A tiny model with random weights encodes twelve images in two buckets, three crops each, in three pieces; the last
groups of a bucket and of a piece are smaller than a batch.
"""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from ml_dtypes import bfloat16
from PIL import Image

from sdxl_jax import arrays, sharding
from sdxl_jax import config as configuration
from sdxl_jax.arrays import Batch, EncodedBatch, Params
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.text import END_OF_TEXT, ContextState, Tokenizer, Tower
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.build.build import build
from sdxl_jax.data.cache import Cache, CachePlan, Unencoded, open_cache
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.errors import InputError
from sdxl_jax.files import buckets
from sdxl_jax.model import ModelConfig, UnconditionalKind
from sdxl_jax.models import vae
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import encoding, loop
from sdxl_jax.training.objectives import denoising

IMAGES, CROPS, PIECE, BATCH, STEPS = 12, 3, 5, 4, 6
DAMAGED = (7, 8)
"""Images that cannot be read in one test; the second is encoded alone, as the last of its piece and bucket."""

# With fewer levels than tiny.MODEL: what this file costs is compiling.
UNET = dataclasses.replace(tiny.MODEL.unet, block_channels=(8,), transformer_depth=(0,), middle_depth=1, heads=(1,))
MODEL = dataclasses.replace(tiny.MODEL, unet=UNET, vae=dataclasses.replace(tiny.MODEL.vae, block_channels=(4, 4)))

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")


def make_images(folder: Path) -> Path:
    """Half of them for each bucket, all with something to crop away; one to three captions and a score each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(IMAGES):
        height, width = ((34, 41), (24, 45))[number % 2]
        pixels = rng.integers(0, 256, (height + number, width + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        captions = [f"image {number}, caption {variant}" for variant in range(1 + number % 3)]
        lines.append({"file_name": f"{number:03d}.png", "text": captions, "score": 4 + number / 4})
    write_lines(folder, lines)
    return folder


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def with_data(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def open_dataset(config: TrainConfig) -> BucketedDataset:
    return BucketedDataset(config.data, Tokenizer.of(config.model.text))


def encode(config: TrainConfig, **options: Any) -> CachePlan:
    return encoding.encode(config, **{"batch_size": BATCH, "piece_images": PIECE, "progress": False} | options).plan


def encoders_of(config: TrainConfig) -> Params:
    mesh = sharding.make_mesh(MeshConfig())
    return encoding._encoder_params(config, mesh, progress=False)


def take(dataset: BucketedDataset, steps: int = STEPS) -> list[Batch]:
    return list(itertools.islice(dataset.iterate(), steps))


def losses(config: TrainConfig, run: Path) -> list[float]:
    """Trains, where that was not done yet."""
    if not run.exists():
        loop.train(config, run, progress=False)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """The files of a cache that matter, by name."""
    every = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in every}


def assert_identical(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def assert_same_up_to_rounding(one: Any, other: Any) -> None:
    """In a batch of another size float32 adds up in another order: 1e-6 for sums of numbers up to 1. Where that is
    about the middle between two bfloat16 numbers, which are 2⁻⁷ of themselves apart, the other one is taken; rarely,
    as between two of them are 2¹⁶ of float32."""
    differ = []
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype == bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=2**-7, atol=1e-6)
        differ.append((a != b).reshape(-1))
    assert np.mean(np.concatenate(differ)) < 5e-3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Steps of four images, two steps per epoch, from a cache."""
    home = tmp_path_factory.mktemp("home")
    base = dataclasses.replace(tiny.train_config(make_images(home / "images"), STEPS), model=MODEL)
    base = with_data(
        base, batch_size=BATCH, crops_per_image=CROPS, flip_probability=0.5, seed=3, cache=str(home / "cache")
    )
    return dataclasses.replace(base, checkpoint=configuration.CheckpointConfig(every_steps=STEPS))


@pytest.fixture(scope="module")
def pixels(config: TrainConfig) -> TrainConfig:
    """The same, from the images."""
    return with_data(config, cache=None)


@pytest.fixture(scope="module")
def encoders(config: TrainConfig) -> Params:
    return encoders_of(config)


@pytest.fixture(scope="module")
def folder(config: TrainConfig) -> Path:
    """The cache, written in one run."""
    plan = encode(config)
    assert not plan.missing() and plan.pieces == 3
    return Path(plan.folder)


@pytest.fixture(scope="module")
def dataset(config: TrainConfig, encoders: Params, folder: Path) -> BucketedDataset:
    """Read from the cache."""
    return encoding.from_cache(config, open_dataset(config), encoders)


@pytest.fixture(scope="module")
def cache(dataset: BucketedDataset) -> Cache:
    assert dataset.loader.cache is not None
    return dataset.loader.cache


@pytest.fixture(scope="module")
def trainable(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """In one bucket, which compiles once, and fast from the start."""
    cache = tmp_path_factory.mktemp("trains") / "cache"
    one = with_data(config, buckets=((32, 32),), max_aspect_distance=1.0, cache=str(cache))
    fast = dataclasses.replace(config.optimiser, warmup_steps=0, learning_rate=1e-2)
    return dataclasses.replace(one, optimiser=fast)


@pytest.fixture(scope="module")
def cached_losses(trainable: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    encode(trainable)
    return losses(trainable, tmp_path_factory.mktemp("cached") / "run")


@pytest.fixture(scope="module")
def pixel_run(trainable: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pixels") / "run"
    losses(with_data(trainable, cache=None), run)
    return run


# The same is learnt


def test_batches_of_a_cache_are_those_of_the_images(
    pixels: TrainConfig, encoders: Params, dataset: BucketedDataset
) -> None:
    parts = pixels.model

    @jax.jit
    def encoded(batch: Batch) -> EncodedBatch:
        assert batch.image is not None
        posterior = vae.encode(parts.vae, encoders["vae"], arrays.normalise(batch.image))
        condition = text.encode(parts.text, encoders, batch.tokens)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), EncodedBatch(*posterior, *condition))

    buckets = set()
    found, expected = [], []
    for cached, decoded in zip(take(dataset), take(open_dataset(pixels)), strict=True):
        assert cached.image is None and decoded.image is not None and cached.encoded is not None
        assert_identical(cached._replace(encoded=None), decoded._replace(image=None))
        buckets.add(decoded.image.shape[1:3])
        found.append(cached.encoded)
        expected.append(jax.device_get(encoded(decoded)))
    assert buckets == set(tiny.BUCKETS)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(bfloat16)}
    assert_same_up_to_rounding(found, expected)


def test_abstract_batch_is_that_of_the_cache(config: TrainConfig, dataset: BucketedDataset) -> None:
    mesh = sharding.make_mesh(config.mesh)
    for step, batch in enumerate(take(dataset, 2)):
        bucket = dataset.bucket_of(step)
        abstract = denoising.Denoising(config).abstract_batch(mesh, bucket, BATCH)
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), sharding.put_batch(mesh, batch))
        assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract)


@pytest.mark.slow  # their batches are compared without it
def test_losses_of_a_cache_are_those_of_the_images(
    trainable: TrainConfig, cached_losses: list[float], pixel_run: Path
) -> None:
    assert len(cached_losses) == STEPS
    # Rounding to bfloat16 moves each number by up to 2⁻⁹ of itself, in all directions; of thousands, the mean error
    # moves less, and what follows from it grows with the steps: 1e-5 is seen after six.
    np.testing.assert_allclose(cached_losses, losses(trainable, pixel_run), rtol=1e-4)
    assert np.ptp(cached_losses) > 1e-2, "the losses of different steps are farther apart than that"


def test_cached_run_needs_neither_encoder_nor_images(dataset: BucketedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any) -> Any:
        raise AssertionError

    for kind in {type(source) for source in dataset.source.sources}:
        for name in ("pixels", "captions"):
            monkeypatch.setattr(kind, name, called)
    assert len(take(dataset, 2)) == 2


def inputs_of_the_network(
    config: TrainConfig, encoders: Params, batch: Batch, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, text states) of that step."""
    inputs, contexts = list[Any](), list[Any]()

    def error(network: Callable[..., Any], latent: Any, *_: Any) -> jax.Array:
        network(latent, jnp.zeros(len(latent), jnp.int32))
        inputs.append((latent, contexts.pop()))
        return jnp.zeros(())

    def record_context(
        _config: Any, _params: Any, latent: Any, _timestep: Any, context: Any, *_: Any, **_options: Any
    ) -> Any:
        contexts.append(context)
        return latent

    @jax.jit
    def traced(keys: jax.Array, batch: Batch) -> Any:
        empty = Tokenizer.of(config.model.text)([""])
        denoising.batch_loss({"unet": {"unused": keys}}, encoders, batch, keys, config, empty)
        return inputs.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising.loss, "diffusion_loss", error)
        patch.setattr(denoising.unet, "apply", record_context)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(batch.example))
        return jax.device_get(traced(keys, batch))


def test_latents_of_a_cache_are_sampled_again_each_step(
    config: TrainConfig, encoders: Params, dataset: BucketedDataset
) -> None:
    batch = take(dataset, 1)[0]
    assert batch.encoded is not None
    latents = [inputs_of_the_network(config, encoders, batch, step)[0] for step in (0, 0, 1)]
    np.testing.assert_array_equal(latents[0], latents[1])
    mean, deviation = batch.encoded.mean.astype(np.float32), np.exp(batch.encoded.log_variance.astype(np.float32) / 2)
    noise = [(latent / config.model.vae.scale - mean) / deviation for latent in latents[1:]]
    for drawn in noise:  # 3840 or 4096 standard normal numbers; bounds of five standard errors and more
        assert abs(drawn.mean()) < 0.1 and 0.9 < drawn.std() < 1.1
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


def test_captions_of_a_cache_are_dropped_again_each_step(
    config: TrainConfig, encoders: Params, dataset: BucketedDataset
) -> None:
    batch = take(dataset, 1)[0]
    assert batch.encoded is not None and batch.encoded.context is not None
    training = dataclasses.replace(config.training, caption_dropout=0.5)
    dropping = dataclasses.replace(config, training=training)
    dropped = []
    for step in range(5):
        context = inputs_of_the_network(dropping, encoders, batch, step)[1]
        gone = ~context.any(axis=(1, 2))
        np.testing.assert_array_equal(context[~gone], batch.encoded.context[~gone].astype(np.float32))
        dropped.append(gone)
    assert len(np.unique(dropped, axis=0)) > 1 and np.any(dropped) and not np.all(dropped)


# What is in a cache


def test_every_crop_has_the_numbers_that_made_it(
    pixels: TrainConfig, encoders: Params, dataset: BucketedDataset, cache: Cache
) -> None:
    posterior = jax.jit(lambda image: vae.encode(pixels.model.vae, encoders["vae"], arrays.normalise(image)))
    flips, different = set(), 0
    for bucket, size in enumerate(dataset.buckets):
        for position in dataset.order.run(bucket):
            image = int(dataset.order.numbers[position])
            examples = dataset.loader.fixed_crops(image, range(CROPS), size)
            crops = [cache.crop(position, crop)[0] for crop in range(CROPS)]
            for example, crop in zip(examples, crops, strict=True):
                for name in ("original_size", "crop_top_left", "target_size"):
                    np.testing.assert_array_equal(getattr(crop, name), getattr(example, name))
                assert crop.flipped == example.flipped
                flips.add(crop.flipped)
            # A batch of four, as when it was encoded.
            made = posterior(np.stack([example.image for example in [*examples, examples[0]]]))
            expected = [np.asarray(moment[:CROPS], bfloat16) for moment in made]
            moments = [np.stack([getattr(crop, name) for crop in crops]) for name in ("mean", "log_variance")]
            assert_same_up_to_rounding(moments, expected)
            different += len({crop.mean.tobytes() for crop in crops})
    assert flips == {False, True}
    assert different > 2 * IMAGES, "most images have crops that differ"


def test_batch_size_of_encoding_changes_only_rounding(
    config: TrainConfig, cache: Cache, folder: Path, tmp_path: Path
) -> None:
    plan = encode(with_data(config, cache=str(tmp_path / "cache")), batch_size=BATCH + 1)
    # Equal sizes: what fills up a batch is not stored.
    sizes = [{name: len(content) for name, content in files(each).items()} for each in (folder, Path(plan.folder))]
    assert sizes[0] == sizes[1]
    other = open_cache(plan.folder, cache.made_from)
    for image, crop in itertools.product(range(IMAGES), range(CROPS)):
        (one, captions), (two, same_captions) = cache.crop(image, crop), other.crop(image, crop)
        assert_identical([*one[2:5], one.flipped * np.ones(1)], [*two[2:5], two.flipped * np.ones(1)])
        assert_same_up_to_rounding(one[:2], two[:2])
        texts = list(zip(captions, same_captions, strict=True))
        assert_identical([text.tokens for text, _ in texts], [text.tokens for _, text in texts])
        assert_same_up_to_rounding([text[1:] for text, _ in texts], [text[1:] for _, text in texts])


# What a cache was made from


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other buckets": ({"buckets": (*tiny.BUCKETS, (40, 24))}, "buckets: "),
    "images left out": ({"min_size": 27}, "buckets: "),
    "number of crops": ({"crops_per_image": CROPS - 1}, r"crops\.each: 3 -> 2"),
    "flips": ({"flip_probability": 0.25}, r"crops\.flips: 0\.5 -> 0\.25"),
    "place of the crop": ({"crop": CropMode.CENTRE}, r"crops\.mode: random -> centre"),
    "seed": ({"seed": 4}, r"crops\.seed: 3 -> 4"),
}


@pytest.mark.parametrize("changed", REFUSED)
def test_cache_of_other_data_settings_is_refused(
    config: TrainConfig, encoders: Params, folder: Path, changed: str
) -> None:
    fields, expected = REFUSED[changed]
    other = with_data(config, **fields)
    with pytest.raises(InputError, match=rf"(?s)was made from something else.*  {expected}.*Run `sdxl-jax data enc"):
        encoding.from_cache(other, open_dataset(other), encoders)


def other_caption(folder: Path) -> None:
    lines = read_lines(folder)
    lines[5]["text"][0] += "!"
    write_lines(folder, lines)


def other_size(folder: Path) -> None:
    with Image.open(folder / "003.png") as image:
        image.crop((0, 0, image.width, image.height - 1)).save(folder / "003.png")


def one_image_less(folder: Path) -> None:
    (folder / "003.png").unlink()
    write_lines(folder, [line for line in read_lines(folder) if line["file_name"] != "003.png"])


@pytest.mark.parametrize("change", [other_caption, other_size, one_image_less])
def test_cache_of_other_images_is_refused(
    config: TrainConfig, encoders: Params, folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    assert config.data.folder is not None
    moved = with_data(config, folder=str(shutil.copytree(config.data.folder, tmp_path / "images")))
    encoding.from_cache(moved, open_dataset(moved), encoders)  # the same elsewhere
    change(tmp_path / "images")
    with pytest.raises(InputError, match=r"something else \(in it -> given\):\s+images: \[.* -> "):
        encoding.from_cache(moved, open_dataset(moved), encoders)


def last_bit_changed(params: Params, path: str) -> Params:
    """One number of one parameter is the next one of float32."""
    flat = arrays.flatten(params)
    leaf = np.array(flat[path])
    leaf.reshape(-1)[-1] = np.nextafter(leaf.reshape(-1)[-1], np.float32(np.inf))
    return arrays.unflatten(flat | {path: jnp.asarray(leaf)})


@pytest.mark.parametrize("part", ["vae/encoder", "text_encoder", "text_encoder_2"])
def test_cache_of_other_weights_is_refused(config: TrainConfig, encoders: Params, folder: Path, part: str) -> None:
    data, name = open_dataset(config), part.split("/")[0]
    for path in [path for path in arrays.flatten(encoders) if path.startswith(f"{part}/")][::20]:
        with pytest.raises(InputError, match=rf"something else .*:\s+weights\.{name}\.values: \w+ -> \w+"):
            encoding.from_cache(config, data, last_bit_changed(encoders, path))


def test_cache_is_of_any_decoder(config: TrainConfig, encoders: Params, folder: Path) -> None:
    path = next(path for path in arrays.flatten(encoders) if path.startswith("vae/decoder/"))
    encoding.from_cache(config, open_dataset(config), last_bit_changed(encoders, path))


def test_cache_of_other_text_settings_is_refused(config: TrainConfig, encoders: Params, folder: Path) -> None:
    towers = tiny.MODEL.text
    changed = {
        r"text\.text_encoder\.context: ": (dataclasses.replace(towers[0], context=ContextState.LAST), towers[1]),
        r"text\.text_encoder\.pad_token: ": (dataclasses.replace(towers[0], pad_token=0), towers[1]),
        r"weights\.text_encoder\.config\.activation: ": (
            dataclasses.replace(towers[0], clip=dataclasses.replace(towers[0].clip, activation=Activation.GELU)),
            towers[1],
        ),
    }
    for expected, text_towers in changed.items():
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text_towers))
        with pytest.raises(InputError, match=rf"(?s)something else.*  {expected}"):
            encoding.from_cache(other, open_dataset(other), encoders)


def test_cache_of_other_code_is_refused_unless_allowed(
    config: TrainConfig, encoders: Params, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_code", lambda: "of tomorrow")
    with pytest.raises(InputError, match=r"something else .*:\s+code: \w+ -> of tomorrow"):
        encoding.from_cache(config, open_dataset(config), encoders)
    allowed = with_data(config, cache_of_other_code=True)
    encoding.from_cache(allowed, open_dataset(allowed), encoders)
    other = with_data(allowed, seed=4)
    with pytest.raises(InputError, match=r"crops\.seed") as refusal:  # that and nothing else
        encoding.from_cache(other, open_dataset(other), encoders)
    assert "code:" not in str(refusal.value)


@pytest.mark.parametrize("part", ["vae/encoder/conv_in", "text_encoder_2"])
def test_trainable_encoder_is_refused_by_encoding_and_training(config: TrainConfig, folder: Path, part: str) -> None:
    given = dataclasses.replace(config.training, trainable=(f"^{part}/", "^unet/"))
    for command in (encode, loop.train):
        with pytest.raises(
            InputError, match=rf"holds the outputs of {part.split('/')[0]} .* training\.trainable makes it trainable"
        ):
            command(dataclasses.replace(config, training=given))


def test_run_from_a_cache_resumes_only_from_a_cache(config: TrainConfig, pixels: TrainConfig, tmp_path: Path) -> None:
    runs = {}
    for name, begun in (("cached", with_data(config, cache="elsewhere/cache")), ("pixels", pixels)):
        runs[name] = tmp_path / name
        runs[name].mkdir()
        (runs[name] / "config.json").write_text(json.dumps({"config": configuration.to_json(begun)}))
    loop.check_run(config, runs["cached"])  # a cache may have moved
    loop.check_run(pixels, runs["pixels"])
    with pytest.raises(InputError, match="started without a cache"):
        loop.check_run(config, runs["pixels"])
    with pytest.raises(InputError, match="started with a cache"):
        loop.check_run(pixels, runs["cached"])


def test_cache_needs_a_number_of_crops(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"Set data\.crops_per_image"):
        with_data(config, crops_per_image=None).check()


def test_run_from_weights_reads_the_cache_of_their_encoders(
    trainable: TrainConfig, cached_losses: list[float], pixel_run: Path
) -> None:
    """That run's UNet has been trained; its encoders are those of the cache."""
    training = dataclasses.replace(trainable.training, init_from=(str(pixel_run),), seed=9)
    other = dataclasses.replace(trainable, training=training)
    assert not encode(other).missing()  # it is the same cache, and complete
    encoding.from_cache(other, open_dataset(other), encoders_of(other))


# Fingerprints


def test_fingerprint_depends_on_every_bit_and_position() -> None:
    numbers = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    numbers[1, 1] = 0

    def with_changes(*changes: tuple[tuple[int, ...], Any]) -> str:
        changed = numbers.copy()
        for place, value in changes:
            changed[place] = value
        return encoding.fingerprint({"a": {"kernel": jnp.asarray(changed)}})

    same = with_changes()
    assert with_changes() == same
    bits = [(place, np.nextafter(numbers[place], np.float32(9))) for place in np.ndindex(6, 5)]
    found = [with_changes(change) for change in bits]
    found += [with_changes(((1, 1), -0.0)), with_changes(((0, 0), numbers[5, 4]), ((5, 4), numbers[0, 0]))]
    found += [with_changes(((0, 0), numbers[0, 1]), ((0, 1), numbers[0, 0])), with_changes(*bits[:2])]
    found += [encoding.fingerprint({"a": {"kernel": jnp.asarray(numbers.reshape(5, 6))}})]
    found += [encoding.fingerprint({"b": {"kernel": jnp.asarray(numbers)}}), encoding.fingerprint({})]
    assert len({same, *found}) == 1 + len(found)


def test_fingerprint_depends_on_values_and_not_on_their_dtype() -> None:
    rounded = jnp.asarray(np.random.default_rng(0).normal(size=7), jnp.bfloat16)
    assert encoding.fingerprint({"a": rounded}) == encoding.fingerprint({"a": rounded.astype(jnp.float32)})


# Interrupted and shared


class Crash(Exception):
    pass


def test_interrupted_encoding_resumes_with_the_missing_pieces(
    config: TrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, written = with_data(config, cache=str(tmp_path / "cache")), []

    def write(*arguments: Any, original: Any = encoding._write) -> None:
        if len(written) == 3:  # a group of the second piece is written already
            raise Crash
        written.append(original(*arguments))

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(encoding, "_write", write)
        encode(interrupted)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record")}
    assert {path.name for path in first} == {"00000.array_record"} and len(first) == 2
    encode(interrupted)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert files(tmp_path / "cache") == files(folder)
    assert not list(tmp_path.rglob("*.partial"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record")}
    encode(interrupted)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record")} == before


KILLED = """
import json, os, signal, sys
from sdxl_jax import config as configuration
from sdxl_jax.training import encoding

replace, moved = os.replace, []

def replace_or_die(source, target):
    if str(target).endswith("latents/00001.array_record"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
config = configuration.from_json(json.loads(sys.argv[1]), configuration.TrainConfig)
encoding.encode(config, batch_size=int(sys.argv[2]), piece_images=int(sys.argv[3]), progress=False)
"""


@pytest.mark.slow
def test_killed_encoding_resumes_with_the_missing_pieces(
    config: TrainConfig, encoders: Params, folder: Path, tmp_path: Path
) -> None:
    """Killed between the two files of a piece."""
    killed = with_data(config, cache=str(tmp_path / "cache"))
    given = [json.dumps(configuration.to_json(killed)), str(BATCH), str(PIECE)]
    environment = compiling.environment(Path(jax.config.values["jax_compilation_cache_dir"]))
    command = [sys.executable, "-c", KILLED, *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    there = files(tmp_path / "cache")
    assert "text/00001.array_record" in there and "latents/00001.array_record" not in there
    with pytest.raises(InputError, match="2 of its 3 pieces are missing"):
        encoding.from_cache(killed, open_dataset(killed), encoders)
    encode(killed)
    assert files(tmp_path / "cache") == files(folder)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_shares_together_write_what_one_writes(
    config: TrainConfig, encoders: Params, folder: Path, tmp_path: Path
) -> None:
    shared = with_data(config, cache=str(tmp_path / "cache"))
    assert encode(shared, share=(0, 2)).missing() == [1]
    with pytest.raises(InputError, match=r"1 of its 3 pieces are missing.*resumes where it stopped"):
        encoding.from_cache(shared, open_dataset(shared), encoders)
    assert encode(shared, share=(1, 2)).missing() == []
    assert files(tmp_path / "cache") == files(folder)


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0)])
def test_impossible_share_is_refused(config: TrainConfig, tmp_path: Path, share: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"share={share[0]},{share[1]} cannot be used\. Give"):
        encode(with_data(config, cache=str(tmp_path / "cache")), share=share)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("batch_size", [0, -4])
def test_impossible_batch_is_refused(config: TrainConfig, tmp_path: Path, batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"batch_size={batch_size} .* Give a batch_size of 1 or more"):
        encode(with_data(config, cache=str(tmp_path / "cache")), batch_size=batch_size)
    assert not (tmp_path / "cache").exists()


def test_cache_of_another_provenance_is_not_resumed(config: TrainConfig, folder: Path) -> None:
    before = files(folder)
    with pytest.raises(InputError, match=r"(?s)holds a cache of something else.*crops\.seed: 3 -> 5"):
        encode(with_data(config, seed=5))
    assert files(folder) == before


# Images that cannot be read


@pytest.fixture(scope="module")
def damaged(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two images are cut off after their header; that is found out while encoding."""
    home = tmp_path_factory.mktemp("damaged")
    assert config.data.folder is not None
    shutil.copytree(config.data.folder, home / "images")
    for number in DAMAGED:
        path = home / "images" / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:200])
    return with_data(config, folder=str(home / "images"), cache=str(home / "cache"), verify_images=False)


def test_more_unreadable_images_than_allowed_stop_the_encoding_before_their_piece(
    damaged: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "FEW", 4)
    given = with_data(damaged, cache=str(tmp_path / "cache"), max_bad_share=0.01)
    with pytest.raises(InputError, match=r"1 of the first \d+ images cannot.*(?s:.)*this piece was not written"):
        encode(given)
    assert not list(tmp_path.rglob("*.partial"))
    plan = encode(dataclasses.replace(given, data=dataclasses.replace(given.data, max_bad_share=1.0)))
    assert not plan.missing()


def test_unreadable_image_is_named_once_and_replaced_by_the_next(
    damaged: TrainConfig, encoders: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(damaged)
    output = capsys.readouterr().out
    for number in DAMAGED:
        assert output.count(f"{number:03d}.png") == 1, output
    assert output.count("cannot be encoded: ") == len(DAMAGED)

    data = encoding.from_cache(damaged, open_dataset(damaged), encoders)
    cache = data.loader.cache
    assert cache is not None
    for position, image in enumerate(data.order.numbers.tolist()):
        if image in DAMAGED:
            with pytest.raises(Unencoded, match=f"{image:03d}.png"):
                cache.crop(position, 0)
        else:
            cache.crop(position, CROPS - 1)

    batches, images = take(data, 9), take(open_dataset(with_data(damaged, cache=None)), 9)
    assert_identical(batches, take(data, 9))
    assert_identical(
        [batch._replace(encoded=None) for batch in batches], [batch._replace(image=None) for batch in images]
    )
    assert 0 < sum(int(batch.replaced.sum()) for batch in batches) < 9 * BATCH
    assert not {int(image) for batch in batches for image in batch.example}.intersection(DAMAGED)
    output = capsys.readouterr().out
    assert output.count("replaced while training: ") == 3 * len(DAMAGED), output  # once in each of three passes


# Other models


def of_model(trainable: TrainConfig, parts: ModelConfig, cache: Path, steps: int) -> TrainConfig:
    training = dataclasses.replace(trainable.training, steps=steps)
    return with_data(dataclasses.replace(trainable, model=parts, training=training), cache=str(cache))


@pytest.mark.slow
def test_model_without_pooled_text_trains_from_its_cache(trainable: TrainConfig, tmp_path: Path) -> None:
    """Like SD 1: one tower, no sizes."""
    parts = ModelConfig(
        unet=dataclasses.replace(UNET, context_dim=8, vector_dim=None),
        vae=MODEL.vae,
        text=(Tower("text_encoder", ClipTextConfig(8, 2, 2, 16), END_OF_TEXT, ContextState.LAST),),
        micro=None,
        unconditional=UnconditionalKind.EMPTY,
        default_size=(32, 32),
    )
    config = of_model(trainable, parts, tmp_path / "cache", steps=2)
    encode(config)
    data = encoding.from_cache(config, open_dataset(config), encoders_of(config))
    for batch in take(data, 2):
        assert batch.encoded is not None and batch.encoded.pooled is None
        assert batch.encoded.context is not None and batch.encoded.context.shape == (BATCH, 77, 8)
    assert len(losses(config, tmp_path / "run")) == 2


@pytest.mark.slow
def test_model_conditioned_on_scores_trains_from_its_cache(trainable: TrainConfig, tmp_path: Path) -> None:
    """Like the refiner: one tower with pooled text, scores."""
    parts = dataclasses.replace(
        MODEL,
        unet=dataclasses.replace(UNET, context_dim=8, vector_dim=8 + 5 * 4),
        text=tiny.MODEL.text[1:],
        micro=MicroConfig(Numbers.SIZE_CROP_AESTHETIC, embedding_dim=4),
        unconditional=UnconditionalKind.EMPTY,
    )
    assert trainable.data.folder is not None
    images = shutil.copytree(trainable.data.folder, tmp_path / "images")
    config = of_model(trainable, parts, tmp_path / "cache", steps=3)
    config = with_data(config, folder=str(images), aesthetic="score")
    encode(config)
    from_images = with_data(config, cache=None)
    read = take(encoding.from_cache(config, open_dataset(config), encoders_of(config)), 2)
    assert_identical([batch.micro for batch in read], [batch.micro for batch in take(open_dataset(from_images), 2)])
    for batch in read:
        np.testing.assert_array_equal(batch.micro.aesthetic_score, 4 + batch.example / 4)
    found = losses(config, tmp_path / "cached")
    expected = losses(from_images, tmp_path / "run")
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # as above

    lines = read_lines(images)
    for line in lines:
        line["score"] += 2
    write_lines(images, lines)
    changed = losses(from_images, tmp_path / "other")
    # Only the scores differ; with equal ones a run repeats bit for bit. Blocks and last layer are zero at first.
    assert changed[0] == expected[0]
    assert changed[2] != expected[2]


@pytest.mark.slow
def test_encoding_from_and_to_a_bucket_gives_the_bytes_of_folders(
    config: TrainConfig, encoders: Params, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two shares, of which the second resumes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    assert config.data.folder is not None
    for destination in (tmp_path / "shards", epath.Path(f"{bucket}/shards")):
        build(config.data.folder, destination, workers=0, progress=False)
    local = with_data(config, folder=str(tmp_path / "shards"), cache=str(tmp_path / "cache"))
    remote = with_data(config, folder=f"{bucket}/shards", cache=f"{bucket}/cache")
    encode(local)
    assert encode(remote, share=(1, 2)).missing() == [0, 2]
    plan = encode(remote)
    assert not plan.missing()
    paths = [f"{kind}/{piece:05d}.array_record" for kind in ("latents", "text") for piece in range(plan.pieces)]
    found = {name: buckets.read_bytes(epath.Path(f"{bucket}/cache/{name}"), "") for name in [*paths, "cache.json"]}
    assert found == files(tmp_path / "cache")
    one, other = (take(encoding.from_cache(each, open_dataset(each), encoders)) for each in (local, remote))
    for a, b in zip(one, other, strict=True):
        assert_identical(a, b)
