"""Appendix J of the paper in small: batch size and EMA in training an autoencoder.

    python experiments/appendix_j.py --train FOLDER --test FOLDER                     # A1 alone, for two processors
    python experiments/appendix_j.py --train FOLDER --test FOLDER --runs A1 B A2 --steps 5000          # for a GPU

The paper trains the autoencoder of SD at 256×256 with batch 256 (B) and 8 (A1) for 500,000 steps, and with batch 8 for
1.9 million (A2), each with an average of the weights (e) and without. Here: 32×32 images (meant for CIFAR-10's 50,000,
tested on its 10,000), an autoencoder of width 32 with latents of 8×8, and 2,000 steps; all else as SD's: L1 + LPIPS,
sums, KL 1e-6, PatchGAN after 4 % of the steps with the adaptive weight. Averaged and raw weights are of the same run.

What the paper says, to look for: the average is better in rFID and PSIM in every pair, by 2 to 11 %, and moves PSNR by
0.1 dB at most; batch 256 beats 8 at equal steps in both, but not in PSNR; more steps at batch 8 beat both.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes. Needs
the weights of `sdxl-jax evaluate --fetch-weights`.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import results

from sdxl_jax.config import CheckpointConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.evaluation import weights
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.evaluation.reconstruction import evaluate_autoencoder
from sdxl_jax.models.patchgan import PatchGanConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.training.loop import train
from sdxl_jax.training.objectives.adversarial import DiscriminatorConfig
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingLossConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.objectives.reconstruction import Reduction
from sdxl_jax.weights.open import OpenOptions

PAPER = [
    {"run": run, "EMA": ema, "batch": batch, "steps": steps, "rfid": rfid, "psnr": psnr, "ssim": ssim, "psim": psim}
    for run, batch, steps, rows in (
        ("B", 256, "500k", ((7.52, 24.30, 0.71, 1.27), (7.35, 24.33, 0.72, 1.24))),
        ("A1", 8, "500k", ((9.14, 24.42, 0.72, 1.32), (8.85, 24.51, 0.72, 1.29))),
        ("A2", 8, "1.9M", ((6.28, 25.05, 0.74, 1.08), (5.57, 25.05, 0.74, 1.07))),
    )
    for ema, (rfid, psnr, ssim, psim) in zip(("no", "yes"), rows, strict=True)
]
"""Podell et al., arXiv:2307.01952, appendix J; psim is what the paper calls LPIPS."""
SIDE = 32


class Run(NamedTuple):
    batch: int
    times_steps: float
    """Steps, as a multiple of --steps."""


RUNS = {"A1": Run(8, 1), "B": Run(256, 1), "A2": Run(8, 3.8)}


def config(images: Path, run: Run, steps: int, seed: int) -> AutoencoderConfig:
    """steps: of a run with times_steps 1."""
    steps = round(steps * run.times_steps)
    rate = OptimiserConfig(
        learning_rate=5e-4, warmup_steps=steps // 20, decay=Decay.CONSTANT, beta1=0.5, beta2=0.9, weight_decay=0.0
    )
    return AutoencoderConfig(
        data=DataConfig(folder=str(images), buckets=((SIDE, SIDE),), batch_size=run.batch, seed=seed),
        vae=VaeConfig(block_channels=(32, 64, 64), resnets_per_block=1, groups=8, scale=1.0),
        loss=AutoencodingLossConfig(edge_weight=0.0, kl_weight=1e-6, reduction=Reduction.SUM, perceptual_weight=1.0),
        discriminator=DiscriminatorConfig(
            network=PatchGanConfig(base_channels=32, layers=2), start_step=steps // 25, optimiser=rate
        ),
        optimiser=rate,
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.999),
        training=AutoencodingLoopConfig(steps=steps, seed=seed),
        checkpoint=CheckpointConfig(every_steps=500, keep=1),
        validation=AutoencodingValidationConfig(every_steps=max(1, steps // 4)),
    )


def main() -> None:
    options = arguments()
    began = results.begin(options, ("runs", "seeds", "count"))
    check_plots()
    for name in ("inception", "lpips_vgg", "lpips_alex"):
        weights.load(name)
    rows = list[dict[str, Any]]()
    notes = list[str]()
    for seed in range(options.seeds):
        for name in options.runs:
            folder = options.out / f"{name}_seed{seed}"
            settings = config(options.train, RUNS[name], options.steps, seed)
            train(settings, folder / "run")
            for ema in (False, True):
                found = evaluate_autoencoder(
                    folder / "run",
                    options.test,
                    side=SIDE,
                    count=options.count,
                    out=folder / ("averaged" if ema else "raw"),
                    options=OpenOptions(raw=not ema),
                )
                about = {"run": name, "EMA": "yes" if ema else "no", "batch": RUNS[name].batch}
                row: dict[str, Any] = {**about, "steps": settings.training.steps, "seed": seed}
                rows.append({**row, **{score.name: score.value for score in found.scores}, "N": found.scores[0].images})
                notes += found.notes
    print(results.write(options.out, "Appendix J, in small", PAPER, rows, list(dict.fromkeys(notes)), began))
    plot(rows, options.out / "figure.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """rFID, psim and PSNR of raw and averaged weights, a line per run; dashed lines: the paper's, at its own scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6))
    for number, (metric, label) in enumerate((("rfid", "rFID"), ("psim", "psim"), ("psnr", "PSNR, dB")), 1):
        axes: Any = figure.add_subplot(1, 3, number)
        for run in dict.fromkeys((row["run"], row["seed"]) for row in rows):
            values = [row[metric] for row in rows if (row["run"], row["seed"]) == run]
            axes.plot([0, 1], values, marker="o", label=f"{run[0]}, seed {run[1]}")
        axes.set_xticks([0, 1], ["raw", "averaged"])
        axes.set_xlim(-0.3, 1.3)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.suptitle(f"Autoencoders at {SIDE}×{SIDE}, N = {rows[0]['N']:,}")
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of images to train on")
    parser.add_argument("--test", type=Path, required=True, help="folder of images to reconstruct")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["A1"], help="default: A1")
    parser.add_argument("--steps", type=int, default=2000, help="of A1 and B; A2 has 3.8 times as many; default 2000")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each kind; default 1")
    parser.add_argument("--count", type=int, default=2048, help="test images, the first by name; default 2048")
    parser.add_argument("--out", type=Path, default=Path("runs/appendix_j"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
