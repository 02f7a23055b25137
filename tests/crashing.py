"""A training that an exception ends between two steps."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from sdxl_jax import sharding


class Crash(Exception):
    pass


@contextlib.contextmanager
def crash_before(step: int) -> Iterator[None]:
    """The training within ends in an exception before the step, counted from 1, that it takes after its start."""
    steps = 0

    def put(mesh: Any, batch: Any, original: Any = sharding.put_batch) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            raise Crash
        return original(mesh, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(sharding, "put_batch", put)
        yield
