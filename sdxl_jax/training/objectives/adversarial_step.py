"""The training step of an autoencoder with a discriminator, a learned log-variance or a schedule of its KL divergence.

    x ── autoencoder ── y ──┬── nll, g ── ∂/∂y ── λ ── one backward pass ── update, average
                            └── D(x), D(y) ── update of the discriminator

Both networks are updated in one step, from one forward pass of the autoencoder: why, and what the sources do, is in
docs/decisions/adversarial-step.md. The cotangents ∂nll/∂y and ∂g/∂y, each pulled back through the decoder's last
convolution alone, give λ; their weighted sum is then pulled back through the whole autoencoder, once.

With gradient accumulation each micro-batch has its own λ and its own statistics of batch norm, as in the sources.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int, Key

from sdxl_jax.arrays import Batch, Image, Params, normalise
from sdxl_jax.config import OnNonfinite, RunConfig
from sdxl_jax.models import patchgan, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.models.lpips import Backbone
from sdxl_jax.models.lpips import lpips as perceptual_distance
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import LearntVaeConfig
from sdxl_jax.optim import ema
from sdxl_jax.optim.optimiser import logged_rates, updates_made
from sdxl_jax.training.objectives import adversarial, reconstruction
from sdxl_jax.training.objectives.adversarial import Adversary, DiscriminatorConfig
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig
from sdxl_jax.training.state import TrainState, merge
from sdxl_jax.training.step import Metrics, Rows, Step, over_micro_batches, unless_skipped, updated_average

LPIPS = "lpips"
"""Where the frozen parameters have those of LPIPS."""
DISCRIMINATOR = "discriminator"
_LOSS, _LOG_VARIANCE = "loss", "log_variance"


class Parts(NamedTuple):
    """The parts of a run's configuration that the loss depends on."""

    vae: LearntVaeConfig
    loss: AutoencodingLossConfig
    discriminator: DiscriminatorConfig | None
    compute: Compute
    steps: int


class _Gradients(NamedTuple):
    autoencoder: Params
    """Of the trainable parameters, and of the log-variance if it is learned."""
    discriminator: Params | None
    metrics: Metrics


def create(
    parts: Parts,
    params: Params,
    discriminator: Params | None,
    optimiser: optax.GradientTransformation,
    average: ema.EmaConfig,
) -> TrainState:
    """The state before the first step. params: the trainable ones."""
    auxiliary: dict[str, Any] = {}
    if parts.loss.learn_log_variance:
        auxiliary[_LOG_VARIANCE] = jnp.float32(parts.loss.log_variance)
    if parts.discriminator is not None:
        assert discriminator is not None
        auxiliary[DISCRIMINATOR] = adversarial.create(parts.discriminator, discriminator, parts.steps)
    state = TrainState(jnp.zeros((), jnp.int32), params, ema.start(average, params), (), auxiliary or None)
    return state._replace(optimiser=optimiser.init(_optimised(state)))


def _optimised(state: TrainState) -> Params:
    """What the autoencoder's optimiser updates."""
    auxiliary = state.auxiliary or {}
    if _LOG_VARIANCE not in auxiliary:
        return state.params
    return {**state.params, _LOSS: {_LOG_VARIANCE: auxiliary[_LOG_VARIANCE]}}


