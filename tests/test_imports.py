"""Imports point one way, between the boxes of `docs/sdxl.md`: checked on the syntax trees.

A new module needs a row in `ALLOWED`, unless its folder has one. Think twice before adding to a row.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import sdxl_jax
from sdxl_jax.__main__ import _COMMANDS

ROOT = Path(sdxl_jax.__file__).parent

BASE = {"arrays", "errors", "files", "processors", "progress", "sizes"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "allocator": set(),
    "sizes": set(),
    "mesh": set(),
    "arrays": set(),
    "files": {"files", "errors"},
    "progress": {"errors"},
    "processors": set(),
    "flops": set(),
    "sharding": {"mesh"} | BASE,
    "models": {"models", "adapters", "sharding"} | BASE,
    "diffusion": {"diffusion"} | BASE,
    "conditioning": {"conditioning", "models"} | BASE,
    "samplers": {"samplers", "diffusion"} | BASE,
    "adapters": {"adapters"} | BASE,
    "model": {"adapters", "conditioning", "diffusion", "models", "samplers.defaults", "samplers.guidance"} | BASE,
    "optim": {"optim"} | BASE,
    "data": {"data"} | BASE,
    "data.build": {"data"} | BASE,
    "jsontree": {"models", "diffusion.continuous"} | BASE,
    "config": {
        *("model", "conditioning", "diffusion", "models", "data", "evaluation.settings", "jsontree", "optim"),
        *("adapters", "mesh", "sharding"),
        *BASE,
    },
    "smoke": {"config", "model", "models", "conditioning", "sharding", "training.objectives"},
    "weights": {
        *("weights", "adapters", "jsontree"),
        *("model", "models", "conditioning", "diffusion", "samplers.defaults", "samplers.presets"),
        *("samplers.steps", "sharding"),
        *BASE,
    },
    "compilation": {"compilation"} | BASE,
    "sampling": {
        *("sampling", "model", "samplers", "conditioning", "models", "diffusion", "data.images", "data.transforms"),
        *("compilation", "sharding"),
        *BASE,
    },
    "aot": {
        *("aot", "flops", "config", "data", "model", "models", "conditioning", "samplers", "sampling", "optim"),
        *("sharding", "training.compilation", "training.objectives", "training.programs", "training.setup"),
        *BASE,
    },
    "training": set(),
    "training.state": {"adapters.targets", "optim.ema"} | BASE,
    "training.step": {"config", "arrays", "optim", "training.state"},
    "training.initial": {"config", "jsontree", "model", "samplers.defaults", "weights"} | BASE,
    "training.encoding": {
        *("config", "data", "jsontree", "model", "models", "conditioning", "weights.lazy", "sharding"),
        *("training.checksums", "training.initial", "training.state"),
        *("sampling.clip_images", "sampling.image_prompts", "weights.clip_vision"),
        *BASE,
    },
    "training.objectives": {
        *("config", "data", "model", "models", "conditioning", "diffusion", "optim", "sampling", "weights.lazy"),
        *("adapters", "evaluation", "weights.adapter_files", "weights.dinov2", "weights.eight_bits"),
        *("sharding", "flops", "training.encoding", "training.initial", "training.objectives"),
        *("training.processes", "training.state", "training.step"),
        "weights.textual_inversion",
        *("jsontree", "samplers"),  # a student is distilled for a sampler's timesteps
        *BASE,
    },
    "training.programs": {"files"},
    "training.compilation": {"config", "data", "training.programs", "compilation.traces"} | BASE,
    "training.cluster": BASE,
    "training.heartbeats": set(),
    "training.processes": {"training.cluster", "training.heartbeats"} | BASE,
    "training.run_directory": {
        *("config", "data", "jsontree", "model", "training.objectives", "training.status"),
        "weights.formats.checkpoints",
        *BASE,
    },
    "training.checksums": set(),
    "training.checkpoint": {
        *("sharding", "weights.formats", "training.checksums", "training.state"),
        *BASE,
    },
    "training.observe": {"training.observe"} | BASE,
    "training.observe.metrics": {"data.buckets", "training.observe"} | BASE,
    "training.observe.mfu": {"data.buckets", "flops"} | BASE,
    "training.observe.validation": {
        *("config", "data", "files", "progress", "model", "conditioning", "sampling.contact_sheet"),
        "sampling.nonfinite",
        *("training.objectives.base", "training.processes"),
    },
    "training.observe.scores": {
        *("data", "evaluation.scores", "model", "training.objectives.base", "training.processes"),
    },
    "training.save_timer": {"training.processes"},
    "training.status": {"training.observe.clock", "weights.formats.checkpoints"} | BASE,
    "training.setup": {"training", "compilation", "config", "data", "jsontree", "sharding"} | BASE,
    "training.loop": {
        *("training", "config", "data", "evaluation.settings", "jsontree", "model", "sampling.nonfinite", "sharding"),
        *BASE,
    },
    "evaluation": {
        *("evaluation", "sampling", "model", "conditioning", "models", "weights", "sharding"),
        *("data.folders", "data.images", "data.sources"),
        *BASE,
    },
    "finetuning": {
        *("finetuning", "config", "data", "model", "models", "adapters", "optim", "sharding"),
        *("compilation", "evaluation.class_images", "sampling.contact_sheet", "sampling.options", "training.loop"),
        *("training.objectives", "training.processes", "weights"),
        *BASE,
    },
    "serving": {"serving", "sampling", "model", "models", "conditioning", "samplers"} | BASE,
    # The package itself: the modules of its public names.
    "": {"evaluation.scores", "sampling", "training.loop", "weights"},
}
"""Which of our modules each module may import; the row with the longest matching prefix counts. A name includes all
modules below it."""
ANYTHING = ("quickstart", "__main__", "commands")

FLAX, NUMPY_ONLY, COMMAND_LINE = ("models",), ("data", "sampling.init_images"), ("__main__", "commands")
READS_ITS_ARGUMENTS = ("quickstart.make_images",)
"""Run by hand to make the shipped images."""


def modules() -> dict[str, Path]:
    """ "models.unet" -> its file; the package itself is ""."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in sorted(ROOT.rglob("*.py"))}
    return {".".join(name.parts).removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


MODULES = modules()


def within(name: str, boxes: object) -> bool:
    return any(name == box or name.startswith(f"{box}.") for box in boxes)  # pyright: ignore[reportGeneralTypeIssues]


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name of the module) of every import: at the top, in a function, or under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            is_package = module in MODULES and MODULES[module].name == "__init__.py"
            parents = f"sdxl_jax.{module}".split(".")
            start = parents[: len(parents) - node.level + is_package] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for full in (f"{base}.{alias.name}" for alias in node.names):
                yield node.lineno, full if full.removeprefix("sdxl_jax.") in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield node.lineno, "importlib.import_module"


