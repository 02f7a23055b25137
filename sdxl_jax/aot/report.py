"""Report of an AOT-compiled program: memory, model FLOPs, estimated time and MFU, communication.

Memory is what the compiler allocates on one chip. Model FLOPs are those of the mathematics: the same program with XLA's
attention and without rematerialisation, traced and counted, so that recomputation does not raise the MFU. The time is
the compiler's estimate with three corrections: it counts an instruction whose time it does not know as −1 s
(`_corrected`) and a loop's body once (`hlo.loop_factor`), and it leaves out attention kernels, which are assumed to run
at half of the chip's peak. It does not include waiting for data, and is not a
measurement.

For GPUs the compiler gives no estimate. The time is a bound there, a roofline: `Bound`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from sdxl_jax.aot import hlo
from sdxl_jax.aot.hlo import Collective
from sdxl_jax.flops import Chip, Flops

_KERNEL_MFU = 0.5
_CYCLES_PER_SECOND = 1.5e9
"""Of a v5e."""
_GIB = 2**30
_DEFAULT_SHARE = 0.75
"""Of a GPU's memory, which jax takes unless it is told otherwise."""


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
    """Inputs on one chip: parameters, average, optimiser, auxiliary (numbers beside a critic), frozen (parts of the
    model), batch; and networks beside the model by name: teacher, image features, critic with its optimiser."""
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


class Bound(NamedTuple):
    """The time that one execution takes at least, one kernel after another: products and attention at the peak, and the
    bytes that all other kernels read and write, at the memory's bandwidth.

    Without communication, launches, and waiting. A cache may save some of the bytes.
    """

    products: float
    """Seconds."""
    memory: float
    """Seconds."""

    @property
    def seconds(self) -> float:
        return self.products + self.memory


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
    bound: Bound | None = None
    """On GPUs, in place of the compiler's estimate."""

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
            "bound_seconds": None if self.bound is None else self.bound._asdict(),
            "collectives": [each._asdict() for each in self.collectives],
            "compile_seconds": self.compile_seconds,
            "peak_host_bytes": self.peak_host_bytes,
        }

    def __str__(self) -> str:
        lines = [
            *self.lines(),
            _row("activations", _gib(self.bytes_activations)),
            _row("total, of a chip's", f"{_gib(self.bytes_total)} of {self.chip.memory_bytes / _GIB:.0f}"),
            self.operations(),
            *(self._estimated() if self.bound is None else self._bounded(self.bound)),
            *(_row(c.kind, f"{c.bytes / _GIB:8.2f} GiB per step, {c.count} times") for c in self.collectives),
            _row("compiled in", f"{self.compile_seconds:8.0f} s, {_gib(self.peak_host_bytes).strip()} of this machine"),
        ]
        return "\n".join(lines)

    def _estimated(self) -> list[str]:
        """The rows of the table with the compiler's estimate."""

        def known(value: float | None, text: str) -> str:
            return "unknown: the compiler's estimate is not plausible" if value is None else text.format(value)

        return [
            _row("time, estimated", known(self.seconds, "{:8.3f} s")),
            _row("images/s per chip", known(self.images_per_second_per_chip, "{:8.2f}")),
            _row("MFU", known(self.mfu, "{:8.1%}")),
        ]

    def _bounded(self, bound: Bound) -> list[str]:
        """The rows of the table of a program for GPUs."""
        seconds, per_chip = bound.seconds, self.images / self.chips
        mfu = self.model_flops / self.chips / seconds / self.chip.flops_per_second
        parts = f"{bound.products:.3f} s products at the peak, {bound.memory:.3f} s other memory traffic"
        rows = [
            _row("time, at least", f"{seconds:8.3f} s, a bound: {parts}"),
            _row("images/s per GPU, at most", f"{per_chip / seconds:7.2f}"),
            _row("MFU, at most", f"{mfu:8.1%}"),
            _row("not counted", "what the GPU chooses by timing (autotuning): other kernels, their scratch memory"),
        ]
        if self.fits and self.bytes_total > _DEFAULT_SHARE * self.chip.memory_bytes:
            rows.append(_row("set", f"XLA_PYTHON_CLIENT_MEM_FRACTION=.95: jax takes {_DEFAULT_SHARE:.0%} by default"))
        return rows


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


def _corrected(estimate: float, found: list[hlo.Instruction]) -> float | None:
    """The compiler's estimate with loops in full, None without one.

    For v5e an instruction whose time is not known, such as an attention kernel, counts −1 s: a negative sum is right
    but for whole seconds, of which the instructions' cycles say how many there are.
    """
    if estimate < 0:
        seconds = sum(each.cycles for each in found) / _CYCLES_PER_SECOND
        estimate = estimate % 1 + max(round(seconds - estimate % 1), 0)
    return estimate * hlo.loop_factor(found) if estimate else None


def make(
    compiled: jax.stages.Compiled,
    info: ProgramInfo,
    *,
    executed: Flops,
    compile_seconds: float,
    peak_host_bytes: int,
) -> Report:
    """The report of a compiled program. executed: FLOPs as the program has them, rematerialisation included."""
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}  # none for GPUs
    found = list(hlo.instructions(compiled.as_text() or ""))
    # Layouts on the chip may pad inputs; the compiler's own sum counts.
    padding = memory.argument_size_in_bytes - sum(info.bytes_by_use.values())
    allocated = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    estimate = costs.get("optimal_seconds", 0.0)
    chip, bound = info.chip, None
    if chip.bytes_per_second is not None:
        products = executed.total / info.chips / chip.flops_per_second
        bound = Bound(products, hlo.moved_bytes(found) / chip.bytes_per_second)
    return Report(
        **vars(info),
        bytes_activations=padding + allocated,
        kernel_flops=executed.kernels,
        compiler_seconds=_corrected(estimate, found),
        collectives=tuple(hlo.collectives(found)),
        compile_seconds=compile_seconds,
        peak_host_bytes=peak_host_bytes,
        bound=bound,
    )
