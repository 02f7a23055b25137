"""A critic beside the student: a network that is trained against it, and the step of both.

    every step        critic's loss ── gradient ── update of the critic
    every nth step    student's loss ── gradient ── update of the student ── average

Both gradients are taken at the parameters before the step, and each moves its own network alone: what one of them
becomes does not depend on whether the other moves (docs/decisions/adversarial-step.md has a joint step for autoencoders
for the same reason). The critic is a score of the student's own images and a head (`distribution_matching`), or heads
on features of images (`adversarial_diffusion`). It is in `TrainState.auxiliary`, with its own optimiser; it is neither
sampled from nor exported.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Bool, Float, Int, Key

from sdxl_jax import flops, sharding
from sdxl_jax.arrays import Batch, Params, flatten
from sdxl_jax.config import OnNonfinite
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.optim.optimiser import (
    OptimiserConfig,
    OptimiserKind,
    logged_rates,
    make_optimiser,
    rate_names,
    updates_made,
)
from sdxl_jax.training.initial import placed_network
from sdxl_jax.training.objectives.distillation.teacher import Distillation, DistillationConfig
from sdxl_jax.training.state import TrainState
from sdxl_jax.training.step import Metrics, Rows, Step, over_micro_batches, unless_skipped, updated_average
from sdxl_jax.weights.lazy import Initial

Array = jax.Array

CRITIC, REPORTED = "critic", "reported"
"""Keys of `TrainState.auxiliary`: the critic; and the student's last metrics, which the steps without it repeat."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How the critic is trained."""

    updates: int = 1
    """Updates of the critic per update of the student. Higher: the critic follows the student more closely, the student
    is trained less."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """The critic's own optimiser. `accumulate` is the student's."""

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for settings that have no effect."""
        check_ranges([("critic.updates", self.updates, 1, math.inf)])
        try:
            self.optimiser.check()
        except InputError as error:
            raise InputError(str(error).replace("optimiser.", "critic.optimiser.")) from error
        if self.optimiser.accumulate != 1:
            raise InputError(
                f"critic.optimiser.accumulate={self.optimiser.accumulate} has no effect: the critic sees the "
                "micro-batches of optimiser.accumulate. Leave it at 1"
            )
        if self.optimiser.kind is OptimiserKind.SCHEDULE_FREE:
            raise InputError(
                "critic.optimiser.kind=schedule_free has an average of its own, which nothing of a critic uses. Use "
                "another one, e.g. adamw"
            )


