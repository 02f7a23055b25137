"""What SIGTERM and Ctrl-C do to a command before, or without, the training loop, which has its own way (processes)."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from sdxl_jax.errors import Interrupted


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """Inside, they end the process with 143 or 130: there is nothing to save yet."""

    def act(number: int) -> None:
        with contextlib.suppress(OSError):  # print() may be what was interrupted
            os.write(2, f"stopped by {signal.Signals(number).name} before anything was to be saved\n".encode())
        os._exit(128 + number)

    with _handled(act):
        yield


@contextlib.contextmanager
def stop() -> Iterator[None]:
    """Inside, they raise Interrupted, so that what is half-written is removed; a second one ends at once."""
    heard: list[int] = []

    def act(number: int) -> None:
        if heard:
            os._exit(128 + number)
        heard.append(number)
        raise Interrupted(signal.Signals(number).name)

    try:
        with _handled(act):
            yield
    except Interrupted as stopped:
        print(
            f"stopped by {stopped.signal_name}; what was finished is kept. Run the same command to go on",
            file=sys.stderr,
        )
        raise


@contextlib.contextmanager
def _handled(act: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main one has handlers
        yield
        return
    before = {
        number: signal.signal(number, lambda number, _: act(number)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
