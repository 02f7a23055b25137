"""Copies of the index of a shard set in a bucket on this machine's disk, where it can be memory-mapped.

    XDG_CACHE_HOME/sdxl_jax/shard_sets/HASH OF THE PATH/HASH OF shards.json/…    all but the shards

A copy appears whole or not at all, and one process makes it while the others of the machine wait. Its folder is named
for the set's description, so that a set which was built again is copied again; copies of what it was before are
removed.

Not here: which files a shard set has (shards); the shards, which are read straight from the bucket (record_files).
"""

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import buckets, objects
from sdxl_jax.files.atomic import partial_path, sync
from sdxl_jax.files.locks import awaited_folder
from sdxl_jax.files.paths import cache_folder
from sdxl_jax.progress import tqdm

_THREADS = 8
_WHAT = "the shard set"


def local_copy(folder: epath.Path, description: epath.Path, content: bytes, others: Sequence[str]) -> Path:
    """The folder with the copy of a shard set's files, which is made if there is none.

    description: its file, with the content that was read. others: the paths of the other files and folders to copy, in
    the set's folder.

    Raises InputError where the set is replaced meanwhile, MachineError where the disk is full or the bucket does not
    answer.
    """
    of_path = cache_folder() / "shard_sets" / _hash(str(folder).encode())
    copy = of_path / _hash(content)
    if copy.exists():
        return copy
    try:
        of_path.mkdir(parents=True, exist_ok=True)
        with awaited_folder(of_path):
            if not copy.exists():  # else another process made it while this one waited
                for old in of_path.iterdir():
                    shutil.rmtree(old)
                _copy(folder, partial_path(copy), others)
                if buckets.read_bytes(description, _WHAT) != content:
                    raise InputError(f"The shard set {folder} was replaced while its index was copied. Start again")
                (partial_path(copy) / description.name).write_bytes(content)
                partial_path(copy).rename(copy)
                sync(of_path)
    except OSError as problem:
        raise fault(problem)(
            f"The index of the shard set {folder} cannot be copied to {of_path} ({problem}). Free space there, or set "
            "XDG_CACHE_HOME to a folder on another disk"
        ) from problem
    return copy


def _copy(folder: epath.Path, destination: Path, others: Sequence[str]) -> None:
    sizes: dict[str, int] = {}
    for name in others:
        if (size := objects.size(folder / name, _WHAT)) is not None:
            sizes[name] = size
        elif below := buckets.files(folder / name, _WHAT):
            sizes |= {f"{name}/{file}": size for file, size in below.items()}
        else:
            raise InputError(
                f"The shard set {folder} has no {name}. Upload the whole folder again, or build the shard set again"
            )
    if shutil.disk_usage(destination.parent).free < (needed := sum(sizes.values())):
        raise MachineError(
            f"The index of the shard set {folder} has {needed / 1e9:.1f} GB, and there is less room in "
            f"{destination.parent}. Free space there, or set XDG_CACHE_HOME to a folder on another disk"
        )
    bar = tqdm(desc="Copying the index", unit="B", unit_scale=True, delay=2, disable=None)
    with bar, ThreadPoolExecutor(_THREADS) as pool:  # waits for its threads, after an error too

        def fetch(name: str) -> None:
            buckets.download(folder / name, destination / name, _WHAT, bar.update)
            sync(destination / name)

        list(pool.map(fetch, sizes))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
