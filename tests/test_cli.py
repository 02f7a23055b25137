"""The promises of the command line: refused commands say why and change nothing on disk; others give the same twice.

Commands run in this process, on a tiny model that is trained once for two steps.
"""

import gc
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from command import call
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sdxl_jax.commands import sample as sample_command
from sdxl_jax.quickstart import autoencoder

CONFIG = """
import dataclasses
from pathlib import Path

import tiny


def get_config():
    config = tiny.train_config(Path({folder!r}), steps=2)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=((32, 32),)))
"""


pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(folder: Path, arguments: list[object], *expected: str) -> None:
    """Exit code 2, one message that matches the patterns, no traceback, and nothing below `folder` changed."""
    before = listing(folder)
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.out + outcome.err
    assert len(outcome.err) < 2500, "short"
    message = re.sub(r"[\s│╭╮╰╯─]+", " ", outcome.err)  # lines are wrapped, some in a box
    for pattern in expected:
        assert re.search(pattern, message), f"{pattern} not in {message}"
    assert listing(folder) == before


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images, config.py, and a finished run of it."""
    home = tmp_path_factory.mktemp("home")
    tiny.make_folder(home / "images", images=8)
    (home / "config.py").write_text(CONFIG.format(folder=str(home / "images")))
    outcome = call("train", home / "config.py", "--run-dir", home / "run")
    assert outcome.code == 0, outcome
    return home


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """A copy of `home` that a test may change. The configuration names the original's images."""
    return Path(shutil.copytree(home, tmp_path / "home"))


def train(place: Path, *more: object) -> list[object]:
    return ["train", place / "config.py", "--run-dir", place / "run", *more]


def sample(place: Path, *more: object, prompt: str | None = "an image") -> list[object]:
    """Two images of two steps: one shape for all tests, which compiles once."""
    given = [] if prompt is None else ["--prompt", prompt]
    return ["sample", place / "run", *given, "--num-images", 2, "--steps", 2, "--out", place / "out", *more]


# Refused: the data


def test_missing_data_folder_is_refused(place: Path) -> None:
    folder = place / "absent"
    assert_refused(
        place, train(place, "--data.folder", folder), "data.folder=.*absent does not exist", "Check the path"
    )


def test_empty_data_folder_is_refused(place: Path) -> None:
    (place / "empty").mkdir()
    assert_refused(place, train(place, "--data.folder", place / "empty"), "holds no images", "give another folder")
    assert_refused(place, ["data", "inspect", place / "empty"], "holds no images", "give another folder")


def test_unreadable_image_is_refused_by_name(place: Path) -> None:
    (place / "images" / "002.png").write_bytes(b"no image")
    refused = train(place, "--data.folder", place / "images", "--run-dir", place / "new")
    assert_refused(place, refused, r"002\.png.*cannot be read", "Fix or remove them, or set data.on_refused=skip")


def test_caption_without_image_is_refused_by_name(place: Path) -> None:
    (place / "images" / "metadata.jsonl").unlink()
    for path in (place / "images").glob("*.png"):
        path.with_suffix(".txt").write_text("a caption")
    (place / "images" / "lonely.txt").write_text("a caption")
    refused = train(place, "--data.folder", place / "images", "--run-dir", place / "new")
    assert_refused(place, refused, r"lonely\.txt: caption without an image", "Fix or remove them")


def test_buckets_that_no_image_fits_are_refused(place: Path) -> None:
    refused = train(place, "--data.buckets", 8, 64, "--run-dir", place / "new")
    assert_refused(place, refused, "None of the 8 images", "Add buckets of such aspect ratios, raise data.max_aspect")


def test_bucket_that_is_not_a_multiple_of_8_is_refused(place: Path) -> None:
    refused = train(place, "--data.buckets", 30, 32, "--run-dir", place / "new")
    assert_refused(place, refused, r"data\.buckets has \(30, 32\)", r"Use \(32, 32\)")


# Refused: the configuration


