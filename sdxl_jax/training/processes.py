"""The processes of one run: they join, compare their facts, agree on the point to stop at, and leave together.

    running ── signal on any process ─> stop broadcast ─ all have reported ──> stop agreed ── stop point ──> Interrupted
       ├────── error on any process ──> failure broadcast ──> ProcessFailed on the others
       └────── no work left ───────────> over

Every process runs the same program, so all reach the same `stop_point`s in the same order. A stop point costs nothing
while no stop is requested: nobody waits there. A signal is broadcast through jax's coordination service; each process
then reports how many stop points it has passed and passes no further one until all have reported. All stop after the
highest count: what the furthest process has begun, the others can still complete with it, and nobody waits for a
collective that another process will not enter.

Long work (compiling, reading, waiting for data) goes through `wait`, in another thread, so that signals are handled:
Python runs its handlers only between two instructions of the main thread, and a compilation is one instruction.

A failure on one process is broadcast in the same way; processes that cannot react, inside a collective, are ended after
a grace period. A killed process broadcasts nothing: it is lost once its heartbeats stop, and the others end.

Not here: how processes find each other (cluster), heartbeats (heartbeats), what is done when a run is stopped (loop).
"""

import atexit
import concurrent.futures
import contextlib
import functools
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the coordination service's client has no public name

from sdxl_jax.errors import REPORTED, InputError, Interrupted, MachineError, ProcessFailed, exit_code
from sdxl_jax.files.trees import differences
from sdxl_jax.progress import print_stacks
from sdxl_jax.training import cluster, heartbeats

_T = TypeVar("_T")
_POLL_SECONDS = 0.2
"""Between two polls of the broadcasts. Higher: processes stop later."""
_GRACE_SECONDS = 10
"""Until a process that does not react to another's failure, most likely inside a collective, is ended."""
_FIRST_GATHER_AFTER_STOP = 10**9
"""Its number: before the stop, processes may have gathered different numbers of times."""
_runs = 0


