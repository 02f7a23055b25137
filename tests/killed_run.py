"""One process of a tiny training run, for tests that kill it: `python killed_run.py CONFIG_JSON RUN_DIR PHASE_FILE`.

It writes the phase of its main thread to PHASE_FILE, so that a test knows in which phase it was killed: start-up
(imports, opening the data, restoring), compiling, step, save, evaluation, end. The phase before is "interpreter".
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import starting

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


def slowed(put_batch: Any) -> Any:
    """SECONDS_PER_STEP slows every step down; HANG_IN_STEP="STEP PROCESS" never ends that step of that process."""
    step_hung, process_hung = map(int, os.environ.get("HANG_IN_STEP", "0 0").split())
    steps = 0

    def hang(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        here = steps == step_hung and process_hung == int(os.environ.get("JAX_PROCESS_ID", "0"))
        time.sleep(600 if here else float(os.environ.get("SECONDS_PER_STEP", "0")))
        return put_batch(*arguments)

    return hang


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # as the command does while there is nothing to save
    enter("start-up")
    starting.collect_rarely()
    starting.without_torch()
    from sdxl_jax import sharding
    from sdxl_jax.config import TrainConfig, from_json
    from sdxl_jax.training import checkpoint, compilation, loop
    from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig
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
    sharding.put_batch = slowed(sharding.put_batch)
    value = json.loads(sys.argv[1])
    config = from_json(value, AutoencoderConfig if "vae" in value else TrainConfig)
    loop.train(config, sys.argv[2], progress="--progress" in sys.argv)
    enter("end")


if __name__ == "__main__":
    main()
