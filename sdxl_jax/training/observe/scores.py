"""Metrics of the model during training (`validation.metrics`): of its images for a fixed set of examples of the data.

The set is the same in every start: the largest bucket's images, evenly spread, each as a centred crop. All processes
compute the scores together. Mathematics, networks and weights are those of evaluation/.
"""

import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sdxl_jax.data.buckets import assign
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.transforms import centred_crop
from sdxl_jax.evaluation.scores import Measurement
from sdxl_jax.model import Model
from sdxl_jax.training.objectives.base import Examples, Objective
from sdxl_jax.training.processes import Processes


class Scores:
    """The scores of a run. The examples, and what the metrics need of them, are read once, when they are needed."""

    def __init__(self, objective: Objective[Any], dataset: BucketedDataset, mesh: Mesh, processes: Processes):
        self._objective, self._dataset, self._mesh, self._processes = objective, dataset, mesh, processes

    @property
    def every(self) -> int | None:
        """Steps between measurements; None: there are no metrics."""
        config = self._objective.validation_metrics
        return config.metrics_every_steps if config is not None and config.metrics else None

    def of(self, model: Model) -> dict[str, float]:
        """By name, as in `ValidationMetricsConfig.scores`."""
        images = self._objective.counterparts(model, self._examples, self._mesh, self._processes)
        return {f"validation_{score.name}": score.value for score in self._measurement.of(images).scores}

    @functools.cached_property
    def _examples(self) -> Examples:
        config = self._objective.validation_metrics
        assert config is not None
        return fixed_examples(self._dataset, config.metrics_images)

    @functools.cached_property
    def _measurement(self) -> Measurement:
        config = self._objective.validation_metrics
        assert config is not None
        return Measurement(self._examples.images, metrics=config.metrics)


def fixed_examples(dataset: BucketedDataset, count: int) -> Examples:
    """Images of the bucket that has the most, evenly spread over the data; all, if there are fewer than `count`."""
    source, trained_on = dataset.source, np.unique(dataset.order.numbers)
    buckets = assign(source.sizes[trained_on], dataset.buckets).bucket
    largest = int(np.bincount(buckets).argmax())
    numbers = trained_on[buckets == largest]
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)]
    size = dataset.buckets[largest]
    images = np.stack([centred_crop(source.pixels(int(number), size), size) for number in numbers])
    captions = [next(iter(source.captions(int(number))), "") for number in numbers]
    return Examples(images, captions)
