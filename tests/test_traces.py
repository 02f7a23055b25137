"""The promises of traces: a later start does not trace, and runs no other program than it would make."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax import sharding
from sdxl_jax.compilation import compilation_cache, traces
from sdxl_jax.compilation.jitted import jit
from sdxl_jax.compilation.traces import Traces
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.compilation import CompiledSteps

MESH = sharding.make_mesh(MeshConfig())
DEVICES = list(MESH.devices.flat)
BUCKET = Bucket(8, 8)
PLACE = sharding.replicated(MESH)


def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    y = jnp.tanh(x @ state["w"])
    return {"w": state["w"] + 0.1 * x.T @ y}, y.sum()


def arguments(rows: int = 4, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    return (
        {"w": jax.ShapeDtypeStruct((8, 8), dtype, sharding=PLACE)},
        jax.ShapeDtypeStruct((rows, 8), dtype, sharding=PLACE),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[compilation_cache.FolderCache]:
    with compiling.quick(tmp_path / "unused"):
        compilation_cache.use(tmp_path / "cache")
        current = compilation_cache.current()
        assert current is not None
        yield current


def run(known: Traces, function: Any = step) -> tuple[list[bytes], bool, int]:
    """(results, whether the state was donated, how often the step was traced) of a start."""
    jax.clear_caches()
    traced = []

    def counted(*given: Any) -> Any:
        traced.append(given)
        return function(*given)

    jitted = jax.jit(counted, donate_argnums=0, out_shardings=({"w": PLACE}, PLACE))
    state = {"w": jax.device_put(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), PLACE)}
    with CompiledSteps(jitted, {BUCKET: arguments()}, MESH, traces=known) as steps:
        program: Any = steps.of(BUCKET)
        results = program(state, jax.device_put(np.full((4, 8), 0.3, np.float32), PLACE))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results)], state["w"].is_deleted(), len(traced)


def test_a_later_start_does_not_trace_and_is_the_same_bit_for_bit(cache: compilation_cache.FolderCache) -> None:
    first, second = (run(Traces(cache, "same", DEVICES)) for _ in range(2))
    assert (first[1:], second[1:]) == ((True, 1), (True, 0))
    assert first[0] == second[0]
    assert run(Traces(cache, "other", DEVICES))[2] == 1


def test_other_arguments_have_other_traces(cache: compilation_cache.FolderCache) -> None:
    known = Traces(cache, "same", DEVICES)
    run(known)
    assert known.exists(arguments())
    other_place = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(MESH)), arguments()
    )
    for other in (arguments(rows=8), arguments(dtype=jnp.bfloat16), other_place, arguments()[::-1]):
        assert not known.exists(other) and known.read(other) is None


@pytest.mark.parametrize("kind", ["trace", "program", "program is gone"])
def test_damage_is_made_good(cache: compilation_cache.FolderCache, tmp_path: Path, kind: str) -> None:
    known = Traces(cache, "same", DEVICES)
    expected = run(known)[0]
    (path,) = (tmp_path / "cache").glob("trace-*" if kind == "trace" else "jit_counted*")
    if kind == "program is gone":
        path.unlink()
        assert run(known)[0::2] == (expected, 1)
    else:
        path.write_bytes(path.read_bytes()[:-40])
        if kind == "trace":
            assert run(known)[0::2] == (expected, 1)
        else:
            with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
                assert run(known)[0::2] == (expected, 1)
    assert run(known)[0::2] == (expected, 0)


def test_a_step_that_calls_python_keeps_no_trace(cache: compilation_cache.FolderCache) -> None:
    def calls(state: Any, x: Any) -> Any:
        jax.debug.callback(lambda: None)
        return step(state, x)

    known = Traces(cache, "same", DEVICES)
    assert [run(known, calls)[2] for _ in range(2)] == [1, 1]


def test_the_fingerprint_has_everything_that_a_program_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/tests/started.py", raising=False)
    values = {"training": {"steps": 4}}
    before = traces.fingerprint(values, DEVICES)
    assert before is not None and traces.fingerprint(values, DEVICES) == before

    def changed(change: Any) -> bool:
        """In a process of its own, which reads the sources."""
        with monkeypatch.context() as patch:
            change(patch)
            traces._sources.cache_clear()
            found = traces.fingerprint(values, DEVICES)
        traces._sources.cache_clear()
        assert traces.fingerprint(values, DEVICES) == before
        return found not in (before, None)

    own = tmp_path / "own.py"
    own.write_text("")
    module = types.ModuleType("own")
    module.__file__ = str(own)
    assert changed(lambda patch: patch.setitem(sys.modules, "own", module)), "a module of the user's"
    assert changed(lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"))
    assert changed(lambda patch: patch.setattr(traces, "processor_kind", lambda: "another"))
    settings = jax.config.values | {"jax_default_matmul_precision": "highest"}
    assert changed(lambda patch: patch.setattr(type(jax.config), "values", settings))
    real = Path.read_bytes

    def edited(path: Path) -> bytes:
        return real(path) + (b"# edited" if path.name == "unet.py" else b"")

    assert changed(lambda patch: patch.setattr(Path, "read_bytes", edited)), "our sources"
    size_and_time = traces._size_and_time

    def touched(path: Path) -> str:
        return size_and_time(path) + ("later" if path.parts[-2:] == ("linen", "module.py") else "")

    assert changed(lambda patch: patch.setattr(traces, "_size_and_time", touched)), "flax's"
    assert traces.fingerprint({"training": {"steps": 5}}, DEVICES) not in (before, None)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert traces.fingerprint(values, DEVICES) is None, "a notebook"


# jit


def test_a_function_of_a_command_is_not_traced_at_the_second_start(
    cache: compilation_cache.FolderCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    traced = []

    def blurred(params: Any, keys: jax.Array, *, noise: Any, config: str) -> jax.Array:
        traced.append(config)
        return params["w"] * noise + jax.vmap(jax.random.normal)(keys)

    def start(config: str = "a", rows: int = 2) -> np.ndarray:
        """What a new process would make of it."""
        jax.clear_caches()
        function = jit(blurred, ("config",))
        keys = jax.random.split(jax.random.key(0), rows)
        params = {"w": jax.device_put(np.arange(rows, dtype=np.float32), PLACE)}
        results = [function(params, keys, noise=np.float32(3), config=config) for _ in range(2)]
        assert function._cache_size() == 1
        np.testing.assert_array_equal(*results)
        return np.asarray(results[0])

    first = start()
    np.testing.assert_array_equal(start(), first)
    assert traced == ["a"]
    start("b")
    start("a", rows=3)
    assert traced == ["a", "b", "a"]
    monkeypatch.delattr(sys.modules["__main__"], "__file__")  # as in a notebook
    start()
    assert traced == ["a", "b", "a", "a"]


def test_without_a_cache_it_is_that_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation_cache, "current", lambda: None)
    function = jit(lambda x, *, times: x * times, ("times",))
    assert (function(np.float32(2), times=3), function(np.float32(4), times=3)) == (6, 12)
    assert function.jitted._cache_size() == function._cache_size() == 1
