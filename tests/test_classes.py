"""Class-conditional diffusion: labels from the data to the UNet, in training and in sampling.

Compiling takes most of the time: one model is trained, and the tests share one size.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import call
from image_sources import encoded, write_folder, write_parquet, write_tar
from PIL import Image

from sdxl_jax import model as models
from sdxl_jax.arrays import Batch, MicroConditioning
from sdxl_jax.commands import sample, serve
from sdxl_jax.conditioning import classes, micro
from sdxl_jax.conditioning.classes import NO_CLASS
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.config import TrainConfig
from sdxl_jax.data import inspection
from sdxl_jax.data.build.build import build
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.shards import open_shards
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import from_json, to_json
from sdxl_jax.model import Model, ModelConfig, UnconditionalKind
from sdxl_jax.models import unet
from sdxl_jax.models.unet import ClassConfig, ClassPlace
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.sampling.generate import generate, micro_rows
from sdxl_jax.sampling.options import Options
from sdxl_jax.serving.session import Request, fields_of, read_fields
from sdxl_jax.sizes import Size
from sdxl_jax.training import encoding
from sdxl_jax.training.objectives.denoising import Denoising, batch_loss, with_dropout
from sdxl_jax.weights import names
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.detect import find
from sdxl_jax.weights.lazy import in_memory
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.names import Dialect, Naming

SIDE = 16
CLASSES = 3


def class_model(place: ClassPlace = ClassPlace.TOKEN) -> ModelConfig:
    """Classes and sizes alone: no text encoders, and no autoencoder but the exact one."""
    return dataclasses.replace(
        tiny.MODEL,
        text=(),
        vae=WaveletConfig(),
        micro=MicroConfig(Numbers.SIZE_CROP, embedding_dim=4),
        unconditional=UnconditionalKind.ALL_ZEROS,
        default_size=(SIDE, SIDE),
        unet=dataclasses.replace(
            tiny.MODEL.unet,
            middle_depth=2,  # that of the last level, as diffusers needs it
            context_dim=16 if place is ClassPlace.TOKEN else None,
            vector_dim=16,
            in_channels=12,
            out_channels=12,
            classes=ClassConfig(CLASSES, place),
        ),
    )


MODEL = class_model()


def images(count: int = 6) -> dict[str, bytes]:
    """One folder per class, of which the second has most images."""
    folders = ("ape", "bee", "bee", "cow", "bee", "ape")
    return {f"{folders[number]}/{number}.png": encoded("PNG", SIDE, SIDE, seed=number) for number in range(count)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", images())


def config(folder: Path, place: ClassPlace = ClassPlace.TOKEN, **data: Any) -> TrainConfig:
    base = tiny.train_config(folder)
    data = {"buckets": ((SIDE, SIDE),), "batch_size": 2, "label": "folder"} | data
    return dataclasses.replace(
        base,
        model=class_model(place),
        data=dataclasses.replace(base.data, **data),
        training=dataclasses.replace(base.training, caption_dropout=0.0, class_dropout=0.2, micro_dropout=0.2),
    )


def changed(given: TrainConfig, section: str, **values: Any) -> TrainConfig:
    return dataclasses.replace(given, **{section: dataclasses.replace(getattr(given, section), **values)})


def opened(folder: Path, **data: Any) -> BucketedDataset:
    settings = {"buckets": ((SIDE, SIDE),), "batch_size": 2, "label": "folder"} | data
    return BucketedDataset(DataConfig(str(folder), **settings), None)


def labels(dataset: BucketedDataset) -> dict[str, int]:
    name = dataset.config.label or ""
    found = {dataset.source.name(image): dataset.source.number(image, name) for image in range(len(dataset.source))}
    return {path: int(number) for path, number in found.items()}


EXPECTED = {
    "ape/0.png": 0,
    "ape/5.png": 0,
    "bee/1.png": 1,
    "bee/2.png": 1,
    "bee/4.png": 1,
    "cow/3.png": 2,
}


# Conditioning


def test_class_embedding_is_the_row_of_the_label_and_zeros_without_a_class() -> None:
    table = jnp.arange(6.0).reshape(3, 2) + 1
    found = classes.embed(ClassConfig(3), {"class_token": {"embedding": table}}, np.array([2, NO_CLASS, 0], np.int32))
    np.testing.assert_array_equal(found, [[5, 6], [0, 0], [1, 2]])


@pytest.mark.parametrize("with_text", [False, True])
def test_class_token_comes_after_the_text(with_text: bool) -> None:
    embedded = jnp.full((2, 16), 7.0)
    context = jnp.ones((2, 77, 16)) if with_text else None
    given = MicroConditioning(*(np.full((2, 2), 64, np.int32) for _ in range(3)))
    found = models.condition(MODEL, TextConditioning(context, None), given, embedded)
    assert found.class_embedding is None and isinstance(found.context, jax.Array)
    assert found.context.shape == (2, 78 if with_text else 1, 16)
    np.testing.assert_array_equal(found.context[:, -1], embedded)
    added = models.condition(class_model(ClassPlace.TIMESTEP), TextConditioning(context, None), given, embedded)
    assert added.class_embedding is embedded and added.context is context


def test_each_condition_is_dropped_on_its_own_by_zeros() -> None:
    """Dropout of sgm: shares as given, independent of each other, and zeros in place of the embedding, not of the
    number 0."""
    count, share = 4000, 0.25
    settings = MicroConfig(Numbers.SIZE_CROP_TARGET, embedding_dim=4)
    given = MicroConditioning(*(np.full((count, 2), 64, np.int32) for _ in range(3)))
    keys = jax.random.split(jax.random.key(0), count)
    dropped = micro.drop(settings, given, keys, share)
    assert dropped.kept is not None
    kept = np.asarray(dropped.kept)
    np.testing.assert_allclose(kept.mean(axis=0), 1 - share, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(kept.T), np.eye(3), atol=0.06)
    vector = np.asarray(micro.vector(settings, None, dropped)).reshape(count, 3, 2 * 4)
    whole = np.asarray(micro.vector(settings, None, given)).reshape(count, 3, 2 * 4)
    np.testing.assert_array_equal(vector, whole * kept[..., None])
    drawn = classes.drop(np.ones(count, np.int32), keys, share)
    assert set(np.asarray(drawn).tolist()) == {1, NO_CLASS}
    assert np.mean(np.asarray(drawn) == NO_CLASS) == pytest.approx(share, abs=0.03)


def test_unconditional_sizes_are_zeros_unless_they_are_given() -> None:
    positive, negative = micro_rows(MODEL, Options(), 2, Size(16, 16))
    assert positive.kept is None
    np.testing.assert_array_equal(negative.kept, np.zeros((2, 2)))
    _, negative = micro_rows(MODEL, Options(negative_original_size=Size(8, 8)), 1, Size(16, 16))
    np.testing.assert_array_equal(negative.kept, [[1, 0]])
    _, negative = micro_rows(tiny.MODEL, Options(), 1, Size(16, 16))
    assert negative.kept is None, "SDXL's negative prompt has the sizes of the prompt"


# The model


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no classes": ({"classes": ClassConfig(0)}, "classes.number=0. Give 1 or more"),
    "no text, no classes": ({"classes": None}, "no text encoder. Give at least one .* or classes"),
    "nothing attends": ({"context_dim": None}, "the UNet attends to its class token. Set it to a width"),
    "no token": ({"classes": ClassConfig(3, ClassPlace.TIMESTEP)}, "attends to nothing. Set it to None"),
    "another vector": ({"vector_dim": 24}, "width of 16 together. Set it to 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_does_not_fit_together_is_refused(name: str) -> None:
    fields, message = REFUSED[name]
    MODEL.check()
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, **fields)).check()


@pytest.mark.parametrize("place", ClassPlace)
def test_model_settings_survive_json(place: ClassPlace) -> None:
    assert from_json(to_json(class_model(place)), ModelConfig) == class_model(place)
    saved = to_json(tiny.MODEL)
    del saved["unet"]["classes"]  # as before there were classes
    assert from_json(saved, ModelConfig) == tiny.MODEL


@pytest.mark.parametrize("dialect", [Dialect.DIFFUSERS, Dialect.ORIGINAL])
@pytest.mark.parametrize("place", ClassPlace)
def test_tensors_are_named_and_found_again(place: ClassPlace, dialect: Dialect) -> None:
    network = dataclasses.replace(tiny.MODEL.unet, classes=ClassConfig(5, place))
    table = names.table(network, Naming(dialect))
    name = {ClassPlace.TOKEN: "class_token.weight", ClassPlace.TIMESTEP: "class_embedding.weight"}[place]
    if (place, dialect) == (ClassPlace.TIMESTEP, Dialect.ORIGINAL):
        name = "label_emb.weight"
    assert table.by_name[name].shape == (5, 16 if place is ClassPlace.TOKEN else 32)
    (found,) = find({entry.name: entry.shape for entry in table.entries})
    assert isinstance(found.config, unet.UNetConfig) and found.config.classes == network.classes


@pytest.mark.parametrize(("place", "layout"), [(ClassPlace.TOKEN, "orbax"), (ClassPlace.TIMESTEP, "single-file")])
def test_model_of_classes_is_converted_there_and_back(tmp_path: Path, place: ClassPlace, layout: str) -> None:
    model = tiny.random_model(class_model(place), 0)
    path = tmp_path / ("model.safetensors" if layout == "single-file" else "model")
    convert(model, path, layout, progress=False)
    card = (path / "README.md" if path.is_dir() else path.with_suffix(".md")).read_text()
    assert "Classes of images: 3" in card and "--class 0 --out" in card and "ComfyUI" not in card
    again = load_model(path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, dict(model.params))


def test_diffusers_has_classes_beside_the_timestep_alone(tmp_path: Path) -> None:
    added = ClassConfig(5, ClassPlace.TIMESTEP)
    config = dataclasses.replace(tiny.MODEL, unet=dataclasses.replace(tiny.MODEL.unet, middle_depth=2, classes=added))
    weights = in_memory(tiny.random_model(config, 0))
    alone = dataclasses.replace(
        weights, leaves={path: leaf for path, leaf in weights.leaves.items() if path.startswith("unet/")}
    )
    convert(alone, tmp_path / "unet", "diffusers", progress=False)
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["num_class_embeds"] == 5
    assert load_model(tmp_path / "unet").config.unet.classes == added
    for place, message in ((ClassPlace.TOKEN, "has no class token"), (ClassPlace.TIMESTEP, "attends to text")):
        with pytest.raises(InputError, match=message):
            convert(tiny.random_model(class_model(place), 0), tmp_path / place.value, "diffusers", progress=False)
        assert not (tmp_path / place.value).exists()


# Labels of the data


def test_subfolders_are_classes(folder: Path) -> None:
    assert labels(opened(folder)) == EXPECTED
    assert inspection.inspect(opened(folder))["classes"] == {"found": 3, "fewest": 1, "most": 3}


def test_subfolders_of_one_name_are_one_class_in_all_sources(tmp_path: Path) -> None:
    folders = {"a": ("ape", "bee"), "b": ("bee", "cow")}
    for folder, inside in folders.items():
        write_folder(tmp_path / folder, {f"{name}/0.png": encoded("PNG", SIDE, SIDE) for name in inside})
    sources = tuple(Source(str(tmp_path / folder)) for folder in folders)
    settings: dict[str, Any] = {"buckets": ((SIDE, SIDE),), "batch_size": 2, "label": "folder"}
    dataset = BucketedDataset(DataConfig(sources=sources, **settings), None)
    found = {str(Path(path).relative_to(tmp_path)): number for path, number in labels(dataset).items()}
    assert found == {"a/ape/0.png": 0, "a/bee/0.png": 1, "b/bee/0.png": 1, "b/cow/0.png": 2}
    assert not any("shard sets" in note for note in dataset.notes())
    build(str(tmp_path / "a"), tmp_path / "shards", workers=0, progress=False, captions=False, class_folders=True)
    mixed = (Source(str(tmp_path / "shards")), Source(str(tmp_path / "b")))
    assert any(
        "classes of shard sets are the numbers" in note
        for note in BucketedDataset(DataConfig(sources=mixed, **settings), None).notes()
    )


def test_an_image_that_is_refused_changes_no_number_of_a_class(folder: Path) -> None:
    (folder / "bat").mkdir()
    (folder / "bat" / "0.png").write_bytes(b"not an image")
    numbers = labels(opened(folder, on_refused=OnRefused.SKIP))
    assert numbers == {path: number + (number > 0) for path, number in EXPECTED.items()}


def as_metadata(path: Path) -> Path:
    lines = [{"file_name": name, "label": EXPECTED[name]} for name in images()]
    write_folder(path, images())
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def as_json_files(path: Path) -> Path:
    fields = {f"{name[:-4]}.json": json.dumps({"label": EXPECTED[name]}).encode() for name in images()}
    return write_folder(path, images() | fields)


def as_cls_members(path: Path) -> Path:
    """WebDataset's ImageNet: 0.png, 0.cls."""
    named = {f"{name[:-4]}.cls": str(EXPECTED[name]).encode() for name in images()}
    members = {name: data for pair in zip(images().items(), named.items(), strict=True) for name, data in pair}
    return write_tar(path.with_suffix(".tar"), members)


