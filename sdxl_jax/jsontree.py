"""Configurations to JSON and back: the format of a run's config.json and of a checkpoint's metadata.

Dataclasses become objects, enums their values, tuples lists. An unknown or mistyped field is an error. A missing field
has its default, so that a field added later must default to the earlier behaviour. A renamed field has its old name in
its metadata, `field(default=…, metadata={RENAMED: "old_name"})`: saved configurations are read with either.
"""

import dataclasses
import enum
import json
from collections.abc import Callable
from typing import Any, TypeVar

import cattrs
from cattrs.gen import make_dict_structure_fn

from sdxl_jax.diffusion.continuous import ContinuousConfig, EdmConfig, FlowConfig
from sdxl_jax.errors import InputError, fault, old_names
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import AnyVaeConfig, LearntVaeConfig, VaeConfig
from sdxl_jax.models.wavelet import WaveletConfig

_T = TypeVar("_T")

_converter = cattrs.Converter(forbid_extra_keys=True)
# A configuration file may give an enum by its value, as the command line does.
_converter.register_unstructure_hook(enum.Enum, lambda given: given.value if isinstance(given, enum.Enum) else given)


def _either_vae(value: Any, _: Any) -> AnyVaeConfig:
    """The kind of autoencoder is not stored: its fields determine it."""
    marks = {"decoder_blocks": TinyVaeConfig, "levels": WaveletConfig}
    found = (kind for mark, kind in marks.items() if isinstance(value, dict) and mark in value)
    return _converter.structure(value, next(found, VaeConfig))


def _either_law(value: Any, _: Any) -> ContinuousConfig | None:
    """The kind of noise law is not stored either."""
    kind = FlowConfig if isinstance(value, dict) and "shift" in value else EdmConfig
    return None if value is None else _converter.structure(value, kind)


def _reader(kind: type[_T]) -> Callable[[Any, Any], _T]:
    """The cattrs hook of a dataclass, which also accepts the old names of its renamed fields."""
    read: Any = make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=True)
    renamed = old_names(kind)

    def renaming(value: Any, _: Any) -> _T:
        if isinstance(value, dict):
            value = {renamed.get(name, name): inner for name, inner in value.items()}
        return read(value, kind)

    return renaming if renamed else read


_converter.register_structure_hook_factory(dataclasses.is_dataclass, _reader)
_converter.register_structure_hook(AnyVaeConfig, _either_vae)
_converter.register_structure_hook(LearntVaeConfig, _either_vae)
_converter.register_structure_hook(EdmConfig | FlowConfig | None, _either_law)


def to_json(config: Any) -> Any:
    """A dataclass tree as JSON values: enums by value, tuples as lists."""
    return json.loads(json.dumps(_converter.unstructure(config)))


def from_json(value: Any, kind: type[_T]) -> _T:
    """The reverse of `to_json`. Raises InputError for unknown, missing or mistyped fields."""
    try:
        return _converter.structure(value, kind)
    except (cattrs.BaseValidationError, ValueError, TypeError, AttributeError) as error:
        problems = "; ".join(cattrs.transform_error(error))
        raise InputError(
            f"This is not a {kind.__name__} of this version of sdxl_jax: {problems}. Correct these fields, or use the "
            "version that wrote them"
        ) from error


def read_saved(path: AnyPath) -> dict[str, Any]:
    """The content of a run's config.json, which has the key "config". Raises InputError if it cannot be read."""
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved["config"], dict):
            raise TypeError(f"its config is {json.dumps(saved['config'])}, not an object")
    except KeyError as error:
        raise fault(error)(_unreadable(path, f"it has no key {error}")) from error
    except (ValueError, TypeError, OSError) as error:
        raise fault(error)(_unreadable(path, str(error))) from error
    return saved


def _unreadable(path: AnyPath, reason: str) -> str:
    return (
        f"{path} is not the configuration of a run ({reason}). Restore it, or choose another run (with train: another "
        "--run-dir)"
    )
