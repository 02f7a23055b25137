"""The promises of experiments/: each can be trained as it stands, and ends in a table and JSON that say what they are
of."""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import real_data
from command import call
from image_sources import encoded, write_folder
from PIL import Image

from sdxl_jax.data.folders import open_folder
from sdxl_jax.evaluation import report
from sdxl_jax.evaluation.scores import Evaluation, Score
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import to_json
from sdxl_jax.quickstart import recipe
from sdxl_jax.sampling import plan
from sdxl_jax.sampling.options import Options
from sdxl_jax.training.objectives import objective_of

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import appendix_j  # pyright: ignore[reportMissingImports] (experiments/, put on the path above)
import cifar10  # pyright: ignore[reportMissingImports] (the same)
import crop_conditioning  # pyright: ignore[reportMissingImports] (the same)
import few_steps  # pyright: ignore[reportMissingImports] (the same)
import figures  # pyright: ignore[reportMissingImports] (the same)
import image_prompt  # pyright: ignore[reportMissingImports] (the same)
import offset_noise  # pyright: ignore[reportMissingImports] (the same)
import pictures  # pyright: ignore[reportMissingImports] (the same)
import refiner  # pyright: ignore[reportMissingImports] (the same)
import results  # pyright: ignore[reportMissingImports] (the same)
import small_model  # pyright: ignore[reportMissingImports] (the same)
import subjects  # pyright: ignore[reportMissingImports] (the same)
import table_2  # pyright: ignore[reportMissingImports] (the same)
import table_2_probe  # pyright: ignore[reportMissingImports] (the same)
import table_3  # pyright: ignore[reportMissingImports] (the same)


def test_results_are_a_table_and_json(tmp_path: Path) -> None:
    rows = [{"model": "a|b", "rfid": 4.123456, "N": 5000}, {"model": "c", "N": 2, "seed": None}]
    text = results.write(tmp_path / "out", "A table", table_3.PAPER, rows, ["said"], time.monotonic())
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "| model | rfid | N | seed |" in text and "| a\\|b | 4.1235 | 5000 | – |" in text and "- said" in text
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"] == rows and found["paper"] == table_3.PAPER
    assert set(found) >= {"name", "arguments", "versions", "commit", "hardware", "seconds"}
    assert 0.01 < found["memory_gib"] < 1000


def test_rows_that_differ_in_their_seed_alone_have_a_mean_and_a_deviation() -> None:
    def row(model: str, seed: int, fid: float, guidance: float = 1.0) -> dict[str, Any]:
        return {"model": model, "guidance": guidance, "seed": seed, "fid": fid, "N": 8}

    rows = [row("a", 0, 2.0), row("b", 0, 5.0), row("a", 1, 4.0), row("b", 0, 6.0, guidance=2.0)]
    mean, deviation = {**rows[0], "seed": "mean", "fid": 3.0}, {**rows[0], "seed": "±", "fid": pytest.approx(2**0.5)}
    assert results.over_seeds(rows) == [rows[0], rows[2], mean, deviation, rows[1], rows[3]]


@pytest.mark.parametrize("name", appendix_j.RUNS)
def test_the_runs_of_appendix_j_can_be_trained(name: str, tmp_path: Path) -> None:
    config = appendix_j.config(tmp_path, appendix_j.RUNS[name], 100, 0)
    objective_of(config).config.check()
    assert config.training.steps == {"A1": 100, "B": 100, "A2": 380}[name]
    assert config.discriminator is not None
    assert config.discriminator.start_step == config.training.steps // 25  # 4 %, as 20,001 of 500,000


def test_the_rows_of_the_paper_are_pairs_without_and_with_the_average() -> None:
    for raw, averaged in zip(appendix_j.PAPER[::2], appendix_j.PAPER[1::2], strict=True):
        assert (raw["run"], raw["EMA"], averaged["EMA"]) == (averaged["run"], "no", "yes")
        assert averaged["rfid"] < raw["rfid"] and averaged["psim"] < raw["psim"]


