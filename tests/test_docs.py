"""The documents say what is there: the boxes of `docs/sdxl.md` are the folders, and links lead somewhere."""

import re
from pathlib import Path

import pytest

import sdxl_jax

PACKAGE = Path(sdxl_jax.__file__).parent
ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "sdxl.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

CODE = ("sdxl_jax", "tests", "benchmarks", "configs")

COMING = {"adapters/"}
"""What the page describes and other changes bring: a name leaves this list with the change that brings it."""


def table_rows() -> list[list[str]]:
    """The cells of the rows under `| box |`."""
    lines = PAGE.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| box |")) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def folders() -> list[str]:
    """ "data/build/" and so on: every folder of the package that holds Python."""
    found = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - {Path()}
    return sorted(f"{path.as_posix()}/" for path in found)


def missing(names: set[str]) -> list[str]:
    return sorted(name for name in names - COMING if not (PACKAGE / name).exists())


def links(text: str) -> list[str]:
    """Targets of Markdown links and images that are files of ours, without the place within them."""
    found = re.findall(r"\]\(<?([^)\s>]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [target.split("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


def test_every_folder_of_the_package_is_a_box_of_the_table_and_of_the_diagram() -> None:
    boxes = [row[0].strip("`") for row in table_rows()]
    diagram = PAGE.split("```")[1]
    assert len(boxes) == len(set(boxes)) > 10
    assert [folder for folder in folders() if folder not in boxes] == []
    assert [box for box in boxes if not re.search(rf"(?<![\w/]){box}(?!\w)", diagram)] == []


def test_every_file_at_the_root_of_the_package_is_named_on_the_page() -> None:
    assert [path.name for path in sorted(PACKAGE.glob("*.py")) if f"`{path.name}`" not in PAGE] == []


def test_every_box_that_the_page_names_exists() -> None:
    diagram = PAGE.split("```")[1]
    named = set(re.findall(r"`([a-z_/]+/)`", PAGE)) | set(re.findall(r"(?<![\w/])([a-z_/]+/)(?=\s|$)", diagram))
    assert len(named) > 10
    assert missing(named) == []


def test_every_module_that_the_table_names_exists() -> None:
    named = {f"{row[0].strip('`')}{name}.py" for row in table_rows() for name in re.findall(r"`([a-z_]+)`", row[2])}
    assert len(named) > 50
    assert missing(named) == []
    assert missing({"data/", "gone/", "data/gone.py"}) == ["data/gone.py", "gone/"]


def test_every_member_of_an_objective_that_the_page_names_exists() -> None:
    table = PAGE.split("| member |")[1].split("\n\n")[0].splitlines()[2:]
    named = {name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    base = (PACKAGE / "training" / "objectives" / "base.py").read_text()
    assert len(named) >= len(table) == 8
    assert [name for name in sorted(named) if not re.search(rf"def {name}\(|self\.{name} = ", base)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_that_are_there(path: Path) -> None:
    targets = links(path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_paths_of_ours_that_documents_and_docstrings_name_are_there() -> None:
    """`training/step.py`, docs/guides/data.md and so on; what begins with no folder of ours is somebody else's."""
    ours = {path.name for folder in (ROOT, PACKAGE) for path in folder.iterdir() if path.is_dir()}
    lost = []
    code = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    for path in [*DOCUMENTS, *code]:
        for name in re.findall(r"(?<![\w/.{}-])(?:[\w-]+/)+[\w-]+\.(?:py|md)\b", path.read_text()):
            if name.split("/")[0] in ours and not any((folder / name).exists() for folder in (ROOT, PACKAGE)):
                lost.append(f"{path.relative_to(ROOT)}: {name}")
    assert lost == []


def test_the_page_on_flax_counts_the_files_that_import_it() -> None:
    numbers = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    count = sum(bool(re.search(r"^(import|from) flax", path.read_text(), re.M)) for path in PACKAGE.rglob("*.py"))
    assert f"{numbers[count]} files would change" in (ROOT / "docs" / "decisions" / "linen.md").read_text()


def test_links_are_found() -> None:
    text = "[a](a.md#part) ![b](images/b.png) [c](https://x.org/c.md) [d](#part) [e](mailto:e)\n```\n[f](f)\n```"
    assert links(text) == ["a.md", "images/b.png"]
    assert links((ROOT / "README.md").read_text())
