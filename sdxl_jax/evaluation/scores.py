"""Scores of a set of images: `evaluate`, whatever the images come from.

    images ── Inception ── FID, sFID, KID, precision, recall ── against a reference: images, or stored statistics
    images ── CLIP ────── CMMD against a reference; CLIP score against prompts
    images ── pairs ───── PSNR, SSIM, LPIPS, psim ── against the images of the same names
    images ── any function of images and prompts

Each score states the numbers of images and how they were resized. What can be known before work begins is checked
then: files, sizes, names, prompts, weights. The mathematics are in `distances` and `image_metrics`.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8

from sdxl_jax.arrays import Params, normalise
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import distances, features, image_metrics, image_sets, statistics, weights
from sdxl_jax.evaluation.distances import MeanDeviation
from sdxl_jax.evaluation.features import Network, Wanted
from sdxl_jax.evaluation.image_sets import ImageSet
from sdxl_jax.evaluation.settings import OF_CLASSES, OF_INCEPTION, OF_PAIRS, Metric, ResizeMode
from sdxl_jax.evaluation.statistics import Statistics
from sdxl_jax.files.paths import located
from sdxl_jax.models import lpips
from sdxl_jax.models.lpips import Backbone
from sdxl_jax.weights.formats.local_copies import local_copy

FEATURES = 2048
"""Of Inception. The covariance of fewer images than features is singular, and FID much too high."""
ImageScore = Callable[[Sequence[UInt8[np.ndarray, "height width 3"]], Sequence[str]], Sequence[float]]
"""Any other score: a batch of images and their prompts to one number each."""


class Clip(NamedTuple):
    """A CLIP model, whose embeddings have unit length."""

    image: Network
    text: Callable[[Sequence[str]], Float32[np.ndarray, "prompts projection"]] | None
    """None: it has no text tower."""
    reason: str = ""
    """Why there is no text tower."""


class Score(NamedTuple):
    """One number, and all that it depends on."""

    name: str
    value: float
    deviation: float | None
    """Standard deviation over images, subsets or splits; None: there is none."""
    images: int
    reference_images: int | None
    """None: there is no reference, or its file does not say."""
    resize: str
    """The resize mode; "none": the images' own size."""
    convention: str
    """Network and formula, in a few words."""


class Linear(NamedTuple):
    """A linear classifier of Inception's features."""

    kernel: Float[np.ndarray, "features classes"]
    bias: Float[np.ndarray, " classes"] | None
    name: str


class Evaluation(NamedTuple):
    """All scores, the statistics of the images, and what a reader of the scores has to know."""

    images: str
    reference: str | None
    scores: list[Score]
    statistics: Statistics | None
    """Of the images, where a metric of Inception's features was wanted."""
    notes: list[str]


def evaluate(
    images: str | PurePath | UInt8[np.ndarray, "images height width 3"] | ImageSet,
    reference: str | PurePath | UInt8[np.ndarray, "reference height width 3"] | ImageSet | Statistics | None = None,
    *,
    prompts: Sequence[str] | None = None,
    **options: Any,
) -> Evaluation:
    """Scores of images, against a reference where the metric has one.

    Args:
        images: uint8 0..255, or a folder, or an .npz with `arr_0`; two or more.
        reference: the same, or statistics: an .npz, or `Evaluation.statistics`.
        prompts: one per image, in order of their names: for the CLIP score, and for `scores`.
        options: the arguments of `Measurement`: `metrics`, `resize`, `clip`, and so on.

    Raises InputError, mostly before work begins: paths, images, sizes, prompts or weights that do not fit or are
    missing, and statistics of another network or resize mode.
    """
    return Measurement(reference, **options).of(images, prompts)


