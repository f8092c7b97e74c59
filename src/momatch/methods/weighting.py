"""Which noise levels to train at, p(s), and how much each counts, w(s).

Weights are functions (λ_s (B,), x̃, x_teacher) → (B,); only the adaptive one looks at more than λ_s. Densities
are functions u → s that turn U[0, 1) into the wanted law, both of shape (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from momatch.diffusion import schedules
from momatch.diffusion.schedules import NoiseSchedule

Weighting = Callable[[Tensor, Tensor, Tensor], Tensor]
TimeDensity = Callable[[Tensor], Tensor]


def flat() -> Weighting:
    """w(s) = 1 in x-space."""
    return lambda logsnr, x_tilde, x_teacher: torch.ones_like(logsnr)


def signal() -> Weighting:
    """w(s) = α_s²: at high noise a mean square in x becomes one in ε; flat at low noise.

    For ε-networks: x = (z − σε)/α amplifies what they get wrong by σ/α, and so the gradients of a mean square
    in x by its square, 25,000 at the noisy end of the linear table, where there is least to learn.
    """
    return lambda logsnr, x_tilde, x_teacher: torch.sigmoid(logsnr)


def eps_weight() -> Weighting:
    """w(s) = α_s²/σ_s²: a mean square in x becomes one in ε."""
    return lambda logsnr, x_tilde, x_teacher: torch.exp(logsnr)


def v_weight() -> Weighting:
    """w(s) = 1/σ_s²: a mean square in x becomes one in v."""
    return lambda logsnr, x_tilde, x_teacher: 1 + torch.exp(logsnr)


def snr_clipped(maximum: float = 100.0) -> Weighting:
    """w(s) = min(1/σ_s², maximum)."""
    return lambda logsnr, x_tilde, x_teacher: (1 + torch.exp(logsnr)).clamp(max=maximum)


def edm_weight(sigma_data: float = 0.5) -> Weighting:
    """w(s) = e^λ + 1/σ_data²: EDM's training weight, the paper's choice (Karras et al. 2022, table 1)."""
    return lambda logsnr, x_tilde, x_teacher: torch.exp(logsnr) + sigma_data**-2


def adaptive() -> Weighting:
    """w(s) = 1 / mean|x̃ − g_θ(z_s)| for each sample (Yin et al. 2024, eq. 8).

    Distribution Matching Distillation weighs a difference of scores by (σ²/α) / mean|·|; in x-space the first
    factor cancels.
    """

    def weight(logsnr: Tensor, x_tilde: Tensor, x_teacher: Tensor) -> Tensor:
        return 1 / (x_tilde - x_teacher).detach().abs().flatten(1).mean(1).clamp(min=1e-4)

    return weight


def power(exponent: float = 1.0) -> TimeDensity:
    """The law of s = u^exponent: uniform for 1, more low noise above 1."""
    return lambda u: u if exponent == 1 else u**exponent


def rho_grid(
    schedule: NoiseSchedule, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> TimeDensity:
    """The law that is uniform on EDM's test-time grid of λ_s, whatever the schedule (the paper's choice)."""
    grid = schedules.edm(sigma_min, sigma_max, rho)
    return lambda u: schedule.inverse(grid(u))
