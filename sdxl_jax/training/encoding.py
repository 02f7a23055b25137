"""The program of `sdxl-jax data encode`: the frozen encoders run once, on every crop and caption.

    images ── K crops each ── autoencoder ── mean, log-variance ─┐
    captions ── tokens ── text towers ── states, pooled ─────────┴─ bfloat16 ── cache (data.cache)

With `image_prompt`, the crops go through CLIP's image tower too.

The posterior's moments are stored, not a sample, so that training samples from it at every step. The cache records
its provenance: the images, their crops and buckets, the encoders' weights, and this code. Training computes the same
record, and refuses a cache with another one.

Processes divide the pieces among themselves; an interrupted one continues with the missing pieces.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from sdxl_jax import arrays, sharding
from sdxl_jax.arrays import ImageBytes, Params, TokenIds, flatten, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import RunConfig, TrainConfig
from sdxl_jax.data.cache import CachePlan, Crop, PieceWriter, Text, begin, open_cache
from sdxl_jax.data.crops import Crops, load_crops
from sdxl_jax.data.pipeline import FEW, BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import autoencoder
from sdxl_jax.models import clip_vision, vae
from sdxl_jax.progress import tqdm
from sdxl_jax.sampling.clip_images import preprocess
from sdxl_jax.sampling.image_prompts import check_width
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.checksums import checksums
from sdxl_jax.training.initial import initial_weights, random_weights
from sdxl_jax.training.state import partition
from sdxl_jax.weights.clip_vision import ImageTower, open_tower
from sdxl_jax.weights.lazy import abstract_leaves, part_configs

_CODE = (
    *("arrays.py", "conditioning/clip_merges.txt.gz", "conditioning/text.py", "data/crops.py", "data/images.py"),
    *("data/loader.py", "data/transforms.py", "models/attention.py", "models/clip.py", "models/layers.py"),
    *("models/clip_vision.py", "sampling/clip_images.py"),
    *("models/vae.py", "models/taesd.py", "models/wavelet.py", "training/encoding.py"),
)
"""Files that determine the content of a cache."""


def encoder_parts(config: TrainConfig) -> list[str]:
    """The parts of the model whose outputs a cache holds."""
    return [part for part in part_configs(config.model) if part != "unet"]


def fingerprint(params: Params) -> str:
    """A hash of the values of parameters, independent of their sharding and of the dtype that they are stored in."""
    leaves = dict(sorted(flatten(params).items()))
    sums = checksums(map(jnp.asarray, leaves.values()), jnp.float32)
    lines = [f"{path} {leaf.shape} {number}\n" for (path, leaf), number in zip(leaves.items(), sums, strict=True)]
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()


def image_tower(config: TrainConfig) -> ImageTower | None:
    """The image tower of `image_prompt`, opened; None: there are no image prompts. Raises InputError for one that does
    not fit the model."""
    if config.image_prompt is None:
        return None
    try:
        tower = open_tower(config.image_prompt.encoder)
        check_width(config.model, tower.config.projection_dim)
    except InputError as error:
        raise InputError(f"image_prompt.encoder={config.image_prompt.encoder}: {error}") from error
    return tower


@functools.cache
def _code() -> str:
    contents = (resources.files("sdxl_jax").joinpath(name).read_bytes() for name in _CODE)
    return hashlib.blake2b(b"\0".join(contents), digest_size=16).hexdigest()


def made_from(config: TrainConfig, dataset: BucketedDataset, params: Params) -> dict[str, Any]:
    """The provenance of a cache of this configuration. `params` hold the encoders, `dataset` the images."""
    data = config.data
    encoders = {part: params[part]["encoder"] if part == "vae" else params[part] for part in encoder_parts(config)}
    weights = {
        part: {"config": to_json(part_configs(config.model)[part]), "values": fingerprint(values)}
        for part, values in encoders.items()
    }
    if (tower := image_tower(config)) is not None:
        weights["image_encoder"] = {"config": to_json(tower.config), "values": fingerprint(tower.load())}
    if not config.model.has_autoencoder:
        weights["vae"] = {"config": to_json(config.model.vae), "values": None}
    return {
        "images": dataset.source.fingerprints,
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
    """Raises InputError if a cache is given and an encoder is trainable."""
    if config.data.cache is None:
        return
    trained, _ = partition(unflatten(abstract_leaves(config.model)), config.training.trainable, config.training.layers)
    if trainable := [part for part in encoder_parts(config) if part in trained]:
        raise InputError(
            f"data.cache={config.data.cache} holds the outputs of {', '.join(trainable)} before training, but "
            'training.trainable makes it trainable. Train the UNet alone, training.trainable=("^unet/",), or leave out '
            "data.cache"
        )


def from_cache(config: TrainConfig, dataset: BucketedDataset, frozen: Params) -> BucketedDataset:
    """The data set, reading from `data.cache` if there is one.

    Raises InputError for a cache of another provenance (open_cache).
    """
    data = config.data
    if data.cache is None:
        return dataset
    ignore = ["precision", "code"] if data.cache_of_other_code else ["precision"]  # training may use another
    return dataset.reading(open_cache(data.cache, made_from(config, dataset, frozen), ignore=ignore))


_Rows = TypeVar("_Rows")


class _Encoders(NamedTuple):
    """The encoders, compiled for this process's devices, over which a batch is split."""

    mesh: Mesh
    batch_size: int
    images: Callable[[ImageBytes], vae.Posterior]
    captions: Callable[[dict[str, TokenIds]], text.TextConditioning]
    embeddings: Callable[[UInt8[np.ndarray, "images height width 3"]], Float[jax.Array, "batch projection"]] | None
    """Of crops on the host; None: there are no image prompts."""

    def put(self, rows: _Rows) -> _Rows:
        """Rows on the devices, padded to a whole batch by repeating the last one."""
        index = np.minimum(np.arange(self.batch_size), len(jax.tree.leaves(rows)[0]) - 1)
        return sharding.put_batch(self.mesh, jax.tree.map(lambda array: array[index], rows))


