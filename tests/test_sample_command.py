"""`sdxl-jax sample` beyond one prompt: files of prompts, images repeated from their PNG text, sweeps, init images.

Exit codes and messages of invalid options are in `test_cli.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import compiling
import jax
import numpy as np
import pytest
from command import Outcome, call
from PIL import Image
from tiny import MODEL, random_model

from sdxl_jax.commands import parsing, sample
from sdxl_jax.errors import InputError
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.sampling.contact_sheet import save_png
from sdxl_jax.sampling.options import Options
from sdxl_jax.sizes import Position, Size
from sdxl_jax.weights.convert import Layout, convert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("model") / "model"
    convert(random_model(MODEL, 0), path, Layout.ORBAX)
    return path


@pytest.fixture(scope="module")
def sampled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, two images each."""
    out = tmp_path_factory.mktemp("sampled") / "out"
    outcome = run(model, out, "--prompt", "a cat", "--prompt", "a dog", "--num-images", 2, "--negative-prompt", "fog")
    assert outcome.code == 0, outcome
    return out


def run(model: Path, out: Path, *more: Any) -> Outcome:
    """One shape for all tests, and the same batch: 24 × 32, two steps."""
    return call(*("sample", model, "--out", out, "--height", 24, "--width", 32, "--steps", 2), *more)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def text(path: Path) -> dict[str, str]:
    return sample.read_text(path)


def same(one: Path, other: Path) -> bool:
    """Up to one level, from the program of another batch size."""
    return int(np.abs(pixels(one).astype(int) - pixels(other)).max()) <= 1