def options_of(experiment: ModuleType, monkeypatch: pytest.MonkeyPatch, *given: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["experiment.py", *given])
    return experiment.arguments()


def test_the_models_of_table_2_differ_in_images_and_sizes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(table_2, monkeypatch, "--cifar10", "unused", "--side", "16")
    only, nocond, size = (table_2.config(kind, tmp_path, options) for kind in table_2.RUNS)
    for config in (only, nocond, size):
        objective_of(config).config.check()
        assert config.training.class_dropout == small_model.DROPOUT
    assert differences(to_json(only), to_json(nocond)) == ["data.min_size: 16 -> 1"]
    changed = {line.split(":", 1)[0] for line in differences(to_json(nocond), to_json(size))}
    assert changed == {"model.micro", "model.unet.vector_dim", "training.micro_dropout"}


def test_table_2_keeps_70_sharp_images_per_class_and_blurs_the_others(tmp_path: Path) -> None:
    labels = np.arange(1000) % cifar10.CLASSES
    sizes = table_2.sizes_of(labels, 32)
    assert np.bincount(labels[sizes == 32]).tolist() == [table_2.SHARP] * cifar10.CLASSES
    assert (sizes[sizes < 32].min(), sizes[sizes < 32].max()) == (14, 28)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1000, 32, 32, 3), np.uint8)
    chosen = table_2.reduced(sizes, 32, 8)
    assert len(chosen) == 8 and (sizes[chosen] < 32).all()
    data = cifar10.Cifar(images[chosen], labels[chosen])
    reduced = [cifar10.resized(image, size) for image, size in zip(data.images, sizes[chosen], strict=True)]
    small_model.write_images(tmp_path / "data", reduced, label=data.labels.tolist())
    source = open_folder(tmp_path / "data", captioned=False, label="label")
    assert source.sizes.tolist() == [[size, size] for size in sizes[chosen]]
    assert source.numbers["label"].tolist() == labels[chosen].tolist()
    sharp, soft = data.images, table_2.blurred(data.images, sizes[chosen])
    assert soft.shape == sharp.shape
    assert cifar10.high_frequencies(soft) < 0.7 * cifar10.high_frequencies(sharp)


def test_table_2_draws_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = [{"images": f"data_{name}", "fid": 20.0} for name in ("only", "blurred", "sharp")]
    of = [{"images": kind, "fid": 30.0, "high_frequencies": 1.0, "N": 8, "seed": 0} for kind in table_2.RUNS]
    curve = [{**row, "guidance": scale} for row in of for scale in (1.0, 2.0)]
    steps = [{**row, "guidance": 1.0, "step": step} for row in of for step in (10, 20)]
    sizes = [{**of[-1], "size given": size} for size in (7, 16)]
    drawn: list[list[tuple[int, int]]] = []

    def keep(figure: Any, path: Path) -> None:
        drawn.append([(len(axes.lines), len(axes.patches)) for axes in figure.axes])

    monkeypatch.setattr(results, "save_figure", keep)
    table_2.plot(table_2.Parts(bound, curve, [], [], []), tmp_path)
    table_2.plot(table_2.Parts(bound, curve, steps, curve[::2], sizes), tmp_path)
    # Three models and two lines of the data; three models; three bars; the sizes that are given, and a line at 1.
    assert drawn == [[(5, 0)], [(5, 0), (3, 0), (0, 3), (2, 0)]]


def test_a_folder_without_cifar_10_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no data_batch_1\.png\. Give the folder of the unpacked npm package"):
        cifar10.read(tmp_path, "train", 16)


def test_image_prompts_of_the_quickstart_have_no_twins(tmp_path: Path) -> None:
    for _ in range(2):  # the second as a resumed call
        image_prompt.unpack(tmp_path)
    images = image_prompt.read_images(tmp_path)
    assert len(images.captions) == len(set(images.captions)) == 60


