"""A run directory in a bucket, on loopback: it resumes, is locked, and is the run of a local directory to the bit."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket_server
import killing
import pytest
import tiny

from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import located
from sdxl_jax.training import checkpoint, loop, run_directory
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.run_directory import RunDirectory, check_run, locked, opened, write_config
from sdxl_jax.training.status import State, holder, status
from sdxl_jax.weights.formats.checkpoints import COMMITTED, arrays, steps

KILLS = int(os.environ.get("KILLS", "20"))
WHAT = "the run directory"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return killing.train_config(tiny.make_folder(tmp_path_factory.mktemp("data") / "images"), 7)


@pytest.fixture(scope="module")
def dataset(config: TrainConfig) -> BucketedDataset:
    return BucketedDataset(config.data, Tokenizer.of(config.model.text))


@pytest.fixture
def run(bucket: str) -> Any:
    return located(f"{bucket}/runs/a", WHAT)


def until(config: TrainConfig, step: int) -> TrainConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=step))


def with_directory(config: TrainConfig, directory: str) -> TrainConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, directory=directory))


def write_checkpoint(folder: Any, step: int, committed: bool = True) -> None:
    """What `steps` looks at."""
    (folder / "checkpoints" / str(step) / "array").write_text("1")
    if committed:
        (folder / "checkpoints" / str(step) / COMMITTED).write_text("")


# Training


@pytest.mark.slow
def test_a_run_in_a_bucket_stops_and_resumes(config: TrainConfig, run: Any) -> None:
    loop.train(until(config, 4), str(run), progress=False)
    assert steps(run / "checkpoints") == [3, 4]
    assert lines(run) == [1, 2, 3, 4]
    first = events(run)

    loop.train(config, Path(str(run)), progress=False)  # pathlib makes gs:/ of gs://
    assert steps(run / "checkpoints") == [6, 7]
    assert lines(run) == [1, 2, 3, 4, 5, 6, 7]
    assert {path.name for path in (run / "samples").iterdir()} == {"step_00000004.png", "step_00000007.png"}
    assert first.items() < events(run).items(), "files of before are not uploaded again"
    assert not (run / run_directory.LOCK).exists()


def lines(run: Any) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Any) -> dict[str, int]:
    return {name: size for name, size in buckets.files(run, WHAT).items() if name.startswith("tensorboard/")}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_in_a_bucket_killed_many_times_is_the_local_run(
    config: TrainConfig, bucket: str, tmp_path: Path, processes: int
) -> None:
    long = until(config, 18)
    for name in ("warm", "whole"):  # the second finds its programs compiled
        seconds = killing.uninterrupted(long, tmp_path / name, tmp_path, processes)
    counts = killing.campaign(
        long, tmp_path / "whole", tmp_path, processes, KILLS, 1.5 * seconds, 0, print, root=located(bucket, WHAT)
    )
    assert counts.total() == KILLS


@pytest.mark.slow
def test_arrays_alone_in_a_bucket(config: TrainConfig, bucket: str, tmp_path: Path) -> None:
    apart = with_directory(config, f"{bucket}/arrays")
    loop.train(until(apart, 4), tmp_path / "run", progress=False)
    loop.train(apart, tmp_path / "run", progress=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("config.json", "metrics.jsonl", "samples", "tensorboard", "time.jsonl")
    ]
    assert arrays(tmp_path / "run") == located(f"{bucket}/arrays", WHAT)
    assert steps(arrays(tmp_path / "run") / "checkpoints") == [6, 7]
    assert (arrays(tmp_path / "run") / "config.json").read_text() == (tmp_path / "run/config.json").read_text()


@pytest.mark.slow
def test_an_earlier_checkpoint_sets_the_later_ones_aside(config: TrainConfig, run: Any) -> None:
    loop.train(config, str(run), progress=False)
    before = buckets.files(run / "checkpoints/7", WHAT)
    loop.train(config, str(run), progress=False, from_step=6)
    assert buckets.files(run / "set_aside/7", WHAT) == before
    assert lines(run) == [1, 2, 3, 4, 5, 6, 7]
    checkpoint.restore(
        run / "set_aside", 7, objective_of(config).abstract_state(loop.sharding.make_mesh(config.mesh))[0]
    )


@pytest.mark.slow
def test_a_bucket_that_stops_answering_ends_the_run_and_loses_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The server is gone after step 4 and comes back: the run ends with a message, and resumes after step 3."""
    objects, port = tmp_path / "objects", bucket_server.free_port()
    monkeypatch.setattr(buckets, "DEADLINE_SECONDS", 5.0)
    buckets._client.cache_clear()
    with contextlib.ExitStack() as server, bucket_server.in_environment(f"http://127.0.0.1:{port}"):
        server.enter_context(bucket_server.serving(port, objects))
        (objects / "bucket").mkdir(parents=True, exist_ok=True)

        def if_due(self: Any, step: int, state: Any) -> None:
            if step == 4:
                self._checkpoints.finish()
                server.close()
            save(self, step, state)

        with monkeypatch.context() as patch:
            save = loop.Saver.if_due
            patch.setattr(loop.Saver, "if_due", if_due)
            with pytest.raises(
                MachineError, match=r"The checkpoint of step 6 was not written.*did not answer within 5 s"
            ):
                loop.train(config, "gs://bucket/run", progress=False)
        assert "are kept in" in "".join(capsys.readouterr())

        server.enter_context(bucket_server.serving(port, objects))
        run = located("gs://bucket/run", WHAT)
        assert steps(run / "checkpoints") == [3]
        loop.train(config, "gs://bucket/run", progress=False)
        assert steps(run / "checkpoints") == [6, 7]
        assert lines(run) == [1, 2, 3, 4, 5, 6, 7]
    buckets._client.cache_clear()


