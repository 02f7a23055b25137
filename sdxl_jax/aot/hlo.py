"""Optimised HLO in XLA's text form: how often each instruction runs, and the collectives between devices.

The compiler's own figures count the body of a loop once. Here every instruction has its number of executions: the
product of the trip counts of the loops around it. A loop's trip count is the one that the compiler notes, else the
constant with which its condition compares the counter, which in a scan starts from 0.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BOUND = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"^[a-z]+?(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")

_MATRIX_UNITS = re.compile(r'custom_call_target="__cu(?:blas|dnn)|"kind":"__\w*(?:gemm|cudnn)')
"""What computes on a GPU's matrix units: calls of cuBLAS and cuDNN, and fusions around products."""
_MOVES_NOTHING = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"),
    *("after-all", "opt-barrier", "partition-id", "replica-id", "dot", "convolution"),
    *COLLECTIVES,
}
_TAKES_A_PART = re.compile(r" (?:dynamic-slice|dynamic-update-slice|slice|gather)\(")


class Instruction(NamedTuple):
    name: str
    opcode: str
    """As XLA writes it: fusion, custom-call, all-gather-start, while."""
    bytes: int
    """Of the result."""
    cycles: int
    """The compiler's estimate, 0 if it gives none."""
    op_name: str
    """Its path in the traced program."""
    executions: int
    moved: int = 0
    """Bytes that one execution on a GPU reads from memory and writes to it, with nothing in a cache. 0 for products and
    convolutions, which are counted by their FLOPs, for collectives, and for what is not a kernel of its own."""


def shape_bytes(shape: str) -> int:
    """Bytes of a result's type, e.g. `bf16[4,128]{1,0}`; for a tuple the sum of its elements."""
    total = 0
    for kind, dims in _SHAPE.findall(shape):
        bits = 8 if kind == "pred" else int(match[1]) if (match := _BITS.match(kind)) else 0
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions of a program (`compiled.as_text()`), except those inside fusions, which run as one.

    A fusion around a collective, as TPUs have for a sum of which each chip needs a part, has the collective's opcode.
    """
    computations: dict[str, list[str]] = {}
    current: list[str] = []
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            current.append(line)
    yield from _walk(computations, entry, 1)


def _walk(computations: dict[str, list[str]], name: str, executions: int) -> Iterator[Instruction]:
    sizes = _sizes(computations[name])
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        own_name, shape, opcode = match.groups()
        if opcode == "fusion":
            opcode = _fused_collective(computations, line) or opcode
        cycles, op_name, condition = _CYCLES.search(line), _OP_NAME.search(line), _CONDITION.search(line)
        yield Instruction(
            own_name,
            opcode,
            shape_bytes(shape),
            int(cycles[1]) if cycles else 0,
            op_name[1] if op_name else "",
            executions,
            _moved(line, opcode, sizes, computations),
        )
        if opcode in ("while", "call", "conditional") or (opcode.endswith("-start") and "calls=" in line):
            trips = _TRIPS.search(line)
            times = int(trips[1]) if trips else _trips(computations[condition[1]]) if condition else 1
            for called in _CALLED.findall(line):
                for inner in called.strip("{}").split(","):
                    yield from _walk(computations, inner.strip().lstrip("%"), executions * times)


def _sizes(lines: list[str]) -> dict[str, int]:
    """Bytes of the results of a computation's instructions, by their names."""
    found = (_INSTRUCTION.match(line) for line in lines)
    return {match[1]: shape_bytes(match[2]) for match in found if match}


def _operands(line: str, opcode: str) -> list[str]:
    return _NAME.findall(line.partition(f" {opcode}(")[2].partition(")")[0])


def _moved(line: str, opcode: str, sizes: dict[str, int], computations: dict[str, list[str]]) -> int:
    """Bytes that an instruction reads and writes; of an operand of which it takes a part, no more than it writes."""
    if opcode in _MOVES_NOTHING or opcode.endswith(("-start", "-done")) or _MATRIX_UNITS.search(line):
        return 0
    match, called = _INSTRUCTION.match(line), _CALLED.search(line)
    assert match is not None
    inner = computations.get(called[1].lstrip("%"), []) if opcode == "fusion" and called else [line]
    written, inner_sizes = shape_bytes(match[2]), _sizes(inner) if opcode == "fusion" else sizes
    read = [sizes.get(name, 0) for name in _operands(line, opcode)]
    for each in inner:
        if " dynamic-update-slice(" in each:  # in place: the update alone is written, and the rest is not read
            whole, update = (inner_sizes.get(name, 0) for name in _operands(each, "dynamic-update-slice")[:2])
            written = max(written - whole + update, 0)
            read = [0 if size == whole else size for size in read]
    in_part = any(_TAKES_A_PART.search(each) for each in inner)
    return written + sum(min(size, written) if in_part else size for size in read)


def _fused_collective(computations: dict[str, list[str]], line: str) -> str | None:
    """The collective inside a fusion, None without one. An all-reduce there is a reduce-scatter, which TPUs have as a
    sum and a slice of it."""
    called = [name.strip().lstrip("%") for found in _CALLED.findall(line) for name in found.strip("{}").split(",")]
    inner = (_INSTRUCTION.match(each) for name in called for each in computations.get(name, []))
    kind = next((match[3] for match in inner if match and match[3] in COLLECTIVES), None)
    return "reduce-scatter" if kind == "all-reduce" else kind


def _trips(condition: list[str]) -> int:
    """Trip count of a loop; 1 if its condition compares with no constant."""
    bounds = [int(match[1]) for line in condition if (match := _BOUND.search(line))]
    return max(bounds, default=1)


class Collective(NamedTuple):
    kind: str
    count: int
    """Executions per step."""
    bytes: int
    """Of their results on one chip, per step."""


def collectives(found: list[Instruction]) -> list[Collective]:
    """Communication between chips, by kind of collective."""
    totals = []
    for kind in COLLECTIVES:
        # An asynchronous collective is a pair of start and done; the result is that of done, start has operands too.
        own = [each for each in found if each.opcode in (kind, f"{kind}-done")]
        if own:
            count = sum(each.executions for each in own)
            totals.append(Collective(kind, count, sum(each.bytes * each.executions for each in own)))
    return totals


def loop_factor(found: list[Instruction]) -> float:
    """The factor by which the compiler's estimate of the time is too low because it counts each loop's body once."""
    once = sum(each.cycles for each in found)
    return sum(each.cycles * each.executions for each in found) / once if once else 1.0


def moved_bytes(found: list[Instruction]) -> int:
    """What the kernels without products read and write on one GPU, per step."""
    return sum(each.moved * each.executions for each in found)