class Measurement:
    """Which metrics are computed, against which reference: `of` computes them for a set of images, then for another.

    Weights are read, programs compiled, and the reference's features computed once. Everything that does not depend on
    the images is checked at once.
    """

    def __init__(
        self,
        reference: Any = None,
        *,
        metrics: Sequence[Metric | str] = (Metric.FID, Metric.KID),
        resize: ResizeMode | str | None = None,
        reference_resize: ResizeMode | str | None = None,
        clip: Clip | None = None,
        inception_head: str | PurePath | None = None,
        probe: str | PurePath | None = None,
        scores: Sequence[tuple[str, ImageScore]] = (),
        batch_size: int = 32,
        keep: Wanted | None = None,
    ):
        """
        Args:
            reference: as in `evaluate`.
            metrics: members of `Metric`, or their names.
            resize: the mode for Inception. Default: that of the reference's statistics, or `tf1`; images of several
                sizes need it said.
            reference_resize: the mode of statistics whose file does not say it.
            clip: for CMMD and the CLIP score.
            inception_head: .npz with `kernel` [2048, 1008], for the Inception Score.
            probe: .npz with `kernel` [2048, classes] and perhaps `bias`: a linear classifier, for the probe score.
            scores: (name, function of a batch of images and their prompts): other scores, whose mean is reported.
            batch_size: images per batch; more: faster, until memory runs out.
            keep: what `Evaluation.statistics` has to hold, whatever the metrics need; None: only that.

        Raises InputError as `evaluate`.
        """
        self.metrics = [_named(Metric, metric, "metrics") for metric in metrics]
        self.scores, self.batch_size, self.clip, self.keep = scores, batch_size, clip, keep
        said = None if reference_resize is None else _named(ResizeMode, reference_resize, "reference_resize")
        self._chosen: ResizeMode | None = None if resize is None else _named(ResizeMode, resize, "resize")
        self.reference = _opened_reference(reference, said, self._chosen)
        self.head = None if inception_head is None else read_linear(inception_head, "--inception-head")
        self.probe = None if probe is None else read_linear(probe, "--probe")
        of_statistics = self.reference.resize if isinstance(self.reference, Statistics) else None
        self.mode = self._chosen or of_statistics or ResizeMode.TF1
        self.of_inception = keep is not None or any(each in (*OF_INCEPTION, *OF_CLASSES) for each in self.metrics)
        self._check()

    @property
    def needs(self) -> Wanted:
        """What the metrics need of Inception's features."""
        of_features = {Metric.KID, Metric.PRECISION_RECALL, *OF_CLASSES}
        return Wanted(Metric.SFID in self.metrics, bool(of_features & set(self.metrics)))

    def _check(self) -> None:
        wanted, reference = self.metrics, self.reference
        if not wanted and not self.scores and self.keep is None:
            raise InputError("There is no metric to compute. Give one or more, e.g. --metrics fid kid")
        against = [each.value for each in wanted if each in (*OF_INCEPTION, *OF_PAIRS, Metric.CMMD)]
        if against and reference is None:
            raise InputError(f"{against[0]} compares with a reference, and none is given. Give its images")
        of_images = [each.value for each in wanted if each in (*OF_PAIRS, Metric.CMMD)]
        if of_images and isinstance(reference, Statistics):
            raise InputError(f"{of_images[0]} needs the images of the reference, not statistics. Give them")
        if isinstance(reference, Statistics):
            _check_stored(reference, self.mode, wanted)
        elif reference is not None and self.of_inception and self._chosen is None:
            image_sets.check_one_size(reference)
        _check_given(wanted, self.clip, self.head, self.probe)
        for name in weights_of(wanted, self.keep):
            weights.check(name)

    def check(self, images: ImageSet, prompts: Sequence[str] | None) -> None:
        """Raises InputError for images or prompts that the metrics cannot be computed of."""
        reference, count = self.reference, len(images.names)
        if prompts is None and Metric.CLIP_SCORE in self.metrics:
            raise InputError(
                "clip_score compares images with their prompts, and none are given. Give --prompts-file FILE"
            )
        if prompts is not None and len(prompts) != count:
            raise InputError(
                f"{len(prompts)} prompts for the {count} images of {images.source}. Give one per image, in order of "
                "their names"
            )
        if (pairs := [each for each in self.metrics if each in OF_PAIRS]) and reference is not None:
            assert not isinstance(reference, Statistics)
            _check_pairs(images, reference, pairs[0].value)
        if self.of_inception and self._chosen is None:
            image_sets.check_one_size(images)

    def of(self, images: Any, prompts: Sequence[str] | None = None) -> Evaluation:
        """The scores of a set of images, and its statistics. images, prompts: as in `evaluate`."""
        images = _opened(images, "the images")
        self.check(images, prompts)
        source = None if self.reference is None else self.reference.source
        evaluation = Evaluation(images.source, source, [], None, [])
        if self.of_inception:
            evaluation = self._of_inception(images, evaluation)
        found = evaluation.scores
        if Metric.CMMD in self.metrics or Metric.CLIP_SCORE in self.metrics:
            found += self._of_clip(images, prompts)
        if pairs := [metric for metric in self.metrics if metric in OF_PAIRS]:
            found += self._of_pairs(images, pairs)
        found += [_of_function(images, prompts, name, function, self.batch_size) for name, function in self.scores]
        return evaluation

    # Inception

    @functools.cached_property
    def _inception(self) -> Network:
        spatial = self.needs.spatial or (self.keep is not None and self.keep.spatial)
        return features.inception(weights.load("inception"), self.mode, spatial)

    @functools.cached_property
    def _reference_statistics(self) -> Statistics | None:
        reference = self.reference
        if reference is None or isinstance(reference, Statistics):
            return reference
        return features.statistics_of(self._inception, reference, self.mode, self.needs, self.batch_size)

    def _of_inception(self, images: ImageSet, evaluation: Evaluation) -> Evaluation:
        keep, needs = self.keep or Wanted(), self.needs
        wanted = Wanted(needs.spatial or keep.spatial, needs.features or keep.features)
        own = features.statistics_of(self._inception, images, self.mode, wanted, self.batch_size)
        found, notes, compared = [], [], [each for each in self.metrics if each in OF_INCEPTION]
        if compared:
            reference = self._reference_statistics
            assert reference is not None
            found, notes = compare(own, reference, compared), few_images(own, reference, compared)
        if Metric.INCEPTION_SCORE in self.metrics:
            assert self.head is not None
            found.append(_of_classes(own, self.head._replace(bias=None), "inception_score"))
        if Metric.PROBE_SCORE in self.metrics:
            assert self.probe is not None
            found.append(_of_classes(own, self.probe, "probe_score"))
        return evaluation._replace(scores=found, statistics=own, notes=notes)

    # CLIP

    def _of_clip(self, images: ImageSet, prompts: Sequence[str] | None) -> list[Score]:
        assert self.clip is not None
        name, count, found = self.clip.image.name, len(images.names), []
        own = self._embeddings(images)
        if Metric.CMMD in self.metrics:
            reference = self._reference_embeddings
            convention = f"{name}, σ 10, × 1000"
            found.append(Score("cmmd", distances.mmd(own, reference), None, count, len(reference), "none", convention))
        if Metric.CLIP_SCORE in self.metrics:
            assert prompts is not None and self.clip.text is not None
            cosines = (own * self.clip.text(prompts)).sum(axis=1, dtype=np.float64)
            convention = f"{name}, 100 · max(cosine, 0)"
            found.append(Score("clip_score", *_mean(100 * cosines.clip(0)), count, None, "none", convention))
        return found

    @functools.cached_property
    def _reference_embeddings(self) -> Float32[np.ndarray, "images projection"]:
        assert self.reference is not None and not isinstance(self.reference, Statistics)
        return self._embeddings(self.reference)

    def _embeddings(self, images: ImageSet) -> Float32[np.ndarray, "images projection"]:
        assert self.clip is not None
        network, count = self.clip.image, len(images.names)
        batches = features.rows(
            network,
            lambda number: network.prepare(images.pixels(number)),
            features.own_part(count),
            self.batch_size,
            f"CLIP embeddings of {images.source}",
        )
        return features.of_all_processes(np.concatenate(list(batches)), count)

    # Pairs

    @functools.cached_property
    def _perceptual(self) -> Network:
        return perceptual(self.metrics)

    def _of_pairs(self, images: ImageSet, metrics: Sequence[Metric]) -> list[Score]:
        reference, count = self.reference, len(images.names)
        assert reference is not None and not isinstance(reference, Statistics)
        part = features.own_part(count)
        on_host = {metric: np.empty(count) for metric in metrics if metric in _ON_HOST}

        def load(number: int) -> tuple[Any, Any]:
            pair = images.pixels(number), reference.pixels(number)
            for metric, found in on_host.items():
                found[number] = _ON_HOST[metric](*(image[None] for image in pair))[0]
            return pair

        title = f"pairs of {images.source}"
        batches = list(features.rows(self._perceptual, load, part, self.batch_size, title))
        found = []
        for metric in metrics:
            if metric in on_host:
                own = on_host[metric][part.start : part.stop]
            else:
                own = np.concatenate([batch[metric.value] for batch in batches])
            of_all = features.of_all_processes(own, count)
            found.append(Score(metric.value, *_mean(of_all), count, count, "none", _PAIRS[metric]))
        return found


