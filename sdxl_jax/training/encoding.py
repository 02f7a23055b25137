"""The program after `sdxl-jax data encode`: the frozen encoders' work done once, for every crop and caption.

    images ── K crops each ── autoencoder ── mean, log-variance ─┐
    captions ── tokens ── text towers ── states, pooled ─────────┴─ bfloat16 ── cache (data.cache)

The posterior's moments are kept, not a sample, so that training draws its own each time. The cache says what it was
made from: the images, their crops and buckets, the encoders' weights, and this code. Training makes the same statement
about itself, and reads no cache that differs.

Processes share the pieces out; one that was interrupted goes on with those that are missing.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax import arrays, model, sharding
from sdxl_jax.arrays import ImageBytes, Params, TokenIds, flatten, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import RunConfig, TrainConfig
from sdxl_jax.data import crops as cropping
from sdxl_jax.data.cache import CachePlan, Crop, PieceWriter, Text, begin, open_cache
from sdxl_jax.data.crops import Crops
from sdxl_jax.data.pipeline import FEW, BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import to_json
from sdxl_jax.models import vae
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.checksums import checksums
from sdxl_jax.training.initial import initial_weights
from sdxl_jax.training.state import partition
from sdxl_jax.weights.lazy import part_configs

_CODE = (
    *("arrays.py", "conditioning/clip_merges.txt.gz", "conditioning/text.py", "data/crops.py", "data/images.py"),
    *("data/loader.py", "data/transforms.py", "models/attention.py", "models/clip.py", "models/layers.py"),
    *("models/vae.py", "models/taesd.py", "training/encoding.py"),
)
"""Files that decide what is encoded."""


def encoder_parts(config: TrainConfig) -> list[str]:
    """The parts of the model whose work a cache holds."""
    return [part for part in part_configs(config.model) if part != "unet"]


def fingerprint(params: Params) -> str:
    """Names the values of parameters, wherever they lie and in whatever precision they are kept."""
    leaves = dict(sorted(flatten(params).items()))
    sums = checksums(leaves.values(), jnp.float32)
    lines = [f"{path} {leaf.shape} {number}\n" for (path, leaf), number in zip(leaves.items(), sums, strict=True)]
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()


@functools.cache
def _code() -> str:
    contents = (resources.files("sdxl_jax").joinpath(name).read_bytes() for name in _CODE)
    return hashlib.blake2b(b"\0".join(contents), digest_size=16).hexdigest()


def made_from(config: TrainConfig, dataset: BucketedDataset, params: Params) -> dict[str, Any]:
    """What a cache of this configuration is made from. `params` hold the encoders, `dataset` the images."""
    data = config.data
    used = {part: params[part]["encoder"] if part == "vae" else params[part] for part in encoder_parts(config)}
    weights = {
        part: {"config": to_json(part_configs(config.model)[part]), "values": fingerprint(values)}
        for part, values in used.items()
    }
    return {
        "images": [source.fingerprint for source in dataset.source.sources],
        "buckets": dataset.assignment,
        "crops": {
            "each": data.crops_per_image,
            "mode": data.crop.value,
            "flips": data.flip_probability,
            "seed": data.seed,
        },
        "weights": weights,
        "text": {tower.name: to_json(tower) for tower in config.model.text},
        "precision": to_json(config.compute)["dtype"],
        "code": _code(),
    }


def check_frozen(config: TrainConfig) -> None:
    """Raises InputError where a cache is given and an encoder trains."""
    if config.data.cache is None:
        return
    abstract = jax.eval_shape(functools.partial(model.init, config=config.model), jax.random.key(0))
    trained, _ = partition(abstract, config.training.trainable)
    if trainable := [part for part in encoder_parts(config) if part in trained]:
        raise InputError(
            f"data.cache={config.data.cache} holds what the {', '.join(trainable)} made of the data before training, but "
            "training.trainable changes it. Train the UNet alone, training.trainable=^unet/, or without data.cache"
        )


def from_cache(config: TrainConfig, dataset: BucketedDataset, frozen: Params) -> BucketedDataset:
    """The data set as the configuration wants it read: from `data.cache`, or as it is.

    Raises InputError for a cache of something else (open_cache).
    """
    data = config.data
    if data.cache is None:
        return dataset
    ignore = ["precision", "code"] if data.cache_of_other_code else ["precision"]  # training may have another
    return dataset.reading(open_cache(data.cache, made_from(config, dataset, frozen), ignore=ignore))


class _Encoders(NamedTuple):
    """Compiled for this process's devices, over which a batch is split."""

    mesh: Mesh
    batch_size: int
    images: Callable[[ImageBytes], vae.Posterior]
    captions: Callable[[dict[str, TokenIds]], text.TextConditioning]

    def spread(self, rows: Any) -> Any:
        """Rows up to a whole batch, on the devices; missing ones repeat the last."""
        wanted = np.minimum(np.arange(self.batch_size), len(jax.tree.leaves(rows)[0]) - 1)
        return sharding.put_batch(self.mesh, jax.tree.map(lambda array: array[wanted], rows))