def violations(module: str, source: str) -> list[str]:
    """The forbidden imports and calls of a module, one line each."""
    tree = ast.parse(source)
    found = []

    def report(line: int, violation: str) -> None:
        found.append(f"sdxl_jax.{module}, line {line}: {violation}")

    fitting = [box for box in ALLOWED if within(module, [box])]
    allowed = None if within(module, ANYTHING) else ALLOWED[max(fitting, key=len)] if fitting else set()
    for line, name in imported(module, tree):
        package, _, ours = name.partition(".")
        if package == "sdxl_jax":
            if allowed is not None and not within(ours, allowed):
                report(line, f"imports {name}, which is not allowed; see ALLOWED in {Path(__file__).name}")
        elif package in ("torch", "diffusers"):
            report(line, f"imports {package}, which is the reference of the tests alone")
        elif package == "flax" and not within(module, FLAX):
            report(line, "imports flax, which is confined to models/")
        elif package == "jax" and within(module, NUMPY_ONLY):
            report(line, "imports jax; numpy is enough for data and images")
        elif package in ("argparse", "tyro") and not within(module, COMMAND_LINE):
            report(line, f"imports {package}; arguments are parsed in __main__ and commands only")
        elif name == "importlib.import_module" and module:
            report(line, "imports by name, which checkers cannot follow")
    for node in ast.walk(tree):
        reads = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv"
        reads |= isinstance(node, ast.ImportFrom) and node.module == "sys" and "argv" in [a.name for a in node.names]
        if reads and not within(module, [*COMMAND_LINE, *READS_ITS_ARGUMENTS]):
            report(getattr(node, "lineno", 0), "reads sys.argv; arguments are parsed in __main__ only")
    return found


