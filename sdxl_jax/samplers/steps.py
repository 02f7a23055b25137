"""Samplers: which noise levels are visited, and how each step goes.

All of them are linear. A sampler's next state is a weighted sum of its state, of what the network says now (as x₀ and
as ε), of what it said before, and of fresh noise; the weights depend on the noise levels alone. So a sampler is a pure
function from noise levels to weights, in float64, before anything is compiled, and one compiled step (`loop.advance`)
serves all of them:

    x_next = Σ weight · term          terms: x | remembered … | x0 | epsilon | noise

The state is x_t = α x₀ + σ_t ε with α² + σ_t² = 1, what the network sees, for every sampler. Those that others write
with the EDM sigma = σ_t / α, of x₀ + sigma ε, come out the same: their state is ours divided by α. Nothing here is
infinite at zero terminal SNR, where α = 0.

Sources, and what timesteps and constants follow, are diffusers' schedulers of the same names:
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdxl_jax.arrays import type_of_array
from sdxl_jax.diffusion.schedule import Schedule
from sdxl_jax.errors import InputError, nearest_first


class Spacing(enum.Enum):
    """Which of the training's timesteps a sampler visits. Lin et al. (arXiv:2305.08891), table 2."""

    LEADING = "leading"
    """Multiples of T // steps, plus an offset: 1, 21, 41 … 981. What diffusers does with the SDXL weights."""
    TRAILING = "trailing"
    """Counted down from the last: 999, 979 … 19. What sgm does."""
    LINSPACE = "linspace"
    """Evenly from 0 to the last, both included; not whole numbers in general."""


class Sigmas(enum.Enum):
    """How noise levels lie between the first and the last."""

    SCHEDULE = "schedule"
    """Those of the timesteps that the spacing names."""
    KARRAS = "karras"
    """Evenly in sigma^(1/7). Karras et al., arXiv:2206.00364, eq. 5."""
    EXPONENTIAL = "exponential"
    """Evenly in log sigma."""


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
    """Those of diffusers' DPM-Solver and UniPC: whole, and of count + 1 the last is left out, since they end at sigma 0
    after it."""
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
"""Timesteps that consistency distillation trains: 19, 39 … 999."""


