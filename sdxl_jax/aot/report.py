"""Report of an AOT-compiled program: memory, model FLOPs, estimated time and MFU, communication.

Memory is what the compiler allocates on one chip. Model FLOPs are those of the mathematics: the same program with XLA's
attention and without rematerialisation, traced and counted, so that recomputation does not raise the MFU. The time is
the compiler's estimate with two corrections: it counts a loop's body once (`hlo.loop_factor`), and leaves out attention
kernels, which are assumed to run at half of the chip's peak. It does not include waiting for data, and is not a
measurement.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from sdxl_jax.aot import hlo
from sdxl_jax.aot.hlo import Collective
from sdxl_jax.flops import Chip

_KERNEL_MFU = 0.5
_GIB = 2**30


@dataclass(frozen=True)
class ProgramInfo:
    """A program on a topology, before it is compiled."""

    topology: str
    chips: int
    program: str
    """Name of the program, e.g. "train step 1024×1024"."""
    images: int
    """Per execution, over all chips."""
    chip: Chip
    bytes_by_use: dict[str, int]
    """Inputs on one chip: parameters, average, optimiser, frozen, batch."""
    model_flops: float
    """Of the mathematics per execution, over all chips."""

    def as_json(self) -> dict[str, Any]:
        return {
            "topology": self.topology,
            "chips": self.chips,
            "chip": self.chip.name,
            "program": self.program,
            "images": self.images,
            "bytes_per_chip": {**self.bytes_by_use, "memory": self.chip.memory_bytes},
            "model_flops": self.model_flops,
        }

    def lines(self) -> list[str]:
        return [
            f"{self.program}, {self.images} images, on {self.topology} ({self.chips} × {self.chip.name})",
            *(_row(name, _gib(count)) for name, count in self.bytes_by_use.items()),
        ]

    def operations(self) -> str:
        """The line of the table with the model FLOPs."""
        per_image = self.model_flops / self.images / 1e12
        return _row("model FLOPs", f"{self.model_flops / 1e12:8.1f} TFLOP, {per_image:.2f} per image")


@dataclass(frozen=True)
class Report(ProgramInfo):
    """One program on one topology. Bytes and FLOPs as names say; seconds."""

    bytes_activations: int
    """On one chip, what the program allocates: activations, gradients, gathered parameters, and results that do not
    reuse the memory of inputs (donation)."""
    kernel_flops: float
    """Of attention kernels, over all chips, rematerialisation and padded tokens included."""
    compiler_seconds: float | None
    """The compiler's estimate for one execution, loops counted in full; None if it gives none that is plausible."""
    collectives: tuple[Collective, ...]
    compile_seconds: float
    peak_host_bytes: int
    """Of this process, earlier compilations included."""
    saved: bool = False
    """Whether it was saved in `training.compilation_cache`, where training finds it."""

    @property
    def bytes_total(self) -> int:
        return sum(self.bytes_by_use.values()) + self.bytes_activations

    @property
    def fits(self) -> bool:
        return self.bytes_total <= self.chip.memory_bytes

    @property
    def seconds(self) -> float | None:
        """Estimated time of one execution, attention included."""
        if self.compiler_seconds is None:
            return None
        kernels = self.kernel_flops / self.chips / (_KERNEL_MFU * self.chip.flops_per_second)
        return self.compiler_seconds + kernels

    @property
    def images_per_second_per_chip(self) -> float | None:
        return None if self.seconds is None else self.images / self.seconds / self.chips

    @property
    def mfu(self) -> float | None:
        if self.seconds is None:
            return None
        return self.model_flops / self.chips / self.seconds / self.chip.flops_per_second

    def as_json(self) -> dict[str, Any]:
        info = super().as_json()
        sums = {"activations": self.bytes_activations, "total": self.bytes_total}
        return {
            **info,
            "bytes_per_chip": {**info["bytes_per_chip"], **sums},
            "fits": self.fits,
            "kernel_flops": self.kernel_flops,
            "compiler_seconds": self.compiler_seconds,
            "seconds": self.seconds,
            "images_per_second_per_chip": self.images_per_second_per_chip,
            "mfu": self.mfu,
            "collectives": [each._asdict() for each in self.collectives],
            "compile_seconds": self.compile_seconds,
            "peak_host_bytes": self.peak_host_bytes,
        }

    def __str__(self) -> str:
        def known(value: float | None, text: str) -> str:
            return "unknown: the compiler's estimate is not plausible" if value is None else text.format(value)

        lines = [
            *self.lines(),
            _row("activations", _gib(self.bytes_activations)),
            _row("total, of a chip's", f"{_gib(self.bytes_total)} of {self.chip.memory_bytes / _GIB:.0f}"),
            self.operations(),
            _row("time, estimated", known(self.seconds, "{:8.3f} s")),
            _row("images/s per chip", known(self.images_per_second_per_chip, "{:8.2f}")),
            _row("MFU", known(self.mfu, "{:8.1%}")),
            *(_row(c.kind, f"{c.bytes / _GIB:8.2f} GiB per step, {c.count} times") for c in self.collectives),
            _row("compiled in", f"{self.compile_seconds:8.0f} s, {_gib(self.peak_host_bytes).strip()} of this machine"),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class TooLarge(ProgramInfo):
    """A program that the compiler refused because it needs too much memory."""

    reason: str
    """The compiler's message: the memory that it would need."""
    fits = False
    saved = False

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "fits": self.fits, "compiler": self.reason}

    def __str__(self) -> str:
        return "\n".join([*self.lines(), _row("of a chip's", _gib(self.chip.memory_bytes)), self.operations()])


def _row(name: str, value: str) -> str:
    return f"  {name:<24}{value}"


def _gib(count: int) -> str:
    return f"{count / _GIB:8.2f} GiB"


def shard_bytes(tree: Any) -> int:
    """Bytes per device of a tree of abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make(
    compiled: jax.stages.Compiled,
    info: ProgramInfo,
    *,
    kernel_flops: float,
    compile_seconds: float,
    peak_host_bytes: int,
) -> Report:
    """The report of a compiled program. kernel_flops: of attention kernels as the program has them."""
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    found = list(hlo.instructions(compiled.as_text() or ""))
    # Layouts on the chip may pad inputs; the compiler's own sum counts.
    padding = memory.argument_size_in_bytes - sum(info.bytes_by_use.values())
    allocated = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    estimate = costs.get("optimal_seconds", 0.0)
    return Report(
        **vars(info),
        bytes_activations=padding + allocated,
        kernel_flops=kernel_flops,
        compiler_seconds=estimate * hlo.loop_factor(found) if estimate > 0 else None,
        collectives=tuple(hlo.collectives(found)),
        compile_seconds=compile_seconds,
        peak_host_bytes=peak_host_bytes,
    )
