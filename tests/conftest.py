"""What all tests have: quick compilation, with compiled programs kept from run to run, and the longest files first."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import bucket_server
import checking
import compiling
import pytest
import starting

checking.install()
starting.collect_rarely()


LONG = (
    "test_killing",
    "test_training",
    "test_cli",
    "test_image_parity",
    "test_sharding",
    "test_autoencoding",
    "test_encoding",
    "test_models",
)
"""Files whose tests take longest, the longest first. They run first, so that no worker runs them alone at the end."""


# torch's threads on top of the workers' would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.option.markexpr:  # slow tests compile with all optimisations
        compiling.set_quick_flags()
    if not hasattr(config, "workerinput"):  # the process that starts the workers, which inherit its environment
        compiling.limit_size(compiling.cache_folder(config))
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sdxl-jax-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _quick_compilation(pytestconfig: pytest.Config) -> Iterator[None]:
    with compiling.quick(compiling.cache_folder(pytestconfig)):
        yield


@pytest.fixture(autouse=True)
def _full_compilation_of_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests compile as users do, unless their file uses `quick_compilation`."""
    if not request.node.get_closest_marker("slow") or "quick_compilation" in request.fixturenames:
        yield
        return
    with compiling.full():
        yield


@pytest.fixture(scope="module")
def quick_compilation() -> None:
    """Quick compilation for slow tests too: `pytestmark = pytest.mark.usefixtures("quick_compilation")`."""


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Path:
    """The compilation cache, for child processes."""
    return compiling.cache_folder(pytestconfig)


@pytest.fixture(scope="session")
def _bucket_server() -> Iterator[str]:
    with bucket_server.serving() as url, bucket_server.in_environment(url):
        yield url


@pytest.fixture
def bucket(_bucket_server: str) -> str:
    """gs://NAME of a new bucket on loopback."""
    from google.cloud import storage

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    storage.Client(project="project").create_bucket(name)
    return f"gs://{name}"


@pytest.fixture(scope="module")
def shared_steps() -> Iterator[None]:
    """`pytestmark = pytest.mark.usefixtures("shared_steps")` for files with many runs of one configuration."""
    import sharing  # late: it imports the package

    with sharing.shared_steps():
        yield
