"""How command lines become dataclasses: tyro, with sizes as HxW and positions as TOP,LEFT.

A command of a configuration file has options of its own, which stand beside the configuration (`Beside`): the flags of
both are parsed together, and the configuration keeps the type that its file gave it.
"""

import dataclasses
import enum
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sdxl_jax.errors import RENAMED, InputError, nearest_first
from sdxl_jax.files.paths import local

if TYPE_CHECKING:
    from sdxl_jax.weights.open import OpenOptions

_T = TypeVar("_T")
_Options = TypeVar("_Options")
_Config = TypeVar("_Config")
_CONF = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff)
_REGISTRY = ConstructorRegistry()


def parse(kind: type[_T], arguments: list[str], command: str, **options: Any) -> _T:
    """Ends the process with 2 and a message for arguments that are none of the command's. Raises InputError for a path
    that is none of this machine's."""
    return _parsed(kind, arguments, command, options)


def _parsed(kind: Any, arguments: list[str], command: str, options: dict[str, Any]) -> Any:
    parsed = tyro.cli(kind, args=arguments, prog=f"sdxl-jax {command}", config=_CONF, registry=_REGISTRY, **options)
    _check_paths(parsed)
    return parsed


def _check_paths(options: Any) -> None:
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Path):
                local(each, entry.name)
            elif dataclasses.is_dataclass(each):
                _check_paths(each)


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[_Options, _Config]):
    """A command's own options, and a configuration whose every field is a flag too; neither shows in their names."""

    options: Annotated[_Options, tyro.conf.arg(name="")]
    config: Annotated[_Config, tyro.conf.arg(name="")]


def parse_with_config(
    options: _Options, config: _Config, arguments: list[str], command: str
) -> tuple[_Options, _Config]:
    """Both with what the arguments change. What is given here is the default, and the type to parse."""
    _check_names(config, arguments)
    given = {"default": CommandLine(options, config), "description": type(options).__doc__}
    parsed = _parsed(CommandLine[type(options), type(config)], arguments, command, given)
    return parsed.options, parsed.config


def _check_names(config: Any, arguments: list[str], prefix: str = "--") -> None:
    """Raises InputError for the old name of a renamed field, with the new one."""
    for entry in dataclasses.fields(config):
        if old := entry.metadata.get(RENAMED):
            was = prefix + old
            for each in (argument.partition("=")[0].replace("-", "_") for argument in arguments):
                if each == was.replace("-", "_") or each.startswith(f"{was}.".replace("-", "_")):
                    raise InputError(f"{was} is called {prefix}{entry.name} now. Use that name")
        if dataclasses.is_dataclass(inner := getattr(config, entry.name)):
            _check_names(inner, arguments, f"{prefix}{entry.name}.")


def config_path(arguments: list[str], command: str, usage: str) -> Path:
    """The configuration file, which comes first. Ends the process with the usage where that is asked for; raises
    InputError where there is none."""
    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] in (["-h"], ["--help"]):
            print(usage)
            sys.exit(0)
        raise InputError(f"The first argument of {command} is a configuration file.\n{usage}")
    return Path(arguments[0])


@_REGISTRY.primitive_rule
def _pixels(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if "Size" not in str(info.type) and "Position" not in str(info.type):
        return None  # quick, as most are
    from sdxl_jax.arrays import Size
    from sdxl_jax.sampling.options import Position

    for kind, separator, metavar in ((Size, "x", "HxW"), (Position, ",", "TOP,LEFT")):
        if info.type == kind | None:

            def read(words: list[str], kind: Any = kind, separator: str = separator, metavar: str = metavar) -> Any:
                try:
                    return kind(*pair("the value", words[0], separator, f"{metavar} in pixels"))
                except InputError as error:
                    raise ValueError(str(error)) from error  # which tyro tells with the option's name

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


def pair(option: str, value: str, separator: str, expected: str) -> tuple[int, int]:
    """Two whole numbers. Raises InputError for anything else."""
    first, found, second = value.partition(separator)
    if not (found and first.isdecimal() and second.isdecimal() and max(len(first), len(second)) <= 6):
        raise InputError(f"{option} {value!r}: expected {expected}")
    return int(first), int(second)


def words(value: Any) -> list[str]:
    """A field's value as the command line would say it."""
    from sdxl_jax.arrays import Size
    from sdxl_jax.sampling.options import Position

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
    return f"--{name.replace('_', '-')}"


def shown(path: Path | str) -> str:
    """A path for what takes UTF-8 alone, such as a pipe, a PNG or a page: bytes that are none as \\udce9."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def hidden(shown: str) -> Path:
    """The path that was `shown`."""
    path = Path(shown)
    bytes_back = re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), shown)
    return path if path.exists() else Path(bytes_back)


def fields(kind: type) -> dict[str, Any]:
    """A dataclass's fields with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def from_mapping(default: _T, given: dict[str, Any], where: str) -> _T:
    """A dataclass with some fields changed, as JSON or an image's text has them. Raises InputError, with the place,
    for a name that there is not and for a value that is not the field's."""
    known = fields(type(default))
    arguments: list[str] = []
    for name, value in given.items():
        field = name.replace("-", "_")
        if field not in known:
            raise InputError(
                f"{where}: there is no option {name!r}. Known, nearest first: {nearest_first(field, known)}"
            )
        if isinstance(known[field], bool):
            if value not in (True, False, "True", "False"):
                raise InputError(f"{where}: {name} is {json.dumps(value)}, expected true or false")
            arguments += [flag(field)] * (value in (True, "True"))
        elif value is not None:
            spoken = [str(each) for each in value] if isinstance(value, list) else str(value).split()
            arguments += [flag(field), *spoken]
    try:
        return tyro.cli(
            type(default), args=arguments, default=default, config=_CONF, registry=_REGISTRY, console_outputs=False
        )
    except SystemExit as error:
        raise InputError(
            f"{where}: one of {', '.join(given)} has a value that it cannot have. `sdxl-jax sample --help` says what "
            "each takes"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenFlags:
    """What can be said of any model that is opened."""

    parts_from: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Another model, or one network alone, whose parts take the place of this one's, e.g. another autoencoder."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:SCALE; a LoRA that is merged into the weights. May be given several times."""
    variant: str | None = None
    """Which weights of a diffusers directory: fp16 for *.fp16.safetensors. Default: those without a variant."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet outputs, for files that do not tell."""
    allow_partial: bool = False
    """Take what fits of a model whose tensors do not all fit; the rest has its initial values, and is listed."""

    def open_options(self) -> "OpenOptions":
        from sdxl_jax.diffusion import parameterisation
        from sdxl_jax.weights.open import OpenOptions

        prediction = None if self.prediction is None else parameterisation.Prediction(self.prediction)
        return OpenOptions(self.variant, prediction, self.allow_partial)
