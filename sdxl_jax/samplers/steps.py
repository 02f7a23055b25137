"""Samplers: the noise levels that they visit, and the update of each step.

All of them are linear. A sampler's next state is a weighted sum of its state, of the network's prediction (as x₀ and as
ε), of earlier predictions, and of fresh noise; the weights depend on the noise levels alone. So a sampler is a pure
function from noise levels to weights, in float64, before anything is compiled, and one compiled step (`loop.advance`)
serves all of them:

    x_next = Σ weight · term          terms: x | memory … | x0 | epsilon | noise

The state is x_t = α x₀ + σ_t ε with α² + σ_t² = 1, the network's input, for every sampler. Samplers that are elsewhere
written with the EDM sigma = σ_t / α, for the state x₀ + sigma ε, come out the same: that state is ours divided by α.
Nothing here is infinite at zero terminal SNR, where α = 0.

Names: a step goes from level i, with `alpha`, `sigma_t` and `sigma`, to level i + 1, with `alpha_next`, `sigma_t_next`
and `sigma_next`. What is named `…_1`, `…_2` in memory is from one or two steps before.

Sources; timesteps and constants are those of diffusers' schedulers of the same names:
    DDPM              Ho et al., arXiv:2006.11239, eq. 6 and 7
    DDIM              Song et al., arXiv:2010.02502, eq. 12 and 16
    Euler, Heun       Karras et al., arXiv:2206.00364, algorithm 1 without churn; Euler is its first half
    Euler ancestral   k-diffusion `sample_euler_ancestral`
    LMS               k-diffusion `sample_lms`, order 4
    DPM++ 2M, SDE     Lu et al., arXiv:2211.01095, algorithm 2, and SDE-DPM-Solver++ of appendix B (midpoint)
    UniPC             Zhao et al., arXiv:2302.04867, order 2, B₂(h), predicting x₀
    LCM               Luo et al., arXiv:2310.04378, algorithm 3
"""

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sdxl_jax.arrays import type_of_array
from sdxl_jax.diffusion.continuous import ContinuousConfig, FlowConfig, noise_input
from sdxl_jax.diffusion.schedule import Schedule
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.samplers.defaults import Sigmas, Spacing


