"""Training of adapters: the base stays as it is, a run resumes bit for bit, and the file has what was trained."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh, PartitionSpec
from PIL import Image
from safetensors import safe_open

from sdxl_jax import sharding
from sdxl_jax.adapters import changes, dora, kinds, targets
from sdxl_jax.adapters.embeddings import TextualInversionConfig
from sdxl_jax.adapters.kinds import Kind
from sdxl_jax.adapters.targets import AdapterConfig, FileDtype, Layers, Spelling
from sdxl_jax.arrays import BaseDtype, Batch, MicroConditioning, Params, flatten, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.images import read_image
from sdxl_jax.data.mixture import Source, Target
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.loss import LossConfig, Weighting
from sdxl_jax.errors import InputError
from sdxl_jax.model import SDXL_BASE, Model, ModelConfig
from sdxl_jax.models import unet
from sdxl_jax.models.layers import dequantised
from sdxl_jax.models.unet_parts import SDXL_BLOCKS, block_rates
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig, OptimiserKind, make_optimiser
from sdxl_jax.sharding import AXES
from sdxl_jax.training import checkpoint, loop
from sdxl_jax.training.objectives import adapter_metadata, objective_of
from sdxl_jax.training.objectives.adapters import AdapterTraining
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig
from sdxl_jax.weights import lora, names
from sdxl_jax.weights.adapter_files import reading
from sdxl_jax.weights.adapter_files.names import layers_of
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.eight_bits import is_quantised, quantised, scale_path, with_numbers
from sdxl_jax.weights.lazy import abstract_leaves, in_memory
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.names import Dialect, Naming

pytestmark = pytest.mark.usefixtures("shared_steps", "quick_compilation")

STEPS = 3
LORA = AdapterConfig(
    rank=2,
    alpha=3.0,
    layers=Layers.LINEAR,
    rank_dropout=0.3,
    module_dropout=0.2,
    up_rate=4.0,
    norm_limit=0.02,
    file_dtype=FileDtype.FLOAT32,
)
OTHERS = {
    "loha": AdapterConfig(Kind.LOHA, 2, layers=Layers.BLOCKS, conv_rank=1, rank_dropout=0.5),
    "lokr": AdapterConfig(Kind.LOKR, 1, layers=Layers.BLOCKS, middle=True, module_dropout=0.3, biases_and_norms=True),
    "dora": AdapterConfig(rank=2, magnitude=dora.Axis.IN, norm_limit=0.05),
    "lokr, full": AdapterConfig(Kind.LOKR, 2, full_matrix=True, module_dropout=0.3, norm_limit=0.05),
    "lokr, large": AdapterConfig(Kind.LOKR, 2, layers=Layers.BLOCKS, conv_rank=1, rank_dropout=0.5, module_dropout=0.3),
    "differences": AdapterConfig(Kind.DIFFERENCE, layers=Layers.ALL, biases_and_norms=True, norm_limit=0.05),
    "bfloat16": AdapterConfig(rank=2, layers=Layers.BLOCKS, base_dtype=BaseDtype.BFLOAT16),
    "int8": AdapterConfig(rank=2, layers=Layers.BLOCKS, base_dtype=BaseDtype.INT8),
    "int8 dora": AdapterConfig(Kind.LOHA, 2, magnitude=dora.Axis.OUT, base_dtype=BaseDtype.INT8),
}


MODEL = dataclasses.replace(
    layouts.MODEL,
    unet=dataclasses.replace(layouts.MODEL.unet, transformer_depth=(0,), in_channels=12, out_channels=12),
    vae=WaveletConfig(),
)
"""A transformer in the middle alone, and no autoencoder to compile."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Three steps of two images, of one bucket. Not from fresh weights: the zeros of the last convolution let no
    gradient through."""
    folder = tmp_path_factory.mktemp("base")
    convert(tiny.random_model(MODEL, 0), folder / "model", "orbax", False)
    config = tiny.train_config(tiny.make_folder(folder / "images"), STEPS)
    return dataclasses.replace(
        config,
        model=MODEL,
        data=dataclasses.replace(config.data, buckets=((16, 16),), max_aspect_distance=10.0, batch_size=2),
        optimiser=dataclasses.replace(config.optimiser, learning_rate=1e-2),
        training=dataclasses.replace(
            config.training, trainable=("^unet/", "^text_encoder_2/"), init_from=(str(folder / "model"),)
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=1, export_every_steps=2),
    )


class Crash(Exception):
    pass


def train(config: TrainConfig, folder: Path, stop_before: int | None = None) -> Model | None:
    """Trains; an exception ends it before the given step."""
    done = checkpoint.latest_step(folder / "checkpoints") or 0

    def put(mesh: Any, batch: Any, original: Any = sharding.put_batch) -> Any:
        nonlocal done
        done += 1
        if done == stop_before:
            raise Crash
        return original(mesh, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "put_batch", put)
        if stop_before is None:
            return loop.train(config, folder, progress=False)
        with pytest.raises(Crash):
            loop.train(config, folder, progress=False)
    return None


def assert_resumes(config: TrainConfig, straight: Path, stopped: Path) -> None:
    """Stopped after the first and the second step, the run ends with the state and the files of the straight one, also
    where the second stop was between the checkpoint and the file of its step."""
    of_step = "adapters/run-00000002.safetensors"
    for stop_before in (2, 3, None):
        train(config, stopped, stop_before)
        if stop_before == 3:
            (stopped / of_step).unlink()
    assert (straight / of_step).read_bytes() == (stopped / of_step).read_bytes()
    abstract, _ = objective_of(config).abstract_state(sharding.make_mesh(config.mesh))
    one, other = (checkpoint.restore(each / "checkpoints", STEPS, abstract) for each in (straight, stopped))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (straight / "run.safetensors").read_bytes() == (stopped / "run.safetensors").read_bytes()


class Trained:
    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder = config, folder
        self.model = train(config, folder)


@pytest.fixture(scope="module")
def trained(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run that is not interrupted."""
    rates = dataclasses.replace(base.optimiser, rates=(("^text_encoder", 0.5),))
    config = dataclasses.replace(base, adapter=LORA, optimiser=rates)
    return Trained(config, tmp_path_factory.mktemp("straight") / "run")


