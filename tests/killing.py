"""Kills a training run at random moments, starts it again each time, and lets it come to its end.

The moments are drawn from a seed, evenly over the time that an undisturbed run takes, its start included. Where each
kill fell is what the run itself wrote last (killed_run.py).
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import compiling
import numpy as np
import tiny

from sdxl_jax import config as configuration
from sdxl_jax.config import TrainConfig

PROGRAM = Path(__file__).with_name("killed_run.py")
TIMES = ("step_seconds", "images_per_second", "data_seconds")
"""Of a line of metrics.jsonl: what another run has otherwise."""


def train_config(folder: Path, steps: int) -> TrainConfig:
    """A model of the smallest kind in two buckets: checkpoints every three steps, pictures every four."""
    base = tiny.train_config(folder, steps)
    model = dataclasses.replace(
        tiny.MODEL,
        unet=dataclasses.replace(tiny.MODEL.unet, block_channels=(8,), transformer_depth=(1,), heads=(2,)),
    )
    return dataclasses.replace(
        base,
        model=model,
        data=dataclasses.replace(base.data, batch_size=4),
        checkpoint=configuration.CheckpointConfig(every_steps=3, keep=2),
        validation=configuration.ValidationConfig(4, ("one", "two"), ((16, 16),), steps=2),
    )


@dataclasses.dataclass
class Processes:
    """One start of a run on one or several processes, over loopback."""

    children: list[subprocess.Popen[bytes]]
    phases: list[Path]

    @classmethod
    def start(cls, config: TrainConfig, run_dir: Path, scratch: Path, count: int, log: Path | None = None) -> "Processes":
        environment = compiling.environment(scratch / "compiled") | {"JAX_PLATFORMS": "cpu"}
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        phases = [scratch / f"phase_{number}" for number in range(count)]
        children = []
        for number, phase in enumerate(phases):
            phase.write_text("start-up")
            command = [sys.executable, str(PROGRAM), json.dumps(configuration.to_json(config)), str(run_dir), str(phase)]
            with (log or scratch / f"log_{number}").open("ab") as output:
                children.append(
                    subprocess.Popen(
                        command,
                        env=environment | ({"JAX_PROCESS_ID": str(number)} if count > 1 else {}),
                        stdout=output,
                        stderr=output,
                    )
                )
        return cls(children, phases)

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes, None if a process is still there after that time."""
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


def undisturbed(config: TrainConfig, run_dir: Path, scratch: Path, count: int, limit: float = 600) -> float:
    """Runs without a kill; the seconds that it took."""
    began = time.monotonic()
    processes = Processes.start(config, run_dir, scratch, count)
    try:
        codes = processes.wait(limit)
    finally:
        processes.end()
    logs = [(scratch / f"log_{number}").read_text()[-3000:] for number in range(count)]
    assert codes == [0] * count, f"{codes}\n" + "\n".join(logs)
    return time.monotonic() - began


def killed(
    config: TrainConfig, run_dir: Path, scratch: Path, count: int, kills: int, span: float, seed: int, limit: float = 600
) -> Counter[str]:
    """Kills one of the processes so many times, each at a moment up to `span` seconds after its start, and the others
    shortly after; then lets the run end. A run that ends before its kill is begun anew, elsewhere, and compared by the
    caller: its folder is in `run_dir`'s parent. Returns how many kills fell in which phase.
    """
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    while counts.total() < kills:
        processes = Processes.start(config, run_dir, scratch, count)
        try:
            moment = float(rng.uniform(0, span))
            codes = processes.wait(moment)
            if codes is None:
                victim = int(rng.integers(count))
                phase = processes.phases[victim].read_text()
                processes.kill([victim])
                counts[phase or "start-up"] += 1
                time.sleep(float(rng.uniform(0, 0.3)) if count > 1 else 0)  # the others notice, or not yet
            else:
                log = "\n".join((scratch / f"log_{number}").read_text()[-3000:] for number in range(count))
                assert codes == [0] * count, f"{codes}\n{log}"
                return counts
        finally:
            processes.end()
    undisturbed(config, run_dir, scratch, count, limit)
    return counts


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is a time."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]
