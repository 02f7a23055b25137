"""Quick compilation for tests that run whole programs. What such a test costs is compiling, not computing.

XLA's costly passes are off, and a program that was compiled once is read from disk when another `jax.jit` needs it.
Results differ from those of optimised code in the last digits, and repeat bit for bit all the same.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

PATHS = Path(__file__).parents[1], Path(__file__).parent
"""Where a child process finds this project and these tests."""


def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all files, of all workers, keep what they compiled."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


def settings(cache: Path) -> dict[str, bool | int | str]:
    """jax's settings for it, with compiled programs kept in the folder `cache`."""
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextlib.contextmanager
def quick(cache: Path) -> Iterator[None]:
    """Quick compilation inside the block, what was set before it afterwards."""
    before = {name: jax.config.values[name] for name in settings(cache)}
    try:
        _set(settings(cache))
        yield
    finally:
        _set(before)


def _set(values: dict[str, bool | int | str]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or the folder of before is kept


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """The environment of a child process that compiles so, with so many simulated devices, and imports as we do."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return (
        os.environ
        | {name.upper(): str(value) for name, value in settings(cache).items()}
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    )
