"""Samplers: free functions that call a denoiser `steps` times. `steps` always counts network calls.

The ancestral sampler (Algorithm 1 of the paper) serves teacher and student alike: estimate x, draw z_s from
the posterior given that estimate, repeat, and return the last estimate without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond, DenoiserFunction, Process, cond_rows
from momatch.diffusion.process import GAUSSIAN, step_coefficients
from momatch.diffusion.schedules import NoiseSchedule

__all__ = [
    "ETAS",
    "SamplerName",
    "ancestral",
    "ddim",
    "in_batches",
    "step_coefficients",
    "time_grid",
    "trajectory",
]


SamplerName = Literal["ancestral", "ddim", "renoise"]
ETAS: dict[str, float] = {"ancestral": 1.0, "ddim": 0.0, "renoise": math.inf}  # by stochasticity


def time_grid(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """1, (k−1)/k, …, 1/k, 0 for k = steps: (steps + 1,) float64. The network is called at all but the last.

    Raises:
        ValueError: if steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return torch.arange(steps, -1, -1, dtype=torch.float64, device=device) / steps


def ancestral(
    denoiser: DenoiserFunction,
    noise: Tensor,
    steps: int,
    schedule: NoiseSchedule,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    eta: float = 1.0,
    process: Process = GAUSSIAN,
) -> Tensor:
    """Algorithm 1: sample by `steps` rounds of denoising and posterior sampling.

    Args:
        denoiser: (z, logsnr, cond) → x.
        noise: (B, …) z_1, a draw from the process's prior: N(0, I).
        steps: number of network calls k.
        schedule: λ(t).
        cond: condition for all calls.
        generator: source of the k − 1 later noises.
        eta: stochasticity: 1 is the posterior (the paper), 0 is DDIM, infinity takes all noise anew at every
            step, as multistep consistency sampling does.
        process: whose steps are taken.

    Returns:
        (B, …) the last estimate of x, with no noise after it; of a discrete process tokens drawn from it.

    Raises:
        ValueError: if steps is below 1 or eta neither in [0, 1] nor infinite.
    """
    x = noise
    for estimate in trajectory(denoiser, noise, steps, schedule, cond, generator, eta, process):
        x = estimate
    return process.draw(x, generator)


def ddim(
    denoiser: DenoiserFunction, noise: Tensor, steps: int, schedule: NoiseSchedule, cond: Cond | None = None
) -> Tensor:
    """Deterministic sampling, DDIM (Song et al. 2021): `ancestral` with eta = 0."""
    return ancestral(denoiser, noise, steps, schedule, cond, eta=0.0)


@torch.no_grad()
def trajectory(
    denoiser: DenoiserFunction,
    noise: Tensor,
    steps: int,
    schedule: NoiseSchedule,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    eta: float = 1.0,
    process: Process = GAUSSIAN,
) -> Iterator[Tensor]:
    """The successive estimates of x in `ancestral`, `steps` of them; arguments as there."""
    if not (0 <= eta <= 1 or eta == math.inf):
        raise ValueError(f"eta must lie in [0, 1] (0 = DDIM, 1 = ancestral) or be infinite, got {eta}")
    logsnr = schedule(time_grid(steps, noise.device))
    step = process.stepper(logsnr, eta)
    batch_logsnr = logsnr.to(noise.dtype)[:, None].expand(-1, len(noise)).unbind()
    z = noise
    for i in range(steps):
        x = denoiser(z, batch_logsnr[i], cond)
        yield x
        if i < steps - 1:
            z = step(i, z, x, generator)


def in_batches(denoiser: DenoiserFunction, size: int) -> DenoiserFunction:
    """The same denoiser, called on at most `size` samples at a time, to save memory.

    What is drawn around it is still drawn for all samples at once, so that noise does not depend on `size`.
    """

    def call(z: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        if len(z) <= size:
            return denoiser(z, logsnr, cond)
        parts = [slice(first, first + size) for first in range(0, len(z), size)]
        return torch.cat([denoiser(z[rows], logsnr[rows], cond_rows(cond, rows)) for rows in parts])

    return call
