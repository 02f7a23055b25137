"""Kills a training run at random moments, resumes it each time until it is finished, and compares it with an
uninterrupted run: every line of metrics.jsonl except times, every bit of the last state, every image.

The moments are drawn from a seed, uniformly over the time of an uninterrupted run, start-up included. The phase of a
kill is the last one that the run wrote (killed_run.py), or "half-written checkpoint" if one was left.

By hand, for many kills: `python tests/killing.py --kills 200 --processes 2 --folder SCRATCH`. It prints a line per
kill and per finished run; the last line has the counts. From the repository's root, with tests/ on PYTHONPATH.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import compiling
import numpy as np
import tiny

from sdxl_jax.conditioning.text import END_OF_TEXT, Tower
from sdxl_jax.config import CheckpointConfig, RunConfig, TrainConfig, ValidationConfig
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, in_bucket
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.clip import ClipTextConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.training.checkpoint import latest_step
from sdxl_jax.training.observe.metrics import TIMES
from sdxl_jax.weights.formats import orbax
from sdxl_jax.weights.formats.checkpoints import steps

PROGRAM = Path(__file__).with_name("killed_run.py")


def train_config(folder: Path, steps: int) -> TrainConfig:
    """The smallest run with all phases, since tracing dominates the start-up time: one text encoder, one level without
    attention, one bucket. Checkpoints every three steps, validation images every four."""
    base = tiny.train_config(folder, steps)
    model = ModelConfig(
        unet=UNetConfig((8,), 1, (0,), 1, (2,), context_dim=8, vector_dim=None, groups=4),
        vae=VaeConfig(block_channels=(4,), resnets_per_block=1, groups=2),
        text=(Tower("text_encoder", ClipTextConfig(8, 1, 2, 16), END_OF_TEXT),),
        micro=None,
        default_size=(16, 16),
    )
    return dataclasses.replace(
        base,
        model=model,
        data=dataclasses.replace(base.data, buckets=((16, 16),), max_aspect_distance=10.0, batch_size=4),
        checkpoint=CheckpointConfig(every_steps=3, keep=2),
        validation=ValidationConfig(4, ("one", "two"), ((16, 16),), steps=2),
    )


@dataclasses.dataclass
class Processes:
    """The processes of one start of a run, connected over loopback."""

    children: list[subprocess.Popen[bytes]]
    phases: list[Path]

    @classmethod
    def start(
        cls,
        config: RunConfig,
        run_dir: AnyPath,
        scratch: Path,
        count: int,
        log: Path | None = None,
        *,
        variables: Sequence[Mapping[str, str]] = (),
    ) -> "Processes":
        """variables: those of each process's environment alone."""
        environment = compiling.environment(scratch / "compiled")
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        phases = [scratch / f"phase_{number}" for number in range(count)]
        children = []
        for number, (phase, own) in enumerate(itertools.zip_longest(phases, variables, fillvalue={})):
            assert isinstance(phase, Path)
            phase.write_text("interpreter")
            command = [
                sys.executable,
                str(PROGRAM),
                json.dumps(to_json(config)),
                str(run_dir),
                str(phase),
            ]
            with (log or scratch / f"log_{number}").open("ab") as output:
                children.append(
                    subprocess.Popen(
                        command,
                        env=environment | ({"JAX_PROCESS_ID": str(number)} if count > 1 else {}) | dict(own),
                        stdout=output,
                        stderr=output,
                    )
                )
        return cls(children, phases)

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes; None if a process is still running after `seconds`."""
        deadline = time.monotonic() + seconds
        for child in self.children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return None
        return [child.returncode for child in self.children]

    def kill(self, numbers: list[int]) -> None:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.children[number].pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill(list(range(len(self.children))))
        for child in self.children:
            child.wait()


def uninterrupted(config: RunConfig, run_dir: AnyPath, scratch: Path, count: int, limit: float = 600) -> float:
    """Runs without a kill. Returns the seconds that it took."""
    began = time.monotonic()
    processes = Processes.start(config, run_dir, scratch, count)
    try:
        codes = processes.wait(limit)
    finally:
        processes.end()
    logs = [(scratch / f"log_{number}").read_text()[-3000:] for number in range(count)]
    assert codes == [0] * count, f"{codes}\n" + "\n".join(logs)
    return time.monotonic() - began


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def state(run_dir: Path) -> dict[str, bytes]:
    """The newest checkpoint by path: step, parameters, EMA, moments."""
    newest = latest_step(run_dir / "checkpoints")
    assert newest is not None
    path = run_dir / "checkpoints" / str(newest)
    leaves = orbax.leaves(path, orbax.metadata(path)[0])
    return {name: leaf.read().tobytes() for name, leaf in leaves.items()}


def images(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "samples").iterdir())}


def _assert_same(killed: dict[str, bytes], whole: dict[str, bytes]) -> None:
    different = [name for name in {**whole, **killed} if killed.get(name) != whole.get(name)]
    sizes = {name: [len(each.get(name, b"")) for each in (killed, whole)] for name in different[:5]}
    assert not different, f"{len(different)} of {len(whole)} differ, the first with these sizes in bytes: {sizes}"


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert lines(run_dir) == lines(whole)
    _assert_same(state(run_dir), state(whole))
    _assert_same(images(run_dir), images(whole))
    for folder in (".", "checkpoints", "samples"):  # nothing half-written is left
        names = [sorted(path.name for path in (run / folder).iterdir()) for run in (run_dir, whole)]
        assert names[0] == names[1]


def fetched(run_dir: AnyPath, folder: Path) -> Path:
    """The run directory, or a copy on this machine of one in a bucket, without what Orbax writes only there."""
    if not in_bucket(run_dir):
        return run_dir
    for name in buckets.files(run_dir, "the run"):
        buckets.download(run_dir / name, folder / name, "the run")
    return folder


def _half_written(run_dir: AnyPath) -> set[tuple[str, float]]:
    """Checkpoints that are not finished, each with its creation time if it is known."""
    if in_bucket(run_dir):
        begun = {path.name for path in run_dir.glob("checkpoints/*")}
        return {(name, 0.0) for name in begun - {str(step) for step in steps(run_dir / "checkpoints")}}
    return {(path.name, path.stat().st_ctime) for path in run_dir.glob("checkpoints/*tmp*")}


def campaign(
    config: RunConfig,
    whole: Path,
    scratch: Path,
    processes: int,
    kills: int,
    span: float,
    seed: int,
    report: Callable[[str], object] = lambda line: None,
    *,
    root: AnyPath | None = None,
) -> Counter[str]:
    """`kills` kills, over as many runs as they take; each run is finished and compared with `whole`.

    root: where the run directories are, e.g. in a bucket; None: in `scratch`.

    One of the processes is killed at a random moment up to `span` seconds after the start, the others shortly after.
    The span is that of an uninterrupted run, when the machine may have been busier: runs that finish first shorten it.
    Returns the number of kills by phase.
    """
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    run, begun = 0, time.monotonic()
    while True:
        run_dir = (root or scratch) / f"killed_{run}"
        before, fresh, began = _half_written(run_dir), not run_dir.exists(), time.monotonic()
        started = Processes.start(config, run_dir, scratch, processes)
        try:
            left = kills - counts.total()
            codes = started.wait(float(rng.uniform(0, span)) if left else 600)
            if codes is None:
                assert left, "it hangs"
                victim = int(rng.integers(processes))
                phase = started.phases[victim].read_text()
                started.kill([victim])
                if processes > 1:
                    time.sleep(float(rng.uniform(0, 0.3)))  # in which the others may notice
        finally:
            started.end()
        took = time.monotonic() - began
        if codes is None:
            if _half_written(run_dir) - before:
                phase = "half-written checkpoint"
            counts[phase] += 1
            report(f"{time.monotonic() - begun:7.0f} s  kill {counts.total()} of run {run}: {phase}")
            continue
        log = "\n".join((scratch / f"log_{number}").read_text()[-3000:] for number in range(processes))
        assert codes == [0] * processes, f"{codes}\n{log}"
        copy = fetched(run_dir, scratch / "fetched")
        assert_same_run(copy, whole)
        report(f"{time.monotonic() - begun:7.0f} s  run {run} is finished, and the same")
        if fresh:
            span = min(span, took)
        shutil.rmtree(copy)
        run += 1
        if not left:
            return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    config = train_config(tiny.make_folder(options.folder / "images"), options.steps)
    spans = []
    for name in ("whole", "again"):  # the second finds all programs in the compilation cache, as every restart does
        spans.append(uninterrupted(config, options.folder / name, options.folder, options.processes))
        print(f"uninterrupted: {spans[-1]:.1f} s", flush=True)
    assert_same_run(options.folder / "again", options.folder / "whole")
    counts = campaign(
        config,
        options.folder / "whole",
        options.folder,
        options.processes,
        options.kills,
        spans[-1],
        options.seed,
        functools.partial(print, flush=True),
    )
    print(f"{counts.total()} kills, {options.processes} processes, all runs the same: {dict(counts.most_common())}")


if __name__ == "__main__":
    main()
