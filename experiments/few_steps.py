"""Few steps: students of one small teacher by every method of distillation, and what they cost and are worth.

    sdxl-jax quickstart --run-dir runs/quickstart                # the teacher, about ten minutes
    python experiments/few_steps.py                              # for two processors
    python experiments/few_steps.py --methods lcm progressive --steps 200

Not in the paper; its section 3 names distillation as future work. The teacher is the quickstart's model, which draws
the captions of its images; sampled at 128×128 with guidance it evaluates its network twice in each step. The students
are distilled on the same images with the teacher's guidance in their weights, so that they evaluate it once:

    guidance      guidance distillation: the teacher's steps at half their cost
    lcm           consistency distillation, sampled with 1, 2, 4 and 8 steps
    lcm_lora      the same as an adapter of rank 16 (LCM-LoRA), sampled with as many
    progressive   five rounds, of 16, 8, 4, 2 and 1 steps, sampled with as many
    dmd           distribution matching (DMD2), for 4 steps and for 1
    add           adversarial diffusion distillation, sampled with 4 steps and with 1

Not every method has students of all of 1, 2, 4 and 8 steps: dmd and add have those of the ends, 1 and 4, since each
student of dmd is a training of its own, and add is for 4 at most. DMD2's fake score is updated twice per update of the
student, where its paper has five times, so that the student has half of so few training steps instead of a fifth. ADD
is without R1, and has half as many training steps as the others, because each takes about ten times as long with VGG16,
whose features it judges; so few teach its heads little, and the distance to the teacher's image weighs 20 times as much
as in the paper, about as much as what the heads say. Apart from it all students have the same number, progressive in
each round.

Measured are prompt accuracy (the share of samples whose nearest training image has the prompt as its caption), FID and
KID to samples of the teacher from other noise and to the images themselves, and images per second. The first row is the
teacher against itself: the least that is possible.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes. Needs
the weights of `sdxl-jax evaluate --fetch-weights`.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
from cifar10 import Measures
from small_model import Images, numbered, write_images, write_samples

from sdxl_jax import load_model, train
from sdxl_jax.adapters.targets import AdapterConfig
from sdxl_jax.config import CheckpointConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.evaluation import scores
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.evaluation.settings import Metric
from sdxl_jax.model import Model
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.quickstart.run import Examples, training_images
from sdxl_jax.sampling.generate import text_to_image
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import (
    AdversarialDiffusionConfig,
    FeatureDiscriminatorConfig,
)
from sdxl_jax.training.objectives.distillation.consistency import ConsistencyConfig, ConsistencyTarget
from sdxl_jax.training.objectives.distillation.critic import CriticConfig
from sdxl_jax.training.objectives.distillation.distribution_matching import (
    DistributionMatchingConfig,
    MiddleHeadConfig,
)
from sdxl_jax.training.objectives.distillation.guidance import GuidanceDistillationConfig
from sdxl_jax.training.objectives.distillation.progressive import ProgressiveConfig
from sdxl_jax.training.objectives.distillation.teacher import DistillationConfig, TeacherConfig
from sdxl_jax.weights.open import open_model

PAPER = [{"model": "SDXL", "finding": "distillation is named as future work"}]
SIDE = 128
TEACHER_STEPS, GUIDANCE = 30, 3.0
ROUNDS = (16, 8, 4, 2, 1)
"""Steps of the rounds of progressive distillation."""
METHODS = ("guidance", "lcm", "lcm_lora", "progressive", "dmd", "add")
TIMED = 16
"""Images of the batch whose sampling is timed."""


class Student(NamedTuple):
    name: str
    config: DistillationConfig
    sampled: tuple[int, ...]
    """Numbers of steps that it is sampled with."""


def student(
    kind: type[Any], base: Path, options: argparse.Namespace, rate: float = 2e-4, share: float = 1.0, **fields: Any
) -> Any:
    """A configuration of that method. rate: of learning. share: of the training steps. fields: the method's own."""
    steps = round(options.steps * share)
    fields.setdefault("teacher", TeacherConfig(guidance=(GUIDANCE, GUIDANCE)))
    return kind(
        data=DataConfig(folder=str(options.out / "data"), buckets=((SIDE, SIDE),), batch_size=options.batch),
        model=open_model(base).config,
        optimiser=optimiser(rate, steps),
        ema=EmaConfig(decay=0.95),
        training=TrainingConfig(steps=steps, trainable=("^unet/",), caption_dropout=0.0, init_from=(str(base),)),
        checkpoint=CheckpointConfig(every_steps=steps, keep=1),
        validation=ValidationConfig(every_steps=None),
        **fields,
    )