# Checks, before work begins


def _named(kind: Any, value: Any, option: str) -> Any:
    """The member of an enum by its value. Raises InputError for an unknown one."""
    known = [member.value for member in kind]
    if not isinstance(value, kind) and value not in known:
        raise InputError(f"{option} has {value!r}. Known: {', '.join(known)}")
    return kind(value)


def _opened(images: Any, what: str) -> ImageSet:
    if isinstance(images, str | PurePath):
        return image_sets.open_images(images, what)
    return image_sets.of_array(images, what) if isinstance(images, np.ndarray) else images


def _opened_reference(reference: Any, said: ResizeMode | None, mode: ResizeMode | None) -> ImageSet | Statistics | None:
    """said: the mode of a file that does not say its own. mode: the one that is wanted."""
    if reference is None or isinstance(reference, Statistics):
        return reference
    if isinstance(reference, str | PurePath):
        path = located(reference, "the reference")
        if path.suffix in (".npz", ".pkl", ".pickle") and path.is_file():
            copy = local_copy(path)
            if statistics.holds_statistics(copy):
                return statistics.load(copy, said)._replace(source=str(path))
    return _opened(reference, "the reference")


def _check_stored(reference: Statistics, mode: ResizeMode, wanted: Sequence[Metric]) -> None:
    statistics.check_comparable(
        reference._replace(network=statistics.INCEPTION, resize=mode, source="--resize"), reference
    )
    without = [each.value for each in wanted if each in (Metric.KID, Metric.PRECISION_RECALL)]
    if without and reference.features is None:
        raise InputError(
            f"{without[0]} needs every feature of the reference, and {reference.source} has only their mean and "
            "covariance. Give its images, or statistics saved with --save-features"
        )
    if Metric.SFID in wanted:
        statistics.check_spatial(reference)