def test_samples_that_are_kept_are_not_those_of_another_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with more samples once took those of a run with fewer for its own."""
    made: list[int] = []

    def generate(model: None, prompts: list[str], **options: Any) -> SimpleNamespace:
        made.append(len(prompts))
        return SimpleNamespace(images=np.zeros((len(prompts), 2, 2, 3), np.uint8))

    monkeypatch.setattr(small_model, "generate", generate)
    for count in (2, 3, 3, 2):
        assert len(small_model.sampled(None, [0] * count, tmp_path / "samples" / "of.npz", {})) == count
    assert made == [2, 3]


def test_high_frequencies_are_those_above_half_the_nyquist_frequency() -> None:
    wave = np.arange(32)[None, :, None] * np.ones((32, 1, 3))
    for frequency, has in ((4, False), (7, False), (9, True), (15, True)):
        image = np.round(127 + 100 * np.cos(2 * np.pi * frequency * wave / 32)).astype(np.uint8)[None]
        assert (cifar10.high_frequencies(image) > 100) == has, frequency


def test_probe_tells_classes_apart() -> None:
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    features = rng.normal(size=(60, 8)).astype(np.float32) + 3 * np.eye(8, dtype=np.float32)[labels]
    logits = table_2_probe.trained_probe(features, labels, 3)(features)
    assert (logits.argmax(axis=1) == labels).mean() > 0.95


def test_the_models_of_crop_conditioning_differ_in_that_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(crop_conditioning, monkeypatch)
    with_, without = (crop_conditioning.config(each, tmp_path, 20, options) for each in (True, False))
    for config in (with_, without):
        objective_of(config).config.check()
    changed = {line.split(":", 1)[0] for line in differences(to_json(with_), to_json(without))}
    assert changed == {"model.micro", "model.unet.vector_dim", "training.micro_dropout"}


def test_where_an_object_is_and_whether_it_is_cut_off_are_those_of_the_crop() -> None:
    given = pictures.square_pictures(crop_conditioning.OBJECT)
    assert len(given) >= 10 and all(picture.background.min() > 120 for picture in given)
    wide = crop_conditioning.canvases(given)
    middles, cut = [], []
    for left in crop_conditioning.LEFTS:
        crops = np.stack([canvas[:, left : left + crop_conditioning.SIDE] for canvas in wide])
        row = crop_conditioning.row("data", left, None, crops, given)
        assert row["without object"] == 0
        middles.append(row["middle"])
        cut.append(row["cut off"])
    assert middles == sorted(middles, reverse=True) and middles[2] == pytest.approx(15.5, abs=1)
    assert cut[0] > 0.9 and cut[-1] > 0.9 and cut[2] < 0.1


def test_offset_noise_is_measured_by_brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(offset_noise, monkeypatch)
    plain, offset = (offset_noise.config(strength, tmp_path, 20, options) for strength in (0.0, 0.05))
    assert differences(to_json(plain), to_json(offset)) == ["loss.offset_noise: 0.0 -> 0.05"]
    objective_of(offset).config.check()
    images = np.stack(offset_noise.versions(np.full((8, 8, 3), 100, np.uint8)))
    assert offset_noise.brightness(images) * 255 == pytest.approx([100, 10, 239.5], abs=1)


def test_the_refiner_is_trained_on_low_noise_and_fits_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(refiner, monkeypatch, "--cifar10", "unused", "--side", "16")
    base, refining = (refiner.config(kind, tmp_path, options) for kind in ("base", "refiner"))
    for config in (base, refining):
        objective_of(config).config.check()
    assert refining.loss.timesteps == refiner.LOW_NOISE and base.loss.timesteps is None
    for option in ({"handoff": refiner.HANDOFF}, {"refine_strength": refiner.STRENGTH}):
        plan.prepare(base.model, refining.model, Options(sampler="ddim", steps=50, **option))


def test_the_students_of_few_steps_need_no_guidance_for_the_steps_that_they_are_sampled_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(few_steps, monkeypatch, "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path))
    models = {tmp_path / "teacher": recipe.model_config()}
    monkeypatch.setattr(few_steps, "open_model", lambda path: SimpleNamespace(config=models[path]))
    names = []
    for method in few_steps.METHODS:
        for name, config, sampled in few_steps.students(method, options):
            objective = objective_of(config)
            objective.config.check()
            models[tmp_path / name] = objective.model_config
            for steps in sampled:
                plan.prepare(objective.model_config, None, Options(steps=steps))
                guidance = Options(steps=steps).resolved(objective.model_config).guidance
                assert guidance == 1 or (method == "guidance" and config.student.unet.guidance_dim == 64)
            names.append(name)
    assert len(set(names)) == 11 and {"progressive_1", "dmd_4", "add", "lcm_lora"} <= set(names)


def test_samples_of_a_subject_are_those_nearest_to_its_images() -> None:
    rng = np.random.default_rng(0)
    mine, other, of_class = rng.integers(0, 256, (3, 4, 32, 32, 3), np.uint8)
    names = ["mine"] * 4 + ["other"] * 4 + ["class"] * 4
    like_mine = np.clip(mine.astype(int) + 3, 0, 255).astype(np.uint8)
    mixed = np.concatenate([mine[:1], of_class[:3]])
    found = subjects.shares([like_mine, mixed, other], "mine", np.concatenate([mine, other, of_class]), names)
    assert found == [1.0, 0.25, 0.0]
    assert subjects.subject("images/a:b:dog") == (Path("images/a:b"), "dog")
    for text in ("images", "images:", ":dog"):
        with pytest.raises(argparse.ArgumentTypeError, match="FOLDER:CLASS"):
            subjects.subject(text)


def test_figures_are_commands_that_there_are(tmp_path: Path) -> None:
    """As far as they go without a model: they are refused for that, and for nothing else."""
    for figure, given in (("3", []), ("5", ["--side", "128", "--", "--dtype", "bfloat16"])):
        words = figures.command(figures.arguments([figure, str(tmp_path / "none"), *given]))
        outcome = call(*words)
        assert outcome.code == 2 and "There is nothing at" in outcome.err, outcome
    assert "crop=0,0;0,32;32,0;64,64" in words and words[-1] == "bfloat16"
    words = figures.command(figures.arguments(["5", str(tmp_path / "none"), "--class", "7", "--class", "9"]))
    assert "--prompt" not in words and call(*words).code == 2
    images = write_folder(
        tmp_path / "images", {"a.png": encoded("PNG"), "a.txt": b"a", "b.png": encoded("PNG", 20), "b.txt": b"b"}
    )
    words = figures.command(figures.arguments(["13", "MODEL", "--captions", str(images), "--clip", str(tmp_path)]))
    outcome = call(*words)  # after the captions
    assert outcome.code == 2 and "has no model.safetensors" in outcome.err, outcome
    assert words[words.index("--resize") + 1] == "clean" and "--prompts" not in words
    words = figures.command(figures.arguments(["3", "MODEL"]))
    assert "original-size=64x64;128x128;256x256;512x512" in words
    with pytest.raises(SystemExit, match="figure 13 needs --clip"):
        figures.command(figures.arguments(["13", "MODEL", "--captions", "x"]))
    with pytest.raises(SystemExit, match="figure 3 is of one model, not of 2"):
        figures.command(figures.arguments(["3", "A", "B"]))
    words = figures.command(figures.arguments(["2", str(tmp_path / "none")]))
    outcome = call(*words)
    assert outcome.code == 2 and str(tmp_path / "none") in outcome.err, outcome


def test_an_experiment_is_resumed_with_the_same_options_alone(tmp_path: Path) -> None:
    def begin(**options: Any) -> float:
        return results.begin(argparse.Namespace(out=tmp_path, guidance=1.0, seeds=1, **options), ("seeds",))

    begin(steps=10)
    assert begin(steps=10) <= time.monotonic()
    with pytest.raises(SystemExit, match=r"has results of --steps 10, not --steps 20\. Give the same"):
        begin(steps=20)
    results.begin(argparse.Namespace(out=tmp_path, seeds=3), ("seeds",))
    with pytest.raises(SystemExit, match=r"--guidance 1\.0, not --guidance 2\.0"):
        results.begin(argparse.Namespace(out=tmp_path, guidance=2.0), ())


def test_figure_2_tells_what_each_minimum_size_discards(tmp_path: Path) -> None:
    images = write_folder(
        tmp_path / "images",
        {"a.png": encoded("PNG", 300, 300), "a.txt": b"a", "b.png": encoded("PNG", 100, 100), "b.txt": b"b"},
    )
    out = tmp_path / "figure"
    assert figures.draw(figures.arguments(["2", str(images), "--out", str(out)])) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["smaller than, pixels"], row["discarded"]) for row in rows] == [
        (64, 0.0),
        (128, 0.5),
        (256, 0.5),
        (512, 1.0),
        (1024, 1.0),
    ]
    assert "0.39" in (out / "table.md").read_text() and np.asarray(Image.open(out / "figure.png")).size > 1000


def test_figure_3_measures_the_images_of_each_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of four strengths in the place of a model's images: energy grows with the square."""

    def sample(words: list[str]) -> int:
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True)
        noise = np.random.default_rng(0).standard_normal((8, 8, 3))
        for column, strength in enumerate((10, 20, 10, 30)):
            for number in range(2):
                pixels = (128 + strength * noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{2 * column + number:06d}.png")
        Image.new("RGB", (40, 20)).save(folder / "sweep.png")
        return 0

    monkeypatch.setattr(figures, "run", sample)
    assert figures.draw(figures.arguments(["3", "MODEL", "--side", "64", "--out", str(tmp_path)])) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["original-size"] for row in rows] == ["8x8", "16x16", "32x32", "64x64"]
    assert [row["high frequencies"] for row in rows] == pytest.approx([1, 4, 1, 9], rel=0.1)
    assert all(row["N"] == 2 for row in rows) and np.asarray(Image.open(tmp_path / "figure.png")).shape == (20, 40, 3)


