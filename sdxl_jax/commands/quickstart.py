"""`sdxl-jax quickstart`: its options. What it does stands in quickstart/run.py."""

from dataclasses import dataclass
from pathlib import Path

from sdxl_jax.commands import parsing


@dataclass(frozen=True)
class Quickstart:
    """Train a small SDXL on images that come along, sample it, measure it: about ten minutes on two cores."""

    run_dir: Path = Path("runs/quickstart")
    """Where everything is written. Run again with the same folder, it goes on where it was."""
    train_autoencoder: bool = False
    """Train the small autoencoder too (about an hour) instead of taking the one that comes along."""
    seed: int = 0
    """Initial weights, order, noise."""


def run(arguments: list[str]) -> None:
    options = parsing.parse(Quickstart, arguments, "quickstart")
    from sdxl_jax.quickstart.run import quickstart

    quickstart(options.run_dir, options.train_autoencoder, options.seed)
