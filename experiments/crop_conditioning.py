"""What conditioning on the crop does, measured: where the object of an image is, by the crop that the model is given.

    python experiments/crop_conditioning.py                      # the pictures of the quickstart, for two processors

The paper (section 2.2, figures 4 and 5) shows objects that are cut off, because training crops, and that crop
conditioning avoids it; it gives no number. Here: pictures of one object in the middle of a wide canvas, 32×64 pixels.
Training takes random crops of 32×32 from it. Two models, with the same pictures, steps and noise:

    with      conditioned on original size and crop        without      not conditioned on either

Given the crop (0, left), the object should be where that crop of the canvas has it: cut off at the right for left = 0,
in the middle for 16, cut off at the left for 32. Without conditioning it is anywhere. Measured is the middle of what
differs from the background, and the share of images in which that touches the left or the right edge.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import results
import small_model
from jaxtyping import Bool, Float
from pictures import Picture
from small_model import Images

from sdxl_jax import load_model, train
from sdxl_jax.conditioning.micro import Numbers
from sdxl_jax.config import TrainConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.sizes import Position, Size

PAPER = [{"model": "SDXL", "finding": "figures 4 and 5 show images; no number is given"}]
SIDE, WIDTH, OBJECT = 32, 64, 22
LEFTS = (0, 8, 16, 24, 32)
"""Crops that the model is given, in pixels."""
DIFFERS = 56
"""How far one channel of a pixel must be from the background to be the object's, of 255."""


def canvases(given: Sequence[Picture]) -> list[np.ndarray]:
    """Each picture, OBJECT pixels large, in the middle of a canvas of its background."""
    made = []
    for picture in given:
        canvas = np.tile(picture.background, (SIDE, WIDTH, 1))
        top, left = (SIDE - OBJECT) // 2, (WIDTH - OBJECT) // 2
        canvas[top : top + OBJECT, left : left + OBJECT] = picture.pixels
        made.append(canvas)
    return made


def config(conditioned: bool, images: Path, classes: int, options: argparse.Namespace, seed: int = 0) -> TrainConfig:
    # v: where the object is, is decided at high noise levels, where the loss of ε has little weight.
    model = small_model.model_config(SIDE, classes, Numbers.SIZE_CROP if conditioned else None, Prediction.V)
    given = {"batch": options.batch, "steps": options.steps, "max_aspect_distance": 1.0}
    return small_model.train_config(images, model, training_seed=seed, **given)


def objects(images: Images, given: Sequence[Picture]) -> Bool[np.ndarray, "images side side"]:
    """Which pixels are not background, by the mean of each one's 3×3 neighbours, in which the noise that a short
    training leaves is a third. given: the picture of each image."""
    padded = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).mean(axis=(-2, -1))
    backgrounds = np.stack([picture.background for picture in given])[:, None, None]
    return np.abs(smooth - backgrounds).max(axis=-1) > DIFFERS


def middles(found: Bool[np.ndarray, "images side side"]) -> Float[np.ndarray, " images"]:
    """The mean column of each object, pixels; NaN where there is none."""
    columns = found.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (columns * np.arange(found.shape[2])).sum(axis=1) / columns.sum(axis=1)


def is_cut(found: Bool[np.ndarray, "images side side"]) -> Bool[np.ndarray, " images"]:
    """Whether the object touches the left or the right edge, with more than two pixels."""
    return (found[:, :, 0].sum(axis=1) > 2) | (found[:, :, -1].sum(axis=1) > 2)


def row(name: str, left: int | None, seed: int | None, images: Images, given: Sequence[Picture]) -> dict[str, Any]:
    found = objects(images, given)
    middle = middles(found)
    return {
        "images": name,
        "crop left": left,
        "seed": seed,
        "middle": float(np.nanmean(middle)),
        "± of images": float(np.nanstd(middle)),
        "cut off": float(is_cut(found).mean()),
        "without object": float(np.isnan(middle).mean()),
        "N": len(images),
    }


def main() -> None:
    options = arguments()
    began = results.begin(options, ("samples", "seeds"))
    check_plots()
    out, given = options.out, pictures.square_pictures(OBJECT)
    wide = canvases(given)
    small_model.write_images(out / "data", wide, label=range(len(wide)))
    data = [
        row("data", left, None, np.stack([canvas[:, left : left + SIDE] for canvas in wide]), given) for left in LEFTS
    ]
    classes = list(range(len(given))) * options.samples
    rows, kept = list[dict[str, Any]](), dict[str, Images]()
    for name, seed in itertools.product(("with", "without"), range(options.seeds)):
        run = out / f"{name}_{seed}"
        train(config(name == "with", out / "data", len(given), options, seed), run)
        model = load_model(run)
        for left in LEFTS if name == "with" else LEFTS[:1]:
            crop = {"original_size": Size(SIDE, WIDTH), "crop": Position(0, left)} if name == "with" else {}
            file = out / "samples" / f"{name}_{left}_{seed}.npz"
            images = small_model.sampled(model, classes, file, {"guidance": 2.0, "seed": seed, **crop})
            kept.setdefault(f"{name}, left {left}" if crop else name, images)
            rows.append(row(name, left if crop else None, seed, images, given * options.samples))
    notes = [f"{len(given)} pictures; the middle of the image is column {(SIDE - 1) / 2:g}"]
    print(results.write(out, "Crop conditioning, in small", PAPER, [*data, *results.over_seeds(rows)], notes, began))
    plot([*data, *rows], kept, out / "figure.png")


def plot(rows: list[dict[str, Any]], kept: dict[str, Images], path: Path) -> None:
    """Where the object is by the crop, with the deviation over images (means over seeds), and samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    grid = figure.add_gridspec(len(kept), 2, width_ratios=(2, 3))
    axes: Any = figure.add_subplot(grid[:, 0])
    for name in ("data", "with"):
        own = [each for each in rows if each["images"] == name]
        middle, deviation = (
            [np.mean([each[column] for each in own if each["crop left"] == left]) for left in LEFTS]
            for column in ("middle", "± of images")
        )
        axes.errorbar(LEFTS, middle, deviation, marker="o", capsize=3, label=name)
    alone = [each for each in rows if each["images"] == "without"]
    middle, deviation = (np.mean([each[column] for each in alone]) for column in ("middle", "± of images"))
    axes.axhline(middle, color="grey", linestyle="--", label="without")
    axes.axhspan(middle - deviation, middle + deviation, color="grey", alpha=0.15)
    axes.set_xlabel("crop that is given, pixels from the left")
    axes.set_ylabel("middle of the object, column")
    axes.legend(frameon=False)
    results.draw_samples(figure, [grid[number, 1] for number in range(len(kept))], kept)
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of each run; default 800")
    parser.add_argument("--batch", type=int, default=16, help="default 16")
    parser.add_argument("--samples", type=int, default=4, help="of each picture and crop; default 4")
    parser.add_argument("--seeds", type=int, default=1, help="of training and sampling, each one a run; default 1")
    parser.add_argument("--out", type=Path, default=Path("runs/crop_conditioning"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