def _check_given(wanted: Sequence[Metric], clip: Clip | None, head: Linear | None, probe: Linear | None) -> None:
    remedies = {
        Metric.INCEPTION_SCORE: (head, "--inception-head FILE.npz, the kernel [2048, 1008] of its logits without bias"),
        Metric.PROBE_SCORE: (probe, "--probe FILE.npz, the kernel [2048, classes] of a linear classifier"),
        Metric.CMMD: (clip, "--clip MODEL, which for published figures is OpenAI's ViT-L/14 at 336 pixels"),
        Metric.CLIP_SCORE: (clip, "--clip MODEL, both towers of a CLIP model"),
    }
    for metric in wanted:
        if metric in remedies and remedies[metric][0] is None:
            raise InputError(
                f"{metric.value} needs weights that are neither part of FID's network nor given. Give "
                f"{remedies[metric][1]}; or leave the metric out"
            )
    if Metric.CLIP_SCORE in wanted and clip is not None and clip.text is None:
        raise InputError(
            f"clip_score needs the text tower, too, and --clip {clip.image.name} has none ({clip.reason}). Give a "
            "whole CLIP model"
        )


def _check_pairs(images: ImageSet, reference: ImageSet, metric: str) -> None:
    stems = [[name.rpartition(".")[0] or name for name in each.names] for each in (images, reference)]
    if stems[0] != stems[1]:
        only = sorted(set(stems[0]) ^ set(stems[1]))
        named = f"{len(only)} without a counterpart, e.g. {only[0]}" if only else "the same names twice"
        raise InputError(
            f"{metric} compares the images of {images.source} and {reference.source} that have the same names, and "
            f"there are {named}. Give folders with the same names"
        )
    differing = np.flatnonzero((images.sizes != reference.sizes).any(axis=1))
    if len(differing):
        first = differing[0]
        (height, width), (other_height, other_width) = images.sizes[first], reference.sizes[first]
        raise InputError(
            f"{metric} compares pixels, and {images.names[first]} is {height}×{width} in {images.source}, "
            f"{other_height}×{other_width} in {reference.source}. Crop them to the same size first"
        )
    image_sets.check_one_size(images)


