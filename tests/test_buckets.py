"""files.paths and files.buckets, against a server of the protocol on loopback."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket_server
import pytest

from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import buckets, paths
from sdxl_jax.files.locks import Busy
from sdxl_jax.files.paths import located
from sdxl_jax.weights.formats.checkpoints import COMMITTED

WHAT = "the run directory"


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 1.5)


def of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_machine", lambda: "another machine")


def at(text: str) -> Any:
    """A path in a bucket."""
    return located(text, WHAT)


# Paths


@pytest.mark.parametrize("text", ["gs://bucket/run", "gs:/bucket/run", "gs://bucket/run/"])
def test_a_bucket_is_found_in_text_and_in_what_pathlib_makes_of_it(text: str) -> None:
    for given in (text, Path(text)):
        path = located(given, WHAT)
        assert paths.in_bucket(path)
        assert str(path) == paths.full(path) == "gs://bucket/run"


def test_local_paths_stay_local(tmp_path: Path) -> None:
    assert located("run", WHAT) == Path("run")
    assert not paths.in_bucket(located("C:/run", WHAT))
    assert paths.full(Path("run")) == str(Path.cwd() / "run")


@pytest.mark.parametrize("text", ["s3://bucket/run", "https://host/run", "file:///run"])
def test_other_schemes_are_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(InputError, match=r"is \w+://.* or gs://BUCKET/PATH.* Copy it to a local folder"):
        located(text, WHAT)
    with pytest.raises(InputError, match="Copy it to a local folder"):
        paths.local(text, WHAT)
    with pytest.raises(InputError, match="Copy it to a local folder"):
        paths.local("gs://bucket/run", WHAT)


def test_a_bucket_needs_a_name_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="without a bucket"):
        located("gs://", WHAT)
    monkeypatch.setattr(paths, "_is_installed", lambda module: module != "gcsfs")
    with pytest.raises(InputError, match=r"gcsfs for buckets is not installed.*pip install 'sdxl_jax\[gcs\]'"):
        located("gs://bucket/run", WHAT)


# Objects


def test_a_bucket_that_does_not_exist_is_refused(bucket: str) -> None:
    with pytest.raises(InputError, match=r"there is no bucket no-such-bucket.*gcloud storage buckets create"):
        buckets.check(at("gs://no-such-bucket/run"), WHAT)
    buckets.check(at(f"{bucket}/run"), WHAT)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            "Forbidden",
            InputError,
            "these credentials may not use.*roles/storage.objectUser and roles/storage.legacyBucketReader",
        ),
        ("Unauthorized", InputError, "these credentials may not use"),
        ("ServiceUnavailable", MachineError, "did not answer within.*Nothing that was there is lost"),
    ],
)
def test_what_a_bucket_answers_is_one_sentence_with_its_remedy(error: str, kind: type[Exception], message: str) -> None:
    from google.api_core import exceptions

    with pytest.raises(kind, match=message), buckets.reported("gs://bucket/run", WHAT):
        raise getattr(exceptions, error)("as the server says")


def test_an_object_that_vanishes_is_not_taken_for_a_missing_bucket(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no gs://\S+/gone any more"):
        buckets.download(at(f"{bucket}/gone"), tmp_path / "copy", WHAT)


def test_no_credentials_are_said_with_the_command_that_makes_some() -> None:
    from google.auth.exceptions import DefaultCredentialsError

    with pytest.raises(InputError, match="gcloud auth application-default login"), buckets.reported("gs://b/r", WHAT):
        raise DefaultCredentialsError("none were found")


def test_a_bucket_that_does_not_answer_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "DEADLINE_SECONDS", 1.0)
    began = time.monotonic()
    buckets._client.cache_clear()
    try:
        with bucket_server.in_environment("http://127.0.0.1:9"), pytest.raises(MachineError, match="did not answer"):
            buckets.check(at("gs://bucket/run"), WHAT)
    finally:
        buckets._client.cache_clear()
    assert time.monotonic() - began < 20


def test_listings_are_never_stale(bucket: str) -> None:
    folder = at(f"{bucket}/folder")
    (folder / "one").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["one"]
    buckets.object_at(folder / "two").upload_from_string("2")  # as another process does
    assert (folder / "two").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


def test_files_come_and_go_whole(bucket: str, tmp_path: Path) -> None:
    folder = at(f"{bucket}/a")
    (tmp_path / "source").write_bytes(b"12345")
    wrote: list[int] = []
    buckets.upload(tmp_path / "source", folder / "b/c", WHAT, wrote.append)
    buckets.download(folder / "b/c", tmp_path / "new/copy", WHAT, wrote.append)
    assert (tmp_path / "new/copy").read_bytes() == buckets.read_bytes(folder / "b/c", WHAT) == b"12345"
    assert wrote == [5, 5]
    assert buckets.files(folder, WHAT) == {"b/c": 5}
    buckets.delete(folder / "b/c", WHAT)
    buckets.delete(folder / "b/c", WHAT)
    assert buckets.read_bytes(folder / "b/c", WHAT) is None


def test_a_moved_checkpoint_has_its_commit_marker_last(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at(f"{bucket}/run")
    for name in ("state/d/1", COMMITTED, "_METADATA"):
        (folder / "checkpoints/7" / name).write_text(name)
    with monkeypatch.context() as patch:  # it ends in the middle
        patch.setattr(buckets, "request_options", iter([buckets.request_options() for _ in range(5)]).__next__)
        with pytest.raises(StopIteration):
            buckets.move_folder(folder / "checkpoints/7", folder / "set_aside/7", COMMITTED, WHAT)
    for step in ("checkpoints/7", "set_aside/7"):
        assert COMMITTED not in buckets.files(folder / step, WHAT)
    (folder / "checkpoints/8" / COMMITTED).write_text("")
    (folder / "checkpoints/8/array").write_text("8")
    buckets.move_folder(folder / "checkpoints/8", folder / "set_aside/8", COMMITTED, WHAT)
    assert buckets.files(folder / "checkpoints/8", WHAT) == {}
    assert buckets.files(folder / "set_aside/8", WHAT) == {COMMITTED: 0, "array": 1}


# The mirror


@pytest.fixture
def mirror(bucket: str, tmp_path: Path) -> buckets.Mirror:
    return buckets.Mirror(tmp_path, at(f"{bucket}/run"), WHAT)


def content(bucket: str, name: str) -> bytes | None:
    return buckets.read_bytes(at(f"{bucket}/run") / name, WHAT)


def test_a_mirror_sends_what_is_new_once(
    bucket: str, mirror: buckets.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/1.png").write_bytes(b"image")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "half.partial").write_text("")
    mirror.push()
    assert buckets.files(at(f"{bucket}/run"), WHAT) == {"config.json": 2, "samples/1.png": 5}
    sent: list[str] = []
    upload = buckets.upload
    monkeypatch.setattr(buckets, "upload", lambda path, *rest: (sent.append(path.name), upload(path, *rest)))
    mirror.push()
    (tmp_path / "samples/2.png").write_bytes(b"another")
    mirror.push()
    assert sent == ["2.png"]


def test_a_mirror_sends_only_the_end_of_a_file_that_grows(
    bucket: str, mirror: buckets.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\n")
    mirror.push()
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "upload", lambda *_: pytest.fail("it was uploaded whole"))
        with path.open("a") as file:
            file.write("two\n")
        mirror.push()
    assert content(bucket, "metrics.jsonl") == b"one\ntwo\n"
    assert content(bucket, "metrics.jsonl.partial") is None


def test_a_mirror_sends_a_rewritten_or_foreign_file_whole(bucket: str, mirror: buckets.Mirror, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\n")
    mirror.push()
    (tmp_path / "other").write_text("another beginning\n")
    (tmp_path / "other").replace(path)
    mirror.push()
    assert content(bucket, "metrics.jsonl") == b"another beginning\n"
    (at(f"{bucket}/run") / "metrics.jsonl").write_text("of another process, of another length")
    with path.open("a") as file:
        file.write("end\n")
    mirror.push()
    assert content(bucket, "metrics.jsonl") == b"another beginning\nend\n"


def test_a_pulled_file_goes_on_where_it_ended(bucket: str, mirror: buckets.Mirror, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "config.json", "samples/1.png"):
        (at(f"{bucket}/run") / name).write_text("first\n")
    mirror.pull("*.json", "*.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("second\n")
    mirror.push()
    assert content(bucket, "metrics.jsonl") == b"first\nsecond\n"


def test_a_mirror_says_when_something_is_left(
    mirror: buckets.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "upload", lambda *_: (_ for _ in ()).throw(MachineError("no answer")))
        with pytest.raises(MachineError):
            mirror.push()
    assert mirror.failed
    mirror.push()
    assert not mirror.failed


# The lock


@pytest.fixture
def lock_path(bucket: str) -> Any:
    return at(f"{bucket}/run/lock")


@contextlib.contextmanager
def held(path: Any) -> Iterator[buckets.Lock]:
    lock = buckets.Lock(path, WHAT)
    assert lock.acquire() is None
    with lock:
        yield lock


def test_a_lock_that_is_renewed_is_busy(lock_path: Any, quick_heartbeats: None) -> None:
    with held(lock_path):
        assert buckets.is_held(lock_path, WHAT)
        with pytest.raises(Busy, match=r"process \d+ on "):
            buckets.Lock(lock_path, WHAT).acquire()
    assert not lock_path.exists()
    with held(lock_path):
        pass


def test_a_lock_without_heartbeats_is_taken_over(
    lock_path: Any, quick_heartbeats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        of_another_machine(patch)
        assert buckets.Lock(lock_path, WHAT).acquire() is None  # and it never beats
    began = time.monotonic()
    replaced = buckets.Lock(lock_path, WHAT).acquire()
    assert replaced is not None and replaced.startswith("process ")
    assert time.monotonic() - began >= buckets.PATIENCE_SECONDS


def test_the_lock_of_an_ended_process_of_this_machine_is_taken_over_at_once(
    lock_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = buckets.Lock(lock_path, WHAT)
    monkeypatch.setitem(gone._owner, "process", 2**22 + 1)  # above Linux' highest number
    assert gone.acquire() is None
    began = time.monotonic()
    assert buckets.Lock(lock_path, WHAT).acquire() is not None
    assert time.monotonic() - began < buckets.PATIENCE_SECONDS / 2


def test_an_owner_that_was_replaced_notices_and_leaves_the_lock(lock_path: Any, quick_heartbeats: None) -> None:
    with held(lock_path) as first:
        buckets.delete(lock_path, WHAT)
        second = buckets.Lock(lock_path, WHAT)
        assert second.acquire() is None
        deadline = time.monotonic() + 10
        while first.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert first.lost is not None and first.lost.startswith("process ")
    assert lock_path.exists(), "it is the second's"


def test_an_own_write_whose_answer_was_lost_is_recognised(lock_path: Any) -> None:
    lock = buckets.Lock(lock_path, WHAT)
    assert lock.acquire() is None
    lock._generation = 1  # not the one that was written
    lock.renew()
    assert lock.lost is None
    lock.renew()
    assert lock.lost is None
