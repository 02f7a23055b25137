"""What accelerators can do at most: bfloat16 operations a second and bytes of memory, by jax's name of the device.

Peaks are dense (no sparsity) and of one chip, as its maker publishes them:

- TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e ("peak compute per chip (bf16)", "HBM capacity"). The makers'
  GB are GiB there: a compiler for v5e reports 15.75 GiB that programs may use, for v5p 95.74.
- H100: NVIDIA H100 data sheet, SXM; H200: NVIDIA H200 data sheet, SXM; A100: NVIDIA A100 data sheet, 80 GB and 40 GB.

A device that is not listed, as any CPU, has no known peak: then no share of it is shown.
"""

from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
    """One chip. A TPU v4 or v5p is one device to jax, though it has two cores."""

    name: str
    flops_per_second: float
    """Peak of bfloat16 products summed in float32."""
    memory_bytes: int
    """HBM. Programs may use a little less."""


V4 = Chip("TPU v4", 275e12, 32 * _GIB)
V5E = Chip("TPU v5e", 197e12, 16 * _GIB)
V5P = Chip("TPU v5p", 459e12, 95 * _GIB)
V6E = Chip("TPU v6e", 918e12, 32 * _GIB)

_KINDS: tuple[tuple[str, Chip], ...] = (
    ("TPU v4", V4),
    ("TPU v5 lite", V5E),
    ("TPU v5e", V5E),
    ("TPU v5", V5P),
    ("TPU v5p", V5P),
    ("TPU v6 lite", V6E),
    ("TPU v6e", V6E),
    ("NVIDIA A100-SXM4-40GB", Chip("A100 40 GB", 312e12, 40 * 10**9)),
    ("NVIDIA A100-PCIE-40GB", Chip("A100 40 GB", 312e12, 40 * 10**9)),
    ("NVIDIA A100-SXM4-80GB", Chip("A100 80 GB", 312e12, 80 * 10**9)),
    ("NVIDIA A100 80GB PCIe", Chip("A100 80 GB", 312e12, 80 * 10**9)),
    ("NVIDIA H100 80GB HBM3", Chip("H100 SXM", 989e12, 80 * 10**9)),
    ("NVIDIA H200", Chip("H200 SXM", 989e12, 141 * 10**9)),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None where its figures are not known here."""
    return dict(_KINDS).get(device_kind)