def weights_of(wanted: Sequence[Metric], keep: Wanted | None = None) -> list[str]:
    """The names of the networks' weights that metrics need, as in `weights.NAMES`."""
    of_inception = keep is not None or any(each in (*OF_INCEPTION, *OF_CLASSES) for each in wanted)
    names = ["inception"] if of_inception else []
    names += ["lpips_alex"] if Metric.LPIPS_ALEX in wanted else []
    return names + (["lpips_vgg"] if Metric.LPIPS_VGG in wanted or Metric.PSIM in wanted else [])


def read_linear(path: str | PurePath, option: str) -> Linear:
    """A linear classifier of Inception's features from an .npz. Raises InputError for any other file."""
    where = located(path, option)
    if not where.is_file():
        raise InputError(f"{option} is {where}, which does not exist. Give an .npz with kernel [2048, classes]")
    copy = local_copy(where)
    with statistics.open_arrays(copy) as file:
        arrays = {name: statistics.read_array(file, name, copy) for name in ("kernel", "bias") if name in file}
    kernel = arrays.get("kernel")
    if kernel is None or kernel.ndim != 2 or kernel.shape[0] != FEATURES:
        shape = "is missing" if kernel is None else f"is {' × '.join(map(str, kernel.shape))}"
        raise InputError(f"{option} {where}: the kernel {shape}, expected {FEATURES} × classes. Give another file")
    return Linear(kernel, arrays.get("bias"), where.stem)


# Scores of arrays


def few_images(one: Statistics, other: Statistics, wanted: Sequence[Metric]) -> list[str]:
    """A note where there are too few images for FID."""
    fewest = min((each.images for each in (one, other) if each.images is not None), default=FEATURES)
    if fewest >= FEATURES or not {Metric.FID, Metric.SFID} & set(wanted):
        return []
    return [
        f"FID of {fewest} images is much too high: below {FEATURES} the covariance is singular. KID is unbiased"
        f"{'' if Metric.KID in wanted else ' (--metrics kid)'}"
    ]


