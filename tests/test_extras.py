"""The extras of pyproject.toml: one accelerator with any of the others can be installed, and what one stores another
reads."""

import importlib.metadata
import itertools
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ACCELERATORS = ("tpu", "cuda12", "cuda13")
ADDED = ("aot", "gcs", "k8s", "beam")


def requirements(*extras: str) -> set[Requirement]:
    """Of the package with these extras, those that name other extras of its own replaced by what they stand for."""
    found = set(map(Requirement, PROJECT["dependencies"]))
    for extra in extras:
        for line in EXTRAS[extra]:
            requirement = Requirement(line)
            own = requirement.name == PROJECT["name"]
            found |= requirements(*requirement.extras) if own else {requirement}
    return found


def test_there_is_an_extra_for_each_accelerator_and_cuda_is_the_newest() -> None:
    for name in ACCELERATORS:
        assert EXTRAS[name] == [f"jax[{name}]"]
    assert requirements("cuda") == requirements("cuda13")


def test_stored_programs_are_compiled_with_the_libtpu_that_reads_them() -> None:
    """Their key has libtpu's version (training/programs.py): both extras get it from jax, which pins one."""
    assert requirements("aot") == requirements("tpu")
    assert not [line for lines in EXTRAS.values() for line in lines if Requirement(line).name == "libtpu"]
    of_jax = map(Requirement, importlib.metadata.requires("jax") or [])
    (pinned,) = [
        each for each in of_jax if each.name == "libtpu" and each.marker and each.marker.evaluate({"extra": "tpu"})
    ]
    assert re.fullmatch(r"==\d+\.\d+\.\d+\.\*", str(pinned.specifier))


def contradictions(given: Iterable[Requirement]) -> list[str]:
    """Packages for which no version that is named satisfies all."""
    by_name = defaultdict[str, list[SpecifierSet]](list)
    for requirement in given:
        if requirement.marker is None or requirement.marker.evaluate():
            by_name[requirement.name.lower().replace("_", "-")].append(requirement.specifier)
    return [
        name
        for name, specifiers in by_name.items()
        if (named := [each.version.removesuffix(".*") for specifier in specifiers for each in specifier])
        and not any(all(specifier.contains(version) for specifier in specifiers) for version in named)
    ]


def test_no_extra_contradicts_another() -> None:
    assert contradictions([Requirement("libtpu==0.0.42.*"), Requirement("libtpu>=0.0.51")]) == ["libtpu"]
    for accelerator in (*ACCELERATORS, "cuda", "cpu"):
        assert not contradictions(requirements(accelerator, *ADDED))
    for pair in itertools.combinations(EXTRAS, 2):
        assert not contradictions(requirements(*pair)), pair


def resolved(extras: tuple[str, ...], python: str) -> dict[str, str]:
    """Versions by package, as the package index has them now for a Python on Linux."""
    command = ["pip", "compile", "-", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    done = subprocess.run(
        [shutil.which("uv") or "uv", *command],
        input="\n".join(map(str, requirements(*extras))),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_every_combination_of_extras_resolves(accelerator: str, python: str) -> None:
    """What resolves with all the others resolves with any of them."""
    found = resolved((accelerator, *ADDED), python)
    alone = resolved(("tpu",), python)
    assert {name: found[name] for name in ("jax", "jaxlib", "libtpu")} == {
        name: alone[name] for name in ("jax", "jaxlib", "libtpu")
    }
    plugins = {name for name in found if re.fullmatch(r"jax-cuda\d+-plugin", name)}
    assert plugins == ({f"jax-{accelerator}-plugin"} if accelerator != "tpu" else set())
    assert tuple(map(int, found["jax"].split(".")[:2])) >= ((0, 10) if python == "3.11" else (0, 12))
