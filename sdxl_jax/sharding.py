"""All parallelism on one page: the mesh, and which axis of which array is sharded over which of its axes.

    mesh axes   slice    TPU slices, joined by the data-centre network: copies of the parameters; the batch is split
                data     copies of the parameters within a slice; the batch is split
                fsdp     the batch is split, and so is every large parameter, gathered where it is used
                tensor   heads and hidden features are split, and with them the kernels that produce and consume them
                         (tensor parallelism)

A batch is split over the first three. Parameters, their moving average and the optimiser's moments follow the same
rules, because they have the same paths. Activations are constrained between the blocks of the networks (`constrain`),
so that XLA's partitioner gathers parameters and never moves a batch; the rest is left to it.
"""

import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.mesh import MeshConfig

_Rows = TypeVar("_Rows")

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")
"""Axes of the mesh that a batch is split over."""


class Rule(NamedTuple):
    """The sharding of parameters whose path matches: the axis that is split over fsdp and over tensor, counted from the
    end; None: not split."""

    pattern: str
    fsdp: int | None
    tensor: int | None = None


RULES = (
    Rule(r"quant_conv/kernel$", None),  # 4 × 4 or 8 × 8 numbers
    Rule(r"conv_out/kernel$", -2),  # few output channels: split the input channels
    # Kernels that produce heads and hidden features, and those that consume them: one all-reduce over `tensor` a pair.
    Rule(r"(to_q|to_k|to_v|q_proj|k_proj|v_proj|fc1|ff/proj_in)/kernel$", -2, -1),
    Rule(r"(to_out|out_proj|fc2|ff/proj_out)/kernel$", -1, -2),
    Rule(r"(bias|scale|position_embedding)$", None),  # small: replicated
    Rule(r"(kernel|embedding)$", -1),
)
"""The first matching rule applies."""

_SMALL = re.compile(r"(^|/)(v_row|v_col|discriminator|lpips|image_features)/|(^|/)ns_coeffs$|/kernel/\w+$")
"""What is small and replicated: Adafactor's means over rows and columns, a thousandth of the parameter whose path they
have, and Muon's three numbers; the networks of losses on images; factors of an adapter, below the kernel that they
change."""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes `AXES` over all devices. Raises InputError if its size is not the number of devices."""
    devices = list(jax.devices()) if devices is None else devices
    shape, count = [config.slices, config.data, config.fsdp, config.tensor], len(devices)
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = count // max(1, -math.prod(shape))
    if math.prod(shape) != count or min(shape) < 1:
        raise InputError(
            f"mesh.slices={config.slices} × mesh.data={config.data} × mesh.fsdp={config.fsdp} × mesh.tensor="
            f"{config.tensor} does not make {count} devices. Choose numbers whose product is {count}, or set one to -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and shape[0] != slices:
        raise InputError(f"mesh.slices={shape[0]}, but the {count} devices are in {slices} slices. Set it to {slices}")
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1, 1), devices)
        return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis is split over the mesh axes in `BATCH`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def process_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the part of a batch that this process loads for its devices, and the number of such parts.

    They are the process's index and the number of processes, unless devices of several processes share images (along
    `tensor`): those processes load the same part. Raises InputError if parts would overlap.
    """
    rows_of_process: dict[int, set[int]] = {}
    row_count = batch_parts(mesh)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((row_count,)).items():
        rows_of_process.setdefault(device.process_index, set()).add(rows.indices(row_count)[0])
    parts = sorted({tuple(sorted(rows)) for rows in rows_of_process.values()})
    if sum(map(len, parts)) != row_count or len(set(map(len, parts))) != 1:
        arranged = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise InputError(
            f"The {len(rows_of_process)} processes cannot split a batch into equal parts with this mesh ({arranged}). "
            "Set mesh.tensor to a divisor, or a multiple, of the number of devices per process"
        )
    return parts.index(tuple(sorted(rows_of_process[jax.process_index()]))), len(parts)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int) -> None:
    """Raises InputError if `accumulate` micro-batches of a batch cannot be split evenly over the devices."""
    multiple = batch_parts(mesh) * accumulate
    if batch_size % multiple:
        arranged = " × ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH)
        raise InputError(
            f"data.batch_size={batch_size} cannot be split over {batch_parts(mesh)} devices ({arranged}) in "
            f"{accumulate} micro-batches. Use a multiple of {multiple}, e.g. "
            f"{math.ceil(batch_size / multiple) * multiple}, or another mesh"
        )


def check_heads(mesh: Mesh | AbstractMesh, heads: Collection[int]) -> None:
    """Raises InputError if the size of the `tensor` axis does not divide the UNet's attention heads on every level."""
    tensor, common = mesh.shape["tensor"], math.gcd(*heads)
    if common % tensor:
        divisors = [str(number) for number in range(1, common + 1) if not common % number]
        raise InputError(
            f"mesh.tensor={tensor} does not divide the UNet's attention heads, of which its levels have "
            f"{', '.join(map(str, sorted({*heads})))}. Use {' or '.join(divisors)}"
        )


def constrain(x: Shaped[jax.Array, "*shape"], *axes: str | None) -> Shaped[jax.Array, "*shape"]:
    """Constrains the sharding of an activation: one name per axis, "batch", "tensor" or None for not split.

    An axis whose size is not a multiple of its mesh axes is not split, as when one image is sampled on many devices.
    Without a mesh (`jax.set_mesh`), and within `jax.shard_map`, it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or not set(AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, activation(mesh, x.shape, *axes))


def activation(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an activation of that shape. See `constrain`."""

    def mesh_axes(size: int, axis: str | None) -> tuple[str, ...] | None:
        names = BATCH if axis == "batch" else () if axis is None else (axis,)
        parts = math.prod(mesh.shape[name] for name in names)
        return names if names and size % parts == 0 else None

    return PartitionSpec(*map(mesh_axes, shape, axes))


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path, joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def place(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of (abstract) arrays, by `RULES`.

    Raises InputError for a parameter that no rule matches, or whose axis does not divide.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path).removesuffix("/diff")  # a whole difference is split as what it changes
        if math.prod(leaf.shape) == 1 or _SMALL.search(name):
            return replicated(mesh)
        rule = next((rule for rule in RULES if re.search(rule.pattern, name)), None)
        if rule is None:
            shape = ", ".join(map(str, leaf.shape))
            raise InputError(f"No sharding rule matches {name} ({shape}). Add one to RULES in sdxl_jax/sharding.py")
        spec: list[str | None] = [None] * len(leaf.shape)
        for mesh_axis, axis in (("fsdp", rule.fsdp), ("tensor", rule.tensor)):
            if axis is None:
                continue
            if leaf.shape[axis] % mesh.shape[mesh_axis]:
                raise InputError(
                    f"{name} has shape ({', '.join(map(str, leaf.shape))}), whose axis {axis} cannot be split over "
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}. Set mesh.{mesh_axis} to a divisor of {leaf.shape[axis]}"
                )
            spec[axis] = mesh_axis
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def placed(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """The tree's abstract arrays (ShapeDtypeStruct) with their shardings by `RULES`, e.g. to restore a checkpoint."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, place(mesh, tree)
    )


def put(mesh: Mesh, params: Params) -> Params:
    """Host arrays on the devices, sharded by `RULES`."""
    return jax.tree.map(jax.device_put, params, place(mesh, params))


def put_batch(mesh: Mesh, batch: _Rows) -> _Rows:
    """This process's rows of a batch (a tree of numpy arrays) as its part of global arrays, sharded as
    `batch_sharding`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)
