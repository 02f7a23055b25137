"""`sdxl-jax finetune`: what it chooses, what it refuses, and one run of the whole command."""

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from command import Outcome, call
from PIL import Image
from test_adapter_training import MODEL

from sdxl_jax import config as configuration
from sdxl_jax.adapters.embeddings import Norm
from sdxl_jax.arrays import BaseDtype
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.data.mixture import Source
from sdxl_jax.errors import InputError
from sdxl_jax.finetuning import choices, config_file, run
from sdxl_jax.finetuning.choices import Images, Machine
from sdxl_jax.finetuning.options import Kind, Options
from sdxl_jax.finetuning.survey import LINKS, survey
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig
from sdxl_jax.models.layers import Dtype, Remat
from sdxl_jax.sampling.contact_sheet import contact_sheet, first_row
from sdxl_jax.weights import lora
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.lazy import InMemory, Origin, SourceLayout, Weights

pytestmark = pytest.mark.usefixtures("shared_steps", "quick_compilation")

GPU, CPU = Machine("gpu", 1), Machine("cpu", 1)


# What is chosen


def images_of(*sizes: tuple[int, int]) -> Images:
    return Images(np.array(sizes, np.int32), [(f"image {n}",) for n in range(len(sizes))])


SQUARE = images_of(*[(1500, 1500)] * 12)


def chosen(
    model: ModelConfig = SDXL_BASE,
    kind: Kind = Kind.LORA,
    images: Images = SQUARE,
    machine: Machine = GPU,
    options: Options = Options(),
) -> TrainConfig:
    if kind is Kind.TEXTUAL_INVERSION:
        options = dataclasses.replace(options, trigger="<zwx>")
    config = choices.choose(kind, "images", "class", images, "base.safetensors", model, machine, options)
    config.check()
    return config


def test_sdxl_on_one_accelerator_fits_its_memory() -> None:
    config = chosen()
    assert config.data.buckets == ((1024, 1024),) and config.data.batch_size == 1
    assert (config.compute.dtype, config.compute.remat) == (Dtype.BFLOAT16, Remat.BLOCK)
    assert config.adapter is not None and config.adapter.base_dtype is BaseDtype.BFLOAT16
    assert (config.training.steps, config.adapter.rank, config.adapter.alpha) == (1200, 16, 16.0)
    assert config.optimiser.learning_rate == 1e-4
    assert config.training.init_from == ("base.safetensors",)
    assert config.checkpoint.export_every_steps == config.validation.every_steps == 240


@pytest.mark.parametrize("model", [SDXL_BASE, SD1, SD2, tiny.MODEL, MODEL])
@pytest.mark.parametrize("kind", list(Kind))
def test_images_have_the_size_of_the_base(model: ModelConfig, kind: Kind) -> None:
    config = chosen(model, kind)
    assert config.data.buckets == (model.default_size,) and config.validation.sizes == (model.default_size,)
    assert config.model == model


def test_each_device_has_an_image_and_a_part_of_a_whole_model() -> None:
    machine = Machine("tpu", 8)
    assert chosen(machine=machine).data.batch_size == chosen(kind=Kind.FULL, machine=machine).data.batch_size == 8
    assert chosen(machine=machine).mesh.fsdp == 1
    assert chosen(kind=Kind.FULL, machine=machine).mesh.fsdp == 8


def test_small_model_on_a_cpu_learns_faster_and_in_float32() -> None:
    config = chosen(tiny.MODEL, machine=CPU)
    assert (config.compute.dtype, config.compute.remat, config.data.batch_size) == (Dtype.FLOAT32, Remat.NONE, 4)
    assert config.optimiser.learning_rate == pytest.approx(1e-4 * 320 / 8)
    assert config.adapter is not None and config.adapter.rank == 8, "no wider than the narrowest layer"
    assert config.adapter.base_dtype is BaseDtype.FLOAT32


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"), [(1, 1, 500), (5, 1, 500), (12, 4, 1200), (20, 1, 1500), (400, 1, 4000)]
)
def test_steps_follow_the_number_of_images(count: int, batch_size: int, steps: int) -> None:
    assert choices.steps_for(count, batch_size) == steps


