"""`jit`: `jax.jit` for functions that a command calls a few times. A later command reads the compiled program, and does
not trace the function again.

    arguments ── shapes, shardings, static arguments ── program ── in memory, or in the cache, or compiled and kept

Where no compilation cache is in use (`compilation_cache.use`), and in one of several processes, whose devices have
other numbers than those of the process that kept a program, it is `jax.jit`.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from sdxl_jax.compilation import compilation_cache, traces


class jit:
    """A pure function with static arguments, which are given by keyword; no argument is donated."""

    def __init__(self, function: Callable[..., Any], static_argnames: tuple[str, ...]):
        functools.update_wrapper(self, function)
        self._static = static_argnames
        self.jitted: Any = jax.jit(function, static_argnames=static_argnames)
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        cache = compilation_cache.current()
        if cache is None or jax.process_count() > 1:
            return self.jitted(*arguments, **keywords)
        static = {name: keywords.pop(name) for name in self._static}
        leaves, tree = jax.tree.flatten((arguments, keywords))
        mesh = jax.sharding.get_abstract_mesh()
        kinds = ((leaf.shape, leaf.dtype, traces.placement(leaf)) for leaf in leaves)
        key = (cache, *static.values(), mesh, tree, *kinds)
        if (program := self._programs.get(key)) is None:
            fixed = {"function": self.jitted.__qualname__, "static": repr(static), "mesh": repr(mesh)}
            known = traces.fingerprint(fixed, devices := _devices(leaves))
            if known is None:
                return self.jitted(*arguments, **keywords, **static)
            kept = traces.Traces(cache, known, devices)
            if (program := kept.read((arguments, keywords))) is None:
                lowered = self.jitted.lower(*arguments, **keywords, **static)
                with kept.recorded((arguments, keywords)) as programs:
                    programs.append(program := lowered.compile())
            self._programs[key] = program
        return program(*arguments, **keywords)

    def _cache_size(self) -> int:
        """Programs in memory, as jax's own."""
        return self.jitted._cache_size() + len(self._programs)


def _devices(leaves: list[Any]) -> list[Any]:
    """Those of the first array that is placed; else the default one."""
    placed = (leaf.sharding for leaf in leaves if traces.placement(leaf) is not None)
    devices = next((each.device_set for each in placed), jax.devices()[:1])
    return sorted(devices, key=lambda device: device.id)
