"""One of several processes that share the programs of four buckets out: `python shared_programs.py CACHE [FAILS]`.

Prints, as JSON, the buckets that it compiled and what their programs return. The process FAILS compiles nothing.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdxl_jax import sharding
from sdxl_jax.compilation import compilation_cache, traces
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import cluster, compilation
from sdxl_jax.training.compilation import CompiledSteps

BUCKETS = [Bucket(8 * number, 8) for number in range(1, 5)]


def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return w + x.mean(0), jnp.tanh(x @ w.T).sum()


def main(cache: str, fails: int | None) -> None:
    cluster.join(60)
    compilation_cache.use(cache)
    compilation._PATIENCE_SECONDS = 1.0
    index, count = jax.process_index(), jax.process_count()
    compiled: list[int] = []
    compile_lowered = jax.stages.Lowered.compile

    def recorded(lowered: Any) -> Any:
        height = lowered.args_info[0][1].shape[1]
        if index == fails:
            time.sleep(600)
        compiled.append(height)
        return compile_lowered(lowered)

    jax.stages.Lowered.compile = recorded  # pyright: ignore[reportAttributeAccessIssue]
    mesh = sharding.make_mesh(MeshConfig())
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    arguments = {
        bucket: (
            jax.ShapeDtypeStruct((bucket.height, 8), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((4 * count, bucket.height, 8), jnp.float32, sharding=rows),
        )
        for bucket in BUCKETS
    }
    jitted = jax.jit(lambda w, x: step(w, x), donate_argnums=0, out_shardings=(whole, whole))
    devices = list(mesh.devices.flat)
    fingerprint = traces.fingerprint({}, devices)
    current = compilation_cache.current()
    assert fingerprint is not None and current is not None
    known = traces.Traces(current, fingerprint, devices)
    results = {}
    with CompiledSteps(jitted, arguments, mesh, traces=known, share=(index, count)) as steps:
        for bucket in BUCKETS:
            program = steps.of(bucket)
            if fails is None:
                numbers = np.arange(4 * bucket.height * 8, dtype=np.float32).reshape(4, bucket.height, 8) / 1000
                w = jax.device_put(np.ones((bucket.height, 8), np.float32), whole)
                w, total = program(w, sharding.put_batch(mesh, numbers + index))
                results[bucket.height] = [float(total), float(np.asarray(w).sum())]
    print(json.dumps({"compiled": sorted(compiled), "results": results}), flush=True)
    compilation.leave(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
