"""One process of a tiny training run, for tests that kill it: `python killed_run.py CONFIG_JSON RUN_DIR PHASE_FILE`.

It writes the phase of its main thread to PHASE_FILE, so that a test knows in which phase it was killed: start-up
(imports, opening the data, restoring), compiling, step, save, evaluation, end. The phase before is "interpreter".
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

PHASE = Path(sys.argv[3])


def enter(phase: str) -> None:
    partial = PHASE.with_suffix(".partial")
    partial.write_text(phase)
    partial.replace(PHASE)


def within(phase: str, function: Any, after: str | None = None) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        enter(phase)
        result = function(*arguments, **options)
        if after is not None:
            enter(after)
        return result

    return call


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # as the command does while there is nothing to save
    enter("start-up")
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    import tensorboardX  # noqa: F401  # imports torch if it is installed, which takes two seconds

    del sys.modules["torch"]
    from sdxl_jax.config import TrainConfig, from_json
    from sdxl_jax.training import checkpoint, compilation, loop
    from sdxl_jax.training.observe import validation

    validation.write_grid = within("evaluation", validation.write_grid, "step")
    wait = compilation.CompiledSteps.of
    waiting = within("compiling", wait, "step")

    def of(steps: Any, bucket: Any, *rest: Any) -> Any:
        """Called for every step; waits for compilation at the first step of a bucket."""
        return (wait if steps.ready(bucket) else waiting)(steps, bucket, *rest)

    compilation.CompiledSteps.of = of  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint.Checkpoints.save = within("save", checkpoint.Checkpoints.save, "step")
    checkpoint.Checkpoints.finish = within("save", checkpoint.Checkpoints.finish, "step")
    config = from_json(json.loads(sys.argv[1]), TrainConfig)
    loop.train(config, Path(sys.argv[2]), progress="--progress" in sys.argv)
    enter("end")


if __name__ == "__main__":
    main()
