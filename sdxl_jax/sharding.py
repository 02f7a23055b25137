"""The whole parallel plan on one page: the mesh, and which axis of which array lies along which of its axes.

    mesh axes   slice    TPU slices, joined by the data-centre network: copies of the parameters; the batch is split
                data     copies of the parameters within a slice; the batch is split
                fsdp     the batch is split, and so is every large parameter, gathered where it is used
                tensor   heads and hidden features are split, and with them the kernels that make and take them

A batch is split over the first three. Parameters, their moving average and the optimiser's moments follow the same
rules, because they have the same paths. Activations are constrained at the joints of the networks (`constrain`), so
that XLA's partitioner gathers parameters and never moves a batch; the rest is left to it.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")
"""Axes of the mesh that a batch is split over."""


class Rule(NamedTuple):
    """How parameters whose path matches lie; axes count from the end, None: not split that way."""

    pattern: str
    fsdp: int | None
    tensor: int | None = None


RULES = (
    Rule(r"quant_conv/kernel$", None),  # 4 × 4 or 8 × 8 numbers
    Rule(r"conv_out/kernel$", -2),  # few output channels: split the input channels
    # What makes heads and hidden features, and what takes them: one sum over `tensor` closes each pair.
    Rule(r"(to_q|to_k|to_v|q_proj|k_proj|v_proj|fc1|ff/proj_in)/kernel$", -2, -1),
    Rule(r"(to_out|out_proj|fc2|ff/proj_out)/kernel$", -1, -2),
    Rule(r"(bias|scale|position_embedding)$", None),  # small: every device has them whole
    Rule(r"(kernel|embedding)$", -1),
)
"""The first rule that matches decides."""

_SMALL = re.compile(r"(^|/)(v_row|v_col)/|(^|/)ns_coeffs$")
"""What optimisers keep that is small beside the parameter whose path it has: Adafactor's means over rows and columns, a
thousandth of it, and Muon's three numbers. Every device has them whole."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; −1 fills one axis with the devices that are left."""

    data: int = -1
    """Copies of the parameters within a slice. Higher: more images a step, the same memory on each device."""
    fsdp: int = 1
    """Devices that share one copy. Higher: less memory on each device, more communication."""
    tensor: int = 1
    """Devices that share the heads and hidden features of one image's transformers. Higher: batches smaller than the
    number of devices become possible; communication in every layer."""
    slices: int = 1
    """TPU slices (or groups of processes) that are joined by a slow network. Higher: more images a step; between slices go
    the gradients alone, once a step."""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes `AXES` over all devices. Raises InputError if they do not multiply up."""
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
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis over all devices but those that share a batch's images."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def process_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): into how many parts the processes cut a batch, and which of them this one's devices take.

    It is the process's own index and the number of processes, unless devices of several processes share images (along
    `tensor`): those take the same part. Raises InputError where parts would overlap.
    """
    rows: dict[int, set[int]] = {}
    parts = batch_parts(mesh)
    for device, (place,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).add(place.indices(parts)[0])
    taken = sorted({tuple(sorted(some)) for some in rows.values()})
    if sum(map(len, taken)) != parts or len(set(map(len, taken))) != 1:
        raise InputError(
            f"The {len(rows)} processes cannot cut a batch into equal parts, as the mesh {dict(mesh.shape)} lies over "
            "their devices. Set mesh.tensor to a divisor, or a multiple, of the devices of a process"
        )
    return taken.index(tuple(sorted(rows[jax.process_index()]))), len(taken)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int) -> None:
    """Raises InputError if a batch does not split over the devices, `accumulate` times."""
    multiple = batch_parts(mesh) * accumulate
    if batch_size % multiple:
        arranged = " × ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH)
        raise InputError(
            f"data.batch_size={batch_size} cannot be split over {batch_parts(mesh)} devices ({arranged}) in "
            f"{accumulate} micro-batches. Use a multiple of {multiple}, e.g. "
            f"{math.ceil(batch_size / multiple) * multiple}, or another mesh"
        )


def check_heads(mesh: Mesh | AbstractMesh, heads: Collection[int]) -> None:
    """Raises InputError if the devices along `tensor` cannot share the heads of the UNet's transformers evenly."""
    tensor, shared = mesh.shape["tensor"], math.gcd(*heads)
    if shared % tensor:
        ways = [str(number) for number in range(1, shared + 1) if not shared % number]
        raise InputError(
            f"mesh.tensor={tensor} does not divide the UNet's attention heads, of which its levels have "
            f"{', '.join(map(str, sorted({*heads})))}. Use {' or '.join(ways)}"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says where an activation lies: one name an axis, "batch", "tensor" or None for not split.

    An axis that its part of the mesh does not divide stays whole, as in sampling one image on many devices. Without a
    mesh (`jax.set_mesh`), and within `jax.shard_map`, it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or not set(AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, activation(mesh, x.shape, *axes))


def activation(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """How an activation lies. See `constrain`."""

    def one(size: int, axis: str | None) -> tuple[str, ...] | None:
        along = BATCH if axis == "batch" else () if axis is None else (axis,)
        parts = math.prod(mesh.shape[name] for name in along)
        return along if along and size % parts == 0 else None

    return PartitionSpec(*map(one, shape, axes))


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
        rule = next((rule for rule in RULES if re.search(rule.pattern, name)), None)
        if rule is None:
            raise InputError(f"No sharding rule matches {name} {leaf.shape}. Add one to sdxl_jax/sharding.py")
        spec: list[str | None] = [None] * len(leaf.shape)
        for mesh_axis, axis in (("fsdp", rule.fsdp), ("tensor", rule.tensor)):
            if axis is None:
                continue
            if leaf.shape[axis] % mesh.shape[mesh_axis]:
                raise InputError(
                    f"{name} has shape {leaf.shape}, whose axis {axis} cannot be split over mesh.{mesh_axis}="
                    f"{mesh.shape[mesh_axis]}. Choose a divisor of {leaf.shape[axis]}"
                )
            spec[axis] = mesh_axis
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
    """This process's rows of a batch as its part of a global array, split as `batch_sharding` says."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)
