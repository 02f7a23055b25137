"""Opens what training is pointed at: a plain folder of pictures (folders), or a shard set (shards)."""

from pathlib import Path

from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.shards import is_shard_set, open_shards
from sdxl_jax.data.sources import Pictures


def open_pictures(folder: str | Path, *, verify: bool = False) -> Pictures:
    """A folder of images, or a shard set. What is refused is left out and listed.

    verify: decode every image of a folder now; those of a shard set were, when it was built.

    Raises InputError as `open_folder` and `open_shards`.
    """
    return open_shards(folder) if is_shard_set(folder) else open_folder(folder, on_refused="skip", verify=verify)
