"""Start-up time of a run: to its first step, and until the train steps of all its buckets are compiled.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --buckets 40 --ahead before on_demand --threads 2
    python benchmarks/start_up.py --quick

A tiny model (that of the tests) trains on the paper's buckets at an eighth of their size: the square one, nine of
different aspect ratios, all 40. Each bucket has three steps. Every run is done twice, each time in a new process and a
new run directory: first with an empty compilation cache, then with the cache that the first run filled.

Seconds count from the start of the process, and so include imports, the data and initial weights. "waited" is the time
that training waited for compilation (`compile` in the table at the end of a run), "whole run" the process from start to
end, and "CPU" the seconds of all its threads, which are the cost where other programs run on the same cores. --quick
turns the compiler's expensive passes off. Compiling a model of full size takes minutes where this takes seconds: the
benchmark shows how start-up time grows with the number of buckets.
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

STEPS_PER_BUCKET, BATCH_SIZE = 3, 2
COLUMNS = ("first step", "all compiled", "waited", "whole run", "CPU")


def buckets(count: int) -> tuple[tuple[int, int], ...]:
    """`count` of the paper's buckets, spread over the aspect ratios, at an eighth of their size."""
    from sdxl_jax.data.buckets import SDXL_BUCKETS

    ordered = sorted(SDXL_BUCKETS, key=lambda bucket: bucket.height / bucket.width)
    if count == 1:
        chosen = [(1024, 1024)]
    else:
        chosen = [ordered[round(number * (len(ordered) - 1) / (count - 1))] for number in range(count)]
    return tuple((height // 8, width // 8) for height, width in chosen)


def make_folder(folder: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """One batch of random images per bucket."""
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
    import tiny  # pyright: ignore[reportMissingImports] (tests/, put on the path above)

    from sdxl_jax.config import CompileAhead, TrainingConfig
    from sdxl_jax.data.settings import DataConfig
    from sdxl_jax.training import loop, setup
    from sdxl_jax.training.compilation import CompiledSteps
    from sdxl_jax.training.observe.clock import read_starts, totals

    folder, run_dir, count = work / "images", work / f"run-{start}", options.buckets[0]
    jax.config.update("jax_disable_most_optimizations", options.quick)
    base = tiny.train_config(folder)
    config = dataclasses.replace(
        base,
        data=DataConfig(folder=str(folder), buckets=buckets(count), batch_size=BATCH_SIZE),
        training=TrainingConfig(
            steps=STEPS_PER_BUCKET * count,
            compile_ahead=CompileAhead(options.ahead[0]),
            compile_threads=options.threads,
            compilation_cache=str(work / "cache"),
        ),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=10**6),
    )
    created: list[CompiledSteps[Any]] = []
    row: dict[str, float] = {}

    def recorded(*arguments: Any) -> CompiledSteps[Any]:
        created.append(CompiledSteps(*arguments))
        return created[-1]

    metrics = run_dir / "metrics.jsonl"

    def watch() -> None:
        while len(row) < 2:
            now = time.monotonic() - began
            if "first step" not in row and metrics.exists() and metrics.stat().st_size:
                row["first step"] = now
            if "all compiled" not in row and created and len(set(created[0].progress())) == 1:
                row["all compiled"] = now
            time.sleep(0.02)

    setup.CompiledSteps = recorded  # pyright: ignore[reportAttributeAccessIssue] (a function in place of a class)
    watcher = threading.Thread(target=watch)
    watcher.start()
    loop.train(config, run_dir, progress=False, began=began)
    watcher.join()
    row["waited"] = totals(read_starts(run_dir))["compile"]
    row |= {"whole run": time.monotonic() - began, "CPU": time.process_time()}
    print(json.dumps(row))


def measure(work: Path, start: str, count: int, ahead: str, options: argparse.Namespace) -> dict[str, float]:
    """One run in its own process."""
    given = [f"--buckets={count}", f"--ahead={ahead}", f"--threads={options.threads}", *["--quick"] * options.quick]
    command = [sys.executable, __file__, *given, "--child", repr(time.monotonic()), str(work), start]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 9, 40], help="numbers of buckets")
    parser.add_argument(
        "--ahead",
        nargs="+",
        default=["background"],
        choices=["background", "before", "on_demand"],
        help="values of training.compile_ahead",
    )
    parser.add_argument("--threads", type=int, default=1, help="training.compile_threads")
    parser.add_argument("--quick", action="store_true", help="without the compiler's expensive passes")
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
