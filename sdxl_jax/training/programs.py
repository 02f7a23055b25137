"""AOT-compiled programs in files: `sdxl-jax compile` writes them on another machine, training reads them.

    CACHE/ahead/<key>.program

jax's own compilation cache, beside them in `training.compilation_cache`, keeps no program that was compiled for devices
of another machine. The key is a checksum of everything that a program depends on, so that no other program is ever
mistaken for it. Reading one executes code (it is a pickle): whoever can write to the folder can do what the run can do.
"""

import hashlib
import importlib.metadata
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from sdxl_jax.files import atomic
from sdxl_jax.files.paths import located


def folder(cache: str) -> epath.Path:
    """Their folder in `training.compilation_cache`, local or in a bucket. Raises InputError for other URLs."""
    return epath.Path(located(cache, "training.compilation_cache")) / "ahead"


class Programs(NamedTuple):
    """The programs in a folder, for one mesh and one set of compiler options."""

    folder: epath.Path
    mesh: Mesh
    options: Mapping[str, Any]

    def count(self) -> int:
        """Programs in the folder, for any machine."""
        return len(list(self.folder.glob("*.program")))

    def write(self, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
        """Writes a program."""
        data, _, _ = serialize_executable.serialize(compiled)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(self._path(lowered), zlib.compress(data, 1))  # to a quarter: 1 GB for the full model

    def read(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        """The compiled program of a lowered function; None if it is not in the folder. Raises jax's error for a damaged
        file."""
        path = self._path(lowered)
        if not path.exists():
            return None
        devices = list(self.mesh.devices.flat)
        return serialize_executable.deserialize_and_load(
            zlib.decompress(path.read_bytes()), lowered.in_tree, lowered.out_tree, devices[0].client, devices
        )

    def _path(self, lowered: jax.stages.Lowered) -> epath.Path:
        devices = list(self.mesh.devices.flat)
        packages = ["jax", "jaxlib", *(["libtpu"] if devices[0].platform == "tpu" else [])]
        key = {
            "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
            "options": {name: str(value) for name, value in self.options.items()},
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "device": devices[0].device_kind,
            "devices": [device.id for device in devices],
        }
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.program"
