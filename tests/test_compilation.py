"""The promises of compiling in the background: in the order of need, bit for bit like jit, no failure lost, a prompt
exit."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdxl_jax import sharding
from sdxl_jax.compilation import compilation_cache
from sdxl_jax.compilation.traces import Traces
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import CompileAhead
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import compilation
from sdxl_jax.training.compilation import CompiledSteps
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.training.programs import Programs, folder

BUCKETS = [Bucket(8 * number, 8) for number in range(1, 6)]
ARGUMENTS = {bucket: (bucket,) for bucket in BUCKETS}
MESH = sharding.make_mesh(MeshConfig())


class Compiler:
    """In place of a jitted step: records what it compiles, and waits for `may` before compiling."""

    def __init__(self, may: int = 0, fails: Bucket | None = None):
        self.started: list[Bucket] = []
        self.may, self.fails = threading.Semaphore(may), fails

    def lower(self, bucket: Bucket) -> "Compiler":
        self.started.append(bucket)
        return self

    def compile(self) -> Any:
        bucket = self.started[-1]
        self.may.acquire()
        if bucket == self.fails:
            raise MemoryError("too large")
        return lambda: bucket


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    fake = Compiler()
    yield fake
    fake.may.release(len(BUCKETS))  # or its thread outlives the test


def eventually(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_programs_are_compiled_in_the_order_of_need(compiler: Compiler) -> None:
    compiler.may.release(5)
    with CompiledSteps(compiler, ARGUMENTS, MESH) as steps:
        assert steps.of(BUCKETS[4])() == BUCKETS[4]
        eventually(lambda: steps.progress() == (5, 5))
        assert [steps.of(bucket)() for bucket in BUCKETS] == BUCKETS
    # The first is started at once; the last may be needed before the second is started, and then goes first.
    assert [bucket for bucket in compiler.started if bucket != BUCKETS[4]] == BUCKETS[:4]


def test_what_is_needed_now_goes_before_what_is_needed_later(compiler: Compiler) -> None:
    with CompiledSteps(compiler, ARGUMENTS, MESH) as steps:
        eventually(lambda: compiler.started)  # and it holds the one thread
        calls = []
        assert steps.of(BUCKETS[3], lambda: calls.append(compiler.may.release()))() == BUCKETS[3]
        assert calls, "the callback was called while waiting"
        compiler.may.release(5)
        eventually(lambda: steps.progress() == (5, 5))
    assert compiler.started == [BUCKETS[number] for number in (0, 3, 1, 2, 4)]


def test_two_threads_compile_two_programs_at_once(compiler: Compiler) -> None:
    with CompiledSteps(compiler, ARGUMENTS, MESH, threads=2):
        eventually(lambda: len(compiler.started) == 2)
        time.sleep(0.05)
        assert set(compiler.started) == set(BUCKETS[:2])


def test_on_demand_compiles_only_what_is_needed(compiler: Compiler) -> None:
    compiler.may.release(5)
    with CompiledSteps(compiler, ARGUMENTS, MESH, CompileAhead.ON_DEMAND) as steps:
        assert steps.of(BUCKETS[2])() == BUCKETS[2]
        time.sleep(0.05)
    assert compiler.started == [BUCKETS[2]]


def test_before_training_waits_for_all(compiler: Compiler) -> None:
    with CompiledSteps(compiler, ARGUMENTS, MESH, CompileAhead.BEFORE) as steps:
        compiler.may.release(4)
        eventually(lambda: steps.progress() == (4, 5))
        assert not steps.ready(BUCKETS[0])
        assert steps.of(BUCKETS[0], compiler.may.release)() == BUCKETS[0]
        assert steps.progress() == (5, 5)


def test_nothing_is_started_after_leaving(compiler: Compiler) -> None:
    with CompiledSteps(compiler, ARGUMENTS, MESH):
        eventually(lambda: compiler.started)
    compiler.may.release(5)
    time.sleep(0.1)
    assert compiler.started == BUCKETS[:1]


@pytest.mark.parametrize("ahead", [CompileAhead.BACKGROUND, CompileAhead.BEFORE])
def test_failure_is_raised_to_whoever_needs_a_program_that_is_not_ready(ahead: CompileAhead) -> None:
    compiler = Compiler(may=5, fails=BUCKETS[1])
    with CompiledSteps(compiler, ARGUMENTS, MESH, ahead) as steps:
        eventually(lambda: len(compiler.started) == 5)
        if ahead is CompileAhead.BACKGROUND:
            assert steps.of(BUCKETS[0])
        with pytest.raises(MemoryError, match="too large") as raised:
            steps.of(BUCKETS[1 if ahead is CompileAhead.BACKGROUND else 0])
    assert raised.traceback[-1].name == "compile"
    assert raised.value.__notes__ == ["(while the step of the bucket 16×8 was compiled)"]


def test_work_after_a_program_does_not_delay_the_program(compiler: Compiler) -> None:
    may, done = threading.Event(), list[Bucket]()

    def then(bucket: Bucket) -> None:
        may.wait(10)
        done.append(bucket)

    compiler.may.release(5)
    with CompiledSteps(compiler, ARGUMENTS, MESH, then=then) as steps:
        assert steps.of(BUCKETS[0])
        assert not done
        may.set()
        eventually(lambda: done == BUCKETS)


class Signalled(Exception):
    pass


def test_signal_interrupts_the_waiting(compiler: Compiler) -> None:
    def handler(*_: object) -> None:
        raise Signalled

    before = signal.signal(signal.SIGTERM, handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    try:
        with CompiledSteps(compiler, ARGUMENTS, MESH) as steps, pytest.raises(Signalled):
            steps.of(BUCKETS[0])
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 5


LEAVING = """
import sys, threading, time
import jax, jax.numpy as jnp
from sdxl_jax import __main__ as command, sharding
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.training import compilation
from sdxl_jax.training.processes import Interrupted

