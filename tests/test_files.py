"""sdxl_jax.files: atomic writes, locks between processes, differences of trees."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from etils import epath

from sdxl_jax.files import atomic, locks
from sdxl_jax.files.trees import differences


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [Path, epath.Path])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_whole_without_a_partial_file(tmp_path: Path, kind: type, durable: bool) -> None:
    path = kind(tmp_path / "a.json")
    atomic.write_text(path, "før", durable=durable)
    assert (tmp_path / "a.json").read_bytes() == "før".encode()
    atomic.write_bytes(path, b"after", tag="7", durable=durable)
    assert (tmp_path / "a.json").read_bytes() == b"after"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("kind", [Path, epath.Path])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_in_the_middle_leaves_the_old_file_whole_and_nothing_else(
    tmp_path: Path, kind: type, error: BaseException
) -> None:
    path = kind(tmp_path / "a.json")
    path.write_text("before")
    with pytest.raises(type(error)), atomic.replacing(path, durable=True) as partial:
        partial.write_text("af")
        raise error
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.json"]


def test_a_rename_that_fails_leaves_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        atomic.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]


def test_processes_with_a_tag_each_may_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with atomic.replacing(path, tag="0") as first, atomic.replacing(path, tag="1") as second:
        assert names(tmp_path) == []
        first.write_text("of the first")
        second.write_text("of the second")
        assert all(name.endswith(atomic.PARTIAL) for name in names(tmp_path))
    assert path.read_text() == "of the first"  # whose block ended last
    assert names(tmp_path) == ["a.json"]


def test_the_partial_file_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.partial_path(path).write_text("longer than what follows")
    atomic.write_text(path, "short")
    assert path.read_text() == "short"
    assert names(tmp_path) == ["a.json"]


def test_durable_waits_for_the_file_before_the_rename_and_for_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, fsync = list[list[str]](), os.fsync

    def spy(descriptor: int) -> None:
        waited.append(names(tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    atomic.write_text(tmp_path / "a", "text")
    assert waited == []
    atomic.write_text(tmp_path / "b", "text", durable=True)
    assert waited == [["a", "b.partial"], ["a", "b"]]


def test_a_lock_file_names_its_holder_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked_file(path):
        with pytest.raises(locks.Busy, match=f"^process {os.getpid()} on .+ since 20"), locks.locked_file(path):
            pass
        assert path.exists()
    assert names(tmp_path) == []
    with locks.locked_file(path):
        pass


def test_a_lock_file_that_is_removed_between_opening_and_locking_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / "lock", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        path.unlink()  # as its holder does at its end
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(locks.Busy), locks.locked_file(path):
        pass


def test_a_locked_folder_is_unchanged_and_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with locks.locked_folder(tmp_path):
        assert names(tmp_path) == []
        with pytest.raises(locks.Busy), locks.locked_folder(tmp_path):
            pass
    with locks.locked_folder(tmp_path):
        pass


def test_a_lock_that_another_process_only_glances_at_is_not_busy(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        threading.Timer(0.01, fcntl.flock, (file.fileno(), fcntl.LOCK_UN)).start()
        with locks.locked_file(path):
            pass


def test_a_folder_on_a_file_system_without_locks_is_used_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1.0}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 2, "b": {"c": [2, 1]}}, ["a: 1 -> 2", "b.c: [1, 2] -> [2, 1]"]),
        ({"gone": "x"}, {"new": True}, ["gone: x -> None", "new: None -> True"]),
        ({"a": None}, {"b": None}, []),
        ({"a": {"b": 1}}, {"a": {}}, ["a.b: 1 -> None"]),
        ({"a": {"b": 1}}, {"a": 3}, ["a: {'b': 1} -> 3"]),
        ({"a": float("nan"), "b": [float("nan")]}, {"a": float("nan"), "b": [float("nan")]}, []),
    ],
)
def test_every_value_that_differs_is_named(old: object, new: object, lines: list[str]) -> None:
    assert differences(old, new) == lines
    assert differences(old, new, longest=20) == lines


def test_long_values_are_shown_where_they_differ() -> None:
    old, new = "a" * 500 + "b" * 500, "a" * 500 + "c" * 500
    assert differences({"x": old}, {"x": new}) == [f"x: {old} -> {new}"]
    (line,) = differences({"x": old}, {"x": new}, longest=9)
    assert line == "x: …aaabbbbbb… -> …aaacccccc…"
    assert differences({"x": "a" * 12}, {"x": "a" * 15}, longest=10) == ["x: …aaa -> …aaaaaa"]
