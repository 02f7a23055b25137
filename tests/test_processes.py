"""The promises of processes: to stop at the same point, to name the one that differs, never to wait for ever.

Several processes are threads here, around a coordination service of a few lines; real processes are in test_killing.py.
"""

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.training import heartbeats, processes, setup
from sdxl_jax.training.heartbeats import Heartbeats
from sdxl_jax.training.processes import Interrupted, Processes, ProcessFailed
from sdxl_jax.training.run_directory import RunDirectory


class Service:
    """The part of jax's coordination service client that Processes uses."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, place: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(place)]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        deadline = time.monotonic() + milliseconds / 1000
        while key not in self.values:
            if time.monotonic() > deadline:
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            time.sleep(0.01)
        return self.values[key]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        del name, milliseconds


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Processes]:
    """Processes of one run, not entered: entering is done in their threads."""
    service = Service()
    members = []
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(processes.atexit, "register", lambda *_: None)

    def join(self: Processes) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    monkeypatch.setattr(Processes, "_join", join)
    for index in range(3):
        process = Processes(1.0)
        process.index, process.count, process._client, process._prefix = index, 3, service, "test"
        members.append(process)
    return members


@pytest.fixture
def codes(three: list[Processes], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the processes would exit with."""
    del three  # which registers nothing
    found = list[int]()
    monkeypatch.setattr(processes.atexit, "register", lambda _, code: found.append(code))
    return found