def test_run_that_was_stopped_twice_is_the_straight_one_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    assert_resumes(trained.config, trained.folder, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_resume_bit_for_bit(base: TrainConfig, tmp_path: Path, name: str) -> None:
    adapter = OTHERS[name]
    config = dataclasses.replace(base, adapter=adapter)
    if name in ("bfloat16", "int8"):
        config = dataclasses.replace(config, optimiser=dataclasses.replace(config.optimiser, accumulate=2))
    model = train(config, tmp_path / "straight" / "run")
    assert model is not None
    assert_resumes(config, tmp_path / "straight" / "run", tmp_path / "stopped" / "run")
    tolerance = 1e-6 if adapter.base_dtype is BaseDtype.FLOAT32 else 8e-3  # an ulp of bfloat16
    assert_same(load_model(tmp_path / "straight" / "run").params, as_numbers(model.params), tolerance)


def as_numbers(params: Params) -> Params:
    """The parameters without eight bits."""
    flat = flatten(params)
    kernels = {path: dequantised(flat[path], flat.pop(scale_path(path), None)) for path in list(flat) if path in flat}
    return unflatten(kernels)


def assert_same(found: Params, expected: Params, tolerance: float) -> None:
    """Of the largest value of each parameter."""
    a, b = flatten(found), flatten(expected)
    assert a.keys() == b.keys()
    for path, value in a.items():
        one, other = np.asarray(value, np.float32), np.asarray(b[path], np.float32)
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-30), path


def test_only_the_adapter_learns_and_its_file_is_the_run(trained: Trained) -> None:
    """The run opens as a model; the base with the run's file is the same model, to the bit."""
    before, after = load_model(trained.config.training.init_from[0]), load_model(trained.folder)
    file = lora.read(trained.folder)
    assert (file.name, file.ranks) == ("run", [2])
    with_file = flatten(lora.add(before, file).params)
    changed = set[str]()
    for path, value in flatten(after.params).items():
        np.testing.assert_array_equal(value, with_file[path], err_msg=path)
        if not np.array_equal(value, flatten(before.params)[path]):
            changed.add(path)
    assert changed == set(targets.selected(LORA, flatten(before.params), trained.config.training.trainable))
    assert trained.model is not None
    assert_same(trained.model.params, after.params, 1e-6)  # summed on devices, in another order