def optimiser(rate: float, steps: int) -> OptimiserConfig:
    return OptimiserConfig(
        learning_rate=rate, warmup_steps=steps // 20, decay=Decay.COSINE, beta2=0.99, weight_decay=0.0
    )


def students(method: str, options: argparse.Namespace) -> Iterator[Student]:
    """What is trained for a method, in order: a later one may begin from an earlier one, which is there by then."""
    teacher, out = options.teacher, options.out
    match method:
        case "guidance":
            given = TeacherConfig(guidance=(1.0, 5.0))
            config = student(GuidanceDistillationConfig, teacher, options, teacher=given, guidance_dim=64)
            yield Student(method, config, (TEACHER_STEPS,))
        case "lcm":
            yield Student(method, student(ConsistencyConfig, teacher, options, guidance_dim=None), (1, 2, 4, 8))
        case "lcm_lora":
            about = {"guidance_dim": None, "adapter": AdapterConfig(rank=16), "target": ConsistencyTarget.STUDENT}
            yield Student(method, student(ConsistencyConfig, teacher, options, rate=1e-3, **about), (1, 2, 4, 8))
        case "progressive":
            for steps in ROUNDS:
                given = TeacherConfig(guidance=(GUIDANCE, GUIDANCE) if steps == ROUNDS[0] else None)
                about = {"steps": steps, "teacher": given, "guidance_dim": None}
                yield Student(f"{method}_{steps}", student(ProgressiveConfig, teacher, options, **about), (steps,))
                teacher = out / f"{method}_{steps}"
        case "dmd":
            critic = CriticConfig(updates=2, optimiser=optimiser(2e-4, options.steps))
            for steps in (4, 1):
                about = {"steps": steps, "critic": critic, "rate": 1e-4, "head": MiddleHeadConfig(layers=0)}
                config = student(DistributionMatchingConfig, teacher, options, **about)
                yield Student(f"{method}_{steps}", config, (steps,))
        case "add":
            judge = FeatureDiscriminatorConfig(r1_weight=0.0)
            about = {"discriminator": judge, "distillation_weight": 50.0, "rate": 5e-5, "share": 0.5}
            config = student(AdversarialDiffusionConfig, teacher, options, **about)
            yield Student(method, config, (1, 4))


# Sampling and measures


def sampled(
    model: Model, prompts: Sequence[str], file: Path, steps: int, seed: int, **options: Any
) -> tuple[Images, float]:
    """(one sample of each prompt in the list, the seconds that `TIMED` of them take); kept in `numbered(file)`."""
    file = numbered(file, len(prompts))
    if not file.exists():
        given = {"height": SIDE, "width": SIDE, "steps": steps, "batch_size": TIMED, **options}
        images = text_to_image(model, prompts, seed=seed, progress=True, **given)
        text_to_image(model, prompts[:TIMED], seed=seed, **given)  # compiles: without a bar it is another program
        began = time.monotonic()
        text_to_image(model, prompts[:TIMED], seed=seed, **given)
        write_samples(file, images=images, seconds=time.monotonic() - began)
    kept = np.load(file)
    return kept["images"], float(kept["seconds"])