@pytest.mark.parametrize(("count", "rank"), [(1, 8), (10, 8), (11, 16), (50, 16), (51, 32)])
def test_rank_follows_the_number_of_images(count: int, rank: int) -> None:
    assert choices.rank_for(count, SDXL_BASE) == rank


@pytest.mark.parametrize(("count", "rate"), [(12, 1e-6), (999, 1e-6), (1000, 1e-5)])
def test_whole_unet_learns_slower(count: int, rate: float) -> None:
    assert choices.learning_rate(Kind.FULL, count, SDXL_BASE) == rate


def test_new_token_is_kept_at_the_norm_of_words() -> None:
    config = chosen(kind=Kind.TEXTUAL_INVERSION)
    assert config.textual_inversion is not None and config.textual_inversion.token == "<zwx>"
    assert (config.textual_inversion.vectors, config.textual_inversion.norm) == (2, Norm.MEDIAN)
    assert config.textual_inversion.base_dtype is BaseDtype.BFLOAT16
    assert (config.training.trainable, config.adapter, config.optimiser.learning_rate) == ((), None, 3e-4)


@pytest.mark.parametrize("kind", [Kind.LORA, Kind.TEXTUAL_INVERSION])
def test_base_is_in_eight_bits_where_asked(kind: Kind) -> None:
    config = chosen(kind=kind, options=Options(quantize="int8"))
    assert config.base_dtype is BaseDtype.INT8
    with pytest.raises(InputError, match=r"--quantize int8 has no effect with --kind full\. Leave it out, or"):
        Options(quantize="int8").check(Kind.FULL)


def test_trigger_is_that_of_the_file() -> None:
    adapter = chosen(options=Options(trigger=" zwx ")).adapter
    assert adapter is not None and adapter.trigger_phrase == "zwx"


def test_every_second_example_of_dreambooth_is_of_the_class() -> None:
    config = chosen(kind=Kind.DREAMBOOTH, options=Options(class_prompt="a dog", class_images=60))
    assert config.data.folder is None
    assert config.data.sources == (Source("images", weight=5.0), Source("class")), "12 images, 60 of the class"
    assert config.training.steps == 2 * chosen().training.steps
    assert config.validation.prompts == ("image 0", "image 3", "image 6", "image 9", "a dog")
    assert config.adapter == chosen().adapter


def test_own_choices_come_first() -> None:
    options = Options(steps=7, learning_rate=3e-4, rank=4, batch_size=2, size=768, validation_prompt=("a", "b"), seed=5)
    config = chosen(options=options)
    assert (config.training.steps, config.optimiser.learning_rate, config.data.batch_size) == (7, 3e-4, 2)
    assert config.adapter is not None and config.adapter.rank == 4
    assert config.data.buckets == ((768, 768),)
    assert config.validation.prompts == ("a", "b")
    assert (config.training.seed, config.data.seed) == (5, 5)


def test_bucket_of_few_images_is_left_out_unless_much_would_be_cropped_away() -> None:
    squares, portrait, tall, wide = [(1024, 1024)] * 20, (1152, 896), (1536, 640), (1000, 1600)
    sizes = images_of(*squares, portrait, tall, wide, wide, wide).sizes
    found = choices.buckets(sizes, SDXL_BUCKETS)
    assert found == ((768, 1280), (1024, 1024), (1536, 640)), "and none of 1152×896"


def test_prompts_are_captions() -> None:
    assert choices.prompts([("a dog",), ("a dog",)]) == ("a dog", "a dog in the snow")
    assert choices.prompts([("a", "b"), ("c",)], "d") == ("a", "c", "d")
    assert choices.prompts([(f"{n}",) for n in range(8)]) == ("0", "2", "4", "6")


def test_size_below_what_the_base_can_have_is_refused() -> None:
    with pytest.raises(InputError, match=r"Images of 40×40 are too small for this base.*multiples of 64.*--size"):
        chosen(options=Options(size=40))


# The configuration as a file