def as_parquet(path: Path) -> Path:
    columns = {"image": list(images().values()), "label": [EXPECTED[name] for name in images()]}
    return write_parquet(path.with_suffix(".parquet"), columns)


@pytest.mark.parametrize("write", [as_metadata, as_json_files])
def test_labels_of_a_folder_are_a_numeric_field(write: Any, tmp_path: Path) -> None:
    assert labels(opened(write(tmp_path / "images"), label="label")) == EXPECTED


@pytest.mark.parametrize(
    ("write", "label", "options"),
    [
        (lambda path: write_folder(path, images()), "folder", {"class_folders": True}),
        (as_metadata, "label", {}),
        (as_json_files, "label", {}),
        (as_cls_members, "cls", {}),
        (as_parquet, "label", {}),
    ],
)
def test_labels_survive_a_build(write: Any, label: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "images")
    shards = tmp_path / "shards"
    build(str(source), shards, workers=0, progress=False, captions=False, **options)
    found = opened(shards, label=label)
    assert sorted(labels(found).values()) == sorted(EXPECTED.values())
    pixels = {data: EXPECTED[name] for name, data in images().items()}
    opened_shards = open_shards(shards)
    for image in range(len(opened_shards)):
        assert int(opened_shards.numbers[label][image]) == pixels[opened_shards.read(image)]
    build(str(shards), tmp_path / "again", workers=0, progress=False, captions=False)
    assert sorted(labels(opened(tmp_path / "again", label=label)).values()) == sorted(EXPECTED.values())