def _lcm_timesteps(count: int, length: int) -> Float[np.ndarray, " steps"]:
    if count > _LCM_STEPS:
        raise InputError(f"steps={count}, but sampler lcm has {_LCM_STEPS} at most. Use 4 to 8")
    trained = np.arange(_LCM_STEPS, 0, -1) * (length // _LCM_STEPS) - 1.0
    return trained[np.floor(np.linspace(0, _LCM_STEPS, count, endpoint=False)).astype(int)]


class Levels(NamedTuple):
    """The noise levels that a sampler visits, from the noisiest, and the one that it ends at."""

    timestep: Float[np.ndarray, " steps"]
    """What the network is told."""
    alpha: Float[np.ndarray, " levels"]
    """Share of the image in x_t; 1 at the end, or that of timestep 0."""
    sigma_t: Float[np.ndarray, " levels"]
    """Share of the noise; 0 at the end, or that of timestep 0."""

    @property
    def sigma(self) -> Float[np.ndarray, " levels"]:
        """The EDM sigma."""
        return self.sigma_t / self.alpha

    def since(self, first: int) -> "Levels":
        """The way from the level of number `first` on."""
        return Levels(self.timestep[first:], self.alpha[first:], self.sigma_t[first:])


class Plan(NamedTuple):
    """What each evaluation of the network needs, one row each; float64 numpy here, float32 inside the loop."""

    timestep: Float[type_of_array, " rows"]
    """What the network is told."""
    alpha: Float[type_of_array, " rows"]
    """α of the state."""
    sigma_t: Float[type_of_array, " rows"]
    """σ_t of the state."""
    next_alpha: Float[type_of_array, " rows"]
    """α of the state that the row leads to."""
    next_sigma_t: Float[type_of_array, " rows"]
    """σ_t of the state that the row leads to."""
    weights: Float[type_of_array, "rows memory terms"]
    """Of each term in each array that is carried on; the first of these is the state. The terms are these arrays as
    they are, then x₀, ε and fresh noise."""

    def between(self, first: int, stop: int | None) -> "Plan":
        """Some of its rows."""
        return Plan(*(column[first:stop] for column in self))

    @property
    def memory(self) -> int:
        """Arrays that are carried from row to row, the state among them."""
        return self.weights.shape[1]

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise is used."""
        return bool(self.weights[:, :, -1].any())


Sum = Mapping[str, float]
"""A weighted sum of named terms."""
Row = Mapping[str, Sum]
"""Of every array that is carried on, what it becomes; one that is not named is forgotten."""


class Moment(NamedTuple):
    """An evaluation of the network: the level where it happens, and the one that its sums lead to, by number."""

    at: int
    to: int
    row: Row


class Family(enum.Enum):
    """Which noise levels a sampler can visit."""

    DISCRETE = "discrete"
    """Those of whole timesteps."""
    SIGMA = "sigma"
    """Any; Karras's and exponential ones lie between those of the first and the last timestep."""
    SOLVER = "solver"
    """Any; Karras's and exponential ones span the whole schedule, their timesteps are rounded."""
    CONSISTENCY = "consistency"
    """Those that consistency distillation trains."""


@dataclass(frozen=True)
class Sampler:
    moments: Callable[[Levels, float], Iterator[Moment]]
    """(levels, η) -> what is evaluated where, and the sums."""
    family: Family
    remembers: tuple[str, ...] = ()
    """Names of the arrays that it carries on besides the state x."""
    evaluations: int = 1
    """Of the network a step; the last step has one."""
    takes_eta: bool = False
    """Whether η has an effect."""
    multistep: bool = False
    """Whether a step divides by the lengths of those before it."""

    def plan(self, levels: Levels, eta: float = 0.0) -> Plan:
        """The rows of the whole way along `levels`. They are not finite where the levels' own numbers are not."""
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
        """Those of `moments`. Of a multistep method, a step of no length (where as many steps are asked for as there
        are timesteps, one may be visited twice) is its limit: the state and what is remembered stay as they are."""
        if not self.multistep or (moves := levels.sigma[1:] < levels.sigma[:-1] * (1 - _SAME_LEVEL)).all():
            return list(self.moments(levels, eta))
        numbers = np.append(np.flatnonzero(moves), len(moves))
        passed = self.moments(
            Levels(levels.timestep[numbers[:-1]], levels.alpha[numbers], levels.sigma_t[numbers]), eta
        )
        stay = {name: {name: 1.0} for name in ("x", *self.remembers)}
        return [next(passed)._replace(at=i, to=i + 1) if moves[i] else Moment(i, i + 1, stay) for i in _steps(levels)]


_SAME_LEVEL = 1e-7
"""Of a sigma: float32 knows no level between two that are nearer."""
_SMALLEST = 2.0**-24
"""ᾱ that stands for 0 in samplers that divide by α, as in diffusers: sigma 4096 in the place of infinity."""


def make_levels(
    sampler: Sampler,
    schedule: Schedule,
    steps: int,
    spacing: Spacing | None,
    sigmas: Sigmas = Sigmas.SCHEDULE,
    *,
    offset: int = 1,
    ends_at_first: bool = False,
) -> Levels:
    """The levels of so many steps. spacing None: LEADING, or LCM's own. offset: of LEADING timesteps.

    ends_at_first: whether the last step leads to the noise level of timestep 0, and not to the finished image: what
    diffusers calls set_alpha_to_one=False and final_sigmas_type="sigma_min".

    Raises InputError for a choice that has no effect on the sampler.
    """
    name, length = _name(sampler), len(schedule.alpha_bar)
    if sampler.family is Family.CONSISTENCY and spacing is not None:
        raise InputError(
            f"A spacing has no effect on sampler {name}, which has its own timesteps. Leave "
            f"timestep_spacing={spacing.value} out"
        )
    if sampler.family in (Family.CONSISTENCY, Family.DISCRETE) and sigmas is not Sigmas.SCHEDULE:
        able = [each for each, other in SAMPLERS.items() if other.family in (Family.SIGMA, Family.SOLVER)]
        raise InputError(f"sampler {name} visits whole timesteps, no {sigmas.value} sigmas. Those that do: {able}")
    spacing = spacing or Spacing.LEADING
    if sampler.family is Family.CONSISTENCY:
        visited = _lcm_timesteps(steps, length)
    elif sampler.family is Family.SOLVER:
        visited = _solver_timesteps(steps, length, spacing, offset)
    else:
        visited = timesteps(steps, length, spacing, offset)
    first_alpha_bar = float(schedule.alpha_bar[0]) if ends_at_first else 1.0
    end = np.sqrt(first_alpha_bar), np.sqrt(1 - first_alpha_bar)
    if sampler.family in (Family.CONSISTENCY, Family.DISCRETE):
        visited = visited.round()
        alpha_bar = schedule.alpha_bar[visited.astype(int)]
        return Levels(visited, np.append(np.sqrt(alpha_bar), end[0]), np.append(np.sqrt(1 - alpha_bar), end[1]))
    alpha_bar = np.maximum(schedule.alpha_bar, _SMALLEST)
    known = np.sqrt((1 - alpha_bar) / alpha_bar)
    sigma = np.interp(visited, np.arange(length), known)
    if sigmas is not Sigmas.SCHEDULE:
        first, last = (known[-1], known[0]) if sampler.family is Family.SOLVER else (sigma[0], sigma[-1])
        ramp = np.linspace(0, 1, steps)
        if sigmas is Sigmas.KARRAS:
            sigma = (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
        else:
            sigma = np.exp(math.log(first) + ramp * (math.log(last) - math.log(first)))
        visited = np.interp(np.log(sigma), np.log(known), np.arange(length))
        if sampler.family is Family.SOLVER:
            # diffusers rounds Karras's and cuts off the exponential ones'; the nearest is meant.
            visited = visited.round()
    shrink = 1 / np.sqrt(1 + sigma**2)
    if sampler.family is Family.SIGMA:
        end = 1.0, end[1] / end[0]  # what is given out is their state, x₀ + sigma ε
    return Levels(visited, np.append(shrink, end[0]), np.append(sigma * shrink, end[1]))


def find(name: str) -> Sampler:
    """The sampler of that name. Raises InputError, with the known ones."""
    if name not in SAMPLERS:
        raise InputError(f"There is no sampler {name!r}. Known, nearest first: {nearest_first(name, SAMPLERS)}")
    return SAMPLERS[name]


def _name(sampler: Sampler) -> str:
    return next((name for name, each in SAMPLERS.items() if each is sampler), "of your own")


def initial_scale(sampler: Sampler, levels: Levels, spacing: Spacing | None) -> float:
    """Factor from standard normal noise to the first state.

    1; but σ_t for Euler and its kin unless the spacing is LEADING, as diffusers has it: x₀ + sigma ε with its image
    left out.
    """
    own = sampler.family is Family.SIGMA and spacing not in (None, Spacing.LEADING)
    return float(levels.sigma_t[0]) if own else 1.0


# The samplers. i is the level where the network is asked, i + 1 the one that the step leads to.


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
    """Eq. 12: back to the next level along the same ε, of which η puts a share of fresh noise, eq. 16: η = 1 is DDPM's
    variance."""
    for i in _steps(levels):
        alpha, sigma, before, now = levels.alpha[i + 1], levels.sigma_t[i + 1], levels.alpha[i], levels.sigma_t[i]
        fresh = eta * sigma / now * math.sqrt(max(0.0, 1 - (before / alpha) ** 2))
        yield Moment(i, i + 1, {"x": {"x0": alpha, "epsilon": math.sqrt(sigma**2 - fresh**2), "noise": fresh}})


def _ddpm(levels: Levels, eta: float) -> Iterator[Moment]:
    """Eq. 6 and 7: a draw from q(x_next | x_t, x₀), whose variance is β̃ (diffusers: fixed_small)."""
    for i in _steps(levels):
        now, after = levels.alpha[i] ** 2, levels.alpha[i + 1] ** 2
        kept = now / after if now != after else 1.0  # of this step alone: 1 − β. 0 / 0 is a step of no length, too
        row = {
            "x0": math.sqrt(after) * (1 - kept) / (1 - now),
            "x": math.sqrt(kept) * (1 - after) / (1 - now),
            "noise": math.sqrt((1 - after) / (1 - now) * (1 - kept)),
        }
        yield Moment(i, i + 1, {"x": row})


def _lcm(levels: Levels, eta: float) -> Iterator[Moment]:
    """Algorithm 3: the consistency function c_skip x + c_out x₀ (section 4.1, with timesteps × 10 and σ_data = 1/2),
    noised again to the next level."""
    for i in _steps(levels):
        scaled = 10 * levels.timestep[i]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        alpha = levels.alpha[i + 1]
        yield Moment(i, i + 1, {"x": {"x": alpha * skip, "x0": alpha * out, "noise": levels.sigma_t[i + 1]}})


def _euler(levels: Levels, eta: float) -> Iterator[Moment]:
    """dx/dsigma = ε: from x₀ + sigma ε to x₀ + sigma_next ε."""
    for i in _steps(levels):
        yield Moment(i, i + 1, {"x": {"x0": levels.alpha[i + 1], "epsilon": levels.sigma_t[i + 1]}})


def _euler_ancestral(levels: Levels, eta: float) -> Iterator[Moment]:
    """Euler to a lower sigma than the next, then noise up to it, as much as DDPM would have."""
    sigma = levels.sigma
    for i in _steps(levels):
        up = sigma[i + 1] * math.sqrt(1 - (sigma[i + 1] / sigma[i]) ** 2)
        down = math.sqrt(sigma[i + 1] ** 2 - up**2)
        alpha = levels.alpha[i + 1]
        yield Moment(i, i + 1, {"x": {"x0": alpha, "epsilon": alpha * down, "noise": alpha * up}})


def _heun(levels: Levels, eta: float) -> Iterator[Moment]:
    """An Euler step, then the same again with the mean of ε here and ε there; the last step is Euler's alone."""
    sigma = levels.sigma
    for i in _steps(levels):
        alpha = levels.alpha[i + 1]
        euler = {"x0": alpha, "epsilon": levels.sigma_t[i + 1]}
        yield Moment(i, i + 1, {"x": euler, "first_x0": {"x0": 1.0}, "first_epsilon": {"epsilon": 1.0}})
        if i + 1 < len(levels.timestep):
            half = (sigma[i + 1] - sigma[i]) / 2
            mean = {"first_x0": alpha, "first_epsilon": alpha * (sigma[i] + half), "epsilon": alpha * half}
            yield Moment(i + 1, i + 1, {"x": mean})


_LMS_ORDER = 4


def _lms(levels: Levels, eta: float) -> Iterator[Moment]:
    """Adams–Bashforth: the polynomial through the last four ε, integrated over sigma."""
    sigma = levels.sigma
    for i in _steps(levels):
        nodes = sigma[i - np.arange(min(i + 1, _LMS_ORDER))]
        row: dict[str, float] = {"x": levels.alpha[i + 1] / levels.alpha[i]}
        for j, name in zip(range(len(nodes)), ("epsilon", "epsilon_1", "epsilon_2", "epsilon_3"), strict=False):
            others = np.delete(nodes, j)
            basis = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1] / np.prod(nodes[j] - others))
            area = basis.integ()
            row[name] = levels.alpha[i + 1] * (area(sigma[i + 1]) - area(sigma[i]))
        shifted = {"epsilon_1": {"epsilon": 1.0}, "epsilon_2": {"epsilon_1": 1.0}, "epsilon_3": {"epsilon_2": 1.0}}
        yield Moment(i, i + 1, {"x": row, **shifted})


