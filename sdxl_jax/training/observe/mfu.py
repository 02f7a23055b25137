"""Model FLOPs utilisation (MFU): the FLOPs of the mathematics per second, divided by the devices' peak. Chowdhery et
al. 2022 (PaLM), arXiv:2204.02311, appendix B.

Model FLOPs (`Objective.model_flops`) leave out what rematerialisation computes a second time.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.flops import chip_of


class MfuMeter:
    """Computes the MFU of steps, once the FLOPs of their bucket are counted."""

    def __init__(self, flops: Callable[[Bucket], float], peak: float):
        """flops: of one step of a bucket, over all devices. peak: FLOP/s of all devices together."""
        self._flops, self._peak = flops, peak
        self._counted = dict[Bucket, float]()

    def count(self, bucket: Bucket) -> None:
        """Counts the FLOPs of a bucket's step. Takes as long as tracing the step: not for the training thread."""
        self._counted[bucket] = self._flops(bucket)

    def mfu(self, bucket: Bucket, seconds: float) -> float | None:
        """The MFU, 0 to 1, of a step that took this long; None before its FLOPs are counted."""
        flops = self._counted.get(bucket)
        return None if flops is None else flops / seconds / self._peak

    @classmethod
    def of(cls, flops: Callable[[Bucket], float], devices: Sequence[Any]) -> "MfuMeter | None":
        """The meter for jax devices, all of one kind; None for devices without a known peak, such as CPUs."""
        chip = chip_of(devices[0].device_kind)
        return None if chip is None else cls(flops, chip.flops_per_second * len(devices))