def make_step(parts: Parts, config: RunConfig, optimiser: optax.GradientTransformation) -> Step:
    """The step. Pure: compile it with `jax.jit`, donating the state."""
    rates = logged_rates(config.optimiser, config.training.steps)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        keys = jax.random.split(step_key, len(batch.example))
        optimised, auxiliary = _optimised(state), dict(state.auxiliary or {})
        adversary = auxiliary.get(DISCRIMINATOR)

        def of_rows(adversary: Adversary | None, rows: Rows) -> tuple[_Gradients, Adversary | None]:
            return gradients(parts, optimised, frozen, adversary, *rows, state.step)

        found, adversary = over_micro_batches(config.optimiser.accumulate, of_rows, adversary, (batch, keys))
        norm, update_count = optax.tree.norm(found.autoencoder), updates_made(state.optimiser)
        updates, moments = optimiser.update(found.autoencoder, state.optimiser, optimised)
        params = cast(Params, optax.apply_updates(optimised, updates))
        average = updated_average(config.ema, state.ema, params, moments, update_count, step_key)
        metrics = {
            **found.metrics,
            **rates(update_count),
            "grad_norm": norm,
            "replaced": jnp.sum(batch.replaced),
        }
        if parts.discriminator is not None:
            metrics["discriminator_grad_norm"] = optax.tree.norm(found.discriminator)
            auxiliary[DISCRIMINATOR] = _updated(parts, adversary, found.discriminator, state.step)
        if _LOG_VARIANCE in auxiliary:
            auxiliary[_LOG_VARIANCE] = params.pop(_LOSS)[_LOG_VARIANCE]
        new_state = TrainState(state.step + 1, params, average, moments, auxiliary or None)
        if config.training.on_nonfinite is OnNonfinite.SKIP:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            if parts.discriminator is not None:
                finite &= jnp.isfinite(metrics["discriminator"]) & jnp.isfinite(metrics["discriminator_grad_norm"])
            new_state = unless_skipped(finite, new_state, state)
            metrics["skipped"] = jnp.where(finite, 0, 1)
        return new_state, metrics

    return step


def _has_started(config: DiscriminatorConfig, step: Int[jax.Array, ""]) -> Bool[jax.Array, ""]:
    return step >= config.start_step


def _updated(parts: Parts, adversary: Adversary | None, gradient: Params | None, step: Int[jax.Array, ""]) -> Adversary:
    """The discriminator after the step, unchanged before its first."""
    assert parts.discriminator is not None and adversary is not None and gradient is not None
    config = parts.discriminator
    return jax.lax.cond(
        _has_started(config, step),
        lambda: adversarial.update(config, parts.steps, adversary, gradient),
        lambda: adversary,
    )


def gradients(
    parts: Parts,
    optimised: Params,
    frozen: Params,
    adversary: Adversary | None,
    batch: Batch,
    keys: Key[jax.Array, " batch"],
    step: Int[jax.Array, ""],
) -> tuple[_Gradients, Adversary | None]:
    """(gradients and metrics of one (micro-)batch; the discriminator with its statistics and means, not updated).

    optimised: the trainable parameters, and the log-variance if it is learned. keys: one per example; step: those done.
    """
    assert batch.image is not None
    image = normalise(batch.image)
    trained = {part: value for part, value in optimised.items() if part != _LOSS}

    def reconstructed(trained: Params) -> Any:
        params = merge(trained, frozen)["vae"]
        posterior = vae.encode(parts.vae, params, image, parts.compute)
        latent = vae.scaled_sample(parts.vae, posterior, keys)
        features = vae.decode_features(parts.vae, params, latent, parts.compute)
        last = params["decoder"]["conv_out"]
        decoded = vae.features_to_image(parts.vae, last, features, parts.compute)
        return (decoded, posterior), (features, last)

    (decoded, posterior), pull, (features, last) = jax.vjp(reconstructed, trained, has_aux=True)
    learned = optimised.get(_LOSS, {})
    (nll, metrics), (of_nll, of_learned) = _nll(parts, frozen, image, decoded, learned)
    loss, of_posterior = nll, jax.tree.map(jnp.zeros_like, posterior)
    if not isinstance(parts.vae, TinyVaeConfig):
        metrics["kl"] = reconstruction.kl_divergence(posterior, parts.loss.reduction)
        weight = reconstruction.kl_weight(parts.loss, step)
        of_posterior = jax.grad(lambda p: weight * reconstruction.kl_divergence(p, parts.loss.reduction))(posterior)
        loss = loss + weight * metrics["kl"]
    of_decoded, of_discriminator = of_nll, None
    if parts.discriminator is not None:
        assert adversary is not None
        term = _adversarial(parts, parts.discriminator, adversary, image, decoded, of_nll, features, last, step)
        of_decoded, loss = of_nll + term.cotangent, loss + term.loss
        of_discriminator, adversary = term.gradient, term.adversary
        metrics |= term.metrics
    (of_trained,) = pull((of_decoded, of_posterior))
    return _Gradients({**of_trained, **of_learned}, of_discriminator, {"loss": loss, **metrics}), adversary


