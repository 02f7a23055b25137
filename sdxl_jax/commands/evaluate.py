"""`sdxl-jax evaluate`: metrics of images, of a model over prompts, of an autoencoder, over guidance scales. The command
of people's votes is in `side_by_side`.

Started as several processes, as training is, each takes a part of the images; the first one reports.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from sdxl_jax.commands import parsing, sample, signals
from sdxl_jax.commands.parsing import OpenFlags
from sdxl_jax.errors import InputError, Interrupted, check_ranges
from sdxl_jax.evaluation.settings import Metric, ResizeMode
from sdxl_jax.files import atomic
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.mesh import MeshConfig, ProcessesConfig
from sdxl_jax.sampling.options import Options

if TYPE_CHECKING:
    from sdxl_jax.evaluation.scores import Evaluation, Measurement

USAGE = """usage: sdxl-jax evaluate images IMAGES [REFERENCE]      two sets of images, or images and stored statistics
       sdxl-jax evaluate model MODEL --out DIR         samples of a model over many prompts, resumable
       sdxl-jax evaluate autoencoder MODEL FOLDER      reconstructions of a folder's images
       sdxl-jax evaluate curve MODEL… --out DIR        FID against CLIP score over guidance scales
       sdxl-jax evaluate side-by-side A B --out DIR    a blind page on which people compare two models, and their votes
       sdxl-jax evaluate --fetch-weights               downloads the weights of Inception and LPIPS, once

`sdxl-jax evaluate images --help` and so on list the options."""


def run(arguments: list[str]) -> None:
    commands: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
        "images": (Images, _images),
        "model": (ModelSamples, _model),
        "autoencoder": (Autoencoder, _autoencoder),
        "curve": (Curve, _curve),
    }
    if arguments == ["--fetch-weights"]:
        from sdxl_jax.evaluation import weights

        with signals.stop():
            weights.fetch()
        return
    known = [*commands, "side-by-side"]
    if not parsing.has_subcommand("evaluate", USAGE, arguments, known, options=("--fetch-weights",)):
        return
    name, *given = arguments
    with signals.end_at_once() if name == "images" else signals.stop():
        if name == "side-by-side":
            _side_by_side(given)
            return
        kind, measure = commands[name]
        options = parsing.parse(kind, given, f"evaluate {name}")
        with _processes(options.measures, given):
            measure(options)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured, and how it is reported."""

    metrics: tuple[Metric, ...] = ()
    """Metrics. Default: fid and kid against a reference; of an autoencoder all of pairs, and reconstruction FID."""
    resize: ResizeMode | None = None
    """Resize to Inception's 299×299: tf1 (ADM, EDM, torch-fidelity), clean (clean-fid), pytorch (pytorch-fid). Default:
    that of the reference's statistics, otherwise tf1. Images of several sizes need it said."""
    reference_resize: ResizeMode | None = None
    """Resize mode of reference statistics whose file does not say it: those of EDM have tf1."""
    feature_batch_size: int = 32
    """Images per batch of the metrics' networks. Higher: faster, until memory runs out."""
    clip: AnyPath | None = None
    """CLIP model with both towers, for clip_score and cmmd."""
    inception_head: AnyPath | None = None
    """NPZ with kernel [2048, 1008]: the head of the Inception Score, which FID's network lacks."""
    probe: AnyPath | None = None
    """NPZ with kernel [2048, classes] and perhaps bias: a linear classifier for the probe score."""
    score: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """MODULE:FUNCTION or FILE.py:FUNCTION of a list of uint8 images and a list of prompts that returns one number per
    image: any other score, e.g. a preference model."""
    save_statistics: Path | None = None
    """NPZ file for the mean and covariance of the images' features, which ADM, EDM and clean-fid read too."""
    save_features: bool = False
    """Include all features in --save-statistics, for KID, precision and recall: 8 KB per image."""
    json: bool = False
    """Print JSON instead of a table."""
    report: Path | None = None
    """Markdown file to add a line to."""
    compilation_cache: str | None = "user"
    """Folder for compiled programs, which later commands reuse. user: one in your cache folder. None: no folder."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    """Several processes, each of which takes a part of the images."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Metrics of images against a reference. PSNR, SSIM, LPIPS and psim compare the images of the same names."""

    images: tyro.conf.Positional[AnyPath]
    """Folder of images, or an .npz with uint8 images in arr_0; local or gs://…."""
    reference: tyro.conf.Positional[AnyPath | None] = None
    """Folder of images, or an .npz with images or with statistics (mu, sigma): ours, or of ADM, EDM, clean-fid."""
    prompts_file: Path | None = None
    """The images' prompts, in order of their names: one per line, or JSON lines with a prompt."""
    measures: tyro.conf.OmitArgPrefixes[Measures] = field(default_factory=Measures)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(OpenFlags):
    """How images of prompts are sampled."""

    negative_prompt: str | None = None
    """Negative prompt of every image."""
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    quantize: Literal["int8"] | None = None
    """int8: the kernels of UNet and text encoders in eight bits, a half of bfloat16's memory. Default: none."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Device mesh: images of a batch are split over data, weights are sharded over fsdp."""


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingFlags):
    """Images of prompts that are sampled, and measured."""

    out: Path
    """Folder for the images. The same command again resumes: images that are there are kept."""
    reference: AnyPath | None = None
    """Images or statistics to compare with. Default: the images of --captions."""
    prompts_file: Path | None = None
    """One prompt per line, or JSON lines, {"prompt": "a cat", "steps": 20, …}, with any sampling option per line."""
    captions: Path | None = None
    """Folder of captioned images, as for training: the first caption of each image is a prompt."""
    prompts: int | None = None
    """Number of prompts to sample, the first ones. Default: all."""
    measures: tyro.conf.OmitArgPrefixes[Measures] = field(default_factory=Measures)