def test_batch_that_the_devices_cannot_split_is_refused(place: Path) -> None:
    refused = train(place, "--optimiser.accumulate", 3, "--run-dir", place / "new")
    assert_refused(
        place, refused, r"data\.batch_size=8 cannot be split .* in 3 micro-batches. Use a multiple of 3, e.g. 9"
    )


def test_mesh_that_does_not_multiply_up_is_refused(place: Path) -> None:
    refused = train(place, "--mesh.data", 3, "--run-dir", place / "new")
    assert_refused(
        place, refused, r"mesh\.data=3 × mesh\.fsdp=1 × mesh\.tensor=1 does not make 1 devices. Choose numbers"
    )


@pytest.mark.parametrize("option", ["--data.batch-sise", "--data.batch_sise"])
def test_unknown_option_names_the_nearest(place: Path, option: str) -> None:
    assert_refused(place, train(place, option, 4), "batch.sise", "--data.batch-size")


def test_value_of_another_type_is_refused(place: Path) -> None:
    assert_refused(place, train(place, "--training.steps", "many"), "training.steps", "many")


def test_unknown_field_in_the_configuration_file_is_refused(place: Path) -> None:
    text = (place / "config.py").read_text().replace("steps=2)", "stepz=2)")
    (place / "config.py").write_text(text)
    assert_refused(place, train(place), r"config\.py.*stepz")


def test_missing_configuration_file_is_refused(place: Path) -> None:
    assert_refused(place, ["train", place / "absent.py"], "no configuration file .*absent.py", "Give a Python file")
    assert_refused(place, ["train"], "The first argument of train is a configuration file", "usage")
    assert_refused(place, ["train", "--run-dir", place / "run"], "The first argument of train is a configuration file")


# Refused: the run directory


def test_run_of_another_configuration_is_refused_with_the_differences(place: Path) -> None:
    refused = train(place, "--training.seed", 7, "--optimiser.learning-rate", 0.5)
    assert_refused(
        place,
        refused,
        r"belongs to a run with a different configuration \(2 differences",
        r"optimiser\.learning_rate: 0\.001 -> 0\.5",
        r"training\.seed: 0 -> 7",
        "choose another --run-dir",
    )


def test_file_instead_of_the_run_directory_is_refused(place: Path) -> None:
    (place / "file").write_text("a file")
    assert_refused(
        place, train(place, "--run-dir", place / "file"), "is not a run directory", "Choose another --run-dir"
    )


def test_checkpoints_without_their_configuration_are_refused(place: Path) -> None:
    (place / "run" / "config.json").unlink()
    assert_refused(place, train(place), "it has no config.json", "Choose another --run-dir")


CORRUPT = [b'{"config": {', b"[]", b"5", b'{"config": 5}', b"{}", b"\xff\xfe\x00"]


@pytest.mark.parametrize("content", CORRUPT)
def test_corrupt_config_json_is_refused(place: Path, content: bytes) -> None:
    (place / "run" / "config.json").write_bytes(content)
    assert_refused(place, train(place), "run", "another --run-dir")
    assert_refused(place, sample(place), "config.json|no TrainConfig")


