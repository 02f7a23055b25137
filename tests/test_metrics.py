"""The promises of metrics logging: lines, bar, Weights & Biases, and where the time went."""

import json
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
import jax
import jax.numpy as jnp
import pytest
import tiny

from sdxl_jax import config as configuration
from sdxl_jax import flops
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError
from sdxl_jax.training.observe import metrics, profiling
from sdxl_jax.training.observe.clock import Clock, TimeLog, TimePart, read_starts, time_table, totals
from sdxl_jax.training.observe.metrics import TIMES, MetricsWriter, WandbBoard
from sdxl_jax.training.observe.mfu import MfuMeter

BUCKET = Bucket(32, 32)


class Time:
    """A clock that advances only by `sleep`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock(time: Time) -> Clock:
    return Clock(began=90.0, now=time)


def numbers(step: int) -> dict[str, Any]:
    return {"loss": jnp.float32(1 / step), "grad_norm": jnp.float32(2), "learning_rate": jnp.float32(0.5)}


def run_steps(writer: MetricsWriter, clock: Clock, time: Time, steps: range, compiling: tuple[int, ...] = ()) -> None:
    """Each takes 2 s, of which 0.5 s for data; some wait 7 s for compilation first; each is followed by 4 s for a
    checkpoint."""
    for step in steps:
        if step in compiling:
            writer.settle()
            with clock.during(TimePart.COMPILE):
                writer.compiling()
                time.sleep(7)
            writer.compiled()
        with clock.during(TimePart.DATA):
            time.sleep(0.5)
        with clock.during(TimePart.STEP):
            time.sleep(1.5)
            writer.log(step, BUCKET, 8, numbers(step))
        with clock.during(TimePart.SAVE):
            writer.flush()
            time.sleep(4)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_step_seconds_are_without_compiling_and_saving(tmp_path: Path, clock: Clock, time: Time) -> None:
    mfu_meter = MfuMeter(lambda _: 3e12, peak=10e12)
    mfu_meter.count(BUCKET)
    with MetricsWriter(tmp_path, 0, 4, False, clock, mfu_meter) as writer:
        run_steps(writer, clock, time, range(1, 5), compiling=(1, 3))
    for line in lines(tmp_path):
        assert line["step_seconds"] == 2
        assert line["images_per_second"] == 4
        assert line["data_seconds"] == 0.5
        assert line.get("compile_seconds") == (7 if line["step"] in (1, 3) else None)
        assert line["mfu"] == pytest.approx(0.15)
        assert {*TIMES} - line.keys() <= {"compile_seconds"}


def test_resumed_lines_are_the_same_except_for_times(tmp_path: Path, clock: Clock, time: Time) -> None:
    folders = tmp_path / "whole", tmp_path / "resumed"
    for folder in folders:
        folder.mkdir()
    with MetricsWriter(folders[0], 0, 4, False, clock) as writer:
        run_steps(writer, clock, time, range(1, 5))
    with MetricsWriter(folders[1], 0, 4, False, clock) as writer:
        assert writer.recomputed_until == 0
        run_steps(writer, clock, time, range(1, 4))
    with MetricsWriter(folders[1], 2, 4, False, clock) as writer:
        assert writer.recomputed_until == 3
        run_steps(writer, clock, time, range(3, 5), compiling=(3,))
    whole, resumed = ([{k: v for k, v in line.items() if k not in TIMES} for line in lines(each)] for each in folders)
    assert whole == resumed


def test_skipped_step_is_a_line_of_strict_json_and_counted_in_the_bar(
    tmp_path: Path, clock: Clock, time: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsWriter(tmp_path, 0, 2, True, clock) as writer:
        for step, skipped in ((1, 1), (2, 0)):
            time.sleep(2)
            loss = {"loss": jnp.float32(jnp.nan)} if skipped else {}
            writer.log(step, BUCKET, 8, numbers(step) | loss | {"skipped": jnp.int32(skipped)})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(second)["loss"] == 0.5
    assert ", 1 skipped" in capsys.readouterr().err


def test_lines_show_loss_throughput_mfu_data_and_compiling(
    tmp_path: Path, clock: Clock, time: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    mfu_meter, compiled = MfuMeter(lambda _: 3e12, 10e12), 3
    with MetricsWriter(tmp_path, 0, 4, True, clock, mfu_meter, programs=lambda: (compiled, 40)) as writer:
        run_steps(writer, clock, time, range(1, 4), compiling=(3,))
        before = writer._bar.postfix
        mfu_meter.count(BUCKET)
        compiled = 40
        run_steps(writer, clock, time, range(4, 5))
    shown = capsys.readouterr().err
    assert "compiling 3/40" in shown  # while it waits
    assert before == "loss 0.3333, 4.0 images/s, 2 s waiting for data, compiled 3/40"
    assert "loss 0.2500, 4.0 images/s, MFU 15%, 2 s waiting for data]" in shown
    assert [line.get("mfu") for line in lines(tmp_path)] == [None, None, None, pytest.approx(0.15)]


def test_full_disk_loses_no_line_and_does_not_end_the_run(
    tmp_path: Path, clock: Clock, time: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file size limit behaves like a full disk: a part of a line is written, then comes the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, 0, 6, False, clock) as writer, TimeLog(tmp_path, clock) as times:
        run_steps(writer, clock, time, range(1, 3))
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 20, before[1]))
        try:
            run_steps(writer, clock, time, range(3, 6))
            times.count_step(5, recomputed=False)
            assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run_steps(writer, clock, time, range(6, 7))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    output = capsys.readouterr().out
    assert output.count("metrics.jsonl cannot be written (File too large); its lines are kept until it can") == 1
    assert output.count("TensorBoard gets no more scalars until the next start: File too large") == 1


def test_estimated_time_left_ignores_compilation(tmp_path: Path, clock: Clock, time: Time) -> None:
    with MetricsWriter(tmp_path, 0, 8, True, clock) as writer:
        bar = writer._bar
        bar.start_t = bar.last_print_t = time.now
        bar._time = time  # pyright: ignore[reportAttributeAccessIssue] (tqdm's own)
        run_steps(writer, clock, time, range(1, 5), compiling=(3,))
        assert bar.format_dict["elapsed"] == 4 * (2 + 4)


# Weights & Biases


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[Any, ...]] = []
        self.exit_codes: list[int] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[dict[str, Any], FakeRun]]]:
    """(options, run) of every `wandb.init`."""
    runs = []

    def init(**options: Any) -> FakeRun:
        runs.append((options, FakeRun()))
        return runs[-1][1]

    module = types.ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield runs


def test_wandb_gets_every_line_and_resumes_its_run(
    tmp_path: Path, clock: Clock, time: Time, wandb: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    metrics.check("a project")
    with MetricsWriter(tmp_path, 0, 4, False, clock, board=WandbBoard("a project", tmp_path, {"seed": 0})) as writer:
        run_steps(writer, clock, time, range(1, 4))
    with (
        pytest.raises(KeyboardInterrupt),
        MetricsWriter(tmp_path, 2, 4, False, clock, board=WandbBoard("a project", tmp_path, {"seed": 0})) as writer,
    ):
        run_steps(writer, clock, time, range(3, 5))
        raise KeyboardInterrupt
    (options, first), (resumed, second) = wandb
    assert options["project"] == "a project"
    assert options["config"] == {"seed": 0}
    assert options["resume"] == "allow"
    assert options["id"] and resumed["id"] == options["id"]
    assert [values["step"] for values in first.logged + second.logged] == [1, 2, 3, 3, 4]
    assert first.logged[0]["loss"] == 1 and first.logged[0]["bucket_height"] == 32
    assert first.defined == [("step", None), ("*", "step")]
    assert (first.exit_codes, second.exit_codes) == ([0], [1])


def test_missing_wandb_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    metrics.check(None)
    outcome = command.call(
        "train", config_file(tmp_path), "--run-dir", tmp_path / "run", "--logging.wandb-project", "x"
    )
    assert outcome.code == 2
    assert "logging.wandb_project" in outcome.err and "pip install 'sdxl_jax[wandb]'" in outcome.err
    assert not (tmp_path / "run").exists()


# Where the time went


def test_every_second_belongs_to_one_part(clock: Clock, time: Time) -> None:
    time.sleep(1)
    with clock.during(TimePart.SAVE):
        time.sleep(2)
        with pytest.raises(KeyError), clock.during(TimePart.STEP):
            time.sleep(3)
            raise KeyError
        time.sleep(4)
    time.sleep(5)
    spent = {part: seconds for part, seconds in clock.seconds().items() if seconds}
    assert spent == {TimePart.START: 10 + 1 + 5, TimePart.SAVE: 6, TimePart.STEP: 3}


def test_table_adds_up_all_starts(tmp_path: Path) -> None:
    time = Time()
    for number in range(3):
        began = time.now
        clock = Clock(began, time)
        time.sleep(10)
        with TimeLog(tmp_path, clock) as log, clock.during(TimePart.OTHER):
            for step in range(4 * number, 4 * number + 6):  # the last two are recomputed
                recomputed = number > 0 and step < 4 * number + 2
                with clock.during(TimePart.RECOMPUTED if recomputed else TimePart.STEP):
                    time.sleep(20)
                log.count_step(step, recomputed)
        assert sum(clock.seconds().values()) == time.now - began == 130
    with (tmp_path / "time.jsonl").open("a") as file:
        file.write('{"start": 4, "st')  # what a kill leaves
    starts = read_starts(tmp_path)
    assert [(start.number, start.step, start.recomputed_steps) for start in starts] == [
        (1, 5, 0),
        (2, 9, 2),
        (3, 13, 2),
    ]
    rows = totals(starts)
    assert (rows["start"], rows["restart"], rows["step"]) == (10, 2 * 10 + 4 * 20, 14 * 20)
    assert sum(rows.values()) == 3 * 130
    shown = [line.split() for line in time_table(starts).splitlines()]
    assert ["restart", "100.0", "25.6%", "2", "restarts,", "4", "steps", "recomputed"] in shown
    assert shown[-1] == ["all", "390.0", "100.0%"]


def test_killed_start_is_in_the_table_up_to_its_last_line(tmp_path: Path, clock: Clock, time: Time) -> None:
    log = TimeLog(tmp_path, clock).__enter__()
    for step in range(1, 7):
        time.sleep(20)
        log.count_step(step, recomputed=False)
    (start,) = read_starts(tmp_path)  # nothing more was written
    assert (start.step, sum(start.seconds.values()), start.exit_code) == (6, 130, None)


# Traces, chips


def config_file(folder: Path) -> Path:
    tiny.make_folder(folder / "images", 2)
    text = f"""