@pytest.mark.parametrize("model", [SDXL_BASE, MODEL])
def test_written_configuration_is_the_chosen_one(model: ModelConfig, tmp_path: Path) -> None:
    config = chosen(model, options=Options(validation_prompt=('a "dog"', "a\ncat")))
    path = tmp_path / "config.py"
    path.write_text(text := config_file.source(config, "About."))
    assert configuration.load(path) == config
    assert "adapter=AdapterConfig(" in text and max(map(len, text.splitlines())) <= 120
    assert "model=" in text if model is MODEL else "model=" not in text, "fields at their defaults are left out"


# The images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of the tiny model's size, two of them with captions; one is damaged."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "more/d"):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "e.png").write_bytes(b"no image")
    (folder / "a.txt").write_text("a dog\na brown dog")
    (folder / "b.txt").write_text("zwx on a sofa")
    return folder


def test_images_without_captions_are_left_out_and_listed(folder: Path) -> None:
    found = survey(str(folder), MODEL, Options())
    assert found.images.captions == [("a dog", "a brown dog"), ("zwx on a sofa",)]
    assert (found.found, found.own_captions, found.folder(Path("run"))) == (5, 2, str(folder))
    reasons = {each.file: each.reason for each in found.refused}
    assert reasons.keys() == {"c.png", "more/d.png", "e.png"}
    assert "without a caption" in reasons["c.png"] and "cannot be read" in reasons["e.png"]


def test_given_captions_are_for_images_without(folder: Path, tmp_path: Path) -> None:
    found = survey(str(folder), MODEL, Options(prompt="a photo of a dog", trigger="zwx"))
    captions = [("zwx, a dog", "zwx, a brown dog"), ("zwx on a sofa",), *[("zwx, a photo of a dog",)] * 2]
    assert found.images.captions == captions
    assert [each.file for each in found.refused] == ["e.png"]
    assert survey(str(folder), MODEL, Options(trigger="zwx")).images.captions[2:] == [("zwx",)] * 2
    found.write(tmp_path)
    linked = survey(found.folder(tmp_path), MODEL, Options())
    assert linked.images.captions == captions
    assert np.array_equal(linked.images.sizes, found.images.sizes)


def test_run_keeps_the_captions_that_it_was_started_with(folder: Path, tmp_path: Path) -> None:
    first, other = (survey(str(folder), MODEL, Options(prompt=prompt)) for prompt in ("one", "other"))
    first.write(tmp_path)
    other.write(tmp_path)  # no run was started yet
    (tmp_path / "config.json").touch()
    other.write(tmp_path)
    with pytest.raises(InputError, match=r"was started with other images or captions.*the same --prompt"):
        first.write(tmp_path)
    assert "other" in (tmp_path / LINKS / "metadata.jsonl").read_text()


# The command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    convert(tiny.random_model(MODEL, 0), path, "orbax", False)
    return path


def finetune(folder: Path, base: Path, *more: object) -> Outcome:
    return call("finetune", folder, "--base", base, "--kind", "lora", *more)