def _nll(parts: Parts, frozen: Params, image: Image, decoded: Image, learned: Params) -> Any:
    """((nll, its terms), (∂nll/∂decoded, ∂nll/∂learned)). learned: the log-variance, or nothing."""

    def nll(decoded: Image, learned: Params) -> tuple[Float[jax.Array, ""], Metrics]:
        log_variance = learned[_LOG_VARIANCE] if learned else parts.loss.log_variance
        perceptual = None
        if parts.loss.perceptual_weight:
            perceptual = perceptual_distance(Backbone.VGG, frozen[LPIPS], image, decoded)
        return reconstruction.reconstruction_loss(parts.loss, image, decoded, log_variance, perceptual)

    (value, terms), (of_decoded, of_learned) = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)(decoded, learned)
    terms = {**terms, "nll": value, **({_LOG_VARIANCE: learned[_LOG_VARIANCE]} if learned else {})}
    return (value, terms), (of_decoded, {_LOSS: of_learned} if learned else {})


class _Adversarial(NamedTuple):
    """What the discriminator makes of a batch; zeros before its first step."""

    loss: Float[jax.Array, ""]
    """λ g."""
    cotangent: Float[jax.Array, "batch height width 3"]
    """λ ∂g/∂decoded."""
    gradient: Params
    """Of the discriminator's loss."""
    adversary: Adversary
    metrics: Metrics


def _adversarial(
    parts: Parts,
    config: DiscriminatorConfig,
    adversary: Adversary,
    image: Image,
    decoded: Image,
    of_nll: Float[jax.Array, "batch height width 3"],
    features: Float[jax.Array, "batch height width features"],
    last: Params,
    step: Int[jax.Array, ""],
) -> _Adversarial:
    """of_nll: ∂nll/∂decoded. features, last: input and parameters of the decoder's last convolution."""

    def started() -> _Adversarial:
        params, carried = patchgan.initialised(config.network, adversary.params, adversary.carried, decoded)

        def generator(decoded: Image) -> tuple[Float[jax.Array, ""], Params]:
            return adversarial.generator_loss(config, params, carried, decoded)

        (value, after), of_generator = jax.value_and_grad(generator, has_aux=True)(decoded)
        ratio = jnp.ones(())
        if config.adaptive:
            ratio = adversarial.adaptive_weight(*kernel_norms(parts, features, last, of_nll, of_generator))
        weight = config.weight * ratio
        before = adversary._replace(params=params, carried=after)

        def discriminator(params: Params) -> Any:
            return adversarial.discriminator_loss(config, params, before, image, decoded)

        (loss, (carried, means, metrics)), gradient = jax.value_and_grad(discriminator, has_aux=True)(params)
        metrics |= {"generator": value, "adaptive_weight": weight, "discriminator": loss}
        new = before._replace(carried=carried, means=means)
        return _Adversarial(weight * value, weight * of_generator, gradient, new, metrics)

    def waiting() -> _Adversarial:
        zeros = {name: jnp.zeros(()) for name in adversarial.METRICS}
        gradient = jax.tree.map(jnp.zeros_like, adversary.params)
        return _Adversarial(jnp.zeros(()), jnp.zeros_like(decoded), gradient, adversary, zeros)

    return jax.lax.cond(_has_started(config, step), started, waiting)


def kernel_norms(
    parts: Parts,
    features: Float[jax.Array, "batch height width features"],
    last: Params,
    *cotangents: Float[jax.Array, "batch height width 3"],
) -> list[Float[jax.Array, ""]]:
    """The norm of the gradient at the kernel of the decoder's last convolution, for cotangents of the image."""

    def image(kernel: Float[jax.Array, "rows columns features 3"]) -> Image:
        return vae.features_to_image(parts.vae, {**last, "kernel": kernel}, features, parts.compute)

    _, pull = jax.vjp(image, last["kernel"])
    return [optax.tree.norm(pull(each)) for each in cotangents]
