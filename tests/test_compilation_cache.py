"""The promises of the compilation cache: on by default, the user's alone, of limited size; never a reason to fail."""

import contextlib
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import pytest

from sdxl_jax.compilation import compilation_cache
from sdxl_jax.compilation.compilation_cache import FolderCache, processor_kind


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache folder without anything in it; jax has no folder, as in a user's first process."""
    compilation_cache._say.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with compiling.quick(tmp_path / "unused"), compiling.full():
        yield tmp_path / "home"


def compiled(number: float = 1.0) -> float:
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.cos(x) * number)(0.0))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-cache"))


def test_programs_are_kept_in_the_users_own_folder_by_default(home: Path) -> None:
    compilation_cache.use("user")
    assert compiled() == 1
    whole = home / "sdxl_jax" / "compiled"
    assert stat.S_IMODE(whole.stat().st_mode) == 0o700
    found = entries(whole)
    assert found and {path.parent for path in found} == {whole / processor_kind()}
    before = {path: path.stat().st_ino for path in found}
    compilation_cache.use("user")
    assert compiled() == 1
    assert {path: path.stat().st_ino for path in entries(whole)} == before, "they were read, not written again"


def test_jaxs_own_setting_is_left_alone(tmp_path: Path, home: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    for folder in ("user", None):
        compilation_cache.use(folder)
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
        assert compilation_cache.current() is None
    compilation_cache.use(tmp_path / "named")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "named")
    assert not home.exists()


def test_without_a_folder_nothing_is_kept(home: Path) -> None:
    compilation_cache.use(None)
    assert compiled() == 1
    assert not home.exists() and compilation_cache.current() is None


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(
    home: Path, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = home / "sdxl_jax" / "compiled"
    whole.mkdir(parents=True)
    whole.chmod(mode)
    for _ in range(2):
        compilation_cache.use("user")
        assert compiled() == 1
    assert not entries(home)
    assert capsys.readouterr().err.count(f"No compilation cache: others may write to {whole}") == 1


def test_a_home_that_cannot_be_written_is_said_once_and_harmless(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.write_text("a file, not a folder")
    for _ in range(2):
        compilation_cache.use("user")
        assert compiled() == 1
    assert capsys.readouterr().err.count("No compilation cache: ") == 1


def test_a_full_disk_is_said_once_and_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    compilation_cache.use(tmp_path / "cache")
    monkeypatch.setattr(compilation_cache.atomic, "write_bytes", full)
    assert [compiled(number) for number in (1.0, 2.0)] == [1, 2]
    assert capsys.readouterr().err.count("cannot be written to: [Errno 28] No space left on device") == 1


def test_a_cache_that_cannot_be_read_is_said_once_and_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    compilation_cache.use(tmp_path)
    cache = compilation_cache.current()
    assert cache is not None
    monkeypatch.setattr(Path, "read_bytes", broken)
    monkeypatch.setattr(Path, "exists", broken)
    assert cache.get("a") is None and cache.get("b") is None and not cache.has("a")
    assert capsys.readouterr().err.count("cannot be read: [Errno 5] Input/output error") == 1


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_a_damaged_entry_is_told_once_and_replaced(tmp_path: Path, damage: str) -> None:
    compilation_cache.use(tmp_path)
    assert compiled() == 1
    whole = {path: path.read_bytes() for path in entries(tmp_path) if path.name.startswith("jit__lambda")}
    for path, content in whole.items():
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if damage == "cut short" else changed)
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert compiled() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled() == 1
    assert len(whole) == 1


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    other = tmp_path / "another kind" / "a-cache"
    other.parent.mkdir()
    other.write_bytes(bytes(40))
    cache = FolderCache(tmp_path / "kind", 100, tmp_path)
    for number, key in enumerate("bcd"):
        compilation_cache.os.utime(other, (1, 1))
        cache.put(key, bytes(30))
        compilation_cache.os.utime(tmp_path / "kind" / f"{key}-cache", (number + 2, number + 2))
    assert not other.exists(), "the oldest, of another processor"
    assert cache.get("b") == bytes(30)  # now the newest
    cache.put("e", bytes(30))
    assert {path.name for path in entries(tmp_path)} == {"b-cache", "d-cache", "e-cache"}
    cache.put("large", bytes(101))
    assert cache.get("large") is None and cache.get("e") is not None


def test_several_writers_and_readers_see_whole_entries(tmp_path: Path) -> None:
    wrong = []

    def work(number: int) -> None:
        cache = FolderCache(tmp_path, 10_000, tmp_path)  # as another process would
        for step in range(40):
            key = str((step + number) % 7)
            if (found := cache.get(key)) not in (None, key.encode() * 2000):
                wrong.append(found)
            cache.put(key, key.encode() * 2000)
        wrong.extend([cache] * cache._failed)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith("-cache")]


def test_another_kind_of_processor_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    here, read = processor_kind(), Path.read_text

    def other(path: Path, *given: object) -> str:
        text = read(path)
        return (
            text.replace("\n\n", "\n\n", 1)
            .replace("flags\t\t: ", "flags\t\t: avx1024 ", 1)
            .replace("Features\t: ", "x")
        )

    assert processor_kind() == here
    with contextlib.suppress(OSError):
        Path("/proc/cpuinfo").read_text()
        monkeypatch.setattr(Path, "read_text", other)
        assert processor_kind() != here
