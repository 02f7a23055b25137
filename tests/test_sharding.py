"""The promises of sdxl_jax.sharding: a sharded step equals the single-device step, and every parameter has a sharding.

Eight devices are simulated in a process of its own (sharded_step.py). Full-size models are traced, never created.
"""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling
import jax
import numpy as np
import pytest
import sharded_step
import starting
from jax.sharding import AbstractMesh, AxisType, Mesh

from sdxl_jax import model, sharding
from sdxl_jax.arrays import unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.optim import optimiser
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig, OptimiserKind
from sdxl_jax.sharding import AXES, RULES, MeshConfig, path_name
from sdxl_jax.training.state import create, partition
from sdxl_jax.weights.lazy import abstract_leaves

MODELS = {"SDXL base": model.SDXL_BASE, "SDXL refiner": model.SDXL_REFINER, "SD 1": model.SD1, "SD 2": model.SD2}


@pytest.fixture(scope="module")
def results(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sharded_step.py prints."""
    script, scratch = Path(__file__).with_name("sharded_step.py"), tmp_path_factory.mktemp("sharded")
    environment = compiling.environment(compiled, devices=8)
    command = [sys.executable, starting.__file__, str(script), str(scratch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


SHARDED = tuple(sharded_step.STEPS)


@pytest.mark.parametrize("layout", SHARDED)
def test_sharded_loss_is_that_of_one_device(results: dict[str, Any], layout: str) -> None:
    # Devices add up in another order: some roundings of float32 (6e-8) more or less, and those of the steps before.
    np.testing.assert_allclose(results[layout]["losses"], results[layout]["single_losses"], rtol=5e-6)


@pytest.mark.parametrize("layout", SHARDED)
def test_sharded_update_is_that_of_one_device(results: dict[str, Any], layout: str) -> None:
    # Parameters, average and moments. An update is up to the learning rate, 1e-3, long; with an epsilon of 1e-3 the
    # gradient's rounding, about 1e-7 of its size, moves it by about as much: 1e-7 × 1e-3 / 1e-3 per step.
    assert results[layout]["difference"] < 1e-6
    assert results[layout]["moved"] > 1e-4  # a hundred times the tolerance: something did happen


def test_initial_parameters_do_not_depend_on_the_layout(results: dict[str, Any]) -> None:
    assert results["fresh_difference"] == 0


def test_parameters_are_created_with_their_shardings(results: dict[str, Any]) -> None:
    assert results["fresh_misplaced"] == []
    # Most of the bytes are kernels and embeddings, even in this tiny model; biases and scales are the rest.
    assert results["fresh_split_share"] > 0.9


@pytest.mark.parametrize("layout", SHARDED)
def test_a_step_keeps_the_shardings_of_the_state(results: dict[str, Any], layout: str) -> None:
    """With others, the next call would compile again, and a resumed run would add up in another order."""
    assert results[layout]["misplaced"] == []


@pytest.mark.parametrize("layout", sharded_step.RESTORED)
def test_checkpoint_of_one_layout_restores_under_another_bit_for_bit(results: dict[str, Any], layout: str) -> None:
    identical, misplaced = results["restored"][layout]
    assert identical
    assert misplaced == []


def test_fingerprint_of_parameters_does_not_depend_on_the_layout(results: dict[str, Any]) -> None:
    """It identifies a cache."""
    assert len(results["fingerprints"]) == 3
    assert len(set(results["fingerprints"].values())) == 1


def test_minus_one_fills_an_axis(results: dict[str, Any]) -> None:
    assert results["devices"] == 8
    alone = {"slice": 1, "tensor": 1}
    assert results["filled"] == [{"data": 2, "fsdp": 4} | alone, {"data": 4, "fsdp": 2} | alone]


@pytest.mark.parametrize(("data", "fsdp"), [(3, 2), (-1, 3), (-1, -1)])
def test_mesh_of_the_wrong_size_is_refused_with_the_remedy(data: int, fsdp: int) -> None:
    with pytest.raises(InputError) as raised:
        sharding.make_mesh(MeshConfig(data, fsdp), [None] * 8)
    assert str(raised.value) == (
        f"mesh.slices=1 × mesh.data={data} × mesh.fsdp={fsdp} × mesh.tensor=1 does not make 8 devices. Choose numbers "
        "whose product is 8, or set one to -1"
    )


def test_mesh_that_does_not_divide_the_heads_is_refused() -> None:
    def mesh(tensor: int) -> AbstractMesh:
        return AbstractMesh((1, 1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 4)

    heads = model.SDXL_BASE.unet.attention_heads
    for tensor in (1, 2, 5, 10):
        sharding.check_heads(mesh(tensor), heads)
    with pytest.raises(InputError, match=r"mesh\.tensor=4 .* have 10, 20\. Use 1 or 2 or 5 or 10"):
        sharding.check_heads(mesh(4), heads)


@pytest.mark.parametrize(("data", "fsdp"), [(0, 1), (1, 0), (-1, 0), (-2, -1), (2, 1)])
def test_mesh_of_impossible_numbers_is_refused(data: int, fsdp: int) -> None:
    with pytest.raises(InputError, match="does not make 1 devices"):
        sharding.make_mesh(MeshConfig(data, fsdp), jax.devices()[:1])


def mesh_of(data: int, fsdp: int) -> Any:
    return AbstractMesh((1, data, fsdp, 1), AXES)


def test_batch_that_does_not_split_is_refused_with_a_size_that_does() -> None:
    with pytest.raises(InputError) as raised:
        sharding.check_batch(mesh_of(32, 2), 100, 1)
    assert str(raised.value) == (
        "data.batch_size=100 cannot be split over 64 devices (slice 1 × data 32 × fsdp 2) in 1 micro-batches. "
        "Use a multiple of 64, e.g. 128, or another mesh"
    )
    with pytest.raises(InputError, match=r"in 3 micro-batches\. Use a multiple of 24, e\.g\. 24, or another mesh"):
        sharding.check_batch(mesh_of(4, 2), 16, 3)
    sharding.check_batch(mesh_of(4, 2), 48, 3)


@functools.cache
def state_of(name: str) -> dict[str, Any]:
    """Shapes of everything that is sharded: the training state and the frozen parameters, at full size."""
    params = unflatten(abstract_leaves(MODELS[name]))
    trained, frozen = partition(params, ("^unet/",))
    make = functools.partial(create, optimiser=optimiser.make_optimiser(OptimiserConfig(), 1000), config=EmaConfig())
    return {"state": jax.eval_shape(make, trained), "frozen": frozen, "all": params}


def names_and_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "SDXL base" else pytest.mark.slow) for name in MODELS]
)
@pytest.mark.parametrize("fsdp", [1, 8, 64])
def test_every_array_of_the_full_size_models_has_a_sharding(name: str, fsdp: int) -> None:
    state = state_of(name)
    places = sharding.place(mesh_of(8, fsdp), state)  # raises for an array without a rule, or of an uneven size
    assert jax.tree.structure(places) == jax.tree.structure(state)


@pytest.mark.parametrize("kind", OptimiserKind)
def test_every_array_of_every_optimiser_has_a_sharding(kind: OptimiserKind) -> None:
    params = state_of("SDXL base")["all"]
    beta1 = 0.9 if kind is OptimiserKind.ADAFACTOR else None  # so that it has a first moment too
    state = jax.eval_shape(
        optimiser.make_optimiser(OptimiserConfig(kind, beta1=beta1), 1000).init, partition(params, (".",))[0]
    )
    sizes = [math.prod(leaf.shape) for _, leaf in names_and_leaves(state)]
    for fsdp in (8, 64):
        places = jax.tree.leaves(sharding.place(mesh_of(8, fsdp), state))
        split = sum(size for size, place in zip(sizes, places, strict=True) if "fsdp" in place.spec)
        # Adafactor's factored second moments are 0.1 % of its first moment, and are not split.
        assert split / sum(sizes) > 0.995


def test_every_rule_applies_to_some_array_of_sdxl_base() -> None:
    first = [
        next(number for number, rule in enumerate(RULES) if re.search(rule.pattern, name))
        for name, _ in names_and_leaves(state_of("SDXL base")["all"])
    ]
    assert set(first) == set(range(len(RULES)))


def test_every_name_in_a_rule_matches_some_array() -> None:
    """A name in a pattern that no array has, or that an earlier rule takes, would have no effect."""
    names = [name for name, _ in names_and_leaves(state_of("SDXL base")["all"])]
    for number, (pattern, _, _) in enumerate(RULES):
        left = [name for name in names if not any(re.search(earlier.pattern, name) for earlier in RULES[:number])]
        alternatives = re.search(r"\((.*?)\)", pattern)
        for word in alternatives[1].split("|") if alternatives else []:
            narrowed = pattern.replace(f"({alternatives[1]})", word) if alternatives else pattern
            assert any(re.search(narrowed, name) for name in left), f"{word} of rule {number}"


def test_nearly_all_bytes_of_sdxl_base_are_split() -> None:
    state = state_of("SDXL base")
    places = jax.tree.leaves(sharding.place(mesh_of(1, 8), state))
    sizes = [math.prod(leaf.shape) for _, leaf in names_and_leaves(state)]
    split = sum(size for size, place in zip(sizes, places, strict=True) if "fsdp" in place.spec)
    # It is 99.93 %; biases, scales and position embeddings are what is left.
    assert split / sum(sizes) > 0.999


def test_moments_and_average_have_the_shardings_of_their_parameters() -> None:
    places = sharding.place(mesh_of(2, 4), state_of("SDXL base")["state"])
    flat = dict(names_and_leaves(places))
    followers = [name for name in flat if name.startswith("ema/") or re.search(r"/(mu|nu)/", name)]
    assert len(followers) == 3 * sum(name.startswith("params/") for name in flat)
    for name in followers:
        parameter = "params/" + re.sub(r"^(ema|optimiser/.*?/(mu|nu))/", "", name)
        assert flat[name] == flat[parameter]


def test_an_array_without_a_rule_is_an_error_that_names_it() -> None:
    leaf = jax.ShapeDtypeStruct((3, 4), np.float32)
    with pytest.raises(
        InputError, match=r"No sharding rule matches unet/gate \(3, 4\)\. Add one to RULES in sdxl_jax/sharding"
    ):
        sharding.place(mesh_of(1, 2), {"unet": {"gate": leaf}})


def test_an_axis_that_does_not_divide_names_parameter_shape_and_mesh() -> None:
    leaf = jax.ShapeDtypeStruct((3, 3, 4, 6), np.float32)
    with pytest.raises(InputError) as raised:
        sharding.place(mesh_of(1, 4), {"unet": {"conv_1": {"kernel": leaf}}})
    assert str(raised.value) == (
        "unet/conv_1/kernel has shape (3, 3, 4, 6), whose axis -1 cannot be split over mesh.fsdp=4. Set mesh.fsdp to "
        "a divisor of 6"
    )


def test_batch_is_split_over_every_device() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    assert sharding.batch_sharding(mesh).spec[0] == ("slice", "data", "fsdp")
    rows = np.arange(6).reshape(3, 2)
    placed: Any = sharding.put_batch(mesh, {"rows": rows})["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