def _encoders(config: TrainConfig, params: Params, mesh: Mesh, batch_size: int) -> _Encoders:
    parts, compute = config.model, config.compute

    def rounded(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    @jax.jit
    def images(params: Params, image: ImageBytes) -> vae.Posterior:
        return rounded(vae.encode(parts.vae, autoencoder(params), arrays.normalise(image), compute))

    @jax.jit
    def captions(params: Params, tokens: dict[str, TokenIds]) -> text.TextConditioning:
        return rounded(text.encode(parts.text, params, tokens, compute))

    encoders = _Encoders(mesh, batch_size, functools.partial(images, params), functools.partial(captions, params), None)
    if (tower := image_tower(config)) is None:
        return encoders
    tower_params = jax.device_put(tower.load(), sharding.replicated(mesh))

    @jax.jit
    def embed(params: Params, pixels: Float[jax.Array, "batch side side 3"]) -> Float[jax.Array, "batch projection"]:
        return rounded(clip_vision.encode(tower.config, params, pixels, compute).embedding)

    def embeddings(crops: UInt8[np.ndarray, "images height width 3"]) -> Float[jax.Array, "batch projection"]:
        pixels = np.stack([preprocess(crop, tower.config.side) for crop in crops])
        return embed(tower_params, encoders.put(pixels))

    return encoders._replace(embeddings=embeddings)


class _Pending(NamedTuple):
    """A group of crops whose encoding has been dispatched."""

    crops: Crops
    tokens: dict[str, TokenIds]
    """Token numbers of all captions, by tower."""
    posteriors: list[vae.Posterior]
    """One per crop, each of a batch of images."""
    conditions: list[text.TextConditioning]
    """One per batch of captions."""
    embeddings: list[Float[jax.Array, "batch projection"]] | None
    """One per crop, each of a batch of images; None: there are no image prompts."""


def _start(encoders: _Encoders, tokenizer: Tokenizer, crops: Crops) -> _Pending:
    captions = [caption for captions in crops.captions for caption in captions] if tokenizer.towers else []
    tokens: dict[str, Any] = dict(tokenizer(captions))
    count = max(map(len, crops.examples))
    posteriors = [encoders.images(encoders.put(crops.pixels(crop))) for crop in range(count)]
    conditions = []
    for start in range(0, len(captions), encoders.batch_size):
        batch = {name: rows[start : start + encoders.batch_size] for name, rows in tokens.items()}
        conditions.append(encoders.captions(encoders.put(batch)))
    embed = encoders.embeddings
    embeddings = None if embed is None else [embed(crops.pixels(crop)) for crop in range(count)]
    return _Pending(crops, tokens, posteriors, conditions, embeddings)


def _write(writer: PieceWriter, pending: _Pending) -> None:
    """Waits for the devices, and writes the group to the cache."""
    crops = pending.crops
    posteriors, embeddings = jax.device_get((pending.posteriors, pending.embeddings))
    of_crops = [None] * len(posteriors) if embeddings is None else embeddings
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
                embedding=None if embedding is None else embedding[row],
            )
            for posterior, embedding, example in zip(posteriors, of_crops, examples, strict=True)
        ]
        writer.add(encoded, list(itertools.islice(texts, len(captions))))


