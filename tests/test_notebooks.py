"""The notebooks run, with few steps and small models, and what is stored of them is clean.

Not tested: installation, and the full size, which need a network and an accelerator.
"""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import compiling
import nbformat
import numpy as np
import pytest
import real_data
import tiny
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode, v4
from PIL import Image
from test_docs import links, replaced_words

from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.config import TrainConfig, load
from sdxl_jax.evaluation import weights
from sdxl_jax.smoke import smoke_config
from sdxl_jax.weights.convert import convert

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
LIMIT_BYTES = 300_000
TEXT_LIMIT = 2000
"""Characters that a cell may keep."""
LOCAL = r"(?<![\w.:/~])/(?:home|root|tmp|work|usr|opt|mnt|content|Users|var|dev)\b|\b[A-Z]:\\|localhost|127\.0\.0\.1"
"""Absolute paths and names of machines."""

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def load_execute():
    specification = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


execute = load_execute()


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def faults(notebook: NotebookNode, text: str) -> list[str]:
    """What should not be stored. text: the notebook's file."""
    found = [] if text == nbformat.writes(execute.tidy(notebook)) + "\n" else ["not tidy"]
    for cell in notebook.cells:
        kept = "".join(output.get("text", "") for output in cell.get("outputs", []))
        found += [match[0] for match in re.finditer(rf"{LOCAL}|git clone", cell.source + kept)]
        found += [f"{cell.id} keeps much text"] * (len(kept) > TEXT_LIMIT)
        found += [f"{cell.id} keeps an error"] * ("Traceback" in kept)
    return found


# What is stored


def test_the_list_of_notebooks_is_complete() -> None:
    assert re.findall(r"^\| \[\w+\]\((\w+)\.ipynb\)", (FOLDER / "README.md").read_text(), re.M) == [
        "quickstart",
        "sample_sdxl",
        "train_on_your_images",
        "finetune_a_lora",
        "size_and_crop_conditioning",
        "table_2_in_small",
        "weights_in_and_out",
        "captions_to_shards",
        "before_you_pay",
    ]
    assert len(PATHS) == 9


@each_notebook
def test_stored_notebooks_are_clean_and_small(path: Path) -> None:
    assert path.stat().st_size <= LIMIT_BYTES
    nbformat.validate(read(path))
    assert faults(read(path), path.read_text()) == []


def test_what_should_not_be_stored_is_found() -> None:
    output = v4.new_output("stream", name="stdout", text="Traceback of /home/someone/x.py\n" + "x" * TEXT_LIMIT)
    cell = v4.new_code_cell("1", id="a", metadata={"tags": ["keep-output"]}, outputs=[output])
    notebook = execute.tidy(v4.new_notebook(cells=[cell]))
    found = faults(notebook, nbformat.writes(notebook) + "\n")
    assert found == ["/home", "a keeps much text", "a keeps an error"]
    for change in ({"execution_count": 3}, {"metadata": nbformat.from_dict({"tags": [], "scrolled": True})}):
        notebook = v4.new_notebook(cells=[v4.new_code_cell("1", id="a")], metadata=execute.METADATA)
        notebook.cells[0].update(change)
        assert faults(notebook, nbformat.writes(notebook) + "\n") == ["not tidy"]


