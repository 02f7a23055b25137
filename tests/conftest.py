"""What many test files need: quick compilation, asked for by `pytestmark = pytest.mark.usefixtures(...)`."""

import gc
from collections.abc import Iterator

import compiling
import pytest

# Python looks through all objects for cycles, and traced programs are millions of them: a sixth of the time went there.
gc.set_threshold(100_000, 50, 1000)


LONG = ("test_training", "test_killing", "test_sharding", "test_cli", "test_encoding")
"""Files whose tests take minutes: they begin first, or one worker would have them alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all tests and fixtures of a file."""
    with compiling.quick(compiling.shared(tmp_path_factory)):
        yield


@pytest.fixture
def quick_compilation_unless_slow(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """For the tests of a file, but not for its slow ones: those compile as users do."""
    if request.node.get_closest_marker("slow"):
        yield
        return
    with compiling.quick(compiling.shared(tmp_path_factory)):
        yield