def _texts(tokens: Mapping[str, TokenIds], conditions: Sequence[text.TextConditioning]) -> Iterator[Text]:
    """One per caption, none without text encoders. conditions: batches on the host, of which the last is padded."""
    caption_rows = (
        (condition.context[row], condition.pooled, row)
        for condition in conditions
        if condition.context is not None
        for row in range(len(condition.context))
    )
    count = len(next(iter(tokens.values()), ()))
    for number, (context, every_pooled, row) in enumerate(itertools.islice(caption_rows, count)):
        pooled = None if every_pooled is None else np.asarray(every_pooled[row])
        row_tokens = {name: np.asarray(rows[number]) for name, rows in tokens.items()}
        yield Text(row_tokens, np.asarray(context), pooled)


class EncodeReport(NamedTuple):
    plan: CachePlan
    """Says which pieces are still missing."""
    refused: int
    """Images that could not be encoded in this run."""


def encode(
    config: RunConfig,
    *,
    batch_size: int = 8,
    share: tuple[int, int] | None = None,
    piece_images: int = 1024,
    progress: bool = True,
) -> EncodeReport:
    """Writes `config.data.cache`, or the pieces of it that are missing.

    Args:
        config: of the run that will read the cache: its data, model, weights (`training.init_from`) and compute.
        batch_size: images, or captions, per batch; rounded up to a multiple of this process's devices.
        share: (i, n): the i-th of every n pieces, 0 to n − 1. None: by jax's processes.
        piece_images: images per piece. Higher: fewer files, more is lost to an interruption.
        progress: show images and images per second at a terminal.

    An image that cannot be read is named and marked, and training replaces it.

    Raises InputError: no `data.cache`; a folder that holds another cache or other files; more unreadable images than
    `data.max_bad_share` allows; and whatever training refuses.
    """
    config, index, count = _checked(config, batch_size, share)
    assert config.data.cache is not None and config.data.crops_per_image is not None
    devices = jax.local_devices()
    batch_size = math.ceil(batch_size / len(devices)) * len(devices)
    mesh = sharding.make_mesh(MeshConfig(), devices)
    tokenizer = Tokenizer.of(config.model.text)
    dataset = BucketedDataset(config.data, tokenizer if config.wants_captions else None)
    with jax.set_mesh(mesh):
        params = _encoder_params(config, mesh, progress)
        plan = begin(
            config.data.cache,
            made_from=made_from(config, dataset, params),
            images=len(dataset.order.numbers),
            crops=config.data.crops_per_image,
            towers=tuple(tower.name for tower in config.model.text),
            piece_images=piece_images,
            embedding_width=0 if (tower := image_tower(config)) is None else tower.config.projection_dim,
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
    """(configuration, index of this process's share, number of shares). Raises InputError as `encode` does."""
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"data encode expects the configuration of a diffusion model, whose encoders are frozen; this is an "
            f"{type(config).__name__}. Give a file whose get_config() returns a TrainConfig"
        )
    config.check()
    if config.data.cache is None or config.data.crops_per_image is None:
        raise InputError("data.cache is not given. Give the folder to write to: --data.cache DIR")
    check_frozen(config)
    index, count = share or (jax.process_index(), jax.process_count())
    if batch_size < 1 or not 0 <= index < count:
        raise InputError(
            f"batch_size={batch_size} and share={index},{count} cannot be used. Give a batch_size of 1 or more, and a "
            "share from 0 to below the number of shares, which is 1 or more"
        )
    return config, index, count


@dataclasses.dataclass
class _Tally:
    """Counts of images so far."""

    max_bad_share: float
    seen: int = 0
    refused: int = 0

    def add(self, crops: Crops) -> None:
        """Prints the images that cannot be encoded. Raises InputError for too many of them."""
        self.seen += len(crops.reasons)
        for reason in filter(None, crops.reasons):
            self.refused += 1
            tqdm.write(f"  cannot be encoded: {reason}")
            if self.refused > self.max_bad_share * max(self.seen, FEW):
                raise InputError(
                    f"{self.refused} of the first {self.seen} images cannot be encoded, more than "
                    f"data.max_bad_share={self.max_bad_share} allows. The last: {reason}\nFix the images and run the "
                    "same command again: it resumes, and this piece was not written. Or raise data.max_bad_share"
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
        for crops in load_crops(dataset, plan.images_of(piece), encoders.batch_size):
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
    """The encoders' parameters, as at the start of a run of this configuration."""
    parts = encoder_parts(config)
    options: Any = {"parts": parts, "base_dtype": config.base_dtype, "progress": progress}
    initial = initial_weights(config.training, config.model, mesh, **options)
    random = random_weights(config.training, config.model, mesh, given=initial, **options)
    if random and progress:
        named = sorted({path.split("/")[0] for path in random})
        tqdm.write(f"  at random weights, at least in part: {', '.join(named)}")
    return unflatten(random | initial)