def together(members: list[Processes], program: Any) -> list[Any]:
    """What program(process) returns, or raises, for each process in a thread of its own."""

    def run(process: Processes) -> Any:
        try:
            with process:
                return program(process)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(run, members))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_a_signal_on_any_process_stops_all_after_the_same_step(three: list[Processes], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pauses = rng.uniform(0, 0.02, (3, 1000))
    signalled, at = int(rng.integers(3)), int(rng.integers(5, 30))
    steps = [0, 0, 0]

    def program(process: Processes) -> int:
        try:
            for step in range(1000):
                time.sleep(pauses[process.index, step])
                if process.index == signalled and step == at:
                    process._received_signal = "SIGTERM"
                process.stop_point()
                steps[process.index] += 1
        except Interrupted as stopped:
            assert f"SIGTERM on process {signalled}" == stopped.signal_name
        return steps[process.index]

    assert len(set(together(three, program))) == 1
    assert at <= steps[0] < 1000


def test_a_signal_ends_the_wait_for_work_unless_another_process_is_past_it(three: list[Processes]) -> None:
    """Two processes are compiling what the third has compiled: they finish. After it, all abandon their work."""
    past = threading.Event()

    def program(process: Processes) -> float:
        if process.index == 0:
            process.stop_point()
            past.set()
            process._received_signal = "SIGTERM"
        else:
            past.wait()
            process.wait(lambda: time.sleep(1))
            process.stop_point()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            process.wait(lambda: time.sleep(5))
        return time.monotonic() - began

    assert max(together(three, program)) < 4


def test_what_is_waited_for_after_the_stop_is_not_interrupted_again(three: list[Processes]) -> None:
    """The last checkpoint: processes agree on it, and one is slow; its thread is still busy with abandoned work."""

    def program(process: Processes) -> list[str]:
        if process.index == 0:
            process._received_signal = "SIGTERM"
        with pytest.raises(Interrupted):
            process.wait(lambda: time.sleep(4))
        time.sleep(process.index)
        began = time.monotonic()
        gathered = process.gather(f"saved by {process.index}")
        assert time.monotonic() - began < 3
        return gathered

    assert together(three, program) == [["saved by 0", "saved by 1", "saved by 2"]] * 3


def test_texts_gathered_before_the_stop_are_not_taken_for_those_after_it(three: list[Processes]) -> None:
    """One has compiled the next bucket's step and gathers, the others are stopped while compiling; then all save."""

    def program(process: Processes) -> list[str]:
        process.stop_point()
        with pytest.raises(Interrupted):
            if process.index:
                process.wait(lambda: time.sleep(4))
            else:
                process._received_signal = "SIGTERM"
                process.gather("compiled")
        return process.gather(f"saved by {process.index}", stops=False)

    assert together(three, program) == [["saved by 0", "saved by 1", "saved by 2"]] * 3


def test_processes_that_agree_on_a_checkpoint_are_not_stopped_within(three: list[Processes]) -> None:
    """Otherwise one process would begin it again while another has written it."""

    def program(process: Processes) -> int:
        if process.index == 0:
            process._received_signal = "SIGTERM"
        time.sleep(process.index)
        written = len(process.gather("", stops=False))
        with pytest.raises(Interrupted):
            process.stop_point()
        return written

    assert together(three, program) == [3] * 3


def test_processes_gather_in_order(three: list[Processes]) -> None:
    assert (
        together(three, lambda process: (process.gather(f"a{process.index}"), process.gather("b")))
        == [(["a0", "a1", "a2"], ["b", "b", "b"])] * 3
    )


def test_a_process_that_differs_is_named_on_all_processes(three: list[Processes], tmp_path: Path) -> None:
    config = tiny.train_config(tiny.make_folder(tmp_path / "images"))
    dataset = BucketedDataset(config.data, Tokenizer.of(config.model.text))
    unused = RunDirectory.here(tmp_path / "unused")

    def program(process: Processes) -> None:
        training = dataclasses.replace(config.training, seed=int(process.index == 2))
        process.compare(setup._facts(dataclasses.replace(config, training=training), unused, dataset, None))

    for outcome in together(three, program):
        assert isinstance(outcome, InputError)
        assert "process 2: configuration.training.seed: 0 -> 1" in str(outcome)
        assert "process 1" not in str(outcome)


def test_a_failure_on_one_process_ends_the_others_with_its_message(three: list[Processes]) -> None:
    def program(process: Processes) -> None:
        if process.index == 1:
            raise InputError("its disk is full")
        process.wait(lambda: time.sleep(8))

    outcomes = together(three, program)
    for index in (0, 2):
        assert isinstance(outcomes[index], ProcessFailed)
        assert str(outcomes[index]) == "Process 1 stopped: InputError: its disk is full"


def test_a_process_that_is_stopped_alone_ends_the_others(three: list[Processes], codes: list[int]) -> None:
    """Where a signal does not wait for a stop point: the others need what this one would have done."""

    def program(process: Processes) -> None:
        if process.index == 1:
            stopped = Interrupted("SIGTERM")
            process.abandon(stopped)
            raise stopped
        process.wait(lambda: time.sleep(8))

    outcomes = together(three, program)
    assert [str(outcomes[index]) for index in (0, 2)] == ["Process 1 stopped: SIGTERM"] * 2
    assert codes == [143, 143, 143]


FAULTS = [
    (InputError("no such bucket"), 2),
    (MachineError("its disk is full"), 1),
    (OSError(errno.EIO, "its disk fails"), 1),
    (FileNotFoundError(errno.ENOENT, "no such file"), 2),
    (ZeroDivisionError("our own mistake"), 1),
]


@pytest.mark.parametrize(
    ("fault", "code"),
    [*FAULTS[:2], *(pytest.param(*each, marks=pytest.mark.slow) for each in FAULTS[2:])],
    ids=[type(fault).__name__ for fault, _ in FAULTS],
)
def test_all_processes_end_with_the_code_of_the_one_whose_fault_it_was(
    three: list[Processes], codes: list[int], fault: Exception, code: int
) -> None:
    """Also one that notices it by an error of its own: its collective fails when the other process has gone."""
    gone = threading.Event()

    def program(process: Processes) -> None:
        if process.index == 1:
            raise fault
        if process.index == 2:
            gone.wait(8)
            raise ConnectionError("the other side of a collective has gone")
        try:
            process.wait(lambda: time.sleep(8))
        finally:
            gone.set()

    outcomes = together(three, program)
    assert outcomes[1] is fault
    for index in (0, 2):
        assert isinstance(outcomes[index], ProcessFailed)
        assert not isinstance(outcomes[index], InputError)
        assert (outcomes[index].code, str(outcomes[index])) == (
            code,
            f"Process 1 stopped: {type(fault).__name__}: {fault}",
        )
    assert codes == [code] * 3


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_all_processes_end_with_the_code_of_the_signal_that_one_has_received(
    three: list[Processes], codes: list[int], name: str, code: int
) -> None:
    def program(process: Processes) -> None:
        if process.index == 2:
            process._received_signal = name
        process.wait(lambda: time.sleep(8))

    outcomes = together(three, program)
    assert [outcome.code for outcome in outcomes] == [code] * 3
    assert codes == [code] * 3


def test_a_process_that_does_not_react_is_ended_with_the_others_code(
    three: list[Processes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = list[int]()
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    three[0]._poll({"failed/1": "2 InputError: no such bucket"})
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended == [2]


def test_a_process_whose_heartbeats_stop_is_lost_and_one_that_has_left_is_not() -> None:
    service, lost = Service(), list[tuple[int, str]]()
    members = [
        Heartbeats(service, "test", index, 4, "localhost:1", threading.Event(), lambda *what: lost.append(what))
        for index in range(4)
    ]
    members[1]._exchange("left")
    for second in range(2 * heartbeats.LOST_SECONDS):
        members[2]._exchange(str(second))
        if second < 10:
            members[3]._exchange(str(second))
        members[0]._exchange(str(second))
        members[0]._count_second()
        assert len(lost) == (second >= 8 + heartbeats.LOST_SECONDS)
    assert lost == [(3, f"nothing has been heard of it for {heartbeats.LOST_SECONDS} s")]


def test_process_0_is_lost_when_its_service_is_gone_or_silent_for_long() -> None:
    lost = list[tuple[int, str]]()
    with socket.create_server(("localhost", 0)) as service:
        address = f"localhost:{service.getsockname()[1]}"
        member, another = (
            Heartbeats(Service(), "test", index, 3, address, threading.Event(), lambda *what: lost.append(what))
            for index in (1, 2)
        )
        for _ in range(heartbeats.LOST_SECONDS - 1):
            member._count_second()
            another._count_second()
        another._exchange("1")
        assert not lost
        member._count_second()
        assert lost == [(0, f"nothing has been heard of it for {heartbeats.LOST_SECONDS} s")]
    another._count_second()
    another._count_second()
    assert lost[1:] == [(0, f"it no longer listens on {address}")]


def test_others_are_told_of_a_lost_process_and_nobody_waits_for_it(three: list[Processes], codes: list[int]) -> None:
    def program(process: Processes) -> None:
        if process.index == 0:
            process._on_lost(1, "nothing has been heard of it")
        if process.index != 1:
            process.wait(lambda: time.sleep(8))

    began = time.monotonic()
    outcomes = together(three, program)
    assert time.monotonic() - began < 5
    assert [type(outcome) for outcome in outcomes] == [ProcessFailed, type(None), ProcessFailed]
    assert str(outcomes[2]).startswith("Process 1 stopped: nothing has been heard of it. It was killed")
    assert codes == [1, 1]


def test_one_process_stops_at_its_next_stop_point_and_gets_its_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stopped, Processes(1.0) as alone:
        assert (alone.is_first, alone.count, alone.gather("alone")) == (True, 1, ["alone"])
        alone.stop_point()
        os.kill(os.getpid(), signal.SIGTERM)
        alone.stop_point()
    assert (stopped.value.code, stopped.value.signal_name) == (143, "SIGTERM")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_after_the_last_step_stops_nothing() -> None:
    """No work is left: the last checkpoint is written, and the process ends with 0."""
    with Processes(1.0) as alone:
        alone.stop_point()
        os.kill(os.getpid(), signal.SIGTERM)
        assert alone.wait(lambda: "saved", stops=False) == "saved"


def test_an_error_in_what_is_waited_for_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), Processes(1.0) as alone:
        alone.wait(lambda: 1 / 0)


ALONE = """
import sys
from sdxl_jax.errors import REPORTED
from sdxl_jax.training.processes import Processes
try:
    with Processes(1.0):
        pass
except REPORTED as error:
    print(f"refused: {error}", file=sys.stderr)
    sys.exit(error.code)
"""


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            1,
            "refused: Not all processes of this run joined within processes.join_timeout_seconds=1. This one has "
            "JAX_COORDINATOR_ADDRESS=localhost:1, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=1",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"},
            2,
            "refused: This process could not join the others: The process id of the current process must be defined",
        ),
        ({"JAX_NUM_PROCESSES": "two"}, 2, "refused: The environment has JAX_NUM_PROCESSES=two. Give a whole number"),
    ],
)
def test_processes_that_cannot_join_say_why(environment: dict[str, str], code: int, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert message in done.stderr
    assert done.returncode == code