def test_shards_without_captions_are_refused_where_captions_are_needed(folder: Path, tmp_path: Path) -> None:
    build(str(folder), tmp_path / "shards", workers=0, progress=False, captions=False)
    settings = DataConfig(str(tmp_path / "shards"), buckets=((SIDE, SIDE),), batch_size=2)
    with pytest.raises(InputError, match=r"was built without captions .*which this training needs"):
        BucketedDataset(settings, lambda captions: {})
    with pytest.raises(InputError, match="captioned=False, and now True is given"):
        build(str(folder), tmp_path / "shards", workers=0, progress=False)
    with pytest.raises(InputError, match="--class-folders has no effect"):
        build(str(as_parquet(tmp_path / "a")), tmp_path / "b", workers=0, captions=False, class_folders=True)


def test_images_without_a_class_are_refused_or_skipped(folder: Path) -> None:
    write_folder(folder, {"7.png": encoded("PNG", SIDE, SIDE, seed=7)})
    with pytest.raises(InputError, match=r"7\.png: has no folder; data\.label requires the number of a class"):
        opened(folder)
    skipping = opened(folder, on_refused=OnRefused.SKIP)
    assert sorted(skipping.labels().tolist()) == sorted(EXPECTED.values())


@pytest.mark.parametrize("label", [1.5, -1])
def test_label_that_is_no_number_of_a_class_is_refused(label: float, tmp_path: Path) -> None:
    fields = {"0.json": json.dumps({"label": label}).encode(), "1.json": b'{"label": 1}'}
    write_folder(tmp_path, {f"{name}.png": encoded("PNG", SIDE, SIDE, seed=name) for name in range(2)} | fields)
    with pytest.raises(InputError, match=rf"0\.png: has label={label:g}; data\.label requires"):
        opened(tmp_path, label="label")