from pathlib import Path
import tiny
def get_config():
    return tiny.train_config(Path({str(folder / "images")!r}))
"""
    (folder / "config.py").write_text(text)
    return folder / "config.py"


@pytest.mark.parametrize(
    ("given", "message"), [("10", "expected FIRST:LAST"), ("2:9", "runs the steps 1 to 4"), ("0:1", "runs the steps")]
)
def test_steps_that_cannot_be_traced_are_refused(tmp_path: Path, given: str, message: str) -> None:
    outcome = command.call("train", config_file(tmp_path), "--run-dir", tmp_path / "run", "--profile", given)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_trace_that_would_crash_the_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "crashes", lambda: True)
    with pytest.raises(InputError, match=r"libtpu is installed.*JAX_PLATFORMS"):
        profiling.check((3, 3), first=2, stop=3)
    assert profiling.check(None, first=2, stop=3) is None


@pytest.mark.parametrize(
    ("version", "is_loaded", "crashes"), [("0.0.52", True, True), ("0.0.42.1", True, False), ("0.0.52", False, False)]
)
def test_libtpu_crashes_a_trace_by_its_version_and_if_jax_loaded_it(
    version: str, is_loaded: bool, crashes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maps").write_text("7f00-7fff r-xp libtpu.so\n" if is_loaded else "7f00-7fff r-xp libc.so\n")
    monkeypatch.setattr(profiling, "_MAPS", tmp_path / "maps")
    monkeypatch.setattr(profiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(profiling.importlib.metadata, "version", lambda name: version)
    assert profiling.crashes() is crashes


def test_steps_before_the_checkpoint_are_not_traced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "crashes", lambda: False)
    assert profiling.check((3, 3), first=2, stop=3) == (3, 3)
    assert profiling.check(None, first=2, stop=3) is None
    with pytest.raises(InputError, match=r"runs the steps 3 to 3\. Give FIRST:LAST among them, e\.g\. 3:3"):
        profiling.check((3, 4), first=2, stop=3)
    capsys.readouterr()
    assert profiling.check((2, 3), first=2, stop=3) is None
    assert "an earlier start has run step 2; nothing is traced" in capsys.readouterr().out


def test_compiling_and_logging_may_change_on_resume() -> None:
    old = configuration.to_json(tiny.train_config(Path("unused")))
    new = json.loads(json.dumps(old))
    new["training"] |= {"compile_ahead": "before", "compile_threads": 4, "compilation_cache": "there"}
    new["training"]["watchdog_minutes"] = None
    new["logging"] = {"wandb_project": "x", "format": "json"}
    assert len(configuration.differences(old, new)) == 6
    assert not configuration.blocking_differences(old, new)
    del old["logging"], old["training"]["compile_ahead"]  # saved before these fields existed
    assert not configuration.blocking_differences(old, new)


def test_chips_are_recognised_by_jax_names() -> None:
    v5p = flops.chip_of("TPU v5")
    assert v5p is not None and v5p is flops.V5P and v5p.flops_per_second == 459e12
    assert flops.chip_of("TPU v5 lite") is flops.V5E
    assert flops.chip_of("cpu") is None
    assert MfuMeter.of(lambda _: 1e15, jax.devices()) is None
    mfu_meter = MfuMeter.of(lambda _: 1e15, [types.SimpleNamespace(device_kind="TPU v6e")] * 4)
    assert mfu_meter is not None
    mfu_meter.count(BUCKET)
    assert mfu_meter.mfu(BUCKET, 2.0) == 1e15 / 2 / (4 * 918e12)


def test_times_of_runs_of_version_0_1_are_read(tmp_path: Path) -> None:
    """They have `again` for steps that were recomputed."""
    line = {"start": 2, "step": 9, "steps_again": 3, "seconds": {"start": 1.0, "again": 4.0}}
    (tmp_path / "time.jsonl").write_text(json.dumps(line) + "\n")
    (start,) = read_starts(tmp_path)
    assert (start.recomputed_steps, start.seconds) == (3, {"start": 1.0, "recomputed": 4.0})
