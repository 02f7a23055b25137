"""glibc's allocator, set to keep freed memory for the process.

On a CPU, XLA frees its temporary buffers after every step. glibc returns large ones to the kernel, which clears each of
their pages again when the next step touches it: a fifth of the time of a train step. Kept, they are reused.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = (
    (_ARENA_MAX, 1),  # other arenas map large blocks whatever _MMAP_MAX says
    (_MMAP_MAX, 0),  # large blocks come from the heap
    (_TRIM_THRESHOLD, -1),  # whose end is never returned
    (_TOP_PAD, 2**28),  # and which grows in steps of 256 MiB
)
_USERS_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Beginnings of environment variables that choose an allocator or its settings."""
_ACCELERATORS = ("dev/accel*", "dev/vfio/[0-9]*", "proc/driver/nvidia/gpus/*")
"""Files of a machine with TPUs or NVIDIA GPUs."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Makes glibc keep freed memory, so that the process stays at the size of its peak. Returns whether it did.

    Call it before the process has threads. Nothing changes on another C library, where the user chose an allocator or
    its settings in the environment, or where TPUs or NVIDIA GPUs do the work.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(_USERS_OWN) for name in environment):
        return False
    if environment.get("JAX_PLATFORMS") != "cpu" and any(any(root.glob(files)) for files in _ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(*setting) for setting in _SETTINGS])