class _WorkerThread:
    """A daemon thread that does one job at a time. An abandoned job ends with the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="awaited work").start()

    def _serve(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, future = entry
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            del entry, job, future  # or the last result lives until the next job

    def start(self, job: Callable[[], _T]) -> "Future[_T]":
        future: Future[_T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        self._jobs.put(None)


class Processes:
    """All processes of this run, as the environment describes them: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or what jax detects (TPU pods, Slurm, Open MPI, Kubernetes). One process if it describes none.

    A context manager, to be entered before any device is touched; in the main thread, it handles SIGTERM and SIGINT,
    unless handles_signals=False: then whoever does so calls `abandon`.
    Raises InputError for missing numbers, MachineError when not all processes have joined in time, ProcessFailed for
    what another process has raised. After an error with several processes, or with work abandoned in its thread, the
    process is ended at its exit with the exit code of that error.
    """

    def __init__(self, join_timeout_seconds: float, handles_signals: bool = True):
        self.index, self.count = 0, 1
        self._join_timeout_seconds, self._handles_signals = join_timeout_seconds, handles_signals
        self._client: Any = None
        self._prefix = ""
        self._lock = threading.Lock()
        self._received_signal: str | None = None
        """By this process."""
        self._stop_signal: str | None = None
        """The one for which all processes stop, and where it was received."""
        self._points_passed = 0
        self._stop_after: int | None = None
        """Barriers passed, once all processes agree."""
        self._stopping = False
        self._failure: tuple[str, int] | None = None
        """Another process's: its message and its exit code."""
        self._gathers = 0
        self._over = threading.Event()
        self._has_left = False
        self._worker = _WorkerThread()
        self._abandoned_work = False
        self._previous_handlers: dict[int, Any] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes shared files, and prints."""
        return self.index == 0

    def __enter__(self) -> "Processes":
        if self._handles_signals and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        try:
            self._join()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _join(self) -> None:
        global _runs
        _runs += 1
        if not jax.distributed.is_initialized():
            try:
                self.wait(lambda: cluster.join(self._join_timeout_seconds), self._join_timeout_seconds)
            except TimeoutError as error:
                raise MachineError(
                    "Not all processes of this run joined within processes.join_timeout_seconds="
                    f"{self._join_timeout_seconds:g}. This one has {cluster.environment()}. Start the missing ones, "
                    "check that they reach the coordinator, or raise processes.join_timeout_seconds"
                ) from error
        self._client = distributed.global_state.client
        if self._client is None:
            return
        self._prefix = f"sdxl_jax/{_runs}"
        self.index, self.count = distributed.global_state.process_id, distributed.global_state.num_processes
        if self.count > 1:
            threading.Thread(target=self._listen, daemon=True, name="polls the other processes").start()
            heartbeats.delay_aborts()
            coordinator = distributed.global_state.coordinator_address or ""
            facts = self._client, self._prefix, self.index, self.count, coordinator
            heartbeats.Heartbeats(*facts, self._over, self._on_lost).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._worker.close()
        if kind is None:
            self._over.set()
            return
        assert error is not None
        root_failure = self.root_failure(error)
        if self.count > 1 and not self._has_left:
            self._leave(None if isinstance(root_failure or error, Interrupted | ProcessFailed) else error)
        self._over.set()
        if self._abandoned_work or self.count > 1:
            # A thread inside a compilation, or a process that no longer answers, must not hold up the exit.
            atexit.register(_exit_now, exit_code(root_failure or error))
        if root_failure is not None:
            raise root_failure from error

    def root_failure(self, error: BaseException) -> ProcessFailed | None:
        """The failure of another process of which this one's error is likely a consequence: inside a collective."""
        if self.count == 1 or not isinstance(error, Exception) or isinstance(error, REPORTED):
            return None
        if self._failure is None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
                self._poll(self._broadcasts())
        return None if self._failure is None else ProcessFailed(*self._failure)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received_signal is not None and number == signal.SIGINT:
            os._exit(130)
        if self._received_signal is None:
            self._received_signal = signal.Signals(number).name
            with contextlib.suppress(OSError):  # nobody reads it; print() may be what was interrupted
                os.write(2, f"\n{self._received_signal}: stopping after this step\n".encode())

    # Barriers and waiting

    def stop_point(self) -> None:
        """To be passed by all processes in the same order. Raises Interrupted at the one where all of them stop.

        It waits for the others only while a stop is being agreed on: it synchronises stopping, not the work.
        """
        if not self._try_pass():
            while not self._stop_agreed():
                time.sleep(_POLL_SECONDS / 4)
            self._raise_if_reached()
            with self._lock:
                self._points_passed += 1

    def _try_pass(self) -> bool:
        self._poll_alone()
        with self._lock:
            if self._stop_signal is None:
                self._points_passed += 1
                return True
        return False

    def _poll_alone(self) -> None:
        """A single process agrees with itself, without the coordination service."""
        if self.count == 1 and self._received_signal is not None and self._stop_signal is None:
            self._stop_signal, self._stop_after = self._received_signal, self._points_passed

    def _stop_agreed(self) -> bool:
        if self._failure is not None:
            raise ProcessFailed(*self._failure)
        return self._stop_after is not None

    def _raise_if_reached(self) -> None:
        if self._stop_after is not None and self._points_passed >= self._stop_after and not self._stopping:
            assert self._stop_signal is not None
            self._stopping = True  # whatever is still waited for belongs to saving
            self._gathers = _FIRST_GATHER_AFTER_STOP
            raise Interrupted(self._stop_signal)

    def wait(self, work: Callable[[], _T], timeout_seconds: float = math.inf, *, stops: bool = True) -> _T:
        """The work's result; it is done in another thread. Raises Interrupted when all stop before the next stop point,
        and TimeoutError: the work is then abandoned. It must be harmless that other processes, or this one, have done
        it.

        stops=False: a stop has to wait for the work, another process's failure does not.
        """
        future = self._worker.start(work)
        deadline = time.monotonic() + timeout_seconds
        try:
            while not concurrent.futures.wait([future], _POLL_SECONDS).done:
                self._poll_alone()
                if self._stop_agreed() and stops:
                    self._raise_if_reached()
                if time.monotonic() > deadline:
                    raise TimeoutError
        except BaseException:
            self._abandoned_work, self._worker = True, _WorkerThread()  # the old one is still busy
            raise
        return future.result()

    # Messages between processes

    def gather(self, text: str, *, stops: bool = True) -> list[str]:
        """The texts of all processes, in their order (all-gather). All processes call it in the same order; it waits
        for them, as `wait` does."""
        if self.count == 1:
            return [text]
        key = f"{self._prefix}/gather/{self._gathers}"
        self._gathers += 1
        self._client.key_value_set(f"{key}/{self.index}", text)
        return [
            self.wait(functools.partial(self._read, f"{key}/{process}"), stops=stops) for process in range(self.count)
        ]

    def _read(self, key: str) -> str:
        while True:
            try:
                return self._client.blocking_key_value_get(key, 1000)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED") or self._over.is_set():
                    raise

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises InputError on every process unless all have the same facts; the message names the processes and facts
        that differ."""
        facts_by_process = [json.loads(text) for text in self.gather(json.dumps(dict(facts)))]
        first = facts_by_process[0]
        different = [
            f"process {process}: {line}"
            for process, theirs in enumerate(facts_by_process)
            for line in differences(first, theirs, longest=100)
        ]
        if different:
            raise InputError(
                f"The {self.count} processes of this run disagree (process 0 -> another):\n  "
                + "\n  ".join(different[:8])
                + "\nStart all of them with the same command and library versions, on machines that see the same files"
            )

    def _broadcasts(self) -> dict[str, str]:
        """What was broadcast so far: "stop", "at/PROCESS" (stop points passed), "failed/PROCESS", "left/PROCESS"."""
        key = f"{self._prefix}/broadcast/"
        return {name.split("/broadcast/")[-1]: value for name, value in self._client.key_value_dir_get(key)}

    def _broadcast(self, name: str, value: str) -> None:
        self._client.key_value_set(f"{self._prefix}/broadcast/{name}", value, allow_overwrite=True)

    def _listen(self) -> None:
        """Polls for signals and failures of all processes, in a thread, until the run is over."""
        while not self._over.wait(_POLL_SECONDS):
            try:
                self._poll(self._broadcasts())
            except jax.errors.JaxRuntimeError:
                continue  # the service is gone or slow: heartbeats notice it, or it answers next time

    def _poll(self, broadcasts: dict[str, str]) -> None:
        """Reacts to broadcasts, and broadcasts a signal of this process."""
        failed = [(name, text) for name, text in broadcasts.items() if name.startswith("failed/")]
        if failed and self._failure is None and failed[0][0] != f"failed/{self.index}":
            name, text = failed[0]
            code, _, message = text.partition(" ")
            self._failure = f"Process {name.removeprefix('failed/')} stopped: {message}", int(code)
            threading.Thread(target=self._exit_if_stuck, daemon=True).start()
        if self._received_signal is not None and "stop" not in broadcasts:
            where = f" on process {self.index}" if self.count > 1 else ""
            self._broadcast("stop", f"{self._received_signal}{where}")
        if "stop" in broadcasts and self._stop_signal is None:
            with self._lock:
                self._stop_signal, passed = broadcasts["stop"], self._points_passed
            self._broadcast(f"at/{self.index}", str(passed))
        passed = [int(value) for name, value in broadcasts.items() if name.startswith("at/")]
        if len(passed) == self.count and self._stop_after is None:
            self._stop_after = max(passed)

    def abandon(self, failure: BaseException) -> None:
        """Broadcasts the failure of a process that ends by other means than its exception: its main thread hangs, or
        its work was stopped although the others need it."""
        if self.count > 1:
            self._leave(failure)

    def _on_lost(self, process: int, reason: str) -> None:
        """Process 0 broadcasts that another is lost. Without process 0 there are no broadcasts, and whoever reads one
        waits for ever: the process is ended at once."""
        message = f"{reason}. It was killed, or its machine is gone. Start all processes again: the run resumes"
        if process == 0:
            self._failure = f"Process 0 stopped: {message}", MachineError.code
            self._exit_with_failure()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._broadcast(f"failed/{process}", f"{MachineError.code} {message}")
            self._broadcast(f"left/{process}", "")

    def _exit_if_stuck(self) -> None:
        if not self._over.wait(_GRACE_SECONDS):
            print_stacks()
            self._exit_with_failure()

    def _exit_with_failure(self) -> None:
        assert self._failure is not None
        message, code = self._failure
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\n".encode())
        os._exit(code)

    def _leave(self, failure: BaseException | None) -> None:
        """Broadcasts a failure. The first process leaves last: it hosts the coordination service, without which jax
        ends the others abruptly."""
        self._has_left = True
        try:
            if failure is not None:
                is_signal = isinstance(failure, Interrupted)
                message = failure.signal_name if is_signal else f"{type(failure).__name__}: {failure}"
                self._broadcast(f"failed/{self.index}", f"{exit_code(failure)} {message}"[:2000])
            if failure is None and self._failure is None:
                self._client.wait_at_barrier(f"{self._prefix}/leave", 60_000)
                jax.distributed.shutdown()
                return
            self._broadcast(f"left/{self.index}", "")
            if self.is_first:
                deadline = time.monotonic() + 1.5 * _GRACE_SECONDS
                while time.monotonic() < deadline:
                    if sum(name.startswith("left/") for name in self._broadcasts()) == self.count:
                        break
                    time.sleep(_POLL_SECONDS)
                time.sleep(5 * _POLL_SECONDS)  # for their final messages
        except jax.errors.JaxRuntimeError:
            pass  # the coordination service is gone


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
