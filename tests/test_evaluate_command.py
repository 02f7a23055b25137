"""`sdxl-jax evaluate` and `sdxl_jax.evaluate`, with small networks in the place of Inception, LPIPS and CLIP."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket_server import free_port
from command import call
from PIL import Image
from tiny import MODEL, random_model

import sdxl_jax
from sdxl_jax.commands import evaluate as command
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import features, resize, samples, scores, statistics
from sdxl_jax.evaluation.features import Network
from sdxl_jax.evaluation.scores import Clip
from sdxl_jax.evaluation.settings import ResizeMode
from sdxl_jax.sampling.generate import generate
from sdxl_jax.sampling.options import Options
from sdxl_jax.weights.convert import Layout, convert

FEATURES = 8


def inception(params: Any, mode: ResizeMode, spatial: bool) -> Network:
    """Means of tiles of the image, instead of features."""

    def apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        tiles = x[:, :296, :296].reshape(len(x), 2, 148, 2, 148, 3).mean(axis=(2, 4)).reshape(len(x), 12)
        return tiles[:, :FEATURES], tiles[:, :5] if spatial else None

    return Network(statistics.INCEPTION, lambda image: resize.prepare(image, mode), jax.jit(apply), {})


def clip() -> Clip:
    """Embeddings: an image's mean colour, and the same direction for every prompt but those with a cat."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        mean = x.mean(axis=(1, 2)) + 1
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)

    image = Network("small-clip", lambda image: image.astype(np.float32), jax.jit(apply), {})
    one, other = np.ones(3, np.float32) / 3**0.5, -np.ones(3, np.float32) / 3**0.5
    return Clip(image, lambda prompts: np.stack([other if "cat" in prompt else one for prompt in prompts]))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = SimpleNamespace(check=lambda name: None, load=lambda name: {})
    monkeypatch.setattr(scores, "weights", weights)
    monkeypatch.setattr(features, "inception", inception)
    monkeypatch.setattr(scores, "FEATURES", FEATURES)
    monkeypatch.setattr(command, "_clip", lambda measures: None if measures.clip is None else clip())


