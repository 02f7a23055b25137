"""Scores as a table, as JSON, and as a line of a Markdown report. Each states N and the resize mode."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.scores import Evaluation, Score
from sdxl_jax.files import atomic

_COLUMNS = ("metric", "value", "±", "N", "reference N", "resize", "convention")
_HEADER = "| images | reference | scores | N | reference N | resize |\n|---|---|---|---|---|---|\n"


def table(evaluation: Evaluation) -> str:
    """For people: what was compared, one line per score, and the notes."""
    rows = [_COLUMNS, *(_cells(score) for score in evaluation.scores)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reference = "" if evaluation.reference is None else f", reference {evaluation.reference}"
    return "\n".join([f"{evaluation.images}{reference}", *lines, *(f"note: {note}" for note in evaluation.notes)])


def _cells(score: Score) -> tuple[str, ...]:
    deviation = "" if score.deviation is None else number(score.deviation)
    counts = f"{score.images:,}", "" if score.reference_images is None else f"{score.reference_images:,}"
    return score.name, number(score.value), deviation, *counts, score.resize, score.convention


def number(value: float) -> str:
    """Four decimals; small values in scientific notation."""
    return f"{value:.4e}" if value and abs(value) < 0.01 else f"{value:.4f}"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The same as JSON values. Values that are not finite are null."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "images": evaluation.images,
        "reference": evaluation.reference,
        "scores": [{name: finite(value) for name, value in score._asdict().items()} for score in evaluation.scores],
        "notes": evaluation.notes,
        "versions": {name: version(name) for name in ("sdxl_jax", "jax", "numpy", "pillow", "opencv-python-headless")},
    }


def append_markdown(evaluation: Evaluation, path: Path) -> None:
    """Adds a line to the table at the end of a Markdown file, which is made if there is none. Raises InputError where
    its end is something else."""
    text = path.read_text() if path.exists() else ""
    header = "" if _HEADER in text else _HEADER
    if header and text.strip():
        raise InputError(f"{path} does not have the table of sdxl-jax evaluate at its end. Give a new file, or its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text + header + markdown_line(evaluation))


def markdown_line(evaluation: Evaluation) -> str:
    """One line: all scores with their counts and resize modes."""

    def once(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value)) or "–"

    cells = [_cells(score) for score in evaluation.scores]
    scores = "; ".join(
        f"{name} {value}{f' ± {deviation}' if deviation else ''}" for name, value, deviation, *_ in cells
    )
    counts, references, modes = (once([each[column] for each in cells]) for column in (3, 4, 5))
    names = [str(each or "–").replace("|", "\\|") for each in (evaluation.images, evaluation.reference)]
    return f"| {' | '.join([*names, scores, counts, references, modes])} |\n"
