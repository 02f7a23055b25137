"""`sdxl-jax quickstart`: its options. What it does is in quickstart/run.py."""

from dataclasses import dataclass
from pathlib import Path

from sdxl_jax.commands import parsing


@dataclass(frozen=True)
class Quickstart:
    """Train a small SDXL on the embedded images, sample from it and evaluate it: about ten minutes on two cores."""

    run_dir: Path = Path("runs/quickstart")
    """Run directory for everything that is written. The same command with the same directory resumes."""
    train_autoencoder: bool = False
    """Train the small autoencoder too (about an hour) instead of using the embedded one."""
    seed: int = 0
    """Random seed of the initial weights, the order of the data, and the noise."""
    compilation_cache: str | None = "user"
    """Folder for compiled programs, which later commands reuse. user: one in your cache folder. None: no folder."""
    few_steps: bool = False
    """Also distil the model for 4 steps without guidance, in place of 20 with it, into RUN_DIR/student: some minutes
    more. After the quickstart, the same command with this option adds it."""


def run(arguments: list[str]) -> None:
    options = parsing.parse(Quickstart, arguments, "quickstart")
    from sdxl_jax.quickstart.run import quickstart

    quickstart(options.run_dir, options.train_autoencoder, options.seed, options.compilation_cache, options.few_steps)
