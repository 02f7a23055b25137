"""A chart of the training data as training sees it: `sdxl-jax data inspect --plot`.

From top to bottom: a histogram of original sizes, with the share that a minimum size would discard (figure 2 of Podell
et al. 2023, arXiv:2307.01952); the number of images per bucket; some training examples of the fullest buckets as the
model sees them, with their micro-conditioning and captions.

As in `inspection`, refused files are left out. matplotlib is needed only here, and imported only when a chart is drawn:
without pyplot, so that no global state changes and no display is needed.
"""

import itertools
import math
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Int64
from PIL import Image

from sdxl_jax.data.loader import DecodedExample
from sdxl_jax.data.pipeline import BucketedDataset, BucketReport
from sdxl_jax.errors import InputError
from sdxl_jax.files import atomic
from sdxl_jax.sizes import Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
PAPER_MINIMUM_PX = 256
"""39 % of the paper's images have a side shorter than this."""

_CHUNK = 1_000_000
"""Sizes per chunk: they may be a memory map of fifty million."""
_OCTAVES, _BINS_PER_OCTAVE = 18, 16
_BARS = 48
"""Buckets that the bar chart has room for."""
_SHEET_BUCKETS, _SHEET_EXAMPLES = 6, 4
_THUMBNAIL_PX = 400

# Inches.
_WIDTH, _MARGIN, _GAP = 16.0, 0.4, 0.15
_CHARTS = 5.0
_HALF = (_WIDTH - 3 * _MARGIN) / 2
_CELL = (_HALF - (_SHEET_EXAMPLES - 1) * _GAP) / _SHEET_EXAMPLES
_TALLEST = 2.4
_HEADING, _TEXT = 0.3, 1.05
_DPI = 150


def _chunks(sizes: Int32[np.ndarray, "images 2"]) -> list[Int32[np.ndarray, "_chunk 2"]]:
    return [sizes[first : first + _CHUNK] for first in range(0, len(sizes), _CHUNK)]


def share_discarded(sizes: Int32[np.ndarray, "images 2"], minimum_px: int) -> float:
    """Share of images, 0 to 1, with a side below the minimum: the loss if training left them out."""
    return sum(int((chunk < minimum_px).any(axis=1).sum()) for chunk in _chunks(sizes)) / max(1, len(sizes))


def size_histogram(sizes: Int32[np.ndarray, "images 2"]) -> Int64[np.ndarray, "heights widths"]:
    """Number of images by height (rows) and width (columns); bin k holds sides of 2^(k/16) up to 2^((k+1)/16) pixels.

    The paper's axes are linear. Logarithmic ones show small and large images equally well, and need no upper limit.
    """
    bins = _OCTAVES * _BINS_PER_OCTAVE
    counts = np.zeros(bins * bins, np.int64)
    for chunk in _chunks(sizes):
        numbers = np.floor(np.log2(chunk) * _BINS_PER_OCTAVE).astype(np.int64).clip(0, bins - 1)
        counts += np.bincount(numbers[:, 0] * bins + numbers[:, 1], minlength=bins * bins)
    return counts.reshape(bins, bins)


def check(path: Path) -> None:
    """Raises InputError where the chart cannot be written to that file: its suffix is not one of SUFFIXES, it is a
    folder, or matplotlib is missing."""
    if path.suffix.lower() not in SUFFIXES:
        suffixes = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise InputError(f"Cannot write a chart to {path}. Give a file that ends in {suffixes}, e.g. data.png")
    if path.is_dir():
        raise InputError(f"Cannot write a chart to {path}: it is a folder. Give a file, which is replaced if it exists")
    try:
        import matplotlib.figure  # noqa: F401 (drawing needs it)
    except ImportError as problem:
        raise InputError(
            f"A chart needs matplotlib, which cannot be imported ({problem}). Run `pip install matplotlib`"
        ) from problem


