"""Command lines parsed into dataclasses: tyro, with sizes as HxW and positions as TOP,LEFT.

A command that takes a configuration file has options of its own too. The flags of both are parsed together
(`CommandLine`), and the configuration keeps the type that its file gave it.
"""

import contextlib
import dataclasses
import enum
import io
import json
import re
import sys
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import tyro
from etils import epath
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sdxl_jax.errors import RENAMED, InputError, nearest_first
from sdxl_jax.files.paths import AnyPath, in_bucket, local, located
from sdxl_jax.files.text import printable
from sdxl_jax.sizes import Position, Size

if TYPE_CHECKING:
    from sdxl_jax.weights.open import OpenOptions

_T = TypeVar("_T")
_Options = TypeVar("_Options")
_Config = TypeVar("_Config")
_CONF = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff)
_REGISTRY = ConstructorRegistry()


def has_subcommand(
    command: str,
    usage: str,
    arguments: Sequence[str],
    known: Collection[str],
    *,
    options: Sequence[str] = (),
    listed: str | None = None,
) -> bool:
    """Whether arguments begin with a subcommand of `sdxl-jax COMMAND`; if not, help was asked for, and is printed.

    options: flags that the command takes in its place. listed: the known ones in words. Raises InputError for none, and
    for an unknown one.
    """
    if not arguments:
        raise InputError(f"sdxl-jax {command} needs a command: {listed or ', '.join(known)}\n{usage}")
    if arguments[0] in ("-h", "--help"):
        print(usage)
        return False
    if arguments[0] not in known:
        nearest = ", ".join(nearest_first(arguments[0], [*known, *options]))
        raise InputError(f"There is no command `sdxl-jax {command} {arguments[0]}`. Known, nearest first: {nearest}")
    return True


def parse(kind: type[_T], arguments: list[str], command: str, **options: Any) -> _T:
    """The options of a command. Ends the process with 2 and a message for invalid arguments. Raises InputError for a
    path that is not local."""
    return _parse(kind, arguments, command, options)


def _parse(kind: Any, arguments: list[str], command: str, options: dict[str, Any]) -> Any:
    parsed = tyro.cli(kind, args=arguments, prog=f"sdxl-jax {command}", config=_CONF, registry=_REGISTRY, **options)
    _check_paths(parsed)
    return parsed


def _check_paths(options: Any) -> None:
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Path):
                local(each, entry.name)
            elif isinstance(each, epath.Path):
                located(each, entry.name)
            elif dataclasses.is_dataclass(each):
                _check_paths(each)


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[_Options, _Config]):
    """A command's own options, and a configuration whose every field is a flag too. The flags have no prefix for
    either."""

    options: Annotated[_Options, tyro.conf.arg(name="")]
    config: Annotated[_Config, tyro.conf.arg(name="")]


def parse_with_config(
    options: _Options, config: _Config, arguments: list[str], command: str
) -> tuple[_Options, _Config]:
    """Options and configuration with the arguments applied. Those passed in are the defaults, and give the types."""
    _check_names(config, arguments)
    given = {"default": CommandLine(options, config), "description": type(options).__doc__}
    parsed = _parse(CommandLine[type(options), type(config)], arguments, command, given)
    return parsed.options, parsed.config


def _check_names(config: Any, arguments: list[str], prefix: str = "--") -> None:
    """Raises InputError for the old name of a renamed field, with the new one."""
    for entry in dataclasses.fields(config):
        if old := entry.metadata.get(RENAMED):
            old_flag = prefix + old
            given = (argument.partition("=")[0].replace("-", "_") for argument in arguments)
            if any(f"{each}.".startswith(f"{old_flag}.".replace("-", "_")) for each in given):
                raise InputError(f"{old_flag} is called {prefix}{entry.name} now. Use that name")
        if dataclasses.is_dataclass(inner := getattr(config, entry.name)):
            _check_names(inner, arguments, f"{prefix}{entry.name}.")


def config_path(arguments: list[str], command: str, usage: str) -> Path:
    """The configuration file, which is the first argument. Prints the usage and ends the process for --help; raises
    InputError where the first argument is missing or an option."""
    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] in (["-h"], ["--help"]):
            print(usage)
            sys.exit(0)
        given = f"given: {arguments[0]}" if arguments else "given: nothing"
        raise InputError(f"The first argument of {command} is a configuration file, {given}\n{usage}")
    return Path(arguments[0])


@_REGISTRY.primitive_rule
def _pixels(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    for kind, separator, metavar in ((Size, "x", "HxW"), (Position, ",", "TOP,LEFT")):
        if info.type == kind | None:

            def read(words: list[str], kind: Any = kind, separator: str = separator, metavar: str = metavar) -> Any:
                try:
                    return kind(*pair("the value", words[0], separator, f"{metavar} in pixels"))
                except InputError as error:
                    raise ValueError(str(error)) from error  # which tyro reports with the option's name

            return PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=read,
                is_instance=lambda value, kind=kind: value is None or isinstance(value, kind),
                str_from_instance=lambda value, separator=separator: [
                    "None" if value is None else separator.join(map(str, value))
                ],
            )
    return None


