"""The built wheel: it holds the package whole, says what it is, and runs where the checkout is not."""

import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sdxl_jax

PACKAGE = Path(sdxl_jax.__file__).parent
ROOT = PACKAGE.parent
DATA = {
    "py.typed",
    "conditioning/clip_merges.LICENSE",
    "conditioning/clip_merges.txt.gz",
    "quickstart/PICTURES.md",
    "quickstart/autoencoder.safetensors",
    "quickstart/pictures.zip",
}
"""All that is no module."""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program of this Python prints."""
    settings = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"} | environment
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=settings, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools builds in the folder of the sources, and takes along what an earlier build left."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "sdxl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=lambda *_: ["data", "parity", "__pycache__"])
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.with_name("installed")
    run("-m", "pip", "install", "--no-deps", "--no-compile", "--target", target, wheel, cwd=wheel.parent)
    return target


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert len(modules) > 100
    assert held == {f"sdxl_jax/{name}" for name in modules | DATA}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        information = next(name.split("/")[0] for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(f"{information}/METADATA"))
        programs = archive.read(f"{information}/entry_points.txt").decode()
        licences = [name for name in archive.namelist() if name.startswith(f"{information}/licenses/")]
    assert wheel.name == f"sdxl_jax-{project['version']}-py3-none-any.whl"
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("License-File") == project["license-files"]
    assert len(licences) == len(project["license-files"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert "sdxl-jax = sdxl_jax.__main__:program" in programs


def test_the_installed_wheel_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    there = {"PYTHONPATH": str(installed)}
    assert run("-m", "sdxl_jax", "--help", cwd=tmp_path, **there).startswith("usage: sdxl-jax COMMAND")
    program = "import sdxl_jax, sdxl_jax.__main__ as main; print(sdxl_jax.__file__, main.__file__, sep='\\n')"
    places = run("-c", program, cwd=tmp_path, **there).splitlines()
    assert places == [str(installed / "sdxl_jax" / name) for name in ("__init__.py", "__main__.py")]


def test_the_data_of_the_quickstart_can_be_opened_where_the_wheel_is_installed(installed: Path) -> None:
    package = installed / "sdxl_jax"
    assert {name for name in DATA if (package / name).read_bytes() == (PACKAGE / name).read_bytes()} == DATA
    with zipfile.ZipFile(package / "quickstart" / "pictures.zip") as archive:
        assert archive.testzip() is None
        assert len([name for name in archive.namelist() if name.endswith((".png", ".webp", ".jpg"))]) == 96