def _log_snr(levels: Levels) -> Float[np.ndarray, " levels"]:
    """λ = log(α/σ_t), half the log SNR; infinite at the end."""
    with np.errstate(divide="ignore"):
        return np.log(levels.alpha) - np.log(levels.sigma_t)


def _slope(lam: Float[np.ndarray, " levels"], i: int) -> float:
    """Share of the last change of x₀ that half a step along λ repeats; none where there is no last one, or no half."""
    return 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) if i and np.isfinite(lam[i + 1]) else 0.0


def _dpmpp_2m(levels: Levels, eta: float) -> Iterator[Moment]:
    """Algorithm 2: x₀ is taken as linear in λ, through this x₀ and the one before; as constant in the first step and in
    the last, which leads to λ = ∞."""
    lam = _log_snr(levels)
    for i in _steps(levels):
        h = lam[i + 1] - lam[i]
        gain = -levels.alpha[i + 1] * math.expm1(-h)
        slope = _slope(lam, i)
        row = {
            "x": levels.sigma_t[i + 1] / levels.sigma_t[i],
            "x0": gain * (1 + slope),
            "previous_x0": -gain * slope,
        }
        yield Moment(i, i + 1, {"x": row, "previous_x0": {"x0": 1.0}})


def _dpmpp_2m_sde(levels: Levels, eta: float) -> Iterator[Moment]:
    """The same for the reverse SDE: twice the way along λ, and noise in the place of what is lost on it."""
    lam = _log_snr(levels)
    for i in _steps(levels):
        h = lam[i + 1] - lam[i]
        gain = -levels.alpha[i + 1] * math.expm1(-2 * h)
        slope = _slope(lam, i)
        row = {
            "x": levels.sigma_t[i + 1] / levels.sigma_t[i] * math.exp(-h),
            "x0": gain * (1 + slope),
            "previous_x0": -gain * slope,
            "noise": levels.sigma_t[i + 1] * math.sqrt(-math.expm1(-2 * h)),
        }
        yield Moment(i, i + 1, {"x": row, "previous_x0": {"x0": 1.0}})


