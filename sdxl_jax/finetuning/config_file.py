"""A configuration as a file for `sdxl-jax train`: Python that gives the same configuration, with the fields that differ
from their defaults."""

import dataclasses
import enum
import json
from typing import Any

_WIDTH = 120


def source(config: Any, about: str) -> str:
    """The file's text. about: its docstring."""
    classes = dict[str, str]()
    value = _expression(config, 4, len("return "), classes)
    modules = dict[str, list[str]]()
    for name, module in sorted(classes.items()):
        modules.setdefault(module, []).append(name)
    imports = "\n".join(f"from {module} import {', '.join(names)}" for module, names in sorted(modules.items()))
    kind = type(config).__name__
    return f'"""{about}"""\n\n{imports}\n\n\ndef get_config() -> {kind}:\n    return {value}\n'


def _expression(value: Any, indent: int, before: int, classes: dict[str, str]) -> str:
    """Python that gives the value, in one line if it fits. before: characters before it in its first line. Adds the
    classes that it names, each with its module."""
    if isinstance(value, enum.Enum):
        kind = type(value)
        classes[kind.__name__] = kind.__module__
        return f"{kind.__name__}.{value.name}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        start, names, items = "(", [""] * len(value), list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        classes[kind.__name__] = kind.__module__
        given = [field for field in dataclasses.fields(value) if getattr(value, field.name) != _default(field)]
        start = f"{kind.__name__}("
        names, items = [f"{field.name}=" for field in given], [getattr(value, field.name) for field in given]
    else:
        return repr(value)
    inner = indent + 4
    parts = [f"{name}{_expression(item, inner, len(name), classes)}" for name, item in zip(names, items, strict=True)]
    comma = "," if start == "(" and len(parts) == 1 else ""
    line = f"{start}{', '.join(parts)}{comma})"
    if "\n" not in line and indent + before + len(line) < _WIDTH:
        return line
    return start + "\n" + "".join(f"{' ' * inner}{part},\n" for part in parts) + " " * indent + ")"


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
