"""What every function of the package keeps to."""

import ast
from pathlib import Path

import sdxl_jax

ROOT = Path(sdxl_jax.__file__).parent
LONGEST_LINES = 60
"""Of a function, docstring and decorators included."""


def too_long(source: str) -> list[tuple[str, int]]:
    """(name, lines) of every function that is longer."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or start) - start + 1
            if lines > LONGEST_LINES:
                found.append((node.name, lines))
    return found


def test_no_function_is_longer_than_a_screen() -> None:
    paths = sorted(ROOT.rglob("*.py"))
    assert len(paths) > 30, "the walk found the package"
    found = {f"{path.relative_to(ROOT)}, {name}": lines for path in paths for name, lines in too_long(path.read_text())}
    assert not found, f"longer than {LONGEST_LINES} lines: {found}"


def test_a_function_that_is_too_long_is_found_wherever_it_is() -> None:
    body = "\n".join(["        pass"] * (LONGEST_LINES - 1))
    method = f"class A:\n    def just_right(self):\n{body}\n"
    assert too_long(method) == []
    assert too_long(method.replace("    def", "    @property\n    def")) == [("just_right", LONGEST_LINES + 1)]
    assert too_long(f"async def outer():\n    def inner():\n{body}\n        pass\n") == [
        ("outer", LONGEST_LINES + 2),
        ("inner", LONGEST_LINES + 1),
    ]