def files_of(folder: Path) -> list[Path]:
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def delete_everything(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def delete_the_largest(folder: Path) -> None:
    files_of(folder)[-1].unlink()


def halve_the_largest(folder: Path) -> None:
    largest = files_of(folder)[-1]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def truncate_the_largest(folder: Path) -> None:
    largest = files_of(folder)[-1]
    largest.write_bytes(largest.read_bytes()[:100])


def delete_the_metadata(folder: Path) -> None:
    for path in folder.rglob("_METADATA"):
        path.unlink()


SPOIL = [
    delete_everything,
    pytest.param(delete_the_largest, marks=pytest.mark.slow),
    pytest.param(halve_the_largest, marks=pytest.mark.slow),
    pytest.param(truncate_the_largest, marks=pytest.mark.slow),
    delete_the_metadata,
]


# Orbax leaves coroutines behind when a read fails half-way; newer Pythons report them when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spoil", SPOIL)
def test_incomplete_checkpoint_is_not_silently_started_afresh(place: Path, spoil: Callable[[Path], None]) -> None:
    """MaxDiffusion starts afresh."""
    spoil(place / "run" / "checkpoints" / "2")
    expected = (
        r"checkpoints/2 is incomplete or damaged",
        "Nothing was changed. Restore its files",
    )
    assert_refused(place, train(place), *expected)
    if spoil is not halve_the_largest:  # sampling reads the average alone, which may be in the other half
        assert_refused(place, sample(place), *expected)
    gc.collect()  # here, not in the next test


def test_missing_frozen_weights_are_refused(place: Path) -> None:
    shutil.rmtree(place / "run" / "frozen")
    assert_refused(place, train(place), "run/frozen is incomplete or damaged", "Restore its files")
    assert_refused(place, sample(place), "run/frozen is incomplete or damaged", "Restore its files")


def test_missing_initial_weights_are_refused(place: Path) -> None:
    refused = train(place, "--run-dir", place / "new", "--training.init-from", place / "absent.safetensors")
    assert_refused(place, refused, "There is nothing at", "absent.safetensors", "a diffusers directory")


def test_initial_weights_of_another_configuration_are_refused(place: Path) -> None:
    refused = train(place, "--run-dir", place / "new", "--training.init-from", autoencoder.WEIGHTS)
    assert_refused(place, refused, r"The vae in .*autoencoder\.safetensors", "block_channels", "Set model.vae to")


# Refused: sample


def test_folder_that_is_not_a_model_is_refused(place: Path) -> None:
    rest = ["--prompt", "x", "--out", place / "out"]
    assert_refused(place, ["sample", place / "images", *rest], "There is no model at .*images", "Expected a run dir")
    assert_refused(place, ["sample", place / "absent", *rest], "There is nothing at .*absent", "Expected a run dir")


def test_run_without_checkpoint_is_refused(place: Path) -> None:
    shutil.rmtree(place / "run" / "checkpoints")
    assert_refused(place, sample(place), "has no checkpoint yet", "Resume the run, or wait")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--original-size", "32,32", "expected HxW in pixels"),
        ("--negative-target-size", "axb", "expected HxW in pixels"),
        ("--crop", "3,-4", "expected TOP,LEFT in pixels"),
        ("--negative-crop", "3", "expected TOP,LEFT in pixels"),
        ("--height", "30", "height 30 × width 32: expected positive multiples of 8"),
        ("--width", "0", "height 32 × width 0: expected positive multiples of 8"),
        ("--steps", "0", "steps=0 is out of range. Give 1 to 1000"),
        ("--num-images", "0", "num_images=0 is out of range. Give 1 or more"),
        ("--batch-size", "0", "batch.size=0 is out of range. Give 1 or more"),
        ("--sampler", "eular", "euler"),
        ("--guidance", "strong", "guidance"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("--original-size", "32", "expected HxW in pixels"),
                ("--target-size", "x32", "expected HxW in pixels"),
                ("--crop", "3x4", "expected TOP,LEFT in pixels"),
                ("--steps", "1001", "steps=1001 is out of range. Give 1 to 1000"),
            )
        ),
    ],
)
def test_bad_option_of_sample_says_what_was_expected(home: Path, option: str, value: str, expected: str) -> None:
    assert_refused(home, sample(home, option, value), re.escape(option.lstrip("-")).replace(r"\-", "."), expected)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, noise=np.zeros(3))


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: None, "cannot be read as NPY"),
        (lambda path: path.write_bytes(b""), "cannot be read as NPY"),
        (lambda path: path.write_bytes(b"no array"), "cannot be read as NPY"),
        (write_npz, "is an NPZ archive. Give an NPY file"),
        (
            lambda path: path.write_bytes(npy(np.zeros((2, 4, 4, 4), np.int32))),
            "has the dtype int32. Give an NPY file of float32",
        ),
        (
            lambda path: path.write_bytes(npy(np.zeros((1, 4, 4, 4)))),
            "has the shape 1 × 4 × 4 × 4, expected 2 × 4 × 4 × 4",
        ),
    ],
)
def test_unusable_initial_noise_is_refused(place: Path, write: Callable[[Path], object], expected: str) -> None:
    write(place / "noise.npy")
    assert_refused(place, sample(place, "--init-noise", place / "noise.npy"), expected)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_sampling_without_a_prompt_is_refused(place: Path) -> None:
    assert_refused(place, sample(place, prompt=None), "There is no prompt. Give --prompt TEXT")
    assert_refused(place, sample(place, "--prompts-file", place / "absent", prompt=None), "absent cannot be read")
    (place / "prompts.txt").write_text("\n \n")
    assert_refused(place, sample(place, "--prompts-file", place / "prompts.txt", prompt=None), "There is no prompt")


