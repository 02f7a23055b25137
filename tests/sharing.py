"""Runs of one test file share their steps: traced, lowered and loaded once for each configuration and shape.

Otherwise each start of a run does all of it again, which is most of what a run of four steps takes. Where a start of
its own is what is tested, it is a process of its own (test_killing.py).
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from sdxl_jax.jsontree import to_json
from sdxl_jax.training import setup
from sdxl_jax.training.objectives.base import Objective

IRRELEVANT = ("checkpoint", "logging", "processes", "validation")
"""Sections of a configuration on which the step does not depend."""


class _Compiled:
    """The part of jax's `Lowered` that compiles."""

    def __init__(self, lowered: Any):
        self._lowered, self._compiled = lowered, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)

    def compile(self) -> Any:
        if self._compiled is None:
            self._compiled = self._lowered.compile()
        return self._compiled


class SharedStep:
    """A jitted step that is lowered and compiled once for each shape."""

    def __init__(self, jitted: Any):
        self._jitted, self._lowered = jitted, dict[Any, _Compiled]()

    def __call__(self, *arguments: Any) -> Any:
        return self._jitted(*arguments)

    def lower(self, *arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tree, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        if shapes not in self._lowered:
            self._lowered[shapes] = _Compiled(self._jitted.lower(*arguments))
        return self._lowered[shapes]


def _key(objective: Any) -> tuple[Any, str]:
    """Equal for configurations of the same programs."""
    values = {name: value for name, value in to_json(objective.config).items() if name not in IRRELEVANT}
    values["data"] = {name: value for name, value in values["data"].items() if name not in ("folder", "cache")}
    return type(objective), json.dumps(values, sort_keys=True)


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Inside the block, runs whose steps have the same configuration share them, and how they begin."""
    steps: dict[Any, SharedStep] = {}
    starts: dict[Any, Any] = {}
    make_step, make_start = setup.jitted, Objective.jitted_start

    def jitted(objective: Any, mesh: Any, abstract: Any) -> SharedStep:
        key = mesh, _key(objective)
        if key not in steps:
            steps[key] = SharedStep(make_step(objective, mesh, abstract))
        return steps[key]

    def jitted_start(objective: Any, *abstract: Any) -> Any:
        leaves, tree = jax.tree.flatten(abstract)
        key = tree, tuple(leaf.sharding for leaf in leaves), _key(objective)
        if key not in starts:
            starts[key] = make_start(objective, *abstract)
        return starts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "jitted", jitted)
        patch.setattr(Objective, "jitted_start", jitted_start)
        yield
