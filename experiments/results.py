"""What every experiment writes into its folder: `table.md`, `results.json`, and `figure.png` if it has a plot.

`results.json` has the experiment's name and arguments, the paper's rows, ours, notes, versions, commit, hardware, and
of the last call, which resumes what others left: seconds, and the most memory that the process had, without those that
read data.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdxl_jax.evaluation.report import number
from sdxl_jax.files import atomic
from sdxl_jax.training.run_directory import commit, versions

Row = Mapping[str, str | float | int | None]
"""One line of a table, by column."""


def begin(options: argparse.Namespace, more: Collection[str]) -> float:
    """Begins an experiment in `options.out`, or resumes it; returns `time.monotonic()`. more: options that may change
    from call to call, because what they name is made beside what is there. Any other must stay as it was: samples and
    features are kept, and would be taken for those of other options. Raises SystemExit where one has changed."""
    path = options.out / "options.json"
    given = {name: str(value) for name, value in vars(options).items() if name not in ("out", *more)}
    before: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if changed := [name for name, value in given.items() if before.get(name, value) != value]:
        was, now = (", ".join(f"--{name.replace('_', '-')} {of[name]}" for name in changed) for of in (before, given))
        sys.exit(f"error: {options.out} has results of {was}, not {now}. Give the same, or another folder with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(before | given, indent=1) + "\n")
    return time.monotonic()


def write(
    folder: Path, name: str, paper: Sequence[Row], rows: Sequence[Row], notes: Sequence[str], began: float
) -> str:
    """Writes `table.md` and `results.json`; returns the table. began: `time.monotonic()` when the experiment began."""
    device = jax.devices()[0].device_kind
    found = {
        "name": name,
        "arguments": sys.argv[1:],
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


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """The rows, each group that differs in its seed alone followed by the means of what was measured and by the
    deviations. Measured is what is a fraction; a group of one has neither."""
    found = list[Row]()
    for group in _groups(rows):
        found += group
        if len(group) == 1:
            continue
        measured = [name for name, value in group[0].items() if isinstance(value, float) and name not in SETTINGS]
        values = {name: np.array([row[name] for row in group], float) for name in measured}
        means, deviations = ({name: float(of(each)) for name, each in values.items()} for of in (np.mean, _deviation))
        found += [{**group[0], "seed": "mean", **means}, {**group[0], "seed": "±", **deviations}]
    return found


SETTINGS = ("guidance",)
"""Columns of fractions that are not measured."""


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed and in what was measured alone, in the order of the first."""

    def settings(row: Row) -> tuple[Any, ...]:
        return tuple(
            (name, value)
            for name, value in row.items()
            if name != "seed" and (name in SETTINGS or not isinstance(value, float))
        )

    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(settings(row), []).append(row)
    return list(groups.values())


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1))


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
        axes.text(-0.01, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=8)
        axes.set_axis_off()


def save_figure(figure: Any, path: Path) -> None:
    """As PNG."""
    figure.set_layout_engine("constrained")
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
