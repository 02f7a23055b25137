"""Runs of distillations: resumed bit for bit, on a mesh, sampled from and exported; and what they take at full size."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling
import jax
import numpy as np
import pytest
import starting
import tiny
from jax.sharding import AbstractMesh
from test_adapter_training import train
from test_distillation import MODEL, distillation, lora_student, resolved

from sdxl_jax import sharding
from sdxl_jax.aot import compile as aot_compile
from sdxl_jax.aot.report import Report
from sdxl_jax.arrays import flatten
from sdxl_jax.config import TrainConfig, load
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.sampling.generate import text_to_image
from sdxl_jax.sharding import AXES, MeshConfig
from sdxl_jax.training import checkpoint
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.distillation.consistency import ConsistencyConfig
from sdxl_jax.training.objectives.distillation.guidance import GuidanceDistillationConfig
from sdxl_jax.training.objectives.distillation.progressive import ProgressiveConfig
from sdxl_jax.training.objectives.distillation.teacher import TEACHER
from sdxl_jax.weights import lora
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.load import load_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = ("guidance", "consistency", "adapter", "progressive")


def config_of(method: str, folder: Path) -> Any:
    match method:
        case "guidance":
            return distillation(GuidanceDistillationConfig, folder)
        case "consistency":
            return distillation(ConsistencyConfig, folder)
        case "progressive":
            return distillation(ProgressiveConfig, folder, steps=4)
        case _:
            return lora_student(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a teacher."""
    folder = tmp_path_factory.mktemp("distillation")
    tiny.make_folder(folder / "images")
    convert(tiny.random_model(MODEL, 0), folder / "teacher", "orbax", False)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_twice_is_the_straight_one_whose_teacher_is_gone(
    method: str, folder: Path, tmp_path: Path
) -> None:
    """Bit for bit, and sampled as it was distilled, from the run and from what it is converted to."""
    config, straight, stopped = config_of(method, folder), tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    train(config, straight)
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    moved = dataclasses.replace(config.training, init_from=(str(tmp_path / "teacher"),))
    config = dataclasses.replace(config, training=moved)
    train(config, stopped, 2)
    shutil.rmtree(tmp_path / "teacher")
    for stop_before in (3, None):
        train(config, stopped, stop_before)

    abstract, abstract_frozen = objective_of(config).abstract_state(sharding.make_mesh(config.mesh))
    one, other = (checkpoint.restore(each / "checkpoints", 3, abstract) for each in (straight, stopped))
    frozen = [checkpoint.restore_frozen(each, abstract_frozen) for each in (straight, stopped)]
    for a, b in zip(jax.tree.leaves((one, frozen[0])), jax.tree.leaves((other, frozen[1])), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (TEACHER in frozen[0]) == (method != "adapter")

    model, before = load_model(stopped), tiny.random_model(MODEL, 0)
    assert model.config == config.student
    changed = {path for path, value in flatten(before.params).items() if (flatten(model.params)[path] != value).any()}
    assert changed and all(path.startswith("unet/") for path in changed)
    (image,) = text_to_image(model, ["a"], height=16, width=16, progress=False)
    assert image.std() > 0
    if method == "adapter":
        made = lora.add(before, stopped)
        assert resolved(made.config)[:2] == resolved(model.config)[:2] == ("lcm-lora", "lcm")


@pytest.fixture(scope="module")
def sharded(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sharded_distillation.py prints."""
    script, scratch = Path(__file__).with_name("sharded_distillation.py"), tmp_path_factory.mktemp("sharded")
    environment = compiling.environment(compiled, devices=4)
    command = [sys.executable, starting.__file__, str(script), str(scratch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["student", "adapter", "guidance", "progressive"])
def test_a_step_on_a_mesh_is_that_of_one_device(sharded: dict[str, Any], name: str) -> None:
    # Roundings of float32 in another order, in the loss and in the gradient.
    assert sharded["devices"] == 4
    one, four = sharded[name]["losses"]
    assert abs(one - four) < 1e-5 * one
    assert sharded[name]["misplaced"] == []
    assert sharded[name]["difference"] < 1e-3 * sharded[name]["moved"]


# At full size

UNET = 2_567_463_684
"""Parameters of SDXL's UNet."""


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["guidance_distillation", "lcm", "lcm_lora", "progressive"])
def test_bytes_of_student_and_teacher_at_full_size(name: str) -> None:
    """Nothing is computed: the step is traced alone."""
    config = load(CONFIGS / f"{name}.py", TrainConfig)
    objective, mesh = objective_of(config), AbstractMesh((1, 1, 8, 1), AXES)
    objective.check()
    state, frozen = objective.abstract_state(mesh)
    with_input = 0 if name == "lcm_lora" else 256 * 320
    if name == "lcm_lora":
        # The factors and AdamW's two moments, float32; the base in bfloat16, its autoencoder in float32.
        assert nbytes(state.params) == 4 * 196_751_360
        assert nbytes(state) == pytest.approx(3 * nbytes(state.params), rel=1e-6)
        assert TEACHER not in frozen
        assert nbytes(frozen["unet"]) == 2 * UNET
    else:
        # Parameters, average and two moments, float32; the teacher in bfloat16.
        assert nbytes(state) == pytest.approx(16 * (UNET + with_input), rel=1e-6)
        assert nbytes(frozen[TEACHER]) == 2 * UNET
    bucket = max(config.data.buckets, key=lambda size: size[0] * size[1])
    batch = objective.abstract_batch(mesh, Bucket(*bucket), 8)
    after, metrics = jax.eval_shape(objective.step(), state, frozen, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["lcm", "lcm_lora", "guidance_distillation", "progressive", "dmd2", "turbo"])
def test_the_step_and_the_students_sampler_compile_for_tpus(name: str) -> None:
    config = load(CONFIGS / "smoke" / f"{name}.py", TrainConfig)
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
    (step,) = aot_compile.compile_step(config, "v5p:2x2x1", progress=False)
    assert isinstance(step, Report) and step.fits
    assert step.bytes_by_use["frozen"] > 0
    assert ("teacher" in step.bytes_by_use) == (name != "lcm_lora")
    assert ("critic" in step.bytes_by_use) == (name in ("dmd2", "turbo"))
    made = aot_compile.compile_sampler(config, "v5p:2x2x1", progress=False)
    assert [each.program.split()[0] for each in made] == ["text", "sampler", "decoder"]