def test_command_trains_shows_and_says_how_to_sample(folder: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["--trigger", "zwx", "--steps", 2, "--rank", 2, "--run-dir", tmp_path / "dog"]
    outcome = finetune(folder, base, *arguments)
    assert outcome.code == 0, outcome
    file = tmp_path / "dog" / "dog.safetensors"
    assert lora.read(file).ranks == [2]
    for expected in (
        r"1 files are left out:",
        "4 of 5, 16×16 to 16×16 pixels",
        "2 images have their own, 2 get the given one",
        "LoRA of the UNet's attention, rank 2",
        f"sdxl-jax sample {base} --lora {file} --prompt 'zwx, a dog' --out images",
    ):
        assert expected in outcome.out + outcome.err, expected
    with Image.open(tmp_path / "dog" / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 160, "three rows of images, enlarged: before, and after each step"
    assert sorted(path.name for path in (tmp_path / "dog" / "samples").iterdir()) == [
        f"step_{step:08d}.png" for step in range(3)
    ]
    before = (tmp_path / "dog" / "metrics.jsonl").read_bytes()
    other = finetune(folder, base, *arguments, "--learning-rate", 1)
    assert other.code == 2 and "optimiser.learning_rate" in other.err and "different configuration" in other.err
    assert (tmp_path / "dog" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_images_of_the_class_are_sampled_before(folder: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["--steps", 2, "--prompt", "a zwx dog", "--class-prompt", "a dog", "--class-images", 3]
    arguments += ["--run-dir", tmp_path / "dog"]
    outcome = call("finetune", folder, "--base", base, "--kind", "dreambooth", *arguments)
    assert outcome.code == 0, outcome
    names = sorted(path.name for path in (tmp_path / "dog" / "class_images").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "metadata.jsonl"]
    assert "3 images of 'a dog', from the base" in outcome.out + outcome.err
    assert "class_images: 3 images, 50.0% of each epoch" in outcome.out + outcome.err
    assert lora.read(tmp_path / "dog" / "dog.safetensors").ranks == [8]
    line = ("--class-prompt", "a dog", "--class-images", 3, "--write-config", tmp_path / "mine.py")
    written = call("finetune", folder, "--base", base, "--kind", "dreambooth", *line, "--run-dir", tmp_path / "new")
    config: Any = configuration.load(tmp_path / "mine.py")
    assert config.data.sources[1] == Source(str(tmp_path / "new" / "class_images"))
    expected = f"sdxl-jax data class-images {base} {tmp_path / 'new' / 'class_images'} --prompt 'a dog' --num-images 3"
    assert expected in written.out + written.err


@pytest.mark.slow
def test_new_token_trains_and_samples_with_the_base(folder: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["--steps", 2, "--trigger", "<zwx>", "--initial", "dog", "--run-dir", tmp_path / "dog"]
    outcome = call("finetune", folder, "--base", base, "--kind", "textual-inversion", *arguments)
    assert outcome.code == 0, outcome
    embedding = f"{tmp_path / 'dog' / 'dog.safetensors'}:<zwx>"
    assert f"sdxl-jax sample {base} --embedding '{embedding}'" in outcome.out + outcome.err
    sample = call(
        *("sample", base, "--embedding", embedding, "--prompt", "a <zwx>", "--steps", 2, "--out", tmp_path / "images")
    )
    assert sample.code == 0, sample


@pytest.mark.slow
def test_whole_unet_trains_and_samples_as_a_run(folder: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["finetune", folder, "--base", base, "--kind", "full", "--steps", 2, "--prompt", "a"]
    outcome = call(*arguments, "--run-dir", tmp_path / "dog")
    assert outcome.code == 0, outcome
    assert f"sdxl-jax sample {tmp_path / 'dog'} --prompt 'a dog' --out images" in outcome.out + outcome.err
    again = call(*arguments, "--run-dir", tmp_path / "dog")
    assert again.code == 0, "the same choices, of a finished run"
    sample = call("sample", tmp_path / "dog", "--prompt", "a", "--steps", 2, "--out", tmp_path / "images")
    assert sample.code == 0, sample


def test_configuration_is_written_in_place_of_training(folder: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "a", "--write-config", tmp_path / "mine.py", "--run-dir", tmp_path / "run"]
    outcome = finetune(folder, base, *arguments)
    assert outcome.code == 0, outcome
    assert f"sdxl-jax train {tmp_path / 'mine.py'} --run-dir {tmp_path / 'run'}" in outcome.out + outcome.err
    config: Any = configuration.load(tmp_path / "mine.py")
    assert config.data.folder == str(tmp_path / "run" / LINKS) and config.training.init_from == (str(base),)
    assert not (tmp_path / "run" / "config.json").exists()
    again = finetune(folder, base, *arguments)
    assert again.code == 2 and "exists already. Give a new file" in again.err


def refused(expected: str, tmp_path: Path, *arguments: object) -> None:
    outcome = call("finetune", *arguments, "--run-dir", tmp_path / "run")
    assert outcome.code == 2, outcome
    assert expected in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_bad_input_is_refused_before_anything_is_written(folder: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "bare" / "a.png")
    lora = ("--base", base, "--kind", "lora")
    refused("There is nothing at absent", tmp_path, folder, "--base", "absent", "--kind", "lora")
    refused("Known, nearest first: lora,", tmp_path, folder, "--base", base, "--kind", "lor")
    refused("absent does not exist", tmp_path, tmp_path / "absent", *lora)
    refused("holds no images", tmp_path, tmp_path / "empty", *lora)
    refused("To give all images one caption: --prompt", tmp_path, tmp_path / "bare", *lora)
    refused("--rank 4 has no effect with --kind full", tmp_path, folder, "--base", base, "--kind", "full", "--rank", 4)
    token = ("--base", base, "--kind", "textual-inversion")
    refused("textual inversion needs --trigger: the new token", tmp_path, folder, *token)
    refused("cannot have the token 'dog': it is in CLIP's own vocabulary", tmp_path, folder, *token, "--trigger", "dog")
    refused("--vectors 2 has no effect with --kind lora", tmp_path, folder, *lora, "--vectors", 2)
    subject = ("--base", base, "--kind", "dreambooth")
    refused("DreamBooth needs --class-prompt", tmp_path, folder, *subject)
    refused("--class-prompt a has no effect with --kind lora", tmp_path, folder, *lora, "--class-prompt", "a")
    refused("--class-images=0 is", tmp_path, folder, *subject, "--class-prompt", "a", "--class-images", 0)
    refused("--steps=0 is out of range", tmp_path, folder, *lora, "--steps", 0)
    refused("--trigger ' ' has no words", tmp_path, folder, *lora, "--trigger", " ")
    refused("Give a rank up to 8", tmp_path, folder, *lora, "--rank", 99, "--prompt", "a")


@pytest.mark.parametrize(
    ("config", "parts", "expected"),
    [
        (SDXL_BASE, ("unet", "vae", "text_encoder"), "has no text_encoder_2. Give a whole model"),
        (SDXL_REFINER, SDXL_REFINER.parts, "is a refiner"),
        (dataclasses.replace(SD1, unet=dataclasses.replace(SD1.unet, in_channels=9)), SD1.parts, "for inpainting"),
        (dataclasses.replace(SDXL_BASE, text=()), ("unet", "vae"), "is a model of classes"),
    ],
)
def test_base_that_this_command_cannot_train_is_refused(
    config: ModelConfig, parts: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = {f"{part}/kernel": InMemory(np.zeros(1, np.float32)) for part in parts}
    monkeypatch.setattr(run, "open_model", lambda _: Weights(config, leaves, Origin(SourceLayout.MEMORY)))
    with pytest.raises(InputError, match=f"--base some.*{expected}"):
        run._opened("some")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Processes", lambda _: contextlib.nullcontext(SimpleNamespace(count=2)))
    with pytest.raises(
        InputError, match=r"finetune is for one process, and the environment describes 2.*--write-config"
    ):
        run._machine()


@pytest.mark.parametrize(("count", "said"), [(1, True), (4, True), (5, False)])
def test_few_images_are_warned_of(count: int, said: bool, tmp_path: Path) -> None:
    for number in range(count):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    found = survey(str(tmp_path), MODEL, Options(prompt="a"))
    text = run.table(chosen(MODEL, images=found.images), found, Path("run"), Options())
    assert ("will be learnt by heart" in text) == said


def test_out_of_memory_names_the_options_that_help(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise InputError("does not fit") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(run, "train", full)
    outcome = finetune(folder, base, "--run-dir", tmp_path / "run", "--batch-size", 2)
    assert outcome.code == 2
    assert (
        "does not fit. Of finetune: --batch-size below 2, --quantize int8, --rank below 8, --size below 16; "
        in outcome.err
    )
    outcome = finetune(folder, base, "--run-dir", tmp_path / "small", "--quantize", "int8", "--rank", 1)
    assert "does not fit. Of finetune: --batch-size below 4, --size below 16; --write-config" in outcome.err


def test_images_of_a_contact_sheet_are_found_again() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (24, 16, 3), np.uint8) for _ in range(3)]
    sheet = contact_sheet(images, ["one", "two", "three"], columns=3)
    found = first_row(sheet, 3, 24, 16)
    assert found is not None
    np.testing.assert_array_equal(found, images)
    assert first_row(sheet, 2, 24, 16) is None and first_row(sheet, 3, 240, 16) is None
