"""The promises of sdxl_jax.aot: FLOPs are counted right, programs are read right, bad input is named.

Tests that need libtpu are marked, and skipped where it is missing.
"""

import dataclasses
import importlib.util
import json
import re
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny
from command import call
from jax.sharding import AbstractMesh, AxisType

from sdxl_jax import flops, sharding
from sdxl_jax.aot import compile as aot_compile
from sdxl_jax.aot import hlo, report, smallest, topologies
from sdxl_jax.errors import InputError
from sdxl_jax.models import attention
from sdxl_jax.models.layers import Attention, Compute, Dtype, Remat
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.sizes import Size
from sdxl_jax.training.objectives import objective_of

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize("kernel", [Attention.SPLASH, Attention.PAIRS])
def test_flops_of_a_tpu_kernel_are_two_products_forward_and_five_backward(kernel: Attention) -> None:
    array = jax.ShapeDtypeStruct((2, 700, 4, 64), jnp.bfloat16)  # padded to 1024

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention.dot_product_attention(query, key, value, kernel).sum()

    counted = flops.count(jax.grad(loss, argnums=(0, 1, 2)), array, array, array)
    assert counted.kernels == 7 * 2 * (2 * 4 * 1024 * 1024 * 64)


def test_kernels_within_a_mesh_count_for_all_its_devices() -> None:
    mesh = AbstractMesh((1, 2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    array = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        counted = flops.count(lambda x: attention.dot_product_attention(x, x, x, Attention.SPLASH), array)
    assert counted.kernels == 2 * 2 * (4 * 2 * 256 * 256 * 64)


def test_a_scan_counts_as_often_as_it_runs_and_rematerialisation_is_counted() -> None:
    weight = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def once(x: jax.Array) -> jax.Array:
        return x @ x

    def seven(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (once(carry), None), x, length=7)[0]

    assert flops.count(seven, weight).total == 7 * 2 * 8**3
    plain = flops.count(jax.grad(lambda x: jnp.sum(jnp.sin(once(once(x))))), weight).total
    again = flops.count(jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(once(once(x)))))), weight).total
    assert again > plain


PROGRAM = """HloModule example

%condition (carry: (s32[], f32[8])) -> pred[] {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  %counter = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%sum-and-slice (input: bf16[8]) -> bf16[2] {
  %input = bf16[8]{0} parameter(0)
  %all-reduce.1 = bf16[8]{0} all-reduce(%input), replica_groups={{0,1,2,3}}
  ROOT %part = bf16[2]{0} slice(%all-reduce.1), slice={[0:2]}
}

%body (carry.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  %inner = f32[8]{0} fusion(%carry.1), kind=kLoop, calls=%anything, backend_config={"estimated_cycles":"100"}
  %gathered = bf16[4,8]{1,0} all-gather(%inner), dimensions={0}
  ROOT %out = (s32[], f32[8]{0}) tuple(%carry.1, %inner)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %outer = f32[8]{0} fusion(%x), kind=kLoop, calls=%anything, backend_config={"estimated_cycles":"100"}
  %scattered = bf16[2]{0} fusion(%outer), kind=kCustom, calls=%sum-and-slice
  %loop = (s32[], f32[8]{0}) while(%outer), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_program_is_read_with_its_loops_and_collectives() -> None:
    found = list(hlo.instructions(PROGRAM))
    assert {each.name: each.executions for each in found}["inner"] == 7
    assert hlo.loop_factor(found) == (7 * 100 + 100) / 200
    assert hlo.collectives(found) == [
        hlo.Collective("all-gather", 7, 7 * 4 * 8 * 2),
        hlo.Collective("reduce-scatter", 1, 2 * 2),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9x:2x2", "There is no topology 'v9x:2x2'. Give one of .*v5p:2x2x1.*the chips are v4, v5e, v5p, v6e"),
        ("v5p:4x4", "has no arrangement of 3 axes. Give one such as v5p:2x2x1; usual .* of v5p are 2x2x1, 2x2x2"),
        ("v5e", "has no arrangement of 2 axes"),
    ],
)
def test_unknown_topology_lists_the_known(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        topologies.check(name)


def config_file(folder: Path) -> Path:
    """The tiny run's, without data."""
    path = folder / "config.py"
    path.write_text("from tiny import train_config\nfrom pathlib import Path\n\n\ndef get_config():\n"
                    "    return train_config(Path('nowhere'))\n")  # fmt: skip
    return path


