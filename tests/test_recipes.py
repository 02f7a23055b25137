"""configs/: every recipe loads, fits its mesh, and runs; each stage starts from the weights of the stage before it.

The smoke configurations are run, which differ in sizes only. The recipes themselves are only traced.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors
from jax.sharding import AbstractMesh
from PIL import Image
from test_autoencoder_recipes import AUTOENCODERS
from tiny import write_dinov2, write_image_tower

from sdxl_jax import sharding
from sdxl_jax.arrays import Params, flatten
from sdxl_jax.conditioning.micro import Numbers
from sdxl_jax.config import TrainConfig, load
from sdxl_jax.data.buckets import SDXL_BUCKETS
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model, ModelConfig, abstract
from sdxl_jax.models.layers import Dtype, Remat
from sdxl_jax.sampling.options import Options
from sdxl_jax.sharding import AXES, MeshConfig
from sdxl_jax.smoke import SHRUNK, STEPS, smoke_config
from sdxl_jax.training.encoding import encode
from sdxl_jax.training.loop import train
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import AdversarialDiffusionConfig
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.open import open_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("sdxl_base_256", "sdxl_base_512", "sdxl_base_1024_multi_aspect", "sdxl_refiner")
IMAGENET = ("imagenet_512_only", "imagenet_512_nocond", "imagenet_512_size_cond")
BESIDE = ("lora_1024", "dreambooth_lora", "textual_inversion", "pivotal")
OF_OTHER_NOISE = ("finetune_edm", "finetune_flow", "finetune_v_pred")
OTHERS = ("finetune_1024", *BESIDE, *OF_OTHER_NOISE, "inpaint", "sdxl_image_prompt", "sd15", "sd21_v", *IMAGENET)
DISTILLATIONS = ("guidance_distillation", "lcm", "lcm_lora", "progressive", "dmd2", "turbo")
NAMES = STAGES + OTHERS + DISTILLATIONS
PUBLISHED = {"sd_xl_base_1.0.safetensors": "sdxl_base_256", "stable-diffusion-v1-2": "sd15"}
PUBLISHED |= {"stable-diffusion-2": "sd21_v", "cosxl.safetensors": "finetune_edm"}
"""The published weights that recipes start from, each with a recipe that has the same model."""
UNET_PARAMETERS = {
    "inpaint": 2_567_478_084,  # five input channels more: 5 × 320 × 3 × 3
    "sdxl_refiner": 2_259_526_660,
    "sd15": 859_520_964,
    "sd21_v": 865_910_724,
    "imagenet_512_only": 406_231_812,
    "imagenet_512_nocond": 406_231_812,
    "imagenet_512_size_cond": 408_331_012,
}
"""Of the ImageNet models none is published: these are the counts of sgm's configuration here."""
SDXL_BASE_PARAMETERS = 2_567_463_684


@functools.cache
def recipe(name: str) -> TrainConfig:
    return load(CONFIGS / f"{name}.py", TrainConfig)


def test_every_recipe_is_tested_and_has_its_smoke_configuration() -> None:
    every = {*NAMES, *AUTOENCODERS}
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*every, "quickstart", "quickstart_autoencoder"}
    assert {path.stem for path in (CONFIGS / "smoke").glob("*.py")} == every


