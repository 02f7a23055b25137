"""Parameters of one network as the tensors of a table, written into a .safetensors file: the reverse of
`lazy.leaves_of`. Dtypes are those in which the parameters are stored, so that nothing is rounded."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from sdxl_jax.errors import InputError
from sdxl_jax.weights.formats.safetensors import Writer
from sdxl_jax.weights.lazy import Leaf, stored_dtypes
from sdxl_jax.weights.names import Table

Tensors = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of tensors, by name."""


def tensors_of(part: str, table: Table, leaves: Mapping[str, Leaf], remedy: str) -> Tensors:
    """The tensors that the leaves PART/… become. Raises InputError, with a remedy, for one that would hold parameters
    of several dtypes."""
    tensors = Tensors()
    for entry in table.entries:
        stored = [(stored_dtypes(leaves[f"{part}/{place.path}"]), place.layer) for place in entry.places]
        dtypes = {each[0 if layer is None or len(each) == 1 else layer] for each, layer in stored}
        if len(dtypes) > 1:
            raise InputError(f"{entry.name} would hold {listed(dtypes)}. {remedy}")
        tensors[entry.name] = entry.shape, dtypes.pop()
    return tensors


def write_leaves(
    writer: Writer,
    part: str,
    table: Table,
    leaves: Mapping[str, Leaf],
    tensors: Tensors,
    written: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes the leaves PART/…, each read once. tensors: those of `tensors_of` among others; written: is told the bytes
    of each leaf."""
    for path, rows in table.by_path.items():
        value = leaves[f"{part}/{path}"].read()
        for entry, number in rows:
            layer = entry.places[number].layer
            one = (value if layer is None else value[layer]).astype(tensors[entry.name][1], copy=False)
            writer.put(entry.name, entry.theirs(one), number)
        written(value.nbytes)


def listed(dtypes: Collection[np.dtype]) -> str:
    """For messages."""
    return " and ".join(sorted(map(str, dtypes)))
