"""The run directory belongs to one run and one process, and is writable; checkpoints are checked when restored."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import SingleDeviceSharding

from sdxl_jax import config as configuration
from sdxl_jax.arrays import Params
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.optim.optimiser import Decay
from sdxl_jax.training import checkpoint, run_directory
from sdxl_jax.training.checkpoint import Checkpoints
from sdxl_jax.training.checksums import checksum, checksums
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.run_directory import RunDirectory, check_run, locked, write_config
from sdxl_jax.training.state import TrainState


def state(step: int, value: float = 1.0) -> TrainState:
    params: Params = {"unet": {"kernel": jnp.full((3, 4), value), "bias": jnp.arange(4, dtype=jnp.bfloat16)}}
    return TrainState(jnp.int32(step), params, params, ())  # pyright: ignore[reportArgumentType]


def saved(directory: Path, steps: list[int], **options: Any) -> Path:
    metrics = options.pop("metrics", None)
    with Checkpoints(directory, options.pop("keep", 9), **options) as checkpoints:
        for number, step in enumerate(steps):
            checkpoints.save(step, state(step), {"config": {"a": 1}}, None if metrics is None else metrics[number])
    return directory


def steps_in(directory: Path) -> list[str]:
    return sorted((path.name for path in directory.iterdir() if path.name.isdecimal()), key=int)


# The lock


def test_directory_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    message = rf"in use by another process \(process {os.getpid()} on "
    with locked(RunDirectory.here(tmp_path / "run")):
        with pytest.raises(MachineError, match=message), locked(RunDirectory.here(tmp_path / "run")):
            pass
        assert (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run").exists()  # nothing was written into it


HOLDS = "import sys, time; from pathlib import Path; from sdxl_jax.training.run_directory import RunDirectory, locked\n"
HOLDS += "with locked(RunDirectory.here(Path(sys.argv[1]))): print('locked', flush=True); time.sleep(600)"


def test_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(MachineError, match=f"process {holder.pid} on"), locked(RunDirectory.here(tmp_path / "run")):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "run" / "lock").exists()
    with locked(RunDirectory.here(tmp_path / "run")):
        pass


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, MachineError), (errno.EACCES, InputError)])
def test_full_disk_is_a_machine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fails(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(run_directory, "_try_writing", fails)
    with pytest.raises(kind, match=os.strerror(number)), locked(RunDirectory.here(tmp_path / "run")):
        pass
    assert not (tmp_path / "run" / "lock").exists()


def test_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"Nothing can be written in .*file/run .*choose another --run-dir"
    with pytest.raises(InputError, match=message), locked(RunDirectory.here(tmp_path / "file" / "run")):
        pass
    with (
        pytest.raises(InputError, match="Nothing can be written in /proc/run"),
        locked(RunDirectory.here(Path("/proc/run"))),
    ):
        pass


# The configuration


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, BucketedDataset, Path]:
    """A run's configuration, data and directory, which holds only config.json."""
    folder = tmp_path_factory.mktemp("data")
    config = tiny.train_config(tiny.make_folder(folder / "images"))
    dataset = BucketedDataset(config.data, Tokenizer.of(config.model.text))
    (folder / "run").mkdir()
    write_config(objective_of(config), RunDirectory.here(folder / "run"), dataset, 0, [])
    return config, dataset, folder / "run"


def test_changes_that_alter_what_is_learnt_are_refused_unless_named(
    started: tuple[TrainConfig, BucketedDataset, Path], tmp_path: Path
) -> None:
    config, dataset, folder = started
    shutil.copytree(folder, run := tmp_path / "run")
    new = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=4),
        ema=dataclasses.replace(config.ema, decay=0.5),
    )
    with pytest.raises(
        InputError, match=r"batch_size: 8 -> 4\n.*decay: 0.9 -> 0.5\n.*--allow-changes data.batch_size,"
    ):
        check_run(new, run)
    with pytest.raises(InputError, match=r"1 differences.*\n.*decay"):
        check_run(new, run, allow_changes=["data.batch_size"])
    changed = check_run(new, run, dataset, ["data.batch_size", "ema"])
    assert changed == ["data.batch_size: 8 -> 4", "ema.decay: 0.9 -> 0.5"]
    write_config(objective_of(new), RunDirectory.here(run), dataset, 7, changed)
    assert json.loads((run / "config.json").read_text())["history"] == [{"after_step": 7, "changed": changed}]
    assert check_run(new, run, dataset) == []  # the same command again