@dataclass(frozen=True, kw_only=True)
class ModelSamples(Sampling):
    """Sample images of many prompts from a model, and measure them. Resumes."""

    model: tyro.conf.Positional[AnyPath]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file; local or gs://…."""


@dataclass(frozen=True, kw_only=True)
class Curve(Sampling):
    """FID against CLIP score over guidance scales, for one model or several: a table and a plot. Resumes."""

    models: tyro.conf.Positional[tuple[AnyPath, ...]]
    """Models, each as for sdxl-jax sample."""
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    """Guidance scales."""


@dataclass(frozen=True, kw_only=True)
class Autoencoder(OpenFlags):
    """Reconstruct a folder's images with an autoencoder, and measure the difference. Resumes with --out."""

    model: tyro.conf.Positional[AnyPath]
    """A model, or an autoencoder alone: a directory, a .safetensors file, a run directory."""
    folder: tyro.conf.Positional[AnyPath]
    """Images; each is resized to --size on its short side, and cropped to the centred square."""
    size: int = 256
    """Side of the squares in pixels."""
    images: int | None = None
    """Number of images, the first ones by name. Default: all."""
    out: Path | None = None
    """Folder for the reconstructions, which the same command again resumes. Default: a temporary folder."""
    batch_size: int = 8
    """Images per batch of the autoencoder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    measures: tyro.conf.OmitArgPrefixes[Measures] = field(default_factory=Measures)


@contextlib.contextmanager
def _processes(measures: Measures, arguments: list[str]) -> Iterator[None]:
    """Joins the other processes of this command, if the environment describes any; to be entered before any device is
    touched. What fails on one of them, or a signal, ends all."""
    from sdxl_jax.training.processes import Processes

    with Processes(measures.processes.join_timeout_seconds, handles_signals=False) as processes:
        try:
            processes.compare({"arguments": arguments})
            yield
        except Interrupted as stopped:
            processes.abandon(stopped)  # the others wait for its images
            raise


# images


def _images(options: Images) -> None:
    prompts = None
    if options.prompts_file is not None:
        settings = sample.Sample(model=options.images, out=Path())
        prompts = [each.prompt for each in sample.read_prompts(options.prompts_file, settings)]
    default = () if options.reference is None else (Metric.FID, Metric.KID)
    measurement = _measurement(options.measures, options.reference, default, prompts is not None)
    _report(measurement.of(options.images, prompts), options.measures)


def _measured(measures: Measures, default: tuple[Metric, ...], prompted: bool) -> dict[str, Any]:
    """The arguments of `Measurement`. default: metrics, to which the CLIP score is added where there are prompts and a
    CLIP model."""
    from sdxl_jax.evaluation.features import Wanted

    if measures.save_features and measures.save_statistics is None:
        raise InputError("--save-features has no effect without --save-statistics FILE. Give both, or leave it out")
    sample.use_compilation_cache(measures.compilation_cache)
    if measures.clip is not None and prompted:
        default += (Metric.CLIP_SCORE,)
    return {
        "metrics": measures.metrics or default,
        "resize": measures.resize,
        "reference_resize": measures.reference_resize,
        "clip": _clip(measures),
        "inception_head": measures.inception_head,
        "probe": measures.probe,
        "scores": [(name, _function(name)) for name in measures.score],
        "batch_size": measures.feature_batch_size,
        "keep": None if measures.save_statistics is None else Wanted(spatial=True, features=measures.save_features),
    }


def _measurement(measures: Measures, reference: Any, default: tuple[Metric, ...], prompted: bool) -> "Measurement":
    """What is measured, checked, before the images are."""
    from sdxl_jax.evaluation.scores import Measurement

    return Measurement(reference, **_measured(measures, default, prompted))


def _clip(measures: Measures) -> Any:
    if measures.clip is None:
        return None
    from sdxl_jax.evaluation.clip_models import open_clip

    return open_clip(measures.clip)


def _function(name: str) -> Callable[..., Any]:
    """The function of --score MODULE:FUNCTION or FILE.py:FUNCTION. Raises InputError where there is none."""
    import pkgutil
    import runpy

    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            value = runpy.run_path(place)[function]
        else:
            sys.path.insert(0, "")  # modules in this folder, as `python -m` finds them
            value = pkgutil.resolve_name(name)
    except Exception as error:  # the file is the user's program
        raise InputError(
            f"--score {name} cannot be loaded ({type(error).__name__}: {error}). Give MODULE:FUNCTION, or "
            "FILE.py:FUNCTION"
        ) from error
    if not callable(value):
        raise InputError(f"--score {name} is a {type(value).__name__}. Give a function of images and prompts")
    return value


def _report(evaluation: "Evaluation", measures: Measures, **settings: Any) -> None:
    """Prints the scores, and writes the files that were asked for; of several processes the first."""
    from sdxl_jax.evaluation import features, report, statistics

    if not features.is_first():
        return
    if measures.save_statistics is not None:
        assert evaluation.statistics is not None
        own = evaluation.statistics if measures.save_features else evaluation.statistics._replace(features=None)
        statistics.save(own, measures.save_statistics)
        print(f"statistics of {own.images:,} images ({own.resize.value}): {measures.save_statistics}", file=sys.stderr)
    if measures.json:
        print(json.dumps({**report.as_json(evaluation), **settings}, indent=1))
    elif evaluation.scores:
        print(report.table(evaluation))
    if measures.report is not None:
        report.append_markdown(evaluation, measures.report)


# model, curve


class _Prompts(NamedTuple):
    """What is sampled, whatever the model."""

    tasks: list[sample.Task]

    @property
    def per_image(self) -> list[str]:
        return [task.prompt or "" for task in self.tasks for _ in range(task.options.num_images)]


def _model(options: ModelSamples) -> None:
    prompts = _prompts(options)
    reference = options.captions if options.reference is None else options.reference
    default = () if reference is None else (Metric.FID, Metric.KID)
    measurement = _measurement(options.measures, reference, default, True)
    settings = _sample(options, options.model, options.out, prompts)
    _report(measurement.of(options.out, prompts.per_image), options.measures, sampling=settings)


def _curve(options: Curve) -> None:
    from sdxl_jax.evaluation import curve, features, report

    curve.check_plots()
    if not options.models:
        raise InputError("There is no model. Give one or more")
    if options.options.guidance is not None:
        raise InputError("--guidance has no effect on a curve, which has --guidance-scales. Leave it out")
    prompts = _prompts(options)
    reference = options.captions if options.reference is None else options.reference
    metrics = options.measures.metrics or (Metric.FID, Metric.CLIP_SCORE)
    measures = dataclasses.replace(options.measures, metrics=metrics)
    measurement = _measurement(measures, reference, (), True)
    points = []
    for label, model in zip(_labels(options.models), options.models, strict=True):
        for scale in options.guidance_scales:
            folder = options.out / label / f"guidance_{scale:g}"
            scaled = [
                task._replace(options=dataclasses.replace(task.options, guidance=scale)) for task in prompts.tasks
            ]
            _sample(options, model, folder, _Prompts(scaled))
            points.append(curve.Point(label, scale, measurement.of(folder, prompts.per_image)))
    if not features.is_first():
        return
    names = [score.name for score in points[0].evaluation.scores]
    text = curve.table(points)
    atomic.write_text(options.out / "curve.md", text)
    curve.plot(points, options.out / "curve.png", across=names[-1], up=names[0])
    rows = [{"model": each.model, "guidance": each.guidance, **report.as_json(each.evaluation)} for each in points]
    print(json.dumps(rows, indent=1) if measures.json else f"{text}\n{options.out / 'curve.png'}")


def _labels(models: tuple[Any, ...]) -> list[str]:
    """A name for each model: the last part of its path, or with its number where two have the same."""
    names = [path.name for path in models]
    return [f"{number}_{name}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _prompts(options: Sampling) -> _Prompts:
    """Raises InputError for no prompts, or two sources of them."""
    if (options.prompts_file is None) == (options.captions is None):
        raise InputError("Give prompts with either --prompts-file FILE or --captions FOLDER")
    if options.captions is not None:
        from sdxl_jax.data.folders import open_folder

        source = open_folder(options.captions)
        texts = [source.captions(number)[0] for number in range(len(source.sizes))]
        given = [sample.PromptSettings(text, options.negative_prompt, options.options) for text in texts]
    else:
        assert options.prompts_file is not None
        given = list(sample.read_prompts(options.prompts_file, _sample_options(options, options.out, options.out)))
    check_ranges([("prompts", options.prompts, 1, math.inf)])
    if options.prompts is not None and options.prompts > len(given):
        raise InputError(f"--prompts {options.prompts}: there are {len(given)} prompts. Give at most that many")
    return _numbered(given[: options.prompts])


def _numbered(given: Sequence[sample.PromptSettings]) -> _Prompts:
    tasks, index = [], 0
    for each in given:
        tasks.append(sample.Task(*each, index=index))
        index += each.options.num_images
    return _Prompts(tasks)


def sample_into(folder: Path, options: SamplingFlags, model: AnyPath, prompts: Sequence[sample.PromptSettings]) -> None:
    """Samples the images of prompts that a folder lacks."""
    _sample(options, model, folder, _numbered(prompts))


def _sample_options(options: SamplingFlags, model: AnyPath, out: Path) -> sample.Sample:
    """As `sdxl-jax sample` has them."""
    names = [entry.name for entry in dataclasses.fields(OpenFlags)]
    names += ["negative_prompt", "options", "dtype", "quantize", "mesh"]
    shared = {name: getattr(options, name) for name in names}
    return sample.Sample(model=model, out=out, **shared)


def _sample(options: SamplingFlags, model: AnyPath, out: Path, prompts: _Prompts) -> dict[str, str]:
    """Samples the images that `out` lacks. Returns the settings that all images share."""
    from sdxl_jax.evaluation import samples
    from sdxl_jax.models.layers import Compute, Dtype
    from sdxl_jax.sampling.plan import check_prompts, prepare

    as_sample = _sample_options(options, model, out)
    weights = sample.opened(as_sample)
    for each in dict.fromkeys(task.options for task in prompts.tasks):
        prepare(weights[0].config, None, each)
    given = [text for task in prompts.tasks for text in (task.prompt, task.negative)]
    check_prompts(weights[0].config, given, [task.class_ for task in prompts.tasks])
    texts = list(sample.texts_of(as_sample, prompts.tasks, weights[0].config))
    singles = [(task, number) for task in prompts.tasks for number in range(task.options.num_images)]
    requests = [
        samples.Request(
            task.prompt or "",
            task.negative,
            dataclasses.replace(task.options, num_images=1, first_index=task.options.first_index + task.index + number),
            text,
            task.class_,
        )
        for (task, number), text in zip(singles, texts, strict=True)
    ]
    if samples.missing(out, texts):
        loaded, _ = sample.load(as_sample, weights)
        samples.sample(loaded, requests, out, Compute(dtype=Dtype(options.dtype)))
    samples.wait_for_all(out, len(texts))
    return {name: value for name, value in texts[0].items() if all(text.get(name) == value for text in texts)}


# side-by-side


def _side_by_side(arguments: list[str]) -> None:
    from sdxl_jax.commands import side_by_side  # it imports this module

    side_by_side.run(arguments)


# autoencoder


def _autoencoder(options: Autoencoder) -> None:
    if options.lora:
        raise InputError(f"--lora {options.lora[0]} has no effect on an autoencoder. Leave it out")
    from sdxl_jax.evaluation.reconstruction import OF_AUTOENCODERS, evaluate_autoencoder

    evaluation = evaluate_autoencoder(
        options.model,
        options.folder,
        side=options.size,
        count=options.images,
        out=options.out,
        batch_size=options.batch_size,
        dtype=options.dtype,
        options=options.open_options(),
        parts_from=options.parts_from,
        measured=_measured(options.measures, OF_AUTOENCODERS, False),
    )
    _report(evaluation, options.measures)