def box_of(name: str) -> str:
    """The box of a module: its folder, or itself at the root. `data.build` is separate from `data`."""
    return "data.build" if within(name, ["data.build"]) else name.split(".")[0]


def arrows(sources: Mapping[str, str]) -> set[tuple[str, str]]:
    """(box, box that it imports) for modules given by name and source."""
    found = set()
    for module, source in sources.items():
        for _, name in imported(module, ast.parse(source)):
            package, _, ours = name.partition(".")
            if package == "sdxl_jax" and ours:
                found.add((box_of(module), box_of(ours)))
    return {(one, other) for one, other in found if one != other and one}


def cycle(edges: set[tuple[str, str]]) -> list[str]:
    """The boxes on cycles of imports, or on a path between cycles."""
    left = {box for edge in edges for box in edge}
    while True:
        inner = {
            box
            for box in left
            if any(one == box and other in left for one, other in edges)
            and any(other == box and one in left for one, other in edges)
        }
        if inner == left:
            return sorted(left)
        left = inner


def test_boxes_import_each_other_in_one_direction() -> None:
    edges = arrows({module: path.read_text() for module, path in MODULES.items()})
    assert len(edges) > 50, "the walk found the imports"
    assert not (round_trip := cycle(edges)), f"boxes that import each other in a cycle: {', '.join(round_trip)}"


def test_a_planted_cycle_of_boxes_is_found() -> None:
    sources = {
        "weights.open": "from sdxl_jax.config import differences",
        "config": "def late():\n    from sdxl_jax.training import state",
        "training.state": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sdxl_jax.weights import open",
        "training.loop": "from sdxl_jax.training import state",
        "arrays": "import numpy",
    }
    assert cycle(arrows(sources)) == ["config", "training", "weights"]
    assert cycle(arrows({**sources, "config": ""})) == []


