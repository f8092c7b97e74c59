"""Fast samplers without distillation, as diffusers has them: DPM-Solver++(2M) and UniPC.

They need no training, so they are what a student has to beat. diffusers' schedulers know time as an index
into a table of noise levels; here it is a table of λ(t) of whatever schedule a model has, at times i/N, fine
enough that every step of `time_grid` is an entry.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond, DenoiserFunction
from momatch.diffusion.schedules import NoiseSchedule
from momatch.utils.errors import UsageError

SolverName = Literal["dpm++", "unipc"]
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)
LEAST_ENTRIES = 1000  # of the table
OPTIONS = {  # diffusers' class, and what differs from its defaults
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"predict_x0": True}),
}


@torch.no_grad()
def solve(
    name: SolverName,
    denoiser: DenoiserFunction,
    noise: Tensor,
    steps: int,
    schedule: NoiseSchedule,
    cond: Cond | None = None,
) -> Tensor:
    """Sample deterministically by a solver of second order.

    DPM-Solver++(2M): Lu et al. 2022, algorithm 2; UniPC: Zhao et al. 2023, order 2, in x-space. Both on the
    times of `time_grid`, of first order at the last step, which ends at x itself.

    Args:
        name: which.
        denoiser: (z, logsnr, cond) → x.
        noise: (B, …) z_1 ~ N(0, I).
        steps: number of network calls k.
        schedule: λ(t).
        cond: condition for all calls.

    Returns:
        (B, …) samples.

    Raises:
        UsageError: if diffusers is not installed.
        ValueError: if steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    scheduler, levels = _scheduler(name, steps, schedule)
    z = noise
    for timestep in scheduler.timesteps:
        logsnr = levels[int(timestep)].to(noise.device, noise.dtype).expand(len(noise))
        z = scheduler.step(denoiser(z, logsnr, cond), timestep, z).prev_sample
    return z.to(noise.dtype)


def _scheduler(name: SolverName, steps: int, schedule: NoiseSchedule) -> tuple[Any, Tensor]:
    """Diffusers' scheduler with its timesteps set, and λ (N,) at each entry of its table."""
    try:
        import diffusers
    except ImportError:
        raise UsageError(f"the sampler {name} is diffusers'; pip install 'momatch[diffusers]'") from None
    entries = steps * -(-LEAST_ENTRIES // steps)
    levels = schedule(torch.arange(1, entries + 1, dtype=torch.float64) / entries)
    kind, options = OPTIONS[name]
    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=entries,
        prediction_type="sample",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        solver_order=2,
        **options,
    )
    # Its own table comes from float32 betas, which cannot hold the small σ of a clean end.
    scheduler.alphas_cumprod = torch.sigmoid(levels).numpy()
    scheduler.alpha_t, scheduler.sigma_t = torch.sigmoid(levels).sqrt(), torch.sigmoid(-levels).sqrt()
    scheduler.lambda_t = levels / 2
    scheduler.set_timesteps(steps)
    return scheduler, levels