@_REGISTRY.primitive_rule
def _any_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Paths that may be in a bucket; `_check_paths` refuses other schemes."""
    if info.type not in (AnyPath, AnyPath | None):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: epath.Path(words[0]) if "://" in words[0] else Path(words[0]),
        is_instance=lambda value: value is None or isinstance(value, PurePath),
        str_from_instance=lambda value: [str(value)],
    )


def pair(option: str, value: str, separator: str, expected: str) -> tuple[int, int]:
    """Two whole numbers with a separator. Raises InputError for anything else."""
    first, found, second = value.partition(separator)
    if not (found and first.isdecimal() and second.isdecimal() and max(len(first), len(second)) <= 6):
        raise InputError(f"{option} {value!r}: expected {expected}")
    return int(first), int(second)


def words(value: Any) -> list[str]:
    """A field's value as words of the command line."""
    if isinstance(value, enum.Enum):
        return [str(value.value)]
    if isinstance(value, Size):
        return [f"{value.height}x{value.width}"]
    if isinstance(value, Position):
        return [f"{value.top},{value.left}"]
    if isinstance(value, tuple):
        return [word for each in value for word in words(each)]
    return [str(value)]


def flag(name: str) -> str:
    """Of a field. A name that would be a keyword of Python has an underscore at its end: class_."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def path_of_printable(name: str) -> AnyPath:
    """The path that `printable` was called with."""
    path = located(name, "the file")
    unescaped = re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), name)
    return path if in_bucket(path) or path.exists() else Path(unescaped)


def fields(kind: type) -> dict[str, Any]:
    """A dataclass's fields with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def from_mapping(default: _T, given: dict[str, Any], where: str) -> _T:
    """A dataclass with some fields changed, as in a line of JSON or the text of a PNG. Raises InputError, with the
    place, for an unknown field, and for an invalid value with what is expected and tyro's reason."""
    known = fields(type(default))
    arguments: dict[str, list[str]] = {}
    for name, value in given.items():
        field = name.replace("-", "_")
        if field not in known:
            nearest = ", ".join(nearest_first(field, known))
            raise InputError(f"{where}: there is no option {name!r}. Known, nearest first: {nearest}")
        if isinstance(known[field], bool):
            if value not in (True, False, "True", "False"):
                raise InputError(f"{where}: {name} is {json.dumps(value)}, expected true or false")
            arguments[name] = [flag(field)] * (value in (True, "True"))
        elif value is not None:
            given_words = [str(each) for each in value] if isinstance(value, list) else str(value).split()
            arguments[name] = [flag(field), *given_words]
    changed, reason = _changed(default, [word for each in arguments.values() for word in each])
    if changed is not None:
        return changed
    hints = typing.get_type_hints(type(default))
    for name, each in arguments.items():
        _, own_reason = _changed(default, each)
        if own_reason is not None:
            expected = expected_value(hints[name.replace("-", "_")])
            raise InputError(f"{where}: {name} is {json.dumps(given[name])}, expected {expected} ({own_reason})")
    raise InputError(f"{where}: {reason}. `sdxl-jax sample --help` lists the options and their values")


def _changed(default: _T, arguments: list[str]) -> tuple[_T, None] | tuple[None, str]:
    """(the dataclass with the arguments applied, None), or (None, the reason why tyro refuses them)."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return tyro.cli(type(default), args=arguments, default=default, config=_CONF, registry=_REGISTRY), None
    except SystemExit:
        return None, _reason(output.getvalue())


def _reason(output: str) -> str:
    """The reason in tyro's message, which is a box: a title, the reason, and help."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{3,}", " ", output)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    helps = (number for number, line in enumerate(lines) if line.startswith(("Argument helptext", "For full helptext")))
    text = " ".join(lines[1 : next(helps, None)])
    text = re.sub(r"^Error parsing \S+: ", "", text)
    if by_type := re.findall(r"- <class '(\w+)'>: (.+?)(?= - <class |$)", text):  # of an optional field
        text = next((reason for name, reason in by_type if name != "NoneType"), text)
    text = re.sub(r" for argument '[^']*'|\. Expected one of .*", "", text)
    return printable(text.rstrip("."))


def expected_value(kind: Any) -> str:
    """The values of a field's type, in words."""
    words_of = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
        epath.Path: "a path in a bucket",
    }
    words_of |= {Size: "HxW in pixels", Position: "TOP,LEFT in pixels"}
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(expected_value(each) for each in arguments if each is not type(None))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(str(each.value) for each in kind)}"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(kind) is tuple:
        count = "any number of values" if arguments[-1] is Ellipsis else f"{len(arguments)} values"
        return f"{count}, each {expected_value(arguments[0])}"
    return words_of.get(kind, f"a value of type {kind}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenFlags:
    """Options of every command that opens a model."""

    parts_from: tyro.conf.UseAppendAction[tuple[AnyPath, ...]] = ()
    """Another model, or one network alone, whose parts replace those of the model, e.g. another autoencoder."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:SCALE: a LoRA to merge into the weights."""
    variant: str | None = None
    """Variant of a diffusers directory's weights: fp16 for *.fp16.safetensors. Default: the files without a variant."""
    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
    """Prediction type of the UNet, for files that do not say. flow: of flow matching, without a shift."""
    allow_partial: bool = False
    """Load a model although some of its tensors do not fit. Those keep their initial values, and are listed."""
    weights: Literal["averaged", "raw"] = "averaged"
    """Of a training run: the average of the weights (EMA), or the weights themselves."""

    def open_options(self) -> "OpenOptions":
        from sdxl_jax.diffusion import parameterisation
        from sdxl_jax.weights.open import OpenOptions

        prediction = None if self.prediction is None else parameterisation.Prediction(self.prediction)
        return OpenOptions(self.variant, prediction, self.allow_partial, self.weights == "raw")
