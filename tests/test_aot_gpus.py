"""The promises of AOT compilation for GPUs: they are known by name, described to the compiler, and bad input is named.

Tests that need jax's CUDA plugin are marked, and skipped where it is missing. None needs a GPU.
"""

import dataclasses
import importlib.metadata
import importlib.util
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from command import call

from sdxl_jax import flops
from sdxl_jax.aot import compile as aot_compile
from sdxl_jax.aot import gpus, hlo, report, topologies
from sdxl_jax.config import load
from sdxl_jax.errors import InputError
from sdxl_jax.models import attention
from sdxl_jax.models.layers import Remat
from sdxl_jax.sharding import MeshConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PLUGIN = next((name for name in ("cuda13", "cuda12") if importlib.util.find_spec(f"jax_{name}_plugin")), None)
needs_plugin = pytest.mark.skipif(PLUGIN is None, reason="jax's CUDA plugin (jax_cuda13_plugin) is not installed")


@pytest.mark.parametrize("name", gpus.KNOWN)
def test_a_gpu_has_its_peak_where_training_looks_it_up_too(name: str) -> None:
    gpu = gpus.KNOWN[name]
    assert flops.chip_of(gpu.device_kind) is gpu.chip is topologies.check(f"{name}:8")
    assert gpu.chip.bytes_per_second is not None
    # A product that is read once from memory takes at least as long there as in the units, for all of them.
    assert 10 < gpu.chip.flops_per_second / gpu.chip.bytes_per_second < 500
    assert re.search(r"\d", name) and gpu.capability in gpus.LIMITS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h200", "The topology 'h200' does not say how many GPUs a node has. Give 1 or more, e.g. h200:8"),
        ("h200:0", "does not say how many GPUs a node has. Give 1 or more, e.g. h200:8"),
        ("h200:2x2", "does not say how many GPUs a node has"),
        (
            "a100:8",
            r"There is no topology 'a100:8'. Give one of .*a100-40gb:8, a100-80gb:8.* the chips are v4",
        ),
        ("rtx-4080:1", r"There is no topology 'rtx-4080:1'. Give one of \(nearest first\): rtx-4090:1"),
    ],
)
def test_unknown_gpus_and_counts_are_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        topologies.check(name)


def test_a_missing_plugin_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        InputError, match=r"no GPU and no driver is needed. Install it: pip install 'sdxl_jax\[cuda13\]'"
    ):
        topologies.devices("h200:8")
    with pytest.raises(InputError, match="--slices 0 is out of range"):
        topologies.devices("h200:8", 0)


def test_the_compiler_gets_the_gpu_the_nodes_and_the_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    monkeypatch.setattr(importlib.metadata, "version", {"nvidia-cudnn-cu12": "9.12.3.4"}.__getitem__)
    monkeypatch.setattr(
        gpus.topologies,
        "get_topology_desc",
        lambda **options: given.update(options) or types.SimpleNamespace(devices=("one", "two")),
    )
    assert topologies.devices("l4:2", 3) == ["one", "two"]
    assert given["platform"] == "cuda" and given["topology"] == "1x3x2"
    for line in (
        "cuda_compute_capability { major: 8 minor: 9 feature_extension: NONE }",
        "dnn_version_info { major: 9 minor: 12 patch: 3 }",
        "runtime_version { major: 12 minor: 0 patch: 0 }",
        'name: "NVIDIA L4"',
        "core_count: 58",
        "memory_bandwidth: 300000000000",
    ):
        assert line in given["target_config"]
    assert "feature_extension: ACCELERATED_FEATURES" in gpus.target(gpus.KNOWN["h200"], "9.12.0", "13")


def test_a_plugin_that_refuses_a_gpu_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: str) -> None:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: unknown field\nand more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin" or None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "9.12.3.4")
    monkeypatch.setattr(gpus.topologies, "get_topology_desc", refuse)
    with pytest.raises(InputError, match=r"does not compile for b200:8 \(INVALID_ARGUMENT: unknown field\)"):
        topologies.devices("b200:8")


@pytest.mark.parametrize(("kind", "expected"), [("NVIDIA H200", "gpu"), ("Tesla T4", "other gpu")])
def test_a_gpu_that_is_not_attached_has_cudnns_attention_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: types.SimpleNamespace(abstract_device=device))
    assert attention._platform() == expected