def _unipc(levels: Levels, eta: float) -> Iterator[Moment]:
    """Algorithm 1 with p = 2: what the network says here first corrects the state (UniC), then predicts the next
    (UniP). The first step and the last are of order 1.

    `start` is the corrected state of the step before, `x0_1` and `x0_2` are what the network said there and before.
    """
    lam, count = _log_snr(levels), len(levels.timestep)

    def order(i: int) -> int:
        return min(2, i + 1, count - i)

    def line(i: int, start: str, x0: str) -> dict[str, float]:
        """From level i to i + 1 with a constant x₀."""
        gain = -levels.alpha[i + 1] * math.expm1(-(lam[i + 1] - lam[i]))
        return {start: levels.sigma_t[i + 1] / levels.sigma_t[i], x0: gain}

    def change(i: int, weight: float, new: str, old: str) -> tuple[float, Sum]:
        """weight · α (1 − e^−h) · (new − old): B₂(h) times a difference of x₀."""
        gain = -levels.alpha[i + 1] * math.expm1(-(lam[i + 1] - lam[i]))
        return weight * gain, {new: 1.0, old: -1.0}

    def back(i: int) -> float:
        """r₁ of the paper: how far the level before lies, in steps from i to i + 1. Negative."""
        return (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])

    for i in _steps(levels):
        corrected: Sum = {"x": 1.0}
        if i and order(i - 1) == 1:
            corrected = _add((1.0, line(i - 1, "start", "x0_1")), change(i - 1, 0.5, "x0", "x0_1"))
        elif i:
            r, hh = back(i - 1), -(lam[i] - lam[i - 1])
            phi = math.expm1(hh) / hh - 1  # h φ₂, then h φ₃, over B₂
            right = np.array([phi, 2 * (phi / hh - 0.5)]) / math.expm1(hh)
            before, here = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), right)
            corrected = _add(
                (1.0, line(i - 1, "start", "x0_1")),
                change(i - 1, before / r, "x0_2", "x0_1"),
                change(i - 1, here, "x0", "x0_1"),
            )
        predicted = line(i, "corrected", "x0")
        if order(i) == 2:
            predicted = _add((1.0, predicted), change(i, 0.5 / back(i), "x0_1", "x0"))
        state = _add((predicted.pop("corrected"), corrected), (1.0, predicted))
        yield Moment(i, i + 1, {"x": state, "start": corrected, "x0_1": {"x0": 1.0}, "x0_2": {"x0_1": 1.0}})


SAMPLERS = {
    "ddpm": Sampler(_ddpm, Family.DISCRETE),
    "ddim": Sampler(_ddim, Family.DISCRETE, takes_eta=True),
    "euler": Sampler(_euler, Family.SIGMA),
    "euler_ancestral": Sampler(_euler_ancestral, Family.SIGMA),
    "heun": Sampler(_heun, Family.SIGMA, ("first_x0", "first_epsilon"), evaluations=2),
    "lms": Sampler(_lms, Family.SIGMA, ("epsilon_1", "epsilon_2", "epsilon_3"), multistep=True),
    "dpmpp_2m": Sampler(_dpmpp_2m, Family.SOLVER, ("previous_x0",), multistep=True),
    "dpmpp_2m_sde": Sampler(_dpmpp_2m_sde, Family.SOLVER, ("previous_x0",), multistep=True),
    "unipc": Sampler(_unipc, Family.SOLVER, ("start", "x0_1", "x0_2"), multistep=True),
    "lcm": Sampler(_lcm, Family.CONSISTENCY),
}
"""By the names of the command line."""
