"""What is learnt does not depend on the parallelism: 20 steps, bucket changes included, under every layout.

On eight simulated devices in one process, and on real processes that talk over loopback. The harness is layouts.py.

Tolerance: devices add up in another order, a float32 rounding (6e-8 of a number's size) here and there in each sum, and
20 steps carry it on. Adam's epsilon is 1e-3 in these runs, so that an update follows its gradient: with the default
1e-8, the rounding of a gradient near zero becomes a step of full length.
"""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling
import layouts
import numpy as np
import pytest
import tiny
from layouts import LAYOUTS, STEPS, Options

pytestmark = pytest.mark.slow

LOSS_TOLERANCE = 1e-5
"""Relative."""
STATE_TOLERANCE = 1e-5
"""Absolute, for parameters, average and moments; parameters are of size 1 and move by at most 1e-3 per step."""
HALFWAY = 10
EIGHT = list(LAYOUTS)[1 : list(LAYOUTS).index("data 2")]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    tiny.make_folder(folder / "images")
    return folder


def options(scratch: Path, names: list[str], **others: Any) -> Options:
    return Options(str(scratch / "images"), names, STEPS, str(scratch / "reference"), **others)


def run(scratch: Path, given: Options, processes: int = 1, devices: int = 8) -> list[list[dict[str, Any]]]:
    """What each process prints, one result per layout. devices: simulated devices per process."""
    environment = compiling.environment(scratch / "compiled", devices=devices)
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, layouts.__file__, json.dumps(dataclasses.asdict(given))]
    children, logs = [], [scratch / f"log_{number}" for number in range(processes)]
    try:
        for number, log in enumerate(logs):
            own = environment | ({"JAX_PROCESS_ID": str(number)} if processes > 1 else {})
            with log.open("w") as errors:
                child = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=errors, text=True)
            children.append(child)
        printed = [child.communicate(timeout=1800)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, "\n".join(
        log.read_text()[-2000:] for log in logs
    )
    # gloo, through which processes talk, prints lines of its own
    return [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in printed]


@pytest.fixture(scope="module")
def single(scratch: Path) -> dict[str, Any]:
    """The run on one device, with a checkpoint halfway; the reference for all others."""
    given = options(scratch, ["single"], save=(str(scratch / "single"), HALFWAY))
    [[result]] = run(scratch, given)
    assert len(result["losses"]) == STEPS
    changes = sum(one != other for one, other in zip(result["buckets"], result["buckets"][1:], strict=False))
    assert changes >= 3
    assert np.ptp(result["losses"]) > 1e-2  # a hundred times the tolerance and more: steps differ
    return result


def check(results: list[list[dict[str, Any]]], single: dict[str, Any], first: int = 0) -> None:
    for process in results:
        for result in process:
            expected = single["losses"][first:]
            relative = np.abs(np.array(result["losses"]) / expected - 1).max()
            print(
                f"| {result['layout']} | {result['devices']} | {result['processes']} | {first + 1}–{STEPS} | "
                f"{relative:.1e} | {result['difference']:.1e} |"
            )
            assert result["buckets"] == single["buckets"][first:]
            assert result["misplaced"] == []
            assert len(result["losses"]) == STEPS - first
            assert relative < LOSS_TOLERANCE, result["layout"]
            assert result["difference"] < STATE_TOLERANCE, result["layout"]


def test_every_layout_of_eight_devices_learns_as_one_device(scratch: Path, single: dict[str, Any]) -> None:
    results = run(scratch, options(scratch, EIGHT))
    assert [result["layout"] for result in results[0]] == EIGHT
    check(results, single)


@pytest.mark.parametrize(
    ("processes", "devices", "layout"),
    [
        (2, 1, "data 2"),
        (2, 1, "fsdp 2"),
        (2, 1, "tensor 2"),  # both processes need all rows
        (2, 2, "data 2 × fsdp 2"),
        (2, 2, "fsdp 2 × tensor 2"),
        (4, 1, "data 2 × fsdp 2"),
        (4, 1, "fsdp 2 × tensor 2"),
        (4, 2, "slice 2 × data 2 × fsdp 2"),
        (4, 2, "data 2 × fsdp 2 × tensor 2"),
    ],
)
def test_real_processes_learn_as_one_device(
    scratch: Path, single: dict[str, Any], processes: int, devices: int, layout: str
) -> None:
    results = run(scratch, options(scratch, [layout]), processes, devices)
    assert {result["processes"] for process in results for result in process} == {processes}
    check(results, single)
    assert len({tuple(process[0]["losses"]) for process in results}) == 1


@pytest.mark.parametrize(
    ("before", "processes", "devices", "after"),
    [
        ("single", 1, 8, "data 2 × fsdp 2 × tensor 2"),
        ("data 2 × fsdp 4", 1, 8, "single"),
        ("data 2 × fsdp 4", 2, 2, "fsdp 2 × tensor 2"),
        ("single", 2, 1, "fsdp 2"),
    ],
)
def test_run_resumes_under_another_layout(
    scratch: Path, single: dict[str, Any], before: str, processes: int, devices: int, after: str
) -> None:
    where = scratch / before.replace(" ", "_")
    if before == "single":
        where = scratch / "single"
    elif not where.exists():
        run(scratch, options(scratch, [before], save=(str(where), HALFWAY)))
    results = run(scratch, options(scratch, [after], restore=(str(where), HALFWAY)), processes, devices)
    check(results, single, HALFWAY)


def test_run_of_two_processes_resumes_in_one(scratch: Path, single: dict[str, Any]) -> None:
    where = str(scratch / "of_two")
    check(run(scratch, options(scratch, ["fsdp 2"], save=(where, HALFWAY)), 2, 1), single)
    check(run(scratch, options(scratch, ["data 8"], restore=(where, HALFWAY))), single, HALFWAY)


def test_an_adapter_learns_on_four_devices_and_in_two_processes_as_on_one(scratch: Path) -> None:
    """Beside a base that is split; its dropout is the same."""
    reference = str(scratch / "adapter")
    given = Options(str(scratch / "images"), ["single"], STEPS, reference, buckets=1, adapter=True)
    [[single]] = run(scratch, given)
    assert np.ptp(single["losses"]) > 1e-2
    names = ["data 2 × fsdp 2", "fsdp 2 × tensor 2"]
    check(run(scratch, dataclasses.replace(given, layouts=names), devices=4), single)
    check(run(scratch, dataclasses.replace(given, layouts=["fsdp 2"]), 2, 1), single)
