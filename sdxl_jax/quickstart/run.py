"""`sdxl-jax quickstart`: the whole workflow in small: unpack images, train, checkpoint, sample, a contact sheet, score.

All of it calls the same code as the full model; this module has the order of the steps, and the table at the end.
"""

import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket, assign
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.transforms import centred_crop
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.model import Model, init
from sdxl_jax.progress import tqdm
from sdxl_jax.quickstart import autoencoder, recipe, student
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png
from sdxl_jax.sampling.generate import Images, text_to_image
from sdxl_jax.sizes import Size
from sdxl_jax.training.loop import check_run, train

IMAGES_ZIP = Path(__file__).with_name("pictures.zip")
SEEDS = 4
"""Samples per caption for prompt accuracy."""
SCORED = {Bucket(96, 160): 6, Bucket(128, 128): 5, Bucket(160, 96): 5}
"""Captions per bucket for prompt accuracy: 16 in all."""
SHOWN = 8
"""Captions per bucket on the contact sheet."""
STEPS, GUIDANCE = 20, 3.0
_SAMPLING = {"steps": STEPS, "guidance": GUIDANCE}
SHEET, STUDENT = "quickstart.png", "student"
"""Contact sheet, and run directory of the few-step student, in the run directory."""


class Examples(NamedTuple):
    """The training images of one bucket, centre-cropped, and their captions."""

    images: UInt8[np.ndarray, "images height width 3"]
    captions: list[str]


def quickstart(
    run_dir: Path,
    train_autoencoder: bool = False,
    seed: int = 0,
    compilation_cache: str | None = "user",
    few_steps: bool = False,
) -> Path:
    """Runs all steps in `run_dir`, resuming an interrupted call. Returns the path of the contact sheet.

    compilation_cache: as `training.compilation_cache`. few_steps: also distil a student of four steps.
    """
    began = time.monotonic()
    folder = run_dir / "pictures"
    weights = run_dir / "autoencoder.safetensors" if train_autoencoder else autoencoder.WEIGHTS
    if weights.exists():
        check_run(recipe.get_config(str(folder), weights, seed), run_dir)
    _print("1/5  Unpacking 96 captioned images (Fluent Emoji by Microsoft, MIT)")
    with zipfile.ZipFile(IMAGES_ZIP) as archive:
        archive.extractall(folder)

    if weights.exists():
        _print(f"2/5  Using the autoencoder in {weights.name}")
    else:
        _print("2/5  Training the autoencoder, about an hour")
        autoencoder.train_autoencoder(folder, run_dir / "autoencoder", weights, seed, cache=compilation_cache)

    _print("3/5  Training a small SDXL. Before the first step, compiling takes half a minute or more")
    config = recipe.get_config(str(folder), weights, seed)
    config = replace(config, training=replace(config.training, compilation_cache=compilation_cache))
    model = train(config, run_dir)
    random = init(config.model, seed + 1) | {"vae": model.params["vae"]}
    # Placed as the trained weights are, it is sampled from with their programs.
    placed = jax.tree.map(lambda value, trained: jax.device_put(value, trained.sharding), random, model.params)
    untrained = Model(config.model, placed)

    _print("4/5  Sampling the contact sheet")
    examples, sheet = training_images(folder), run_dir / SHEET
    _save_sheet(model, examples, seed, sheet)

    _print("5/5  Measuring prompt accuracy: 16 captions × 4 seeds, trained and untrained")
    trained_score, untrained_score = (_accuracy(each, examples, seed) for each in (model, untrained))

    _print_summary(run_dir, trained_score, untrained_score, time.monotonic() - began)
    if few_steps:
        _add_student(run_dir, config, examples)
    return sheet