PROGRAM = """HloModule example

%compare (counter.1: s32[]) -> pred[] {
  %counter.1 = s32[] parameter(0)
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%counter.1, %bound), direction=LT
}

%condition (carry: (s32[], f32[7,256])) -> pred[] {
  %carry = (s32[], f32[7,256]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%carry), index=0
  ROOT %goes-on = pred[] fusion(%counter), kind=kLoop, calls=%compare
}

%add (a: f32[256], b: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %b = f32[256]{0} parameter(1)
  ROOT %sum = f32[256]{0} add(%a, %b)
}

%take (stack: f32[7,256], index: s32[]) -> f32[256] {
  %stack = f32[7,256]{1,0} parameter(0)
  %index = s32[] parameter(1)
  %slice = f32[1,256]{1,0} dynamic-slice(%stack, %index, %index), dynamic_slice_sizes={1,256}
  ROOT %row = f32[256]{0} bitcast(%slice)
}

%put (whole: f32[7,256], index.1: s32[], new: f32[256]) -> f32[7,256] {
  %whole = f32[7,256]{1,0} parameter(0)
  %index.1 = s32[] parameter(1)
  %new = f32[256]{0} parameter(2)
  %row.1 = f32[1,256]{1,0} bitcast(%new)
  ROOT %updated = f32[7,256]{1,0} dynamic-update-slice(%whole, %row.1, %index.1, %index.1)
}

%body (carry.1: (s32[], f32[7,256])) -> (s32[], f32[7,256]) {
  %carry.1 = (s32[], /*index=1*/f32[7,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry.1), index=0
  %rows = f32[7,256]{1,0} get-tuple-element(%carry.1), index=1
  %taken = f32[256]{0} fusion(%rows, %i), kind=kLoop, calls=%take
  %product = (f32[256]{0}, u8[4096]{0}) custom-call(%taken, %taken), custom_call_target="__cublas$gemm"
  %made = f32[256]{0} get-tuple-element(%product), index=0
  %put-back = f32[7,256]{1,0} fusion(%rows, %i, %made), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[7,256]{1,0}) tuple(%i, %put-back)
}

ENTRY %main (x: f32[7,256], y: f32[256]) -> f32[256] {
  %x = f32[7,256]{1,0} parameter(0)
  %y = f32[256]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[7,256]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[7,256]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %triton = f32[256]{0} fusion(%y, %y), kind=kCustom, calls=%add, backend_config={"kind":"__triton_gemm"}
  %reduced = f32[256]{0} all-reduce-start(%triton), to_apply=%add
  %done = f32[256]{0} all-reduce-done(%reduced)
  ROOT %total = f32[256]{0} fusion(%done, %y), kind=kLoop, calls=%add
}
"""


def test_kernels_without_products_move_their_bytes_as_often_as_they_run() -> None:
    found = list(hlo.instructions(PROGRAM))
    moved = {each.name: each.moved for each in found if each.moved}
    row = 4 * 256
    assert moved == {
        "goes-on": 4 + 1,
        "taken": 2 * row + 4,  # of the stack one row
        "put-back": 2 * row + 4,  # in place
        "total": 3 * row,
    }
    assert {each.name: each.executions for each in found}["taken"] == 7, "the compiler's note of the trip count"
    assert hlo.moved_bytes(found) == 7 * (5 + 4 * row + 8) + 3 * row
    assert hlo.collectives(found) == [hlo.Collective("all-reduce", 1, row)]


class Compiled(jax.stages.Compiled):
    """What jax gives for a program that was compiled for GPUs."""

    def __init__(self) -> None:
        pass

    def memory_analysis(self) -> Any:
        sizes = {"argument_size_in_bytes": 7 * 1024, "temp_size_in_bytes": 80 * 10**9}
        return types.SimpleNamespace(**sizes, output_size_in_bytes=1024, alias_size_in_bytes=1024)

    def cost_analysis(self) -> None:
        return None

    def as_text(self) -> str:
        return PROGRAM


def made(chip: flops.Chip) -> report.Report:
    info = report.ProgramInfo("h200:8", 8, "train step 32×32", 16, chip, {"batch": 7 * 1024}, model_flops=4e15)
    executed = flops.Flops(products=5e15, kernels=1e15)
    return report.make(Compiled(), info, executed=executed, compile_seconds=7.0, peak_host_bytes=2**30)


def test_the_time_for_gpus_is_a_bound_and_named_as_one() -> None:
    chip = flops.Chip("made up", 1e15, 10**11, 1e3)
    result = made(chip)
    assert result.bound is not None and result.seconds is None and result.mfu is None
    assert result.bound.products == 6e15 / 8 / 1e15
    assert result.bound.memory == (7 * (5 + 4 * 1024 + 8) + 3 * 1024) / 1e3
    shown = str(made(flops.H200))
    assert "time, at least             0.758 s, a bound: 0.758 s products at the peak, 0.000 s other mem" in shown
    assert "images/s per GPU, at most   2.64" in shown and "MFU, at most               66.7%" in shown
    assert "autotuning" in shown and "not plausible" not in shown and "MEM_FRACTION" not in shown
    assert result.as_json()["bound_seconds"] == {"products": 0.75, "memory": result.bound.memory}