def test_compile_refuses_before_it_compiles(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    for arguments, words in (
        ([], "--topology is missing. Give one"),
        (["--topology", "v7:2x2"], "There is no topology 'v7:2x2'"),
        (["--topology", "v5e:2x2", "--bucket", "32x32", "--all-buckets"], "Give one of them"),
        (["--topology", "v5e:2x2", "--program", "sample", "--all-buckets"], "have no effect with --program sample"),
        (
            ["--topology", "v5e:2x2", "--smallest"],
            "--smallest tries the arrangements of a chip. Give --topology v4, v5e",
        ),
        (["--topology", "v5e", "--smallest", "--all-buckets"], "--smallest has no effect with other options"),
        (["--topology", "v5e:2x2", "--images", "2"], "--images 2 has no effect without --program sample"),
        (["--topology", "v5e:2x2", "--program", "sample", "--images", "0"], "--images 0 is out of range"),
        (["--topology", "v5e:2x2", "--parallel", "0"], "--parallel 0 is out of range. Give 1 or more"),
    ):
        outcome = call("compile", str(config), *arguments)
        assert outcome.code == 2
        assert words in outcome.err


GIB = 2**30
MADE = report.Report(
    topology="v5e:2x2",
    chips=4,
    program="train step 32×32",
    images=8,
    chip=flops.V5E,
    bytes_by_use={"parameters": 2 * GIB, "optimiser": 4 * GIB},
    bytes_activations=3 * GIB,
    model_flops=8e12,
    kernel_flops=0.0,
    compiler_seconds=0.5,
    collectives=(hlo.Collective("all-gather", 3, GIB),),
    compile_seconds=7.0,
    peak_host_bytes=GIB,
    saved=True,
)
REFUSED = report.TooLarge(
    "v5e:2x2", 4, "train step 64×64", 8, flops.V5E, {"parameters": 2 * GIB}, 8e12, "it requires 30.38G of 15.75G HBM"
)


def test_instructions_of_unknown_time_are_taken_out_of_the_estimate() -> None:
    def fusions(cycles: int) -> list[hlo.Instruction]:
        return [hlo.Instruction("a", "fusion", 0, cycles, "", 1), hlo.Instruction("b", "fusion", 0, cycles, "", 3)]

    assert report._corrected(0.25, fusions(3)) == 2 * 0.25
    assert report._corrected(0.25 - 300, fusions(225_000_000)) == 2 * 0.25
    assert report._corrected(1.25 - 300, fusions(975_000_000)) == 2 * 1.25
    assert report._corrected(0.0, []) is None


def test_the_table_shows_the_cost_of_a_program_and_an_implausible_estimate_is_unknown() -> None:
    shown = str(MADE)
    for name, value in (
        ("parameters", "2.00 GiB"),
        ("activations", "3.00 GiB"),
        ("total", "9.00 GiB of 16"),
        ("model FLOPs", "8.0 TFLOP, 1.00 per image"),
        ("time, estimated", "0.500 s"),
        ("images/s per chip", "4.00"),
        ("all-gather", "1.00 GiB per step, 3 times"),
    ):
        assert re.search(rf"^  {name}.* {value}", shown, re.MULTILINE)
    unknown = dataclasses.replace(MADE, compiler_seconds=None)
    assert str(unknown).count("unknown: the compiler's estimate is not plausible") == 3
    assert unknown.as_json()["images_per_second_per_chip"] is None


def test_a_program_that_does_not_fit_says_what_to_change_first(tmp_path: Path) -> None:
    config = tiny.train_config(tmp_path)

    def advice(
        made: report.Report | report.TooLarge, remat: Remat = Remat.NONE, fsdp: int = 4, accumulate: int = 1
    ) -> str:
        changed = dataclasses.replace(
            config,
            compute=Compute(remat=remat),
            mesh=MeshConfig(fsdp=fsdp),
            optimiser=dataclasses.replace(config.optimiser, accumulate=accumulate),
        )
        return aot_compile.verdict(made, changed)

    state = dataclasses.replace(MADE, bytes_by_use={"parameters": 20 * GIB})
    assert advice(MADE) == "It fits: 9.0 of 16 GiB per chip."
    assert "It does not fit: 23.0 of 16 GiB per chip. Parameters, " in advice(state, fsdp=1)
    large = dataclasses.replace(MADE, bytes_activations=30 * GIB)
    assert "set compute.remat to dots, or to block" in advice(large)
    assert "set compute.remat to block." in advice(large, Remat.DOTS)
    assert "raise optimiser.accumulate to 2." in advice(large, Remat.BLOCK)
    assert "To need less memory" in advice(large, Remat.BLOCK, accumulate=2)
    assert "It does not fit: it requires 30.38G of 15.75G HBM. Activations" in advice(REFUSED)
    scope = dataclasses.replace(REFUSED, reason="RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:")
    assert "add xla_tpu_scoped_vmem_limit_kib=65536 to compute.compiler_options" in advice(scope, Remat.BLOCK)
    assert "raise mesh.fsdp, up to 4." in advice(
        dataclasses.replace(REFUSED, bytes_by_use={"parameters": 12 * GIB}), fsdp=1
    )


def test_a_program_that_the_compiler_refuses_costs_no_report_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the temporaries (30.38G) exceed HBM (15.75G)"

    class Lowered(NamedTuple):
        error: str

        def lower(self) -> "Lowered":
            return self

        def compile(self) -> str:
            if self.error:
                raise jax.errors.JaxRuntimeError(self.error)
            return "compiled"

        @property
        def jaxpr(self) -> Any:
            return jax.make_jaxpr(lambda x: x)(1.0)

    def program(name: str, error: str) -> aot_compile.Program:
        function: Any = types.SimpleNamespace(trace=lambda *_: Lowered(error))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        batch = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)
        return aot_compile.Program(name, function, {"batch": batch}, (), 8, 1.0)

    monkeypatch.setattr(report, "make", lambda _, info, **__: dataclasses.replace(MADE, program=info.program))
    mesh = jax.make_mesh((1,) * 4, sharding.AXES)
    made = aot_compile._compile([program("one", said), program("two", "")], mesh, "v5e:2x2", 2, progress=False)
    assert made == [
        report.TooLarge("v5e:2x2", 1, "one", 8, flops.V5E, {"batch": 32}, 1.0, said),
        dataclasses.replace(MADE, program="two"),
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        aot_compile._compile([program("one", "INTERNAL: what is not known")], mesh, "v5e:2x2", 1, progress=False)


@pytest.mark.parametrize("json_too", [False, True])
def test_compile_prints_all_reports_and_ends_with_2_where_one_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json_too: bool
) -> None:
    config = config_file(tmp_path)
    given_options: dict[str, Any] = {}
    monkeypatch.setattr(
        aot_compile, "compile_step", lambda *_, **options: given_options.update(options) or [MADE, REFUSED]
    )
    given = ["--topology", "v5e:2x2", "--all-buckets", "--parallel", "2", "--slices", "2"]
    outcome = call(
        "compile", str(config), *given, *["--json"] * json_too, "--training.compilation-cache", str(tmp_path)
    )
    assert outcome.code == 2
    assert "1 of 2 programs do not fit into the chips' memory: train step 64×64" in outcome.err
    assert given_options == {
        "slices": 2,
        "buckets": [aot_compile.Bucket(*size) for size in tiny.BUCKETS],
        "parallel": 2,
    }
    if json_too:
        assert [each["fits"] for each in json.loads(outcome.out)] == [True, False]
    else:
        assert "It fits: 9.0 of 16 GiB" in outcome.out and "It does not fit: it requires 30.38G" in outcome.out
        assert f"1 of 2 saved in {tmp_path / 'ahead'}" in outcome.out