def step(x):
    for _ in range(5000):
        x = jnp.sin(jnp.sort(x)) + 1
    return x

class Step:
    compiling = threading.Event()

    def lower(self, *arguments):
        self.lowered = jax.jit(step).lower(*arguments)
        return self

    def compile(self):
        self.compiling.set()
        return self.lowered.compile()

arguments = {Bucket(8, 8): (jax.ShapeDtypeStruct((8, 8), jnp.float32),)}
with compilation.CompiledSteps(Step(), arguments, sharding.make_mesh(sharding.MeshConfig())):
    Step.compiling.wait()
    time.sleep(0.2)
    print("compiling", flush=True)

def main():
    {ending}

command.main = main
command.program()
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("raise Interrupted('SIGTERM')", 143),
        pytest.param("return 3", 3, marks=pytest.mark.slow),
        pytest.param("raise OSError(28, 'disk')", 1, marks=pytest.mark.slow),
    ],
)
def test_process_ends_while_a_step_is_compiled(ending: str, code: int) -> None:
    """Without `leave`, Python aborts (exit code 134): seen with jax 0.10.2."""
    program = LEAVING.replace("{ending}", ending)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, "compiling\n"), done.stderr[-2000:]


def test_step_compiled_in_the_background_is_what_jit_compiles_bit_for_bit(tmp_path: Path) -> None:
    place = sharding.replicated(MESH)

    def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        y = jnp.tanh(x @ state["w"])
        return {"w": state["w"] + 0.1 * x.T @ y}, y.sum()

    def state() -> dict[str, jax.Array]:
        return {"w": jax.device_put(jax.random.normal(jax.random.key(0), (8, 8)), place)}

    jitted = jax.jit(step, donate_argnums=0, out_shardings=({"w": place}, place))
    x = sharding.put_batch(MESH, np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), (state(), x)
    )
    with compiling.quick(tmp_path / "previous"):
        compilation_cache.use(tmp_path / "cache")
        expected = jitted(state(), x)
        programs = set((tmp_path / "cache").glob("jit_step-*-cache"))
        assert len(programs) == 1
        with CompiledSteps(jitted, {BUCKETS[0]: abstract}, MESH) as steps:
            given = state()
            found = steps.of(BUCKETS[0])(given, x)
        assert set((tmp_path / "cache").glob("jit_step-*-cache")) == programs, "it was read from the cache"
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert given["w"].is_deleted(), "the state is donated, as by jit"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> BucketedDataset:
    config = tiny.train_config(tiny.make_folder(tmp_path_factory.mktemp("data") / "images")).data
    buckets = (*tiny.BUCKETS, (8, 64))  # the last has no image
    return BucketedDataset(dataclasses.replace(config, batch_size=4, buckets=buckets), Tokenizer.of(tiny.MODEL.text))