def test_files_are_written_while_training_with_the_metadata_of_the_run(trained: Trained) -> None:
    assert [path.name for path in (trained.folder / "adapters").iterdir()] == ["run-00000002.safetensors"]
    with safe_open(trained.folder / "run.safetensors", "np") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
    assert (metadata["ss_steps"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "2", "3")
    assert (metadata["ss_output_name"], metadata["ss_network_module"]) == ("run", "networks.lora")
    assert (metadata["ss_unet_lr"], metadata["ss_text_encoder_lr"]) == ("0.01", "0.005")
    assert (metadata["ss_resolution"], metadata["ss_num_train_images"], metadata["ss_v2"]) == (
        "(16, 16)",
        "16",
        "False",
    )
    assert (metadata["ss_num_epochs"], metadata["ss_epoch"], metadata["ss_num_batches_per_epoch"]) == ("1", "0", "8")
    assert json.loads(metadata["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [16, 16], "count": 16}}}
    assert "modelspec.trigger_phrase" not in metadata
    assert any(name.startswith("lora_unet_") for name in names)
    assert any(name.startswith("lora_te_") for name in names)


def test_metadata_is_what_is_known_of_a_training(base: TrainConfig) -> None:
    """Learning rates that differ within a part are left out; the trigger is the adapter's, the data's, or the token."""

    def of(**fields: Any) -> dict[str, str]:
        config = dataclasses.replace(base, adapter=LORA, **fields)
        return adapter_metadata.of_training(config, LORA, ("unet/a/kernel/up", "unet/b/kernel/up"), 3, None)

    loss = LossConfig(weighting=Weighting.MIN_SNR)
    sources = (Source("a"), Source("of the class", loss_weight=0.5))
    data = dataclasses.replace(base.data, folder=None, sources=sources, trigger="sks dog")
    rates = dataclasses.replace(base.optimiser, rates=(("^unet/a", 0.5),))
    token = TextualInversionConfig(token="<zwx>")
    found = of(loss=loss, data=data, optimiser=rates, textual_inversion=token)
    assert (found["ss_min_snr_gamma"], found["ss_prior_loss_weight"]) == ("5.0", "0.5")
    assert "ss_unet_lr" not in found and of()["ss_unet_lr"] == "0.01" and "ss_text_encoder_lr" not in of()
    assert of()["ss_min_snr_gamma"] == "None" and "ss_prior_loss_weight" not in of()
    assert found["modelspec.trigger_phrase"] == "sks dog"
    assert of(textual_inversion=token)["modelspec.trigger_phrase"] == "<zwx>"


def adapter_training(adapter: AdapterConfig, trainable: tuple[str, ...] = ("^unet/",)) -> AdapterTraining:
    config = tiny.train_config(Path("unused"))
    training = dataclasses.replace(config.training, trainable=trainable)
    return AdapterTraining(dataclasses.replace(config, model=MODEL, training=training, adapter=adapter), adapter)


def random_adapters(given: AdapterTraining, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        path: np.full(leaf.shape, leaf.distribution.mean, np.float32)
        if path.endswith("alpha")
        else rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in given.abstract.items()
    }


def test_a_new_adapter_changes_nothing_yet() -> None:
    """ΔW is zero, and a DoRA has the norms of the base."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    model = tiny.random_model(MODEL, 0)
    for adapter in (LORA, *OTHERS.values()):
        given = adapter_training(adapter, ("^unet/", "^text_encoder_2/"))
        factors, alphas = given.fresh(model.params, mesh)
        whole = unflatten(flatten(factors["adapters"]) | flatten(alphas.get("adapters", {})))
        for path, rows in changes.untree(whole, given.layers).items():
            value = np.asarray(flatten(model.params)[path])
            after = changes.changed(value, rows, 1.0)
            if adapter.magnitude is None:
                np.testing.assert_array_equal(after, value)
            else:
                np.testing.assert_allclose(after, value, rtol=1e-6)


# A base in eight bits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lokr", "int8 dora"])
def test_gradients_beside_a_base_in_eight_bits_are_those_beside_its_numbers(base: TrainConfig, name: str) -> None:
    """Scales are multiplied after the product instead of before it, which rounds differently: of all gradients together
    up to 1e-6 seen."""
    adapter = dataclasses.replace(OTHERS.get(name, LORA), rank_dropout=0.0, module_dropout=0.0)
    given = adapter_training(adapter, base.training.trainable)
    objective = objective_of(dataclasses.replace(base, adapter=adapter))
    small = quantised(in_memory(tiny.random_model(MODEL, 0))).leaves
    factors = {path: each if path.endswith("alpha") else 0.1 * each for path, each in random_adapters(given).items()}
    trained, alphas = (
        {"adapters": unflatten({k: v for k, v in factors.items() if k.endswith("alpha") is frozen})}
        for frozen in (False, True)
    )
    batch, keys = prior_batch(), jax.random.split(jax.random.key(0), 2)
    gradient = jax.jit(jax.value_and_grad(lambda *given: objective.loss(*given)[0]))
    found, expected = (
        gradient(trained, unflatten({path: leaf.read() for path, leaf in leaves.items()}) | alphas, batch, keys)
        for leaves in (small, with_numbers(small))
    )
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-5)
    error = jax.tree.map(jnp.subtract, found[1], expected[1])
    assert optax.tree.norm(error) < 5e-6 * optax.tree.norm(expected[1])


@pytest.mark.parametrize(
    ("model", "most"), [(MODEL, 1.0), pytest.param(SDXL_BASE, 0.53, marks=pytest.mark.slow)], ids=["tiny", "sdxl"]
)
def test_a_base_in_eight_bits_takes_half_of_the_bytes_of_bfloat16_and_is_split(model: ModelConfig, most: float) -> None:
    """The UNet and the text encoders; most of the tiny ones is not kernels. Nothing is made."""
    config = dataclasses.replace(tiny.train_config(Path("unused")), model=model)
    mesh = AbstractMesh((1, 1, 4, 1), AXES)

    def frozen(base_dtype: BaseDtype) -> dict[str, Any]:
        adapter = AdapterConfig(rank=2, base_dtype=base_dtype)
        _, trees = objective_of(dataclasses.replace(config, adapter=adapter)).abstract_state(mesh)
        return {path: leaf for path, leaf in flatten(trees).items() if path.startswith(("unet", "text"))}

    small, half = frozen(BaseDtype.INT8), frozen(BaseDtype.BFLOAT16)
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in tree.values()) for tree in (small, half)]
    assert 0.5 < sizes[0] / sizes[1] < most
    for path, leaf in half.items():
        assert small[path].sharding == leaf.sharding
        assert small[path].dtype.name == ("int8" if is_quantised(path) else "bfloat16")
    assert {leaf.dtype.name for path, leaf in small.items() if path not in half} == {"float32"}


# Which layers, how many parameters


def parameters_of(config: AdapterConfig, trainable: tuple[str, ...] = ("^unet/",)) -> tuple[int, int]:
    """(layers, trainable parameters) of SDXL base."""
    layers = layers_of(SDXL_BASE)
    found = targets.abstract(config, abstract_leaves(SDXL_BASE), layers, trainable)
    paths = {path.rpartition("/")[0] for path in found}
    size = sum(int(np.prod(leaf.shape)) for path, leaf in found.items() if not path.endswith("alpha"))
    return sum(layers[path] or 1 for path in paths), size


@pytest.mark.parametrize(
    ("layers", "rank", "modules", "parameters"),
    [
        (Layers.ATTENTION, 4, 560, 5_806_080),
        (Layers.ATTENTION, 16, 560, 23_224_320),
        (Layers.ATTENTION, 32, 560, 46_448_640),
        (Layers.ATTENTION, 64, 560, 92_897_280),
        (Layers.LINEAR, 4, 722, 10_639_360),
        (Layers.LINEAR, 64, 722, 170_229_760),
        (Layers.BLOCKS, 64, 788, 196_751_360),
    ],
)
def test_adapters_of_sdxl_have_the_sizes_of_other_programs(
    layers: Layers, rank: int, modules: int, parameters: int
) -> None:
    """Counted in diffusers 0.42.1 with PEFT on SDXL base; 788: what LCM-LoRA has."""
    assert parameters_of(AdapterConfig(rank=rank, layers=layers)) == (modules, parameters)


def test_presets_of_layers_of_unet_and_text_encoders() -> None:
    assert parameters_of(AdapterConfig(layers=Layers.ATTENTION_FEED_FORWARD))[0] == 700
    assert parameters_of(AdapterConfig(rank=4, layers=Layers.ALL))[0] == 794
    assert parameters_of(AdapterConfig(), ("^text_encoder/",))[0] == 12 * 4
    assert parameters_of(AdapterConfig(layers=Layers.LINEAR), ("^text_encoder",))[0] == (12 + 32) * 6
    assert parameters_of(AdapterConfig(), ("mid_block.*attn2/to_[kv]/",))[0] == 20


# Refusals


@pytest.mark.parametrize(
    ("adapter", "trainable", "expected"),
    [
        ({"rank": 64}, ("^unet/",), r"rank 64 is to change unet/.*whose own rank is at most 8"),
        ({"rank": 0}, ("^unet/",), r"rank=0.* Give 1 or more"),
        ({"alpha": 0.0}, ("^unet/",), r"alpha 0\. Give a number above 0"),
        ({"alpha": -1.0}, ("^unet/",), r"alpha -1\. Give a number above 0"),
        ({"conv_alpha": 0.0}, ("^unet/",), r"adapter\.conv_alpha has alpha 0"),
        ({}, ("^unet/", "attn3"), r'training\.trainable has "attn3", which matches no parameter that adapter\.layers='),
        ({}, ("(",), r'training\.trainable has "\(", which is not a regular expression: '),
        ({}, (), r"training\.trainable=\(\) gives no layer to the adapter"),
        ({}, ("^vae/",), r'training\.trainable has "\^vae/", which matches no parameter'),
        ({"conv_rank": 2}, ("^unet/",), r"conv_rank and conv_alpha are for convolutions larger than 1×1, of which"),
        ({"factor": 4}, ("^unet/",), r"adapter\.factor has no effect with adapter\.kind=lora"),
        ({"kind": Kind.LOHA, "up_rate": 4.0}, ("^unet/",), r"adapter\.up_rate has no effect with adapter\.kind=loha"),
        ({"up_rate": 0.0}, ("^unet/",), r"adapter\.up_rate=0\.0"),
        ({"norm_limit": 0.0}, ("^unet/",), r"adapter\.norm_limit=0\.0"),
        ({"rank_dropout": 1.0}, ("^unet/",), r"adapter\.rank_dropout=1\.0"),
        (
            {"kind": Kind.LOKR, "rank_dropout": 0.1},
            ("^unet/",),
            r"rank_dropout=0\.1 has no effect: none of the .* ranks",
        ),
        ({"biases_and_norms": True, "rank_dropout": 0.1}, ("^unet/.*bias",), r"rank_dropout=0\.1 has no effect: none"),
        (
            {"kind": Kind.DIFFERENCE},
            ("^unet/",),
            r"adapter\.rank has no effect with adapter\.kind=difference\. Leave it",
        ),
        ({"up_rate": math.inf}, ("^unet/",), r"adapter\.up_rate=inf is out of range"),
        ({"kind": Kind.LOKR, "rank": 64}, ("^unet/",), r"at most 8\. Give a rank up to 8, set full_matrix=True"),
        ({"magnitude": dora.Axis.IN, "module_dropout": 0.1}, ("^unet/",), r"module_dropout has no effect with .*=in\."),
        (
            {"kind": Kind.LOHA, "file_spelling": Spelling.PEFT},
            ("^unet/",),
            r"=peft has no place for adapter\.kind=loha",
        ),
        (
            {"magnitude": dora.Axis.IN, "file_spelling": Spelling.PEFT},
            ("^unet/",),
            r"no place for adapter\.magnitude=in",
        ),
        (
            {"biases_and_norms": True, "file_spelling": Spelling.PEFT},
            ("^unet/",),
            r"place for adapter\.biases_and_norms",
        ),
        ({"init_from": "nothing.safetensors"}, ("^unet/",), r"nothing\.safetensors"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    base: TrainConfig, adapter: dict[str, Any], trainable: tuple[str, ...], expected: str
) -> None:
    training = dataclasses.replace(base.training, trainable=trainable)
    config = dataclasses.replace(base, training=training, adapter=AdapterConfig(**{"rank": 2, **adapter}))
    objective = objective_of(config)
    with pytest.raises(InputError, match=expected):
        objective.check()
        objective.check_start()


def test_settings_of_ranks_are_refused_where_there_are_none() -> None:
    settings = {"middle": True, "rank_stabilised": True, "conv_rank": 2, "conv_alpha": 2.0, "rank_dropout": 0.5}
    for name, value in {**settings, "rank": 2, "alpha": 2.0}.items():
        with pytest.raises(InputError, match=rf"adapter\.{name} has no effect with adapter\.kind=difference"):
            AdapterConfig(**{"kind": Kind.DIFFERENCE, name: value}).check()
    for name, value in {**settings, "decompose_both": True}.items():
        with pytest.raises(InputError, match=rf"adapter\.{name} has no effect with adapter\.full_matrix: whole"):
            AdapterConfig(**{"kind": Kind.LOKR, "full_matrix": True, name: value}).check()


def test_a_rate_or_layers_without_effect_are_refused(base: TrainConfig) -> None:
    """Of an adapter as of the model's own parameters."""
    config = dataclasses.replace(base, checkpoint=dataclasses.replace(base.checkpoint, export_every_steps=None))
    for adapter in (None, AdapterConfig(rank=2)):
        for pattern, expected in (
            ("attn3", r'optimiser\.rates has "attn3", which matches nothing that is trained\. Give .* unet/'),
            ("(", r'optimiser\.rates has "\(", which is not a regular expression'),
        ):
            rates = dataclasses.replace(base.optimiser, rates=(("^unet/", 1.0), (pattern, 0.5)))
            with pytest.raises(InputError, match=expected):
                objective_of(dataclasses.replace(config, adapter=adapter, optimiser=rates)).check()
        layers = dataclasses.replace(base.training, layers=Layers.ATTENTION)
        objective = objective_of(dataclasses.replace(config, adapter=adapter, training=layers))
        if adapter is None:
            objective.check()
            continue
        with pytest.raises(
            InputError, match=r"training\.layers=attention has no effect on an adapter.*adapter\.layers"
        ):
            objective.check()


def test_some_layers_of_the_model_are_trained_with_their_biases(base: TrainConfig) -> None:
    mesh = AbstractMesh((1, 1, 1, 1), AXES)
    training = dataclasses.replace(base.training, layers=Layers.ATTENTION_FEED_FORWARD, trainable=("^unet/",))
    state, frozen = objective_of(dataclasses.replace(base, training=training)).abstract_state(mesh)
    paths = set(flatten(state.params))
    assert paths | set(flatten(frozen)) == set(abstract_leaves(MODEL)) and not paths & set(flatten(frozen))
    assert {path for path in paths if path.endswith("kernel")} == set(
        targets.selected(AdapterConfig(layers=Layers.ATTENTION_FEED_FORWARD), abstract_leaves(MODEL), ("^unet/",))
    )
    biases = {path.removesuffix("bias") for path in paths if path.endswith("bias")}
    assert biases and all("attn" in path or "/ff/" in path for path in biases)
    training = dataclasses.replace(training, trainable=("^unet/", "conv_in"))
    with pytest.raises(InputError, match=r'"conv_in", which matches no parameter of training\.layers=attention_feed'):
        objective_of(dataclasses.replace(base, training=training)).abstract_state(mesh)


@pytest.mark.slow
def test_every_parameter_of_sdxl_is_of_the_block_that_its_name_says() -> None:
    """sd-scripts `sdxl_train.py`, `get_block_params_to_optimize`: by Stability's names."""
    first = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
    for entry in names.table(SDXL_BASE.unet, Naming(Dialect.ORIGINAL)).entries:
        part, number = entry.name.split(".")[:2]
        expected = first[part] + int(number) if part in first else 22 if part == "out" else 0
        path = f"unet/{entry.places[0].path}"
        assert [n for n, pattern in enumerate(SDXL_BLOCKS) if re.search(pattern, path)] == [expected], entry.name


def test_factors_of_blocks_are_rates() -> None:
    assert block_rates([1.0] * 22 + [0.5]) == (("^unet/(conv_norm_out|conv_out)/", 0.5),)
    with pytest.raises(InputError, match=r"SDXL has 23 blocks .* and 2 factors are given"):
        block_rates([1.0, 2.0])


def test_what_has_no_effect_on_a_run_is_refused(base: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"export_every_steps=2 has no effect: this run trains no adapter"):
        objective_of(base).check()
    weighted = DataConfig(sources=(Source("of the class", loss_weight=0.5),))
    with pytest.raises(InputError, match=r"gives of the class loss_weight, which has no effect on a run of autoenc"):
        objective_of(AutoencoderConfig(weighted)).check()
    schedule_free = dataclasses.replace(
        base,
        adapter=LORA,
        optimiser=OptimiserConfig(OptimiserKind.SCHEDULE_FREE),
        ema=EmaConfig(EmaKind.OPTIMISER),
    )
    with pytest.raises(InputError, match=r"which the average of optimiser\.kind=schedule_free does not allow"):
        objective_of(schedule_free).check()


# The step's parts


DROPPED = {
    "lora": AdapterConfig(rank=4),
    "loha": AdapterConfig(Kind.LOHA, 4),
    "lokr": AdapterConfig(Kind.LOKR, 1, decompose_both=True),
    "lokr, full": AdapterConfig(Kind.LOKR, full_matrix=True),
    "lokr, large": AdapterConfig(Kind.LOKR, 2),
    "differences": AdapterConfig(Kind.DIFFERENCE),
}
"""Adapters of every kind; the LoKrs named full and large, and differences, have no ranks."""


SOME_SLOW = [name if name in ("lora", "lokr, full") else pytest.param(name, marks=pytest.mark.slow) for name in DROPPED]


@pytest.mark.parametrize("name", [*SOME_SLOW[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in ("loha", "lokr"))])
def test_dropout_of_ranks_is_of_whole_ranks_and_keeps_the_mean(name: str) -> None:
    given = adapter_training(dataclasses.replace(DROPPED[name], layers=Layers.BLOCKS, rank_dropout=0.5))
    whole = unflatten(random_adapters(given))
    keys = jax.random.split(jax.random.key(0), 2)
    one, other, third = (flatten(given.of_step(whole, each)) for each in (keys, keys, keys[1:]))
    before, differs, kept = flatten(whole), False, list[Any]()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path])
        differs |= not np.array_equal(value, third[path])
        if path.endswith(("/up", "/up_1", "/w2_up")):
            ratio = np.asarray(value) / before[path]
            np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), atol=1e-6)
            kept.append(ratio[..., 0].reshape(-1))
        else:
            np.testing.assert_array_equal(value, before[path])
    ranks = np.concatenate(kept)
    assert differs and set(ranks.round(5)) == {0, 2}
    assert 0.35 < (ranks > 0).mean() < 0.65


