"""Whole images: `sdxl-jax sample` against diffusers' pipelines, from the same directory and the same noise.

The pipelines are those of `pipelines.py`, which has the tolerances and their reasons too. Text encoders, guidance,
conditioning, sampler and autoencoder are all at work, 20 steps of Euler, in float32. That mistakes would show is a test
of its own: every prompt, size and crop moves the latents by more than 100 times the tolerance.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from agreement import Note
from PIL import Image
from pipelines import (
    GEOMETRIES,
    NEGATIVES,
    PARTS,
    PROMPTS,
    STEPS,
    TOLERANCE,
    Geometry,
    Sampled,
    Size,
    Source,
    apart,
    build,
    check_agreement,
    sd,
    sdxl,
)
from reference import diffusers, from_torch, to_torch, torch

from sdxl_jax.__main__ import main
from sdxl_jax.model import SD1, SD2, SDXL_BASE
from sdxl_jax.sampling.generate import generate
from sdxl_jax.weights.load import load_model

# Of diffusers' Euler alone: NumPy 2 asks more of torch's tensors than they offer.
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

# ---- the pipelines ---------------------------------------------------------------------------------------------------


PIPELINES: dict[str, tuple[Any, Callable[[Sequence[Any]], Any]]] = {
    "SDXL base": (SDXL_BASE, sdxl),
    "SD 1.x": (SD1, lambda tokenizers: sd(tokenizers, "quick_gelu", "epsilon", 8, False)),
    "SD 2.x": (SD2, lambda tokenizers: sd(tokenizers, "gelu", "epsilon", [2, 4], True)),
    "SD 2.x v": (SD2, lambda tokenizers: sd(tokenizers, "gelu", "v_prediction", [2, 4], True)),
}
"""By name: the published model whose tokenizers it has, and how it is built from them."""


def first_by_default(models: Iterable[str]) -> list[Any]:
    """The other models are `slow`."""
    first, *others = sorted(models, key=list(PIPELINES).index)
    return [first, *(pytest.param(each, marks=pytest.mark.slow) for each in others)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """source(name): the pipeline of that name."""
    return functools.cache(lambda name: build(*PIPELINES[name], tmp_path_factory.mktemp("source")))


# ---- the images ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    model: str
    batch: int
    size: Size | None
    """None: the model's own."""
    guidance: float
    negative: str
    geometry: str = "own sizes"

    def __str__(self) -> str:
        size = "own size" if self.size is None else "x".join(map(str, self.size))
        sizes = f", {self.geometry}" if self.model == "SDXL base" else ""
        negative = f", negative {self.negative}" if self.guidance != 1 else ""
        return f"{self.model}, batch {self.batch}, {size}, guidance {self.guidance:g}{negative}{sizes}"

    def noise(self) -> np.ndarray:
        """Standard normal, in our layout."""
        height, width = self.size or (64, 64)
        rng = np.random.default_rng([self.batch, height, width])
        return rng.standard_normal((self.batch, height // 8, width // 8, 4), np.float32)


def sample(model: Path, case: Case, folder: Path) -> Sampled:
    """Ours: what the command line writes."""
    arguments = ["sample", str(model), "--out", str(folder), "--steps", str(STEPS), "--save-latents"]
    arguments += ["--guidance", str(case.guidance), "--init-noise", str(folder / "noise.npy")]
    for prompt in PROMPTS[: case.batch]:
        arguments += ["--prompt", prompt]
    if case.size is not None:
        arguments += ["--height", str(case.size[0]), "--width", str(case.size[1])]
    if (negative := NEGATIVES[case.negative]) is not None:
        arguments += ["--negative-prompt", negative]
    for sign, geometry in zip(("", "negative-"), GEOMETRIES[case.geometry], strict=True):
        if geometry is not None and geometry.original is not None and geometry.target is not None:
            arguments += [f"--{sign}original-size", "{}x{}".format(*geometry.original)]
            arguments += [f"--{sign}crop", "{},{}".format(*geometry.crop)]
            arguments += [f"--{sign}target-size", "{}x{}".format(*geometry.target)]
    folder.mkdir(parents=True)
    np.save(folder / "noise.npy", case.noise())
    assert main(arguments) == 0
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(case.batch)]
    return Sampled(np.stack([np.asarray(Image.open(file)) for file in files]), np.load(folder / "latents.npy"))


def run(
    pipeline: Any,
    prompts: Sequence[str],
    noise: np.ndarray,
    guidance: float,
    negative: str | None,
    geometry: Geometry = Geometry(),
    negative_geometry: Geometry | None = None,
    size: Size | None = None,
    *,
    output_type: str,
) -> Any:
    """diffusers' result. The pipeline itself scales the noise to its first state, and leaves latents scaled."""
    options: dict[str, Any] = {}
    if geometry != Geometry():
        options["original_size"], options["crops_coords_top_left"], options["target_size"] = geometry
    if negative_geometry is not None:
        options["negative_original_size"], options["negative_crops_coords_top_left"] = negative_geometry[:2]
        options["negative_target_size"] = negative_geometry.target
    return pipeline(
        prompt=list(prompts),
        negative_prompt=None if negative is None else [negative] * len(prompts),
        height=size and size[0],
        width=size and size[1],
        latents=to_torch(noise),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type=output_type,
        **options,
    ).images


def reference(*arguments: Any, **options: Any) -> Sampled:
    """Theirs: `run` for the images and for the latents, which it does not give together."""
    images, latents = (run(*arguments, output_type=kind, **options) for kind in ("pil", "latent"))
    return Sampled(np.stack([np.asarray(image) for image in images]), from_torch(latents))


def reference_of(pipeline: Any, case: Case) -> Sampled:
    geometry, negative_geometry = GEOMETRIES[case.geometry]
    prompts, noise = PROMPTS[: case.batch], case.noise()
    # Of several images, diffusers tells negative sizes and sizes in turn, but has all negative prompts before all
    # prompts, so that some receive the others' (both of two, the middle one of three). One image alone is right.
    each = 1 if negative_geometry is not None else case.batch
    made = [
        reference(
            pipeline,
            prompts[start : start + each],
            noise[start : start + each],
            case.guidance,
            NEGATIVES[case.negative],
            geometry,
            negative_geometry,
            case.size,
        )
        for start in range(0, case.batch, each)
    ]
    return Sampled(*(np.concatenate(arrays) for arrays in zip(*made, strict=True)))


CASES = (
    Case("SDXL base", 1, (64, 64), 5, "absent"),
    Case("SDXL base", 1, (64, 64), 7.5, "given", "negative sizes given"),
    Case("SDXL base", 3, (72, 40), 7.5, "absent", "negative sizes given"),
    Case("SD 1.x", 1, None, 7.5, "given"),
    Case("SD 1.x", 1, None, 5, "absent"),
    Case("SD 2.x v", 3, (72, 40), 5, "given"),
)
"""What is always run of SDXL, in few shapes, because each shape is compiled for seconds. The other models here are
slow, and so are all other options: GRID."""
GUIDANCE = ((1, "absent"), (5, "absent"), (5, "empty"), (5, "given"), (7.5, "given"))
GRID = [
    Case(model, batch, size, *guidance, geometry)
    for model, batch, size, guidance, geometry in itertools.product(
        PIPELINES, (1, 3), ((64, 64), (64, 96), (72, 40)), GUIDANCE, GEOMETRIES
    )
    if (model == "SDXL base" or geometry == "own sizes")
    and not (guidance[0] == 1 and geometry == "negative sizes given")
]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, marks=[] if case.model == "SDXL base" else pytest.mark.slow) for case in CASES),
        *(pytest.param(case, marks=pytest.mark.slow) for case in GRID if case not in CASES),
    ],
    ids=str,
)
def test_image_matches_diffusers(case: Case, source: Callable[[str], Source], tmp_path: Path, note: Note) -> None:
    pipeline, path = source(case.model)
    check_agreement(str(case), sample(path, case, tmp_path / "ours"), reference_of(pipeline, case), note)