def _encoders(config: TrainConfig, params: Params, mesh: Mesh, batch_size: int) -> _Encoders:
    parts, compute = config.model, config.compute

    def rounded(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    @jax.jit
    def images(params: Params, image: ImageBytes) -> vae.Posterior:
        return rounded(vae.encode(parts.vae, params["vae"], arrays.normalise(image), compute))

    @jax.jit
    def captions(params: Params, tokens: dict[str, TokenIds]) -> text.TextConditioning:
        return rounded(text.encode(parts.text, params, tokens, compute))

    return _Encoders(mesh, batch_size, functools.partial(images, params), functools.partial(captions, params))


class _Pending(NamedTuple):
    """A group whose encoding has been started."""

    crops: Crops
    tokens: dict[str, TokenIds]
    """Of all captions, by tower."""
    posteriors: list[vae.Posterior]
    """One a crop, batch of images."""
    conditions: list[text.TextConditioning]
    """Batches of captions."""


def _start(encoders: _Encoders, tokenizer: Tokenizer, crops: Crops) -> _Pending:
    captions = [caption for captions in crops.captions for caption in captions]
    tokens: dict[str, Any] = dict(tokenizer(captions))
    count = max(map(len, crops.examples))
    posteriors = [encoders.images(encoders.spread(crops.pixels(crop))) for crop in range(count)]
    conditions = []
    for start in range(0, len(captions), encoders.batch_size):
        batch = {name: rows[start : start + encoders.batch_size] for name, rows in tokens.items()}
        conditions.append(encoders.captions(encoders.spread(batch)))
    return _Pending(crops, tokens, posteriors, conditions)


def _write(writer: PieceWriter, pending: _Pending) -> None:
    """Waits for the devices."""
    crops = pending.crops
    posteriors = jax.device_get(pending.posteriors)
    texts = _texts(pending.tokens, jax.device_get(pending.conditions))
    for row, (examples, reason, captions) in enumerate(zip(crops.examples, crops.reasons, crops.captions, strict=True)):
        if not examples:
            writer.refuse(reason)
            continue
        encoded = [
            Crop(
                mean=posterior.mean[row],
                log_variance=posterior.log_variance[row],
                original_size=example.original_size,
                crop_top_left=example.crop_top_left,
                target_size=example.target_size,
                flipped=example.flipped,
            )
            for posterior, example in zip(posteriors, examples, strict=True)
        ]
        writer.add(encoded, list(itertools.islice(texts, len(captions))))


def _texts(tokens: Mapping[str, Any], conditions: Any) -> Iterator[Text]:
    """One a caption, of batches of text.TextConditioning on the host; the last one is filled up."""
    rows = ((condition, row) for condition in conditions for row in range(len(condition.context)))
    count = len(next(iter(tokens.values())))
    for number, (condition, row) in enumerate(itertools.islice(rows, count)):
        pooled = None if condition.pooled is None else condition.pooled[row]
        yield Text({name: each[number] for name, each in tokens.items()}, condition.context[row], pooled)


class EncodeReport(NamedTuple):
    plan: CachePlan
    """Which knows what is missing still."""
    refused: int
    """Images that could not be encoded this time."""


def encode(
    config: RunConfig,
    *,
    batch_size: int = 8,
    share: tuple[int, int] | None = None,
    piece_images: int = 1024,
    progress: bool = True,
) -> EncodeReport:
    """Writes `config.data.cache`, or what is missing of it.

    Args:
        config: of the training that is to read the cache: its data, model, weights (`training.init_from`) and compute.
        batch_size: images, or captions, encoded at once; rounded up to a multiple of this process's devices.
        share: (i, n): of every n pieces, the i-th, 0 to n − 1. None: by jax's processes.
        piece_images: images a piece. Higher: fewer files, more is lost to an interruption.
        progress: show images and images a second at a terminal.

    An image that cannot be read is named and marked, and training replaces it.

    Raises InputError: no `data.cache`; a folder that holds another cache or other files; more images that cannot be
    read than `data.max_bad_share` allows; and as training does.
    """
    config, index, count = _checked(config, batch_size, share)
    assert config.data.cache is not None and config.data.crops_per_image is not None
    devices = jax.local_devices()
    batch_size = math.ceil(batch_size / len(devices)) * len(devices)
    mesh = sharding.make_mesh(MeshConfig(), devices)
    tokenizer = Tokenizer.of(config.model.text)
    dataset = BucketedDataset(config.data, tokenizer)
    with jax.set_mesh(mesh):
        params = _encoder_params(config, mesh, progress)
        plan = begin(
            config.data.cache,
            made_from=made_from(config, dataset, params),
            images=len(dataset.order.numbers),
            crops=config.data.crops_per_image,
            towers=tuple(tower.name for tower in config.model.text),
            piece_images=piece_images,
        )
        encoders = _encoders(config, params, mesh, batch_size)
        pieces = plan.missing(index, count)
        images = sum(len(plan.images_of(piece)) for piece in pieces)
        with tqdm(desc="encoding", unit=" images", total=images, disable=None if progress else True) as bar:
            tally = _Tally(config.data.max_bad_share)
            for piece in pieces:
                _encode_piece(encoders, tokenizer, dataset, plan, piece, tally, bar)
    if not plan.missing():
        plan.clean()
    return EncodeReport(plan, tally.refused)


def _checked(config: RunConfig, batch_size: int, share: tuple[int, int] | None) -> tuple[TrainConfig, int, int]:
    """(configuration, this process's share, of how many). Raises InputError as `encode`."""
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"data encode is for runs that learn to denoise, whose encoders are frozen; this is an "
            f"{type(config).__name__}. Give a file whose get_config() returns a TrainConfig"
        )
    config.check()
    if config.data.cache is None or config.data.crops_per_image is None:
        raise InputError("data.cache is not given. Give the folder to write to: --data.cache DIR")
    check_frozen(config)
    index, count = share or (jax.process_index(), jax.process_count())
    if batch_size < 1 or not 0 <= index < count:
        raise InputError(
            f"batch_size={batch_size}, share {index} of {count}. Expected a batch of 1 or more, and a share from 0 to "
            "the last below their number"
        )
    return config, index, count