def test_label_that_the_data_do_not_have_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.label=kind: .* no numeric field of that name"):
        opened(as_json_files(tmp_path / "a"), label="kind")
    write_folder(tmp_path / "flat", {"0.png": encoded("PNG", SIDE, SIDE)})
    with pytest.raises(InputError, match="has no subfolders with images, which the classes would be"):
        opened(tmp_path / "flat")


def test_batches_have_labels_and_dumps_show_them(folder: Path, tmp_path: Path) -> None:
    dataset = opened(folder)
    batch = next(dataset.iterate())
    assert batch.label is not None and batch.label.dtype == np.int32
    names_of = [dataset.source.name(int(image)) for image in batch.example]
    assert batch.label.tolist() == [EXPECTED[name] for name in names_of]
    inspection.dump(dataset, 1, tmp_path / "dump")
    record = json.loads((tmp_path / "dump" / "000000.json").read_text())
    assert record["label"] == EXPECTED[record["source"]]


# Configurations


def test_configuration_that_does_not_fit_is_refused(folder: Path) -> None:
    given = config(folder)
    given.check()
    assert not given.wants_captions
    text = dataclasses.replace(tiny.train_config(folder), data=given.data)
    cases = [
        (changed(given, "data", label=None), "model.unet.classes needs a class for every image. Set data.label"),
        (text, "data.label=folder has no effect: this model is not conditioned on classes"),
        (changed(given, "validation", classes=(0, 3)), "validation.classes: Class 3 .* classes 0 to 2"),
        (changed(given, "validation", prompts=("a cat",)), "validation.prompts has no effect"),
        (changed(tiny.train_config(folder), "training", class_dropout=0.1), "class_dropout=0.1 has no effect"),
        (changed(given, "training", class_dropout=1.5), "class_dropout"),
        (
            dataclasses.replace(
                given,
                model=dataclasses.replace(MODEL, micro=None, unet=dataclasses.replace(MODEL.unet, vector_dim=None)),
            ),
            "training.micro_dropout=0.2 has no effect",
        ),
    ]
    for case, message in cases:
        with pytest.raises(InputError, match=message):
            case.check()


