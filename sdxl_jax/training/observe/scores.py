"""Metrics of the model during training (`validation.metrics`): of its images for a fixed set of examples of the data.

The set is the same in every start: the largest bucket's images, evenly spread, each as a centred crop. All processes
compute the scores together. Mathematics, networks and weights are those of evaluation/.
"""

import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sdxl_jax.data.examples import buckets_of, crop_of, evenly_spread, images_of
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.evaluation.scores import Measurement
from sdxl_jax.model import Model
from sdxl_jax.training.objectives.base import Examples, Objective
from sdxl_jax.training.processes import Processes


class Scores:
    """The scores of a run. The examples, and what the metrics need of them, are read once, when they are needed."""

    def __init__(self, objective: Objective[Any], dataset: BucketedDataset, mesh: Mesh, processes: Processes):
        self._objective, self._dataset, self._mesh, self._processes = objective, dataset, mesh, processes
        self._config = objective.config.validation_metrics

    @property
    def every(self) -> int | None:
        """Steps between measurements; None: there are no metrics."""
        return self._config.metrics_every_steps if self._config is not None and self._config.metrics else None

    def of(self, model: Model) -> dict[str, float]:
        """By name, as in `ValidationMetricsConfig.scores`."""
        examples, measurement = self._set
        images = self._objective.counterparts(model, examples, self._mesh, self._processes)
        return {f"validation_{score.name}": score.value for score in measurement.of(images).scores}

    @functools.cached_property
    def _set(self) -> tuple[Examples, Measurement]:
        assert self._config is not None
        examples = fixed_examples(self._dataset, self._config.metrics_images)
        return examples, Measurement(examples.images, metrics=self._config.metrics)


def fixed_examples(dataset: BucketedDataset, count: int) -> Examples:
    """Images of the bucket that has the most, evenly spread over the data; all, if there are fewer than `count`."""
    numbers = images_of(dataset)
    buckets = buckets_of(dataset, numbers)
    largest = int(np.bincount(buckets).argmax())
    size = dataset.buckets[largest]
    numbers = evenly_spread(numbers[buckets == largest], count)
    images = np.stack([crop_of(dataset, image, size) for image in numbers])
    captions = [next(iter(dataset.source.captions(int(image))), "") for image in numbers]
    name = dataset.config.label
    labels = None if name is None else [int(dataset.source.number(int(image), name)) for image in numbers]
    return Examples(images, captions, labels)
