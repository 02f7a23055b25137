"""Signals in a command: SIGTERM and Ctrl-C before, or without, the training loop, which has its own handlers
(processes); SIGUSR1 in every command."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from sdxl_jax.errors import Interrupted


def print_stacks_on_sigusr1() -> None:
    """From now on, SIGUSR1 prints the stacks of all threads on stderr: where a process hangs. It continues."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr is closed, or no file
        faulthandler.register(signal.SIGUSR1, all_threads=True)


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """Inside, a signal ends the process with 143 or 130: there is nothing to save yet."""

    def exit_at_once(number: int) -> None:
        with contextlib.suppress(OSError):  # print() may be what was interrupted
            os.write(2, f"stopped by {signal.Signals(number).name} before there was anything to save\n".encode())
        os._exit(128 + number)

    with _handled(exit_at_once):
        yield


@contextlib.contextmanager
def stop() -> Iterator[None]:
    """Inside, a signal raises Interrupted, so that incomplete files are removed; a second signal ends the process at
    once."""
    received: list[int] = []

    def raise_or_exit(number: int) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        raise Interrupted(signal.Signals(number).name)

    try:
        with _handled(raise_or_exit):
            yield
    except Interrupted as stopped:
        print(
            f"stopped by {stopped.signal_name}; what was finished is kept. Run the same command to resume",
            file=sys.stderr,
        )
        raise


@contextlib.contextmanager
def _handled(handle: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = {
        number: signal.signal(number, lambda number, _: handle(number)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