def _add_student(run_dir: Path, config: TrainConfig, examples: dict[Bucket, Examples]) -> None:
    """config: of the quickstart's own run."""
    _print("Distilling a student for 4 steps. Before the first steps, compiling takes a minute or two again")
    began, seed, folder = time.monotonic(), config.training.seed, run_dir / STUDENT
    trained = train(student.get_config(run_dir, config, GUIDANCE), folder)
    _save_sheet(trained, examples, seed, folder / SHEET, {})
    score, minutes = _accuracy(trained, examples, seed, {}), (time.monotonic() - began) / 60
    _print(f"  {minutes:.1f} minutes; prompt accuracy of 4 steps: {score:.0%}; images: {folder / SHEET}")
    _print(f"Sample while you watch:  sdxl-jax serve {folder}")


def _print(line: str) -> None:
    tqdm.write(f"\n{line}")


def _sample(
    model: Model, prompts: list[str], size: Size, seed: int, num_images: int = 1, options: Mapping[str, Any] = _SAMPLING
) -> Images:
    """options: number of steps and guidance; {}: the model's own."""
    return text_to_image(
        model,
        prompts,
        height=size.height,
        width=size.width,
        seed=seed,
        num_images=num_images,
        progress=True,
        **options,
    )


def _save_sheet(
    model: Model, examples: dict[Bucket, Examples], seed: int, path: Path, options: Mapping[str, Any] = _SAMPLING
) -> None:
    """Some captions of each bucket, as a contact sheet."""
    images, captions = [], []
    for size, (_, known) in examples.items():
        prompts = sorted(set(known))[:: max(1, len(set(known)) // SHOWN)][:SHOWN]
        images += list(_sample(model, prompts, size, seed, options=options))
        captions += prompts
    save_png(contact_sheet(images, captions, columns=SHOWN), path)


def training_images(folder: Path) -> dict[Bucket, Examples]:
    """The training images and captions of each bucket."""
    source = open_folder(folder)
    buckets = [Bucket(*bucket) for bucket in recipe.BUCKETS]
    nearest = assign(source.sizes, tuple(buckets)).bucket
    examples = {}
    for number, bucket in enumerate(buckets):
        images = np.flatnonzero(nearest == number).tolist()
        crops = [centred_crop(source.pixels(i), bucket) for i in images]
        examples[bucket] = Examples(np.stack(crops), [source.captions(i)[0] for i in images])
    return examples


def _accuracy(
    model: Model, examples: dict[Bucket, Examples], seed: int, options: Mapping[str, Any] = _SAMPLING
) -> float:
    """Prompt accuracy over the `SCORED` captions, 0 to 1."""
    correct: list[bool] = []
    for size, (training, captions) in examples.items():
        distinct = sorted(set(captions))
        prompts = np.random.default_rng(0).choice(distinct, SCORED[size], replace=False).tolist()
        samples = _sample(model, prompts, size, seed + 1, SEEDS, options)
        correct += hits(samples, [prompt for prompt in prompts for _ in range(SEEDS)], training, captions)
    return float(np.mean(correct))


def _print_summary(run_dir: Path, trained: float, untrained: float, seconds: float) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = {
        "steps": f"{len(lines)}",
        "minutes": f"{seconds / 60:.1f} in all, training {sum(line['step_seconds'] for line in lines) / 60:.1f}",
        "loss": f"{np.mean([line['loss'] for line in lines[-100:]]):.4f} (mean of the last 100 steps)",
        "images/s": f"{np.median([line['images_per_second'] for line in lines]):.1f}",
        "prompt accuracy": f"{trained:.0%} (untrained weights: {untrained:.0%})",
    }
    width = max(map(len, rows))
    _print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))
    paths = {
        "contact sheet": run_dir / SHEET,
        "validation": run_dir / "samples",
        "checkpoints": run_dir / "checkpoints",
        "metrics": run_dir / "metrics.jsonl",
        "TensorBoard": run_dir / "tensorboard",
        "training images": run_dir / "pictures",
    }
    _print("\n".join(f"  {name:<{width}}  {path}" for name, path in paths.items()))
    options = f"--height 96 --width 160 --guidance {GUIDANCE:g} --out images"
    _print(f'Sample more:  sdxl-jax sample {run_dir} --prompt "a green turtle" {options}')
