"""Heartbeats between the processes of a run: one that was killed, or whose machine is gone, is noticed.

Every process sets a counter in jax's coordination service once a second. Process 0, which hosts the service, watches
the counters; the others watch process 0: that the service answers, and that its port is open.

jax has heartbeats too. It aborts the surviving processes after 100 s, and at once when the connection to the service
breaks, without a message or an exit code of ours (docs/decisions/stopping.md). So ours are quicker, and aborts of the
process are delayed.

Not here: what is done about a lost process (processes).
"""

import contextlib
import ctypes
import itertools
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

LOST_SECONDS = 60
"""Without a sign of life, until a process counts as lost. Higher: longer hangs and network failures are survived; jax
itself gives up after 100."""
_UNANSWERED_SECONDS = 2
"""Until a process that gets no answer checks whether the service's port is still open."""
_LEFT = "left"
"""The last heartbeat of a process whose work is over."""


class Heartbeats:
    """Sends this process's heartbeats, in a thread, and watches the others', in another, until `over` is set.

    coordinator: HOST:PORT of the coordination service. lost: called once, in the second thread, with the index of a
    process that is lost and the reason.
    """

    def __init__(
        self,
        client: Any,
        prefix: str,
        index: int,
        count: int,
        coordinator: str,
        over: threading.Event,
        lost: Callable[[int, str], None],
    ):
        self._client, self._folder, self._index = client, f"{prefix}/heartbeat/", index
        self._coordinator, self._over, self._lost = coordinator, over, lost
        watched = range(1, count) if index == 0 else [0]
        self._silent = dict.fromkeys(watched, 0)
        """Seconds since the last sign of life, by process: counted, not measured, so that a process that was itself
        suspended takes nobody for lost."""
        self._last: dict[int, str] = {}

    def start(self) -> None:
        for work in (self._send, self._watch):
            threading.Thread(target=work, daemon=True, name="heartbeats").start()

    def _send(self) -> None:
        for number in itertools.count():
            self._exchange(str(number))
            if self._over.wait(1):
                self._exchange(_LEFT)
                return

    def _exchange(self, heartbeat: str) -> None:
        """Sets this process's heartbeat and takes note of the others'. Blocks while the service does not answer."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{self._folder}{self._index}", heartbeat, allow_overwrite=True)
            if self._index != 0:
                self._silent[0] = 0
                return
            for name, value in self._client.key_value_dir_get(self._folder):
                process = int(name.rsplit("/", 1)[-1])
                if process in self._silent and self._last.get(process) != value:
                    self._silent[process], self._last[process] = 0, value

    def _watch(self) -> None:
        while not self._over.wait(1):
            self._count_second()

    def _count_second(self) -> None:
        for process in list(self._silent):
            if self._last.get(process) == _LEFT:
                continue
            self._silent[process] += 1
            reason = self._reason(process)
            if reason is not None:
                del self._silent[process]
                self._lost(process, reason)

    def _reason(self, process: int) -> str | None:
        """Why the process counts as lost; None: it does not."""
        silent = self._silent[process]
        if process == 0 and silent >= _UNANSWERED_SECONDS and _refuses(self._coordinator):
            return f"it no longer listens on {self._coordinator}"
        return f"nothing has been heard of it for {LOST_SECONDS} s" if silent >= LOST_SECONDS else None


def _refuses(address: str) -> bool:
    """Whether connections to HOST:PORT are refused: the machine answers, and the program has gone."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def delay_aborts() -> None:
    """From now on an abort of this process takes effect after six seconds, in which a lost process can be reported.

    abort() calls the handler of SIGABRT in the thread that aborts, with the signal's number, 6: as an argument of
    `sleep`, six seconds. The other threads go on. Then the process is aborted as ever.
    """
    library = ctypes.CDLL(None)
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
