"""Samplers: free functions that call a denoiser `steps` times. `steps` always counts network calls.

The ancestral sampler (Algorithm 1 of the paper) serves teacher and student alike: estimate x, draw z_s from
the posterior given that estimate, repeat, and return the last estimate without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from momatch.diffusion import process
from momatch.diffusion.denoiser import Cond
from momatch.diffusion.schedules import NoiseSchedule

DenoiserFunction = Callable[[Tensor, Tensor, Cond | None], Tensor]


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
) -> Tensor:
    """Algorithm 1: sample by `steps` rounds of denoising and posterior sampling.

    Args:
        denoiser: (z, logsnr, cond) → x.
        noise: (B, …) z_1 ~ N(0, I).
        steps: number of network calls k.
        schedule: λ(t).
        cond: condition for all calls.
        generator: source of the k − 1 later noises.
        eta: stochasticity: 1 is the posterior (the paper), 0 is DDIM.

    Returns:
        (B, …) the last estimate of x, with no noise after it.

    Raises:
        ValueError: if steps is below 1 or eta outside [0, 1].
    """
    x = noise
    for estimate in trajectory(denoiser, noise, steps, schedule, cond, generator, eta):
        x = estimate
    return x


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
) -> Iterator[Tensor]:
    """The successive estimates of x in `ancestral`, `steps` of them; arguments as there."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 = DDIM, 1 = ancestral), got {eta}")
    logsnr = schedule(time_grid(steps, noise.device))
    coefficient_z, coefficient_x, std = (c.tolist() for c in step_coefficients(logsnr[1:], logsnr[:-1], eta))
    batch_logsnr = logsnr.to(noise.dtype)[:, None].expand(-1, len(noise)).unbind()
    z = noise
    for i in range(steps):
        x = denoiser(z, batch_logsnr[i], cond)
        yield x
        if i < steps - 1:
            z = (coefficient_z[i] * z).add_(x, alpha=coefficient_x[i])
            if std[i] > 0:
                fresh = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
                z.add_(fresh, alpha=std[i])


def step_coefficients(logsnr_s: Tensor, logsnr_t: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of z_t, of x, and the noise's standard deviation, for one step t → s at stochasticity eta.

    η = 1 is the posterior. Otherwise (DDIM, eq. 12) the variance is η² times the posterior's, and the noise
    that z_t already holds makes up what is missing: z_s = α_s x + √(σ_s² − std²) (z_t − α_t x)/σ_t + std·ε.
    """
    coefficient_z, coefficient_x, variance = process.posterior_coefficients(logsnr_s, logsnr_t)
    std = eta * variance.sqrt()
    if eta == 1:
        return coefficient_z, coefficient_x, std
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s)
    alpha_t, sigma_t = process.alpha_sigma(logsnr_t)
    kept = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t
    return kept, alpha_s - kept * alpha_t, std
