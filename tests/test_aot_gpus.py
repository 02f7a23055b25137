"""The promises of AOT compilation for GPUs: they are known by name, described to the compiler, and bad input is named.

Tests that need jax's CUDA plugin are marked, and skipped where it is missing. None needs a GPU.
"""

import importlib.metadata
import importlib.util
import re
import types

import jax
import pytest

from sdxl_jax import flops
from sdxl_jax.aot import gpus, topologies
from sdxl_jax.errors import InputError
from sdxl_jax.models import attention

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
