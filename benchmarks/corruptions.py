"""Every metric against growing corruption of the same images: does each get worse where it should?

    python benchmarks/corruptions.py --folder DIR --out corruptions.png
    python benchmarks/corruptions.py --folder DIR --images 512 --side 32          # small images

Centred squares of a folder's images are blurred, get noise, are saved as JPEG, or collapse onto fewer and fewer of them
(copies in the place of the others), and are compared with the originals. Of each metric and corruption one curve; the
table says which are monotone. A metric of pairs means nothing for a collapse, which has none.

Needs the metrics' weights (`sdxl-jax evaluate --fetch-weights`) and matplotlib. On two cores 20 images take a few
minutes.
"""

import argparse
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from sdxl_jax.evaluation import image_sets
from sdxl_jax.evaluation.resize import centred_square
from sdxl_jax.evaluation.scores import Measurement
from sdxl_jax.evaluation.settings import OF_PAIRS, Metric

LEVELS: dict[str, tuple[float, ...]] = {
    "blur, σ in pixels": (0.5, 1, 2, 4),
    "noise, σ of 255": (4, 8, 16, 32),
    "JPEG, 100 − quality": (10, 40, 70, 95),
    "collapse, copies per image": (2, 4, 8, 16),
}
OF_SETS = (Metric.FID, Metric.KID, Metric.PRECISION_RECALL)
RISING = {
    **dict.fromkeys(("fid", "kid", "lpips_alex", "lpips_vgg", "psim"), True),
    **dict.fromkeys(("precision", "recall", "psnr", "ssim"), False),
}
"""Whether a score rises as images get worse."""
EXEMPT = {("precision", "collapse, copies per image")}
"""A collapsed set is as precise as before: its images are those of the reference."""

Images = UInt8[np.ndarray, "images side side 3"]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="images")
    parser.add_argument("--images", type=int, default=64, help="number of images, the first ones by name")
    parser.add_argument("--side", type=int, default=128, help="of the squares, in pixels")
    parser.add_argument("--out", type=Path, default=Path("corruptions.png"), help="plot; the table is beside it, .md")
    return parser.parse_args(given)


def each(change: Callable[[Image.Image], Any], images: Images) -> Images:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def corrupted(kind: str, level: float, images: Images) -> Images:
    """The images at one level of one corruption."""
    match kind.split(",")[0]:
        case "blur":
            return each(lambda image: image.filter(ImageFilter.GaussianBlur(level)), images)
        case "noise":
            noise = np.random.default_rng(0).normal(0, level, images.shape)
            return np.clip(images + noise, 0, 255).round().astype(np.uint8)
        case "JPEG":

            def saved(image: Image.Image) -> Image.Image:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=100 - int(level))
                return Image.open(file)

            return each(saved, images)
    distinct = len(images) // int(level)
    return images[np.arange(len(images)) % distinct]


def measure(images: Images) -> dict[str, dict[str, list[float]]]:
    """By kind of corruption and name of the score: its values, one per level."""
    of_sets = Measurement(images, metrics=OF_SETS)
    of_pairs = Measurement(images, metrics=(*OF_SETS, *OF_PAIRS))
    found: dict[str, dict[str, list[float]]] = {}
    for kind, levels in LEVELS.items():
        found[kind] = {}
        for level in levels:
            measurement = of_sets if kind.startswith("collapse") else of_pairs
            for score in measurement.of(corrupted(kind, level, images)).scores:
                found[kind].setdefault(score.name, []).append(score.value)
    return found


def monotone(name: str, values: list[float]) -> bool:
    """Whether no level is better than the one before, and the last is worse than the first. Precision and recall stay
    at 1 while every image is in a ball."""
    signed = values if RISING[name] else [-value for value in values]
    return all(a <= b for a, b in itertools.pairwise(signed)) and signed[0] < signed[-1]


def table(found: dict[str, dict[str, list[float]]], count: int, side: int) -> str:
    lines = [f"{count} images of {side}×{side}, resize tf1, against the originals", ""]
    lines += ["| corruption | score | levels, from weak to strong | monotone |", "|---|---|---|---|"]
    for kind, scores in found.items():
        for name, values in scores.items():
            shown = " ".join(f"{value:.4g}" for value in values)
            verdict = "–" if (name, kind) in EXEMPT else "yes" if monotone(name, values) else "no"
            lines.append(f"| {kind} | {name} | {shown} | {verdict} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(RISING)
    figure = Figure(figsize=(3 * len(LEVELS), 1.8 * len(names)))
    axes: Any = figure.subplots(len(names), len(LEVELS), squeeze=False)
    for column, (kind, levels) in enumerate(LEVELS.items()):
        for row, name in enumerate(names):
            place = axes[row][column]
            if name in found[kind]:
                place.plot(levels, found[kind][name], marker="o")
                place.set_xscale("log", base=2)
                place.set_xticks(levels, [f"{level:g}" for level in levels])
                place.grid(alpha=0.25)
            else:
                place.set_axis_off()
            if row == 0:
                place.set_title(kind, size=10)
            if column == 0:
                place.set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = arguments()
    opened = image_sets.open_images(options.folder, "--folder")
    count = min(options.images, len(opened.names))
    images = np.stack([centred_square(opened.pixels(number), options.side) for number in range(count)])
    found = measure(images)
    text = table(found, count, options.side)
    options.out.with_suffix(".md").write_text(text)
    plot(found, options.out)
    print(text)


if __name__ == "__main__":
    main()