def write(folder: Path, count: int = 12, seed: int = 0, size: tuple[int, int] = (24, 32)) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        level = rng.integers(30, 220, 3)
        pixels = np.clip(rng.normal(level, 25, (*size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("folders")
    return write(path / "samples"), write(path / "reference", seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    convert(random_model(MODEL, 0), path, Layout.ORBAX)
    return path


def scores_of(out: str) -> dict[str, dict[str, Any]]:
    return {score["name"]: score for score in json.loads(out)["scores"]}


# images


def test_every_score_states_n_and_the_resize_mode(pair: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = ["--metrics", "fid", "sfid", "kid", "precision_recall", "cmmd", "psnr", "--clip", "small"]
    outcome = call("evaluate", "images", *pair, *metrics, "--resize", "clean", "--report", tmp_path / "report.md")
    assert outcome.code == 0, outcome
    for name in ("fid", "sfid", "kid", "precision", "recall"):
        assert re.search(rf"^{name} +\S+ .*\b12 +12 +clean\b", outcome.out, re.MULTILINE), (name, outcome.out)
    for name in ("cmmd", "psnr"):
        assert re.search(rf"^{name} +\S+ .*\b12 +12 +none\b", outcome.out, re.MULTILINE), (name, outcome.out)
    call("evaluate", "images", *pair, "--metrics", "kid", "--report", tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("| images | reference | scores | N |")
    assert re.fullmatch(
        rf"\| {pair[0]} \| {pair[1]} \| fid .*; kid .* ± .*; cmmd .* \| 12 \| 12 \| clean, none \|", lines[2]
    )
    assert lines[3].endswith("| 12 | 12 | tf1 |")


def test_few_images_for_fid_are_said_and_kid_is_offered(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "FEATURES", 2048)
    outcome = call("evaluate", "images", *pair, "--metrics", "fid")
    assert "note: FID of 12 images is much too high: below 2048" in outcome.out
    assert "KID is unbiased (--metrics kid)" in outcome.out
    assert "note" not in call("evaluate", "images", *pair, "--metrics", "kid").out


def test_saved_statistics_give_the_same_scores_as_their_images(pair: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = ["--metrics", "fid", "sfid", "kid", "precision_recall", "--json"]
    of_images = scores_of(call("evaluate", "images", *pair, *metrics).out)
    saved = call("evaluate", "images", pair[1], "--save-statistics", tmp_path / "reference.npz", "--save-features")
    assert saved.code == 0 and "statistics of 12 images (tf1)" in saved.err
    of_file = scores_of(call("evaluate", "images", pair[0], tmp_path / "reference.npz", *metrics).out)
    for name, score in of_images.items():
        assert of_file[name]["value"] == pytest.approx(score["value"], rel=1e-6, abs=1e-9), name
        assert of_file[name]["reference_images"] == 12
    call("evaluate", "images", pair[1], "--save-statistics", tmp_path / "moments.npz", "--resize", "clean")
    outcome = call("evaluate", "images", pair[0], tmp_path / "moments.npz", "--metrics", "fid", "--json")
    assert scores_of(outcome.out)["fid"]["resize"] == "clean", "the mode is that of the statistics"
    refused = call("evaluate", "images", pair[0], tmp_path / "moments.npz", "--metrics", "fid", "--resize", "tf1")
    assert refused.code == 2 and "They cannot be compared: give --resize clean" in refused.err
    refused = call("evaluate", "images", pair[0], tmp_path / "moments.npz", "--metrics", "kid")
    assert refused.code == 2 and "kid needs every feature of the reference" in refused.err


def test_python_takes_arrays_and_gives_what_the_command_gives(pair: tuple[Path, Path]) -> None:
    arrays = [np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]) for folder in pair]
    found = sdxl_jax.evaluate(arrays[0], arrays[1], metrics=["fid", "ssim"], batch_size=5)
    printed = scores_of(call("evaluate", "images", *pair, "--metrics", "fid", "ssim", "--json").out)
    assert [score.name for score in found.scores] == ["fid", "ssim"]
    for score in found.scores:
        assert score.value == pytest.approx(printed[score.name]["value"], rel=1e-6)


def test_a_measurement_computes_the_reference_once(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measurement, seen = scores.Measurement(pair[1], metrics=["fid", "kid"]), []
    original = features.statistics_of

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[1].source)
        return original(*arguments)

    monkeypatch.setattr(features, "statistics_of", counted)
    first, again = (measurement.of(pair[0]) for _ in range(2))
    assert first.scores == again.scores
    assert sorted(seen) == sorted([str(pair[0])] * 2 + [str(pair[1])])


def test_clip_score_is_100_times_the_cosine_cut_off_at_0(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a grey image\n" * 6 + "a cat\n" * 6)
    outcome = call(
        *("evaluate", "images", pair[0], "--clip", "small", "--metrics", "clip_score", "--json"),
        *("--prompts-file", tmp_path / "prompts.txt"),
    )
    images = [np.asarray(Image.open(path), np.float64).mean(axis=(0, 1)) + 1 for path in sorted(pair[0].iterdir())]
    cosines = [image.sum() / np.linalg.norm(image) / 3**0.5 for image in images[:6]] + [0.0] * 6
    assert scores_of(outcome.out)["clip_score"]["value"] == pytest.approx(100 * np.mean(cosines), rel=1e-5)
    assert scores_of(outcome.out)["clip_score"]["convention"] == "small-clip, 100 · max(cosine, 0)"


def test_any_other_score_is_a_function_of_images_and_prompts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "def redness(images, prompts):\n    return [i[..., 0].mean() + len(p) for i, p in zip(images, prompts)]\n"
        "def wrong(images, prompts):\n    return [1.0]\n"
    )
    hook = f"{tmp_path / 'score.py'}:redness"
    outcome = call("evaluate", "images", pair[0], "--score", hook, "--json", "--feature-batch-size", 5)
    red = [np.asarray(Image.open(path))[..., 0].mean() for path in sorted(pair[0].iterdir())]
    assert scores_of(outcome.out)[hook]["value"] == pytest.approx(np.mean(red))
    for given, message in {
        f"{tmp_path / 'score.py'}:wrong": "gave 1 scores for 12 images",
        f"{tmp_path / 'score.py'}:nothing": "cannot be loaded (KeyError",
        "json:nothing": "cannot be loaded (AttributeError",
        "json:__name__": "is a str. Give a function",
    }.items():
        outcome = call("evaluate", "images", pair[0], "--score", given)
        assert outcome.code == 2 and message in outcome.err, outcome


def test_inception_score_needs_the_head_and_a_probe_has_its_own_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).standard_normal((FEATURES, 5))
    np.savez(tmp_path / "probe.npz", kernel=kernel, bias=np.arange(5.0))
    given = ["--metrics", "probe_score", "inception_score", "--json", "--probe", tmp_path / "probe.npz"]
    refused = call("evaluate", "images", pair[0], *given)
    assert refused.code == 2
    assert "inception_score needs weights that are neither part of FID's network nor given" in refused.err
    assert "--inception-head FILE.npz" in refused.err
    found = scores_of(call("evaluate", "images", pair[0], *given, "--inception-head", tmp_path / "probe.npz").out)
    assert found["probe_score"]["value"] != found["inception_score"]["value"], "the head's bias is left out"
    np.savez(tmp_path / "small.npz", kernel=np.zeros((3, 5)))
    refused = call("evaluate", "images", pair[0], "--metrics", "probe_score", "--probe", tmp_path / "small.npz")
    assert refused.code == 2 and "the kernel is 3 × 5, expected 8 × classes" in refused.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{mixed}", "{reference}"], r"mixed has images of 2 sizes \(12 of 24×32, 1 of 30×20\).*--resize tf1"),
        (["{samples}", "{mixed}"], r"mixed has images of 2 sizes"),
        (["{one}", "{reference}"], "has 1 image. A covariance needs two"),
        (["{samples}", "{broken}"], r"(?s)1 entries of .*cannot be read:.*000003\.png"),
        (["{samples}"], "no metric to compute"),
        (["{samples}", "--metrics", "fid"], "fid compares with a reference, and none is given"),
        (["{samples}", "{floats}"], "float64, values 0 to 1. Images are uint8"),
        (["{samples}", "{plain}"], "does not say how its images were resized. Say it with --reference-resize"),
        (["{samples}", "{plain}", "--reference-resize", "tf1", "--resize", "clean"], "cannot be compared"),
        (["{samples}", "{plain}", "--reference-resize", "tf1", "--metrics", "sfid"], "sfid needs the moments"),
        (["{samples}", "{plain}", "--reference-resize", "tf1", "--metrics", "ssim"], "ssim needs the images of the"),
        (["{samples}", "{other}"], "the network another, |has the network inception.* another. They cannot"),
        (["{samples}", "{reference}", "--metrics", "cmmd"], "cmmd needs weights .*--clip MODEL"),
        (["{samples}", "--metrics", "clip_score", "--clip", "x"], "clip_score compares images with their prompts"),
        (["{samples}", "--clip", "x", "--prompts-file", "{prompts}"], "2 prompts for the 12 images"),
        (["{samples}", "{mixed}", "--metrics", "psnr"], r"1 without a counterpart, e.g. extra"),
        (["{samples}", "{small}", "--metrics", "psnr"], r"000000.png is 24×32 in .*, 16×16 in"),
        (["{samples}", "{reference}", "--save-features"], "--save-features has no effect without"),
        (["{samples}/000000.png", "{reference}"], "is the file"),
        (["nothing", "{reference}"], "nothing, which does not exist"),
    ],
)
def test_bad_input_is_said_before_work_begins(
    given: list[str], message: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(features, "rows", never)
    paths = {"samples": pair[0], "reference": pair[1], "mixed": write(tmp_path / "mixed")}
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(paths["mixed"] / "extra.png")
    paths["one"], paths["broken"] = write(tmp_path / "one", 1), write(tmp_path / "broken", 5)
    paths["small"] = write(tmp_path / "small", size=(16, 16))
    (paths["broken"] / "000003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("floats", "plain", "other"):
        paths[name] = tmp_path / f"{name}.npz"
    np.savez(paths["floats"], arr_0=np.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3))
    np.savez(paths["plain"], mu=np.zeros(8), sigma=np.eye(8))
    np.savez(paths["other"], mu=np.zeros(8), sigma=np.eye(8), network="another", resize="tf1")
    paths["prompts"] = tmp_path / "prompts.txt"
    paths["prompts"].write_text("one\ntwo\n")
    outcome = call("evaluate", "images", *(each.format(**paths) for each in given))
    assert outcome.code == 2, outcome
    assert re.search(message, outcome.err), outcome.err


def test_missing_weights_are_said_before_work_begins(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise InputError(f"{name} is missing")

    monkeypatch.setattr(scores, "weights", SimpleNamespace(check=missing))
    for metric, name in {
        "fid": "inception",
        "lpips_vgg": "lpips_vgg",
        "psim": "lpips_vgg",
        "lpips_alex": "lpips_alex",
    }.items():
        outcome = call("evaluate", "images", *pair, "--metrics", metric)
        assert (outcome.code, outcome.err.strip()) == (2, f"error: {name} is missing")


def test_unknown_commands_and_report_files_of_others_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = call("evaluate", "imagse")
    assert outcome.code == 2 and "Known, nearest first: images" in outcome.err
    assert call("evaluate").code == 2
    assert "evaluate --fetch-weights" in call("evaluate", "--help").out
    (tmp_path / "notes.md").write_text("# My notes\n")
    outcome = call("evaluate", "images", *pair, "--report", tmp_path / "notes.md")
    assert outcome.code == 2 and (tmp_path / "notes.md").read_text() == "# My notes\n"


# model


SMALL = ["--height", 24, "--width", 32, "--steps", 2, "--batch-size", 4]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"prompt number {number}\n" for number in range(6)))
    return path


def test_samples_are_those_of_the_sample_command_and_resume(
    model: Path, prompts: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = ["evaluate", "model", model, "--prompts-file", prompts, "--out", out, "--reference", pair[1], *SMALL]
    given += ["--seed", 3, "--json", "--clip", "small", "--metrics", "kid", "clip_score"]

    written, save = [], samples.save_png

    def stop_after_three(*arguments: Any) -> None:
        save(*arguments)
        written.append(arguments[1])
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(samples, "save_png", stop_after_three)
    stopped = call(*given)
    assert stopped.code == 143 and "what was finished is kept" in stopped.err
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    first = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}

    outcome = call(*given)
    assert outcome.code == 0, outcome
    assert scores_of(outcome.out)["kid"]["images"] == 6
    assert json.loads(outcome.out)["sampling"]["seed"] == "3"
    assert {name: ((out / name).read_bytes(), (out / name).stat().st_mtime_ns) for name in first} == first
    assert len(written) == 6, "nothing is sampled twice"
    expected = generate(
        sdxl_jax.load_model(model, progress=False),
        [f"prompt number {number}" for number in range(6)],
        options=Options(height=24, width=32, steps=2, batch_size=4, seed=3),
    ).images
    found = np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())])
    assert np.abs(found.astype(int) - expected).max() <= 1

    refused = call(*given, "--guidance", 3)
    assert refused.code == 2 and "holds other images, e.g. 000000.png" in refused.err
    refused = call(*given, "--prompts", 5)
    assert refused.code == 2 and "e.g. 000005.png" in refused.err


def test_captions_of_a_folder_are_prompts_and_its_images_the_reference(model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 5)
    lines = [json.dumps({"file_name": f"{n:06d}.png", "text": [f"caption {n}", "another"]}) for n in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    outcome = call("evaluate", "model", model, "--captions", folder, "--out", out, *SMALL, "--json", "--prompts", 4)
    assert outcome.code == 0, outcome
    assert scores_of(outcome.out)["fid"]["reference_images"] == 5
    assert scores_of(outcome.out)["fid"]["images"] == 4
    text = [samples._text(path)["prompt"] for path in sorted(out.iterdir())]
    assert text == [f"caption {number}" for number in range(4)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "either --prompts-file FILE or --captions FOLDER"),
        (["--prompts-file", "{prompts}", "--prompts", "9"], "--prompts 9: there are 6 prompts"),
        (["--prompts-file", "{prompts}", "--prompts", "0"], "prompts=0 is out of range"),
        (["--prompts-file", "{prompts}", "--height", "25"], "expected positive multiples of 8"),
        (["--prompts-file", "{prompts}", "--metrics", "fid"], "fid compares with a reference, and none is given"),
    ],
)
def test_bad_input_of_a_model_is_said_before_it_is_loaded(
    given: list[str], message: str, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.sample, "load", None)
    score = ["--score", "statistics:mean"] if "--metrics" not in given else []
    outcome = call(
        "evaluate", "model", model, "--out", tmp_path / "out", *[each.format(prompts=prompts) for each in given], *score
    )
    assert outcome.code == 2, outcome
    assert message in outcome.err


@pytest.mark.slow
def of_process(index: int, port: int, *given: object) -> "subprocess.Popen[str]":
    number = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index), "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    command = [sys.executable, "-m", "sdxl_jax", "evaluate", *map(str, given)]
    piped = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **number}, stdout=piped, stderr=piped, text=True)


@pytest.mark.slow
def test_two_processes_share_the_images_and_the_first_reports(model: Path, prompts: Path, tmp_path: Path) -> None:
    reference = write(tmp_path / "reference", 6)
    given = ["model", model, "--prompts-file", prompts, "--reference", reference, *SMALL, "--metrics", "psnr"]
    members = [of_process(index, port, *given, "--out", tmp_path / "two") for port in [free_port()] for index in (0, 1)]
    (first, told), (second, _) = [member.communicate(timeout=300) for member in members]
    assert [member.returncode for member in members] == [0, 0], told
    alone = call("evaluate", *given, "--out", tmp_path / "one")
    assert alone.code == 0, alone
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    (score,) = [line for line in first.splitlines() if line.startswith("psnr")]
    assert score in alone.out and "psnr" not in second

    members = [
        of_process(index, port, *given, "--out", tmp_path / f"out{index}") for port in [free_port()] for index in (0, 1)
    ]
    errors = [member.communicate(timeout=300)[1] for member in members]
    assert [member.returncode for member in members] == [2, 2] and "disagree" in errors[0], errors