def test_data_with_more_classes_than_the_model_is_refused(folder: Path) -> None:
    given = config(folder)
    fewer = dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, classes=ClassConfig(2)))
    objective = Denoising(dataclasses.replace(given, model=fewer))
    with pytest.raises(
        InputError, match=r"images of class 2 \(data.label=folder\), but the model has the classes 0 to 1"
    ):
        objective.check_data(opened(folder))


# Training


def batch(label: Any, original_size: Any) -> Batch:
    sizes = MicroConditioning(original_size, np.zeros((2, 2), np.int32), np.full((2, 2), SIDE, np.int32))
    image = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    return Batch(image, {}, sizes, np.zeros(2, np.int32), np.zeros(2, bool), label=label)


def test_loss_depends_on_class_and_size_unless_they_are_dropped() -> None:
    given = changed(config(Path("unused")), "training", class_dropout=0.0, micro_dropout=0.0)
    keys, params = jax.random.split(jax.random.key(0), 2), tiny.random_model(MODEL, 0).params
    loss = jax.jit(lambda given_batch: batch_loss(params, {}, given_batch, keys, given, {}))
    one, other = np.array([0, 1], np.int32), np.array([0, 2], np.int32)
    small, large = (np.full((2, 2), side, np.int32) for side in (8, 64))
    assert loss(batch(one, small)) != loss(batch(other, small)) != loss(batch(other, large))
    micro_kept, label = with_dropout(batch(one, small), keys, given)
    assert micro_kept.kept is None and label is one, "without dropout nothing is computed for it"
    always = changed(given, "training", class_dropout=1.0, micro_dropout=1.0)
    micro_kept, label = with_dropout(batch(one, small), keys, always)
    np.testing.assert_array_equal(label, [NO_CLASS, NO_CLASS])
    np.testing.assert_array_equal(micro_kept.kept, np.zeros((2, 2)))


def test_cache_of_a_model_without_text_gives_the_same_batches(folder: Path, tmp_path: Path) -> None:
    given = config(folder, cache=str(tmp_path / "cache"), crops_per_image=1)
    encoding.encode(given, batch_size=2, progress=False)
    dataset = opened(folder, crops_per_image=1)
    plain, cached = (next(each.iterate()) for each in (dataset, encoding.from_cache(given, dataset, {})))
    assert cached.image is None and cached.encoded is not None and cached.encoded.context is None
    np.testing.assert_array_equal(cached.label, plain.label)
    latents = models.vae.encode(MODEL.vae, {}, jnp.asarray(plain.image, jnp.float32) / 127.5 - 1).mean
    np.testing.assert_allclose(np.asarray(cached.encoded.mean, np.float32), latents, rtol=2**-8, atol=2**-8)


# Sampling


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(MODEL, 0)


SETTINGS: dict[str, Any] = {"steps": 2, "batch_size": 3, "seed": 1, "guidance": 3.0}