def plot(dataset: BucketedDataset, path: Path) -> None:
    """Writes one chart of sizes, buckets and some training examples, atomically.

    The minimum size that it shows is the configuration's, or the paper's where it has none. Raises InputError as
    `check`.
    """
    check(path)
    from matplotlib.figure import Figure

    report = [bucket for bucket in dataset.report() if bucket.images]
    sheet = _sheet(dataset, report)
    rows = [sheet[start : start + 2] for start in range(0, len(sheet), 2)]
    heights = [_HEADING + max(_image_height(bucket) for bucket, _ in row) + _TEXT for row in rows]
    page = Figure(figsize=(_WIDTH, 0.9 + _CHARTS + 1.0 + sum(heights) + 0.1))
    top = _title(page, dataset)
    minimum_px = dataset.config.min_size if dataset.config.min_size > 1 else PAPER_MINIMUM_PX
    _draw_sizes(page, dataset.source.sizes, minimum_px, top)
    _draw_buckets(page, report, dataset, top)
    top -= _CHARTS + 1.0
    for row, height in zip(rows, heights, strict=True):
        for column, (bucket, examples) in enumerate(row):
            _draw_examples(page, bucket, examples, _MARGIN + column * (_HALF + _MARGIN), top)
        top -= height

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial, warnings.catch_warnings():
        # A caption in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        page.savefig(partial, format=path.suffix.lower()[1:], dpi=_DPI)


def _sheet(dataset: BucketedDataset, report: list[BucketReport]) -> list[tuple[BucketReport, list[DecodedExample]]]:
    """The first training examples of the fullest buckets, fullest first; no more than their batches hold."""
    fullest = sorted(report, key=lambda bucket: -bucket.images)[:_SHEET_BUCKETS]
    missing = {bucket.size: _example_count(bucket) for bucket in fullest}
    examples: dict[Size, list[DecodedExample]] = {size: [] for size in missing}
    # A bucket with fewer images than a batch has its first batch in the epoch that fills it.
    last = dataset.order.steps_before(max(math.ceil(1 / bucket.batches) for bucket in fullest))
    for step in range(last):
        size = dataset.bucket_of(step)
        if count := min(missing.get(size, 0), dataset.batch_size_of(step)):
            examples[size] += itertools.islice(dataset.examples(step), count)
            missing[size] -= count
        if not any(missing.values()):
            break
    return [(bucket, examples[bucket.size]) for bucket in fullest]


def _example_count(bucket: BucketReport) -> int:
    return min(_SHEET_EXAMPLES, math.ceil(bucket.batches) * bucket.batch_size)