# Repeated from a PNG


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_an_image_is_repeated_from_its_png_text(number: int, model: Path, sampled: Path, tmp_path: Path) -> None:
    image = sampled / f"{number:06d}.png"
    outcome = call("sample", model, "--from-png", image, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000.png"]
    assert same(tmp_path / "out" / "000000.png", image)
    assert not same(tmp_path / "out" / "000000.png", sampled / "000001.png")
    again = text(tmp_path / "out" / "000000.png")
    assert {**again, "num_images": "2", "first_index": "0"} == text(image)


def test_other_options_override_those_of_the_png(model: Path, sampled: Path, tmp_path: Path) -> None:
    given = ["sample", model, "--from-png", sampled / "000000.png", "--prompt", "a fish", "--seed", 9]
    assert call(*given, "--out", tmp_path / "out").code == 0
    texts = text(tmp_path / "out" / "000000.png")
    assert (texts["prompt"], texts["seed"], texts["negative_prompt"], texts["steps"]) == ("a fish", "9", "fog", "2")
    assert not same(tmp_path / "out" / "000000.png", sampled / "000000.png")


def test_a_png_without_settings_is_refused(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    for name, expected in (
        ("other.png", "has no settings in its PNG text: prompt, index, sampler, steps missing"),
        ("none.png", "cannot be read"),
    ):
        outcome = call("sample", model, "--from-png", tmp_path / name, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert expected in outcome.err


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "many", 'steps is "many", expected a whole number (invalid literal for int() with base 10'),
        ("index", "first", 'first_index is "first", expected a whole number'),
        ("guidance_interval", "0.5", 'guidance_interval is "0.5", expected 2 values, each a number'),
        ("dtype", "float", 'dtype is "float", expected one of float32, bfloat16'),
        ("prediction", "noise", 'prediction is "noise", expected one of epsilon, v_prediction, sample'),
        ("outpaint", "8 0 0", 'outpaint is "8 0 0", expected 4 whole numbers'),
        ("lora", "[", 'lora is "[", expected a JSON list (Expecting value'),
        ("embedding", "{}", 'embedding is "{}", expected a JSON list of texts'),
    ],
)
def test_a_png_text_with_an_invalid_value_is_refused_with_what_is_expected(
    name: str, value: str, expected: str, sampled: Path, tmp_path: Path
) -> None:
    settings = {**text(sampled / "000000.png"), name: value}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "changed.png", settings)
    outcome = call("sample", "absent", "--from-png", tmp_path / "changed.png", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert f"--from-png {tmp_path / 'changed.png'}: {expected}" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_an_init_image_that_has_changed_is_refused(model: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((24, 32, 3), 90, np.uint8)).save(photo)
    assert run(model, tmp_path / "out", "--prompt", "x", "--init-image", photo, "--strength", 0.5).code == 0
    again = ["sample", model, "--from-png", tmp_path / "out" / "000000.png", "--out", tmp_path / "again"]
    assert call(*again).code == 0
    assert same(tmp_path / "again" / "000000.png", tmp_path / "out" / "000000.png")
    Image.fromarray(np.full((24, 32, 3), 190, np.uint8)).save(photo)
    outcome = call(*again, "--overwrite")
    assert outcome.code == 2
    assert "was made with a different --init-image" in outcome.err


OPTIONS = Options(
    height=64,
    sampler="dpmpp_2m",
    timestep_spacing=Spacing.TRAILING,
    sigmas=Sigmas.KARRAS,
    guidance_interval=(0.25, 0.75),
    original_size=Size(512, 768),
    crop=Position(0, 9),
    sequential=True,
    seed=3,
)


def test_options_as_words_are_parsed_back() -> None:
    words = {name: " ".join(parsing.words(value)) for name, value in vars(OPTIONS).items() if value is not None}
    assert words["original_size"] == "512x768"
    assert words["crop"] == "0,9"
    assert words["guidance_interval"] == "0.25 0.75"
    assert words["pag_parts"] == "mid"
    assert parsing.from_mapping(Options(), words, "here") == OPTIONS


# Guidance that is off, and non-finite images


@pytest.mark.slow
def test_guidance_0_writes_the_bytes_of_guidance_1_and_notes_what_has_no_effect(model: Path, tmp_path: Path) -> None:
    for guidance in ("0", "1", "0.5"):
        outcome = run(model, tmp_path / guidance, "--prompt", "a cat", "--guidance", guidance, "--save-latents")
        assert outcome.code == 0, outcome
        assert ("note: guidance=0.5 turns guidance off: it needs a scale above 1" in outcome.err) == (guidance == "0.5")
        for name in ("000000.png", "latents.npy"):
            assert (tmp_path / guidance / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
    outcome = run(model, tmp_path / "again", "--prompt", "a cat", "--guidance", 0, "--negative-prompt", "a dog")
    assert "guidance=0 turns guidance off: it needs a scale above 1. No effect: the negative prompt" in outcome.err
    assert same(tmp_path / "again" / "000000.png", tmp_path / "0" / "000000.png")


def test_damaged_weights_end_with_2_and_write_nothing(tmp_path: Path) -> None:
    whole = random_model(MODEL, 0)
    decoder = whole.params["vae"]["decoder"]
    kernel = decoder["conv_out"]["kernel"].at[0, 0, 0, 0].set(np.nan)
    broken = {**whole.params["vae"], "decoder": {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}}
    convert(whole._replace(params={**whole.params, "vae": broken}), tmp_path / "model", Layout.ORBAX)
    outcome = run(tmp_path / "model", tmp_path / "out", "--prompt", "a cat")
    assert outcome.code == 2
    assert "error: Image 0: non-finite (NaN or inf), first in the image, from the autoencoder's decoder" in outcome.err
    assert "vae/decoder/conv_out/kernel" in outcome.err
    assert not (tmp_path / "out").exists()


# Texts that are not UTF-8


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--prompt", "caf\udce9"], "Prompt 1 is not UTF-8 text, at character 4"),
        (["--prompt", "a", "--negative-prompt", "\udce9"], "The negative prompt of prompt 1 is not UTF-8 text"),
        (["--prompt", "a", "--sweep", "negative-prompt=fog,\udce9"], "--sweep negative-prompt is not UTF-8 text"),
        (["--prompts-file", "prompts.jsonl"], "Prompt 2 is not UTF-8 text, at character 3"),
        (["--prompts-file", "negative.jsonl"], "The negative prompt of prompt 1 is not UTF-8 text, at character 1"),
    ],
    ids=ascii,
)
def test_a_prompt_that_is_not_utf_8_is_refused_before_the_model_is_read(
    given: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(r'{"prompt": "a \ud83d\ude00"}' + "\n" + r'{"prompt": "a \ud83d"}')
    Path("negative.jsonl").write_text(r'{"prompt": "a cat", "negative_prompt": "\udce9"}')
    outcome = run(tmp_path / "absent", tmp_path / "out", *given)
    assert outcome.code == 2
    assert expected in outcome.err
    assert len(outcome.err.splitlines()) == 1
    outcome.err.encode()


def test_files_whose_names_are_not_utf_8_are_read_and_written(model: Path, tmp_path: Path) -> None:
    photo, out = tmp_path / "caf\udce9.png", tmp_path / "\udcff"
    Image.fromarray(np.full((24, 32, 3), 90, np.uint8)).save(photo)
    outcome = run(model, out, "--prompt", "a cat", "--init-image", photo, "--strength", 0.5)
    assert outcome.code == 0, outcome
    outcome.out.encode()
    assert text(out / "000000.png")["init_image"].endswith(r"caf\udce9.png")
    outcome = call("sample", model, "--from-png", out / "000000.png", "--out", tmp_path / "again")
    assert outcome.code == 0, outcome
    assert same(tmp_path / "again" / "000000.png", out / "000000.png")


@pytest.mark.parametrize(("value", "shown"), [("NaN", "nan"), ("1e999", "inf"), ("-1", "-1.0"), ('"nan"', "nan")])
def test_a_guidance_out_of_range_is_refused_in_a_line_of_json_too(
    value: str, shown: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a cat", "guidance": {value}}}')
    outcome = run(model, tmp_path / "out", "--prompts-file", tmp_path / "prompts.jsonl")
    assert outcome.code == 2
    assert f"guidance={shown} is out of range. Give 0 to 1000" in outcome.err


# Files of prompts


def test_lines_of_json_have_options_of_their_own(model: Path, sampled: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat", "num_images": 2, "negative_prompt": "fog"},
        {"prompt": "a dog", "guidance": 1.5, "num-images": 1, "crop": "3,4"},
        {"prompt": "a dog", "negative-prompt": "fog"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    outcome = run(model, tmp_path / "out", "--prompts-file", tmp_path / "prompts.jsonl")
    assert outcome.code == 0, outcome
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(4)]
    texts = [text(file) for file in files]
    assert [(each["prompt"], each["index"], each["guidance"]) for each in texts] == [
        ("a cat", "0", "5.0"),
        ("a cat", "1", "5.0"),
        ("a dog", "2", "1.5"),
        ("a dog", "3", "5.0"),
    ]
    assert texts[2]["crop"] == "3,4"
    assert "negative_prompt" not in texts[2]
    for file in (files[0], files[1], files[3]):  # the same numbers as where all have the same options
        assert same(file, sampled / file.name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("inside", ["\u2028", "\x0c", "\x85", "\x1c"])
def test_files_of_prompts_are_read_as_windows_writes_them(inside: str, encoding: str, tmp_path: Path) -> None:
    path, odd = tmp_path / "prompts", f"a red{inside}fox"
    given = sample.Sample(model=tmp_path, out=tmp_path, prompts_file=path)
    path.write_bytes(f"{odd}\r\n\r\na blue house\r\n".encode(encoding))
    assert [task.prompt for task in sample._tasks(given)] == [odd, "a blue house"]
    lines = json.dumps({"prompt": "a red fox", "steps": 3}) + "\r\n"
    if inside != "\x0c" and inside != "\x1c":  # which JSON must escape
        lines += json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n"
    path.write_bytes(lines.encode(encoding))
    tasks = sample._tasks(given)
    assert [task.prompt for task in tasks] == ["a red fox", odd][: len(tasks)] and tasks[0].options.steps == 3


@pytest.mark.parametrize("data", [b"caf\xe9", "a fox".encode("utf-16-le")])
def test_a_file_of_prompts_that_is_not_text_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(data)
    given = sample.Sample(model=tmp_path, out=tmp_path, prompts_file=tmp_path / "prompts.txt")
    with pytest.raises(InputError, match=r"prompts\.txt is not UTF-8 text .*Save it as UTF-8"):
        sample._tasks(given)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", ', "line 2 is not JSON"),
        ('["a"]', "line 2 is not a JSON object with a prompt"),
        ('{"steps": 3}', "line 2 is not a JSON object with a prompt"),
        ('{"prompt": "a", "stepz": 3}', "line 2: there is no option 'stepz'. Known, nearest first: steps, "),
        (
            '{"prompt": "a", "steps": "many"}',
            'line 2: steps is "many", expected a whole number (invalid literal for int',
        ),
        ('{"prompt": "a", "crop": "3x4"}', 'line 2: crop is "3x4", expected TOP,LEFT in pixels'),
        ('{"prompt": "a", "sigmas": "cosine"}', 'line 2: sigmas is "cosine", expected one of schedule, karras, exp'),
        (
            '{"prompt": "a", "guidance-interval": [0]}',
            "line 2: guidance-interval is [0], expected 2 values, each a number",
        ),
        ('{"prompt": "a", "sequential": 3}', "line 2: sequential is 3, expected true or false"),
        ("a plain prompt", "line 2 is not JSON"),
    ],
)
def test_a_broken_line_is_named(line: str, expected: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    outcome = run(model, tmp_path / "out", "--prompts-file", tmp_path / "prompts.jsonl")
    assert outcome.code == 2
    assert expected in outcome.err
    assert not (tmp_path / "out").exists()


# Sweeps and sheets


def test_a_sweep_samples_every_value_from_the_same_noise(model: Path, sampled: Path, tmp_path: Path) -> None:
    given = ["--prompt", "a cat", "--negative-prompt", "fog", "--num-images", 2, "--sweep", "guidance=1,5"]
    outcome = run(model, tmp_path / "out", *given, "--contact-sheet")
    assert outcome.code == 0, outcome
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "000003.png", "contact_sheet.png", "sweep.png"]
    texts = [text(tmp_path / "out" / name) for name in names[:4]]
    assert [(each["guidance"], each["index"]) for each in texts] == [
        ("1.0", "0"),
        ("1.0", "1"),
        ("5.0", "0"),
        ("5.0", "1"),
    ]
    for number in (0, 1):
        assert same(tmp_path / "out" / f"{number + 2:06d}.png", sampled / f"{number:06d}.png")
    assert not same(tmp_path / "out" / "000000.png", tmp_path / "out" / "000002.png")
    grid = pixels(tmp_path / "out" / "sweep.png")
    assert grid.shape[1] > 2 * 32


@pytest.mark.slow
def test_sweeps_of_positions_and_of_two_options(model: Path, tmp_path: Path) -> None:
    given = ["--prompt", "a cat", "--sweep", "crop=0,0;0,8", "--sweep", "guidance=1,2"]
    assert run(model, tmp_path / "out", *given).code == 0
    texts = [text(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [(each["crop"], each["guidance"]) for each in texts] == [
        ("0,0", "1.0"),
        ("0,8", "1.0"),
        ("0,0", "2.0"),
        ("0,8", "2.0"),
    ]


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("guidance", "expected OPTION=VALUE,VALUE"),
        ("guidanse=1,2", "no option 'guidanse'. Known, nearest first: guidance, "),
        ("steps=1,many", '--sweep steps=many: steps is "many", expected a whole number (invalid literal for int'),
    ],
)
def test_an_invalid_sweep_is_refused(sweep: str, expected: str, model: Path, tmp_path: Path) -> None:
    outcome = run(model, tmp_path / "out", "--prompt", "a cat", "--sweep", sweep)
    assert outcome.code == 2
    assert expected in outcome.err


# Init images


@pytest.mark.slow
def test_inpainting_and_outpainting_keep_the_rest_of_the_image(model: Path, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    mask = np.zeros((24, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    start = ["--prompt", "a cat", "--init-image", tmp_path / "photo.png"]
    assert run(model, tmp_path / "in", *start, "--mask", tmp_path / "mask.png").code == 0
    painted = pixels(tmp_path / "in" / "000000.png")
    np.testing.assert_array_equal(painted[:, :16], photo[:, :16])
    assert (painted[:, 16:] != photo[:, 16:]).mean() > 0.5
    outcome = call("sample", model, "--out", tmp_path / "out", "--steps", 2, *start, "--outpaint", 0, 0, 0, 8)
    assert outcome.code == 0, outcome
    wider = pixels(tmp_path / "out" / "000000.png")
    assert wider.shape == (24, 40, 3)
    np.testing.assert_array_equal(wider[:, 8:], photo)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mask", "photo.png"], "--mask needs an --init-image"),
        (["--outpaint", 8, 0, 0, 0], "--outpaint needs an --init-image"),
        (["--init-image", "absent.png"], "absent.png"),
        (["--init-image", "empty.png"], "empty.png"),
        (["--init-image", "broken.png"], "broken.png"),
        (["--init-image", "photo.png", "--mask", "small.png"], "24×32"),
        (["--init-image", "photo.png", "--mask", "photo.png", "--outpaint", 8, 0, 0, 0], "--mask and --outpaint"),
        (["--init-image", "photo.png", "--background", "pink"], "pink"),
        (["--init-image", "photo.png", "--strength", 2], "strength=2.0 is out of range. Give 0 to 1"),
        (["--handoff", 0.8], "handoff=0.8 has no effect without a refiner"),
        (["--preview-autoencoder", "x"], "no effect without --preview"),
        (["--one-program", "--preview", "x.png"], "--one-program has no steps that --preview could show"),
        (["--preview", "x.png"], "The preview in colours is for SDXL's latents"),
    ],
    ids=str,
)
def test_invalid_init_images_and_masks_are_refused(
    options: list[Any], expected: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 24)).save("photo.png")
    Image.new("L", (8, 8), 255).save("small.png")
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:45])
    Path("empty.png").touch()
    outcome = run(model, tmp_path / "out", "--prompt", "a cat", *options)
    assert outcome.code == 2
    assert expected in outcome.err
    assert not (tmp_path / "out").exists()


