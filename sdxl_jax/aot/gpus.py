"""GPUs as devices to compile for, without a GPU and without a driver. Needs jax's CUDA plugin.

A topology's name is the GPU and how many of them a node has: h200:8. The compiler is given a description of the GPU in
place of an attached one: XLA's `GpuTargetConfigProto`, as text. Its figures are XLA's own where XLA has such a file
(github.com/openxla/xla, xla/backends/gpu/target_config/specs: A100, H100, H200, B200, RTX A6000), else those of
NVIDIA's data sheets and white papers (L4, L40S, A10G, T4; GA102, Ada, Blackwell); the limits of a multiprocessor are in
the CUDA programming guide, "Technical specifications per compute capability". Versions of CUDA and cuDNN are those that
are installed here.

The compiler chooses kernels on the GPU by timing them ("autotuning"). Without one it takes default ones, so that the
program which runs there may use other kernels, and other scratch memory. Products are cuBLAS's here (`OPTIONS`).
"""

import importlib.metadata
import importlib.util
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from sdxl_jax import flops
from sdxl_jax.errors import InputError
from sdxl_jax.flops import Chip


class Gpu(NamedTuple):
    """What the compiler asks of a GPU."""

    chip: Chip
    device_kind: str
    """jax's name of the device."""
    capability: tuple[int, int]
    """NVIDIA's compute capability."""
    multiprocessors: int
    l2_bytes: int
    clock_ghz: float


class Limits(NamedTuple):
    """Of one multiprocessor."""

    float32_units: int
    threads: int
    shared_bytes: int
    block_shared_bytes: int
    """That one block may have."""


LIMITS = {
    (7, 5): Limits(64, 1024, 65536, 65536),
    (8, 0): Limits(64, 2048, 167936, 166912),
    (8, 6): Limits(128, 1536, 102400, 101376),
    (8, 9): Limits(128, 1536, 102400, 101376),
    (9, 0): Limits(128, 2048, 233472, 232448),
    (10, 0): Limits(128, 2048, 233472, 232448),
    (12, 0): Limits(128, 1536, 102400, 101376),
}
"""By compute capability."""

_MIB = 2**20
KNOWN = {
    "a100-40gb": Gpu(flops.A100_40, "NVIDIA A100-SXM4-40GB", (8, 0), 108, 40 * _MIB, 1.41),
    "a100-80gb": Gpu(flops.A100_80, "NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 * _MIB, 1.41),
    "h100": Gpu(flops.H100, "NVIDIA H100 80GB HBM3", (9, 0), 132, 50 * _MIB, 1.98),
    "h100-pcie": Gpu(flops.H100_PCIE, "NVIDIA H100 PCIe", (9, 0), 114, 50 * _MIB, 1.755),
    "h200": Gpu(flops.H200, "NVIDIA H200", (9, 0), 132, 50 * _MIB, 1.98),
    "b200": Gpu(flops.B200, "NVIDIA B200", (10, 0), 148, 132644864, 1.965),
    "l4": Gpu(flops.L4, "NVIDIA L4", (8, 9), 58, 48 * _MIB, 2.04),
    "l40s": Gpu(flops.L40S, "NVIDIA L40S", (8, 9), 142, 96 * _MIB, 2.52),
    "a10g": Gpu(flops.A10G, "NVIDIA A10G", (8, 6), 80, 6 * _MIB, 1.71),
    "t4": Gpu(flops.T4, "Tesla T4", (7, 5), 40, 4 * _MIB, 1.59),
    "rtx-3090": Gpu(flops.RTX_3090, "NVIDIA GeForce RTX 3090", (8, 6), 82, 6 * _MIB, 1.695),
    "rtx-4090": Gpu(flops.RTX_4090, "NVIDIA GeForce RTX 4090", (8, 9), 128, 72 * _MIB, 2.52),
    "rtx-5090": Gpu(flops.RTX_5090, "NVIDIA GeForce RTX 5090", (12, 0), 170, 96 * _MIB, 2.407),
    "rtx-a6000": Gpu(flops.RTX_A6000, "NVIDIA RTX A6000", (8, 6), 84, 6 * _MIB, 1.8),
}
"""GPUs by the prefix of topology names."""


OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""Compiler options. Triton's products need tile sizes from the autotuner: the default ones do not fit every shape, and
the compiler then fails ("Couldn't find output tile sizes")."""


def known(name: str) -> bool:
    """Whether a topology's name is one of a GPU, with any number behind it."""
    return name.partition(":")[0] in KNOWN


def check(name: str) -> Chip:
    """The chip of a topology of known GPUs. Raises InputError without a number of them."""
    kind, _, count = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*", count):
        raise InputError(f"The topology {name!r} does not say how many GPUs a node has. Give 1 or more, e.g. {kind}:8")
    return KNOWN[kind].chip


def devices(name: str, nodes: int = 1) -> list[Any]:
    """The devices of `nodes` nodes. Raises InputError without the plugin, and for a GPU that it refuses."""
    check(name)
    plugin = next((name for name in ("cuda13", "cuda12") if importlib.util.find_spec(f"jax_{name}_plugin")), None)
    if plugin is None:
        raise InputError(
            "Compiling for GPUs needs jax's CUDA plugin, which is not installed; no GPU and no driver is needed. "
            "Install it: pip install 'sdxl_jax[cuda13]'"
        )
    kind, _, count = name.partition(":")
    try:
        description = target(KNOWN[kind], importlib.metadata.version(f"nvidia-cudnn-cu{plugin[4:]}"), plugin[4:])
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=description, topology=f"1x{nodes}x{count}"
        )
    except (jax.errors.JaxRuntimeError, importlib.metadata.PackageNotFoundError) as error:
        raise InputError(
            f"The CUDA plugin of jax {jax.__version__} does not compile for {name} ({str(error).splitlines()[0]}). "
            f"Install a complete one: pip install 'sdxl_jax[{plugin}]'"
        ) from error
    return list(topology.devices)


def target(gpu: Gpu, cudnn: str, cuda: str) -> str:
    """XLA's description of a GPU as text. Versions to compile for: cudnn, e.g. "9.28.1.4"; cuda, e.g. "13"."""
    major, minor, patch = cudnn.split(".")[:3]
    limits = LIMITS[gpu.capability]
    # Instructions of this generation alone (sm_90a, sm_100a), which XLA uses on an attached one.
    extension = "ACCELERATED_FEATURES" if gpu.capability in ((9, 0), (10, 0)) else "NONE"
    return f"""
gpu_device_info {{
  name: "{gpu.device_kind}"
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} feature_extension: {extension} }}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {limits.float32_units}
  threads_per_core_limit: {limits.threads}
  shared_memory_per_core: {limits.shared_bytes}
  shared_memory_per_block_optin: {limits.block_shared_bytes}
  shared_memory_per_block: 49152
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.chip.memory_bytes}
  memory_bandwidth: {int(gpu.chip.bytes_per_second or 0)}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
runtime_version {{ major: {cuda} minor: 0 patch: 0 }}
device_description_str: "{gpu.device_kind}"
"""
