"""Safetensors files larger than memory: tensors are read on demand, files are written tensor by tensor.

Reading is the `safetensors` library's. Its writer needs all tensors at once, so the writer here is our own: eight bytes
with the length of a JSON header, the header (name -> dtype, shape, byte range), then the numbers, little-endian and in
the order of the header. https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.files.text import decode
from sdxl_jax.weights.formats.local_copies import local_copy

_DTYPES: dict[str, np.dtype] = {
    **{"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16")},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype("bool"), "U8": np.dtype("uint8")},
    **{"I64": np.dtype("int64"), "I32": np.dtype("int32"), "I16": np.dtype("int16"), "I8": np.dtype("int8")},
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, read on demand."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Any
    path: AnyPath

    def read(self, index: tuple[slice, ...] = ()) -> Shaped[np.ndarray, "..."]:
        """The tensor, or the part of it that slices of its first axes select. Nothing else is read."""
        try:
            return self.file.get_slice(self.name)[index] if index and self.shape else self.file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise unreadable(self.path, error) from error


def unreadable(path: AnyPath, error: Exception) -> InputError | MachineError:
    return fault(error)(
        f"{path} cannot be read as a safetensors file ({error}). It may be truncated or damaged: check the path and "
        "the size, or download it again"
    )


def refuse_pickle(path: AnyPath) -> None:
    """Raises InputError for a file of weights in Python's pickle format."""
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} is a pickle: loading it would run any program that it holds, so it is not read here. Use the "
            "model's .safetensors file, or convert it once with a tool and a file that you trust (torch.load, then "
            "safetensors.torch.save_file)"
        )


def open_file(path: AnyPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of one file, of which only the header is read. One in a bucket is copied first.

    Raises InputError for a pickle, a file that is missing, truncated or damaged, and for dtypes that are not
    implemented.
    """
    refuse_pickle(path)
    local = local_copy(path)
    try:
        # pread: mapped pages would count as memory of this process, up to the size of the file.
        file = safe_open(local, framework="numpy", backend="pread").__enter__()
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    if unknown := {name: dtype for name, (_, dtype) in described.items() if dtype not in _DTYPES}:
        name, dtype = next(iter(unknown.items()))
        raise InputError(
            f"{path}: {len(unknown)} tensors have dtypes that are not implemented, the first is {name} ({dtype}). "
            f"Known: {', '.join(_DTYPES)}. Use the float16, bfloat16 or float32 variant of the file"
        )
    return {
        name: Tensor(name, shape, _DTYPES[dtype], file, path) for name, (shape, dtype) in described.items()
    }, metadata


def open_files(paths: Sequence[AnyPath]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`open_file` for several files that hold one model together. Raises InputError also for a name that is there
    twice."""
    tensors, metadata = {}, {}
    for path in paths:
        more, described = open_file(path)
        if twice := sorted(tensors.keys() & more.keys()):
            raise InputError(
                f"The tensor {twice[0]} is in both {path} and {tensors[twice[0]].path}. Remove the file that does not "
                "belong to the model"
            )
        tensors |= more
        metadata |= described
    return tensors, metadata


def open_index(path: AnyPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`open_file` for the shards that an index file (`*.safetensors.index.json`) lists.

    Raises InputError for an index that is broken, shards that are missing, tensors that are not in the shard it names.
    """
    try:
        places = json.loads(decode(path.read_bytes()))["weight_map"]
        shards = sorted(set(places.values()))
        missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise fault(error)(f"{path} cannot be read as an index of shards ({reason}). Download it again") from error
    if missing:
        raise InputError(
            f"{path} lists {len(shards)} shards, of which {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            f"not in {path.parent}. Download what is missing"
        )
    tensors, metadata = open_files([path.parent / shard for shard in shards])
    misplaced = [name for name, shard in places.items() if name not in tensors or tensors[name].path.name != shard]
    if misplaced := misplaced or sorted(tensors.keys() - places.keys()):
        raise InputError(
            f"{path} and its shards disagree on {len(misplaced)} tensors, the first is {misplaced[0]}. Download all of "
            "them again"
        )
    return tensors, metadata


def fill(out: Shaped[np.ndarray, "*shape"], value: Shaped[np.ndarray, "*shape"]) -> None:
    """out[...] = value, for a value whose axes are transposed."""
    if value.ndim < 2 or value.strides[-1] == value.itemsize:
        out[...] = value
    else:  # In strips whose source stays in the processor's cache: two to four times as fast.
        for start in range(0, value.shape[-1], 32):
            out[..., start : start + 32] = value[..., start : start + 32]


def in_order(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> list[str]:
    """Names in the order in which a file has them, the library's: by the item size, largest first, for alignment; then
    by name."""
    return sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))


class Writer:
    """Writes one file, its tensors in any order. A context manager: its end checks that all tensors were written."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
    ):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        start = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name in in_order(tensors):
            shape, dtype = tensors[name]
            stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            self._places[name] = (start, stop)
            start = stop
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._tensors, self._left, self._begin = tensors, start, 8 + len(encoded)
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def put(self, name: str, value: Shaped[np.ndarray, "..."], part: int = 0) -> None:
        """Writes one tensor; or the part of that number, where it is written in equal parts along its first axis."""
        start, stop = self._places[name]
        dtype = self._tensors[name][1]
        assert value.dtype == dtype and (stop - start) % max(1, value.nbytes) == 0, name
        if not value.flags.c_contiguous:
            fill(ordered := np.empty(value.shape, value.dtype), value)
            value = ordered
        self._file.seek(self._begin + start + part * value.nbytes)
        self._file.write(value.reshape(-1).view(np.uint8).data)
        self._left -= value.nbytes

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        assert kind is not None or self._left == 0, f"{self._left} bytes were not written"
