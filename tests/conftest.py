"""What many test files need: quick compilation, asked for by `pytestmark = pytest.mark.usefixtures(...)`."""

from collections.abc import Iterator

import compiling
import pytest


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all tests and fixtures of a file."""
    with compiling.quick(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def quick_compilation_unless_slow(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """For the tests of a file, but not for its slow ones: those compile as users do."""
    if request.node.get_closest_marker("slow"):
        yield
        return
    with compiling.quick(tmp_path_factory.getbasetemp() / "compiled"):
        yield
