"""The Gaussian diffusion process, in one coordinate.

Everything in momatch happens in the variance-preserving process with λ = log(α²/σ²) as the noise coordinate:

    (1)  z_t = α_t x + σ_t ε,    α_t² = sigmoid(λ_t),    σ_t² = sigmoid(−λ_t),    ε ~ N(0, I)

Variance-exploding (EDM) and rectified-flow processes are this one after dividing their z by √(α² + σ²); that
is the business of a teacher's adapter, and no other module knows about it.

**Posterior.** For s < t (so λ_s > λ_t), the law of the less noisy z_s given z_t and clean x is Gaussian. With
r = exp(λ_t − λ_s) ∈ [0, 1]:

    (2)  mean = (α_t σ_s²)/(α_s σ_t²) z_t + (1 − r) α_s x          variance = σ_s² (1 − r)

The coefficient of z_t equals √r σ_s/σ_t, which is how it is computed here: it never divides by α_s, which
vanishes at t = 1. 1 − r is −expm1(λ_t − λ_s), so nothing cancels when s is close to t. At s = 0 the posterior
is x itself; at t = 1 it forgets z_t. Both hold for infinite λ too, in float32 and float64.

This is the step of Algorithm 1 and the z_s of Algorithms 2 and 3 of "Multistep Distillation of Diffusion
Models via Moment Matching" (Salimans et al., NeurIPS 2024).

**Prediction types.** A network may predict x, ε, v = α ε − σ x, or the flow velocity u = ε − x. All are the
same information given z:

    (3)  ε = (z − α x)/σ        v = (α z − x)/σ        u = (z − (α + σ) x)/σ

or, in EDM's preconditioning, the F of x = c_skip z′ + c_out F with z′ = z/α and ς = σ/α its noise level:

    (4)  c_skip = ς_d²/(ς² + ς_d²)        c_out = ς ς_d/√(ς² + ς_d²)        ς_d² = Var(x)

Arguments named `logsnr` have shape (B,), for z's batch dimension; only this module broadcasts them.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from momatch.diffusion.interface import Process, Step
from momatch.utils.seeding import Generator, normal

Prediction = Literal["x", "eps", "v", "flow", "edm"]
SIGMA_DATA = 0.5  # of every EDM model in use


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ) of equation (1), each of logsnr's shape."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffuse(x: Tensor, logsnr: Tensor, noise: Tensor) -> Tensor:
    """z_t = α_t x + σ_t ε, equation (1).

    Args:
        x: (B, …) clean data.
        logsnr: (B,) λ_t.
        noise: ε, x's shape.
    """
    alpha, sigma = alpha_sigma(_like(logsnr, x))
    return torch.addcmul(alpha * x, sigma, noise)


def posterior(z_t: Tensor, x: Tensor, logsnr_s: Tensor, logsnr_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(z_s | z_t, x), equation (2).

    Args:
        z_t: (B, …) noisy data at λ_t.
        x: (B, …) clean data, or a prediction of it.
        logsnr_s: (B,) λ_s ≥ λ_t: the less noisy end.
        logsnr_t: (B,) λ_t.

    Returns:
        mean (B, …), and variance (B, 1, …) ready to broadcast against it.
    """
    coefficient_z, coefficient_x, variance = posterior_coefficients(
        _like(logsnr_s, z_t), _like(logsnr_t, z_t)
    )
    return torch.addcmul(coefficient_z * z_t, coefficient_x, x), variance


