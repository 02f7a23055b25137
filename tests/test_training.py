"""The promises of training: an interrupted run resumes as if nothing had happened, and a step does what it says.

Whole runs train a tiny model; one is never interrupted, the others are, and must end with the same state. The parts of
the step itself (micro-batches, clipping, average) are tested with a loss of two parameters.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (generated)

from sdxl_jax import config as configuration
from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, MicroConditioning, Params, flatten
from sdxl_jax.conditioning.text import TextConditioning, Tokenizer
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.diffusion.loss import LossConfig, Weighting
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.settings import Metric
from sdxl_jax.model import UnconditionalKind
from sdxl_jax.models.layers import Compute, Dtype
from sdxl_jax.models.vae import Posterior
from sdxl_jax.optim import optimiser
from sdxl_jax.optim.ema import EmaConfig, weight_at
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import checkpoint, compilation, loop, run_directory, setup
from sdxl_jax.training.objectives import denoising, objective_of
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.training.observe import clock, profiling
from sdxl_jax.training.observe.metrics import TIMES, MetricsWriter
from sdxl_jax.training.observe.scores import fixed_examples
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import TrainState, create, merge, partition
from sdxl_jax.training.step import Metrics, Step, make_step
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.open import open_model

pytestmark = pytest.mark.usefixtures("shared_steps")

STEPS, EPOCH = 6, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Six steps of four images: one and a half epochs, in two buckets. One convolution of the UNet stays frozen."""
    base = tiny.train_config(tiny.make_folder(tmp_path_factory.mktemp("data") / "images"), STEPS)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, batch_size=4),
        training=dataclasses.replace(base.training, trainable=("^unet/(?!conv_in/)",)),
        checkpoint=configuration.CheckpointConfig(every_steps=2, keep=2),
        validation=configuration.ValidationConfig(4, ("one", "two"), sizes=((32, 32),), steps=2),
    )


class Crash(Exception):
    pass