def compare(one: Statistics, other: Statistics, metrics: Sequence[Metric]) -> list[Score]:
    """Scores of two sets of Inception's features: of `OF_INCEPTION`. KID, precision and recall need all features.

    Raises InputError for statistics that cannot be compared.
    """
    statistics.check_comparable(one, other)
    score = functools.partial(
        Score,
        images=one.images or 0,
        reference_images=other.images,
        resize=one.resize.value,
    )
    scores = []
    for metric in metrics:
        if metric is Metric.FID:
            scores.append(score("fid", statistics.fid(one, other), None, convention=one.network))
        elif metric is Metric.SFID:
            convention = f"{one.network}, spatial features"
            scores.append(score("sfid", statistics.sfid(one, other), None, convention=convention))
        else:
            assert one.features is not None and other.features is not None
            x, y = one.features, other.features
            if metric is Metric.KID:
                size = min(1000, len(x), len(y))
                convention = f"{one.network}, × 1, 100 subsets of {size}"
                scores.append(score("kid", *distances.kid(x, y), convention=convention))
                continue
            _check_neighbours(one, other)
            both = distances.precision_recall(x, y)
            convention = f"{one.network}, k 3"
            scores.append(score("precision", both.precision, None, convention=convention))
            scores.append(score("recall", both.recall, None, convention=convention))
    return scores


def _check_neighbours(*sets: Statistics) -> None:
    for each in sets:
        assert each.features is not None
        if len(each.features) <= 3:
            raise InputError(f"{each.source} has {len(each.features)} images. precision_recall needs more than 3")


def _of_classes(one: Statistics, linear: Linear, name: str) -> Score:
    assert one.features is not None
    logits = one.features.astype(np.float64) @ linear.kernel
    logits = logits if linear.bias is None else logits + linear.bias
    splits = 10 if len(logits) >= 100 else 1
    result = distances.inception_score(logits, splits)
    return Score(name, *result, len(logits), None, one.resize.value, f"classifier {linear.name}, {splits} splits")


def _mean(values: Shaped[np.ndarray, " images"]) -> MeanDeviation:
    return MeanDeviation(float(np.mean(values)), float(np.std(values)) if np.isfinite(values).all() else float("nan"))


_ON_HOST = {Metric.PSNR: image_metrics.psnr, Metric.SSIM: image_metrics.ssim}
_PAIRS = {
    Metric.PSNR: "dB, mean over images",
    Metric.SSIM: "Gaussian 11×11, σ 1.5, valid region",
    Metric.LPIPS_ALEX: "LPIPS 0.1, AlexNet",
    Metric.LPIPS_VGG: "LPIPS 0.1, VGG16",
    Metric.PSIM: "VGG16, Σ (1 − mean cosine); not LPIPS",
}


def perceptual(metrics: Sequence[Metric]) -> Network:
    """The perceptual distances among the metrics, of pairs of images 0..255. Rows are a dict by the metric's value."""
    backbones = {Metric.LPIPS_ALEX: Backbone.ALEX, Metric.LPIPS_VGG: Backbone.VGG, Metric.PSIM: Backbone.VGG}
    of_network = [metric for metric in metrics if metric in backbones]
    params = {name: weights.load(name) for name in weights_of(of_network)}

    def apply(params: Params, pair: tuple[Any, Any]) -> dict[str, Float32[jax.Array, " batch"]]:
        x, y = map(normalise, pair)
        found = {}
        for metric in of_network:
            backbone = backbones[metric]
            own = params[f"lpips_{backbone.value}"]
            distance = lpips.psim(own, x, y) if metric is Metric.PSIM else lpips.lpips(backbone, own, x, y)
            found[metric.value] = distance
        return found

    return Network("lpips", lambda image: image, jax.jit(apply), params)


def _of_function(
    images: ImageSet, prompts: Sequence[str] | None, name: str, function: ImageScore, batch_size: int
) -> Score:
    """The mean of a user's own score."""
    count, found = len(images.names), list[float]()
    texts = [""] * count if prompts is None else prompts
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        values = function([images.pixels(number) for number in numbers], [texts[number] for number in numbers])
        if len(values) != len(numbers):
            raise InputError(f"{name} gave {len(values)} scores for {len(numbers)} images. Return one per image")
        found += map(float, values)
    return Score(name, *_mean(np.array(found)), count, None, "none", "mean over images")
