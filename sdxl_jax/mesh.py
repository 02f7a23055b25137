"""The configuration of the device mesh and of the processes. No jax, which the command line imports only after its
arguments are read; what the axes mean for parameters and batches is `sharding`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh; −1 fills one axis with the remaining devices."""

    data: int = -1
    """Data parallelism: copies of the parameters within a slice. Higher: more images per step, the same memory on each
    device."""
    fsdp: int = 1
    """Devices that one copy of the parameters is sharded over. Higher: less memory on each device, more
    communication."""
    tensor: int = 1
    """Tensor parallelism: devices that share the heads and hidden features of one image's transformers. Higher: batches
    smaller than the number of devices become possible; communication in every layer."""
    slices: int = 1
    """TPU slices (or groups of processes) connected by a slow network. Higher: more images per step; only the gradients
    are exchanged between slices, once per step."""


@dataclass(frozen=True)
class ProcessesConfig:
    """The processes that work together, as the environment describes them (training/cluster.py)."""

    join_timeout_seconds: float = 300.0
    """How long to wait for all processes to join. Higher: slower machines may start later."""
