"""Few-step models: the sampler, timesteps, guidance and size that each was distilled for, as one table.

`find` gives a row by its name, which the user gives (`--preset`), or which a model's files say (`named`, and
`SamplingDefaults.preset`). A consistency model without such a name is `CONSISTENCY`.

What a row is from stands beside it. The cards of the published weights were not at hand when the table was made: what
is from memory of them alone says so.

Not here: what a preset and the other options make together, and which of them contradict: `sampling/options.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.samplers.defaults import SamplingDefaults, Spacing


@dataclass(frozen=True)
class Preset:
    """How one kind of few-step model is sampled."""

    sampler: str
    """Name of the sampler."""
    steps: tuple[int, ...]
    """Numbers of steps that the weights were distilled for, ascending."""
    default_steps: int = 4
    """Number of steps where none is given."""
    spacing: Spacing | None = None
    """Which timesteps are visited; None: the sampler's own."""
    timesteps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Timesteps of each number of steps for which they are not those of sampler and spacing."""
    most_guidance: float = 1.0
    """Largest guidance scale; 1: none, guidance is in the weights. Of no effect where guidance is an input."""
    input_guidance: float | None = None
    """Guidance scale of models that have it as an input, by default; None: there are none of this kind."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels; None: the model's own."""
    ends_at_image: bool = False
    """Whether the last step always leads to the finished image; otherwise, with ddim, as the model's files say."""
    of_one_number: bool = False
    """Whether there are other weights for each number of steps; otherwise the same ones serve for all of `steps`."""
    one_step_predicts_x0: bool = False
    """Whether the network of one step predicts x₀, and the others ε."""
    families: tuple[str, ...] = ()
    """Families of models that there are weights of this kind for, all of which predict ε; (): it is a method, which any
    model may be distilled with."""


SDXL, SD1, SD2 = "SDXL", "SD 1.x", "SD 2.x"
CONSISTENCY = "lcm"
"""The preset of a model whose files mark it as a consistency model and say no more."""
CONSISTENCY_LORA, PROGRESSIVE = "lcm-lora", "progressive"
DISTRIBUTION_MATCHING, ADVERSARIAL = "dmd", "add"
"""Presets of other students that are distilled here."""