@pytest.mark.slow
def test_each_image_of_a_batch_has_its_own_negative_prompt(source: Callable[[str], Source], note: Note) -> None:
    """In Python; the command line has one negative prompt for all. Here diffusers cannot mix none with some."""
    pipeline, path = source("SDXL base")
    case = Case("SDXL base", 3, (72, 40), 5, "given")
    negatives, noise = list(NEGATIVES.values()), case.noise()
    made = generate(
        load_model(path, progress=False),
        list(PROMPTS),
        negative_prompts=negatives,
        height=72,
        width=40,
        steps=STEPS,
        guidance=5.0,
        init_noise=noise,
    )
    alone = [
        reference(pipeline, [PROMPTS[k]], noise[k : k + 1], 5, negatives[k], size=(72, 40)) for k in range(len(PROMPTS))
    ]
    theirs = Sampled(*(np.concatenate(arrays) for arrays in zip(*alone, strict=True)))
    check_agreement(
        "SDXL base, batch 3, 72x40, guidance 5, negatives absent | empty | given", Sampled(*made), theirs, note
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", first_by_default(PIPELINES))
def test_everything_that_is_varied_changes_the_image(model: str, source: Callable[[str], Source]) -> None:
    """Otherwise agreement would prove nothing."""
    is_xl = model == "SDXL base"
    noise = Case(model, 1, None, 5, "absent").noise()
    plain: dict[str, Any] = {"prompts": PROMPTS[:1], "noise": noise, "guidance": 5, "negative": None}
    changed: dict[str, dict[str, Any]] = {
        "prompt": {"prompts": PROMPTS[1:2]},
        "long prompt": {"prompts": PROMPTS[2:]},
        "negative": {"negative": NEGATIVES["given"]},
        "no guidance": {"guidance": 1},
        "guidance": {"guidance": 7.5},
        "noise": {"noise": noise[:, ::-1].copy()},
    }
    if is_xl:
        own = Geometry((64, 64), (0, 0), (64, 64))
        every = {
            "original size": own._replace(original=(1023, 333)),
            "original size turned": own._replace(original=(333, 1023)),
            "crop": own._replace(crop=(5, 64)),
            "crop turned": own._replace(crop=(64, 5)),
            "target size": own._replace(target=(512, 1024)),
            "target size turned": own._replace(target=(1024, 512)),
        }
        changed |= {name: {"geometry": geometry} for name, geometry in every.items()}
        changed |= {
            f"negative {name}": {"geometry": own, "negative_geometry": geometry} for name, geometry in every.items()
        }
        changed["empty negative"] = {"negative": ""}

    def latents(change: dict[str, Any]) -> np.ndarray:
        return from_torch(run(source(model).pipeline, **{**plain, **change}, output_type="latent"))

    made = {name: latents(change) for name, change in {"nothing": {}, **changed}.items()}
    identical = [
        (one, other)
        for one, other in itertools.combinations(made, 2)
        if apart(made[one], made[other]) < 100 * TOLERANCE
    ]
    assert not identical
    if not is_xl:  # where no negative prompt is the empty one
        assert apart(latents({"negative": ""}), made["nothing"]) == 0


# ---- the same model in other layouts ---------------------------------------------------------------------------------

CONVERTED = {case.model: case for case in reversed(CASES)}
"""Of each model, the first case: compiled already."""


@pytest.fixture(scope="module")
def converted(
    source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Path]]:
    """converted(name): the pipeline of that name in our other layouts, and from these in diffusers' again."""

    def make(name: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("converted")
        steps = [
            (source(name).path, "orbax", "orbax", []),
            (source(name).path, "single-file", "single.safetensors", []),
            (source(name).path, "single-file", "half.safetensors", ["--dtype", "float16"]),
            (folder / "orbax", "diffusers", "from orbax", []),
            (folder / "single.safetensors", "diffusers", "from single", []),
        ]
        for path, layout, written, options in steps:
            assert main(["convert", str(path), str(folder / written), "--to", layout, *options]) == 0
        return {written: folder / written for _, _, written, _ in steps}

    return functools.cache(make)


@pytest.mark.slow
@pytest.mark.parametrize("model", first_by_default(CONVERTED))
def test_layouts_of_one_model_draw_the_same_image(
    model: str, source: Callable[[str], Source], converted: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    case, paths = CONVERTED[model], converted(model)
    sampled = sample(source(model).path, case, tmp_path / "source")
    for name in ("orbax", "single.safetensors"):
        again = sample(paths[name], case, tmp_path / name)
        np.testing.assert_array_equal(again.latents, sampled.latents, err_msg=name)
        np.testing.assert_array_equal(again.images, sampled.images, err_msg=name)


@pytest.mark.parametrize("model", first_by_default(CONVERTED))
def test_diffusers_draws_the_same_image_from_what_we_write(
    model: str, source: Callable[[str], Source], converted: Callable[[str], dict[str, Path]]
) -> None:
    case, theirs = CONVERTED[model], source(model).pipeline
    sampled = reference_of(theirs, case)
    for name in ("from orbax", "from single"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(converted(model)[name], local_files_only=True)
        assert type(pipeline) is type(theirs)
        assert type(pipeline.scheduler) is type(theirs.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        again = reference_of(pipeline, case)
        np.testing.assert_array_equal(again.latents, sampled.latents, err_msg=name)
        np.testing.assert_array_equal(again.images, sampled.images, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "model", [name if name == "SDXL base" else pytest.param(name, marks=pytest.mark.slow) for name in CONVERTED]
)
def test_diffusers_reads_our_single_file(
    model: str, dtype: str, source: Callable[[str], Source], converted: Callable[[str], dict[str, Path]]
) -> None:
    """By its own table of names. The configurations are the source's: from the tensors alone, diffusers would take it
    for a model of full size, and ask for that one's online."""
    pipeline, path = source(model)
    file = converted(model)["single.safetensors" if dtype == "float32" else "half.safetensors"]
    kind = getattr(torch, dtype)
    read = type(pipeline).from_single_file(file, config=str(path), torch_dtype=kind, local_files_only=True)
    for part in PARTS:
        if getattr(pipeline, part, None) is None:
            continue
        expected, given = (getattr(each, part).state_dict() for each in (pipeline, read))
        assert given.keys() == expected.keys()
        for name, tensor in given.items():
            assert tensor.dtype == kind
            assert torch.equal(tensor, expected[name].to(kind)), f"{part}: {name}"
