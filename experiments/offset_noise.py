"""What offset noise does, measured: the range of the images' mean brightness.

    python experiments/offset_noise.py                           # the pictures of the quickstart, for two processors

The paper (section 2.5) trains its last stage with an offset noise of 0.05 (Guttenberg 2023) and gives no measure of it.
Its schedule leaves some of the image in the last timestep, so that a model learns to find the brightness there, while
sampling begins from noise without any: samples become neither dark nor bright. Offset noise varies the mean of the
noise itself. Here: pictures as they are, dark (a tenth as bright) and bright (a tenth as far from white), which nothing
in the conditioning tells apart; a model for each strength of the offset noise, with the same pictures, steps and noise.
What is measured is the distribution of the samples' mean brightness, beside that of the data.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import results
import small_model
from jaxtyping import Float, UInt8
from small_model import Images

from sdxl_jax import load_model, train
from sdxl_jax.config import TrainConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.evaluation.curve import check_plots

PAPER = [{"model": "SDXL", "offset noise": 0.05, "finding": "no number is given"}]
SIDE = 32
DARK, BRIGHT = 0.3, 0.88
"""Mean brightness below and above which an image counts as dark and as bright: where the data have gaps."""


def versions(pixels: UInt8[np.ndarray, "side side 3"]) -> list[UInt8[np.ndarray, "side side 3"]]:
    """A picture as it is, dark, and bright."""
    dark, bright = 0.1 * pixels, 255 - 0.1 * (255.0 - pixels)
    return [pixels, dark.round().astype(np.uint8), bright.round().astype(np.uint8)]


def config(strength: float, images: Path, classes: int, options: argparse.Namespace, seed: int = 0) -> TrainConfig:
    # v: brightness is decided at high noise levels, where the loss of ε has little weight.
    model = small_model.model_config(SIDE, classes, prediction=Prediction.V)
    given = {"batch": options.batch, "steps": options.steps, "loss": LossConfig(offset_noise=strength)}
    return small_model.train_config(images, model, training_seed=seed, **given)


def brightness(images: Images) -> Float[np.ndarray, " images"]:
    """Mean luminance, 0 to 1."""
    return (images @ np.array([0.299, 0.587, 0.114])).mean(axis=(1, 2)) / 255


def row(name: str, seed: int | None, images: Images) -> dict[str, Any]:
    found = brightness(images)
    low, high = (float(share.mean()) for share in (found < DARK, found > BRIGHT))
    shares = {"dark": low, "between": 1 - low - high, "bright": high}
    return {"images": name, "seed": seed, "± of brightness": float(found.std()), **shares, "N": len(images)}


def main() -> None:
    options = arguments()
    began = results.begin(options, ("strengths", "samples", "seeds"))
    check_plots()
    out = options.out
    each = [versions(picture.pixels) for picture in pictures.square_pictures(SIDE)]
    images, classes = np.stack([image for three in each for image in three]), range(len(each))
    small_model.write_images(out / "data", list(images), label=[number for number in classes for _ in range(3)])
    kept = {"data": images}
    rows = [row("data", None, images)]
    for strength, seed in itertools.product(options.strengths, range(options.seeds)):
        name, run = f"offset noise {strength:g}", out / f"offset_{strength:g}_{seed}"
        train(config(strength, out / "data", len(each), options, seed), run)
        file, given = out / "samples" / f"{strength:g}_{seed}.npz", {"guidance": 1.0, "seed": seed}
        samples = small_model.sampled(load_model(run), list(classes) * options.samples, file, given)
        kept.setdefault(name, samples)
        rows.append(row(name, seed, samples))
    notes = [f"mean luminance, 0 to 1; dark: below {DARK}, bright: above {BRIGHT}"]
    print(results.write(out, "Offset noise, in small", PAPER, results.over_seeds(rows), notes, began))
    plot(kept, out / "figure.png")


def plot(kept: dict[str, Images], path: Path) -> None:
    """Histograms of the brightness, and samples; of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4))
    grid = figure.add_gridspec(len(kept), 2, width_ratios=(2, 3))
    axes: Any = figure.add_subplot(grid[:, 0])
    for name, images in kept.items():
        axes.hist(brightness(images), bins=np.linspace(0, 1, 26), histtype="step", density=True, label=name)
    axes.set_xlabel("mean brightness of an image")
    axes.set_yticks([])
    axes.legend(frameon=False)
    results.draw_samples(figure, [grid[number, 1] for number in range(len(kept))], kept)
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.05], help="default 0 and 0.05")
    parser.add_argument("--steps", type=int, default=800, help="of each run; default 800")
    parser.add_argument("--batch", type=int, default=16, help="default 16")
    parser.add_argument("--samples", type=int, default=8, help="of each picture; default 8")
    parser.add_argument("--seeds", type=int, default=1, help="of training and sampling, each one a run; default 1")
    parser.add_argument("--out", type=Path, default=Path("runs/offset_noise"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
