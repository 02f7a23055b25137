"""Topologies as devices to compile for, without such a device: TPUs here, GPUs in `gpus`. TPUs need libtpu.

A topology's name is the chip and its arrangement: v5e:4x4 has 16 chips. A v4 or v5p slice has three axes, v5e and v6e
two. jax.experimental.topologies; the chips' arrangements are those of cloud.google.com/tpu/docs.
"""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from sdxl_jax import flops
from sdxl_jax.aot import gpus
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.flops import Chip

KNOWN: dict[str, tuple[Chip, tuple[str, ...]]] = {
    "v4": (flops.V4, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")),
    "v5e": (flops.V5E, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": (flops.V5P, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")),
    "v6e": (flops.V6E, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}
"""Chips by the prefix of topology names, with their usual arrangements. Other arrangements of as many axes work too."""


def check(name: str) -> Chip:
    """The chip of a topology. Raises InputError for an unknown one, which lists the known."""
    if gpus.known(name):
        return gpus.check(name)
    kind, _, arrangement = name.partition(":")
    if kind not in KNOWN:
        known = [f"{chip}:{shape}" for chip, (_, shapes) in KNOWN.items() for shape in shapes]
        known += [f"{gpu}:{count}" for gpu in gpus.KNOWN for count in (1, 8)]
        raise InputError(
            f"There is no topology {name!r}. Give one of (nearest first): {', '.join(nearest_first(name, known)[:12])}"
            f"; the chips are {', '.join([*KNOWN, *gpus.KNOWN])}"
        )
    chip, shapes = KNOWN[kind]
    axes = 1 + shapes[0].count("x")
    if not re.fullmatch("x".join([r"\d+"] * axes), arrangement):
        raise InputError(
            f"The topology {name!r} has no arrangement of {axes} axes. Give one such as {kind}:{shapes[0]}; usual "
            f"arrangements of {kind} are {', '.join(shapes)}"
        )
    return chip


def devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices, of GPUs nodes. Raises InputError for a topology that the compiler does not know,
    and without libtpu, or the plugin for GPUs."""
    check(name)
    if slices < 1:
        raise InputError(f"--slices {slices} is out of range. Give 1 or more")
    if gpus.known(name):
        return gpus.devices(name, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "Compiling for TPUs needs libtpu, which is not installed; no TPU is needed. Install it: pip install "
            "'sdxl_jax[aot]'"
        )
    # libtpu would query the metadata of a TPU machine, which this is not.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name.partition(':')[0]}-{chips(name)}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip, as v5p
    if name in ("v5e:1x1", "v6e:1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        kind = name.partition(":")[0]
        raise InputError(
            f"libtpu refuses the topology {name} ({str(error).splitlines()[0]}). Usual arrangements of {kind} are "
            f"{', '.join(KNOWN[kind][1])}"
        ) from error


def chips(name: str) -> int:
    """Number of chips of one slice."""
    return math.prod(map(int, name.partition(":")[2].split("x")))
