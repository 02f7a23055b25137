"""What every experiment writes into its folder: `table.md`, `results.json`, and `figure.png` if it has a plot.

`results.json` has the experiment's name, the paper's rows, ours, notes, versions, commit, hardware, seconds, and the
most memory that the process had, without those that read data.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdxl_jax.evaluation.report import number
from sdxl_jax.files import atomic
from sdxl_jax.training.run_directory import commit, versions

Row = Mapping[str, str | float | int | None]
"""One line of a table, by column."""


def write(
    folder: Path, name: str, paper: Sequence[Row], rows: Sequence[Row], notes: Sequence[str], began: float
) -> str:
    """Writes `table.md` and `results.json`; returns the table. began: `time.monotonic()` when the experiment began."""
    device = jax.devices()[0].device_kind
    found = {
        "name": name,
        "paper": paper,
        "rows": rows,
        "notes": notes,
        "versions": versions(),
        "commit": commit(),
        "hardware": f"{jax.device_count()} × {device}, {os.cpu_count()} processors",
        "seconds": round(time.monotonic() - began, 1),
        "memory_gib": round(_peak_bytes() / 2**30, 2),
    }
    text = f"# {name}\n\n## The paper\n\n{markdown(paper)}\n## Here\n\n{markdown(rows)}\n"
    text += "".join(f"- {note}\n" for note in notes)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / "table.md", text)
    atomic.write_text(folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return text


def _peak_bytes() -> int:
    """The most resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def draw_samples(figure: Any, places: Sequence[Any], kept: Mapping[str, np.ndarray], count: int = 12) -> None:
    """A strip of at most `count` images, evenly spread, of each entry. places: one of the figure's grid for each."""
    for place, (name, images) in zip(places, kept.items(), strict=True):
        axes = figure.add_subplot(place)
        shown = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
        axes.imshow(np.concatenate(list(images[shown]), axis=1))
        axes.set_title(name, fontsize=8)
        axes.set_axis_off()


def save_figure(figure: Any, path: Path) -> None:
    """As PNG."""
    figure.tight_layout()
    with atomic.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table: a column for each key, in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value).replace("|", "\\|")