def timesteps(count: int, schedule_length: int, spacing: Spacing, offset: int = 1) -> Float[np.ndarray, " steps"]:
    """The timesteps of `count` steps, from the noisiest. `offset` applies to LEADING alone. 1 ≤ count ≤
    schedule_length."""
    match spacing:
        case Spacing.LEADING:
            # Never beyond the last timestep: with every timestep visited there is no room for an offset.
            steps = np.arange(count) * (schedule_length // count) + offset
            return np.minimum(steps, schedule_length - 1)[::-1].astype(np.float64)
        case Spacing.TRAILING:
            return np.round(np.arange(schedule_length, 0, -schedule_length / count))[:count] - 1
        case Spacing.LINSPACE:
            return np.linspace(0, schedule_length - 1, count)[::-1].copy()


def _solver_timesteps(count: int, length: int, spacing: Spacing, offset: int = 1) -> Float[np.ndarray, " steps"]:
    """The timesteps of diffusers' DPM-Solver and UniPC: whole numbers, the first `count` of count + 1, since the last
    step leads to sigma 0."""
    match spacing:
        case Spacing.LEADING:
            visited = np.arange(1, count + 1) * max(1, length // (count + 1)) + offset
            # length − 1 and length steps, for which diffusers has none, begin at the last timestep.
            return (visited - max(0, visited[-1] - (length - 1)))[::-1].astype(float)
        case Spacing.TRAILING:
            return timesteps(count, length, spacing)
        case Spacing.LINSPACE:
            return np.linspace(0, length - 1, count + 1).round()[:0:-1].copy()


_LCM_STEPS = 50
"""Number of timesteps that consistency distillation trains."""


def consistency_timesteps(length: int) -> Int[np.ndarray, " timesteps"]:
    """The timesteps that consistency distillation trains: 19, 39 … 999. length: of the schedule."""
    return np.arange(1, _LCM_STEPS + 1) * (length // _LCM_STEPS) - 1


def consistency_scales(timestep: Any) -> tuple[Any, Any]:
    """(c_skip, c_out) of the consistency function c_skip x + c_out x₀: Luo et al., section 4.1, with timesteps × 10 and
    σ_data = 1/2. (1, 0) at timestep 0."""
    scaled = 10 * timestep
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5


def _lcm_timesteps(count: int, length: int) -> Float[np.ndarray, " steps"]:
    if count > _LCM_STEPS:
        raise InputError(f"steps={count}, but sampler lcm takes at most {_LCM_STEPS} steps. Use 4 to 8")
    trained = consistency_timesteps(length)[::-1].astype(np.float64)
    return trained[np.floor(np.linspace(0, _LCM_STEPS, count, endpoint=False)).astype(int)]


class Levels(NamedTuple):
    """The noise levels that a sampler visits, from the noisiest, and the one that it ends at: levels = steps + 1."""

    timestep: Float[np.ndarray, " steps"]
    """The network's input. The level at the end has none."""
    alpha: Float[np.ndarray, " levels"]
    """Share of the image in x_t; at the end 1, or that of timestep 0."""
    sigma_t: Float[np.ndarray, " levels"]
    """Share of the noise in x_t; at the end 0, or that of timestep 0."""

    @property
    def sigma(self) -> Float[np.ndarray, " levels"]:
        """The EDM sigma."""
        return self.sigma_t / self.alpha

    def since(self, first: int) -> "Levels":
        """The levels from number `first` on."""
        return Levels(self.timestep[first:], self.alpha[first:], self.sigma_t[first:])


class Plan(NamedTuple):
    """A sampler's numbers, one row per evaluation of the network; float64 numpy here, float32 inside the loop."""

    timestep: Float[type_of_array, " rows"]
    """The network's input."""
    alpha: Float[type_of_array, " rows"]
    """α of the state."""
    sigma_t: Float[type_of_array, " rows"]
    """σ_t of the state."""
    alpha_next: Float[type_of_array, " rows"]
    """α of the state that the row leads to."""
    sigma_t_next: Float[type_of_array, " rows"]
    """σ_t of the state that the row leads to."""
    weights: Float[type_of_array, "rows memory terms"]
    """Weight of each term in each array that is carried to the next row; the first of these arrays is the state. The
    terms are these arrays before the row, then x₀, ε and fresh noise."""

    def between(self, first: int, stop: int | None) -> "Plan":
        """The rows from `first` to before `stop`."""
        return Plan(*(column[first:stop] for column in self))

    @property
    def memory(self) -> int:
        """Number of arrays that are carried from row to row, the state included."""
        return self.weights.shape[1]

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise is used."""
        return bool(self.weights[:, :, -1].any())


Sum = Mapping[str, float]
"""A weighted sum of named terms."""
Row = Mapping[str, Sum]
"""New value of every array that is carried to the next row, by its name; an array that is not named becomes zeros."""


class Moment(NamedTuple):
    """One evaluation of the network, and the sums that follow it."""

    at: int
    """Number of the level at which the network is evaluated."""
    to: int
    """Number of the level that the sums lead to."""
    row: Row


class Family(enum.Enum):
    """Which noise levels a sampler can visit."""

    DISCRETE = "discrete"
    """Those of whole timesteps."""
    SIGMA = "sigma"
    """Any; Karras and exponential sigmas lie between those of the first and the last visited timestep."""
    SOLVER = "solver"
    """Any; Karras and exponential sigmas span the whole noise schedule, their timesteps are rounded."""
    CONSISTENCY = "consistency"
    """Those that consistency distillation trains."""


@dataclass(frozen=True)
class Sampler:
    """A sampler as its table of weights."""

    moments: Callable[[Levels, float], Iterator[Moment]]
    """(levels, η) → the evaluations of the network, and the sums that follow each."""
    family: Family
    remembers: tuple[str, ...] = ()
    """Names of the arrays in memory: what is carried from row to row besides the state x."""
    evaluations: int = 1
    """Network evaluations per step; the last step has one."""
    takes_eta: bool = False
    """Whether η has an effect."""
    multistep: bool = False
    """Whether a step divides by the lengths of those before it."""

    def plan(self, levels: Levels, eta: float = 0.0) -> Plan:
        """The rows of all steps along `levels`. They are not finite where the levels' own numbers are not."""
        memory = ("x", *self.remembers)
        terms = (*memory, "x0", "epsilon", "noise")
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            moments = self._moments(levels, eta)
        weights = np.zeros((len(moments), len(memory), len(terms)))
        for row, moment in zip(weights, moments, strict=True):
            for name, total in moment.row.items():
                for term, weight in total.items():
                    row[memory.index(name), terms.index(term)] = weight
        at, to = (np.array([getattr(moment, which) for moment in moments], int) for which in ("at", "to"))
        alpha, sigma_t = levels.alpha, levels.sigma_t
        return Plan(levels.timestep[at], alpha[at], sigma_t[at], alpha[to], sigma_t[to], weights)

    def _moments(self, levels: Levels, eta: float) -> list[Moment]:
        """The list of `moments`. A step of no length of a multistep method (with as many steps as timesteps, one may be
        visited twice) is taken to its limit: state and memory stay as they are."""
        if not self.multistep or (moves := levels.sigma[1:] < levels.sigma[:-1] * (1 - _SAME_LEVEL)).all():
            return list(self.moments(levels, eta))
        distinct = np.append(np.flatnonzero(moves), len(moves))
        moving = self.moments(
            Levels(levels.timestep[distinct[:-1]], levels.alpha[distinct], levels.sigma_t[distinct]), eta
        )
        stay = {name: {name: 1.0} for name in ("x", *self.remembers)}
        return [next(moving)._replace(at=i, to=i + 1) if moves[i] else Moment(i, i + 1, stay) for i in _steps(levels)]


_SAME_LEVEL = 1e-7
"""Relative difference below which two sigmas are one level: float32 has none between them."""
_SMALLEST = 2.0**-24
"""ᾱ that replaces 0 in samplers that divide by α, as in diffusers: sigma 4096 instead of infinity."""


def make_levels(
    sampler: Sampler,
    schedule: Schedule,
    steps: int,
    spacing: Spacing | None,
    sigmas: Sigmas = Sigmas.SCHEDULE,
    *,
    offset: int = 1,
    ends_at_first: bool = False,
    chosen: Sequence[int] | None = None,
) -> Levels:
    """The noise levels of `steps` steps. spacing: None is LEADING, or LCM's own. offset: of LEADING timesteps. chosen:
    timesteps in the place of LCM's own, one per step.

    ends_at_first: whether the last step leads to the noise level of timestep 0 instead of the finished image: in
    diffusers set_alpha_to_one=False and final_sigmas_type="sigma_min".

    Raises InputError for a choice that has no effect on the sampler.
    """
    name, length = _name(sampler), len(schedule.alpha_bar)
    if sampler.family is Family.CONSISTENCY and spacing is not None:
        raise InputError(
            f"timestep_spacing={spacing.value} has no effect on sampler {name}, which has timesteps of its own. Leave "
            "it out"
        )
    if sampler.family in (Family.CONSISTENCY, Family.DISCRETE) and sigmas is not Sigmas.SCHEDULE:
        able = [each for each, other in SAMPLERS.items() if other.family in (Family.SIGMA, Family.SOLVER)]
        raise InputError(
            f"sigmas={sigmas.value} has no effect on sampler {name}, which visits whole timesteps. Use sampler "
            f"{', '.join(able[:-1])} or {able[-1]}, or leave sigmas out"
        )
    spacing = spacing or Spacing.LEADING
    if sampler.family is Family.CONSISTENCY:
        visited = _lcm_timesteps(steps, length) if chosen is None else np.array(chosen, np.float64)
    elif sampler.family is Family.SOLVER:
        visited = _solver_timesteps(steps, length, spacing, offset)
    else:
        visited = timesteps(steps, length, spacing, offset)
    alpha_bar_end = float(schedule.alpha_bar[0]) if ends_at_first else 1.0
    alpha_end, sigma_t_end = np.sqrt(alpha_bar_end), np.sqrt(1 - alpha_bar_end)
    if sampler.family in (Family.CONSISTENCY, Family.DISCRETE):
        visited = visited.round()
        alpha_bar = schedule.alpha_bar[visited.astype(int)]
        return Levels(visited, np.append(np.sqrt(alpha_bar), alpha_end), np.append(np.sqrt(1 - alpha_bar), sigma_t_end))
    alpha_bar = np.maximum(schedule.alpha_bar, _SMALLEST)
    trained = np.sqrt((1 - alpha_bar) / alpha_bar)  # sigma of every timestep
    sigma = np.interp(visited, np.arange(length), trained)
    if sigmas is not Sigmas.SCHEDULE:
        first, last = (trained[-1], trained[0]) if sampler.family is Family.SOLVER else (sigma[0], sigma[-1])
        sigma = _between(first, last, steps, sigmas)
        visited = np.interp(np.log(sigma), np.log(trained), np.arange(length))
        if sampler.family is Family.SOLVER:
            # diffusers rounds timesteps of Karras sigmas and truncates those of exponential ones; the nearest is meant.
            visited = visited.round()
    alpha = 1 / np.sqrt(1 + sigma**2)
    if sampler.family is Family.SIGMA:
        alpha_end, sigma_t_end = 1.0, sigma_t_end / alpha_end  # diffusers returns their own state, x₀ + sigma ε
    return Levels(visited, np.append(alpha, alpha_end), np.append(sigma * alpha, sigma_t_end))


def continuous_levels(sampler: Sampler, law: ContinuousConfig, steps: int, sigmas: Sigmas = Sigmas.SCHEDULE) -> Levels:
    """The noise levels of `steps` steps of a continuous law; the last step leads to the finished image. SCHEDULE is the
    law's own: Karras's for EDM; for flow evenly from 1 to 1/1000, shifted.

    As diffusers' EDM schedulers and FlowMatchEulerDiscreteScheduler, which shifts its lowest level twice. Raises
    InputError for a sampler of whole timesteps, and for sigmas that have no effect.
    """
    name = _name(sampler)
    if sampler.family in (Family.CONSISTENCY, Family.DISCRETE):
        able = [each for each, other in SAMPLERS.items() if other.family in (Family.SIGMA, Family.SOLVER)]
        raise InputError(
            f"sampler={name} visits whole timesteps, and this model has continuous noise levels. Use sampler "
            f"{', '.join(able[:-1])} or {able[-1]}"
        )
    if isinstance(law, FlowConfig):
        if sigmas is not Sigmas.SCHEDULE:
            raise InputError(f"sigmas={sigmas.value} has no effect on flow matching, which has its own. Leave it out")
        level = law.shifted(np.linspace(1, law.shifted(1 / 1000), steps))
    else:
        level = _between(law.sigma_max, law.sigma_min, steps, sigmas)
    alpha, sigma_t = law.level(level)
    return Levels(np.asarray(noise_input(law, level)), np.append(alpha, 1.0), np.append(sigma_t, 0.0))


def _between(first: float, last: float, steps: int, sigmas: Sigmas) -> Float[np.ndarray, " steps"]:
    """Sigmas between two, both included: exponential, or else Karras's with ρ = 7."""
    ramp = np.linspace(0, 1, steps)
    if sigmas is Sigmas.EXPONENTIAL:
        return np.exp(math.log(first) + ramp * (math.log(last) - math.log(first)))
    return (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7


def find(name: str) -> Sampler:
    """The sampler of that name. Raises InputError for an unknown name, with the known ones."""
    if name not in SAMPLERS:
        known = ", ".join(nearest_first(name, SAMPLERS))
        raise InputError(f"There is no sampler {name!r}. Known, nearest first: {known}")
    return SAMPLERS[name]


def _name(sampler: Sampler) -> str:
    return next((name for name, each in SAMPLERS.items() if each is sampler), "of your own")


def initial_scale(sampler: Sampler, levels: Levels, spacing: Spacing | None) -> float:
    """Factor from standard normal noise to the first state.

    1; but σ_t for the samplers of `Family.SIGMA` unless the spacing is LEADING, as in diffusers: x₀ + sigma ε without
    its image.
    """
    own = sampler.family is Family.SIGMA and spacing not in (None, Spacing.LEADING)
    return float(levels.sigma_t[0]) if own else 1.0


# The samplers. The network is evaluated at level i, and the step leads to level i + 1.


def _steps(levels: Levels) -> range:
    return range(len(levels.timestep))


def _add(*parts: tuple[float, Sum]) -> dict[str, float]:
    """Σ factor · sum."""
    total: dict[str, float] = {}
    for factor, part in parts:
        for term, weight in part.items():
            total[term] = total.get(term, 0.0) + factor * weight
    return total


def _ddim(levels: Levels, eta: float) -> Iterator[Moment]:
    """Eq. 12: to the next level along the same ε, a share of which η replaces by fresh noise, eq. 16: η = 1 is DDPM's
    variance."""
    for i in _steps(levels):
        alpha, sigma_t = levels.alpha[i], levels.sigma_t[i]
        alpha_next, sigma_t_next = levels.alpha[i + 1], levels.sigma_t[i + 1]
        fresh = eta * sigma_t_next / sigma_t * math.sqrt(max(0.0, 1 - (alpha / alpha_next) ** 2))
        row = {"x0": alpha_next, "epsilon": math.sqrt(sigma_t_next**2 - fresh**2), "noise": fresh}
        yield Moment(i, i + 1, {"x": row})


def _ddpm(levels: Levels, eta: float) -> Iterator[Moment]:
    """Eq. 6 and 7: a sample of q(x_next | x_t, x₀), whose variance is β̃ (diffusers: fixed_small)."""
    for i in _steps(levels):
        alpha_bar, alpha_bar_next = levels.alpha[i] ** 2, levels.alpha[i + 1] ** 2
        # 1 − β of this step alone. Of a step of no length it is 1, also where ᾱ is 0 at both ends.
        ratio = alpha_bar / alpha_bar_next if alpha_bar != alpha_bar_next else 1.0
        row = {
            "x0": math.sqrt(alpha_bar_next) * (1 - ratio) / (1 - alpha_bar),
            "x": math.sqrt(ratio) * (1 - alpha_bar_next) / (1 - alpha_bar),
            "noise": math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - ratio)),
        }
        yield Moment(i, i + 1, {"x": row})


def _lcm(levels: Levels, eta: float) -> Iterator[Moment]:
    """Algorithm 3: the consistency function, noised again to the next level."""
    for i in _steps(levels):
        skip, out = consistency_scales(levels.timestep[i])
        alpha_next, sigma_t_next = levels.alpha[i + 1], levels.sigma_t[i + 1]
        yield Moment(i, i + 1, {"x": {"x": alpha_next * skip, "x0": alpha_next * out, "noise": sigma_t_next}})


def _euler(levels: Levels, eta: float) -> Iterator[Moment]:
    """dx/dsigma = ε: from x₀ + sigma ε to x₀ + sigma_next ε."""
    for i in _steps(levels):
        alpha_next, sigma_t_next = levels.alpha[i + 1], levels.sigma_t[i + 1]
        yield Moment(i, i + 1, {"x": {"x0": alpha_next, "epsilon": sigma_t_next}})


def _euler_ancestral(levels: Levels, eta: float) -> Iterator[Moment]:
    """Euler to a sigma below the next, `sigma_down`, then noise up to the next, as much as DDPM would add."""
    sigmas = levels.sigma
    for i in _steps(levels):
        sigma, sigma_next, alpha_next = sigmas[i], sigmas[i + 1], levels.alpha[i + 1]
        sigma_up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        row = {"x0": alpha_next, "epsilon": alpha_next * sigma_down, "noise": alpha_next * sigma_up}
        yield Moment(i, i + 1, {"x": row})


def _heun(levels: Levels, eta: float) -> Iterator[Moment]:
    """An Euler step, then the same step with the mean of ε at both ends; the last step is Euler's alone."""
    sigmas = levels.sigma
    for i in _steps(levels):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        alpha_next, sigma_t_next = levels.alpha[i + 1], levels.sigma_t[i + 1]
        euler = {"x0": alpha_next, "epsilon": sigma_t_next}
        yield Moment(i, i + 1, {"x": euler, "first_x0": {"x0": 1.0}, "first_epsilon": {"epsilon": 1.0}})
        if i + 1 < len(levels.timestep):
            half = (sigma_next - sigma) / 2
            mean = {
                "first_x0": alpha_next,
                "first_epsilon": alpha_next * (sigma + half),
                "epsilon": alpha_next * half,
            }
            yield Moment(i + 1, i + 1, {"x": mean})


_LMS_ORDER = 4


def _lms(levels: Levels, eta: float) -> Iterator[Moment]:
    """Adams–Bashforth: the polynomial through the last four ε, integrated over sigma."""
    sigmas = levels.sigma
    for i in _steps(levels):
        alpha, alpha_next = levels.alpha[i], levels.alpha[i + 1]
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        nodes = sigmas[i - np.arange(min(i + 1, _LMS_ORDER))]
        row: dict[str, float] = {"x": alpha_next / alpha}
        for j, name in zip(range(len(nodes)), ("epsilon", "epsilon_1", "epsilon_2", "epsilon_3"), strict=False):
            others = np.delete(nodes, j)
            basis = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1] / np.prod(nodes[j] - others))
            area = basis.integ()
            row[name] = alpha_next * (area(sigma_next) - area(sigma))
        shifted = {"epsilon_1": {"epsilon": 1.0}, "epsilon_2": {"epsilon_1": 1.0}, "epsilon_3": {"epsilon_2": 1.0}}
        yield Moment(i, i + 1, {"x": row, **shifted})