def test_figure_13_keeps_the_points_of_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(words: list[str]) -> int:
        assert "--json" in words
        scores = [Score(name, value, None, 10, 9, "clean", "") for name, value in (("FID", 20.5), ("CLIP", math.nan))]
        evaluation = Evaluation("some/folder", "captions", scores, None, [])
        print(json.dumps([{"model": "a", "guidance": 3.0, **report.as_json(evaluation)}]))
        Image.new("RGB", (40, 20)).save(tmp_path / "curve.png")
        return 0

    monkeypatch.setattr(figures, "run", evaluate)
    given = ["13", "MODEL", "--captions", "C", "--clip", "D", "--out", str(tmp_path)]
    assert figures.draw(figures.arguments(given)) == 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert found == [{"model": "a", "guidance": 3.0, "FID": 20.5, "CLIP": None, "N": 10}]
    monkeypatch.setattr(figures, "run", lambda words: 2)
    assert figures.draw(figures.arguments(given)) == 2


def test_the_models_of_image_prompts_fit_each_other(tmp_path: Path) -> None:
    base = image_prompt.base_config(tmp_path, tmp_path, 10, 0)
    tuned = image_prompt.tuned_config(base, tmp_path, tmp_path, 5)
    for config in (base, tuned):
        objective_of(config).check()
    changed = {line.split(":", 1)[0].split(".")[0] for line in differences(to_json(base), to_json(tuned))}
    assert changed == {"data", "image_prompt", "optimiser", "training"}
    assert image_prompt.VISION.projection_dim == base.model.text[-1].clip.projection_dim


@pytest.mark.slow
def test_table_3_of_taesdxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inception", "lpips_alex", "lpips_vgg"):
        real_data.metric_params(name, monkeypatch)
    halves = ("taesdxl/taesdxl_encoder.safetensors", "taesdxl/taesdxl_decoder.safetensors")
    images, *model = real_data.files("coco363/val2017", *halves)
    given = ["table_3.py", "+".join(map(str, model)), "--images", str(images), "--count", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    table_3.main()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["N"] == 4 and 20 < row["psnr"] < 28 and 1 < row["psim"] < 1.6 and row["rfid"] > 0
    assert (tmp_path / "figure.png").stat().st_size > 100_000