def _axes(page: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at an upper left corner, measured from the lower left of the page, of that size; all in inches."""
    across, up = page.get_size_inches()
    return page.add_axes((left / across, (top - height) / up, width / across, height / up))


def _write(page: "Figure", left: float, top: float, text: str, points: int, weight: str = "normal") -> None:
    """Writes text below its upper left corner, in inches. Dollar signs do not start formulae."""
    across, up = page.get_size_inches()
    text = text.encode("utf-8", "replace").decode()  # JSON can hold half surrogate pairs, which cannot be drawn
    page.text(left / across, top / up, text, size=points, weight=weight, va="top", parse_math=False, linespacing=1.25)


def _title(page: "Figure", dataset: BucketedDataset) -> float:
    """Writes the title and the counts. Returns the height, in inches, at which the charts begin."""
    top = page.get_size_inches()[1] - 0.2
    name = dataset.where
    name = name if len(name) <= 80 else "…" + name[-79:]
    used = sum(bucket.images for bucket in dataset.report())
    refused = dataset.refused_count() + sum(1 for _ in dataset.source.refused(built=True))
    counts = f"{dataset.source.found:,} images found, {used:,} usable, {refused:,} entries refused"
    if dataset.too_small_count():
        counts += f", {dataset.too_small_count():,} below {dataset.config.min_size} px"
    sizes = sorted({bucket.batch_size for bucket in dataset.report() if bucket.images})
    batches = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    steps = f"{dataset.epoch_steps:.6g} steps of {batches} images per epoch"
    _write(page, _MARGIN, top, name, 14, "bold")
    _write(page, _MARGIN, top - 0.28, f"{counts}; {steps}", 10)
    return top - 0.9


def _draw_sizes(page: "Figure", sizes: Int32[np.ndarray, "images 2"], minimum_px: int, top: float) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    counts = size_histogram(sizes)
    edges = 2.0 ** (np.arange(len(counts) + 1) / _BINS_PER_OCTAVE)
    filled = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    low = min(float(edges[filled[0]]), minimum_px) / 1.3
    high = max(float(edges[filled[-1] + 1]), minimum_px) * 1.3
    ticks = [2.0**octave for octave in range(_OCTAVES + 1) if not 0.7 < 2**octave / minimum_px < 1.4]
    axes = _axes(page, _MARGIN + 0.5, top, _CHARTS, _CHARTS)
    shown = np.ma.masked_equal(counts, 0)
    mesh = axes.pcolormesh(edges, edges, shown, norm=LogNorm(1, max(10, counts.max())), cmap="viridis", rasterized=True)
    for axis, limit in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        limit(low, high)
        axis.set_major_locator(FixedLocator([float(minimum_px), *(side for side in ticks if low <= side <= high)]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda side, _: f"{side:.0f}"))
    axes.axvline(minimum_px, color="black", linestyle="--", linewidth=1)
    axes.axhline(minimum_px, color="black", linestyle="--", linewidth=1)
    share = share_discarded(sizes, minimum_px)
    axes.set_title(
        f"Original sizes: a minimum of {minimum_px} px would discard {100 * share:.3g} %",
        size=11,
        loc="left",
    )
    axes.set_xlabel("width, px")
    axes.set_ylabel("height, px")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    bar = page.colorbar(mesh, cax=_axes(page, _MARGIN + 0.5 + _CHARTS + 0.12, top, 0.15, _CHARTS))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    bar.ax.set_title("images", size=9)


def _draw_buckets(page: "Figure", report: list[BucketReport], dataset: BucketedDataset, top: float) -> None:
    """A bar chart of images per bucket, from the widest bucket to the tallest."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = sorted(report, key=lambda bucket: -bucket.images)[:_BARS]
    shown.sort(key=lambda bucket: bucket.height / bucket.width)
    left = _MARGIN + _CHARTS + 2.4
    axes = _axes(page, left, top, _WIDTH - left - _MARGIN, _CHARTS - 0.55)
    places = np.arange(len(shown))
    small = np.array([bucket.repeated > 0 for bucket in shown])
    images = np.array([bucket.images for bucket in shown])
    for chosen, colour, label in (
        (~small, "#31688e", None),
        (small, "#d95f02", "fewer than a batch: collected over several epochs"),
    ):
        if chosen.any():
            axes.bar(places[chosen], images[chosen], color=colour, label=label, width=0.8)
    crowded = len(shown) > 16
    for place, count in zip(places, images, strict=True):
        axes.annotate(
            *(f"{count:,}", (place, count), (0, 3)),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=8,
            rotation=90 if crowded else 0,
        )
    axes.set_xlim(-0.8, max(len(shown), 6) - 0.2)
    axes.set_ylim(0, images.max() * 1.22)
    axes.set_xticks(
        places,
        [f"{b.height}×{b.width}" for b in shown],
        size=8,
        rotation=90 if crowded else 45 if len(shown) > 8 else 0,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    empty, beyond = len(dataset.buckets) - len(report), len(report) - len(shown)
    notes = [f"{empty} others get none"] * bool(empty) + [f"the {beyond} least full are not shown"] * bool(beyond)
    axes.set_xlabel("; ".join(["bucket, height×width in px", *notes]))
    axes.set_title("Images per bucket", size=11, loc="left")
    if small.any():
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)


def _image_height(bucket: BucketReport) -> float:
    return min(_TALLEST, _CELL * bucket.height / bucket.width)


def _draw_examples(
    page: "Figure", bucket: BucketReport, examples: list[DecodedExample], left: float, top: float
) -> None:
    """One bucket's examples side by side."""
    counts = f"images {bucket.images:,}, batches per epoch {bucket.batches:.4g}"
    heading = f"Bucket {bucket.height}×{bucket.width}: {counts}"
    _write(page, left, top, heading, 10, "bold")
    top -= _HEADING
    height = _image_height(bucket)
    width = height * bucket.width / bucket.height
    for column, (_, caption, example) in enumerate(examples):
        corner = left + column * (_CELL + _GAP)
        thumbnail = Image.fromarray(example.image)
        thumbnail.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
        axes = _axes(page, corner, top, width, height)
        axes.imshow(np.asarray(thumbnail), aspect="auto")
        axes.set_axis_off()
        (h, w), (y, x), (H, W) = example.original_size, example.crop_top_left, example.target_size
        numbers = f"original {h}×{w}\ncrop {y},{x}{', flipped' if example.flipped else ''}\ntarget {H}×{W}"
        lines = textwrap.wrap(" ".join(caption.split()), 30, max_lines=3, placeholder=" …")
        _write(page, corner, top - height - 0.05, numbers, 7, "bold")
        _write(page, corner, top - height - 0.45, "\n".join(lines), 7)