def _log_snr(levels: Levels) -> Float[np.ndarray, " levels"]:
    """λ = log(α/σ_t), half the log SNR; infinite at the end."""
    with np.errstate(divide="ignore"):
        return np.log(levels.alpha) - np.log(levels.sigma_t)


def _slope(lam: Float[np.ndarray, " levels"], i: int) -> float:
    """Weight of the last change of x₀ in second order: half a step along λ as a share of the last. 0 in the first step,
    and in the last, which leads to λ = ∞."""
    return 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) if i and np.isfinite(lam[i + 1]) else 0.0


def _dpmpp_2m(levels: Levels, eta: float) -> Iterator[Moment]:
    """Algorithm 2: x₀ is linear in λ, through this x₀ and the one before; constant in the first step and in the last,
    which leads to λ = ∞."""
    lam = _log_snr(levels)
    for i in _steps(levels):
        sigma_t, alpha_next, sigma_t_next = levels.sigma_t[i], levels.alpha[i + 1], levels.sigma_t[i + 1]
        h = lam[i + 1] - lam[i]
        gain = -alpha_next * math.expm1(-h)
        slope = _slope(lam, i)
        row = {"x": sigma_t_next / sigma_t, "x0": gain * (1 + slope), "x0_1": -gain * slope}
        yield Moment(i, i + 1, {"x": row, "x0_1": {"x0": 1.0}})


