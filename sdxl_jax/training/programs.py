"""Steps compiled on another machine, in files: `sdxl-jax compile` writes them, training reads them.

    CACHE/ahead/<key>.program

jax's own cache, which lies beside them in `training.compilation_cache`, keeps nothing that was compiled for devices
that are not here. The key is a checksum of all that a program depends on, so that no other program is ever taken for
it. Reading one runs code (it is a pickle): whoever may write the folder may do what the run may do.
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
from sdxl_jax.files.paths import local


def folder(cache: str) -> epath.Path:
    """Where they lie in `training.compilation_cache`. Raises InputError for a bucket's URL."""
    return epath.Path(local(cache, "training.compilation_cache")) / "ahead"


class Programs(NamedTuple):
    """The programs in a folder, for one mesh and the compiler's options."""

    folder: epath.Path
    mesh: Mesh
    options: Mapping[str, Any]

    def count(self) -> int:
        """Programs that are there, for whatever machine."""
        return len(list(self.folder.glob("*.program")))

    def write(self, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
        """Keeps a program."""
        data, _, _ = serialize_executable.serialize(compiled)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(self._path(lowered), zlib.compress(data, 1))  # to a quarter: of the full model, a gigabyte

    def read(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        """The program of what was lowered, None if it is not there. Raises what jax raises for a damaged one."""
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
        given = {
            "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
            "options": {name: str(value) for name, value in self.options.items()},
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "device": devices[0].device_kind,
            "devices": [device.id for device in devices],
        }
        return self.folder / f"{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()}.program"