def test_the_smallest_slice_is_the_first_that_fits_and_hopeless_ones_are_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, int, int]] = []

    def compile_step(config: Any, topology: str, **_: Any) -> list[Any]:
        compiled.append((topology, config.mesh.fsdp, config.optimiser.accumulate))
        return [MADE if topology == "v5e:2x4" else REFUSED]

    monkeypatch.setattr(aot_compile, "compile_step", compile_step)
    monkeypatch.setattr(smallest, "_state_bytes", lambda _, topology: 40 * GIB // topologies.chips(topology))
    outcome = call("compile", str(config_file(tmp_path)), "--topology", "v5e", "--smallest")
    assert outcome.code == 0
    assert "v5e:1x1 --mesh.data 1 --mesh.fsdp 1 --optimiser.accumulate 8\n" in outcome.out
    assert "It does not fit: state and gradients take 40.0 of 16 GiB" in outcome.out
    assert compiled == [("v5e:2x2", 4, 2), ("v5e:2x4", 8, 1)]


@pytest.mark.slow
@pytest.mark.tpu_aot
@needs_libtpu
def test_compile_reports_memory_flops_and_collectives(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny.train_config(tmp_path), mesh=MeshConfig(data=2, fsdp=2))
    (made,) = aot_compile.compile_step(config, "v5p:2x2x1", progress=False)
    assert isinstance(made, report.Report)
    assert made.fits and made.chips == 4
    assert made.bytes_by_use["average"] == made.bytes_by_use["parameters"]
    assert made.model_flops > 0
    assert "all-gather" in {each.kind for each in made.collectives}
    assert json.loads(json.dumps(made.as_json()))["bytes_per_chip"]["total"] == made.bytes_total
    assert "It fits" in aot_compile.verdict(made, config)
    remat = dataclasses.replace(config, compute=Compute(remat=Remat.BLOCK))
    assert aot_compile.compile_step(remat, "v5p:2x2x1", progress=False)[0].model_flops == made.model_flops


@pytest.mark.slow
@pytest.mark.tpu_aot
@needs_libtpu
def test_a_compiled_step_is_saved_under_the_same_name_each_time(tmp_path: Path) -> None:
    config = tiny.train_config(tmp_path)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, compilation_cache=str(tmp_path)))
    names = []
    for buckets in (config.data.buckets[:1], config.data.buckets[:1], config.data.buckets[:2]):
        aot_compile.compile_step(
            config, "v5e:2x2", buckets=[aot_compile.Bucket(*size) for size in buckets], progress=False
        )
        names.append({path.name for path in (tmp_path / "ahead").iterdir()})
    assert len(names[0]) == 1 and names[1] == names[0] and len(names[2] - names[0]) == 1