def test_each_process_samples_a_contiguous_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"number": str(number)} for number in range(7)]
    for number in (1, 5):
        samples.save_png(Image.new("RGB", (8, 8)), samples.path_of(tmp_path, number), texts[number])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(samples.missing(tmp_path, texts))
    assert parts == [[0], [2, 3], [4, 6]]
    monkeypatch.setattr(samples.multihost_utils, "sync_global_devices", lambda name: None)
    with pytest.raises(InputError, match="Process 2 sees 2 of 7 images"):
        samples.wait_for_all(tmp_path, 7)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_curve_is_one_table_and_one_plot_for_several_models(
    model: Path, prompts: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    given = ["--prompts-file", prompts, "--prompts", 4, "--reference", pair[1], "--clip", "small", *SMALL]
    outcome = call("evaluate", "curve", model, model, "--out", tmp_path / "out", "--guidance-scales", 2, 4, *given)
    assert outcome.code == 0, outcome
    table = (tmp_path / "out" / "curve.md").read_text().splitlines()
    assert table[0] == "| model | guidance | fid | clip_score | N | reference N | resize |"
    assert [line.split(" | ")[1] for line in table[2:]] == ["2", "4", "2", "4"]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 1_model", "| 1_model", "| 2_model", "| 2_model"]
    assert table[2].split(" | ")[2:] == table[4].split(" | ")[2:], "the same model twice"
    with Image.open(tmp_path / "out" / "curve.png") as image:
        assert image.size[0] > 500
    text = samples._text(tmp_path / "out" / "2_model" / "guidance_4" / "000001.png")
    assert text["guidance"] == "4.0"
    refused = call("evaluate", "curve", model, "--out", tmp_path / "out", "--guidance", 3, *given)
    assert refused.code == 2 and "--guidance has no effect on a curve" in refused.err
    refused = call("evaluate", "curve", model, "--out", tmp_path / "out", *given[:6])
    assert refused.code == 2 and "clip_score needs weights" in refused.err


# autoencoder


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_reconstructions_are_compared_with_centred_squares(model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 5, size=(40, 70))
    given = ["evaluate", "autoencoder", model, folder, "--size", 32, "--batch-size", 2, "--json"]
    given += ["--metrics", "psnr", "ssim", "fid", "--out", tmp_path / "out"]
    outcome = call(*given)
    assert outcome.code == 0, outcome
    found = scores_of(outcome.out)
    assert list(found) == ["rfid", "psnr", "ssim"]
    assert found["rfid"]["images"] == found["rfid"]["reference_images"] == 5
    assert any("posterior's mean" in note for note in json.loads(outcome.out)["notes"])
    squares = [resize.centred_square(np.asarray(Image.open(path)), 32) for path in sorted(folder.iterdir())]
    results = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    expected = sdxl_jax.evaluate(np.stack(results), np.stack(squares), metrics=["psnr"]).scores[0].value
    assert found["psnr"]["value"] == pytest.approx(expected)
    (tmp_path / "out" / "000003.png").unlink()
    assert scores_of(call(*given).out) == found
    refused = call(*given, "--images", 4)
    assert refused.code == 2 and "holds other images" in refused.err
    refused = call(*given[:4], "--size", 30, "--metrics", "psnr")
    assert refused.code == 2 and "--size 30: this autoencoder takes multiples of 8. Give 32" in refused.err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_reconstruction_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = random_model(MODEL, 0)
    broken.params["vae"]["decoder"]["conv_out"]["bias"] *= np.nan
    convert(broken, tmp_path / "model", Layout.ORBAX)
    folder = write(tmp_path / "data", 3, size=(32, 32))
    outcome = call(
        "evaluate", "autoencoder", tmp_path / "model", folder, "--size", 32, "--batch-size", 2, "--metrics", "psnr"
    )
    assert outcome.code == 2 and "The reconstruction of 000000.png is not finite" in outcome.err
