"""The lifetime of worker processes, whoever starts them."""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def end_with_parent() -> None:
    """Called in a worker process: ends it when its parent process ends, however that ends. Then no orphan continues to
    write, and none holds shared memory, which its tracker then removes.

    SIGUSR1, which launchers send to all processes of a job, prints the worker's stacks as it does the parent's; without
    a handler it would end the worker."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr is closed
        faulthandler.register(signal.SIGUSR1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