def test_abstract_batch_is_that_of_the_data(dataset: BucketedDataset) -> None:
    """For a cache: test_encoding."""
    batches = dataset.iterate()
    for step in range(4):
        batch = sharding.put_batch(MESH, next(batches))
        bucket = dataset.bucket_of(step)
        abstract = Denoising(tiny.train_config(Path("unused"))).abstract_batch(MESH, bucket, 4)
        assert jax.tree.structure(abstract) == jax.tree.structure(batch)
        for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(batch), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    batches.close()


def test_order_of_need_is_that_of_the_data(dataset: BucketedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(4):
        buckets = [dataset.bucket_of(step) for step in range(first, 9)]
        assert list(compilation.order_of_need(dataset, first, 9)) == list(dict.fromkeys(buckets))
    assert compilation.order_of_need(dataset, 3, 4) == {dataset.bucket_of(3): 4}, "no other step is left"
    assert compilation.order_of_need(dataset, 4, 4) == {}
    monkeypatch.setattr(compilation, "_LOOKAHEAD_STEPS", 1)
    all_buckets = compilation.order_of_need(dataset, 3, 9)
    assert set(all_buckets) == set(tiny.BUCKETS)
    assert next(iter(all_buckets)) == dataset.bucket_of(3)


def test_errors_of_the_compiler_about_the_configuration_name_the_remedy() -> None:
    function = jax.jit(jnp.sin, compiler_options={"xla_misspelt": "1"})
    with (
        CompiledSteps(function, {BUCKETS[0]: (1.0,)}, MESH) as steps,
        pytest.raises(InputError, match=r"compute\.compiler_options: .*No such compile option: 'xla_misspelt'"),
    ):
        steps.of(BUCKETS[0])
    full = RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nRan out of memory: 20G of 16G hbm")
    error = compilation.explained("the step", full)
    assert isinstance(error, InputError) and "20G of 16G hbm. To need less memory: raise mesh.fsdp" in str(error)
    for field in ("adapter.base_dtype", "textual_inversion.base_dtype", "int8", "adapter.rank", "adapter.layers"):
        assert field in str(error)
    assert compilation.explained("the step", other := ValueError("")) is other


def refuse(_: Any) -> Any:
    raise AssertionError("it should be read, not compiled")


def test_aot_compiled_step_is_read_not_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = jax.jit(lambda x: {"sum": x["a"].sum(), "more": jnp.cos(x["a"])})
    given = {"a": jnp.arange(6.0)}
    aot_programs = Programs(folder(str(tmp_path)), MESH, {"option": 1})
    lowered = function.lower(given)
    with compiling.full():  # on a CPU, a program that was read from jax's cache cannot be written again
        compiled = lowered.compile()
    for _ in range(2):  # the second time in place of the first
        aot_programs.write(lowered, compiled)

    def run(aot_programs: Programs) -> Any:
        with CompiledSteps(function, {BUCKETS[0]: (given,)}, MESH, aot_programs=aot_programs) as steps:
            return steps.of(BUCKETS[0])(given)

    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", refuse)
        jax.tree.map(np.testing.assert_array_equal, run(aot_programs), compiled(given))
        assert capsys.readouterr().out == ""
        with pytest.raises(AssertionError, match="should be read, not compiled"):
            run(aot_programs._replace(options={"option": 2}))
    output = capsys.readouterr().out
    assert "the step of 8×8 in" in output and "is not among the 1 programs (of another configuration" in output

    (file,) = (tmp_path / "ahead").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    jax.tree.map(np.testing.assert_array_equal, run(aot_programs), compiled(given))
    assert "could not be read: " in capsys.readouterr().out


class FakeTraces(Traces):
    """Programs that other processes, or earlier starts, have compiled."""

    def __init__(self) -> None:
        self.programs: dict[tuple[Any, ...], Any] = {}

    def exists(self, arguments: tuple[Any, ...]) -> bool:
        return arguments in self.programs

    def read(self, arguments: tuple[Any, ...]) -> Any:
        return self.programs.get(arguments)

    @contextlib.contextmanager
    def recorded(self, arguments: tuple[Any, ...]) -> Iterator[list[Any]]:
        compiled: list[Any] = []
        yield compiled
        (self.programs[arguments],) = compiled


def shared(compiler: Compiler, known: Any, process: int, count: int, **options: Any) -> CompiledSteps[Any]:
    return CompiledSteps(compiler, ARGUMENTS, MESH, traces=known, share=(process, count), **options)


def test_processes_compile_in_turn_and_read_the_others_programs() -> None:
    known = FakeTraces()
    compilers = [Compiler(may=5) for _ in range(2)]
    with shared(compilers[0], known, 0, 2) as first, shared(compilers[1], known, 1, 2) as second:
        for steps in (first, second):
            assert [steps.of(bucket)() for bucket in BUCKETS] == BUCKETS
            assert steps.progress() == (5, 5)
    assert compilers[0].started == BUCKETS[0::2] and compilers[1].started == BUCKETS[1::2]


def test_on_demand_shares_nothing_out(compiler: Compiler) -> None:
    compiler.may.release(5)
    with shared(compiler, FakeTraces(), 1, 2, ahead=CompileAhead.ON_DEMAND) as steps:
        assert steps.of(BUCKETS[0])() == BUCKETS[0]


@pytest.mark.slow
def test_a_process_whose_wait_is_too_long_compiles_for_itself(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_PATIENCE_SECONDS", 0.3)
    with shared(compiler, FakeTraces(), 0, 3) as steps:
        eventually(lambda: compiler.started)
        time.sleep(0.4)  # it has its own to do: it waits for nobody
        assert compiler.started == BUCKETS[:1]
        compiler.may.release(5)
        assert steps.of(BUCKETS[4])() == BUCKETS[4]
        eventually(lambda: steps.progress() == (5, 5))
    assert compiler.started[:2] == [BUCKETS[0], BUCKETS[3]]
    assert compiler.started[2] == BUCKETS[4], "what is needed now goes first"


SHARED_PROGRAMS = Path(__file__).with_name("shared_programs.py")


def processes(count: int, cache: Path, *given: str) -> list["subprocess.Popen[str]"]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = compiling.environment(cache) | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, str(SHARED_PROGRAMS), str(cache), *given]
    return [
        subprocess.Popen(command, env=common | {"JAX_PROCESS_ID": str(number)}, stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_real_processes_share_the_programs_out(count: int, tmp_path: Path) -> None:
    starts = []
    for _ in range(2):
        members = processes(count, tmp_path)
        starts.append([json.loads(member.communicate(timeout=120)[0].splitlines()[-1]) for member in members])
        assert [member.returncode for member in members] == [0] * count
    first, second = starts
    heights = [8, 16, 24, 32]
    assert [each["compiled"] for each in first] == [heights[number::count] for number in range(count)]
    assert [each["compiled"] for each in second] == [[]] * count, "their traces were read"
    assert len({json.dumps(each["results"]) for each in first + second}) == 1
    assert len(first[0]["results"]) == 4


@pytest.mark.slow
def test_real_processes_do_not_wait_for_one_that_never_finishes(tmp_path: Path) -> None:
    members = processes(2, tmp_path, "1")
    try:
        line = (members[0].stdout or sys.stdin).readline()
        assert json.loads(line)["compiled"] == [8, 16, 24, 32]
    finally:
        for member in members:
            member.kill()
            member.communicate()


@pytest.mark.slow
def test_programs_not_used_for_longest_make_room(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for three programs."""
    known = FakeTraces()
    made: list[CompiledSteps[Any]] = []

    def check() -> None:
        if made and len(made[0]._programs) >= 3:
            raise InputError("too few memory mappings")

    monkeypatch.setattr(compilation, "check_mappings", check)
    with CompiledSteps(compiler, ARGUMENTS, MESH, traces=known) as steps:
        made.append(steps)
        compiler.may.release(5)
        for bucket in BUCKETS[:2]:
            assert steps.of(bucket)() == bucket
        eventually(lambda: steps.progress() == (5, 5))
        assert set(steps._programs) == {*BUCKETS[:2], BUCKETS[4]}, "used ones, and the newest"
        for bucket in BUCKETS:
            assert steps.of(bucket)() == bucket
            assert bucket in steps._programs and len(steps._programs) <= 3
        assert steps.of(BUCKETS[3])() == BUCKETS[3]
    assert sorted(compiler.started) == BUCKETS, "read again, not compiled again"


def test_without_a_cache_no_program_makes_room(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        if compiler.started:
            raise InputError("too few memory mappings")

    monkeypatch.setattr(compilation, "check_mappings", check)
    compiler.may.release(5)
    with CompiledSteps(compiler, ARGUMENTS, MESH) as steps, pytest.raises(InputError, match="too few memory mappings"):
        steps.of(BUCKETS[1])


@pytest.mark.slow
def test_dropped_programs_give_their_mappings_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_bytes().count(b"\n")

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's list of mappings")

    def step(x: jax.Array) -> jax.Array:
        for number in range(20):
            x = jnp.sin(jnp.sort(x) * (number + 1.5)).reshape(2, -1).T.reshape(-1) + 1
        return x

    def check() -> None:
        if steps._programs:
            raise InputError("room for one")

    monkeypatch.setattr(compilation, "check_mappings", check)
    place = sharding.replicated(MESH)
    arguments = {each: (jax.ShapeDtypeStruct((each.height,), jnp.float32, sharding=place),) for each in BUCKETS}
    given = {each: jax.device_put(np.ones(each.height, np.float32), place) for each in BUCKETS}
    steps: CompiledSteps[Any]
    with compiling.quick(tmp_path / "unused"):
        compilation_cache.use(tmp_path / "cache")
        current = compilation_cache.current()
        assert current is not None
        known = Traces(current, "a test", list(MESH.devices.flat))
        with CompiledSteps(jax.jit(step), arguments, MESH, CompileAhead.ON_DEMAND, traces=known) as steps:
            steps.of(BUCKETS[0])(given[BUCKETS[0]])
            before = mappings()
            for bucket in [*BUCKETS[:3], *BUCKETS[:3]]:  # first compiled, then read
                steps.of(bucket)(given[bucket])
            assert mappings() < before + 20, "each takes about 40"


@pytest.mark.parametrize("taken", [58_978, 100])
def test_too_few_memory_mappings_are_refused_before_xla_crashes(tmp_path: Path, taken: int) -> None:
    for name, text in (("sys/vm/max_map_count", "65530\n"), ("self/maps", "7f00 r-xp\n" * taken)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    expected = pytest.raises(InputError, match=r"58978 .* of the 65530.*sysctl -w vm.max_map_count=1048480")
    with expected if taken > 58_977 else contextlib.nullcontext():
        compilation.check_mappings(tmp_path)
    compilation.check_mappings(tmp_path / "no Linux")