def test_other_data_is_refused_unless_named(started: tuple[TrainConfig, BucketedDataset, Path], tmp_path: Path) -> None:
    config, _, run = started
    other = dataclasses.replace(config.data, folder=str(tiny.make_folder(tmp_path / "other", images=12)))
    dataset = BucketedDataset(other, Tokenizer.of(config.model.text))
    with pytest.raises(InputError, match=r"was trained on other data.*--allow-changes data_fingerprint"):
        check_run(config, run, dataset)
    (line,) = check_run(config, run, dataset, ["data_fingerprint"])
    assert line.startswith("data_fingerprint: ")


@pytest.mark.parametrize(("decay", "refused"), [(Decay.CONSTANT, False), (Decay.RSQRT, False), (Decay.COSINE, True)])
def test_more_steps_are_allowed_unless_the_schedule_depends_on_the_end(decay: Decay, refused: bool) -> None:
    base = tiny.train_config(Path("unused"))
    base = dataclasses.replace(base, optimiser=dataclasses.replace(base.optimiser, decay=decay))
    longer = dataclasses.replace(base, training=dataclasses.replace(base.training, steps=99))
    blocking = configuration.blocking_differences(configuration.to_json(base), configuration.to_json(longer))
    assert blocking == (["training.steps: 4 -> 99"] if refused else [])


# Checkpoints


def test_checkpoints_are_kept_by_number_and_by_metric(tmp_path: Path) -> None:
    losses = [{"loss": value} for value in (3.0, 1.0, 2.0, 4.0, 5.0)]
    directory = saved(tmp_path / "best", [1, 2, 3, 4, 5], keep=2, keep_best="loss", metrics=losses)
    assert steps_in(directory) == ["2", "4", "5"]
    assert steps_in(saved(tmp_path / "newest", [1, 2, 3], keep=2)) == ["2", "3"]
    # On resume with another metric, which earlier checkpoints do not have; or with one where there was none.
    for place in (directory, tmp_path / "newest"):
        others = [{"grad_norm": value} for value in (3.0, 4.0, 5.0)]
        saved(place, [6, 7, 8], keep=2, keep_best="grad_norm", metrics=others)
        assert steps_in(place) == ["6", "7", "8"]


def test_checkpoints_are_kept_by_the_hour(tmp_path: Path) -> None:
    second = 1 / 3600
    directory = tmp_path / "hours"
    with Checkpoints(directory, keep=1, keep_every_hours=second) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state(step), {})
            checkpoints.finish()
            if step == 3:
                time.sleep(1.1)
    remaining = steps_in(directory)
    assert remaining[0] == "1"
    assert remaining[-1] == "5"
    assert 3 <= len(remaining) <= 4  # the first, one after the pause, the newest, and one more if saving is slow


def placed() -> TrainState:
    place = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: state(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract)


def edit_metadata(path: Path, change: Any) -> None:
    file = path / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    change(content["custom_metadata"])
    file.write_text(json.dumps(content))


def test_damaged_checkpoint_is_named_and_an_earlier_one_is_offered(tmp_path: Path) -> None:
    directory = saved(tmp_path / "checkpoints", [2, 4])
    assert int(checkpoint.restore(directory, 4, placed()).step) == 4

    edit_metadata(directory / "4", lambda custom: custom["config"].update(a=2))
    with pytest.raises(InputError, match=r"4 is .*damaged \(the configuration in its metadata.*from-step 2"):
        checkpoint.restore(directory, 4, placed())

    def other_checksum(custom: dict[str, Any]) -> None:
        custom["config"].update(a=1)
        custom["array_checksums"] = custom["array_checksums"][:-8] + "00000000"

    edit_metadata(directory / "4", other_checksum)
    with pytest.raises(
        InputError, match=r"damaged \(1 arrays do not match their checksums, the first is ema/unet/kernel"
    ):
        checkpoint.restore(directory, 4, placed())
    assert int(checkpoint.restore(directory, 2, placed()).step) == 2
    assert steps_in(directory) == ["2", "4"]  # nothing was changed


def test_checksum_depends_on_every_element_and_its_position() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, jnp.bfloat16, np.int32):
        values = (100 * rng.standard_normal((3, 5, 2))).astype(dtype)
        seen = {int(checksum(jnp.asarray(values)))}
        for place in np.ndindex(values.shape):
            other = values.copy()
            other[place] += 1
            seen.add(int(checksum(jnp.asarray(other))))
        swapped = values[[1, 0, 2]]
        seen.add(int(checksum(jnp.asarray(swapped))))
        assert len(seen) == values.size + 2


