"""One process of a tiny training run, for tests that kill it: `python killed_run.py CONFIG_JSON RUN_DIR PHASE_FILE`.

It writes to PHASE_FILE in which phase its main thread is, so that a test knows where its kill fell: start-up (imports,
opening the data, restoring), compiling, step, save, evaluation, end. Before any of it, the interpreter starts.
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
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # as the command does, before there is anything to save
    enter("start-up")
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    import tensorboardX  # noqa: F401  # which imports torch where it is there: two seconds

    del sys.modules["torch"]
    from sdxl_jax.config import TrainConfig, from_json
    from sdxl_jax.training import checkpoint, compilation, loop
    from sdxl_jax.training.observe import validation

    validation.look = within("evaluation", validation.look, "step")
    wait = compilation.CompiledSteps.of
    waiting = within("compiling", wait, "step")

    def of(steps: Any, bucket: Any, *rest: Any) -> Any:
        """It is asked for every step, and waits for the first of a bucket."""
        return (wait if steps.ready(bucket) else waiting)(steps, bucket, *rest)

    compilation.CompiledSteps.of = of  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint.Checkpoints.save = within("save", checkpoint.Checkpoints.save, "step")
    checkpoint.Checkpoints.finish = within("save", checkpoint.Checkpoints.finish, "step")
    config = from_json(json.loads(sys.argv[1]), TrainConfig)
    loop.train(config, Path(sys.argv[2]), progress="--progress" in sys.argv)
    enter("end")


if __name__ == "__main__":
    main()