@dataclasses.dataclass
class _Tally:
    """Images of this run so far."""

    max_bad_share: float
    seen: int = 0
    refused: int = 0

    def add(self, crops: Crops) -> None:
        """Names those that cannot be encoded. Raises InputError where they are too many."""
        self.seen += len(crops.reasons)
        for reason in filter(None, crops.reasons):
            self.refused += 1
            tqdm.write(f"  cannot be encoded: {reason}")
            if self.refused > self.max_bad_share * max(self.seen, FEW):
                raise InputError(
                    f"{self.refused} of the first {self.seen} images cannot be encoded, more than "
                    f"data.max_bad_share={self.max_bad_share} allows. The last: {reason}\nMend what is wrong and run "
                    "the same command again: it goes on, and this piece was not written. Or raise data.max_bad_share."
                )


def _encode_piece(
    encoders: _Encoders,
    tokenizer: Tokenizer,
    dataset: BucketedDataset,
    plan: CachePlan,
    piece: int,
    tally: _Tally,
    bar: tqdm,
) -> None:
    pending = None
    with PieceWriter(plan, piece) as writer:
        for crops in cropping.load(dataset, plan.images_of(piece), encoders.batch_size):
            tally.add(crops)
            started = _start(encoders, tokenizer, crops)
            if pending is not None:
                _write(writer, pending)  # while the devices work on the next group
            pending = started
            bar.update(len(crops.examples))
        assert pending is not None
        _write(writer, pending)
        writer.finish()


def _encoder_params(config: TrainConfig, mesh: Mesh, progress: bool) -> Params:
    """The encoders as a run of this configuration starts with them."""
    parts = encoder_parts(config)
    initial = initial_weights(config.training, config.model, mesh, parts=parts, progress=progress)

    def make(key: jax.Array) -> Params:
        fresh = flatten(model.init(key, config.model))
        return {path: leaf for path, leaf in fresh.items() if path not in initial and path.split("/")[0] in parts}

    missing = jax.eval_shape(make, jax.random.key(0))
    if progress and missing:
        random = sorted({path.split("/")[0] for path in missing})
        tqdm.write(f"  at random weights, wholly or in part: {', '.join(random)}")
    places = flatten(sharding.place(mesh, unflatten(missing)))
    return unflatten(jax.jit(make, out_shardings=places)(jax.random.key(config.training.seed)) | initial)
