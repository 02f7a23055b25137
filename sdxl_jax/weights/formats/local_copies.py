"""Local copies of weight files in a bucket, for libraries that read local files alone.

    XDG_CACHE_HOME/sdxl_jax/models/HASH OF THE PATH/GENERATION/NAME      by default in ~/.cache

A copy appears whole or not at all, and one process makes it while the others of the machine wait. A file that was
replaced in the bucket, which changes its generation, is copied again, and the old copy is removed.
"""

import hashlib
import shutil
from pathlib import Path

from etils import epath

from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import buckets
from sdxl_jax.files.locks import awaited_folder
from sdxl_jax.files.paths import AnyPath, cache_folder, in_bucket
from sdxl_jax.progress import tqdm

_WHAT = "the file of weights"


def local_copy(path: AnyPath) -> Path:
    """The local copy of a file in a bucket, which is made if there is none; a local path itself.

    Raises InputError for a missing object, MachineError where the disk is full or the bucket does not answer.
    """
    if not in_bucket(path):
        return Path(path)
    found = buckets.version(path, _WHAT)
    if found is None:
        raise InputError(f"There is no file {path}. Check the path")
    generation, size = found
    of_path = folder() / hashlib.sha256(str(path).encode()).hexdigest()[:32]
    copy = of_path / str(generation) / path.name
    try:
        of_path.mkdir(parents=True, exist_ok=True)
        with awaited_folder(of_path):
            if not copy.is_file() or copy.stat().st_size != size:
                for old in of_path.iterdir():
                    shutil.rmtree(old)
                _make(copy, path, size)
    except OSError as problem:
        raise fault(problem)(
            f"{path} cannot be copied to {of_path} ({problem}). Free space there, or set XDG_CACHE_HOME to a folder on "
            "another disk"
        ) from problem
    return copy


def folder() -> Path:
    """Where the copies are."""
    return cache_folder() / "models"


def _make(copy: Path, path: epath.Path, size: int) -> None:
    if (free := shutil.disk_usage(folder()).free) < size:
        raise MachineError(
            f"{path} has {size / 1e9:.2f} GB, and is copied to {folder()}, where {free / 1e9:.2f} GB are left. Free "
            "space there, or set XDG_CACHE_HOME to a folder on another disk"
        )
    with tqdm(total=size, desc=f"copying {path.name}", unit="B", unit_scale=True, delay=2, disable=None) as shown:
        buckets.download(path, copy, _WHAT, shown.update)