@pytest.mark.parametrize("name", SOME_SLOW)
def test_dropout_of_layers_leaves_out_their_whole_change(name: str) -> None:
    given = adapter_training(dataclasses.replace(DROPPED[name], module_dropout=0.5))
    whole = unflatten(random_adapters(given))
    found = given.of_step(whole, jax.random.split(jax.random.key(0), 2))
    before, after = (changes.untree(tree, given.layers) for tree in (whole, found))
    kept = list[bool]()
    for path, rows in before.items():
        for (_, one), (_, other) in zip(rows, after[path], strict=True):
            delta = kinds.delta(other)
            kept.append(bool(np.any(delta)))
            np.testing.assert_array_equal(delta, kept[-1] * kinds.delta(one))
    assert 0.2 < np.mean(kept) < 0.8


def test_rates_multiply_the_updates_of_matching_adapters_and_of_up_factors() -> None:
    """Lion's updates are −1, whatever the gradient's length."""
    given = adapter_training(AdapterConfig(rank=2, up_rate=16.0))
    params: Any = {"adapters": unflatten({k: v for k, v in random_adapters(given).items() if "alpha" not in k})}
    gradient = jax.tree.map(np.ones_like, params)
    rates = (("^unet/mid_block", 0.5), ("^unet", 2.0))
    optimiser = given.updating(
        make_optimiser(OptimiserConfig(OptimiserKind.LION, 1.0, 0, weight_decay=0.0, rates=rates), 1)
    )
    updates: Any = optimiser.update(gradient, optimiser.init(params), params)[0]
    for path, update in flatten(updates["adapters"]).items():
        expected = (0.5 if "mid_block" in path else 2.0) * (16 if path.endswith("/up") else 1)
        np.testing.assert_array_equal(update, np.full(update.shape, -expected))


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(rank=2),
        AdapterConfig(Kind.LOKR, full_matrix=True),
        *(
            pytest.param(OTHERS[name], marks=pytest.mark.slow)
            for name in ("loha", "lokr", "lokr, large", "differences")
        ),
    ],
)
def test_no_change_is_longer_than_the_limit_after_a_step(adapter: AdapterConfig) -> None:
    given = adapter_training(dataclasses.replace(adapter, norm_limit=0.5, up_rate=1.0))
    flat = random_adapters(given)
    params = {"adapters": unflatten({path: value for path, value in flat.items() if not path.endswith("alpha")})}
    optimiser = given.updating(optax.sgd(0.0))
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    applied: Any = optax.apply_updates(params, updates)
    after = flatten(applied["adapters"])
    alphas = {path: value for path, value in flat.items() if path.endswith("alpha")}
    resolved = changes.untree(unflatten(after | alphas), given.layers)
    norms = [
        np.linalg.norm(kinds.delta(f)) for path, rows in resolved.items() for _, f in rows if path.endswith("kernel")
    ]
    np.testing.assert_allclose(norms, 0.5, rtol=1e-4)  # all were longer