def test_images_depend_on_their_class_and_guidance_is_against_no_class(model: Model) -> None:
    found = generate(model, [""] * 3, classes=[0, 2, None], init_noise=np.ones((3, 8, 8, 12), np.float32), **SETTINGS)
    assert found.images.shape == (3, SIDE, SIDE, 3)
    first, second, none = found.latents
    assert np.abs(first - second).max() > 1e-2 and np.abs(first - none).max() > 1e-2
    again = generate(model, ["", None, ""], classes=[0, 0, 0], negative_prompts=None, **SETTINGS)
    assert again.images.shape == found.images.shape


def test_class_that_cannot_be_sampled_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="Class 3 is asked for, but the model has the classes 0 to 2"):
        generate(model, [""], classes=[3], **SETTINGS)
    with pytest.raises(InputError, match="The prompt 'a cat' has no effect: the model has no text encoders"):
        generate(model, ["a cat"], classes=[1], **SETTINGS)
    with pytest.raises(InputError, match="2 classes for 1 prompts"):
        generate(model, [""], classes=[1, 2], **SETTINGS)
    with pytest.raises(InputError, match="Class 1 is asked for, but the model is not conditioned on classes"):
        generate(tiny.random_model(tiny.MODEL, 0), ["a"], classes=[1], steps=2)


def test_command_samples_classes_and_its_images_say_so(model: Model, tmp_path: Path) -> None:
    convert(model, tmp_path / "model", "orbax", progress=False)
    given = [str(tmp_path / "model"), "--steps", "2", "--batch-size", "3", "--guidance", "3"]
    sample.run([*given, "--class", "2", "--class", "0", "--class", "1", "--out", str(tmp_path / "out")])
    text = sample.read_text(tmp_path / "out" / "000001.png")
    assert text["class"] == "0" and text["prompt"] == ""
    again = sample._parsed(["m", "--from-png", str(tmp_path / "out/000001.png"), "--out", "o"])
    assert (again.class_, again.prompt) == ((0,), ("",))
    lines = tmp_path / "classes.jsonl"
    lines.write_text('{"class": 2}\n{"class": 0}\n{"class": 1}\n')
    measured = ["--reference", tmp_path / "out", "--out", tmp_path / "evaluated", "--metrics", "psnr", "--json"]
    outcome = call("evaluate", "model", *given, "--prompts-file", lines, *measured)
    assert outcome.code == 0, outcome
    for name in ("000000.png", "000001.png", "000002.png"):
        sampled, evaluated = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("out", "evaluated"))
        np.testing.assert_array_equal(sampled, evaluated)
    lines.write_text('{"class": 1}\n{"class": 7}\n')
    with pytest.raises(InputError, match="Class 7 is asked for, but the model has the classes 0 to 2"):
        sample.run([*given, "--prompts-file", str(lines), "--out", str(tmp_path / "c")])
    with pytest.raises(InputError, match="class-conditional model, --class N"):
        sample.run([*given, "--out", str(tmp_path / "c")])
    lines.write_text('{"class": "cat"}')
    with pytest.raises(InputError, match='line 1: class is "cat", expected a whole number'):
        sample.run([*given, "--prompts-file", str(lines), "--out", str(tmp_path / "c")])


def test_every_prompt_is_sampled_with_every_class_and_sweep_value() -> None:
    parsed = sample._parsed(["m", "--out", "o", "--prompt", "a", "--prompt", "b", "--class", "4", "--class", "5"])
    assert [(each.prompt, each.class_) for each in sample._tasks(parsed)] == [("a", 4), ("a", 5), ("b", 4), ("b", 5)]
    parsed = sample._parsed(["m", "--out", "o", "--sweep", "class=1,2"])
    assert [(each.class_, each.label) for each in sample._tasks(parsed)] == [(1, ("class 1",)), (2, ("class 2",))]
    with pytest.raises(InputError, match=r"--sweep class=x: class is .*x.*, expected a whole number"):
        sample._tasks(sample._parsed(["m", "--out", "o", "--class", "4", "--sweep", "class=x"]))


def test_page_has_a_class_and_its_command_repeats_it() -> None:
    request = Request("", None, Options(), class_=2)
    fields = fields_of(MODEL, request)
    assert fields["class"] == 2 and fields_of(MODEL)["class"] is None
    assert read_fields(MODEL, fields) == request
    with pytest.raises(InputError, match=r"class=1\.5: expected a whole number"):
        read_fields(MODEL, fields | {"class": 1.5})
    served = serve.Serve(model=Path("model"))
    assert "--prompt '' --class 2 --out" in serve.describe(served, request, MODEL).command
