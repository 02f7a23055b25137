"""FID against CLIP score over guidance scales, of several models: figure 13 of Podell et al. (arXiv:2307.01952).

One table and one plot. A stronger guidance follows the prompt better and is less varied: each model is a curve, and a
curve further down and to the right is better in both numbers. People's preference does not follow FID.

matplotlib is needed only for the plot, and imported only then.
"""

from pathlib import Path
from typing import Any, NamedTuple

from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.report import number
from sdxl_jax.evaluation.scores import Evaluation, Score
from sdxl_jax.files import atomic


class Point(NamedTuple):
    """One model at one guidance scale."""

    model: str
    guidance: float
    evaluation: Evaluation

    def score(self, name: str) -> Score:
        return next(score for score in self.evaluation.scores if score.name == name)


def check_plots() -> None:
    """Raises InputError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401 (drawing needs it)
    except ImportError as problem:
        raise InputError(
            f"A plot needs matplotlib, which cannot be imported ({problem}). Run `pip install matplotlib`"
        ) from problem


def table(points: list[Point]) -> str:
    """A Markdown table: a line per model and guidance scale."""
    names = [score.name for score in points[0].evaluation.scores]
    lines = [f"| model | guidance | {' | '.join(names)} | N | reference N | resize |", f"|{'---|' * (5 + len(names))}"]
    for point in points:
        first = point.evaluation.scores[0]
        values = [number(point.score(name).value) for name in names]
        reference = "–" if first.reference_images is None else f"{first.reference_images:,}"
        cells = [point.model, f"{point.guidance:g}", *values, f"{first.images:,}", reference, first.resize]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(points: list[Point], path: Path, across: str, up: str) -> None:
    """Writes the curves, a line per model, each point with its guidance scale; atomically. across, up: the names of the
    scores on the axes."""
    check_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes: Any = figure.add_subplot()
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model]
        x, y = ([point.score(name).value for point in own] for name in (across, up))
        axes.plot(x, y, marker="o", label=model)
        for point, *place in zip(own, x, y, strict=True):
            axes.annotate(f"{point.guidance:g}", place, (4, 4), textcoords="offset points", size=8)
    first = points[0].score(up)
    axes.set_xlabel(f"{across} ({points[0].score(across).convention})", parse_math=False)
    axes.set_ylabel(f"{up} ({first.resize}, N = {first.images:,})", parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
