"""The processes of one run: they join, compare what they have, stop at the same place, and leave together.

    signal on any process ── notice ── every process says how many points it has passed ── all stop after the furthest

Every process runs the same program, so all come to the same `point`s in the same order. A signal is told to all through
jax's coordination service; each process then answers with the number of points that it has passed and passes no other
until all have answered. The furthest is where all stop: what it has begun, the others can still do with it, and nobody
waits for a collective that another process will not make.

What takes long (compiling, reading, waiting for data) goes through `wait`, in another thread, so that a signal is
heard: Python runs its handlers between two instructions of the main thread alone, and a compilation is one of them.

A failure on one process is told in the same way; those that cannot hear it, inside a collective, end after a while.
A process that is killed tells nobody: jax's heartbeats find it out and end the others.

Not here: what is done when a run is stopped (loop).
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

from sdxl_jax.errors import TOLD, InputError, Interrupted, MachineError, ProcessFailed, exit_code
from sdxl_jax.files.trees import differences

_T = TypeVar("_T")
_POLL_SECONDS = 0.2
"""Between two looks at what other processes say. Higher: they stop later."""
_GRACE_SECONDS = 10
"""Until a process that does not react to another's failure is ended, most likely inside a collective."""
_AFTER_THE_STOP = 10**9
"""From here on texts are numbered then: not all processes have given the same number before."""
_runs = 0


