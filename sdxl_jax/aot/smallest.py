"""The smallest slice of a TPU chip on which a run's train step fits: `sdxl-jax compile --smallest`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from sdxl_jax import sharding
from sdxl_jax.aot import compile as aot_compile
from sdxl_jax.aot import report, topologies
from sdxl_jax.aot.report import Report, TooLarge
from sdxl_jax.config import RunConfig
from sdxl_jax.data.buckets import check_buckets
from sdxl_jax.data.pipeline import batch_sizes
from sdxl_jax.errors import InputError
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives import objective_of


class Attempt(NamedTuple):
    """A slice, with the configuration spread over all its chips."""

    topology: str
    config: RunConfig
    result: Report | TooLarge | None
    """None: not compiled, because the state and its gradients alone do not fit."""
    state_bytes: int
    """The state and its gradients on one chip."""

    def __str__(self) -> str:
        config = self.config
        given = f"--mesh.data 1 --mesh.fsdp {config.mesh.fsdp} --optimiser.accumulate {config.optimiser.accumulate}"
        if self.result is None:
            memory = topologies.check(self.topology).memory_bytes
            return (
                f"{self.topology} {given}\nIt does not fit: state and gradients take {self.state_bytes / 2**30:.1f} of "
                f"{memory / 2**30:.0f} GiB per chip."
            )
        return f"{self.topology} {given}\n{self.result}\n{aot_compile.verdict(self.result, config)}"


def attempts(config: RunConfig, chip: str, *, progress: bool = True) -> Iterator[Attempt]:
    """The chip's arrangements from the smallest one, up to the first on which the step fits.

    On each, the state is split over all chips, and a batch is as many micro-batches as it takes for each chip to have
    one image at a time; images per step, the optimiser and `compute` are the configuration's. The step is compiled for
    the bucket with the most pixels, where the state alone leaves room.

    Raises InputError for an unknown chip, a batch that no arrangement divides, and as `compile.compile_step`.
    """
    if chip not in topologies.KNOWN:
        raise InputError(f"--smallest tries the arrangements of a chip. Give --topology {', '.join(topologies.KNOWN)}")
    batch_size = math.gcd(*batch_sizes(config.data, check_buckets(config.data.buckets)))
    dividing = [each for each in topologies.KNOWN[chip][1] if batch_size % topologies.chips(f"{chip}:{each}") == 0]
    if not dividing:
        raise InputError(f"data.batch_size={batch_size} is no multiple of the chips of any {chip} slice. Change it")
    for arrangement in dividing:
        topology = f"{chip}:{arrangement}"
        chips = topologies.chips(topology)
        attempt = _attempt(config, topology, chips, batch_size // chips, progress)
        yield attempt
        if attempt.result is not None and attempt.result.fits:
            return


def _attempt(config: RunConfig, topology: str, chips: int, accumulate: int, progress: bool) -> Attempt:
    spread: Any = dataclasses.replace(
        config,
        mesh=MeshConfig(data=1, fsdp=chips),
        optimiser=dataclasses.replace(config.optimiser, accumulate=accumulate),
    )
    state_bytes = _state_bytes(spread, topology)
    if state_bytes > topologies.check(topology).memory_bytes:
        return Attempt(topology, spread, None, state_bytes)
    (result,) = aot_compile.compile_step(spread, topology, progress=progress)
    return Attempt(topology, spread, result, state_bytes)


def _state_bytes(config: RunConfig, topology: str) -> int:
    """Parameters, average, optimiser state, frozen parameters and gradients on one chip."""
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    state, frozen = objective_of(config).abstract_state(mesh)
    return report.shard_bytes((state, frozen, state.params))
