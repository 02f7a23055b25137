"""The promises of weights in eight bits: half of bfloat16's memory, and the results of the rounded kernels."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import call
from tiny import MODEL, random_model

from sdxl_jax.adapters import changes, dora
from sdxl_jax.adapters import kinds as adapters
from sdxl_jax.adapters.kinds import Kind, Settings
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import KERNEL_SCALE, Compute, conv, dense, variables
from sdxl_jax.sampling.generate import generate
from sdxl_jax.weights import eight_bits
from sdxl_jax.weights.convert import Layout, convert
from sdxl_jax.weights.lazy import InMemory, Origin, SourceLayout, Weights, abstract_leaves
from sdxl_jax.weights.load import load_model

OPTIONS: dict[str, Any] = {"height": 24, "width": 32, "steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    convert(random_model(MODEL, 0), path, Layout.ORBAX)
    return path


def test_no_weight_is_off_by_more_than_half_a_scale() -> None:
    rng = np.random.default_rng(0)
    for shape, scales in (((6, 5), (5,)), ((3, 6, 5), (3, 5)), ((3, 3, 6, 5), (5,)), ((2, 3, 3, 6, 5), (2, 5))):
        kernel = rng.normal(size=shape).astype(np.float32) * np.linspace(0, 4, shape[-1], dtype=np.float32)
        values, scale = eight_bits.round_to_int8(kernel)
        assert values.dtype == np.int8 and scale.shape == scales and np.abs(values).max() == 127
        wide = scale.reshape(*scales[:-1], *(1,) * (len(shape) - len(scales)), scales[-1])
        assert (np.abs(values * wide - kernel) <= wide * 0.5001).all()
        assert (values[..., 0] == 0).all(), "a channel of zeros stays zero"


@pytest.mark.slow
def test_results_are_those_of_the_rounded_kernels(path: Path) -> None:
    """Through linear layers, convolutions, stacked blocks and the projected text alike."""
    given = flatten(load_model(path, progress=False).params)
    rounded = dict(given)
    for name, leaf in given.items():
        if eight_bits.is_quantised(name):
            values, scale = eight_bits.round_to_int8(np.asarray(leaf))
            wide = scale.reshape(*scale.shape[:-1], *(1,) * (leaf.ndim - scale.ndim), scale.shape[-1])
            rounded[name] = jax.device_put(values * wide)
    model = load_model(path, progress=False, quantize="int8")
    kinds = {leaf.dtype.name for name, leaf in flatten(model.params).items() if eight_bits.is_quantised(name)}
    assert kinds == {"int8"}
    found = generate(model, ["a cat"], **OPTIONS).latents
    expected = generate(model._replace(params=unflatten(rounded)), ["a cat"], **OPTIONS).latents
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    plain = generate(model._replace(params=unflatten(given)), ["a cat"], **OPTIONS).latents
    assert 1e-4 < np.linalg.norm(found - plain) / np.linalg.norm(plain) < 0.1


@pytest.mark.slow
def test_sdxl_takes_half_of_the_bytes_of_bfloat16() -> None:
    leaves = abstract_leaves(SDXL_BASE, ["unet", "text_encoder", "text_encoder_2"])
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items()}
    scales = sum(sizes[path] // leaf.shape[-2] for path, leaf in leaves.items() if eight_bits.is_quantised(path))
    small = sum(size * (1 if eight_bits.is_quantised(path) else 2) for path, size in sizes.items()) + 4 * scales
    assert small / (2 * sum(sizes.values())) < 0.53


def test_kernels_of_other_parts_stay_as_they_are() -> None:
    for name in ("conv_in", "time_embedding/linear_1", "down_blocks_0/resnets_0/time_emb_proj"):
        assert not eight_bits.is_quantised(f"unet/{name}/kernel")
    assert not eight_bits.is_quantised("vae/decoder/mid_block/resnets_0/conv1/kernel")
    assert eight_bits.is_quantised("text_encoder/layers/fc1/kernel")
    leaves = {"unet/a/kernel": InMemory(np.ones((4, 3), np.float32)), "unet/a/bias": InMemory(np.ones(3, np.float32))}
    small = eight_bits.quantised(Weights(MODEL, leaves, Origin(SourceLayout.MEMORY)))
    assert list(small.leaves) == ["unet/a/kernel", f"unet/a/{KERNEL_SCALE}", "unet/a/bias"]
    assert small.leaves[f"unet/a/{KERNEL_SCALE}"].read((slice(1, 3),)).tolist() == pytest.approx([1 / 127] * 2)
    assert eight_bits.error(leaves) == {"unet/a/kernel": pytest.approx(0, abs=1e-6)}


def test_slices_are_rounded_as_the_whole_kernel() -> None:
    """Of a stack, and back to numbers: of each device, its part."""
    kernel = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
    leaves = {"unet/a/kernel": InMemory(kernel)}
    values, scale = eight_bits.round_to_int8(kernel)
    for index in ((slice(1, 3), slice(0, 4), slice(2, 6)), (slice(0, 3), slice(4, 8), slice(0, 6))):
        small = eight_bits.quantised(Weights(MODEL, leaves, Origin(SourceLayout.MEMORY))).leaves
        for _ in range(2):  # the first reads all of the kernel, for the scales
            np.testing.assert_array_equal(small["unet/a/kernel"].read(index), values[index])
        back = eight_bits.with_numbers(small)
        assert list(back) == ["unet/a/kernel"] and back["unet/a/kernel"].shape == kernel.shape
        np.testing.assert_array_equal(back["unet/a/kernel"].read(index), (values * scale[:, None])[index])


class Layers(nn.Module):
    """A linear layer and a convolution."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = dense(6, "to_q", Compute())(x)
        return conv(4, "conv1", Compute())(x)


