"""Model FLOPs utilisation (MFU): the share of the devices' peak FLOP/s that the model's own operations take. Chowdhery et
al. 2022 (PaLM), arXiv:2204.02311, appendix B.

Counted are the operations of the mathematics, `Objective.model_flops`: nothing that rematerialisation computes twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.flops import chip_of


class MfuMeter:
    """The MFU of steps of each bucket, once their FLOPs are counted."""

    def __init__(self, flops: Callable[[Bucket], float], peak: float):
        """flops: of one step, over all devices. peak: FLOP/s of all devices together."""
        self._flops, self._peak = flops, peak
        self._counted = dict[Bucket, float]()

    def count(self, bucket: Bucket) -> None:
        """Takes as long as tracing the step: not for the thread that trains."""
        self._counted[bucket] = self._flops(bucket)

    def mfu(self, bucket: Bucket, seconds: float) -> float | None:
        """0 to 1, of a step that took so long; None before its FLOPs are counted."""
        flops = self._counted.get(bucket)
        return None if flops is None else flops / seconds / self._peak

    @classmethod
    def of(cls, flops: Callable[[Bucket], float], devices: Sequence[Any]) -> "MfuMeter | None":
        """devices: jax's, all of one kind. None for devices without a known peak, such as CPUs."""
        chip = chip_of(devices[0].device_kind)
        return None if chip is None else cls(flops, chip.flops_per_second * len(devices))
