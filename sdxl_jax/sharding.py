"""The whole parallel plan on one page: the mesh, and which axis of which parameter lies along it.

    mesh axes   data   copies of the parameters; the batch is split
                fsdp   the batch is split, and so is every large parameter, gathered where it is used

A batch is split over both axes. Parameters, their moving average and the optimiser's moments follow the same rules,
because they have the same paths. The rest is left to XLA's partitioner.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError

RULES: tuple[tuple[str, int | None], ...] = (
    (r"quant_conv/kernel$", None),  # 4 × 4 or 8 × 8 numbers
    (r"conv_out/kernel$", -2),  # few output channels: split the input channels
    (r"(bias|scale|position_embedding)$", None),  # small: every device has them whole
    (r"(kernel|embedding)$", -1),
)
"""(pattern of the path, axis that lies along fsdp, None for replicated); the first that matches decides."""

_SMALL = re.compile(r"(^|/)(v_row|v_col)/|(^|/)ns_coeffs$")
"""What optimisers keep that is small beside the parameter whose path it has: Adafactor's means over rows and columns, a
thousandth of it, and Muon's three numbers. Every device has them whole."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; −1 fills one axis with the devices that are left."""

    data: int = -1
    """Copies of the parameters. Higher: more images a step, the same memory on each device."""
    fsdp: int = 1
    """Devices that share one copy. Higher: less memory on each device, more communication."""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data and fsdp over all devices. Raises InputError if they do not multiply up."""
    devices = devices or jax.devices()
    shape, count = [config.data, config.fsdp], len(devices)
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = count // max(1, -math.prod(shape))
    if math.prod(shape) != count or min(shape) < 1:
        raise InputError(
            f"mesh.data={config.data} × mesh.fsdp={config.fsdp} does not make {count} devices. Choose two numbers "
            f"whose product is {count}, or set one to -1"
        )
    return jax.make_mesh(tuple(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int) -> None:
    """Raises InputError if a batch does not split over the devices, `accumulate` times."""
    shape = dict(mesh.shape)
    multiple = mesh.size * accumulate
    if batch_size % multiple:
        raise InputError(
            f"data.batch_size={batch_size} cannot be split over {mesh.size} devices (data {shape['data']} × fsdp "
            f"{shape['fsdp']}) in {accumulate} micro-batches. Use a multiple of {multiple}, e.g. "
            f"{math.ceil(batch_size / multiple) * multiple}, or another mesh"
        )


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path, joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def place(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of (abstract) arrays, by `RULES`.

    Raises InputError for a parameter that no rule matches, or whose axis does not divide.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        if math.prod(leaf.shape) == 1 or _SMALL.search(name):
            return replicated(mesh)
        axes = [axis for pattern, axis in RULES if re.search(pattern, name)]
        if not axes:
            raise InputError(f"No sharding rule matches {name} {leaf.shape}. Add one to sdxl_jax/sharding.py")
        axis = axes[0]
        if axis is None:
            return replicated(mesh)
        if leaf.shape[axis] % mesh.shape["fsdp"]:
            raise InputError(
                f"{name} has shape {leaf.shape}, whose axis {axis} cannot be split over mesh.fsdp="
                f"{mesh.shape['fsdp']}. Choose a divisor of {leaf.shape[axis]}"
            )
        spec: list[str | None] = [None] * len(leaf.shape)
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def placed(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A tree of abstract arrays that say where they belong, by the rules: what is asked of a restored tree."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, place(mesh, tree)
    )


def put(mesh: Mesh, params: Params) -> Params:
    """Host arrays, placed by the rules."""
    return jax.tree.map(jax.device_put, params, place(mesh, params))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This host's rows of a batch as its part of a global array, split over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)