class Run(NamedTuple):
    folder: Path
    examples: list[np.ndarray]
    """The images' numbers, for each step."""

    def state(self, step: int, abstract: TrainState) -> TrainState:
        return checkpoint.restore(self.folder / "checkpoints", step, abstract)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def run(
    config: TrainConfig, folder: Path, crash_before: int | None = None, profile: tuple[int, int] | None = None
) -> Run:
    """Trains; an exception ends it before the given step."""
    examples = []

    def put(mesh: Any, batch: Any, original: Any = sharding.put_batch) -> Any:
        if crash_before is not None and len(examples) == crash_before - 1:
            raise Crash
        examples.append(batch.example)
        return original(mesh, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "put_batch", put)
        if crash_before is None:
            loop.train(config, folder, progress=False, profile=profile)
        else:
            with pytest.raises(Crash):
                loop.train(config, folder, progress=False)
    return Run(folder, examples)


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Never interrupted."""
    return run(config, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def crashed(config: TrainConfig, whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ended before step 4: the checkpoint is of step 2, the log has one step more."""
    ended = run(config, tmp_path_factory.mktemp("crashed") / "run", crash_before=4)
    with (ended.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n')  # whether step 3 is in the log already depends on the device's speed
    return ended


@pytest.fixture(scope="module")
def resumed(config: TrainConfig, crashed: Run) -> Run:
    """A copy of `crashed`, resumed, with steps 4 and 5 traced."""
    shutil.copytree(crashed.folder, folder := crashed.folder.with_name("resumed"))
    return run(config, folder, profile=None if profiling.crashes() else (4, 5))


@pytest.fixture(scope="module")
def abstract(config: TrainConfig) -> TrainState:
    mesh = sharding.make_mesh(config.mesh)
    return objective_of(config).abstract_state(mesh)[0]


def assert_identical(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_resumed_run_repeats_every_loss_bit_for_bit(whole: Run, crashed: Run, resumed: Run) -> None:
    assert {line["step"] for line in crashed.lines()} == {1, 2, 3}
    assert [line["step"] for line in resumed.lines()] == [1, 2, 3, 4, 5, 6]
    assert without_times(resumed.lines()) == without_times(whole.lines())
    buckets = [tuple(line["bucket"]) for line in whole.lines()]
    assert set(buckets[2:]) == set(tiny.BUCKETS)  # the bucket does change after the interruption


def test_resumed_run_has_the_same_parameters_average_and_moments(
    whole: Run, resumed: Run, abstract: TrainState
) -> None:
    assert_identical(resumed.state(STEPS, abstract), whole.state(STEPS, abstract))


def test_resume_does_not_restart_the_epoch(whole: Run, crashed: Run, resumed: Run) -> None:
    """Seen in diffusers and sd-scripts."""
    assert len(resumed.examples) == STEPS - 2
    for recomputed, once in zip(resumed.examples, whole.examples[2:], strict=True):
        np.testing.assert_array_equal(recomputed, once)
    epoch = np.concatenate([*crashed.examples[:2], *resumed.examples[: EPOCH - 2]])
    assert sorted(epoch) == list(range(16))


def test_line_that_was_cut_off_is_written_again(crashed: Run, resumed: Run, config: TrainConfig, whole: Run) -> None:
    del crashed
    shutil.copytree(resumed.folder, folder := resumed.folder.with_name("earlier"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising.generate, "text_to_image", lambda *_, **__: np.zeros((2, 32, 32, 3), np.uint8))
        loop.train(config, folder, progress=False, from_step=4)
    assert without_times([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]) == (
        without_times(whole.lines())
    )
    assert [path.name for path in (folder / "set_aside").iterdir()] == ["6"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]


def test_validation_images_that_a_stop_left_out_are_generated_on_resume(config: TrainConfig, resumed: Run) -> None:
    missing = resumed.folder / "samples" / "step_00000006.png"
    before = missing.read_bytes()
    missing.unlink()
    loop.train(config, resumed.folder, progress=False)
    assert missing.read_bytes() == before


@pytest.mark.slow
def test_metrics_during_training_compare_samples_of_captions_with_their_images(config: TrainConfig, whole: Run) -> None:
    dataset, mesh = BucketedDataset(config.data, objective_of(config).tokenizer), sharding.make_mesh(MeshConfig())
    examples = fixed_examples(dataset, 3)
    model = load_model(whole.folder)
    one, other = (objective_of(config).counterparts(model, examples, mesh, Processes(1.0)) for _ in range(2))
    assert one.shape == examples.images.shape and one.dtype == np.uint8
    np.testing.assert_array_equal(one, other)
    metrics = dataclasses.replace(config.validation, metrics=(Metric.FID, Metric.PRECISION_RECALL))
    assert metrics.scores == ("validation_fid", "validation_precision", "validation_recall")


def test_inputs_of_a_step_with_a_non_finite_loss_are_written_to_a_file(
    config: TrainConfig, resumed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(resumed.folder, folder := resumed.folder.with_name("not_finite"))
    program = compilation.CompiledSteps.of

    def spoilt(*given: Any) -> Any:
        def step(*inputs: Any) -> Any:
            state, metrics = program(*given)(*inputs)
            return state, metrics | {"loss": metrics["loss"] * jnp.nan}

        return step

    monkeypatch.setattr(compilation.CompiledSteps, "of", spoilt)
    with pytest.raises(InputError, match=r"loss of step 5 is nan.*key are in .*nonfinite_step_00000005\.json"):
        loop.train(config, folder, progress=False, from_step=4)
    assert checkpoint.latest_step(folder / "checkpoints") == 4, "nothing of it is saved"
    described = json.loads((folder / "nonfinite_step_00000005.json").read_text())
    assert [row["image"] for row in described["rows"]] == resumed.examples[-2].tolist()
    assert described["rows"][0]["captions"] == [f"image number {described['rows'][0]['image']}"]
    assert described["rows"][0]["source"].endswith(f"{described['rows'][0]['image']:03d}.png")
    assert described["key"] == jax.random.key_data(jax.random.fold_in(jax.random.key(0), 4)).tolist()


def test_error_in_the_data_loses_no_finished_step(
    config: TrainConfig, whole: Run, resumed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(resumed.folder, folder := resumed.folder.with_name("no_data"))
    iterate = BucketedDataset.iterate

    def one_batch(self: BucketedDataset, first: int) -> Iterator[Any]:
        with contextlib.closing(iterate(self, first)) as batches:
            yield next(batches)
        raise InputError("too many images are damaged")

    with monkeypatch.context() as patch:
        patch.setattr(BucketedDataset, "iterate", one_batch)
        with pytest.raises(InputError, match="too many images"):
            loop.train(config, folder, progress=False, from_step=4)
    assert checkpoint.latest_step(folder / "checkpoints") == 5
    assert without_times(Run(folder, []).lines()) == without_times(whole.lines())[:5]


def test_out_of_memory_ends_the_run_with_what_to_change(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(mesh: Any, batch: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

    monkeypatch.setattr(sharding, "put_batch", full)
    expected = r"12345 bytes.*To need less memory: raise mesh\.fsdp.*adapter\.base_dtype"
    with pytest.raises(InputError, match=expected):
        loop.train(config, tmp_path / "run", progress=False)
    last = json.loads((tmp_path / "run" / "time.jsonl").read_text().splitlines()[-1])
    assert last["exit_code"] == 2 and "To need less memory" in last["error"]


class OneStep(NamedTuple):
    """Outside the loop: the compiled step, and its inputs after checkpoint 4."""

    step: Step
    state: TrainState
    frozen: Params
    batch: Batch

    def __call__(self, **changes: Any) -> tuple[TrainState, Metrics]:
        given = self._replace(**changes)
        return self.step(jax.tree.map(jnp.copy, given.state), given.frozen, given.batch)  # the state is donated


@pytest.fixture(scope="module")
def fifth(config: TrainConfig, whole: Run) -> Iterator[OneStep]:
    mesh = sharding.make_mesh(config.mesh)
    objective = objective_of(config)
    assert objective.tokenizer is not None
    dataset = BucketedDataset(config.data, objective.tokenizer)
    with jax.set_mesh(mesh):
        abstract, abstract_frozen = objective.abstract_state(mesh)
        batches = dataset.iterate(4)
        yield OneStep(
            setup.jitted(objective, mesh, abstract),
            whole.state(4, abstract),
            checkpoint.restore_frozen(whole.folder, abstract_frozen),
            sharding.put_batch(mesh, next(batches)),
        )
        batches.close()


def test_step_is_a_pure_function_of_state_and_batch(whole: Run, fifth: OneStep) -> None:
    """Outside the loop, whatever other random numbers were drawn, it reproduces line 5 of the log."""
    first = fifth()
    np.random.seed(5)  # global state, which must not matter
    jax.random.normal(jax.random.key(1))
    second = fifth()
    assert_identical(first, second)
    line = whole.lines()[4]
    assert {name: float(value) for name, value in first[1].items()} == {name: line[name] for name in first[1]}
    assert int(first[0].step) == 5


def test_noise_follows_from_the_step_and_does_not_restart(fifth: OneStep) -> None:
    """A restart from the seed on resume, seen in MaxDiffusion: the same batch at another step draws other noise."""
    losses = {step: float(fifth(state=fifth.state._replace(step=jnp.int32(step)))[1]["loss"]) for step in (0, 4, 5)}
    assert len(set(losses.values())) == 3


def test_nan_latents_are_not_replaced_silently(fifth: OneStep) -> None:
    """Replacing them by zeros, and training on, was seen in sd-scripts. Here the loss is NaN."""
    vae = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), fifth.frozen["vae"])
    assert math.isnan(fifth(frozen=fifth.frozen | {"vae": vae})[1]["loss"])


def test_loss_of_nan_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    numbers = {name: jnp.float32(1) for name in ("loss", "grad_norm", "learning_rate")}
    with (
        pytest.raises(InputError, match=r"loss of step 2 is nan.*--allow-changes optimiser\.learning_rate"),
        MetricsWriter(tmp_path, start=0, stop=3, progress=False) as writer,
    ):
        writer.log(1, Bucket(32, 32), 4, numbers)
        writer.log(2, Bucket(32, 32), 4, numbers | {"loss": jnp.float32(jnp.nan)})
        writer.flush()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_only_what_the_patterns_name_changes(
    config: TrainConfig, whole: Run, abstract: TrainState, tmp_path: Path
) -> None:
    untrained = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=0))
    before = flatten(loop.train(untrained, tmp_path / "untrained", progress=False).params)
    after = flatten(load_model(whole.folder).params)
    trainable = {path for path in before if path.startswith("unet/") and not path.startswith("unet/conv_in/")}
    assert set(flatten(abstract.params)) == trainable
    assert {
        "unet/conv_in/kernel",
        "vae/decoder/conv_in/kernel",
        "text_encoder/position_embedding",
    } <= before.keys() - trainable
    for path in before:
        identical = np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes()
        assert identical == (path not in trainable), path


def test_pattern_that_matches_nothing_lists_the_nearest_paths(config: TrainConfig, tmp_path: Path) -> None:
    wrong = dataclasses.replace(
        config, training=dataclasses.replace(config.training, trainable=("unet/conv_inn/kernel",))
    )
    with pytest.raises(
        InputError, match=r'"unet/conv_inn/kernel", which matches no parameter\. Give .* such as unet/conv_in/kernel, '
    ):
        loop.train(wrong, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_everything_can_train(tmp_path: Path) -> None:
    params = {"unet": {"conv": {"kernel": jnp.ones(3)}}, "vae": {"conv": {"kernel": jnp.ones(2)}}}
    trained, frozen = partition(params, (".",))
    assert_identical(trained, params)
    checkpoint.save_frozen(tmp_path, frozen)
    assert_identical(merge(trained, checkpoint.restore_frozen(tmp_path, frozen)), params)


@pytest.mark.slow
def test_run_without_an_average_opens_with_its_parameters(
    config: TrainConfig, whole: Run, abstract: TrainState, tmp_path: Path
) -> None:
    state = whole.state(STEPS, abstract)
    shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEPS, state._replace(ema=None), {})
    opened = flatten(load_model(tmp_path / "run").params)
    trained = flatten(state.params)
    assert_identical({path: opened[path] for path in trained}, trained)
    assert opened.keys() > trained.keys()


@pytest.mark.slow
def test_new_run_starts_from_the_weights_of_another_model(
    config: TrainConfig, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = dataclasses.replace(config.training, steps=0, seed=7, init_from=(str(whole.folder),))
    started = loop.train(dataclasses.replace(config, training=training), tmp_path / "run")
    assert_identical(started.params, load_model(whole.folder).params)
    assert "random weights" not in capsys.readouterr().out


def test_frozen_parameters_of_a_start_that_left_no_checkpoint_are_replaced(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save_frozen(tmp_path, {"vae": {"kernel": jnp.full(3, value)}})
    assert checkpoint.restore_frozen(tmp_path, {"vae": {"kernel": jnp.zeros(3)}})["vae"]["kernel"][0] == 2


# What a run leaves on disk


def test_log_has_every_field_with_all_digits(whole: Run) -> None:
    for number, text in enumerate((whole.folder / "metrics.jsonl").read_text().splitlines(), start=1):
        line = json.loads(text)
        assert line["step"] == number
        assert line["images_seen"] == 4 * number
        assert tuple(line["bucket"]) in tiny.BUCKETS
        assert line["images_per_second"] == pytest.approx(4 / line["step_seconds"])
        for name in ("loss", "grad_norm"):
            assert f'"{name}": {line[name]!r}' in text
            assert float(np.float32(line[name])) == line[name] > 0  # all digits of the device's number, and no others
            assert math.isfinite(line[name])


def test_log_has_the_warm_up(whole: Run) -> None:
    # Float32 rounds the rates to 6e-8 of their size.
    np.testing.assert_allclose([line["learning_rate"] for line in whole.lines()], [5e-4] + [1e-3] * 5, rtol=1e-6)


def test_tensorboard_has_the_same_numbers(whole: Run) -> None:
    (path,) = (whole.folder / "tensorboard").iterdir()
    data, found, position = path.read_bytes(), {}, 0
    while position < len(data):
        (length,) = struct.unpack("<Q", data[position : position + 8])
        event = Event.FromString(data[position + 12 : position + 12 + length])
        position += length + 16
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for line in whole.lines():
        for name in ("loss", "grad_norm", "learning_rate"):
            assert found[name, line["step"]] == np.float32(line[name])


def test_validation_grid_is_written_when_due(whole: Run) -> None:
    paths = sorted((whole.folder / "samples").iterdir())
    assert [path.name for path in paths] == ["step_00000004.png", "step_00000006.png"]
    for path in paths:
        with Image.open(path) as sheet:
            assert sheet.width > 2 * 32  # one column per prompt
            assert sheet.height > 32
            assert isinstance(sheet, PngImageFile)
            assert sheet.text["step"] == str(int(path.stem.removeprefix("step_")))
            assert (sheet.text["weights"], sheet.text["seed"]) == ("ema", "0")


def test_config_json_holds_configuration_versions_and_commit(config: TrainConfig, whole: Run) -> None:
    saved = json.loads((whole.folder / "config.json").read_text())
    assert configuration.from_json(saved["config"], TrainConfig) == config
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["versions"].keys() >= {"python", "sdxl_jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"}
    in_a_repository = (Path(__file__).parents[1] / ".git" / "HEAD").is_file()
    assert (re.fullmatch("[0-9a-f]{40}", saved["commit"] or "") is not None) == in_a_repository


def test_commit_is_found_among_packed_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "sdxl_jax" / "training" / "loop.py"))
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert run_directory.commit() is None  # a repository before its first commit
    (tmp_path / ".git" / "packed-refs").write_text(
        f"# pack-refs\n{'1' * 40} refs/heads/other\n{'2' * 40} refs/heads/main\n"
    )
    assert run_directory.commit() == "2" * 40
    (tmp_path / ".git" / "HEAD").write_text(f"{'3' * 40}\n")
    assert run_directory.commit() == "3" * 40


def test_the_newest_checkpoints_are_kept(whole: Run) -> None:
    assert sorted(path.name for path in (whole.folder / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.skipif(profiling.crashes(), reason="libtpu is installed, with which jax's profiler fails")
def test_traced_steps_leave_a_trace_for_xprof(whole: Run, resumed: Run) -> None:
    """That tracing changes no number is tested above: `resumed` was traced, and repeats `whole`."""
    assert not (whole.folder / "profile").exists()
    (trace,) = (resumed.folder / "profile").glob("plugins/profile/*/*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(trace)).planes for line in plane.lines]
    events = [event for line in lines for event in line.events if event.name == "train"]
    assert [dict(event.stats)["step_num"] for event in events] == [4, 5]


def test_time_of_all_starts_is_accounted_for(crashed: Run, resumed: Run) -> None:
    (before,), (first, second, *_) = clock.read_starts(crashed.folder), clock.read_starts(resumed.folder)
    assert first == before  # which an exception ended
    assert (second.step, second.recomputed_steps) == (STEPS, 1)  # step 3
    for part in (
        clock.TimePart.DATA,
        clock.TimePart.STEP,
        clock.TimePart.SAVE,
        clock.TimePart.EVALUATION,
        clock.TimePart.COMPILE,
    ):
        assert second.seconds[part.value] > 0
    assert second.seconds["recomputed"] > 0 == first.seconds["recomputed"]
    assert clock.totals([first, second])["restart"] == second.seconds["start"] + second.seconds["recomputed"]


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_load_model_gives_the_averaged_weights_of_a_step(whole: Run, abstract: TrainState, step: int) -> None:
    model = load_model(whole.folder / "checkpoints" / str(step))
    state = whole.state(step, abstract)
    flat = flatten(model.params)
    assert_identical({path: flat[path] for path in flatten(state.sampled)}, flatten(state.sampled))
    assert state.sampled is state.ema
    kernel = "unet/conv_out/kernel"
    assert not np.array_equal(flat[kernel], flatten(state.params)[kernel])  # the average differs from the parameters
    newest = flatten(load_model(whole.folder).params)
    assert np.array_equal(flat[kernel], newest[kernel]) == (step == 6)
    raw = flatten(load_model(whole.folder / "checkpoints" / str(step), raw=True).params)
    assert_identical({path: raw[path] for path in flatten(state.params)}, flatten(state.params))


def test_missing_step_names_the_newest(whole: Run) -> None:
    with pytest.raises(InputError, match=r"no checkpoint of step 2\. Give one of its newest: .*6"):
        load_model(whole.folder / "checkpoints" / "2")


def test_unfinished_run_is_noted_unless_a_step_is_given(crashed: Run, whole: Run) -> None:
    assert open_model(crashed.folder).notes == (f"{crashed.folder} is at step 2 of 6",)
    assert open_model(crashed.folder / "checkpoints" / "2").notes == open_model(whole.folder).notes == ()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("optimiser", "accumulate", 0),
        ("checkpoint", "every_steps", 0),
        ("checkpoint", "keep", 0),
        ("validation", "every_steps", 0),
        ("validation", "sizes", ((32, 30),)),
        ("training", "caption_dropout", 1.5),
        ("ema", "decay", -0.1),
    ],
)
def test_number_out_of_range_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path, section: str, field: str, value: Any
) -> None:
    part = dataclasses.replace(getattr(config, section), **{field: value})
    with pytest.raises(InputError, match=rf"{section}\.{field}.*Give "):
        loop.train(dataclasses.replace(config, **{section: part}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("metric", ["accuracy", "skipped"])  # the second is one if steps are skipped
def test_unknown_metric_is_refused_before_anything_is_written(config: TrainConfig, tmp_path: Path, metric: str) -> None:
    part = dataclasses.replace(config.checkpoint, keep_best=metric)
    with pytest.raises(InputError, match=rf"keep_best={metric} is not a logged metric.*nearest first.*loss"):
        loop.train(dataclasses.replace(config, checkpoint=part), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# The step's machinery, with a loss of two parameters


@pytest.mark.parametrize("count", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_full_batch(count: int) -> None:
    full = toy.steps(toy.config())[-1]
    accumulated = toy.steps(toy.config(accumulate=count))[-1]
    # Another order of adding eight float32 numbers: a few roundings of 6e-8.
    for one, other in zip(jax.tree.leaves(full.optimiser), jax.tree.leaves(accumulated.optimiser), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def moment(state: TrainState, name: str) -> Params:
    """Adam's mean gradient or mean square."""
    (adam,) = [
        part
        for part in jax.tree.leaves(state.optimiser, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
        if isinstance(part, optax.ScaleByAdamState)
    ]
    return getattr(adam, name)


def test_clipping_is_by_the_global_norm() -> None:
    """sd-scripts was seen to clip per parameter, although its setting promises the global norm."""
    raw = moment(toy.steps(toy.config(clip_norm=None))[-1], "mu")
    clipped = moment(toy.steps(toy.config(clip_norm=0.5))[-1], "mu")
    norms = [float(jnp.linalg.norm(leaf)) / 0.1 for leaf in jax.tree.leaves(raw)]  # mu is 1 − β₁ of the first gradient
    assert min(norms) > 0.5  # so that clipping each by itself would leave two gradients of the same norm
    scale = 0.5 / math.hypot(*norms)
    for one, other in zip(jax.tree.leaves(raw), jax.tree.leaves(clipped), strict=True):
        np.testing.assert_allclose(np.asarray(one) * scale, other, rtol=1e-5)  # float32, a few operations


def test_gradient_below_the_limit_is_not_clipped() -> None:
    raw = toy.steps(toy.config(clip_norm=None))[-1]
    limited = toy.steps(toy.config(clip_norm=1e6))[-1]
    assert_identical(raw.params, limited.params)


def test_logged_gradient_norm_is_that_before_clipping() -> None:
    update = optimiser.make_optimiser(OptimiserConfig(clip_norm=0.1), STEPS)
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    step = make_step(toy.config(), update, lambda trained, *_: (3 * trained["a"].sum() + 4 * trained["b"].sum(), {}))
    zeros = np.zeros((2, 2), np.int32)
    micro = MicroConditioning(zeros, zeros, zeros)
    batch = Batch(np.zeros((2, 1, 1, 3), np.uint8), {}, micro, np.zeros(2, np.int32), np.zeros(2, bool))
    assert float(step(create(params, update, EmaConfig()), {}, batch)[1]["grad_norm"]) == pytest.approx(5)


def test_average_follows_its_formula() -> None:
    states = toy.steps(dataclasses.replace(toy.config(), ema=EmaConfig(decay=0.25)), count=5)
    assert_identical(states[0].ema, states[0].params)
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        decay = min(0.25, (1 + number) / (10 + number))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, before.ema, after.params)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(after.ema), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)  # float32
    decays = [float(1 - weight_at(EmaConfig(decay=0.25), jnp.int32(step))) for step in range(5)]
    assert decays == sorted(decays)
    assert decays[0] < decays[-1] == 0.25  # both sides of the formula were met


def test_rates_rise_evenly_then_stay_or_fall_to_zero() -> None:
    config = OptimiserConfig(learning_rate=1.0, warmup_steps=4)

    def rates(config: OptimiserConfig) -> list[float]:
        rate = optimiser.learning_rate(config, 12)
        return [float(np.asarray(rate(step))) for step in range(13)]

    constant = rates(config)[:12]
    np.testing.assert_allclose(constant, [0.25, 0.5, 0.75] + [1] * 9, rtol=1e-6)
    falling = rates(dataclasses.replace(config, decay=Decay.COSINE))
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(9)]
    np.testing.assert_allclose(falling[4:], cosine, atol=1e-6)
    assert rates(dataclasses.replace(config, warmup_steps=0))[0] == 1


def test_first_update_is_as_long_as_its_rate() -> None:
    """Adam's first step is the rate times the gradient's sign: the logged rate is the one in use."""
    before, after = toy.steps(toy.config(weight_decay=0.0, learning_rate=0.1, warmup_steps=4))
    moved = jax.tree.map(lambda old, new: np.abs(new - old), before.params, after.params)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 0.1 / 4, rtol=1e-4)  # differences of float32 numbers near 3


def test_weight_decay_spares_biases_and_scales() -> None:
    update = optimiser.make_optimiser(OptimiserConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5), STEPS)
    params = {name: jnp.ones(2) for name in ("kernel", "embedding", "bias", "scale", "position_embedding")}
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates: Any = update.update({"layer": gradient}, update.init({"layer": params}), {"layer": params})[0]
    shrunk = {name for name, change in updates["layer"].items() if change[0] == -0.5}
    assert shrunk == {"kernel", "embedding"}
    assert all(float(updates["layer"][name][0]) == 0 for name in params.keys() - shrunk)


# What the loss depends on, with the tiny model


class Given(NamedTuple):
    """The inputs of batch_loss: parameters without zeros, two examples."""

    params: Params
    batch: Batch
    keys: jax.Array
    empty: dict[str, Any]


@pytest.fixture(scope="module")
def given(whole: Run) -> Given:
    rng = np.random.default_rng(0)
    # New and barely trained networks end in layers of about zero, which block every signal.
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), load_model(whole.folder).params
    )
    tokenizer = Tokenizer.of(tiny.MODEL.text)
    size = np.array([[333, 500], [400, 301]], np.int32)
    batch = Batch(
        rng.integers(0, 256, (2, 16, 16, 3), np.uint8),
        cast(Any, tokenizer(["a red circle", "two dogs in the snow"])),
        MicroConditioning(size, np.zeros((2, 2), np.int32), np.full((2, 2), 16, np.int32)),
        np.arange(2, dtype=np.int32),
        np.zeros(2, bool),
    )
    return Given(params, batch, jax.random.split(jax.random.key(3), 2), tokenizer([""]))


def loss_of(given: Given, dropout: float) -> Any:
    config = dataclasses.replace(
        tiny.train_config(Path("unused")), training=configuration.TrainingConfig(caption_dropout=dropout)
    )
    return jax.jit(lambda batch, keys: denoising.batch_loss(given.params, {}, batch, keys, config, given.empty))


@pytest.fixture(scope="module")
def loss_with_captions(given: Given) -> Any:
    return loss_of(given, 0.0)


@pytest.fixture(scope="module")
def loss_without_captions(given: Given) -> Any:
    return loss_of(given, 1.0)


def other_captions(batch: Batch) -> Batch:
    return batch._replace(tokens=Tokenizer.of(tiny.MODEL.text)(["something else", "a third thing"]))


def other_sizes(batch: Batch) -> Batch:
    assert batch.micro is not None
    size = np.array([[332, 500], [400, 301]], np.int32)  # in bfloat16, 333 and 332 are the same
    return batch._replace(micro=batch.micro._replace(original_size=size))


@pytest.mark.slow
def test_captions_affect_the_loss_unless_all_are_dropped(
    given: Given, loss_with_captions: Any, loss_without_captions: Any
) -> None:
    batch, keys = given.batch, given.keys
    assert loss_with_captions(batch, keys) != loss_with_captions(other_captions(batch), keys)
    assert loss_without_captions(batch, keys) == loss_without_captions(other_captions(batch), keys)
    assert loss_with_captions(batch, keys) != loss_without_captions(batch, keys)


@pytest.mark.slow
def test_dropping_captions_keeps_the_sizes(given: Given, loss_without_captions: Any) -> None:
    batch, keys = given.batch, given.keys
    assert tiny.MODEL.unconditional is UnconditionalKind.ZEROS
    assert loss_without_captions(batch, keys) != loss_without_captions(other_sizes(batch), keys)


def test_loss_of_a_batch_is_the_mean_over_its_examples(given: Given, loss_with_captions: Any) -> None:
    """So an example's noise does not depend on the rest of its batch, on which micro-batches and devices rely."""

    def rows(*index: int) -> float:
        take = np.array(index)
        batch = jax.tree.map(lambda leaf: leaf[take], given.batch)
        return float(loss_with_captions(batch, given.keys[take]))

    # Float32, and sums of products in another order.
    assert rows(0, 1) == pytest.approx((rows(0, 0) + rows(1, 1)) / 2, rel=1e-5)
    assert rows(0, 1) == pytest.approx(rows(1, 0), rel=1e-5)
    assert rows(0, 0) != pytest.approx(rows(1, 1), rel=1e-3)


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters(given: Given, loss_with_captions: Any) -> None:
    base = toy.config(warmup_steps=0)
    config = dataclasses.replace(
        base,
        compute=Compute(dtype=Dtype.BFLOAT16),
        training=dataclasses.replace(base.training, caption_dropout=0.0),
    )
    trained, frozen = partition(given.params, ("^unet/conv_out/",))  # little to differentiate: compiles sooner
    update = optimiser.make_optimiser(config.optimiser, STEPS)
    step = jax.jit(make_step(config, update, Denoising(config).loss))
    before = create(trained, update, config.ema)
    after, metrics = step(before, frozen, given.batch)
    _, with_other_sizes = step(before, frozen, other_sizes(given.batch))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.dtype == old.dtype == (jnp.float32 if new.ndim else jnp.int32)
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    exact = float(loss_with_captions(given.batch, keys))
    # bfloat16 has 8 bits: 0.4 % per rounding, averaged over many. More would be a mistake, none would mean float32.
    assert float(metrics["loss"]) == pytest.approx(exact, rel=0.03)
    assert float(metrics["loss"]) != exact
    # Sizes in bfloat16, before their embedding, were seen in diffusers and SimpleTuner.
    assert metrics["loss"] != with_other_sizes["loss"]


def test_every_setting_of_the_schedule_reaches_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that training ignores were seen in MaxDiffusion."""
    calls: list[Any] = []
    monkeypatch.setattr(denoising.loss, "diffusion_loss", lambda *given: (calls.append(given[3:]), jnp.zeros(()))[1])
    latent = jnp.zeros((2, 4, 4, 4))
    prompt = TextConditioning(jnp.zeros((2, 77, 16)), None)
    monkeypatch.setattr(denoising.vae, "encode", lambda *_: Posterior(latent, latent))
    monkeypatch.setattr(denoising.text, "encode", lambda *_: prompt)
    monkeypatch.setattr(denoising.text, "drop", lambda *_: None)
    monkeypatch.setattr(denoising, "unconditional_text", lambda *_: None)
    monkeypatch.setattr(denoising, "condition", lambda *_: None)
    zeros = np.zeros((2, 2), np.int32)
    micro = MicroConditioning(zeros, zeros, zeros)
    batch = Batch(np.zeros((2, 8, 8, 3), np.uint8), {}, micro, np.zeros(2, np.int32), np.zeros(2, bool))
    base = tiny.train_config(Path("unused"))
    model = dataclasses.replace(
        tiny.MODEL,
        schedule=dataclasses.replace(tiny.MODEL.schedule, zero_terminal_snr=True),
        prediction=Prediction.V,
    )
    config = dataclasses.replace(base, model=model, loss=LossConfig(Weighting.MIN_SNR, 5.0))
    monkeypatch.setattr(denoising, "merge", lambda *_: {"unet": {}, "vae": {}})
    denoising.batch_loss({}, {}, batch, jax.random.split(jax.random.key(0), 2), config, {})
    ((schedule, prediction, options, *of_examples),) = calls
    assert schedule.alpha_bar[-1] == 0
    assert prediction is Prediction.V
    assert options == config.loss
    assert of_examples == [None] * 3, "weights, another target, masks"


def test_mesh_of_the_configuration_is_used(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mesh\.data=3 × mesh\.fsdp=1 × mesh\.tensor=1 does not make"):
        loop.train(dataclasses.replace(config, mesh=MeshConfig(3, 1)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