def test_checksums_are_those_of_checkpoints_on_disk() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7
    leaves = [jnp.asarray(values), jnp.asarray(values, jnp.bfloat16), jnp.asarray(values, jnp.int32), jnp.float32(3)]
    assert checksums(leaves) == ["ba000000", "44feba00", "bf7919f0", "40400000"]
    assert checksums(leaves[1:2], jnp.float32) == ["ba000000"]


def test_newer_checkpoints_are_set_aside_not_deleted(tmp_path: Path) -> None:
    for _ in range(2):
        directory = saved(tmp_path / "checkpoints", [1, 2, 3][-2 - (not (tmp_path / "checkpoints").exists()) :])
        assert checkpoint.step_to_start_from(directory, None) == 3
        assert checkpoint.step_to_start_from(directory, 1) == 1
        with pytest.raises(InputError, match=r"no checkpoint of step 9 .* one of 1, 2, 3"):
            checkpoint.step_to_start_from(directory, 9)
        checkpoint.set_aside_after(tmp_path, 1)
        assert steps_in(directory) == ["1"]
    assert {path.name for path in (tmp_path / "set_aside").iterdir()} == {"2", "2_2", "3", "3_2"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A folder of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def large(step: int) -> TrainState:
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((300, 1000), np.float32))  # 1.2 MB
    return state(step)._replace(params={"unet": {"kernel": noise}})


@pytest.mark.parametrize("go_on", [False, True])
def test_full_disk_in_the_middle_of_a_save_leaves_the_checkpoints_before(
    small_disk: Path, go_on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = small_disk / "checkpoints"
    message = r"step 2 could not be written \(.*\)\. That of step 1 is complete.*The checkpoint of step 3, after it"

    def train() -> None:
        with Checkpoints(directory, keep=3, go_on=go_on) as checkpoints:
            checkpoints.save(1, state(1), {})
            checkpoints.save(2, large(2), {})
            checkpoints.save(3, state(3), {})

    if go_on:
        train()
        assert "checkpoint of step 2 could not be written" in capsys.readouterr().out
    else:
        with pytest.raises(MachineError, match=message):
            train()
    assert steps_in(directory) == ["1", "3"]
    for step in (1, 3):
        checkpoint.restore(directory, step, placed())

    # Threads of the failed save may write on after the error; the next start removes what they leave.
    kept = steps_in(directory)
    with Checkpoints(directory, keep=3):
        assert sorted(path.name for path in directory.iterdir()) == kept


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_last_checkpoint_that_fails_is_an_error_even_with_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"step 2 could not be written \(.*No space left.*There is no earlier one"
    with (
        pytest.raises(MachineError, match=message),
        Checkpoints(tmp_path / "checkpoints", keep=3, go_on=True) as checkpoints,
    ):
        monkeypatch.setattr(checkpoints._checkpointer, "wait", full)
        checkpoints._writing = 2
    with (
        pytest.raises(MachineError, match=message),
        Checkpoints(tmp_path / "refused", keep=3, go_on=True) as checkpoints,
    ):
        monkeypatch.setattr(checkpoints._checkpointer, "save_async", full)
        assert not checkpoints.save(2, state(2), {})


def test_a_later_checkpoint_clears_the_error_of_a_lost_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=3, go_on=True) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._checkpointer, "save_async", full)
            assert not checkpoints.save(1, state(1), {})
        assert checkpoints.save(2, state(2), {})
    assert steps_in(tmp_path / "checkpoints") == ["2"]


def test_run_that_ends_with_a_lost_checkpoint_saves_its_state_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save failed in the background, which is noticed when the next one is due; by then there is space."""
    with (
        pytest.raises(
            MachineError, match=r"step 1 could not be written.*The checkpoint of step 2, after it, was written"
        ),
        Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints,
    ):
        checkpoints.save(1, state(1), {})
        wait = checkpoints._checkpointer.wait
        monkeypatch.setattr(checkpoints._checkpointer, "wait", lambda: (wait(), shutil.rmtree(first), full()))
        first = tmp_path / "checkpoints" / "1"
        checkpoints.save(2, state(2), {})
    assert steps_in(tmp_path / "checkpoints") == ["2"]


def test_checkpoint_that_fails_on_another_process_fails_on_all(tmp_path: Path) -> None:
    theirs = ""
    with (
        pytest.raises(MachineError, match=r"step 2 could not be written on process 1 \(disk full\)"),
        Checkpoints(tmp_path, keep=3, go_on=True, agree=lambda ours: [ours, theirs]) as checkpoints,
    ):
        checkpoints.save(2, state(2), {})
        theirs = "disk full"
        checkpoints.finish()
        theirs = ""