# The folder


def test_other_images_are_not_overwritten(model: Path, sampled: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(sampled, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    outcome = run(model, out, "--prompt", "a bird")
    assert outcome.code == 2
    assert "holds other images, e.g. 000000.png. Give a new folder, or --overwrite" in outcome.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # The same command may be run again, and writes the same bytes.
    again = ["--prompt", "a cat", "--prompt", "a dog", "--num-images", 2, "--negative-prompt", "fog"]
    assert run(model, out, *again).code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(model, out, "--prompt", "a bird", "--overwrite").code == 0
    assert (out / "000000.png").read_bytes() != before["000000.png"]


def test_compiled_programs_are_cached_for_the_next_command(model: Path, tmp_path: Path) -> None:
    with compiling.quick(tmp_path / "of others"):
        given = ["--prompt", "a cat", "--compilation-cache", tmp_path / "cache"]
        # Another size, or nothing would be left to compile.
        assert run(model, tmp_path / "out", *given, "--height", 40).code == 0
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    assert not (tmp_path / "of others").exists()


def test_a_value_of_another_type_is_refused_with_the_place() -> None:
    with pytest.raises(InputError, match='here: crop is "3x4", expected TOP,LEFT in pixels'):
        parsing.from_mapping(Options(), {"crop": "3x4"}, "here")
