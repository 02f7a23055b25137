"""The promises of sdxl_jax.adapters: every kind of change, its factors and how they begin, what it does to a kernel and
beside one. That the formulas are LyCORIS', PEFT's and ComfyUI's is shown by twins in `test_adapter_files.py`."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.adapters import changes, dora, kinds, loha, lokr, lora
from sdxl_jax.adapters.dora import Axis
from sdxl_jax.adapters.kinds import Kind, Settings
from sdxl_jax.arrays import flatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers

LINEAR, CONVOLUTION = (12, 20), (3, 3, 12, 8)
KINDS = {
    "lora": Settings(rank=2, alpha=3.0),
    "lora, middle": Settings(rank=2, alpha=3.0, middle=True),
    "loha": Settings(Kind.LOHA, rank=2, alpha=3.0),
    "loha, middle": Settings(Kind.LOHA, rank=2, alpha=3.0, middle=True),
    "lokr": Settings(Kind.LOKR, rank=1, alpha=3.0),
    "lokr, factor": Settings(Kind.LOKR, rank=1, alpha=3.0, factor=4),
    "lokr, both": Settings(Kind.LOKR, rank=1, alpha=3.0, decompose_both=True),
    "lokr, middle": Settings(Kind.LOKR, rank=1, alpha=3.0, middle=True),
    "lokr, full": Settings(Kind.LOKR, rank=1, alpha=3.0, full_matrix=True),
    "difference": Settings(Kind.DIFFERENCE),
}


def random(settings: Settings, shape: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """Factors with random values."""
    rng = np.random.default_rng(seed)
    found = kinds.abstract(settings, "x", shape)
    return {
        name: np.float32(3) if name == "alpha" else rng.standard_normal(each.shape, np.float32)
        for name, each in found.items()
    }


def product_of(shape: tuple[int, ...]) -> Any:
    """A matrix product, or a convolution with strides and padding."""
    if len(shape) == 2:
        return lambda x, kernel: x @ kernel

    def convolve(x: Any, kernel: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = [(kernel.shape[0] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=numbers)

    return convolve


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
@pytest.mark.parametrize("magnitude", [None, *Axis], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_an_adapter_beside_it_is_that_of_the_changed_kernel(
    kind: str, magnitude: Axis | None, shape: tuple[int, ...]
) -> None:
    settings = KINDS[kind]
    if magnitude is not None:
        if settings.kind is Kind.DIFFERENCE:
            return
        settings = dataclasses.replace(settings, magnitude=magnitude)
    factors = random(settings, shape)
    assert kinds.kind_of(factors) is settings.kind
    assert kinds.shape_of(factors) == shape
    rng = np.random.default_rng(1)
    kernel, convolve = rng.standard_normal(shape, np.float32), product_of(shape)
    x = rng.standard_normal((2, *([5, 5] if len(shape) == 4 else [3]), 12), np.float32)
    changed = kinds.changed(kernel, factors)
    assert np.abs(changed - kernel).max() > 0.1
    expected = convolve(x, changed)
    found = kinds.applied(jnp.asarray(x), lambda x: convolve(x, kernel), factors, convolve, kernel)
    # float32 sums of some hundred products in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_without_a_change(kind: str, shape: tuple[int, ...]) -> None:
    found = kinds.abstract(KINDS[kind], "x", shape)
    factors = {name: initialisers.sample(each, 0, name) for name, each in found.items()}
    assert not np.any(kinds.delta(factors))
    trained = [name for name in factors if name not in kinds.FROZEN]
    assert sum(not np.any(factors[name]) for name in trained) == 1, "one factor is zero, the others are not"


def test_a_dora_begins_without_a_change() -> None:
    kernel = np.random.default_rng(0).standard_normal(LINEAR, np.float32)
    for axis in Axis:
        factors = random(Settings(rank=2, magnitude=axis), LINEAR) | {"up": np.zeros((2, 20), np.float32)}
        factors["magnitude"] = dora.norm(kernel, axis)
        assert dora.axis_of(factors["magnitude"].shape) is axis
        np.testing.assert_allclose(kinds.changed(kernel, factors), kernel, rtol=1e-6)


def test_factors_begin_as_in_lycoris() -> None:
    def spread(settings: Settings, shape: tuple[int, ...]) -> dict[str, float]:
        found = kinds.abstract(settings, "x", shape)
        return {name: each.distribution.half_width or each.distribution.deviation for name, each in found.items()}

    assert spread(Settings(rank=4), (64, 32)) == {"down": 1 / 8, "up": 0, "alpha": 0}
    assert spread(Settings(rank=4), (3, 3, 64, 32))["down"] == 1 / 24
    middle = spread(Settings(rank=4, middle=True), (3, 3, 64, 32))
    assert middle == {"down": 1 / 8, "mid": 1 / 6, "up": 0, "alpha": 0}
    halves = spread(Settings(Kind.LOHA, rank=4), (64, 32))
    assert halves == {"down_1": 1, "up_1": 0.1, "down_2": 1, "up_2": 0, "alpha": 0}
    kronecker = spread(Settings(Kind.LOKR, rank=1, decompose_both=True), (64, 64))
    assert kronecker == {"w1_down": 1 / math.sqrt(8), "w1_up": 1, "w2_down": 0, "w2_up": 1, "alpha": 0}
    uniform = kinds.abstract(Settings(rank=4), "x", (64, 32))["down"]
    values = initialisers.sample(uniform, 0, "x")
    assert 0.12 < np.abs(values).max() <= 1 / 8


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (128, None, (8, 16)),
        (512, None, (16, 32)),
        (1024, None, (32, 32)),
        (127, None, (1, 127)),
        (128, 4, (4, 32)),
        (128, 64, (2, 64)),
        (250, 16, (10, 25)),
        (360, 16, (15, 24)),
        (320, 10, (10, 32)),
    ],
)
def test_an_axis_is_split_as_in_lycoris(size: int, factor: int | None, expected: tuple[int, int]) -> None:
    assert lokr.split(size, factor) == expected


def test_a_kronecker_product_is_numpys() -> None:
    factors = random(KINDS["lokr, full"], LINEAR)
    np.testing.assert_array_equal(kinds.delta(factors), np.kron(factors["w1"], factors["w2"]))


def test_a_loha_is_a_lora_of_its_rank_squared() -> None:
    for middle, shape in itertools.product((False, True), (LINEAR, CONVOLUTION)):
        each = random(Settings(Kind.LOHA, rank=2, middle=middle), shape)
        halves = [(each[f"down_{n}"], each[f"up_{n}"], each.get(f"mid_{n}")) for n in (1, 2)]
        down, up = loha.as_lora(*halves)
        assert up.shape == (4, shape[-1])
        np.testing.assert_allclose(lora.product(down, up), loha.product(*halves), rtol=1e-4, atol=1e-5)


def test_the_rank_is_divided_by_and_two_whole_matrices_have_none() -> None:
    for kind, rank in {"lora": 2, "loha, middle": 2, "lokr, both": 1, "lokr, full": None, "difference": None}.items():
        factors = random(KINDS[kind], CONVOLUTION)
        assert kinds.rank_of(factors) == rank
        doubled = {name: value * 2 if name == "alpha" else value for name, value in factors.items()}
        ratio = 1 if rank is None else 2
        np.testing.assert_allclose(kinds.delta(doubled), ratio * kinds.delta(factors), rtol=1e-5, atol=1e-6)
    stabilised = kinds.abstract(Settings(rank=4, alpha=3.0, rank_stabilised=True), "x", LINEAR)
    assert stabilised["alpha"].distribution.mean == 3 * math.sqrt(4)  # over 4: alpha / √rank


def test_strength_is_that_of_comfyui() -> None:
    kernel = np.random.default_rng(0).standard_normal(LINEAR, np.float32)
    plain, scaled = random(KINDS["lora"], LINEAR), random(Settings(rank=2, magnitude=Axis.IN), LINEAR)
    np.testing.assert_allclose(kinds.changed(kernel, plain, 0.5), kernel + 0.5 * kinds.delta(plain), rtol=1e-6)
    whole = kinds.changed(kernel, scaled)
    np.testing.assert_allclose(kinds.changed(kernel, scaled, 0.25), 0.75 * kernel + 0.25 * whole, rtol=1e-5, atol=1e-6)
    assert kinds.changed(kernel, scaled, 0.0).tolist() == kernel.tolist()
    replacement = {"replacement": 2 * kernel}
    assert kinds.changed(kernel, replacement, 0.3) is replacement["replacement"]


def test_gradients_flow_through_factors_and_magnitudes_and_not_through_the_norm() -> None:
    factors = {name: jnp.asarray(value) for name, value in random(Settings(rank=2, magnitude=Axis.OUT), LINEAR).items()}
    rng = np.random.default_rng(0)
    kernel, x = (
        jnp.asarray(rng.standard_normal(LINEAR, np.float32)),
        jnp.asarray(rng.standard_normal((3, 12), np.float32)),
    )

    def loss(factors: Any) -> Any:
        return kinds.applied(x, lambda x: x @ kernel, factors, kernel=kernel).sum()

    def with_constant_norm(factors: Any) -> Any:
        norm = jax.lax.stop_gradient(dora.norm(kernel + kinds.delta(factors), Axis.OUT))
        return (x @ ((kernel + kinds.delta(factors)) * factors["magnitude"] / norm)).sum()

    found, expected = (jax.jit(jax.grad(each))(factors) for each in (loss, with_constant_norm))
    for name in ("down", "up", "magnitude"):
        assert np.abs(expected[name]).max() > 0
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_stacked_factors_are_those_of_each_layer() -> None:
    settings = Settings(Kind.LOKR, rank=1, decompose_both=True)
    stacked = kinds.abstract(settings, "x", LINEAR, layers=3)
    assert {name: each.shape[1:] for name, each in stacked.items()} == {
        name: each.shape for name, each in kinds.abstract(settings, "x", LINEAR).items()
    }
    layers = [random(settings, LINEAR, seed) for seed in range(3)]
    factors = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    np.testing.assert_allclose(
        jax.vmap(kinds.delta)(factors), [kinds.delta(layer) for layer in layers], rtol=1e-5, atol=1e-6
    )


def test_trees_stack_layers_and_come_back() -> None:
    path, layers = "unet/x/kernel", {"unet/x/kernel": 2, "unet/y/kernel": None, "unet/y/bias": None}
    rows: Any = [(layer, random(Settings(rank=3), LINEAR, layer)) for layer in range(2)]
    resolved: changes.Resolved = {path: list(reversed(rows)), "unet/y/kernel": [(None, random(KINDS["loha"], LINEAR))]}
    resolved["unet/y/bias"] = [(None, {"diff": np.ones(3, np.float32)})]
    tree = changes.tree(resolved, layers)
    assert flatten(tree)[f"{path}/down"].shape == (2, 12, 3)
    assert flatten(tree)[f"{path}/alpha"].shape == (2,)
    back = changes.untree(tree, layers)
    assert back.keys() == resolved.keys()
    for (layer, one), (other_layer, other) in zip(rows, back[path], strict=True):
        assert layer == other_layer
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_layers_of_several_ranks_stack_to_the_same_change() -> None:
    layers = {"unet/x/kernel": 2}
    for kind in (Kind.LORA, Kind.LOHA):
        rows: Any = [(layer, random(Settings(kind, rank=2 + layer), LINEAR, layer)) for layer in range(2)]
        (back,) = changes.untree(changes.tree({"unet/x/kernel": rows}, layers), layers).values()
        for (_, one), (_, other) in zip(rows, back, strict=True):
            assert kinds.rank_of(other) == 3
            np.testing.assert_allclose(kinds.delta(other), kinds.delta(one), rtol=1e-5, atol=1e-6)


def test_trees_of_some_layers_and_of_mixed_kinds_are_refused() -> None:
    layers = {"unet/x/kernel": 2}
    with pytest.raises(InputError, match=r"1 of the 2 layers of unet/x/kernel"):
        changes.tree({"unet/x/kernel": [(1, random(KINDS["lora"], LINEAR))]}, layers)
    mixed: Any = [(0, random(KINDS["lora"], LINEAR)), (1, random(KINDS["lokr"], LINEAR))]
    with pytest.raises(InputError, match="different kinds or shapes"):
        changes.tree({"unet/x/kernel": mixed}, layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(rank=13), r"rank 13 .* unet/x/kernel \(12, 20\), whose own rank is at most 12"),
        (Settings(Kind.LOHA, rank=13), "at most 12"),
        (Settings(Kind.LOKR, rank=13), "at most 12. Give a rank up to 12, set full_matrix=True for whole matrices, or"),
        (Settings(rank=0), "rank=0"),
        (Settings(alpha=0.0), "alpha 0. Give a number above 0"),
        (Settings(alpha=-1.0), "alpha -1"),
        (Settings(alpha=math.nan), "alpha nan"),
        (Settings(Kind.LOKR, factor=0), "factor=0"),
        (Settings(Kind.REPLACEMENT), "not trained"),
        (Settings(Kind.DIFFERENCE, magnitude=Axis.IN), "DoRA rescales"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kinds.abstract(settings, "unet/x/kernel", LINEAR)


def test_a_rank_of_half_the_width_is_a_whole_matrix_in_a_lokr() -> None:
    """As in LyCORIS. There any larger rank is too; here one above the layer's width is refused, as of other kinds."""
    for settings in (Settings(Kind.LOKR, rank=3), Settings(Kind.LOKR, rank=10000, full_matrix=True)):
        assert set(kinds.abstract(settings, "x", LINEAR)) == {"w1", "w2", "alpha"}


def test_factors_that_do_not_fit_together_are_refused() -> None:
    good = random(KINDS["lora"], LINEAR)
    for name, shape in {"up": (3, 20), "magnitude": (12, 20)}.items():
        with pytest.raises(ValueError, match=r"ranks|shape"):
            kinds.shape_of(good | {name: np.ones(shape, np.float32)})
    halves = random(KINDS["loha"], LINEAR)
    with pytest.raises(ValueError, match="different shapes"):
        kinds.shape_of(halves | {"up_2": np.ones((2, 21), np.float32)})