@pytest.mark.slow
@pytest.mark.tpu_aot
@needs_libtpu
def test_the_sampler_and_the_decoder_compile(tmp_path: Path) -> None:
    config = tiny.train_config(tmp_path)
    validation = dataclasses.replace(config.validation, sizes=((32, 32),), steps=3)
    config = dataclasses.replace(config, validation=validation)
    made = aot_compile.compile_sampler(config, "v5e:2x2", images=2, progress=False)
    assert [each.program for each in made] == ["text encoders", "sampler 32×32, 3 steps", "decoder"]
    assert all(each.fits and each.images == 8 and each.model_flops > 0 for each in made)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_the_samplers_weights_have_the_dtype_of_compute(dtype: Dtype, tmp_path: Path) -> None:
    config = tiny.train_config(tmp_path)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype=dtype))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    programs = aot_compile._sampler_programs(config, mesh, Size(32, 32), 1)
    found = {leaf.dtype.name for each in programs for leaf in jax.tree.leaves(each.inputs["parameters"])}
    assert len(programs) == 3 and found == {dtype.value}


@pytest.mark.slow
@pytest.mark.tpu_aot
@needs_libtpu
def test_bucket_and_batch_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = tiny.train_config(tmp_path)
    with pytest.raises(InputError, match=r"--bucket 64x64 is not one of data.buckets. Give one of: 32x32, 24x40"):
        aot_compile.compile_step(config, "v5e:2x2", buckets=[aot_compile.Bucket(64, 64)])
    with pytest.raises(InputError, match=r"data.batch_size=8 cannot be split over 16 devices"):
        aot_compile.compile_step(config, "v5e:4x4")
    wrong = dataclasses.replace(config, compute=Compute(compiler_options=("xla_tpu_misspelt=1",)))
    with pytest.raises(InputError, match=r"compute\.compiler_options: .*xla_tpu_misspelt"):
        aot_compile.compile_step(wrong, "v5e:2x2", progress=False)
    two = dataclasses.replace(config, mesh=MeshConfig(data=4, slices=2))
    assert aot_compile._mesh(objective_of(two), "v5e:2x2", None).shape["slice"] == 2
    assert aot_compile._mesh(objective_of(two), "v5e:2x2", 1).shape["slice"] == 1