def test_weight_decay_applies_to_factors_and_not_to_magnitudes() -> None:
    given = adapter_training(AdapterConfig(rank=2, magnitude=dora.Axis.IN))
    params = {"adapters": unflatten({k: v for k, v in random_adapters(given).items() if "alpha" not in k})}
    update = make_optimiser(OptimiserConfig(OptimiserKind.LION, 1.0, 0, weight_decay=0.5, clip_norm=None), 1)
    zero = jax.tree.map(np.zeros_like, params)
    updates: Any = update.update(zero, update.init(params), params)[0]
    for path, value in flatten(updates["adapters"]).items():
        decayed = np.zeros_like(value) if path.endswith("magnitude") else -0.5 * flatten(params["adapters"])[path]
        np.testing.assert_allclose(value, decayed, atol=1e-7)


@pytest.mark.parametrize("kind", OptimiserKind)
def test_state_of_every_optimiser_has_its_place_on_a_mesh(base: TrainConfig, kind: OptimiserKind) -> None:
    """Factors are replicated, whole differences split as their kernels, the base as ever."""
    own = kind is OptimiserKind.SCHEDULE_FREE
    average = EmaConfig(EmaKind.OPTIMISER) if own else base.ema
    rate = 1.0 if kind is OptimiserKind.PRODIGY else 1e-3
    mesh = AbstractMesh((1, 2, 2, 1), AXES)
    for adapter in (AdapterConfig(rank=2, layers=Layers.BLOCKS), OTHERS["differences"]):
        adapter = dataclasses.replace(adapter, norm_limit=None)
        config = dataclasses.replace(base, adapter=adapter, optimiser=OptimiserConfig(kind, rate), ema=average)
        objective = objective_of(config)
        objective.check()
        state, frozen = objective.abstract_state(mesh)
        for path, leaf in flatten(state.params["adapters"]).items():
            parameter, _, name = path.rpartition("/")
            expected = flatten(frozen)[parameter].sharding.spec if name == "diff" else PartitionSpec()
            assert leaf.sharding.spec == expected, path
        assert flatten(frozen)["unet/mid_block/resnets_0/conv1/kernel"].sharding.spec[-1] == "fsdp"