@pytest.mark.parametrize("name", [*NAMES, *AUTOENCODERS])
def test_header_has_hardware_hours_metric_command_and_last_run(name: str) -> None:
    header = (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    rows = dict(line.split(maxsplit=1) for line in header.split("\n\n")[1].replace("last run", "last_run").splitlines())
    assert list(rows) == ["hardware", "hours", "metric", "command", "last_run"]
    assert rows["command"].startswith(f"sdxl-jax train configs/{name}.py --run-dir runs/{name}")


@functools.cache
def abstract_parameters(config: ModelConfig) -> Params:
    return abstract(config)


SIZES = [pytest.param(name, marks=() if name in (STAGES[2], "sdxl_refiner") else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", SIZES)
def test_recipe_has_the_published_size_and_fits_its_mesh(name: str) -> None:
    config = recipe(name)
    config.check()
    params = abstract_parameters(config.model)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params["unet"]))
    assert size == UNET_PARAMETERS.get(name, SDXL_BASE_PARAMETERS)
    axes = config.mesh
    assert axes.data == -1
    for devices in (8, 64, 256):
        data = devices // (axes.fsdp * axes.tensor * axes.slices)
        mesh = AbstractMesh((axes.slices, data, axes.fsdp, axes.tensor), AXES)
        objective_of(config).abstract_state(mesh)  # raises where an axis does not divide
        if devices <= config.data.batch_size:  # the batch of a fine-tuning is for fewer devices
            sharding.check_batch(mesh, config.data.batch_size, config.optimiser.accumulate)


def test_models_of_table_2_differ_in_their_images_and_sizes_alone() -> None:
    only, nocond, size_cond = map(to_json, map(recipe, IMAGENET))
    assert differences(only, nocond) == ["data.min_size: 512 -> 1"]
    changed = {line.split(":", 1)[0] for line in differences(nocond, size_cond)}
    assert changed == {"model.micro", "model.unet.vector_dim", "training.micro_dropout"}


def test_numbers_are_those_of_the_paper() -> None:
    stages = [recipe(name) for name in STAGES]
    assert [config.training.steps for config in stages[:2]] == [600_000, 200_000]
    assert stages[0].data.batch_size == 2048
    assert [config.data.buckets for config in stages] == [((256, 256),), ((512, 512),), SDXL_BUCKETS, SDXL_BUCKETS]
    assert [config.loss.offset_noise for config in stages] == [0, 0, 0.05, 0]
    assert [config.loss.timesteps for config in stages] == [None, None, None, (0, 200)]
    assert stages[3].model.micro is not None
    assert stages[3].model.micro.numbers is Numbers.SIZE_CROP_AESTHETIC
    assert [config.model.prediction for config in stages] == [Prediction.EPSILON] * 4
    sd21 = recipe("sd21_v")
    assert (sd21.model.prediction, sd21.data.buckets) == (Prediction.V, ((768, 768),))


def changed(name: str) -> set[str]:
    full, smoke = recipe(name), load(CONFIGS / "smoke" / f"{name}.py")
    lines = differences(to_json(full), to_json(smoke))
    return {line.split(":", 1)[0] for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_smoke_configuration_differs_in_sizes_only(name: str) -> None:
    assert changed(name) <= set(SHRUNK)
    full, smoke = recipe(name), smoke_config(recipe(name))
    assert (smoke.compute, smoke.loss, smoke.ema) == (full.compute, full.loss, full.ema)
    assert smoke.compute.dtype is Dtype.BFLOAT16
    assert smoke.compute.remat is Remat.BLOCK
    sizes = ("width", "layers", "heads", "mlp_width", "projection_dim")
    for large, small in zip(full.model.text, smoke.model.text, strict=True):
        same = {field: getattr(large.clip, field) for field in sizes}
        assert dataclasses.replace(small, clip=dataclasses.replace(small.clip, **same)) == large


# The smoke configurations run


class Chain(NamedTuple):
    root: Path
    """The folder of their data, weights and runs."""
    configs: dict[str, TrainConfig]


def make_images(folder: Path) -> None:
    """Eight images of each of three sizes, two of them elongated, with a score; by size in subfolders."""
    for part in range(3):
        (folder / str(part)).mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(24):
        height, width = [(64, 256), (130, 129), (260, 64)][number % 3]
        name = f"{number % 3}/{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        caption = f"image number {number} of <zwx>"
        lines.append(json.dumps({"file_name": name, "text": caption, "aesthetic": 4 + number / 10}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def smoke(name: str, root: Path) -> TrainConfig:
    """Keeps small images, and samples no validation images: the sampler has its own tests, and takes as long to
    compile."""
    config = smoke_config(recipe(name), str(root))
    validation = dataclasses.replace(config.validation, every_steps=None)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, min_size=1), validation=validation)


def random_parameters(config: ModelConfig, rng: np.random.Generator) -> Params:
    """Random parameters without compilation; small, so that no prediction overflows."""
    abstract = abstract_parameters(config)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def chain(quick_compilation: None, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Data and weights at the paths of the smoke configurations."""
    root = tmp_path_factory.mktemp("recipes")
    make_images(root / "data" / "shards")
    for name in ("imagenet", "subject", "class"):
        (root / "data" / name).symlink_to(root / "data" / "shards")
    (root / "weights").mkdir()
    configs = {name: smoke(name, root) for name in NAMES}
    for number, (file, name) in enumerate(PUBLISHED.items()):
        config = configs[name].model
        params = random_parameters(config, np.random.default_rng(number))
        convert(Model(config, params), root / "weights" / file, "single-file" if "." in file else "diffusers", False)
    projection = configs["sdxl_image_prompt"].model.text[-1].clip.projection_dim
    write_image_tower(root / "weights" / "clip_vision_g.safetensors", projection or 0)
    turbo = configs["turbo"]
    assert isinstance(turbo, AdversarialDiffusionConfig) and turbo.discriminator.dinov2 is not None
    write_dinov2(root / "weights" / "dinov2-small", turbo.discriminator.dinov2)
    return Chain(root, configs)


def trained(chain: Chain, name: str) -> Path:
    """The run of a smoke configuration, trained at the first call, after the stages before it."""
    run_dir = chain.root / "runs" / name
    if not run_dir.exists():
        if name in STAGES[1:]:
            trained(chain, STAGES[STAGES.index(name) - 1])
        if chain.configs[name].data.cache is not None:
            encode(chain.configs[name], progress=False)
        train(chain.configs[name], run_dir, progress=False)
    return run_dir


RUN = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
"""Each compiles a step and the initial weights, which takes about a minute."""


def lines_of(chain: Chain, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (trained(chain, name) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUN)
def test_smoke_configuration_trains(chain: Chain, name: str) -> None:
    lines = lines_of(chain, name)
    assert [line["step"] for line in lines] == [1, 2, 3] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    before, after = (flatten(load_model(checkpoint(chain, name, step)).params) for step in (1, STEPS))
    moved = {path.split("/")[0] for path in after if not np.array_equal(before[path], after[path])}
    texts = {"text_encoder", "text_encoder_2"}
    assert moved == {"textual_inversion": texts, "pivotal": {"unet", *texts}}.get(name, {"unet"})


def checkpoint(chain: Chain, name: str, step: int) -> Path:
    return trained(chain, name) / "checkpoints" / str(step)


@pytest.mark.parametrize("name", RUN)
def test_stage_starts_from_the_weights_of_init_from_bit_for_bit(chain: Chain, name: str) -> None:
    """The EMA weights. test_training.py tests that training uses the result of this function."""
    config = chain.configs[name]
    if name in STAGES[1:]:
        trained(chain, STAGES[STAGES.index(name) - 1])
    (source,) = config.training.init_from
    theirs = flatten(load_model(source).params)
    ours = objective_of(config).initial_weights(sharding.make_mesh(MeshConfig()), progress=False)
    assert {path.split("/")[0] for path in ours} == set(config.training.init_parts or config_parts(config))
    for path, value in ours.items():
        if name == "inpaint" and path == "unet/conv_in/kernel":
            assert not np.asarray(value[:, :, 4:]).any()
            value = value[:, :, :4]
        np.testing.assert_array_equal(value, theirs[path].astype(value.dtype), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_OTHER_NOISE)
def test_a_run_and_its_exports_say_their_noise_levels(chain: Chain, name: str, tmp_path: Path) -> None:
    expected = chain.configs[name].model
    run_dir = trained(chain, name)
    convert(run_dir, tmp_path / "file.safetensors", "single-file", False)
    convert(run_dir, tmp_path / "folder", "diffusers", False)
    for path in (run_dir, checkpoint(chain, name, 1), tmp_path / "file.safetensors", tmp_path / "folder"):
        found = open_model(path).config
        assert (found.noise, found.prediction, found.schedule) == (
            expected.noise,
            expected.prediction,
            expected.schedule,
        ), path
        assert Options().resolved(found) == Options().resolved(expected)
    with safetensors.safe_open(str(tmp_path / "file.safetensors"), "np") as file:
        marks = {key for key in file.keys() if key.startswith(("edm_", "v_pred", "ztsnr"))}  # noqa: SIM118
    assert marks == {
        "finetune_edm": {"edm_vpred.sigma_max", "edm_vpred.sigma_min"},
        "finetune_flow": set(),  # no program knows a mark of it: our own metadata says it
        "finetune_v_pred": {"v_pred", "ztsnr"},
    }.get(name)
    after = with_training(chain.configs[name], init_from=(str(run_dir),), init_changes=(), trainable=("^unet/",))
    objective_of(after).check_start()  # of a second phase: nothing is changed any more


@pytest.mark.parametrize("name", OF_OTHER_NOISE[1:])
def test_another_prediction_is_refused_unless_it_is_changed_on_purpose(chain: Chain, name: str) -> None:
    config = chain.configs[name]
    objective_of(config).check_start()
    with pytest.raises(InputError, match=r"trained with a different prediction: epsilon -> .*--training.init-changes"):
        objective_of(with_training(config, init_changes=())).check_start()


def config_parts(config: TrainConfig) -> set[str]:
    return {"unet", "vae", *(tower.name for tower in config.model.text)}


@pytest.mark.parametrize("name", STAGES[1:])
def test_stages_form_a_chain(name: str) -> None:
    before = STAGES[STAGES.index(name) - 1]
    assert recipe(name).training.init_from == (f"runs/{before}",)


def refusal(config: TrainConfig, run_dir: Path) -> str:
    with pytest.raises(InputError) as refused:
        train(config, run_dir, progress=False)
    assert not run_dir.exists()
    return str(refused.value)


def with_training(config: TrainConfig, **options: Any) -> TrainConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **options))


def test_stage_whose_predecessor_is_missing_is_refused_before_the_data_is_opened(tmp_path: Path) -> None:
    for name in NAMES:  # there is no data either
        message = refusal(smoke(name, tmp_path), tmp_path / "run")
        assert "training.init_from=" in message
        assert "There is nothing at" in message
        assert "train that first (docs/guides/recipe.md)" in message


@pytest.mark.slow
def test_stage_from_a_model_of_other_shapes_is_refused(chain: Chain, tmp_path: Path) -> None:
    source = str(trained(chain, "sdxl_base_256"))
    refiner = chain.configs["sdxl_refiner"]
    everything = with_training(refiner, init_from=(source,), init_parts=None)
    message = refusal(everything, tmp_path / "run")
    assert (
        "holds text_encoder, which this model does not have. Select the parts to load with training.init_parts"
        in message
    )
    unet = with_training(refiner, init_from=(source,), init_parts=("unet",))
    message = refusal(unet, tmp_path / "run")
    assert "The unet in" in message
    assert "is not this model's: block_channels" in message


@pytest.mark.parametrize(
    ("source", "parts", "expected"),
    [
        ("stable-diffusion-v1-2", ("text_encoder_2",), "init_parts has text_encoder_2, which this model does not have"),
        ("stable-diffusion-v1-2/vae", ("vae", "unet"), "init_parts has unet, which is not in training.init_from="),
        (None, ("vae",), "has no effect without training.init_from"),
    ],
)
def test_parts_that_cannot_be_taken_are_refused(
    chain: Chain, tmp_path: Path, source: str | None, parts: tuple[str, ...], expected: str
) -> None:
    named = () if source is None else (str(chain.root / "weights" / source),)
    config = with_training(chain.configs["sd15"], init_from=named, init_parts=parts)
    assert expected in refusal(config, tmp_path / "run")
