"""Executes a notebook of this folder and keeps what a reader wants to see of its outputs.

    python notebooks/execute.py quickstart
    python notebooks/execute.py quickstart --folder smoke --set STEPS=3 --out smoke/quickstart.ipynb

Cells say by their tags what happens to them:

    skip-in-tests   not executed here: installation
    parameters      followed by the assignments of --set
    keep-output     keeps its images, as JPEGs, and the text that it prints; all other cells keep nothing

Execution counts and metadata are removed, so that executing again changes the file only where outputs differ.
"""

import argparse
import base64
import copy
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode, v4
from PIL import Image

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CHECK = "\nassert _exit_code == 0, f'exit code {_exit_code}'"
"""Follows a cell with shell commands, whose failure alone would not end the notebook."""


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def execute(notebook: NotebookNode, folder: Path, assignments: Sequence[str] = ()) -> NotebookNode:
    """A tidy copy of the notebook with the outputs of an execution in `folder`. Raises nbclient's CellExecutionError
    for a cell that fails.

    assignments: Python statements that follow the parameters.
    """
    result, cells = copy.deepcopy(notebook), [v4.new_code_cell("_exit_code = 0")]
    for cell in copy.deepcopy(notebook.cells):
        if cell.cell_type != "code" or "skip-in-tests" in tags(cell):
            continue
        if re.search(r"^\s*!", cell.source, re.MULTILINE):
            cell.source += CHECK
        cells.append(cell)
        if "parameters" in tags(cell):
            cells.append(v4.new_code_cell("\n".join(assignments)))
    running = v4.new_notebook(cells=cells, metadata=METADATA)
    folder.mkdir(parents=True, exist_ok=True)
    NotebookClient(running, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = {cell.id: cell.outputs for cell in cells}
    for cell in result.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs.get(cell.id, [])
    return tidy(result)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """A copy without execution counts, without outputs other than those to keep, and without metadata but tags."""
    result = copy.deepcopy(notebook)
    result.metadata = nbformat.from_dict(METADATA)
    for cell in result.cells:
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        if cell.cell_type == "code":
            cell.execution_count = None
            kept = map(_kept, cell.outputs) if "keep-output" in tags(cell) else ()
            cell.outputs = [output for output in kept if output is not None]
    return result


def _kept(output: NotebookNode) -> NotebookNode | None:
    """What stays of an output: its image, or the text that the cell printed."""
    data = output.get("data", {})
    if "image/png" in data:
        return v4.new_output("display_data", {"image/jpeg": _jpeg(data["image/png"])})
    if "image/jpeg" in data:
        return output
    if output.get("name") == "stdout":
        return v4.new_output("stream", name="stdout", text=output.text)
    return None


def _jpeg(png: str) -> str:
    """A PNG as a JPEG, which takes a fraction of the bytes; both in base64, as in a notebook."""
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute a notebook and keep the outputs that a reader wants to see.")
    parser.add_argument("name", choices=sorted(path.stem for path in HERE.glob("*.ipynb")))
    parser.add_argument("--folder", type=Path, default=HERE, help="where it runs; default: beside the notebook")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a parameter")
    parser.add_argument("--out", type=Path, help="the executed notebook; default: the notebook itself")
    arguments = parser.parse_args()
    path = HERE / f"{arguments.name}.ipynb"
    # Commands of the notebook are those of this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    result = execute(nbformat.read(path, as_version=4), arguments.folder, arguments.set)
    nbformat.write(result, arguments.out or path)


if __name__ == "__main__":
    main()
