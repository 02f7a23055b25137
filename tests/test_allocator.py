"""Freed memory is kept for the process, where that helps and the user has not chosen otherwise."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_jax import allocator
from sdxl_jax.__main__ import computes

FAULTS = """
import resource, sys, threading
from sdxl_jax import allocator

if sys.argv[1] == "kept":
    assert allocator.keep_freed_memory({})

def work():
    for _ in range(20):
        assert b"x" * 2**24  # allocated, written, freed
        assert b"x" * 2**26

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_used_again_without_page_faults():
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)

    # 20 × 80 MiB are 409,600 pages of 4 KiB.
    assert faults("kept") < 4_000
    assert faults("returned") > 40_000


@pytest.mark.parametrize("own", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_what_the_user_chose_stays(own: str):
    assert not allocator.keep_freed_memory({own: "1"})


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["train", "config.py"], True),
        (["--debug", "train", "config.py"], True),
        (["data", "encode", "config.py"], True),
        (["data", "inspect", "images"], False),
        (["convert", "a", "b"], False),
        ([], False),
    ],
)
def test_commands_that_run_a_network_keep_memory(words: list[str], kept: bool):
    assert computes(words) == kept


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0", "proc/driver/nvidia/gpus/0000:01:00.0"])
def test_hosts_of_accelerators_are_left_alone(device: str, tmp_path: Path):
    (tmp_path / device).mkdir(parents=True)
    assert not allocator.keep_freed_memory({}, tmp_path)
