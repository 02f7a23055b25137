"""Style of the package: lengths of functions, shapes in annotations."""

import ast
from collections.abc import Iterator
from pathlib import Path

import sdxl_jax

ROOT = Path(sdxl_jax.__file__).parent
LONGEST_LINES = 60
"""Lines of a function, docstring and decorators included."""


def too_long(source: str) -> list[tuple[str, int]]:
    """(name, lines) of every function with more than LONGEST_LINES lines."""
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


# Shapes in types

SHAPED_SHARE = 0.9
DTYPES = {"Bool", "Float", "Float32", "Float64", "Inexact", "Int", "Int8", "Int16", "Int32", "Int64", "Integer", "Key"}
DTYPES |= {"Num", "Real", "Shaped", "UInt", "UInt8", "UInt16", "UInt32", "UInt64", "BFloat16"}
ALIASES = {"Image", "ImageBytes", "TokenIds", "Pixels", "Images", "Latent"}
"""Names of shaped types, defined in arrays.py and in other modules."""
ARRAYS = {"Array", "ndarray", "type_of_array"}


def array_annotations(annotation: ast.expr) -> Iterator[bool]:
    """For each array type in an annotation, whether it has a shape."""
    if (isinstance(annotation, ast.Subscript) and name_of(annotation.value) in DTYPES) or name_of(
        annotation
    ) in ALIASES:
        yield True
    elif name_of(annotation) in ARRAYS:
        yield False
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from array_annotations(ast.parse(annotation.value, mode="eval").body)
    else:
        for child in ast.iter_child_nodes(annotation):
            if isinstance(child, ast.expr):
                yield from array_annotations(child)


def name_of(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def shaped_functions(source: str) -> dict[str, bool]:
    """The functions that take or return arrays, each with its line, and whether all of these have shapes."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            annotations = [arg.annotation for arg in every if arg is not None] + [node.returns]
            arrays = [shaped for each in annotations if each is not None for shaped in array_annotations(each)]
            if arrays:
                found[f"{node.lineno} {node.name}"] = all(arrays)
    return found


def test_functions_of_arrays_have_shapes_in_their_annotations() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{name}": shaped
        for path in sorted(ROOT.rglob("*.py"))
        for name, shaped in shaped_functions(path.read_text()).items()
    }
    assert len(found) > 200, "the walk found the package"
    bare = [name for name, shaped in found.items() if not shaped]
    share = 1 - len(bare) / len(found)
    assert share >= SHAPED_SHARE, f"{share:.0%} of {len(found)}; without shapes:\n" + "\n".join(bare)


def test_a_function_with_a_bare_array_is_found() -> None:
    source = 'def f(x: Float[Array, "n"]) -> Array: ...\ndef g(x: np.ndarray | None): ...\ndef h(x: int): ...\n'
    assert shaped_functions(source) == {"1 f": False, "2 g": False}
    assert shaped_functions('def f(x: Callable[[Float[Array, "n"]], Image]) -> "int": ...') == {"1 f": True}