@each_notebook
def test_the_first_cell_replaces_jax_with_its_plugin_and_the_second_has_the_parameters(path: Path) -> None:
    install, parameters, *others = code(read(path))
    assert execute.tags(install) == ["skip-in-tests"]
    assert execute.tags(parameters) == ["parameters"]
    assert not any({"skip-in-tests", "parameters"} & set(execute.tags(cell)) for cell in others)
    commands = [line for line in install.source.splitlines() if "pip install" in line]
    assert len(commands) == 1
    assert "jax" not in re.findall(r"^import (\w+)", install.source, re.M)
    extras = {"tpu", "cuda12", "cpu"}
    assert extras <= set(re.findall(r'"(\w+)"', install.source))
    extras |= set(re.findall(r",(\w+)\]", commands[0]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras <= set(project["optional-dependencies"])


@each_notebook
def test_prose_has_links_that_lead_somewhere_and_the_words_of_the_glossary(path: Path) -> None:
    text = prose(read(path))
    assert text.startswith("# ")
    assert [target for target in links(text) if not (FOLDER / target).exists()] == []
    assert replaced_words(text) == []


def test_the_readme_of_the_notebooks_has_links_that_lead_somewhere_and_the_words_of_the_glossary() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [target for target in links(text) if not (FOLDER / target).exists()] == []
    assert replaced_words(text) == []


# What runs


Run = Callable[..., NotebookNode]


@pytest.fixture
def run(tmp_path: Path, compiled: Path) -> Run:
    """Executes a notebook in a folder, by default a new one, with assignments to its parameters."""

    def run(name: str, *assignments: str, folder: Path = tmp_path) -> NotebookNode:
        out = tmp_path / f"{name}.out.ipynb"
        command = [sys.executable, FOLDER / "execute.py", name, "--folder", folder, "--out", out]
        command += [word for assignment in assignments for word in ("--set", assignment)]
        environment = compiling.environment(compiled)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
        return read(out)

    return run


def images(notebook: NotebookNode) -> int:
    """The number of images that a notebook keeps."""
    return sum("image/jpeg" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)


def text_of(notebook: NotebookNode, cell: str) -> str:
    """The text that a cell keeps."""
    (found,) = (each for each in code(notebook) if each.id == cell)
    return "".join(output.text for output in found.outputs)


@pytest.mark.slow
def test_captions_to_shards_runs(run: Run) -> None:
    notebook = run("captions_to_shards")
    assert "96 images, 96 captions, 2 refused" in text_of(notebook, "build")
    assert images(notebook) == 2


@pytest.mark.slow
def test_weights_in_and_out_runs(run: Run, tmp_path: Path) -> None:
    config = smoke_config(load(ROOT / "configs" / "finetune_1024.py", TrainConfig)).model
    convert(tiny.random_model(config, 0), tmp_path / "model", "orbax", progress=False)
    notebook = run("weights_in_and_out", "MODEL = 'model'", "SIZE = 32, 32", "STEPS = 2")
    assert text_of(notebook, "exact").count("tensors equal") == 4
    assert images(notebook) == 1


def test_a_shell_command_that_fails_ends_the_notebook(tmp_path: Path) -> None:
    notebook = v4.new_notebook(cells=[v4.new_code_cell("!exit 3")])
    with pytest.raises(CellExecutionError, match="exit code 3"):
        execute.execute(notebook, tmp_path)


@pytest.mark.slow
def test_sample_sdxl_runs_with_base_and_refiner(run: Run, tmp_path: Path) -> None:
    base = tiny.random_model(tiny.MODEL, 0)
    refiner = dataclasses.replace(
        tiny.MODEL,
        unet=dataclasses.replace(tiny.MODEL.unet, context_dim=8, vector_dim=8 + 5 * 4),
        text=tiny.MODEL.text[1:],
        micro=MicroConfig(Numbers.SIZE_CROP_AESTHETIC, embedding_dim=4),
    )
    convert(base, tmp_path / "base", "orbax", progress=False)
    convert(tiny.random_model(refiner, 1), tmp_path / "refiner", "orbax", progress=False)
    notebook = run("sample_sdxl", "MODEL = 'base'", "REFINER = 'refiner'", "SIDE = 32", "STEPS = 10")
    assert images(notebook) == 6


@pytest.mark.slow
def test_quickstart_and_those_that_begin_from_its_model_run(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "together"
    assert images(run("quickstart", "STEPS = 3", "SAMPLING_STEPS = 2", folder=folder)) == 4
    few = ["STEPS = 2", "SIDE = 64"]
    assert images(run("size_and_crop_conditioning", *few, "CROPS = [0, 16]", folder=folder)) == 2
    notebook = run("train_on_your_images", *few, "SAMPLING_STEPS = 2", folder=folder)
    assert images(notebook) == 3
    assert "24 images found, 24 usable, 0 refused" in text_of(notebook, "inspect")
    notebook = run("finetune_a_lora", "STEPS = 5", "SIDE = 64", "SAMPLING_STEPS = 2", folder=folder)
    assert images(notebook) == 5
    assert "56 modules of unet, rank 16" in text_of(notebook, "list")


def write_cifar(folder: Path) -> None:
    """CIFAR-10 as table 2 reads it, of noise: 800 images to train with and 50 others."""
    rng, numbers = np.random.default_rng(0), {"train": 800, "test": 50}
    folder.mkdir()
    for part, files in (("train", [f"data_batch_{number}" for number in range(1, 6)]), ("test", ["test_batch"])):
        count = numbers[part] // len(files)
        for file in files:
            image = rng.integers(0, 256, (count, 32 * 32, 3), np.uint8)
            Image.fromarray(image).save(folder / f"{file}.png")
        labels = [number % 10 for number in range(numbers[part])]
        (folder / f"{part}_lables.json").write_text(json.dumps(labels))


@pytest.mark.slow
def test_table_2_in_small_runs(run: Run, tmp_path: Path) -> None:
    inception = real_data.metric_file("inception.safetensors")
    weights.folder().mkdir(parents=True, exist_ok=True)
    weights.path_of("inception").symlink_to(inception)
    write_cifar(tmp_path / "cifar")
    few = ["CIFAR10 = 'cifar'", "STEPS = 8", "SAMPLES = 20", "REFERENCE = 50", "GUIDANCE = '1 2'"]
    few += ["FINAL = '--final 2 --final-samples 20 --seeds 2'"]
    notebook = run("table_2_in_small", f"EXPERIMENTS = {str(ROOT / 'experiments')!r}", *few)
    assert "data_blurred" in text_of(notebook, "bound-table")
    assert text_of(notebook, "table").count("nocond") == 2 + 4  # two scales; two seeds, their mean and deviation
    assert images(notebook) == 2


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_before_you_pay_runs(run: Run) -> None:
    notebook = run("before_you_pay")
    assert "fits" in text_of(notebook, "report")
    assert "mesh.fsdp" in text_of(notebook, "mesh")
    assert images(notebook) == 1
