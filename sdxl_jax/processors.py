"""The processors of this host."""

import os


def usable() -> int:
    """Number of processors that this process may use: those of its affinity where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