def test_file_instead_of_the_output_folder_is_refused(place: Path) -> None:
    (place / "out").write_text("a file")
    assert_refused(place, sample(place), "--out .*out is a file. Give a folder")


# Refused: the rest


def test_unknown_command_lists_the_known_nearest_first(home: Path) -> None:
    assert_refused(home, ["trian"], "no command 'trian'. Known, nearest first: train")
    assert_refused(home, ["smaple", "--prompt", "x"], "no command 'smaple'. Known, nearest first: sample")
    assert_refused(home, ["data", "inspct", home], "inspct", "inspect")


def test_no_command_shows_the_usage(home: Path) -> None:
    outcome = call()
    assert outcome.code == 2
    assert "usage: sdxl-jax COMMAND" in outcome.out + outcome.err


def test_debug_shows_the_traceback() -> None:
    outcome = call("data", "inspect", "no-such-folder", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "no-such-folder does not exist" in outcome.err.splitlines()[-1]


# Help


HELP = {
    ("quickstart",): ["--run-dir"],
    ("train",): ["CONFIG.py", "--run-dir", "--section.field"],
    ("sample",): [
        *("--prompt", "--negative-prompt", "--height", "--width", "--steps", "--sampler", "--timestep-spacing"),
        *("--guidance", "--seed", "--num-images", "--dtype", "--out", "--prompts-file", "--original-size", "--crop"),
        *("--target-size", "--negative-original-size", "--negative-crop", "--negative-target-size"),
        *("--aesthetic-score", "--negative-aesthetic-score", "--init-noise", "--save-latents"),
        *("ddpm", "ddim", "euler", "leading", "trailing", "linspace", "float32", "bfloat16"),
    ],
    ("convert",): [
        *("--to", "orbax", "diffusers", "single-file", "--dtype", "float16", "--lora", "--parts-from", "--variant"),
        *("--prediction", "--allow-partial"),
    ],
    ("data",): ["build", "inspect", "encode"],
    ("data", "build"): ["--workers", "--drop-duplicates"],
    ("data", "inspect"): ["--json", "--dump", "N DIR", "--plot"],
    ("data", "encode"): ["CONFIG.py", "--data.cache", "--share", "I N", "--section.field"],
}


@pytest.mark.parametrize("command", HELP)
def test_help_names_every_option(command: tuple[str, ...]) -> None:
    outcome = call(*command, "--help")
    assert outcome.code == 0
    for option in HELP[command]:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", outcome.out), option


def test_help_lists_the_commands() -> None:
    outcome = call("--help")
    assert outcome.code == 0
    for name in ("quickstart", "train", "sample", "convert", "data"):
        assert f"\n  {name} " in outcome.out


def test_help_of_train_lists_every_field_with_the_files_default(home: Path) -> None:
    outcome = call("train", home / "config.py", "--help")
    assert outcome.code == 0
    for option in ("--run-dir", "--data.batch-size", "--model.unet.block-channels", "--mesh.fsdp", "--training.steps"):
        assert option in outcome.out
    assert re.search(r"--training\.steps INT.*?default: 2\b", outcome.out, re.DOTALL)


# What works: train


def test_training_again_resumes_and_has_nothing_left_to_do(place: Path) -> None:
    before = listing(place / "run")
    outcome = call(*train(place))
    assert outcome.code == 0, outcome
    assert "resuming after step 2" in outcome.out
    after = listing(place / "run")
    kept = {name for name in before if name.split("/")[0] in ("checkpoints", "frozen", "metrics.jsonl")}
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    assert after.keys() - before.keys() == {name for name in after.keys() - before.keys() if "tensorboard/" in name}


def test_option_of_the_command_line_has_its_effect(place: Path) -> None:
    saved = json.loads((place / "run" / "config.json").read_text())["config"]
    assert saved["checkpoint"]["keep"] == 3
    assert saved["data"]["buckets"] == [[32, 32]]
    outcome = call(*train(place, "--checkpoint.keep", 7, "--validation.prompts", "one", "two", "--mesh.data", 1))
    assert outcome.code == 0, outcome
    saved["checkpoint"]["keep"] = 7
    saved["validation"]["prompts"] = ["one", "two"]
    saved["mesh"]["data"] = 1
    assert json.loads((place / "run" / "config.json").read_text())["config"] == saved


# What works: sample


@pytest.fixture(scope="module")
def sampled(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with their latents."""
    out = tmp_path_factory.mktemp("sampled") / "out"
    outcome = call(*sample(home, "--save-latents", "--seed", 3, "--out", out))
    assert outcome.code == 0, outcome
    return out


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_carry_prompt_seed_and_settings(home: Path, sampled: Path) -> None:
    assert sorted(path.name for path in sampled.iterdir()) == ["000000.png", "000001.png", "latents.npy"]
    for number in range(2):
        with Image.open(sampled / f"{number:06d}.png") as image:
            assert (image.height, image.width, image.mode) == (32, 32, "RGB")
            assert isinstance(image, PngImageFile)
            text = image.text
        assert text["prompt"] == "an image"
        assert text["seed"] == "3"
        assert text["index"] == str(number)
        assert text["model"] == str(home / "run")
        settings = {
            "steps": "2",
            "sampler": "euler",
            "timestep_spacing": "leading",
            "guidance": "5.0",
            "dtype": "float32",
        }
        assert settings.items() <= text.items()


def test_latents_are_float32_at_an_eighth(sampled: Path) -> None:
    latents = np.load(sampled / "latents.npy")
    assert latents.dtype == np.float32
    assert latents.shape == (2, 4, 4, 4)
    assert np.isfinite(latents).all()
    assert not np.array_equal(latents[0], latents[1])


def test_same_command_writes_the_same_bytes(home: Path, sampled: Path, tmp_path: Path) -> None:
    assert call(*sample(home, "--save-latents", "--seed", 3, "--out", tmp_path / "out")).code == 0
    assert listing(tmp_path / "out") == listing(sampled)


@pytest.mark.slow
def test_seed_zero_is_a_seed(home: Path, sampled: Path, tmp_path: Path) -> None:
    """mosaicml/diffusion ignores it (`if seed:`)."""
    for name in ("one", "two"):
        assert call(*sample(home, "--seed", 0, "--save-latents", "--out", tmp_path / name)).code == 0
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    assert not np.array_equal(np.load(tmp_path / "one" / "latents.npy"), np.load(sampled / "latents.npy"))


def test_the_raw_weights_of_a_run_give_another_image_that_says_so(home: Path, sampled: Path, tmp_path: Path) -> None:
    outcome = call(*sample(home, "--weights", "raw", "--save-latents", "--seed", 3, "--out", tmp_path / "raw"))
    assert outcome.code == 0, outcome
    assert not np.array_equal(np.load(tmp_path / "raw" / "latents.npy"), np.load(sampled / "latents.npy"))
    assert [sample_command.read_text(path / "000000.png").get("weights") for path in (tmp_path / "raw", sampled)] == [
        "raw",
        None,
    ]


@pytest.mark.slow
def test_initial_noise_replaces_the_seeded_noise(home: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    latents = []
    for name, used, seed in (("one", noise, 3), ("two", noise, 4), ("three", noise[::-1], 3)):
        np.save(tmp_path / f"{name}.npy", used)
        options = ["--init-noise", tmp_path / f"{name}.npy", "--seed", seed, "--save-latents", "--out", tmp_path / name]
        assert call(*sample(home, *options)).code == 0
        latents.append(np.load(tmp_path / name / "latents.npy"))
    np.testing.assert_array_equal(latents[0], latents[1])  # euler adds no fresh noise
    np.testing.assert_array_equal(latents[0], latents[2][::-1])
    assert not np.array_equal(latents[0][0], latents[0][1])


def test_images_come_in_order_of_prompts_then_images(home: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("second\n\nthird\n")
    options = ["--prompts-file", tmp_path / "prompts.txt", "--batch-size", 2, "--out", tmp_path / "out"]
    assert call(*sample(home, *options, prompt="first")).code == 0
    found = []
    for path in sorted((tmp_path / "out").iterdir()):
        with Image.open(path) as image:
            assert isinstance(image, PngImageFile)
            text = image.text
            found.append((path.name, text["prompt"]))
    prompts = ("first", "first", "second", "second", "third", "third")
    assert found == [(f"{number:06d}.png", prompt) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "options",
    [
        ["--negative-crop", "0,9"],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ["--original-size", "16x64"],
                ["--negative-prompt", "blurred"],
                ["--crop", "9,0"],
                ["--target-size", "64x16"],
                ["--negative-original-size", "16x64"],
                ["--negative-target-size", "64x16"],
            )
        ),
    ],
)
def test_conditioning_changes_the_latents(home: Path, sampled: Path, tmp_path: Path, options: list[str]) -> None:
    assert call(*sample(home, "--seed", 3, "--save-latents", "--out", tmp_path, *options)).code == 0
    assert not np.array_equal(np.load(tmp_path / "latents.npy"), np.load(sampled / "latents.npy"))


@pytest.mark.slow
def test_truncated_prompt_is_warned_of_without_echoing_it(home: Path, sampled: Path, tmp_path: Path) -> None:
    outcome = call(*sample(home, "--prompt", "secret " * 80, "--num-images", 1, "--out", tmp_path / "out"))
    assert outcome.code == 0
    assert "warning: 5 tokens of prompt 2 beyond the first 75 are ignored" in outcome.err
    assert "secret" not in outcome.err + outcome.out
    assert "warning" not in call(*sample(home, "--out", tmp_path / "short")).err


# What works: data inspect


def test_inspect_prints_a_table(home: Path) -> None:
    outcome = call("data", "inspect", home / "config.py")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "8 images found, 8 usable, 0 refused"
    assert lines[1] == "1 steps per epoch"
    assert lines[2].split() == ["height", "width", "images", "batches", "batch", "size", "left", "out", "repeated"]
    assert lines[3].split() == ["32", "32", "8", "1", "8", "0", "0"]
    assert len(lines) == 4


def test_inspect_prints_json_with_the_contracts_fields(place: Path) -> None:
    (place / "images" / "broken.png").write_bytes(b"no image")
    outcome = call("data", "inspect", place / "images", "--json")
    assert outcome.code == 0
    seen = json.loads(outcome.out)
    assert seen["images_found"] == 9
    assert seen["images_usable"] == 8
    assert [entry["file"] for entry in seen["refused"]] == ["broken.png"]
    assert seen["refused"][0]["reason"]
    assert sum(bucket["images"] for bucket in seen["buckets"]) == 8
    for bucket in seen["buckets"]:
        assert bucket.keys() >= {"height", "width", "images", "batches", "remainder"}


def test_inspect_dumps_the_first_examples(home: Path, tmp_path: Path) -> None:
    outcome = call("data", "inspect", home / "config.py", "--dump", 3, tmp_path / "dump")
    assert outcome.code == 0
    names = [f"{number:06d}.{suffix}" for number in range(3) for suffix in ("json", "png")]
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == names
    for number in range(3):
        record = json.loads((tmp_path / "dump" / f"{number:06d}.json").read_text())
        assert record.keys() == {"source", "original_size", "crop_top_left", "target_size", "flipped", "caption"}
        assert record["target_size"] == [32, 32]
        assert record["caption"] == f"image number {int(record['source'].removesuffix('.png'))}"
        assert pixels(tmp_path / "dump" / f"{number:06d}.png").shape == (32, 32, 3)
    assert_refused(
        tmp_path,
        ["data", "inspect", home / "config.py", "--dump", 3, tmp_path / "dump"],
        "is not an empty folder",
        "Give",
    )


# What works: data encode


def encode_into(place: Path) -> tuple[list[object], list[object]]:
    """(the fields of a cache, the command that writes it)"""
    fields: list[object] = ["--data.cache", place / "cache", "--data.crops-per-image", 2]
    return fields, ["data", "encode", place / "config.py", *fields, "--batch-size", 3]


@pytest.mark.slow
def test_encode_writes_its_share_and_then_the_rest(place: Path) -> None:
    _, encode = encode_into(place)
    start = f"{place / 'cache'}: 8 images, 2 crops of each; "
    begun = call(*encode, "--share", 1, 2)
    assert begun.code == 0, begun
    assert begun.out.splitlines()[-1] == start + "1 of 1 pieces are missing, of other shares"
    done = call(*encode, "--share", 0, 2)
    assert done.code == 0, done
    assert done.out.splitlines()[-1] == start + "complete"
    before = listing(place / "cache")
    assert call(*encode).code == 0
    assert listing(place / "cache") == before
    assert_refused(place, [*encode, "--data.seed", 5], r"crops\.seed: 0 -> 5", "another folder")


@pytest.mark.slow
def test_train_reads_the_cache_of_encode(place: Path) -> None:
    fields, encode = encode_into(place)
    assert call(*encode, "--share", 1, 2).code == 0
    unfinished = train(place, *fields, "--run-dir", place / "new")
    assert_refused(place, unfinished, "1 of its 1 pieces are missing", "Run the same `sdxl-jax data encode` again")
    assert call(*encode).code == 0
    outcome = call(*train(place, *fields, "--run-dir", place / "new"))
    assert outcome.code == 0, outcome
    lines = [json.loads(line) for line in (place / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    other = train(place, *fields, "--data.seed", 5, "--run-dir", place / "other")
    assert_refused(place, other, r"crops\.seed: 0 -> 5", "into a new folder")


def test_encode_without_a_folder_or_into_one_of_other_files_is_refused(place: Path) -> None:
    encode: list[object] = ["data", "encode", place / "config.py", "--data.crops-per-image", 2]
    assert_refused(place, encode, "data.cache is not given", "--data.cache DIR")
    assert_refused(place, [*encode[:3], "--data.cache", place / "cache"], "Set data.crops_per_image", "e.g. 4")
    assert_refused(place, [*encode, "--data.cache", place / "images"], "holds other files and is not a cache", "Give")
    assert_refused(place, [*encode, "--data.cache", place / "cache", "--share", 2, 2], "share=2,2 cannot be used")
    assert_refused(place, [*encode, "--data.cache", place / "cache", "--share", "first"], "share", "first")
    assert_refused(place, ["data", "encode"], "The first argument of data encode is a configuration file", "usage")


def test_help_of_encode_lists_every_field_with_the_files_default(home: Path) -> None:
    outcome = call("data", "encode", home / "config.py", "--help")
    assert outcome.code == 0
    for option in ("--data.cache", "--data.crops-per-image", "--share I N", "--batch-size INT", "--training.init-from"):
        assert option in outcome.out


def test_module_runs_as_the_command_does(home: Path) -> None:
    command = [sys.executable, "-m", "sdxl_jax", "data", "inspect", str(home / "images"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["images_usable"] == 8
    refused = subprocess.run([*command[:-2], "no-such-folder"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: data.folder=no-such-folder does not exist")