def test_every_import_is_allowed() -> None:
    assert len(MODULES) > 30, "the walk found the package"
    found = [line for module, path in MODULES.items() for line in violations(module, path.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_every_name_in_the_table_is_a_module() -> None:
    named = {*ALLOWED, *ANYTHING, *FLAX, *NUMPY_ONLY, *COMMAND_LINE, *READS_ITS_ARGUMENTS}
    named |= {name for row in ALLOWED.values() for name in row}
    assert named <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diffusion.loss", "from sdxl_jax.models import unet"),
        ("diffusion.loss", "from sdxl_jax.samplers.steps import SAMPLERS"),
        ("data.pipeline", "import sdxl_jax.conditioning.text"),
        ("data.pipeline", "import jax.numpy as jnp"),
        ("sampling.init_images", "import jax"),
        ("data.pipeline", "def late():\n    from jax import numpy"),
        ("models.unet", "from sdxl_jax import config"),
        ("models.unet", "from ..diffusion import schedule"),
        ("models", "from .. import diffusion"),
        ("conditioning.text", "from sdxl_jax.diffusion.schedule import make"),
        ("samplers.loop", "from sdxl_jax.models.unet import apply"),
        ("model", "from sdxl_jax.samplers import loop"),
        ("model", "from sdxl_jax.samplers.steps import SAMPLERS"),
        ("sampling.generate", "from sdxl_jax.training import loop"),
        ("sampling.generate", "from sdxl_jax.weights import load"),
        ("weights.names", "from sdxl_jax.sampling.generate import generate"),
        ("sharding", "from sdxl_jax.models import unet"),
        ("training.step", "from sdxl_jax.sharding import make_mesh"),
        ("training.step", "from sdxl_jax.training.loop import train"),
        ("training.step", "from .checkpoint import restore"),
        ("training.loop", "from sdxl_jax.evaluation.prompt_accuracy import hits"),
        ("training.loop", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sdxl_jax import quickstart"),
        ("evaluation.prompt_accuracy", "from sdxl_jax.training.checkpoint import restore"),
        ("evaluation.a_new_score", "from sdxl_jax import config"),
        ("training.a_new_module", "from sdxl_jax import arrays"),
        ("a_new_module", "from sdxl_jax import arrays"),
        ("training.state", "import flax.linen as nn"),
        ("quickstart.run", "from flax import linen"),
        ("weights.formats.safetensors", "import torch"),
        ("__main__", "from diffusers.models import AutoencoderKL"),
        ("config", "import tyro"),
        ("quickstart.recipe", "from argparse import ArgumentParser"),
        ("training.loop", "import sys\nprint(sys.argv[1])"),
        ("quickstart.run", "from sys import argv"),
        ("config", "import importlib\nimportlib.import_module('sdxl_jax.training.loop')"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert found[0].startswith(f"sdxl_jax.{module}, line {len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.unet", "import flax.linen as nn\nfrom .layers import conv\nfrom sdxl_jax import arrays"),
        ("models", "from . import unet"),
        ("model", "from sdxl_jax.samplers.guidance import Conditioning\nfrom sdxl_jax.samplers import guidance"),
        ("evaluation.a_new_score", "from sdxl_jax.evaluation import prompt_accuracy\nimport jaxtyping, flaxen"),
        ("quickstart.run", "from sdxl_jax.training import loop\nfrom sdxl_jax import evaluation"),
        ("quickstart.make_images", "import sys\nprint(sys.argv)"),
        ("__main__", "import sys, tyro\nprint(sys.argv)"),
        ("data.transforms", "import sys\nfrom sdxl_jax.arrays import Batch\nprint(sys.platform)"),
    ],
)
def test_allowed_imports_are_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, sdxl_jax; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(done.stdout.split())
    assert "sdxl_jax" in loaded
    assert not loaded & {"transformers", "orbax", "jax", "flax", "grain", "numpy"}


def test_help_of_every_command_imports_nothing_heavy() -> None:
    given = [[*name, "--help"] for name in (*[[name] for name in _COMMANDS], ["data", "build"], ["data", "inspect"])]
    heavy = {"jax", "flax", "numpy", "transformers"}
    program = f"""import contextlib, sys
from sdxl_jax.__main__ import main
for given in {given}:
    with contextlib.suppress(SystemExit):
        main(given)
    print(given, *sorted({heavy} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    for each in given:
        assert f"\n{each}\n" in done.stdout


def test_training_starts_without_tensorboardx_and_what_it_imports() -> None:
    program = "import sys, sdxl_jax.training.loop; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(done.stdout.split())
    assert "orbax" in loaded
    assert not loaded & {"tensorboardX", "torch", "transformers"}


def test_files_imports_nothing_heavy() -> None:
    names = ", ".join(f"sdxl_jax.{module}" for module in MODULES if within(module, ["files"]))
    program = f"import sys, {names}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert not set(done.stdout.split()) & {"jax", "numpy", "fsspec", "google", "orbax", "grain"}


def test_importing_all_of_weights_imports_no_optimiser_no_checkpointer_and_no_image_library() -> None:
    modules = [name for name in MODULES if within(name, ["weights"])]
    assert "weights.formats.orbax" in modules and "weights.convert" in modules
    program = f"import sys, importlib\nfor name in {modules}: importlib.import_module('sdxl_jax.' + name)\n"
    program += "print(*sorted({'.'.join(name.split('.')[:2]) for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(done.stdout.split())
    assert "sdxl_jax.weights" in loaded
    assert not loaded & {"optax", "orbax", "orbax.checkpoint", "cv2", "sdxl_jax.training", "sdxl_jax.config"}


def test_public_names_resolve_and_have_docstrings() -> None:
    assert sorted(sdxl_jax.__all__) == list(sdxl_jax.__all__)
    for name in sdxl_jax.__all__:
        value = getattr(sdxl_jax, name)
        assert callable(value), name
        assert (value.__doc__ or "").strip(), name
        assert value.__name__ == name
        assert value.__module__ in [f"sdxl_jax.{module}" for module in MODULES]


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'text_to_imgae'"):
        getattr(sdxl_jax, "text_to_imgae")  # noqa: B009 (pyright would report the attribute)


def test_every_module_has_a_docstring() -> None:
    for module, path in MODULES.items():
        source = path.read_text()
        if source:
            assert ast.get_docstring(ast.parse(source)), f"sdxl_jax.{module} has no docstring"


@pytest.mark.parametrize("module", ["diffusion.loss", "data.buckets", "errors"])
def test_modules_of_the_table_are_those_that_python_imports(module: str) -> None:
    assert importlib.import_module(f"sdxl_jax.{module}").__file__ == str(MODULES[module])