PRESETS = {
    # Sauer et al., arXiv:2311.17042: 1 to 4 steps at 999, 749, 499, 249, no guidance, 512 × 512. Sampler and spacing
    # are those of its scheduler_config.json. SD-Turbo is the same on SD 2.x.
    "turbo": Preset("euler_ancestral", (1, 2, 3, 4), spacing=Spacing.TRAILING, size=(512, 512), families=(SDXL, SD2)),
    # Lin et al., arXiv:2402.13929: Euler, trailing, no guidance; one step predicts x₀. Weights of 1, 2, 4 and 8 steps,
    # as UNets and (but for 1) as LoRAs.
    "lightning": Preset(
        "euler",
        (1, 2, 4, 8),
        spacing=Spacing.TRAILING,
        of_one_number=True,
        one_step_predicts_x0=True,
        families=(SDXL,),
    ),
    # Luo et al., arXiv:2310.04378: the guidance scale is an input; 50 timesteps, of which few are visited. 8.5 is the
    # default of diffusers' LatentConsistencyModelPipeline.
    CONSISTENCY: Preset("lcm", tuple(range(1, 51)), input_guidance=8.5),
    # Luo et al., arXiv:2311.05556: guidance is in the weights; from memory of diffusers' guide, scales of up to 2
    # work too.
    CONSISTENCY_LORA: Preset("lcm", tuple(range(1, 51)), most_guidance=2.0),
    # Ren et al., arXiv:2404.13686; sampler and steps from memory of the card: DDIM, trailing, no guidance for the LoRAs
    # of 1, 2, 4 and 8 steps. (For that of 1 step the card has TCD with η = 1, which is DDIM for one step.)
    "hyper-sd": Preset("ddim", (1, 2, 4, 8), spacing=Spacing.TRAILING, of_one_number=True, families=(SDXL, SD1)),
    # The same, from memory of the card: the UNet of one step, at timestep 800.
    "hyper-sd-unet": Preset("lcm", (1,), 1, timesteps={1: (800,)}, families=(SDXL,)),
    # Yin et al., arXiv:2405.14867: nodes of the four-step generator, and the timestep of the one-step generator, which
    # is conditioned on 399 from noise alone. Fresh noise between the steps, which is the sampler lcm.
    "dmd2": Preset("lcm", (1, 4), timesteps={1: (399,), 4: (999, 749, 499, 249)}, of_one_number=True, families=(SDXL,)),
    # Salimans & Ho, arXiv:2202.00512: DDIM, as many steps as the last round; with guidance in the weights, or as an
    # input, Meng et al., arXiv:2210.03142. Its last step is trained to end at the finished image.
    PROGRESSIVE: Preset(
        "ddim",
        tuple(2**n for n in range(10)),
        spacing=Spacing.TRAILING,
        input_guidance=5.0,
        ends_at_image=True,
        of_one_number=True,
    ),
    # As dmd2 in four steps, and with as many trailing timesteps in other numbers of steps; any model may be distilled.
    DISTRIBUTION_MATCHING: Preset(
        "lcm",
        (1, 2, 4, 8),
        timesteps={n: tuple(range(999, 0, -1000 // n)) for n in (1, 2, 4, 8)},
        of_one_number=True,
    ),
    # As turbo, at the model's own size; any model may be distilled.
    ADVERSARIAL: Preset("euler_ancestral", (1, 2, 3, 4), spacing=Spacing.TRAILING),
}
"""By the names of the command line."""

_KINDS = ({CONSISTENCY, CONSISTENCY_LORA}, {"dmd2", DISTRIBUTION_MATCHING}, {"turbo", ADVERSARIAL})
"""Presets of one method, which may stand for each other: published weights, and students that are distilled here."""

_NAMES = {
    r"\bsd(xl|_xl)?[-_ ]turbo": "turbo",
    r"\bsdxl[-_ ]lightning": "lightning",
    r"\blcm[-_ ]lora": "lcm-lora",
    r"\bhyper[-_ ]?sd(xl|15)?[-_ ]1[-_ ]?steps?[-_ ]unet": "hyper-sd-unet",
    r"\bhyper[-_ ]?sd(?!.*cfg)": "hyper-sd",
    r"\bdmd2[-_ ]sdxl": "dmd2",
}
"""Patterns of the published weights' names. Those of merges, which have "turbo" or "lightning" somewhere in theirs and
are sampled in other ways, are not among them."""


def find(name: str) -> Preset:
    """The preset of that name. Raises InputError for an unknown name, with the known ones."""
    if name not in PRESETS:
        known = ", ".join(nearest_first(name, PRESETS))
        raise InputError(f"There is no preset {name!r}. Known, nearest first: {known}")
    return PRESETS[name]


def same_kind(one: str, other: str) -> bool:
    """Whether weights of one preset may be sampled by the other: they are of one method."""
    return one == other or any({one, other} <= kind for kind in _KINDS)


_STEPS = re.compile(r"(\d+)[-_ ]?steps?(?![a-z])")


def named(*titles: object) -> dict[str, Any]:
    """What one of these titles, from a file's metadata, says if it is of published weights: the preset, and the number
    of steps where weights are of one number. {} for others, and for what is not a text."""
    texts = [title.lower() for title in titles if isinstance(title, str)]
    found = ((text, name) for text in texts for pattern, name in _NAMES.items() if re.search(pattern, text))
    if (first := next(found, None)) is None:
        return {}
    (text, name), preset = first, find(first[1])
    number = _STEPS.search(text)
    steps = None if number is None else int(number[1])
    return {"preset": name} | ({"steps": steps} if preset.of_one_number and steps in preset.steps else {})


def with_preset(sampling: SamplingDefaults | None, name: str | None) -> SamplingDefaults | None:
    """A model's defaults with another preset, or with none."""
    if name == (sampling or SamplingDefaults()).preset:
        return sampling
    return with_stated(sampling, {} if name is None else {"preset": name})


STATED = "sdxl_jax.sampling"
"""Key of a file's metadata for what `stated` makes of its defaults, as JSON."""


def stated(sampling: SamplingDefaults | None) -> dict[str, Any]:
    """What a model was distilled for, for files that say nothing else of it: preset, steps, guidance, size.
    {}: nothing."""
    given = sampling or SamplingDefaults()
    found = {name: getattr(given, name) for name in _STATED if getattr(given, name) is not None}
    # Without a name for it, a UNet with guidance as an input is sampled as a consistency model.
    named_sampler = found and given.preset is None and given.sampler is not None
    return found | ({"sampler": given.sampler} if named_sampler else {})


def with_stated(sampling: SamplingDefaults | None, said: Mapping[str, Any]) -> SamplingDefaults | None:
    """Defaults with what another model's files say it was distilled for (`stated`). Raises InputError for an unknown
    preset."""
    if said.get("preset") is not None:
        find(said["preset"])
    changed = replace(sampling or SamplingDefaults(), **{name: said.get(name) for name in _STATED})
    changed = replace(changed, sampler=said.get("sampler", changed.sampler))
    return None if changed == SamplingDefaults() else changed


_STATED = ("preset", "steps", "guidance", "size")


def listed(steps: tuple[int, ...]) -> str:
    """Numbers of steps in words: 1, 2, 4 or 8; 1 to 50."""
    first, last = min(steps), max(steps)
    if len(steps) > 2 and list(steps) == list(range(first, last + 1)):
        return f"{first} to {last}"
    *others, final = map(str, steps)
    return f"{', '.join(others)} or {final}" if others else final