def posterior_coefficients(logsnr_s: Tensor, logsnr_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(√r σ_s/σ_t, (1 − r) α_s, σ_s² (1 − r)): equation (2) as numbers, each of logsnr's shape."""
    # Rounding may put a λ(t) just above λ(s) where a schedule is nearly flat; 1 − r must not become negative.
    log_r = (logsnr_t - logsnr_s).clamp(max=0)
    one_minus_r = -torch.expm1(log_r)
    # √r σ_s/σ_t, all in logarithms: exp of −∞ is the wanted 0 at either end.
    coefficient_z = torch.exp(0.5 * (log_r + F.logsigmoid(-logsnr_s) - F.logsigmoid(-logsnr_t)))
    return coefficient_z, one_minus_r * torch.sigmoid(logsnr_s).sqrt(), one_minus_r * torch.sigmoid(-logsnr_s)


def sample_posterior(
    z_t: Tensor, x: Tensor, logsnr_s: Tensor, logsnr_t: Tensor, generator: Generator | None = None
) -> Tensor:
    """Draw z_s ~ q(z_s | z_t, x); arguments as in `posterior`, noise from `generator`."""
    mean, variance = posterior(z_t, x, logsnr_s, logsnr_t)
    return torch.addcmul(mean, variance.sqrt(), normal(z_t, generator))


def step_coefficients(logsnr_s: Tensor, logsnr_t: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of z_t, of x, and the noise's standard deviation, for one step t → s at stochasticity eta.

    η = 1 is the posterior. Otherwise (DDIM, eq. 12) the variance is η² times the posterior's, and the noise
    that z_t already holds makes up what is missing: z_s = α_s x + √(σ_s² − std²) (z_t − α_t x)/σ_t + std·ε.
    An infinite η forgets z_t and takes all noise anew: std = σ_s.
    """
    coefficient_z, coefficient_x, variance = posterior_coefficients(logsnr_s, logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    std = sigma_s if math.isinf(eta) else eta * variance.sqrt()
    if eta == 1:
        return coefficient_z, coefficient_x, std
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    kept = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t
    return kept, alpha_s - kept * alpha_t, std


def ddim_step(z_t: Tensor, x: Tensor, logsnr_s: Tensor, logsnr_t: Tensor) -> Tensor:
    """Deterministic step t → s given an estimate of x: z_s = α_s x + σ_s/σ_t (z_t − α_t x).

    Args:
        z_t: (B, …) noisy data at λ_t.
        x: (B, …) the estimate.
        logsnr_s: (B,) λ_s ≥ λ_t; in float64 the step keeps its digits however short it is.
        logsnr_t: (B,) λ_t.
    """
    of_z, of_x, _ = step_coefficients(logsnr_s, logsnr_t, eta=0.0)
    return torch.addcmul(_like(of_z, z_t) * z_t, _like(of_x, z_t), x)


def ddim_estimate(z_s: Tensor, z_t: Tensor, logsnr_s: Tensor, logsnr_t: Tensor) -> Tensor:
    """The x with which one `ddim_step` leads from z_t to z_s; arguments as there, λ_s > λ_t.

    Several steps are compressed into one by this: Salimans & Ho 2022, algorithm 2.
    """
    of_z, of_x, _ = step_coefficients(logsnr_s, logsnr_t, eta=0.0)
    return (z_s - _like(of_z, z_t) * z_t) / _like(of_x, z_t)


class GaussianProcess(Process):
    """Equations (1) and (2), as samplers and methods call them."""

    def prior(self, like: Tensor, generator: Generator | None = None) -> Tensor:
        """z_1 ~ N(0, I)."""
        return normal(like, generator)

    def corrupt(self, x: Tensor, logsnr: Tensor, generator: Generator | None = None) -> Tensor:
        """z_t = α_t x + σ_t ε."""
        return diffuse(x, logsnr, normal(x, generator))

    def posterior_sample(
        self,
        z_t: Tensor,
        x: Tensor,
        logsnr_s: Tensor,
        logsnr_t: Tensor,
        generator: Generator | None = None,
    ) -> Tensor:
        """z_s ~ q(z_s | z_t, x)."""
        return sample_posterior(z_t, x, logsnr_s, logsnr_t, generator)

    def stepper(self, logsnr: Tensor, eta: float) -> Step:
        """z_s = a z_t + b x + c ε, with numbers that are computed once, in logsnr's precision."""
        of_z, of_x, std = (c.tolist() for c in step_coefficients(logsnr[1:], logsnr[:-1], eta))

        def step(i: int, z: Tensor, x: Tensor, generator: Generator | None) -> Tensor:
            z = (of_z[i] * z).add_(x, alpha=of_x[i])
            return z.add_(normal(z, generator), alpha=std[i]) if std[i] > 0 else z

        return step


GAUSSIAN = GaussianProcess()


def to_x(
    prediction: Tensor, z: Tensor, logsnr: Tensor, kind: Prediction, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Clean data from a network output of the given kind, equation (3) solved for x, or (4).

    Args:
        prediction: (B, …) network output.
        z: (B, …) noisy data, of unit variance at high noise.
        logsnr: (B,) its λ.
        kind: what the output stands for.
        sigma_data: ς_d of kind "edm".
    """
    alpha, sigma = alpha_sigma(_like(logsnr, z))
    if kind == "v":
        return torch.addcmul(alpha * z, sigma, prediction, value=-1)
    if kind == "eps":
        return (z - sigma * prediction) / alpha
    if kind == "flow":
        return (z - sigma * prediction) / (alpha + sigma)
    if kind == "x":
        return prediction
    if kind == "edm":
        skip, out = _edm_coefficients(alpha, sigma, sigma_data)
        return torch.addcmul(skip * z, out, prediction)
    raise ValueError(f"unknown prediction type {kind!r}; choose one of {', '.join(get_args(Prediction))}")


def from_x(x: Tensor, z: Tensor, logsnr: Tensor, kind: Prediction, sigma_data: float = SIGMA_DATA) -> Tensor:
    """The network output of the given kind that means x; the inverse of `to_x`."""
    alpha, sigma = alpha_sigma(_like(logsnr, z))
    if kind == "v":
        return (alpha * z - x) / sigma
    if kind == "eps":
        return (z - alpha * x) / sigma
    if kind == "flow":
        return (z - (alpha + sigma) * x) / sigma
    if kind == "x":
        return x
    if kind == "edm":
        skip, out = _edm_coefficients(alpha, sigma, sigma_data)
        return (x - skip * z) / out
    raise ValueError(f"unknown prediction type {kind!r}; choose one of {', '.join(get_args(Prediction))}")


def _edm_coefficients(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(c_skip/α, c_out) of equation (4), multiplied through by α² so that neither end divides by zero."""
    total = sigma**2 + (alpha * sigma_data) ** 2
    return alpha * sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


def per_sample(values: Tensor, data: Tensor) -> Tensor:
    """View values (B,) as (B, 1, …, 1), to multiply data (B, …)."""
    return values.view(-1, *(1,) * (data.ndim - 1))


def _like(logsnr: Tensor, data: Tensor) -> Tensor:
    return per_sample(logsnr.to(data.dtype), data)
