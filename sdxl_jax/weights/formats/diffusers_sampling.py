"""Sampling settings of scheduler/scheduler_config.json, read and written.

    read      fields to `SamplingDefaults`, and a note for each field that changes the result and is not followed
    written   and back

A field counts if the file's scheduler class reads it; its default is that class's in diffusers. Many files have fields
of other classes too, which diffusers ignores. Three of them count nevertheless, because diffusers reads them when it
makes another scheduler from the file: `set_alpha_to_one`, `use_karras_sigmas` and `final_sigmas_type`. The schedule
that the weights were trained with (betas, prediction) is read by `diffusers_fields.schedule_config`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import from_json
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import FinalSigma, SamplingDefaults
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.weights.formats.json_files import Fields


class _Class(NamedTuple):
    """One of diffusers' scheduler classes."""

    sampler: str
    """The equivalent sampler here."""
    reads: Mapping[str, Any]
    """Its fields, with their defaults."""


_X0 = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_FLOW = {"use_dynamic_shifting": False, "time_shift_type": "exponential", "flow_shift": 1.0}
_SOLVER = {
    **_LINSPACE,
    **_SIGMAS,
    **_X0,
    **_FLOW,
    **{"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"},
}
_CLASSES = {
    "DDIMScheduler": _Class("ddim", {**_LEADING, **_X0, **_CLIPPED, "set_alpha_to_one": True}),
    "DDPMScheduler": _Class("ddpm", {**_LEADING, **_X0, **_CLIPPED, "variance_type": "fixed_small"}),
    "EulerDiscreteScheduler": _Class(
        "euler",
        {
            **_LINSPACE,
            **_SIGMAS,
            **{"interpolation_type": "linear", "sigma_min": None, "sigma_max": None, "final_sigmas_type": "zero"},
        },
    ),
    "EulerAncestralDiscreteScheduler": _Class("euler_ancestral", _LINSPACE),
    "HeunDiscreteScheduler": _Class("heun", {**_LINSPACE, **_SIGMAS, **_CLIPPED, "clip_sample": False}),
    "LMSDiscreteScheduler": _Class("lms", {**_LINSPACE, **_SIGMAS}),
    "DPMSolverMultistepScheduler": _Class(
        "dpmpp_2m",
        {
            **_SOLVER,
            **{"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False},
            **{"use_lu_lambdas": False, "lambda_min_clipped": float("-inf"), "variance_type": None},
        },
    ),
    "UniPCMultistepScheduler": _Class(
        "unipc",
        {
            **_SOLVER,
            **{"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None},
            **{"sigma_min": None, "sigma_max": None, "shift_terminal": None},
        },
    ),
    "LCMScheduler": _Class(
        "lcm",
        {
            **_LEADING,
            **_X0,
            **_CLIPPED,
            **{
                "clip_sample": False,
                "set_alpha_to_one": True,
                "original_inference_steps": 50,
                "timestep_scaling": 10.0,
            },
        },
    ),
}
"""Scheduler classes that are implemented."""
_EDM = {"sigma_schedule": "karras", "rho": 7.0, "final_sigmas_type": "zero"}
_CLASSES |= {
    "EDMEulerScheduler": _Class("euler", _EDM),
    "EDMDPMSolverMultistepScheduler": _Class(
        "dpmpp_2m",
        {**_EDM, **_X0, **{"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}},
    ),
    "FlowMatchEulerDiscreteScheduler": _Class("euler", {}),
}
"""And those of continuous noise levels, whose law is read by `diffusers_fields.noise_config`."""
_SDE = {"sde-dpmsolver++": "dpmpp_2m_sde", "sde-dpmsolver": "dpmpp_2m_sde"}
"""Sampler of an `algorithm_type`; for any other it is the class's."""

_FOLLOWED = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type")
_FOLLOWED += ("use_karras_sigmas", "use_exponential_sigmas", "sigma_schedule")
_EQUIVALENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "algorithm_type": (("dpmsolver++", "sde-dpmsolver++"), "the ++ algorithm is used"),
    "clip_sample": ((False,), "the predicted image is not clipped"),
    "disable_corrector": (([],), "every step is corrected"),
    "euler_at_final": ((False,), ""),
    "interpolation_type": (("linear",), "noise levels are interpolated linearly"),
    "lambda_min_clipped": ((float("-inf"), "-inf", "-Infinity", None), "the whole schedule is used"),
    "lower_order_final": ((True,), "the last step is of first order"),
    "original_inference_steps": ((50,), "50 are used"),
    "predict_x0": ((True,), "the solver works with x₀"),
    "rho": ((7.0,), "7 is used"),
    "shift_terminal": ((None,), "nothing is shifted"),
    "sigma_max": ((None,), "the schedule's own is used"),
    "sigma_min": ((None,), "the schedule's own is used"),
    "solver_order": ((2,), "order 2 is used"),
    "solver_p": ((None,), "unipc predicts by itself"),
    "solver_type": (("midpoint", "heun", "logrho", "bh1", "bh2"), ""),
    "thresholding": ((False,), "the predicted image is not thresholded"),
    "timestep_scaling": ((10.0,), "10 is used"),
    "use_beta_sigmas": ((False, None), "noise levels are those of the timesteps"),
    "use_dynamic_shifting": ((False, None), "nothing is shifted"),
    "use_lu_lambdas": ((False, None), "noise levels are those of the timesteps"),
    # Another variance changes the amount of noise; the logarithm of the same variance does not.
    "variance_type": (("fixed_small", "fixed_small_log", None), "the variance is fixed_small"),
}
"""Fields that are not followed: the values for which diffusers samples as here, and what is done for other values."""
_SOLVER_TYPES = {"dpmpp_2m": ("heun", "midpoint is used"), "unipc": ("bh1", "bh2 is used")}
"""Of each sampler the one solver_type that is not equivalent: diffusers treats the others as its default."""
_LAST_STEP = {
    "euler_at_final": "the last step is of second order",
    "lower_order_final": "of fewer than 15 steps, the last is of second order too",
}
"""Fields of DPM-Solver for a last step that does not end at noise level zero."""
_UNREAD = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type", "flow_shift")
"""Fields that matter only together with another one, for which there is a note."""
_TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_TRAINED += ("rescale_betas_zero_snr", "timestep_type", "use_flow_sigmas")
_OTHERS = ("skip_prk_steps", "sigma_data", "rho", "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
_OTHERS += ("shift", "noise_sampler_seed", "s_noise", "invert_sigmas", "stochastic_sampling")
_KNOWN = {*_FOLLOWED, *_EQUIVALENT, *_UNREAD, *_TRAINED, *_OTHERS}


_STATED = "_sdxl_jax"
"""Field for what the weights were distilled for (`presets.stated`); diffusers ignores those with an underscore."""


def read(
    fields: Fields, where: str, zero_terminal_snr: bool, distilled: bool
) -> tuple[SamplingDefaults | None, tuple[str, ...]]:
    """(sampling defaults of a scheduler's file, notes on fields that are not followed). where: its path, for messages.

    None: the defaults of a model without such a file. Raises InputError for a value that no scheduler has.
    """
    name, notes = fields.get("_class_name"), []
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    complete: dict[str, Any] = {**(kind.reads if kind else {}), **fields}
    own = SamplingDefaults()
    sampler = None
    if kind is not None:
        sampler = kind.sampler
        if sampler == "dpmpp_2m":
            sampler = _SDE.get(str(complete.get("algorithm_type")), sampler)
    spacing = _spacing(complete, where)
    if zero_terminal_snr and "timestep_spacing" not in fields:
        spacing = None  # the last timestep must be visited: the model was trained for it
    default_sampler, default_spacing = own.sampler_of(zero_terminal_snr, distilled), own.spacing_of(zero_terminal_snr)
    found = SamplingDefaults(
        sampler=None if sampler == default_sampler else sampler,
        spacing=None if spacing is default_spacing else spacing,
        steps_offset=_offset(complete, where),
        sigmas=_sigmas(complete),
        # Other classes do not have it, and a DDIM that is made from their file then has its own default.
        set_alpha_to_one=_flag(complete, "set_alpha_to_one", where, name not in (None, "PNDMScheduler")),
        final_sigma=_final_sigma(complete, where),
    )
    if isinstance(said := fields.get(_STATED), dict):
        said = presets.stated(from_json(said, SamplingDefaults))
        found = presets.with_stated(found, said if said.get("sampler") in (None, sampler) else {}) or own
    if name is not None and kind is None:
        notes.append(f"{where} has _class_name={json.dumps(name)}, which is not implemented: {default_sampler} is used")
    if str(name).startswith("EDM") and found.final_sigma is not FinalSigma.ZERO:
        notes.append(
            f"{where} has final_sigmas_type={found.final_sigma.value}, which is not followed: the last step leads to "
            "the finished image"
        )
        found = replace(found, final_sigma=FinalSigma.ZERO)
    if found.spacing is Spacing.LEADING:
        notes.append(
            f"{where} has timestep_spacing=leading, which is followed: the last timestep, where the schedule has zero "
            "SNR, is not visited. --timestep-spacing trailing visits it"
        )
    notes += _unfollowed(complete, fields, where, kind, found)
    return (None if found == own else found), tuple(notes)


def is_turbo(fields: Fields, height: int, width: int) -> bool:
    """Whether a scheduler's file is that of SDXL-Turbo, whose latents are 64 × 64: no other published model of SDXL has
    this sampler with trailing timesteps at this size."""
    ancestral = fields.get("_class_name") == "EulerAncestralDiscreteScheduler"
    return ancestral and fields.get("timestep_spacing") == "trailing" and (height, width) == (64, 64)


def _unfollowed(
    complete: Mapping[str, Any], fields: Fields, where: str, kind: _Class | None, found: SamplingDefaults
) -> Iterator[str]:
    """A note for each field that would change the result and is not followed. complete: the fields with defaults."""
    for name in kind.reads if kind else ():
        value = complete[name]
        if name not in _EQUIVALENT:
            continue
        equivalent, instead = _EQUIVALENT[name]
        if name == "solver_type" and kind is not None:
            other, instead = _SOLVER_TYPES[kind.sampler]
            equivalent = tuple(each for each in equivalent if each != other)
        if name in _LAST_STEP and kind is not None and kind.sampler == "dpmpp_2m":
            if found.final_sigma is FinalSigma.ZERO:
                continue  # the last step is of first order then, in diffusers and here
            equivalent, instead = (False,), _LAST_STEP[name]
        if value not in equivalent:
            left_out = "" if name in fields else ", by leaving it out"
            yield f"{where} has {name}={json.dumps(value)}{left_out}, which is not followed: {instead}"
    for name, value in fields.items():
        if name not in _KNOWN and not name.startswith("_") and value not in (None, False, [], {}):
            yield f"{where} has {name}={json.dumps(value)}, an unknown field, which is not followed"


def _wrong(where: str, name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{where} has {name}={json.dumps(value)}, expected {expected}. Correct the file")


def _spacing(fields: Fields, where: str) -> Spacing | None:
    value = fields.get("timestep_spacing")
    known = [each.value for each in Spacing]
    if value is not None and value not in known:
        raise _wrong(where, "timestep_spacing", value, " or ".join(known))
    return None if value is None else Spacing(value)


def _offset(fields: Fields, where: str) -> int:
    value = fields.get("steps_offset", SamplingDefaults().steps_offset)
    if type(value) is not int or value < 0:
        raise _wrong(where, "steps_offset", value, "a whole number, 0 or more")
    return value


def _flag(fields: Fields, name: str, where: str, default: bool) -> bool:
    value = fields.get(name, default)
    if type(value) is not bool:
        raise _wrong(where, name, value, "true or false")
    return value


def _final_sigma(fields: Fields, where: str) -> FinalSigma:
    value = fields.get("final_sigmas_type", "zero")
    known = [each.value for each in FinalSigma]
    if value not in known:
        raise _wrong(where, "final_sigmas_type", value, " or ".join(known))
    return FinalSigma(value)


def _sigmas(fields: Fields) -> Sigmas:
    if fields.get("sigma_schedule") == "exponential":  # of EDM; its other one, karras, is the law's own
        return Sigmas.EXPONENTIAL
    chosen = (each for each in (Sigmas.KARRAS, Sigmas.EXPONENTIAL) if fields.get(f"use_{each.value}_sigmas"))
    return next(chosen, Sigmas.SCHEDULE)


def written_edm(sampling: SamplingDefaults) -> dict[str, Any]:
    """The fields about sampling of an EDM scheduler's file."""
    sampler = sampling.sampler_of(False, False)
    solver = sampler in ("dpmpp_2m", "dpmpp_2m_sde")
    return {
        "_class_name": "EDMDPMSolverMultistepScheduler" if solver else "EDMEulerScheduler",
        "sigma_schedule": "exponential" if sampling.sigmas is Sigmas.EXPONENTIAL else "karras",
        "rho": 7.0,
        **({"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}),
    }


def written(sampling: SamplingDefaults | None, zero_terminal_snr: bool, distilled: bool) -> dict[str, Any]:
    """The fields about sampling of a model's scheduler_config.json, `_class_name` among them."""
    sampling = sampling or SamplingDefaults()
    said = presets.stated(sampling)
    if sampling.preset is not None:
        preset = presets.find(sampling.preset)
        sampling = replace(sampling, sampler=preset.sampler, spacing=preset.spacing, sigmas=Sigmas.SCHEDULE)
        sampling = replace(sampling, set_alpha_to_one=sampling.set_alpha_to_one or preset.ends_at_image)
    # LCM's class is what marks a model as distilled.
    sampler = "lcm" if distilled else sampling.sampler_of(zero_terminal_snr, distilled)
    name = "DPMSolverMultistepScheduler" if sampler == "dpmpp_2m_sde" else _name_of(sampler)
    reads = _CLASSES[name].reads
    fields: dict[str, Any] = {
        "_class_name": name,
        "clip_sample": False,
        "set_alpha_to_one": sampling.set_alpha_to_one,
        "steps_offset": sampling.steps_offset,
        "timestep_spacing": sampling.spacing_of(zero_terminal_snr).value,
    }
    if sampler == "euler":  # as the official file has it
        fields |= {"interpolation_type": "linear", "sample_max_value": 1.0, "skip_prk_steps": True}
    elif sampler == "ddim":
        fields["sample_max_value"] = 1.0
    elif sampler == "dpmpp_2m_sde":
        fields["algorithm_type"] = "sde-dpmsolver++"
    if "use_karras_sigmas" in reads or sampling.sigmas is Sigmas.KARRAS:
        fields["use_karras_sigmas"] = sampling.sigmas is Sigmas.KARRAS
    if sampling.sigmas is Sigmas.EXPONENTIAL:
        fields["use_exponential_sigmas"] = True
    if sampling.final_sigma is not FinalSigma.ZERO:
        fields["final_sigmas_type"] = sampling.final_sigma.value
    return fields | ({_STATED: said} if said else {})


def _name_of(sampler: str) -> str:
    return next(name for name, kind in _CLASSES.items() if kind.sampler == sampler)