def _dpmpp_2m_sde(levels: Levels, eta: float) -> Iterator[Moment]:
    """The same for the reverse SDE: h counts twice, and fresh noise replaces the variance that is lost."""
    lam = _log_snr(levels)
    for i in _steps(levels):
        sigma_t, alpha_next, sigma_t_next = levels.sigma_t[i], levels.alpha[i + 1], levels.sigma_t[i + 1]
        h = lam[i + 1] - lam[i]
        gain = -alpha_next * math.expm1(-2 * h)
        slope = _slope(lam, i)
        row = {
            "x": sigma_t_next / sigma_t * math.exp(-h),
            "x0": gain * (1 + slope),
            "x0_1": -gain * slope,
            "noise": sigma_t_next * math.sqrt(-math.expm1(-2 * h)),
        }
        yield Moment(i, i + 1, {"x": row, "x0_1": {"x0": 1.0}})


def _unipc(levels: Levels, eta: float) -> Iterator[Moment]:
    """Algorithm 1 with p = 2: the network's prediction at level i first corrects the state (UniC), then predicts the
    next (UniP). The first step and the last are of order 1.

    `x_1` is the corrected state of the step before, `x0_1` and `x0_2` are the predictions of the last two steps.
    """
    lam, count = _log_snr(levels), len(levels.timestep)

    def order(i: int) -> int:
        return min(2, i + 1, count - i)

    def gain(i: int) -> float:
        """α_next (1 − e^−h) of the step from level i."""
        return -levels.alpha[i + 1] * math.expm1(-(lam[i + 1] - lam[i]))

    def first_order(i: int, x: str, x0: str) -> dict[str, float]:
        """From level i to i + 1 with a constant x₀."""
        return {x: levels.sigma_t[i + 1] / levels.sigma_t[i], x0: gain(i)}

    def difference(i: int, weight: float, new: str, old: str) -> tuple[float, Sum]:
        """weight · α_next (1 − e^−h) · (new − old): B₂(h) times a difference of x₀."""
        return weight * gain(i), {new: 1.0, old: -1.0}

    def r_1(i: int) -> float:
        """r₁ of the paper: λ of the level before i, in units of the step from i to i + 1. Negative."""
        return (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])

    for i in _steps(levels):
        corrected: Sum = {"x": 1.0}
        if i and order(i - 1) == 1:
            corrected = _add((1.0, first_order(i - 1, "x_1", "x0_1")), difference(i - 1, 0.5, "x0", "x0_1"))
        elif i:
            r, hh = r_1(i - 1), -(lam[i] - lam[i - 1])
            phi = math.expm1(hh) / hh - 1  # h φ₂, then h φ₃, over B₂
            right = np.array([phi, 2 * (phi / hh - 0.5)]) / math.expm1(hh)
            rho_1, rho_2 = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), right)
            corrected = _add(
                (1.0, first_order(i - 1, "x_1", "x0_1")),
                difference(i - 1, rho_1 / r, "x0_2", "x0_1"),
                difference(i - 1, rho_2, "x0", "x0_1"),
            )
        predicted = first_order(i, "corrected", "x0")
        if order(i) == 2:
            predicted = _add((1.0, predicted), difference(i, 0.5 / r_1(i), "x0_1", "x0"))
        state = _add((predicted.pop("corrected"), corrected), (1.0, predicted))
        yield Moment(i, i + 1, {"x": state, "x_1": corrected, "x0_1": {"x0": 1.0}, "x0_2": {"x0_1": 1.0}})


SAMPLERS = {
    "ddpm": Sampler(_ddpm, Family.DISCRETE),
    "ddim": Sampler(_ddim, Family.DISCRETE, takes_eta=True),
    "euler": Sampler(_euler, Family.SIGMA),
    "euler_ancestral": Sampler(_euler_ancestral, Family.SIGMA),
    "heun": Sampler(_heun, Family.SIGMA, ("first_x0", "first_epsilon"), evaluations=2),
    "lms": Sampler(_lms, Family.SIGMA, ("epsilon_1", "epsilon_2", "epsilon_3"), multistep=True),
    "dpmpp_2m": Sampler(_dpmpp_2m, Family.SOLVER, ("x0_1",), multistep=True),
    "dpmpp_2m_sde": Sampler(_dpmpp_2m_sde, Family.SOLVER, ("x0_1",), multistep=True),
    "unipc": Sampler(_unipc, Family.SOLVER, ("x_1", "x0_1", "x0_2"), multistep=True),
    "lcm": Sampler(_lcm, Family.CONSISTENCY),
}
"""By the names of the command line."""
