"""The documents say what is there: the boxes of `docs/sdxl.md` are the folders, links lead somewhere, the site builds
in strict mode, and the words are those of the glossary."""

import dataclasses
import enum
import importlib.util
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdxl_jax

PACKAGE = Path(sdxl_jax.__file__).parent
ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "sdxl.md").read_text()
README = (ROOT / "README.md").read_text()
AT_ROOT = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS = [*AT_ROOT, *sorted((ROOT / "docs").rglob("*.md"))]

CODE = ("sdxl_jax", "tests", "benchmarks", "configs", "experiments")

COMING: set[str] = set()
"""What the page describes and other changes bring: a name leaves this list with the change that brings it."""

REPLACED = {
    "picture": "image",
    "drawing|drawn|draws?": "sample, generate",
    "behind": "after",
    "anew": "again",
    "told|tells?": "conditioned on; reports",
    "twins?": "smoke configuration",
    "peak share|share of peak": "MFU",
    "hosts of (?:one|a) program": "processes",
    "mend(?:ed|s)?": "fix",
    "(?:bytes|GiB|images|memory|steps) an? (?:parameter|chip|image|second|step|prompt)": "per",
    "no (?:finite )?number": "non-finite",
}
"""Words that the glossary replaces, as patterns."""
ALLOWED = {"CONTRIBUTING.md": {"picture", "draw", "behind"}}
"""Where a word is named that is replaced."""


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


def blocks(text: str) -> list[str]:
    """The blocks of code in a document, of whatever language."""
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


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
    assert len(named) >= len(table) == 9
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
    assert links(README)


# The front door


def test_the_readme_is_short_and_has_the_commands_that_the_gate_runs() -> None:
    assert len(README.splitlines()) <= 120
    commands = "\n".join(blocks(README)).splitlines()
    assert "pip install -e '.[cpu]' && sdxl-jax quickstart" in commands
    assert "pip install -e '.[cpu,test]' && pytest" in commands
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"pip install -e '.[cpu,test]'", "pytest"} <= set(gate)


def test_commands_in_documents_are_commands_that_there_are() -> None:
    from sdxl_jax.__main__ import _COMMANDS

    found = set()
    for path in DOCUMENTS:
        for block in blocks(path.read_text()):
            found |= set(re.findall(r"(?:^|&& )sdxl-jax (\w+)", block, flags=re.MULTILINE))
    assert found == set(_COMMANDS)


def test_the_changelog_has_the_sections_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert re.findall(r"^## \[(.+?)\]", text, re.M)[:2] == ["Unreleased", version[1]]
    sections = set(re.findall(r"^### (.+)$", text, re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()


# Words


def replaced_words(text: str) -> list[str]:
    """Words of a document that the glossary replaces; code, links' targets and quotations of code do not count."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)|\w+\.(?:md|LICENSE)\b", "", text, flags=re.DOTALL | re.MULTILINE)
    return [found.lower() for word in REPLACED for found in re.findall(rf"\b(?:{word})s?\b", prose, re.IGNORECASE)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_use_the_words_of_the_glossary(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert sorted(set(replaced_words(path.read_text())) - ALLOWED.get(name, set())) == []


def test_replaced_words_are_found() -> None:
    text = "Pictures are drawn behind it.\n```\na picture\n```\n`told` and [a](picture.png)"
    assert sorted(replaced_words(text)) == ["behind", "drawn", "pictures"]


# The site


def described(page: str) -> set[str]:
    """The names that a page of the reference describes."""
    return set(re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference" / page).read_text(), re.M))


def kinds(kind: typing.Any) -> Iterator[str]:
    """The full names of the dataclasses and enums that a configuration is made of."""
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        yield f"{kind.__module__}.{kind.__name__}"
        for hint in typing.get_type_hints(kind).values():
            yield from kinds(hint)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield f"{kind.__module__}.{kind.__name__}"
    for argument in typing.get_args(kind):
        yield from kinds(argument)


def test_the_reference_describes_every_public_name_and_every_part_of_a_configuration() -> None:
    from sdxl_jax.training.objectives import OBJECTIVES

    assert {name for name in described("api.md") if name.count(".") == 1} == {
        f"sdxl_jax.{name}" for name in sdxl_jax.__all__
    }
    assert set().union(*map(kinds, OBJECTIVES)) <= described("configuration.md")


def test_links_of_the_site_lead_from_page_to_page() -> None:
    specification = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert specification is not None and specification.loader is not None
    pages = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pages)
    assert pages.page_of("README.md") == "index.md"
    assert pages.page_of("docs/guides/data.md") == "guides/data.md"
    assert pages.page_of("configs/quickstart.py") == "source/configs/quickstart.py.md"
    assert pages.page_of("configs/gone.py") is None
    text = "[a](../../README.md#install) `[b](b.md)` [c](https://x.org/c.md) [d](#here)\n```\n[e](e.md)\n```"
    assert list(pages.linked(text, "guides/data.md")) == ["README.md"]
    assert pages.rewritten(text, lambda target: f"<{target}>") == text.replace("../../README.md", "<../../README.md>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_document_is_a_page_and_every_name_of_the_reference_is_on_it(site: Path) -> None:
    names = [path.stem.lower() for path in AT_ROOT if path.stem != "README"]
    documents = [path.relative_to(ROOT / "docs") for path in DOCUMENTS if path not in AT_ROOT]
    places = [*names, *(path.parent if path.stem == "README" else path.with_suffix("") for path in documents)]
    assert [place for place in places if not (site / place / "index.html").exists()] == []
    for page in ("api", "configuration"):
        html = (site / "reference" / page / "index.html").read_text()
        assert [name for name in described(f"{page}.md") if f'id="{name}"' not in html] == []


def test_links_of_the_readme_lead_to_pages_of_the_site(site: Path) -> None:
    html = (site / "index.html").read_text()
    body = html.split("<article")[1].split("</article")[0]
    targets = [link.split("#")[0] for link in re.findall(r'(?:href|src)="([^"]+)"', body)]
    ours = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert len(ours) > 15
    assert [target for target in ours if not (site / target).exists()] == []
    assert "source/configs/finetune_1024.py/" in ours


def test_every_notebook_is_a_page_with_the_images_that_it_keeps(site: Path) -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = site / "notebooks" / path.stem
        shown = re.findall(r'src="(\.\./images/[^"]+)"', (page / "index.html").read_text())
        assert len(shown) == path.read_text().count('"image/jpeg"')
        assert [target for target in shown if not (page / target).exists()] == []


def test_the_site_loads_nothing_from_other_servers(site: Path) -> None:
    loaded = r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+href=["']?https?:"""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    assert [path for path in pages if re.search(loaded, path.read_text())] == []
    assert [path for path in site.rglob("*.css") if re.search(r"url\(.?https?:|@import", path.read_text())] == []
