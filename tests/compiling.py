"""Quick compilation for tests that run whole programs, whose time is mostly compilation.

XLA's expensive passes are off, and a program that was compiled once is read from disk when another `jax.jit` needs it.
Results differ from those of optimised code in the last digits, but are repeatable bit for bit.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

PATHS = Path(__file__).parents[1], Path(__file__).parent
"""PYTHONPATH of a child process: this project and these tests."""


QUICK_FLAG = "--xla_cpu_use_fusion_emitters=false"
"""An unoptimised train step compiles in a fifth to a third less time with it."""

LIMIT_BYTES = 4 << 30
"""Size of the compilation cache above which it is emptied."""


def cache_folder(config: pytest.Config) -> Path:
    """The compilation cache of all test files, in all workers, kept from run to run in pytest's own cache."""
    assert config.cache is not None, "the plugin cacheprovider is on"
    return config.cache.mkdir("compiled")


def limit_size(folder: Path) -> None:
    if sum(path.stat().st_size for path in folder.iterdir()) > LIMIT_BYTES:
        shutil.rmtree(folder)
        folder.mkdir()


def set_quick_flags() -> None:
    """XLA's flags for quick compilation, of the whole process: call it before jax starts its backend."""
    if jax.__version_info__ >= (0, 11):
        return  # newer versions of XLA lack the flag, and end a process that sets it
    flags = os.environ.get("XLA_FLAGS", "")
    if QUICK_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK_FLAG}".strip()


def settings(cache: Path) -> dict[str, bool | int | str]:
    """jax's settings for quick compilation, with the compilation cache in the folder `cache`."""
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextlib.contextmanager
def quick(cache: Path) -> Iterator[None]:
    """Quick compilation inside the block; restores the settings at its end."""
    with _within(settings(cache)):
        yield


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Compilation with all optimisations and without a cache inside the block; restores the settings at its end."""
    with _within({"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": None}):
        yield


@contextlib.contextmanager
def _within(values: Mapping[str, bool | int | str | None]) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, bool | int | str | None]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # otherwise the previous folder stays in use


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """The environment of a child process with quick compilation, `devices` simulated devices, and our import path."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return (
        os.environ
        | {name.upper(): str(value) for name, value in settings(cache).items()}
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    )