@pytest.mark.parametrize("magnitude", [None, dora.Axis.OUT, pytest.param(dora.Axis.IN, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [Kind.LORA, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Kind.LOHA, Kind.LOKR, Kind.DIFFERENCE))],
)
def test_adapters_beside_kernels_in_eight_bits(kind: Kind, magnitude: dora.Axis | None) -> None:
    """The output, and the gradient of every factor, are those beside the rounded kernels. A DoRA has their norms."""
    if kind is Kind.DIFFERENCE and magnitude is not None:
        return
    rng = np.random.default_rng(0)
    kernels = {"unet/to_q/kernel": rng.normal(size=(8, 6)), "unet/conv1/kernel": rng.normal(size=(3, 3, 6, 4))}
    leaves = {path: InMemory(kernel.astype(np.float32)) for path, kernel in kernels.items()}
    small = eight_bits.quantised(Weights(MODEL, leaves, Origin(SourceLayout.MEMORY))).leaves
    settings = Settings(kind, 2, magnitude=magnitude)
    factors = {
        f"{path.removeprefix('unet/')}/{name}": (1 + rng.random(leaf.shape)).astype(np.float32)
        for path, kernel in kernels.items()
        for name, leaf in adapters.abstract(settings, path, kernel.shape).items()
    }
    x = rng.normal(size=(1, 3, 3, 8)).astype(np.float32)
    zero = {"to_q/bias": np.zeros(6, np.float32), "conv1/bias": np.zeros(4, np.float32)}

    def loss(factors: Any, leaves: Any) -> Any:
        params = zero | {path.removeprefix("unet/"): jnp.asarray(leaf.read()) for path, leaf in leaves.items()}
        found: Any = Layers().apply(variables(unflatten(params), factors), x)
        return (found**2).sum()

    found, expected = (
        jax.value_and_grad(loss)(unflatten(factors), leaves) for leaves in (small, eight_bits.with_numbers(small))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


def test_what_eight_bits_cannot_hold_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantize=int4 is not implemented"):
        load_model(path, progress=False, quantize="int4")
    model = load_model(path, progress=False, quantize="int8")
    with pytest.raises(InputError, match="in eight bits, which no layout holds"):
        convert(model, tmp_path / "out", Layout.ORBAX)
    name = next(name for name in flatten(model.params) if name.startswith("unet/") and eight_bits.is_quantised(name))
    with pytest.raises(InputError, match="is in eight bits, which a change cannot be merged into"):
        changes.merged(model.params, {name: []}, 1.0)


@pytest.mark.slow
def test_the_command_says_so_in_the_png_and_repeats_it(path: Path, tmp_path: Path) -> None:
    given = ["--prompt", "a cat", "--height", 24, "--width", 32, "--steps", 2]
    first = call("sample", path, *given, "--quantize", "int8", "--out", tmp_path / "one")
    assert first.code == 0, first
    again = call("sample", path, "--from-png", tmp_path / "one" / "000000.png", "--out", tmp_path / "two")
    assert again.code == 0, again
    assert (tmp_path / "one" / "000000.png").read_bytes() == (tmp_path / "two" / "000000.png").read_bytes()
    plain = call("sample", path, *given, "--out", tmp_path / "three")
    assert plain.code == 0
    assert (tmp_path / "one" / "000000.png").read_bytes() != (tmp_path / "three" / "000000.png").read_bytes()
