"""What the file of an adapter says of its training, by the names of sd-scripts' `train_network.py`, as far as it is
known here. What the adapter is, the writer adds (`weights/adapter_files/export`).

Times are not written: a resumed run writes the file of one that was not interrupted. Neither is `ss_num_reg_images`:
which sources are images of the class is not said by the configuration.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from sdxl_jax.adapters.targets import AdapterConfig
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.diffusion.loss import MIN_SNR_GAMMA, Weighting
from sdxl_jax.weights.adapter_files.metadata import family


def of_training(
    config: TrainConfig, adapter: AdapterConfig, factors: Iterable[str], step: int, dataset: BucketedDataset | None
) -> dict[str, str]:
    """The metadata after a step. factors: their paths, "unet/…/kernel/down"."""
    training, loss, optimiser = config.training, config.loss, config.optimiser
    values = {
        "ss_steps": step,
        "ss_max_train_steps": training.steps,
        "ss_learning_rate": optimiser.learning_rate,
        "ss_optimizer": optimiser.kind.value,
        "ss_lr_scheduler": optimiser.decay.value,
        "ss_lr_warmup_steps": optimiser.warmup_steps,
        "ss_mixed_precision": {"float32": "no", "bfloat16": "bf16"}[config.compute.dtype.value],
        "ss_seed": training.seed,
        "ss_total_batch_size": config.data.batch_size,
        "ss_gradient_accumulation_steps": optimiser.accumulate,
        "ss_max_grad_norm": optimiser.clip_norm,
        "ss_noise_offset": loss.offset_noise,
        "ss_min_snr_gamma": (loss.min_snr_gamma or MIN_SNR_GAMMA) if loss.weighting is Weighting.MIN_SNR else None,
        "ss_zero_terminal_snr": config.model.schedule.zero_terminal_snr,
        "ss_caption_dropout_rate": training.caption_dropout,
        "ss_scale_weight_norms": adapter.norm_limit,
        "ss_network_dropout": None,
        "ss_v2": family(config.model)[0] == "sd_v2",
        "ss_sd_model_name": Path(training.init_from[-1]).name if training.init_from else None,
        **_rates(config, factors),
        **_of_data(config, step, dataset),
    }
    token = None if config.textual_inversion is None else config.textual_inversion.token
    if trigger := adapter.trigger_phrase or config.data.trigger or token:
        values["modelspec.trigger_phrase"] = trigger
    return {name: str(value) for name, value in values.items()}


def _rates(config: TrainConfig, factors: Iterable[str]) -> dict[str, object]:
    """The learning rates of the UNet and of the text encoders, each where it is one."""
    found: dict[str, set[float]] = {}
    for path in factors:
        name = "ss_unet_lr" if path.startswith("unet/") else "ss_text_encoder_lr"
        factor = next((factor for pattern, factor in config.optimiser.rates if re.search(pattern, path)), 1.0)
        found.setdefault(name, set()).add(config.optimiser.learning_rate * factor)
    return {name: next(iter(rates)) for name, rates in found.items() if len(rates) == 1}


def _of_data(config: TrainConfig, step: int, dataset: BucketedDataset | None) -> dict[str, object]:
    weights = {source.loss_weight for source in config.data.sources} - {1.0}
    values: dict[str, object] = {"ss_prior_loss_weight": weights.pop()} if len(weights) == 1 else {}
    if len(config.data.buckets) == 1:
        ((height, width),) = config.data.buckets
        values["ss_resolution"] = f"({width}, {height})"
    if dataset is None:
        return values
    used = [each for each in dataset.report() if each.images and each.merged_into is None]
    batches = sum(each.batches for each in used)
    buckets = {n: {"resolution": [each.width, each.height], "count": each.images} for n, each in enumerate(used)}
    return values | {
        "ss_num_train_images": sum(each.images for each in used),
        "ss_num_batches_per_epoch": math.ceil(batches),
        "ss_num_epochs": math.ceil(config.training.steps / batches),
        "ss_epoch": int(step / batches),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }
