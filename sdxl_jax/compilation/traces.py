"""What tracing and lowering gave at an earlier start, kept beside the compiled program: a start that finds it neither
traces nor lowers, which takes longer than reading the program.

    code, configuration, shapes, devices ── key ── a `jax.stages.Compiled` without the program ── jax's key ── program

jax's own key is a checksum of the lowered program, so it is only known after lowering. The key here is a checksum of
what the program is made from: this package's sources, the files of jax, flax and optax, the user's own modules, the
configuration, the abstract arguments with their shardings, jax's settings, XLA's flags, and the devices. Nothing is
kept for code that is in no file (a notebook, `python -c`). An entry is a pickle, trusted as the program beside it is.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import pickle
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache as jax_cache  # what is done here has no public names
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib import xla_client as xc  # pyright: ignore[reportPrivateImportUsage]
from jax.experimental import serialize_executable

from sdxl_jax.compilation.compilation_cache import FolderCache, processor_kind

_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = ("flax", "jax", "jaxlib", "optax")
"""Their files count by size and time: an edited one makes another program."""


def fingerprint(configuration: Mapping[str, Any], devices: Sequence[Any]) -> str | None:
    """A checksum of all that the programs of a run are made from, but for their arguments. None if part of the code is
    in no file.

    configuration: as JSON, of code in this package. devices: that they run on, in order.
    """
    if (code := _code()) is None:
        return None
    facts = {
        "code": code,
        "configuration": configuration,
        "settings": {name: repr(value) for name, value in jax.config.values.items() if not name.endswith("_dir")},
        "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "python": sys.version,
        "backend": devices[0].client.platform_version,
        "processor": processor_kind(),
        "devices": [(device.id, device.process_index, device.device_kind) for device in devices],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Traces:
    """The traces of programs with one fingerprint, in a compilation cache."""

    def __init__(self, cache: FolderCache, fingerprint: str, devices: Sequence[Any]):
        self._cache, self._fingerprint, self._devices = cache, fingerprint, list(devices)

    def exists(self, arguments: tuple[Any, ...]) -> bool:
        """Whether there is a trace for these abstract arguments."""
        return self._cache.has(self._key(arguments))

    def read(self, arguments: tuple[Any, ...]) -> jax.stages.Compiled | None:
        """The compiled program for these abstract arguments; None if it, or its trace, is not there or is damaged."""
        entry = self._cache.get(self._key(arguments))
        if entry is None:
            return None
        try:
            program_key, trace, in_tree, out_tree = pickle.loads(entry)
            program = self._cache.get(program_key)
            if program is None:
                return None
            program, _ = jax_cache.extract_executable_and_time(jax_cache.decompress_executable(program))
            executable, arguments_info, no_kwargs = _Unpickler(trace, program, self._devices).load()
            info = in_tree.unflatten(arguments_info)
            return jax.stages.Compiled(executable.load(), [], info, out_tree, no_kwargs=no_kwargs)
        except Exception:  # whatever jax, XLA and pickle raise; it is traced and written again
            return None

    @contextlib.contextmanager
    def recorded(self, arguments: tuple[Any, ...]) -> Iterator[list[jax.stages.Compiled]]:
        """Inside, one program is compiled, or read from the cache, and appended; it is written at the end, with its
        trace. A program that cannot be kept, e.g. one that calls Python, is not."""
        with self._cache.asked() as keys:
            compiled: list[jax.stages.Compiled] = []
            yield compiled
        with contextlib.suppress(Exception):  # as above: the next start traces it
            ((program_key,), (program,)) = keys, compiled
            loaded: Any = program._executable
            executable = loaded._unloaded_executable
            if executable.host_callbacks or executable.keepalive or program._params.const_args:
                return
            arguments_info, in_tree = jax.tree.flatten(program.args_info)
            file = io.BytesIO()
            _Pickler(file).dump((executable, arguments_info, program._no_kwargs))
            if not self._cache.has(program_key):  # jax writes on the first process alone
                jax_cache.put_executable_and_time(
                    program_key, executable.name, executable.xla_executable, executable.backend, 0
                )
            entry = pickle.dumps((program_key, file.getvalue(), in_tree, program.out_tree))
            self._cache.put(self._key(arguments), entry)

    def _key(self, arguments: tuple[Any, ...]) -> str:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = [(leaf.shape, str(leaf.dtype), str(placement(leaf))) for leaf in leaves]
        text = f"{self._fingerprint} {tree} {shapes}"
        return f"trace-{hashlib.sha256(text.encode()).hexdigest()}"


def placement(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding that a program is compiled for; None where the argument is placed when it is called."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else getattr(leaf, "sharding", None)


class _Pickler(serialize_executable._JaxPjrtPickler):
    """Leaves the program out."""

    def persistent_id(self, obj: Any) -> Any:
        return ("exec",) if isinstance(obj, xc.LoadedExecutable | _jax.Executable) else super().persistent_id(obj)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    """Puts the program in."""

    def __init__(self, trace: bytes, program: bytes, devices: list[Any]):
        super().__init__(io.BytesIO(trace), devices[0].client, devices)
        self._program = program

    def persistent_load(self, pid: Any) -> Any:
        return super().persistent_load(("exec", self._program) if pid[0] == "exec" else pid)


def _code() -> str | None:
    """A checksum of the code that may take part in tracing; None if the program that was started is in no file."""
    if not getattr(sys.modules["__main__"], "__file__", None):
        return None
    checksum = hashlib.sha256(_sources().encode())
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    others = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    own = {file for file in others if file and not file.startswith((*libraries, str(_PACKAGE)))}
    checksum.update("".join(sorted(_size_and_time(Path(file)) for file in own)).encode())
    return checksum.hexdigest()


@functools.cache
def _sources() -> str:
    """A checksum of this package and of the libraries, as they are when it is first asked for."""
    checksum = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        checksum.update(f"{path.relative_to(_PACKAGE)}\n".encode() + path.read_bytes())
    for name in _LIBRARIES:
        spec = importlib.util.find_spec(name)  # which imports nothing
        assert spec is not None and spec.origin is not None, "it is a dependency"
        folder = Path(spec.origin).parent
        checksum.update("".join(sorted(map(_size_and_time, folder.rglob("*.py")))).encode())
    return checksum.hexdigest()


def _size_and_time(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:  # a module of a zip file, or one that is gone
        return f"{path} is not there\n"
    return f"{path} {status.st_size} {status.st_mtime_ns}\n"
