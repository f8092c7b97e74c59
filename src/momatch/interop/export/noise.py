"""The sampler of an exported student: diffusers' own where that is exact, else ours, which travels along."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from momatch.diffusion.sampling import time_grid
from momatch.models.model import Model
from momatch.networks.configs import DiffusersConfig
from momatch.networks.diffusers import family_of

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}
SPACES = {"timesteps": "vp", "logsnr": "vp", "flow": "flow", "edm": "edm", "exploding": "ve"}
OURS = Path(__file__).with_name("moment_matching_scheduler.py")


def sampler(model: Model) -> Any:
    """What goes into the folder's scheduler/: DDPMScheduler if that is the student's sampler, else ours."""
    return stock_ddpm(model) or moment_matching(model)


def stock_ddpm(model: Model) -> Any | None:
    """Diffusers' DDPMScheduler, if it takes exactly the student's steps; else None.

    It does on the table of betas that the network was trained with, or its first part, where k divides the
    length, so that "trailing" timesteps are those of t = 1, (k−1)/k, …; its "fixed_small" variance is the
    posterior's.
    """
    time, schedule = model.denoiser.time, model.schedule
    if time.name != "timesteps" or schedule.name != "tabulated" or model.denoiser.prediction == "edm":
        return None
    betas = schedule.options["betas"]
    if _learns_variance(model):  # diffusers' pipelines would take it for part of the prediction
        return None
    if time.options["betas"][: len(betas)] != betas or len(betas) % model.steps:
        return None
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    clip = model.denoiser.clip
    return DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        variance_type="fixed_small",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        prediction_type=PREDICTIONS[model.denoiser.prediction],  # type: ignore (str for a Literal)
        timestep_spacing="trailing",
    )


def _learns_variance(model: Model) -> bool:
    config = getattr(model.network, "config", {})
    return config.get("out_channels") not in (None, config.get("in_channels"))


def moment_matching(model: Model) -> Any:
    """`MomentMatchingScheduler` on the student's own noise levels."""
    from momatch.interop.export.moment_matching_scheduler import MomentMatchingScheduler

    prediction, data_range, unit = str(model.denoiser.prediction), [-1.0, 1.0], 1.0
    if isinstance(model.network, DiffusersConfig):
        family = family_of(model.network.class_name, model.network.record)
        unit = family.time_unit  # its pipeline divides by it
        if model.network.negated != family.negated:  # its pipeline sees to the network's own sign
            prediction = f"-{prediction}"
        if model.network.score:
            prediction, data_range = "score", list(model.denoiser.time.options.values())
    (logsnrs, times), *others = (_grid(model, k, unit) for k in sorted(model.step_counts, reverse=True))
    return MomentMatchingScheduler(
        logsnrs=logsnrs,
        native_timesteps=times,
        prediction_type=prediction,
        space=SPACES[model.denoiser.time.name],
        data_range=data_range,
        sigma_data=model.denoiser.sigma_data,
        clip=model.denoiser.clip,
        other_grids=[list(grid) for grid in others] or None,
    )


def _grid(model: Model, steps: int, unit: float) -> tuple[list[float], list[float]]:
    """logSNR, and what the network is told times `unit`, at each of so many calls."""
    logsnr = model.schedule(time_grid(steps))[:-1]
    times = unit * model.denoiser.time.to_time(logsnr)
    return logsnr.tolist(), times.tolist()


def is_stock(scheduler: Any) -> bool:
    """Whether diffusers alone can open it."""
    return type(scheduler).__module__.startswith("diffusers.")


def write(scheduler: Any, directory: Path) -> list[str]:
    """Save it as scheduler/, our own file beside its config; returns its entry in model_index.json."""
    scheduler.save_pretrained(directory / "scheduler")
    if is_stock(scheduler):
        return ["diffusers", type(scheduler).__name__]
    shutil.copyfile(OURS, directory / "scheduler" / OURS.name)
    return [OURS.stem, type(scheduler).__name__]