class Scores:
    """The measures of samples of the prompts, against the teacher's and against the images."""

    def __init__(self, folder: Path, examples: Examples, prompts: Sequence[str], teacher: Images):
        self._examples, self._prompts = examples, prompts
        self._teacher = Measures(folder, teacher)
        self._data = self._teacher.features("data", examples.images)

    def of(self, name: str, images: Images) -> dict[str, float | int]:
        right = hits(images, self._prompts, *self._examples)
        to_teacher = self._teacher.of(name, images)
        to_data = scores.compare(self._teacher.features(name, images), self._data, (Metric.FID, Metric.KID))
        return {
            "prompt accuracy": float(np.mean(right)),
            "FID to teacher": to_teacher["fid"],
            "KID to teacher": to_teacher["kid"],
            **{f"{score.name.upper()} to data": score.value for score in to_data if score.name in ("fid", "kid")},
            "high frequencies": to_teacher["high_frequencies"],
            "N": len(images),
        }


# All of it


def main() -> None:
    options = arguments()
    began = results.begin(options, ("methods", "samples"))
    check_plots()
    out = options.out
    examples = training_images(options.teacher / "pictures")[Bucket(SIDE, SIDE)]
    write_images(out / "data", list(examples.images), text=examples.captions)
    prompts = [prompt for prompt in sorted(set(examples.captions)) for _ in range(options.samples)]
    rows, kept = list[dict[str, Any]](), dict[str, Images]()

    def samples(model: Model, name: str, steps: int, seed: int = 1, **given: Any) -> tuple[Images, float]:
        return sampled(model, prompts, out / "samples" / f"{name}.npz", steps, seed, **given)

    def measure(model: Model, name: str, steps: int, evaluations: int, **given: Any) -> None:
        title = f"{name}, {steps} steps"
        kept[title], seconds = samples(model, title, steps, **given)
        about = {"model": name, "steps": steps, "evaluations": evaluations}
        rows.append({**about, **measures.of(title, kept[title]), "images/s": TIMED / seconds})

    teacher = load_model(options.teacher)
    reference, _ = samples(teacher, "reference", TEACHER_STEPS, seed=0, guidance=GUIDANCE)
    measures = Scores(out / "features", examples, prompts, reference)
    for steps in (TEACHER_STEPS, 8, 4):
        measure(teacher, "teacher", steps, 2 * steps, guidance=GUIDANCE)
    for method in options.methods:
        for name, config, each in students(method, options):
            model = train(config, out / name)
            guided = {"guidance": GUIDANCE} if method == "guidance" else {}
            for steps in each:
                measure(model, method, steps, steps, **guided)
    notes = [
        f"{options.steps} training steps of {options.batch} images for each student, half for add; {SIDE}×{SIDE}",
        f"FID and KID to {len(prompts)} samples of the teacher from other noise, and to {len(examples.images)} images",
        f"images/s: a batch of {TIMED}, with text encoders and decoder",
    ]
    print(results.write(out, "Few steps, in small", PAPER, rows, notes, began))
    plot(rows, kept, out / "figure.png")


def plot(rows: Sequence[dict[str, Any]], kept: Mapping[str, Images], path: Path) -> None:
    """Quality over evaluations of the network; samples of the same prompts and noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.6 * len(rows)))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 2))
    left, right = parts
    for axes, measure in zip(left.subplots(2), ("prompt accuracy", "FID to teacher"), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = sorted((row["evaluations"], row[measure]) for row in rows if row["model"] == model)
            axes.plot(*zip(*own, strict=True), marker="o", label=model)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("evaluations of the network")
        axes.set_ylabel(measure)
        axes.legend(frameon=False, fontsize=7)
    grid = right.add_gridspec(len(rows), 1)
    results.draw_samples(right, [grid[number, 0] for number in range(len(rows))], kept)
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart"), help="default runs/quickstart")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--steps", type=int, default=500, help="of training each student; default 500")
    parser.add_argument("--batch", type=int, default=16, help="default 16")
    parser.add_argument("--samples", type=int, default=8, help="of each caption; default 8")
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
