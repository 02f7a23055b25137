"""What worker processes share, whoever starts them."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """In a worker process: ends it when the one that started it ends, however that ends. Then nobody goes on writing,
    and nobody holds shared memory any more, which its tracker then removes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
