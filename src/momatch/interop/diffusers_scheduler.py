"""What a scheduler of diffusers says about its network: noise schedule, clock, prediction type, clipping.

| scheduler                       | schedule         | clock       | prediction                             |
|---------------------------------|------------------|-------------|----------------------------------------|
| with betas: DDPM, DDIM, Euler … | `tabulated`      | `timesteps` | epsilon, sample, v_prediction          |
| FlowMatchEuler, FlowMatchHeun   | `rectified_flow` | `flow`      | flow velocity                          |
| EDMEuler, EDMDPMSolverMultistep | `edm`            | `edm`       | epsilon: EDM's F; v_prediction: its −F |
| Euler with continuous time      | either of both   | `edm`       | v_prediction (EDM's −F for ς_d = 1)    |
| ScoreSdeVe                      | `geometric`      | `exploding` | the score of x + σ ε                   |

The betas are read from diffusers' own object, so every way of making them counts: linear, scaled_linear,
squaredcos_cap_v2, trained_betas, rescaled to zero terminal SNR, shifted as CogVideoX's. How a scheduler
spaces and takes its steps is its own affair (shift_terminal is its last noise level before the clean image,
say): momatch has its own sampler.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from momatch.diffusion import conventions, process, schedules
from momatch.diffusion.conventions import TimeConvention
from momatch.diffusion.schedules import NoiseSchedule
from momatch.networks.diffusers import library
from momatch.utils.errors import Notice, UsageError

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
VE = ("ScoreSdeVeScheduler",)
SHIFTED = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)  # their betas are those before a shift of the SNR
PREDICTIONS: dict[str, process.Prediction] = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
KARRAS_RHO = 7.0
GEOMETRIC_RHO = 100.0  # EDM's grid with this ρ is nearly geometric, and float32 can still compute it


@dataclass(frozen=True)
class Noise:
    """The noise that a network was trained with, and how it is told.

    Attributes:
        schedule: λ(t).
        time: the network's clock and scale.
        prediction: what its output stands for.
        sigma_data: of prediction "edm".
        negated: its output has the other sign.
        score: its output is the score.
        clip: it keeps its estimates of x in ± this; None if it does not.
    """

    schedule: NoiseSchedule
    time: TimeConvention
    prediction: process.Prediction
    sigma_data: float = process.SIGMA_DATA
    negated: bool = False
    score: bool = False
    clip: float | None = None


def read(
    config: dict[str, Any],
    tokens: int,
    time_unit: float = 1.0,
    mu: Callable[[int, int], float] | None = None,
    steps: int = 0,
) -> Noise:
    """From a scheduler_config.json.

    Args:
        config: its contents.
        tokens: into how many the network cuts a picture; a dynamic shift depends on it.
        time_unit: of the network's clock, in timesteps: 1000 for Flux, which counts to 1.
        mu: (tokens, steps) → μ of a dynamic shift, where the pipeline has a rule of its own.
        steps: that it is given.

    Raises:
        UsageError: if it is a scheduler or a prediction type that momatch does not know, or they do not fit.
    """
    name = config.get("_class_name")
    kind = getattr(library(), str(name), None)
    if kind is None:
        raise _unknown(name)
    try:
        scheduler = kind.from_config(config)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise UsageError(f"diffusers cannot make the {name} of this scheduler_config.json: {error}") from None
    settings: dict[str, Any] = dict(scheduler.config)
    if name in FLOW or settings.get("use_flow_sigmas"):
        return _flow(settings, tokens, time_unit, mu and mu(tokens, steps))
    if name in EDM:
        return _edm(settings)
    if name in VE:
        return _exploding(settings)
    if isinstance(getattr(scheduler, "betas", None), torch.Tensor):
        return _table(scheduler, settings)
    raise _unknown(name)


def _unknown(name: Any) -> UsageError:
    return UsageError(
        f"unknown scheduler {name!r}; momatch reads those with betas (DDPMScheduler, DDIMScheduler, "
        f"EulerDiscreteScheduler, …) and {', '.join(FLOW + EDM + VE)}: wrap the network in momatch.Denoiser "
        "instead (docs/bring-your-teacher.md)"
    )


def _table(scheduler: Any, settings: dict[str, Any]) -> Noise:
    kind = settings.get("prediction_type", "epsilon")
    _known(kind, PREDICTIONS)
    betas = scheduler.betas.double()
    if type(scheduler).__name__ in SHIFTED:
        kept = scheduler.alphas_cumprod.double()
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    survives = torch.cumprod(1 - betas, 0)[:-1]  # the last may be 0, for which some schedulers put a little
    if not torch.allclose(survives, scheduler.alphas_cumprod.double()[:-1], rtol=1e-3):
        raise UsageError(
            f"{type(scheduler).__name__} changes the noise that its betas give; momatch cannot read that"
        )
    if kind == "epsilon" and float(betas[-1]) >= 1:
        raise UsageError(
            "this scheduler ends in pure noise (rescale_betas_zero_snr), where epsilon says nothing about "
            "the picture; set prediction_type to what the network was trained for, v_prediction perhaps"
        )
    values = betas.tolist()
    try:
        schedule = schedules.tabulated(values)
    except ValueError as error:
        raise UsageError(f"the betas of this scheduler cannot be used: {error}") from None
    if settings.get("timestep_type") == "continuous" and kind == "v_prediction":  # heeded for v alone
        return Noise(_spaced(schedule, settings), conventions.edm(1.0), "v", sigma_data=1.0)
    clip = _clip(type(scheduler), settings)
    return Noise(schedule, conventions.timesteps(values), PREDICTIONS[kind], clip=clip)


def _spaced(table: NoiseSchedule, settings: dict[str, Any]) -> NoiseSchedule:
    """The σ of continuous time: those of the betas, or a grid between two bounds."""
    if settings.get("use_karras_sigmas"):
        rho = KARRAS_RHO
    elif settings.get("use_exponential_sigmas"):
        rho = GEOMETRIC_RHO
    else:
        return table
    steps = len(table.options["betas"])
    ends = torch.exp(-table(torch.tensor([1 / steps, 1.0], dtype=torch.float64)) / 2).tolist()
    low, high = (settings.get(f"sigma_{end}") or own for end, own in zip(("min", "max"), ends, strict=True))
    return schedules.edm(float(low), float(high), rho)


def _clip(kind: type, settings: dict[str, Any]) -> float | None:
    """What it keeps its estimates in, if it does; a percentile that is larger is left out, with a notice."""
    known = inspect.signature(kind.__init__).parameters
    if "thresholding" in known and settings.get("thresholding"):
        largest = float(settings.get("sample_max_value", 1.0))
        if largest == 1:  # whatever the percentile is, it then only clips
            return 1.0
        percentile = settings.get("dynamic_thresholding_ratio", 0.995)
        warnings.warn(
            f"this scheduler has thresholding with sample_max_value = {largest:g}, which is not read with a "
            f"teacher; ask for it by guidance.clip = dynamic and guidance.percentile = {percentile:g}",
            Notice,
            stacklevel=2,
        )
        return None
    clips = "clip_sample" in known and settings.get("clip_sample")
    return float(settings.get("clip_sample_range", 1.0)) if clips else None


def _flow(settings: dict[str, Any], tokens: int, time_unit: float, mu: float | None) -> Noise:
    _known(settings.get("prediction_type", "flow_prediction"), ("flow_prediction",))
    if settings.get("invert_sigmas"):
        raise UsageError("this scheduler has invert_sigmas = True, which momatch cannot read")
    shift = settings.get("flow_shift", settings.get("shift", 1.0))
    if settings.get("use_dynamic_shifting"):
        shift = dynamic_shift(settings, tokens, mu)
    multiplier = settings["num_train_timesteps"] / time_unit
    # Such networks know t′ = 1, pure noise; so does their student.
    schedule = schedules.rectified_flow(float(shift), schedules.TABLE_LOGSNR_MIN)
    return Noise(schedule, conventions.flow(multiplier), "flow")


def dynamic_shift(settings: dict[str, Any], tokens: int, mu: float | None = None) -> float:
    """The shift that diffusers' pipelines take for pictures of that many tokens.

    μ is linear in the number of tokens, through (base_image_seq_len, base_shift) and (max_image_seq_len,
    max_shift), unless it is given; the shift is exp(μ), or μ itself where time_shift_type is "linear".

    Source: `calculate_shift` of diffusers' FluxPipeline, and FlowMatchEulerDiscreteScheduler.time_shift.
    """
    if mu is None:
        low, high = settings["base_image_seq_len"], settings["max_image_seq_len"]
        slope = (settings["max_shift"] - settings["base_shift"]) / (high - low)
        mu = float(settings["base_shift"] + slope * (tokens - low))
    return mu if settings.get("time_shift_type") == "linear" else math.exp(mu)


def _edm(settings: dict[str, Any]) -> Noise:
    kind = settings["prediction_type"]
    _known(kind, ("epsilon", "v_prediction"))
    rho = GEOMETRIC_RHO if settings["sigma_schedule"] == "exponential" else settings["rho"]
    schedule = schedules.edm(float(settings["sigma_min"]), float(settings["sigma_max"]), float(rho))
    sigma_data = float(settings["sigma_data"])
    return Noise(schedule, conventions.edm(sigma_data), "edm", sigma_data, negated=kind == "v_prediction")


def _exploding(settings: dict[str, Any]) -> Noise:
    """The data of such networks lie in [0, 1]; ScoreSdeVePipeline clamps its samples to that."""
    low, high = (2 * float(settings[f"sigma_{end}"]) for end in ("min", "max"))  # [−1, 1] is twice as wide
    return Noise(schedules.geometric(low, high), conventions.exploding(0.0, 1.0), "eps", score=True)


def _known(kind: Any, choices: Any) -> None:
    if kind not in choices:
        raise UsageError(
            f"unknown prediction_type {kind!r} in the scheduler's config; momatch reads {', '.join(choices)}"
        )
