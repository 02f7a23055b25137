"""`sdxl-jax quickstart`: everything in small: unpack, train, checkpoint, sample, score, a contact sheet.

The work is done by the code that the full model uses; here is only the order of it, and the table at the end.
"""

import json
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sdxl_jax import model as models
from sdxl_jax.arrays import Size
from sdxl_jax.data.buckets import Bucket, assign
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.transforms import centred_crop
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.model import Model
from sdxl_jax.quickstart import autoencoder, recipe
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png
from sdxl_jax.sampling.generate import text_to_image
from sdxl_jax.training.loop import check_run, train

PICTURES = Path(__file__).with_name("pictures.zip")
SEEDS = 4
SCORED = {Bucket(96, 160): 6, Bucket(128, 128): 5, Bucket(160, 96): 5}
"""Captions of each bucket that prompt accuracy is measured on: 16."""
SHOWN = 8
"""Captions of each bucket on the contact sheet."""
STEPS, GUIDANCE = 20, 3.0


def quickstart(run_dir: Path, train_autoencoder: bool = False, seed: int = 0) -> Path:
    """Does it all in `run_dir`, going on where an earlier call was cut off; returns the contact sheet's path."""
    began = time.monotonic()
    folder = run_dir / "pictures"
    weights = run_dir / "autoencoder.safetensors" if train_autoencoder else autoencoder.WEIGHTS
    if weights.exists():
        check_run(recipe.get_config(str(folder), weights, seed), run_dir)
    _say("1/5  Unpacking 96 captioned images (Fluent Emoji by Microsoft, MIT)")
    with zipfile.ZipFile(PICTURES) as archive:
        archive.extractall(folder)

    if weights.exists():
        _say(f"2/5  Taking the autoencoder in {weights.name}")
    else:
        _say("2/5  Training the autoencoder again, about an hour")
        autoencoder.train(folder, run_dir / "autoencoder", weights, seed)

    _say("3/5  Training a small SDXL: compiling for three aspect ratios takes a minute or two before it moves")
    config = recipe.get_config(str(folder), weights, seed)
    model = train(config, run_dir)
    fresh = models.init(jax.random.key(seed + 1), config.model)
    untrained = Model(config.model, fresh | {"vae": model.params["vae"]})

    _say("4/5  Drawing the contact sheet")
    examples = _examples(folder)
    images, captions = [], []
    for size, (_, texts) in examples.items():
        chosen = sorted(set(texts))[:: max(1, len(set(texts)) // SHOWN)][:SHOWN]
        images += list(_draw(model, chosen, size, seed))
        captions += chosen
    sheet = run_dir / "quickstart.png"
    save_png(contact_sheet(images, captions, columns=SHOWN), sheet)

    _say("5/5  Measuring prompt accuracy: 16 captions × 4 seeds, trained and untrained")
    trained_score, untrained_score = (_accuracy(which, examples, seed) for which in (model, untrained))

    _table(run_dir, trained_score, untrained_score, time.monotonic() - began)
    return sheet


def _say(line: str) -> None:
    tqdm.write(f"\n{line}")


def _draw(model: Model, prompts: list[str], size: Size, seed: int, num_images: int = 1) -> np.ndarray:
    return text_to_image(
        model,
        prompts,
        height=size.height,
        width=size.width,
        steps=STEPS,
        guidance=GUIDANCE,
        seed=seed,
        num_images=num_images,
        progress=True,
    )


def _examples(folder: Path) -> dict[Bucket, tuple[np.ndarray, list[str]]]:
    """For each bucket, the training images as a centred crop shows them, and their captions."""
    source = open_folder(folder)
    buckets = [Bucket(*bucket) for bucket in recipe.BUCKETS]
    nearest = assign(source.sizes, tuple(buckets)).bucket
    examples = {}
    for number, bucket in enumerate(buckets):
        images = np.flatnonzero(nearest == number).tolist()
        crops = [centred_crop(source.pixels(i), bucket) for i in images]
        examples[bucket] = np.stack(crops), [source.captions(i)[0] for i in images]
    return examples


def _accuracy(model: Model, examples: dict[Bucket, tuple[np.ndarray, list[str]]], seed: int) -> float:
    right: list[bool] = []
    for size, (training, captions) in examples.items():
        distinct = sorted(set(captions))
        prompts = np.random.default_rng(0).choice(distinct, SCORED[size], replace=False).tolist()
        samples = _draw(model, prompts, size, seed + 1, SEEDS)
        right += hits(samples, [prompt for prompt in prompts for _ in range(SEEDS)], training, captions)
    return float(np.mean(right))


def _table(run_dir: Path, trained: float, untrained: float, seconds: float) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = {
        "steps": f"{len(lines)}",
        "minutes": f"{seconds / 60:.1f} in all, training {sum(line['step_seconds'] for line in lines) / 60:.1f}",
        "loss": f"{np.mean([line['loss'] for line in lines[-100:]]):.4f} (mean of the last 100 steps)",
        "images/s": f"{np.median([line['images_per_second'] for line in lines]):.1f}",
        "prompt accuracy": f"{trained:.0%} (untrained weights: {untrained:.0%})",
    }
    width = max(map(len, rows))
    _say("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))
    places = {
        "contact sheet": run_dir / "quickstart.png",
        "while training": run_dir / "samples",
        "checkpoints": run_dir / "checkpoints",
        "numbers": run_dir / "metrics.jsonl",
        "TensorBoard": run_dir / "tensorboard",
        "pictures": run_dir / "pictures",
    }
    _say("\n".join(f"  {name:<{width}}  {path}" for name, path in places.items()))
    _say(f'Draw more:  sdxl-jax sample {run_dir} --prompt "a green turtle" --height 96 --width 160 --out images')