def test_batches_with_settings_of_sources_are_those_that_the_step_is_compiled_for(
    base: TrainConfig, tmp_path: Path
) -> None:
    folder = Path(str(base.data.folder))
    for path in folder.glob("*.png"):
        height, width, _ = read_image(path).shape
        Image.new("L", (width, height), 255).save(tmp_path / path.name)
    sources = (
        Source(str(folder), masks=str(tmp_path)),
        Source(str(folder), loss_weight=0.5, target=Target.BASE),
    )
    data = dataclasses.replace(base.data, folder=None, sources=sources)
    objective = objective_of(dataclasses.replace(base, data=data, adapter=LORA))
    objective.check()
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with contextlib.closing(BucketedDataset(data, objective.tokenizer).iterate(0)) as batches:
        batch = next(batches)
    assert batch.loss_weight is not None and set(batch.loss_weight.tolist()) <= {1.0, 0.5}
    assert batch.base_target is not None and (batch.base_target == (batch.loss_weight == 0.5)).all()
    abstract = objective.abstract_batch(mesh, Bucket(16, 16), 2)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )


# Prior preservation


def prior_batch(size: int = 2) -> Batch:
    """The same image twice."""
    rng = np.random.default_rng(0)
    pair = np.full((size, 2), 16, np.int32)
    return Batch(
        image=np.repeat(rng.integers(0, 256, (1, 16, 16, 3), np.uint8), size, 0),
        tokens={tower.name: np.full((size, 77), 3, np.int32) for tower in MODEL.text},
        micro=MicroConditioning(pair, 0 * pair, pair),
        example=np.arange(size, dtype=np.int32),
        replaced=np.zeros(size, bool),
        loss_weight=np.ones(size, np.float32),
        base_target=np.zeros(size, bool),
    )


