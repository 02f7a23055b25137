"""The lifetime of worker processes, whoever starts them."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Called in a worker process: ends it when its parent process ends, however that ends. Then no orphan continues to
    write, and none holds shared memory, which its tracker then removes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
