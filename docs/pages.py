"""The documents as a site: a hook of mkdocs, see mkdocs.yml.

Links in the documents are relative to the repository, where README.md and its kin stand at the root. mkdocs knows docs/
alone. So here

    a document at the root              becomes a page:  README.md -> index.md
    a notebook                          becomes a page:  notebooks/quickstart.ipynb -> notebooks/quickstart.md
    a file that a document links to     becomes a page that shows it:  configs/sd15.py -> source/configs/sd15.py.md
    a link to either of them            leads to that page

A link to anything else stays as it is, and `mkdocs build --strict` ends with an error.
"""

import base64
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "notebooks/README.md": "notebooks/index.md",
}
PAGES |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
"""Documents outside of docs/, by their names on the site."""
LANGUAGES = {".py": "python", ".yml": "yaml", ".cff": "yaml", ".toml": "toml", ".sh": "bash"}

_LINK = re.compile(r"(\]\(<?)([^)\s>#]+)")
_CODE = re.compile(r"(^```.*?^```|^:::.*?$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def rewritten(text: str, change: Callable[[str], str]) -> str:
    """A document with another target in each of its relative links; code stays as it is."""

    def link(found: re.Match[str]) -> str:
        target = found[2]
        return found[1] + (target if re.match(r"[a-z]+:", target) else change(target))

    parts = _CODE.split(text)
    return "".join(part if number % 2 else _LINK.sub(link, part) for number, part in enumerate(parts))


def home(page: str) -> str:
    """The folder in the repository that the links of a page of the site start from."""
    outside = {there: path for path, there in PAGES.items()}
    return posixpath.dirname(outside.get(page, f"docs/{page}"))


def page_of(path: str) -> str | None:
    """The page, or other file of the site, that stands for a file of the repository; None: there is none."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if (ROOT / path).is_file() else None


def linked(text: str, page: str) -> Iterator[str]:
    """The files of the repository that a page's text links to."""
    found: list[str] = []
    rewritten(text, lambda target: found.append(posixpath.normpath(posixpath.join(home(page), target))) or target)
    yield from found


def shown(path: str) -> str:
    """A page that shows a file of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    header = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    if path.endswith(".md"):
        return header + text
    return f"{header}````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the images that it shows, by their names."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for number, output in enumerate(cell["outputs"]):
            if image := output.get("data", {}).get("image/jpeg"):
                name = f"images/{path.stem}-{cell['id']}-{number}.jpg"
                images[name] = base64.b64decode("".join(image))
                parts.append(f"![What this cell shows]({name})")
            else:
                parts.append("```text\n" + "".join(output["text"]) + "\n```")
    return "\n\n".join(parts) + "\n", images


# What mkdocs calls


def on_files(files: Files, config: Any) -> Files:
    for path, page in PAGES.items():
        if not path.endswith(".ipynb"):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
            continue
        text, images = notebook(ROOT / path)
        files.append(File.generated(config, page, content=text))
        for name, image in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=image))
    for file in list(files.documentation_pages()):
        for path in linked(file.content_string, file.src_uri):
            page = page_of(path)
            if page is not None and page.startswith("source/") and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def change(target: str) -> str:
        there = page_of(posixpath.normpath(posixpath.join(home(here), target)))
        return target if there is None else posixpath.relpath(there, posixpath.dirname(here) or ".")

    return rewritten(markdown, change)