@pytest.mark.slow
def test_processes_with_different_views_of_the_bucket_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with bucket_server.serving() as one, bucket_server.serving() as other:
        for url in (one, other):
            buckets._client.cache_clear()
            with bucket_server.in_environment(url):
                buckets._client().create_bucket("bucket")
        buckets._client.cache_clear()
        processes = killing.Processes.start(
            config,
            located("gs://bucket/run", WHAT),
            tmp_path,
            2,
            variables=[*map(bucket_server.environment, (one, other))],
        )
        try:
            assert processes.wait(300) == [2, 2]
        finally:
            processes.end()
    for number in range(2):
        log = (tmp_path / f"log_{number}").read_text()
        assert "processes of this run disagree" in log and "lock of the run directory" in log


# What is refused


def test_a_bucket_that_does_not_exist_is_refused_before_work(config: TrainConfig, bucket: str) -> None:
    with pytest.raises(
        InputError, match=r"the run directory is gs://no-such-bucket/run.*gcloud storage buckets create"
    ):
        loop.train(config, "gs://no-such-bucket/run", progress=False)
    with pytest.raises(InputError, match=r"checkpoint\.directory is gs://no-such-bucket/run"):
        loop.train(with_directory(config, "gs://no-such-bucket/run"), f"{bucket}/run", progress=False)


@pytest.fixture
def started(config: TrainConfig, dataset: BucketedDataset, run: Any) -> Any:
    """A run that has its config.json."""
    with opened(run) as directory:
        write_config(objective_of(config), directory, dataset, 0, [])
        directory.push()
    return run


def test_a_run_of_another_configuration_is_refused(config: TrainConfig, started: Any) -> None:
    assert check_run(config, str(started)) == []
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=2))
    with pytest.raises(InputError, match=r"gs://\S+/runs/a belongs to a run with a different configuration"):
        check_run(other, str(started))


def test_checkpoints_without_a_configuration_are_no_run(config: TrainConfig, run: Any) -> None:
    write_checkpoint(run, 3)
    with pytest.raises(InputError, match="is not a run directory: it has no config"):
        check_run(config, str(run))


def test_an_uncommitted_checkpoint_is_not_offered(run: Any) -> None:
    write_checkpoint(run, 3)
    write_checkpoint(run, 6, committed=False)
    assert steps(run / "checkpoints") == [3]
    assert checkpoint.step_to_start_from(run / "checkpoints", None) == 3
    with pytest.raises(InputError, match="no checkpoint of step 6"):
        checkpoint.step_to_start_from(run / "checkpoints", 6)