def test_a_program_that_needs_more_than_jaxs_share_of_a_gpu_says_which_variable_to_set() -> None:
    assert made(flops.H100).fits and "set                     XLA_PYTHON_CLIENT_MEM_FRACTION=.95" in str(
        made(flops.H100)
    )
    assert not made(flops.A100_40).fits and "MEM_FRACTION" not in str(made(flops.A100_40))


def test_compile_says_that_programs_for_gpus_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS / "smoke" / "sdxl_base_1024_multi_aspect.py"
    outcome = call("compile", str(config), "--topology", "h200:0")
    assert outcome.code == 2 and "Give 1 or more, e.g. h200:8" in outcome.err
    monkeypatch.setattr(aot_compile, "compile_step", lambda *_, **__: [made(flops.H200), made(flops.A100_40)])
    outcome = call("compile", str(config), "--topology", "h200:8", "--training.compilation-cache", "cache")
    assert outcome.code == 2 and "1 of 2 programs do not fit into the chips' memory" in outcome.err
    assert "Not saved: training on GPUs compiles its programs itself" in outcome.out


@pytest.mark.slow
@pytest.mark.gpu_aot
@needs_plugin
def test_cudnns_attention_counts_two_products_forward_and_five_backward() -> None:
    array = jax.ShapeDtypeStruct((2, 1024, 3, 64), jnp.bfloat16)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn").sum()

    counted = flops.count(jax.grad(loss, argnums=(0, 1, 2)), array, array, array)
    assert counted.kernels == 7 * 2 * (2 * 3 * 1024 * 1024 * 64)


@pytest.mark.slow
@pytest.mark.gpu_aot
@needs_plugin
@pytest.mark.parametrize("name", gpus.KNOWN)
def test_the_compiler_takes_every_gpu(name: str) -> None:
    devices = topologies.devices(f"{name}:1")
    place = jax.sharding.SingleDeviceSharding(devices[0])
    array = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=place)
    compiled = jax.jit(lambda x: jax.nn.softmax(x @ x)).lower(array).compile()
    assert hlo.moved_bytes(list(hlo.instructions(compiled.as_text() or ""))) > 0


@pytest.mark.slow
@pytest.mark.gpu_aot
@needs_plugin
def test_a_step_for_eight_gpus_on_two_nodes_has_memory_operations_and_collectives(tmp_path: Path) -> None:
    config = load(CONFIGS / "smoke" / "sdxl_base_1024_multi_aspect.py")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=16),
        mesh=MeshConfig(data=1, fsdp=-1),
        training=dataclasses.replace(config.training, compilation_cache=str(tmp_path)),
    )
    (one,) = aot_compile.compile_step(config, "h200:8", progress=False)
    (two,) = aot_compile.compile_step(config, "h200:4", slices=2, progress=False)
    for result in (one, two):
        assert isinstance(result, report.Report) and result.fits and result.chips == 8 and result.bound is not None
        assert result.bound.products > 0 and result.bound.memory > 0
        assert "all-gather" in {each.kind for each in result.collectives}
    assert two.topology == "2 × h200:4"
    sampler = aot_compile.compile_sampler(config, "h200:8", progress=False)
    assert len(sampler) >= 3 and all(isinstance(each, report.Report) and each.bound for each in sampler)
    assert not list(tmp_path.iterdir()), "nothing is saved"


@pytest.mark.slow
@pytest.mark.gpu_aot
@needs_plugin
def test_the_whole_stage_3_step_fits_eight_gpus_by_cudnns_attention_and_not_without_rematerialisation() -> None:
    """4.8 GiB of state and 9.6 of activations for eight images on each of eight H200s; sixteen without
    rematerialisation take 188 GiB, which the compiler does not refuse."""
    config = load(CONFIGS / "sdxl_base_1024_multi_aspect.py")

    def compiled(images: int, remat: Remat) -> report.Report:
        changed = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, batch_size=images),
            compute=dataclasses.replace(config.compute, remat=remat),
        )
        (result,) = aot_compile.compile_step(changed, "h200:8", progress=False)
        assert isinstance(result, report.Report)
        return result

    block = compiled(64, Remat.BLOCK)
    assert block.fits and 9 < block.bytes_activations / 2**30 < 12 and block.kernel_flops > 0
    none = compiled(128, Remat.NONE)
    assert not none.fits and "It does not fit" in aot_compile.verdict(none, config)