class _Helper:
    """One thread that does one thing at a time. What is abandoned there ends with the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="work that is waited for").start()

    def _serve(self) -> None:
        while (given := self._jobs.get()) is not None:
            job, future = given
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            del given, job, future  # or the last result lives until the next job

    def start(self, job: Callable[[], _T]) -> "Future[_T]":
        future: Future[_T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        self._jobs.put(None)


class Processes:
    """All processes of this run, as the environment describes them: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or what jax detects (TPU pods, Slurm, Open MPI, Kubernetes). One process where it describes none.

    A context manager, to be entered before any device is touched; in the main thread, it takes SIGTERM and SIGINT.
    Raises InputError for numbers that are missing, MachineError when not all processes have joined in time, ProcessFailed
    for what another process has raised. After an error with several processes, or after work was left after, the
    process is ended at its exit with the code of that error.
    """

    def __init__(self, join_timeout_seconds: float):
        self.index, self.count = 0, 1
        self._join_timeout_seconds = join_timeout_seconds
        self._client: Any = None
        self._prefix = ""
        self._lock = threading.Lock()
        self._signalled: str | None = None
        self._asked: str | None = None
        self._passed = 0
        self._stop_after: int | None = None
        self._stopping = False
        self._failure: tuple[str, int] | None = None
        """What another process said of its failure, and its exit code."""
        self._gathered = 0
        self._over = threading.Event()
        self._helper = _Helper()
        self._abandoned = False
        self._before: dict[int, Any] = {}

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once, and prints."""
        return self.index == 0

    def __enter__(self) -> "Processes":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._heard)
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
                self.wait(lambda: _initialise(self._join_timeout_seconds), self._join_timeout_seconds)
            except TimeoutError as error:
                given = ", ".join(f"{name}={os.environ.get(name)}" for name in _ENVIRONMENT)
                raise MachineError(
                    "Not all processes of this run joined within processes.join_timeout_seconds="
                    f"{self._join_timeout_seconds:g}. This one has {given} (None: as detected). Start the missing "
                    "ones, check that they reach the coordinator, or raise the time"
                ) from error
        self._client = distributed.global_state.client
        if self._client is None:
            return
        self._prefix = f"sdxl_jax/{_runs}"
        self.index, self.count = distributed.global_state.process_id, distributed.global_state.num_processes
        if self.count > 1:
            threading.Thread(target=self._listen, daemon=True, name="listens to the other processes").start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._helper.close()
        if kind is None:
            self._over.set()
            return
        assert error is not None
        following = self._following(error)
        if self.count > 1:
            self._leave(None if isinstance(following or error, Interrupted | ProcessFailed) else error)
        self._over.set()
        if self._abandoned or self.count > 1:
            # A thread inside a compilation, or a process that does not answer any more, must not hold up the exit.
            atexit.register(_exit_now, exit_code(following or error))
        if following is not None:
            raise following from error

    def _following(self, error: BaseException) -> ProcessFailed | None:
        """The failure of another process, where this one's error is likely what came of it: inside a collective."""
        if self.count == 1 or not isinstance(error, Exception) or isinstance(error, TOLD):
            return None
        if self._failure is None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
                self._hear(self._notices())
        return None if self._failure is None else ProcessFailed(*self._failure)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self._signalled is not None and number == signal.SIGINT:
            os._exit(130)
        if self._signalled is None:
            self._signalled = signal.Signals(number).name
            with contextlib.suppress(OSError):  # nobody reads it; print() may be what was interrupted
                os.write(2, f"\n{self._signalled}: stopping after this step\n".encode())

    # Points and waiting

    def point(self) -> None:
        """To be passed by all processes in the same order. Raises Interrupted where all of them stop."""
        if not self._pass():
            while not self._agreed():
                time.sleep(_POLL_SECONDS / 4)
            self._raise_if_reached()
            with self._lock:
                self._passed += 1

    def _pass(self) -> bool:
        self._hear_alone()
        with self._lock:
            if self._asked is None:
                self._passed += 1
                return True
        return False

    def _hear_alone(self) -> None:
        if self.count == 1 and self._signalled is not None and self._asked is None:
            self._asked, self._stop_after = self._signalled, self._passed

    def _agreed(self) -> bool:
        if self._failure is not None:
            raise ProcessFailed(*self._failure)
        return self._stop_after is not None

    def _raise_if_reached(self) -> None:
        if self._stop_after is not None and self._passed >= self._stop_after and not self._stopping:
            assert self._asked is not None
            self._stopping = True  # what is still to be waited for, belongs to the saving
            self._gathered = _AFTER_THE_STOP
            raise Interrupted(self._asked)

    def wait(self, work: Callable[[], _T], timeout_seconds: float = math.inf, *, stops: bool = True) -> _T:
        """The work's result; it is done in another thread. Raises Interrupted when all stop before the next point, and
        TimeoutError: the work is then abandoned. It must not matter that other processes, or this one, have done it.

        stops=False: a stop must wait, another process's failure need not.
        """
        future = self._helper.start(work)
        deadline = time.monotonic() + timeout_seconds
        try:
            while not concurrent.futures.wait([future], _POLL_SECONDS).done:
                self._hear_alone()
                if self._agreed() and stops:
                    self._raise_if_reached()
                if time.monotonic() > deadline:
                    raise TimeoutError
        except BaseException:
            self._abandoned, self._helper = True, _Helper()  # the other one has its work to end
            raise
        return future.result()

    # What processes tell each other

    def gather(self, text: str, *, stops: bool = True) -> list[str]:
        """What every process gives, in order. All processes call it in the same order; it waits for them, as `wait`."""
        if self.count == 1:
            return [text]
        place = f"{self._prefix}/gather/{self._gathered}"
        self._gathered += 1
        self._client.key_value_set(f"{place}/{self.index}", text)
        return [
            self.wait(functools.partial(self._read, f"{place}/{process}"), stops=stops) for process in range(self.count)
        ]

    def _read(self, key: str) -> str:
        while True:
            try:
                return self._client.blocking_key_value_get(key, 1000)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED") or self._over.is_set():
                    raise

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises InputError on every process if they do not all have the same facts; it names who differs, and in what."""
        everybody = [json.loads(text) for text in self.gather(json.dumps(dict(facts)))]
        first = everybody[0]
        different = [
            f"process {process}: {line}"
            for process, theirs in enumerate(everybody)
            for line in differences(first, theirs, longest=100)
        ]
        if different:
            raise InputError(
                f"The {self.count} processes of this run are not alike (process 0 -> another):\n  "
                + "\n  ".join(different[:8])
                + "\nStart all of them with the same command, the same versions, and the same files in sight"
            )

    def _notices(self) -> dict[str, str]:
        place = f"{self._prefix}/notice/"
        return {key.split("/notice/")[-1]: value for key, value in self._client.key_value_dir_get(place)}

    def _notify(self, name: str, value: str) -> None:
        self._client.key_value_set(f"{self._prefix}/notice/{name}", value, allow_overwrite=True)

    def _listen(self) -> None:
        """Hears signals and failures of all processes, in a thread, until the run is over."""
        while not self._over.wait(_POLL_SECONDS):
            try:
                self._hear(self._notices())
            except jax.errors.JaxRuntimeError:
                continue  # the service is gone or slow: jax itself ends the process, or it answers next time

    def _hear(self, notices: dict[str, str]) -> None:
        failed = [(name, text) for name, text in notices.items() if name.startswith("failed/")]
        if failed and self._failure is None and failed[0][0] != f"failed/{self.index}":
            name, text = failed[0]
            code, _, said = text.partition(" ")
            self._failure = f"Process {name.removeprefix('failed/')} stopped: {said}", int(code)
            threading.Thread(target=self._end_if_stuck, daemon=True).start()
        if self._signalled is not None and "stop" not in notices:
            self._notify("stop", f"{self._signalled} on process {self.index}" if self.count > 1 else self._signalled)
        if "stop" in notices and self._asked is None:
            with self._lock:
                self._asked, passed = notices["stop"], self._passed
            self._notify(f"at/{self.index}", str(passed))
        passed = [int(value) for name, value in notices.items() if name.startswith("at/")]
        if len(passed) == self.count and self._stop_after is None:
            self._stop_after = max(passed)

    def _end_if_stuck(self) -> None:
        if not self._over.wait(_GRACE_SECONDS):
            assert self._failure is not None
            said, code = self._failure
            with contextlib.suppress(OSError):
                os.write(2, f"error: {said}\n".encode())
            os._exit(code)

    def _leave(self, failure: BaseException | None) -> None:
        """Tells a failure. The first process goes last: it has the service, without which jax ends the others abruptly."""
        try:
            if failure is not None:
                self._notify(f"failed/{self.index}", f"{exit_code(failure)} {type(failure).__name__}: {failure}"[:2000])
            if failure is None and self._failure is None:
                self._client.wait_at_barrier(f"{self._prefix}/leave", 60_000)
                jax.distributed.shutdown()
                return
            self._notify(f"left/{self.index}", "")
            if self.is_first:
                deadline = time.monotonic() + 1.5 * _GRACE_SECONDS
                while time.monotonic() < deadline:
                    if sum(name.startswith("left/") for name in self._notices()) == self.count:
                        break
                    time.sleep(_POLL_SECONDS)
                time.sleep(5 * _POLL_SECONDS)  # for their last words
        except jax.errors.JaxRuntimeError:
            pass  # there is nobody left to tell


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _initialise(timeout_seconds: float) -> None:
    values = [os.environ.get(name) for name in _ENVIRONMENT]
    numbers: dict[str, int | None] = {}
    for name, argument in (("JAX_NUM_PROCESSES", "num_processes"), ("JAX_PROCESS_ID", "process_id")):
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise InputError(f"The environment has {name}={value!r}. Give a whole number, 0 or more")
        numbers[argument] = None if value is None else int(value)
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # jax ends the process, without an exception, when its own time is over: ours is over before.
        jax.distributed.initialize(
            num_processes=numbers["num_processes"],
            process_id=numbers["process_id"],
            initialization_timeout=math.ceil(timeout_seconds) + 60,
        )
    except jax.errors.JaxRuntimeError as error:
        raise MachineError(f"The processes cannot be joined: {error}. Start all of them again") from error
    except (ValueError, TypeError, RuntimeError) as error:
        too_late = "must be called before" in str(error)
        if values == [None] * 3 and (too_late or "coordinator_address" in str(error)):
            return  # nothing describes other processes
        given = ", ".join(f"{name}={value}" for name, value in zip(_ENVIRONMENT, values, strict=True))
        raise InputError(
            f"The processes cannot be joined: {error} The environment has {given}. Set all or none"
        ) from error