def test_two_runs_do_not_share_a_checkpoint_directory(config: TrainConfig, bucket: str, tmp_path: Path) -> None:
    write_checkpoint(located(f"{bucket}/arrays", WHAT), 3)
    with pytest.raises(InputError, match="has the checkpoints of another run"):
        check_run(with_directory(config, f"{bucket}/arrays"), tmp_path / "run")


def test_a_run_whose_checkpoints_are_elsewhere_does_not_start_again(
    config: TrainConfig, started: Any, bucket: str
) -> None:
    write_checkpoint(started, 3)
    moved = with_directory(config, f"{bucket}/arrays")
    with pytest.raises(InputError, match=r"The checkpoints of gs://\S+/runs/a are in gs://\S+/runs/a, and checkpoint"):
        check_run(moved, str(started))
    write_checkpoint(located(f"{bucket}/arrays", WHAT), 3)
    assert check_run(moved, str(started)) == [f"checkpoint.directory: None -> {bucket}/arrays"]


# What `status` says


def test_status_of_a_run_in_a_bucket(started: Any, quick_heartbeats: None) -> None:
    (started / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5, "step_seconds": 2.0, "images_per_second": 3.0}\n')
    write_checkpoint(started, 3)
    write_checkpoint(started, 4, committed=False)
    found = status(started)
    assert (found.state, found.step, found.steps, found.last_checkpoint) == (State.STOPPED, 4, 7, 3)
    assert (found.loss, found.images_per_second) == (0.5, 3.0)
    with opened(started) as directory, locked(directory):
        assert status(started).state is State.RUNNING
        assert (holder(started) or "").startswith(f"process {os.getpid()} on ")
    write_checkpoint(started, 7)
    assert status(started).state is State.FINISHED
    with pytest.raises(InputError, match="there is no bucket no-such-bucket"):
        status(located("gs://no-such-bucket/run", WHAT))


# The lock


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 1.5)


@pytest.fixture
def directory(run: Any) -> Iterator[RunDirectory]:
    with opened(run) as found:
        yield found


def test_a_run_in_use_is_a_machine_error_that_names_the_owner(directory: RunDirectory, quick_heartbeats: None) -> None:
    message = rf"is in use by another process \(process {os.getpid()} on "
    with locked(directory) as check_lock:
        check_lock()
        owner = directory.lock_owner()
        assert owner is not None
        with pytest.raises(MachineError, match=message), locked(directory):
            pass
        assert directory.lock_owner() == owner
    assert directory.lock_owner() is None


def test_a_process_that_was_replaced_writes_no_more(directory: RunDirectory, quick_heartbeats: None) -> None:
    with locked(directory) as check_lock:
        lock: Any = directory.path / run_directory.LOCK
        buckets.delete(lock, WHAT)
        assert buckets.Lock(lock, WHAT).acquire() is None
        with pytest.raises(MachineError, match="was taken over by process"):
            while True:
                check_lock()


def test_what_could_not_be_copied_is_kept(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(MachineError), opened(run) as directory, directory.pushed_at_end():
        (directory.files / "metrics.jsonl").write_text("one line\n")
        monkeypatch.setattr(buckets, "upload", lambda *_: (_ for _ in ()).throw(MachineError("no answer")))
    assert directory.files.is_dir() and f"are kept in {directory.files}" in "".join(capsys.readouterr())
    monkeypatch.undo()
    with opened(run) as again, again.pushed_at_end():
        (again.files / "metrics.jsonl").write_text("one line\n")
    assert not again.files.exists()
    assert (run / "metrics.jsonl").read_text() == "one line\n"


def test_an_error_is_not_replaced_by_that_of_the_last_copy(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "upload", lambda *_: (_ for _ in ()).throw(MachineError("no answer")))
    with pytest.raises(InputError, match="the real one"), opened(run) as directory, directory.pushed_at_end():
        (directory.files / "config.json").write_text("{}")
        raise InputError("the real one")