def toy_unet(_: Any, params: Params, x_t: Any, *given: Any, adapters: Any, class_embedding: Any) -> jax.Array:
    """Linear in the latent and in the text states. Its adapter is one number."""
    _, context, vector, _ = given
    return (0.5 + (0.0 if adapters is None else adapters["one"])) * x_t + context.mean() + vector.mean()


def toy_text(_: Any, params: Params, tokens: Any, compute: Any, adapters: Params | None = None) -> TextConditioning:
    changed = (adapters or {}).get("text_encoder_2", {"one": 0.0})["one"]
    ids = jnp.asarray(tokens["text_encoder_2"], jnp.float32)
    return TextConditioning(ids[..., None] * (0.1 + changed), ids[:, :8])


def test_prior_preservation_compares_with_the_base_and_a_weight_of_0_leaves_out(
    base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter at its start has a loss of exactly 0 against the base, also one of a text encoder. With λ = 0 the
    gradient is that of the subject's images, over the number of all."""
    monkeypatch.setattr(unet, "apply", toy_unet)
    monkeypatch.setattr(text, "encode", toy_text)
    training = dataclasses.replace(base.training, caption_dropout=0.5)
    objective = objective_of(dataclasses.replace(base, training=training, adapter=AdapterConfig(rank=2)))
    keys = jax.random.split(jax.random.key(0), 8)
    value_and_grad = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))

    def of(unet: float, text_encoder: float, batch: Batch, keys: Any = keys) -> tuple[float, Params]:
        factors = {"unet": {"one": unet}, "text_encoder_2": {"one": text_encoder}}
        (value, _), gradient = value_and_grad({"adapters": factors}, {"unet": {"bias": jnp.zeros(())}}, batch, keys)
        return float(value), gradient

    batch = prior_batch(8)
    of_base = batch._replace(base_target=np.ones(8, bool))
    assert of(0.0, 0.0, batch)[0] > 0 and of(0.0, 0.0, of_base)[0] == 0
    assert of(0.1, 0.0, of_base)[0] > 0 and of(0.0, 0.1, of_base)[0] > 0

    white = np.full((8, 16, 16), 255, np.uint8)
    assert of(0.1, 0.0, batch._replace(mask=white))[0] == of(0.1, 0.0, batch)[0]
    assert of(0.1, 0.0, batch._replace(mask=0 * white))[0] == 0

    same = jnp.concatenate([keys[:4], keys[:4]])
    assert batch.image is not None
    image = np.concatenate([batch.image[:4], 255 - batch.image[4:]])
    with_class = batch._replace(image=image, loss_weight=np.repeat(np.array([1, 0], np.float32), 4))
    alone, half = of(0.1, 0.1, batch, same), of(0.1, 0.1, with_class, same)
    assert half[0] == pytest.approx(alone[0] / 2, rel=1e-6)
    for a, b in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(half[1]), strict=True):
        np.testing.assert_allclose(b, a / 2, rtol=1e-5)