@dataclass(frozen=True)
class CriticDistillationConfig(DistillationConfig):
    """What distillations with a critic have."""

    OF_STUDENT: ClassVar[tuple[str, ...]] = ()
    """The terms that the student's loss reports, the critic's in `OF_CRITIC`."""
    OF_CRITIC: ClassVar[tuple[str, ...]] = ()

    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic's training."""

    @property
    def student_updates(self) -> int:
        """Updates of the student in the whole run."""
        return -(-self.training.steps // max(1, self.critic.updates))

    @property
    def losses(self) -> tuple[str, ...]:
        own = "critic", "critic_grad_norm", "student_updates", "critic_updates"
        return (*self.OF_STUDENT, *self.OF_CRITIC, *own)

    def check(self) -> None:
        super().check()
        self.critic.check()
        if self.model.unet.guidance_dim is not None:
            raise InputError(
                f"model.unet.guidance_dim={self.model.unet.guidance_dim}: the students of this method have guidance in "
                "their weights. Give a teacher without guidance as an input"
            )


class Critic(NamedTuple):
    """The critic's part of the training state."""

    params: Params
    carried: Params
    """What its networks carry from step to step besides."""
    optimiser: optax.OptState


class _Moving(NamedTuple):
    """What an update of the student changes, and its metrics."""

    params: Params
    average: Params | None
    optimiser: optax.OptState
    metrics: Metrics


Config = TypeVar("Config", bound=CriticDistillationConfig)


class CriticDistillation(Distillation[Config]):
    """A distillation with a critic. A method has `name`, `student_loss`, `critic_loss`, and what the critic is."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.optimiser = self.beside_adapter(make_optimiser(config.optimiser, max(1, config.student_updates)))
        self.critic_optimiser = make_optimiser(config.critic.optimiser, config.training.steps)

    def beside_adapter(self, optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimiser of a tree with an adapter, if adapters are trained."""
        return optimiser if self._adapters is None else self._adapters.updating(optimiser)

    # A method has

    @property
    def critic_networks(self) -> Params:
        """The networks of the critic that begin at random, none of them made, by name."""
        raise NotImplementedError

    def critic_params(self, trained: Params, networks: Params) -> Params:
        """The critic's parameters before the first step. trained: the student's; networks: `critic_networks`, made."""
        del trained
        return networks

    @property
    def critic_carried(self) -> Params:
        """What the critic carries from step to step, before the first one."""
        return {}

    def student_loss(
        self, trained: Params, critic: Critic, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The student's mean loss of one (micro-)batch, and its terms. keys: one per example."""
        raise NotImplementedError

    def critic_loss(
        self, params: Params, carried: Params, trained: Params, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], tuple[Params, Metrics]]:
        """The critic's mean loss, (what it carries after it, its terms). params, carried: the critic's; trained: the
        student's, through which no gradient goes."""
        raise NotImplementedError

    # State

    def abstract_state(self, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Params]:
        state, frozen = super().abstract_state(mesh)
        auxiliary = jax.eval_shape(self._auxiliary, state.params, self.critic_networks)
        return state._replace(auxiliary=sharding.placed(mesh, auxiliary)), frozen

    def fresh_state(
        self, mesh: Mesh, abstract: TrainState, initial: dict[str, Float[Array, "..."]], progress: bool = True
    ) -> tuple[TrainState, Params]:
        state, frozen = super().fresh_state(mesh, abstract._replace(auxiliary=None), initial, progress)
        networks: Params = {}
        for name, network in self.critic_networks.items():
            leaves = {
                path: Initial(leaf, f"{CRITIC}/{name}/{path}", self.config.training.seed)
                for path, leaf in flatten(network).items()
            }
            networks[name] = placed_network(name, leaves, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract.auxiliary)
        auxiliary = jax.jit(self._auxiliary, out_shardings=places)(state.params, networks)
        return state._replace(auxiliary=auxiliary), frozen

    def _auxiliary(self, trained: Params, networks: Params) -> dict[str, Any]:
        params = self.critic_params(trained, networks)
        found: dict[str, Any] = {CRITIC: Critic(params, self.critic_carried, self.critic_optimiser.init(params))}
        if self.config.critic.updates > 1:
            names = ("loss", *self.config.OF_STUDENT, "grad_norm", *rate_names(self.config.optimiser))
            found[REPORTED] = {name: jnp.zeros(()) for name in names}
        return found

    # Step

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        raise AssertionError("student and critic have losses of their own")

    def step(self) -> Step:
        config, every = self.config, self.config.critic.updates

        def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
            step_key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
            rows = batch, jax.random.split(step_key, len(batch.example))
            before: Critic = state.auxiliary[CRITIC]
            critic, metrics = self._with_critic_moved(before, state.params, frozen, rows)

            def moved() -> _Moving:
                return self._with_student_moved(state, frozen, rows, step_key)

            def stayed() -> _Moving:
                return _Moving(state.params, state.ema, state.optimiser, state.auxiliary[REPORTED])

            auxiliary = {CRITIC: critic}
            if every == 1:
                student = moved()
            else:
                student = jax.lax.cond(state.step % every == 0, moved, stayed)
                auxiliary[REPORTED] = student.metrics
            new = TrainState(state.step + 1, student.params, student.average, student.optimiser, auxiliary)
            metrics = {**student.metrics, **metrics, "replaced": jnp.sum(batch.replaced)}
            if config.training.on_nonfinite is OnNonfinite.SKIP:
                finite = _finite(metrics)
                new = unless_skipped(finite, new, state)
                metrics["skipped"] = jnp.where(finite, 0, 1)
            return new, {**metrics, **_counters(new)}

        return step

    def model_flops(self, arguments: tuple[Any, ...]) -> float:
        """Of a step on average: the student has its share of those that move it."""
        every, whole = self.config.critic.updates, super().model_flops(arguments)
        if every == 1:
            return whole
        plain = Compute(dtype=self.config.compute.dtype, attention=Attention.XLA, remat=Remat.NONE)
        objective = type(self)(replace(self.config, compute=plain))

        def student(state: TrainState, frozen: Params, batch: Batch) -> _Moving:
            key = jax.random.key(0)
            return objective._with_student_moved(state, frozen, (batch, jax.random.split(key, len(batch.example))), key)

        return whole - (1 - 1 / every) * flops.count(student, *arguments).total

    def _with_student_moved(self, state: TrainState, frozen: Params, rows: Rows, step_key: Key[Array, ""]) -> _Moving:
        """The student after one update."""
        config, critic = self.config, state.auxiliary[CRITIC]
        value_and_grad = jax.value_and_grad(self.student_loss, has_aux=True)

        def of_rows(carry: None, rows: Rows) -> Any:
            return value_and_grad(state.params, critic, frozen, *rows), carry

        ((value, terms), gradient), _ = over_micro_batches(config.optimiser.accumulate, of_rows, None, rows)
        updates_before = updates_made(state.optimiser)
        optimiser = optax.with_extra_args_support(self.optimiser)  # as in `training.step`
        updates, moments = optimiser.update(gradient, state.optimiser, state.params, frozen=frozen)
        params = cast(Params, optax.apply_updates(state.params, updates))
        average = updated_average(config.ema, state.ema, params, moments, updates_before, step_key)
        rates = logged_rates(config.optimiser, max(1, config.student_updates))(updates_before)
        metrics = {"loss": value, **terms, "grad_norm": optax.tree.norm(gradient), **rates}
        return _Moving(params, average, moments, metrics)

    def _with_critic_moved(self, critic: Critic, trained: Params, frozen: Params, rows: Rows) -> tuple[Critic, Metrics]:
        """The critic after one update, and its metrics."""
        value_and_grad = jax.value_and_grad(self.critic_loss, has_aux=True)

        def of_rows(carried: Params, rows: Rows) -> Any:
            (value, (carried, terms)), gradient = value_and_grad(critic.params, carried, trained, frozen, *rows)
            return ((value, terms), gradient), carried

        accumulate = self.config.optimiser.accumulate
        ((value, terms), gradient), carried = over_micro_batches(accumulate, of_rows, critic.carried, rows)
        updates, moments = self.critic_optimiser.update(gradient, critic.optimiser, critic.params)
        params = cast(Params, optax.apply_updates(critic.params, updates))
        metrics = {CRITIC: value, **terms, "critic_grad_norm": optax.tree.norm(gradient)}
        return Critic(params, carried, moments), metrics


def _finite(metrics: Metrics) -> Bool[Array, ""]:
    return jnp.all(
        jnp.stack([jnp.isfinite(metrics[name]) for name in ("loss", "grad_norm", CRITIC, "critic_grad_norm")])
    )


def _counters(state: TrainState) -> dict[str, Int[Array, ""]]:
    """The updates made so far."""
    return {
        "student_updates": updates_made(state.optimiser),
        "critic_updates": updates_made(state.auxiliary[CRITIC].optimiser),
    }
