"""Samplers: which timesteps are visited, and how each step goes.

A sampler is two functions. `plan` (numpy, float64, before compilation) lists what each step needs; `step` (jax, one
compiled body for all steps) takes the state, the denoised prediction, the step's row of the plan, and fresh noise. Two
kinds of state are in use: x_t = α x₀ + σ_t ε (DDIM, DDPM), and the EDM form x₀ + sigma ε (Euler), which the network
sees divided by √(1 + sigma²).

Sources: DDPM, Ho et al. (arXiv:2006.11239) eq. 6 and 7; DDIM, Song et al. (arXiv:2010.02502) eq. 12; Euler, Karras et
al. (arXiv:2206.00364) algorithm 1 without its second-order correction. Timesteps and constants as in diffusers'
schedulers of the same names.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sdxl_jax.diffusion.parameterisation import Denoised
from sdxl_jax.diffusion.schedule import Schedule
from sdxl_jax.errors import InputError

Array = jax.Array


class Spacing(enum.Enum):
    """Which of the training's timesteps a sampler visits. Lin et al. (arXiv:2305.08891), table 2."""

    LEADING = "leading"
    """Multiples of T // steps, plus an offset: 1, 21, 41 … 981. What diffusers does with the SDXL weights."""
    TRAILING = "trailing"
    """Counted down from the last: 999, 979 … 19. What sgm does."""
    LINSPACE = "linspace"
    """Evenly from 0 to the last, both included; not whole numbers in general."""


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


class Plan(NamedTuple):
    """What each step needs, one row a step; float64 numpy here, float32 inside the loop."""

    timestep: Float[np.ndarray, " steps"]
    """What the network is told."""
    input_scale: Float[np.ndarray, " steps"]
    """Factor from the sampler's state to the network's input x_t."""
    alpha: Float[np.ndarray, " steps"]
    """α of the network's input."""
    sigma_t: Float[np.ndarray, " steps"]
    """σ_t of the network's input."""
    now: Float[np.ndarray, " steps"]
    """Noise level of the state: ᾱ, or the EDM sigma."""
    next: Float[np.ndarray, " steps"]
    """Noise level that the step leads to."""


Step = Callable[[Array, Denoised, Plan, Array], Array]
"""(state, prediction, row of the plan, standard normal noise) -> next state."""


@dataclass(frozen=True)
class Sampler:
    plan: Callable[[Schedule, Float[np.ndarray, " steps"]], Plan]
    step: Step
    initial_scale: Callable[[Plan, Spacing], float]
    """Factor from standard normal noise to the first state."""
    stochastic: bool = False
    """Whether `step` uses its noise."""


def _plan_by_alpha_bar(schedule: Schedule, timesteps: Float[np.ndarray, " steps"]) -> Plan:
    """For states x_t. The last step leads to ᾱ = 1, no noise: diffusers' default set_alpha_to_one=True, where its
    Stable Diffusion configurations for DDIM stop at ᾱ of timestep 0."""
    visited = timesteps.round().astype(int)
    alpha_bar = schedule.alpha_bar[visited]
    after = np.append(alpha_bar[1:], 1.0)
    ones = np.ones_like(alpha_bar)
    return Plan(visited.astype(np.float64), ones, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), alpha_bar, after)


def _plan_by_sigma(schedule: Schedule, timesteps: Float[np.ndarray, " steps"]) -> Plan:
    """For states x₀ + sigma ε. Fractional timesteps get the interpolated sigma; the last step leads to 0."""
    sigma = np.interp(timesteps, np.arange(len(schedule.sigma)), schedule.sigma)
    if not np.isfinite(sigma).all():
        raise InputError(
            "At zero terminal SNR the first sigma is infinite, which this sampler cannot start from. "
            "Use the sampler ddim, or a schedule with zero_terminal_snr=False"
        )
    shrink = 1 / np.sqrt(1 + sigma**2)
    return Plan(timesteps, shrink, shrink, sigma * shrink, sigma, np.append(sigma[1:], 0.0))


def _ddim_step(state: Array, prediction: Denoised, row: Plan, noise: Array) -> Array:
    """Eq. 12 with η = 0: back to the noise level `next` along the same ε."""
    return jnp.sqrt(row.next) * prediction.x0 + jnp.sqrt(1 - row.next) * prediction.epsilon


def _ddpm_step(state: Array, prediction: Denoised, row: Plan, noise: Array) -> Array:
    """Eq. 6 and 7: a draw from q(x_next | x_t, x₀), whose variance is β̃ (diffusers: fixed_small)."""
    alpha = row.now / row.next  # of this step alone: 1 − β
    mean_x0 = jnp.sqrt(row.next) * (1 - alpha) / (1 - row.now)
    mean_state = jnp.sqrt(alpha) * (1 - row.next) / (1 - row.now)
    variance = (1 - row.next) / (1 - row.now) * (1 - alpha)
    return mean_x0 * prediction.x0 + mean_state * state + jnp.sqrt(variance) * noise


def _euler_step(state: Array, prediction: Denoised, row: Plan, noise: Array) -> Array:
    """dx/dsigma = (x − x₀) / sigma = ε, one Euler step of it."""
    return state + (row.next - row.now) * prediction.epsilon


def _unit(plan: Plan, spacing: Spacing) -> float:
    return 1.0


def _euler_initial_scale(plan: Plan, spacing: Spacing) -> float:
    """√(1 + sigma²), which x₀ + sigma ε has for images of unit variance; sigma alone unless spacing is LEADING, as
    diffusers has it."""
    sigma = plan.now[0]
    return float(np.sqrt(1 + sigma**2) if spacing is Spacing.LEADING else sigma)


DDIM = Sampler(_plan_by_alpha_bar, _ddim_step, _unit)
DDPM = Sampler(_plan_by_alpha_bar, _ddpm_step, _unit, stochastic=True)
EULER = Sampler(_plan_by_sigma, _euler_step, _euler_initial_scale)

SAMPLERS = {"ddim": DDIM, "ddpm": DDPM, "euler": EULER}
"""By the names of the command line."""
