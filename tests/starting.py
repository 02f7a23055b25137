"""What processes of tests do first, to take less time. It imports nothing that takes long itself.

`python starting.py SCRIPT ARGUMENTS` does it and runs the script.
"""

import gc
import runpy
import sys


def collect_rarely() -> None:
    """Garbage collection scans all objects, and traced programs have millions of them: it took a sixth of the time."""
    gc.set_threshold(100_000, 50, 1000)


def without_torch() -> None:
    """tensorboardX imports torch if it is installed, which takes two seconds. For processes that do not use it."""
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    import tensorboardX  # noqa: F401

    del sys.modules["torch"]


if __name__ == "__main__":
    del sys.argv[0]
    collect_rarely()
    without_torch()
    runpy.run_path(sys.argv[0], run_name="__main__")
