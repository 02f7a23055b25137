"""How long a run takes to move: to its first step, and until the steps of all its buckets are compiled.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --buckets 40 --ahead before on_demand --threads 2
    python benchmarks/start_up.py --quick

A tiny model (that of the tests) trains on the paper's buckets at an eighth of their size: the square one, nine of
different shapes, all 40. Each bucket has three steps. Every run is made twice, each time in a new process and a new run
directory: the first time with an empty compilation cache, the second time with the one that the first has filled.

Seconds count from the start of the process, so imports, the data and initial weights are in them. "waited" is what
training lost to compiling (`compile` in the table at the end of a run), "whole run" the process from start to end, and
"CPU" the seconds of all its threads, which say what it costs where other programs run on the same cores. --quick turns
the compiler's costly passes off.
Compiling a model of full size takes minutes where this takes seconds; what is to be seen here is how the numbers go
with the buckets.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

STEPS_A_BUCKET, BATCH_SIZE = 3, 2
COLUMNS = ("first step", "all compiled", "waited", "whole run", "CPU")


def buckets(count: int) -> tuple[tuple[int, int], ...]:
    """So many of the paper's list, spread over the aspect ratios, at an eighth of the size."""
    from sdxl_jax.data.buckets import SDXL_BUCKETS

    ordered = sorted(SDXL_BUCKETS, key=lambda bucket: bucket.height / bucket.width)
    if count == 1:
        chosen = [(1024, 1024)]
    else:
        chosen = [ordered[round(number * (len(ordered) - 1) / (count - 1))] for number in range(count)]
    return tuple((height // 8, width // 8) for height, width in chosen)


def make_folder(folder: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """One batch of random images for each bucket."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number, (height, width) in enumerate(sizes * BATCH_SIZE):
        name = f"{number:03d}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"image {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def child(began: float, work: Path, start: str, options: argparse.Namespace) -> None:
    """One run; prints its row."""
    import jax
    import tiny

    from sdxl_jax.config import CompileAhead, TrainingConfig
    from sdxl_jax.data.settings import DataConfig
    from sdxl_jax.training import loop, setup
    from sdxl_jax.training.observe import clock

    folder, run_dir, count = work / "images", work / f"run-{start}", options.buckets[0]
    jax.config.update("jax_disable_most_optimizations", options.quick)
    base = tiny.train_config(folder)
    config = dataclasses.replace(
        base,
        data=DataConfig(folder=str(folder), buckets=buckets(count), batch_size=BATCH_SIZE),
        training=TrainingConfig(
            steps=STEPS_A_BUCKET * count,
            compile_ahead=CompileAhead(options.ahead[0]),
            compile_threads=options.threads,
            compilation_cache=str(work / "cache"),
        ),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=10**6),
    )
    made: list[setup.CompiledSteps] = []
    row: dict[str, float] = {}

    def kept(*arguments: Any, make: Any = setup.CompiledSteps) -> Any:
        made.append(make(*arguments))
        return made[-1]

    steps_made = run_dir / "metrics.jsonl"

    def callback() -> None:
        while len(row) < 2:
            now = time.monotonic() - began
            if "first step" not in row and steps_made.exists() and steps_made.stat().st_size:
                row["first step"] = now
            if "all compiled" not in row and made and len(set(made[0].progress())) == 1:
                row["all compiled"] = now
            time.sleep(0.02)

    setup.CompiledSteps = kept  # pyright: ignore[reportAttributeAccessIssue]
    watcher = threading.Thread(target=callback)
    watcher.start()
    loop.train(config, run_dir, progress=False, began=began)
    watcher.join()
    row["waited"] = clock.totals(clock.read(run_dir))["compile"]
    row |= {"whole run": time.monotonic() - began, "CPU": time.process_time()}
    print(json.dumps(row))


def measure(work: Path, start: str, count: int, ahead: str, options: argparse.Namespace) -> dict[str, float]:
    """One run in a process of its own."""
    given = [f"--buckets={count}", f"--ahead={ahead}", f"--threads={options.threads}", *["--quick"] * options.quick]
    command = [sys.executable, __file__, *given, "--child", repr(time.monotonic()), str(work), start]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 9, 40])
    parser.add_argument("--ahead", nargs="+", default=["background"], choices=["background", "before", "on_demand"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        began, work, start = options.child
        child(float(began), Path(work), start, options)
        return
    print(f"| buckets | compiled | start | {' | '.join(f'{name} s' for name in COLUMNS)} |")
    print(f"|---|---|---|{'---|' * len(COLUMNS)}")
    for ahead in options.ahead:
        for count in options.buckets:
            with tempfile.TemporaryDirectory() as work:
                make_folder(Path(work) / "images", buckets(count))
                for start in ("first", "second"):
                    row = measure(Path(work), start, count, ahead, options)
                    numbers = " | ".join(f"{row[name]:.1f}" for name in COLUMNS)
                    print(f"| {count} | {ahead} | {start} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