@pytest.mark.slow
def test_a_new_adapter_has_no_loss_against_its_base(base: TrainConfig) -> None:
    trainable, adapter = ("^unet/", "^text_encoder_2/"), AdapterConfig(rank=2)
    training = dataclasses.replace(base.training, caption_dropout=0.5, trainable=trainable)
    loss = jax.jit(objective_of(dataclasses.replace(base, training=training, adapter=adapter)).loss)
    params, mesh = tiny.random_model(MODEL, 0).params, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    factors, alphas = adapter_training(adapter, trainable).fresh(params, mesh)
    batch, keys = prior_batch(), jax.random.split(jax.random.key(0), 2)
    assert float(loss(factors, params | alphas, batch._replace(base_target=np.ones(2, bool)), keys)[0]) == 0
    assert float(loss(factors, params | alphas, batch, keys)[0]) > 0


def test_without_a_prior_the_base_is_not_computed(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[bool]()

    def counting(*given: Any, **more: Any) -> jax.Array:
        calls.append(more["adapters"] is not None)
        return toy_unet(*given, **more)

    monkeypatch.setattr(unet, "apply", counting)
    monkeypatch.setattr(text, "encode", toy_text)
    objective = objective_of(dataclasses.replace(base, adapter=AdapterConfig(rank=2)))
    trained, keys = {"adapters": {"unet": {"one": 0.0}}}, jax.random.split(jax.random.key(0), 2)
    for batch, expected in ((prior_batch()._replace(base_target=None), [True]), (prior_batch(), [True, False])):
        calls.clear()
        jax.eval_shape(objective.loss, trained, {"unet": {"bias": jnp.zeros(())}}, batch, keys)
        assert calls == expected
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    assert objective.abstract_batch(mesh, Bucket(16, 16), 2).base_target is None


def test_a_prior_without_images_needs_an_adapter(base: TrainConfig) -> None:
    sources = (Source(str(base.data.folder)), Source("of the class", target=Target.BASE))
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, folder=None, sources=sources))
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, export_every_steps=None))
    objective_of(dataclasses.replace(config, adapter=AdapterConfig(rank=2))).check()
    with pytest.raises(InputError, match=r"gives of the class target=base, which needs an adapter.* Set adapter"):
        objective_of(config).check()
    for data, name in ((DataConfig(sources=sources), "target"), (DataConfig("of the class", masks="alpha"), "masks")):
        with pytest.raises(InputError, match=rf"gives of the class {name}, which has no effect on a run of autoenc"):
            objective_of(AutoencoderConfig(data)).check()


# From a file, to a file


def test_training_on_from_a_file_begins_with_its_change(tmp_path: Path) -> None:
    """Whatever its alpha was, and with another one for convolutions."""
    settings = AdapterConfig(rank=2, alpha=6.0, layers=Layers.BLOCKS, conv_alpha=1.0, file_dtype=FileDtype.FLOAT32)
    given, mesh = adapter_training(settings), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    whole = unflatten(random_adapters(given))
    given.export(whole, tmp_path / "x.safetensors", 1, mesh, is_first=True)
    file = reading.read(tmp_path / "x.safetensors")
    assert len({module.factors["alpha"].item() for module in file.modules.values()}) == 1, "for diffusers"
    again = adapter_training(dataclasses.replace(settings, alpha=2.0, init_from=str(tmp_path / "x.safetensors")))
    factors, alphas = again.fresh({}, mesh)
    found = unflatten(flatten(factors["adapters"]) | flatten(alphas["adapters"]))
    one, other = (changes.untree(tree, given.layers) for tree in (whole, found))
    for path, rows in one.items():
        for (_, a), (_, b) in zip(rows, other[path], strict=True):
            np.testing.assert_allclose(kinds.delta(b), kinds.delta(a), rtol=1e-5, atol=1e-5)


def test_a_file_in_pefts_spelling_has_the_same_change(tmp_path: Path) -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    settings = AdapterConfig(rank=2, magnitude=dora.Axis.OUT, file_dtype=FileDtype.FLOAT32)
    whole = unflatten(random_adapters(adapter_training(settings)))
    found = {}
    for spelling in Spelling:
        given, path = adapter_training(dataclasses.replace(settings, file_spelling=spelling)), tmp_path / spelling.value
        given.export(whole, path.with_suffix(".safetensors"), 1, mesh, is_first=True)
        found[spelling] = reading.read(path.with_suffix(".safetensors"))
    assert all(name.startswith("unet.") for name in found[Spelling.PEFT].modules)
    one, other = (reading.resolve(file, MODEL) for file in found.values())
    assert one.keys() == other.keys()
    for path, rows in one.items():
        for (_, a), (_, b) in zip(rows, other[path], strict=True):
            np.testing.assert_array_equal(kinds.delta(a), kinds.delta(b))


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    given = adapter_training(AdapterConfig(rank=2))
    given.export(unflatten(random_adapters(given)), tmp_path / "x.safetensors", 1, mesh, is_first=True)
    for settings in (AdapterConfig(rank=4), AdapterConfig(Kind.LOHA, 2), AdapterConfig(rank=2, layers=Layers.LINEAR)):
        other = adapter_training(dataclasses.replace(settings, init_from=str(tmp_path / "x.safetensors")))
        with pytest.raises(InputError, match=r"is another adapter than this configuration's: \d+ factors differ"):
            other.check_start()
