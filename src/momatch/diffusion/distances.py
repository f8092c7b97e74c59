"""Distances between samples of vectors, and how well samples fill the modes of a known mixture.

Every distance between two finite samples has a floor: its value for two independent samples of the *same*
law. The floor depends on n (sliced W2 falls like 1/√n), so report it beside the number, at the same n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from momatch.diffusion.gaussian_mixture import GaussianMixture

# Interquartile range of a standard normal: 2 Φ⁻¹(3/4).
NORMAL_IQR = 2 * math.sqrt(2) * torch.erfinv(torch.tensor(0.5, dtype=torch.float64)).item()


def sliced_wasserstein2(
    a: Tensor, b: Tensor, num_projections: int = 256, generator: torch.Generator | None = None
) -> float:
    """Root of the mean squared W2 distance of the samples' projections on random directions.

    Args:
        a: (n, D) samples.
        b: (n, D) as many samples.
        num_projections: number of directions, uniform on the sphere.
        generator: source of the directions; the same seed gives comparable numbers.

    Raises:
        ValueError: if the shapes differ: the floor of the distance depends on n, so both must share it.

    Source: Bonneel et al. 2015.
    """
    if a.shape != b.shape:
        raise ValueError(f"both samples must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    device = generator.device if generator is not None else a.device
    directions = torch.randn(
        num_projections, a.shape[1], generator=generator, dtype=torch.float64, device=device
    )
    directions = torch.nn.functional.normalize(directions, dim=1).to(a.device)
    total = 0.0
    for chunk in directions.split(16):  # in one dimension, optimal transport pairs sorted values
        sorted_a, sorted_b = ((chunk @ v.double().T).sort(dim=1).values for v in (a, b))
        total += (sorted_a - sorted_b).square().mean(1).sum().item()
    return math.sqrt(total / num_projections)


def energy_distance(a: Tensor, b: Tensor, chunk: int = 2048) -> float:
    """2 E‖a − b‖ − E‖a − a′‖ − E‖b − b′‖, without bias (so it may fall below 0 when both laws are the same).

    Args:
        a: (n, D) samples, n ≥ 2.
        b: (m, D) samples, m ≥ 2.
        chunk: rows compared at a time.

    Raises:
        ValueError: if either has fewer than two samples.

    Source: Székely & Rizzo 2013; U-statistic: pairs of a sample with itself are left out.
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"energy distance needs at least 2 samples on either side, got {n} and {m}")
    within_a = _sum_of_distances(a, a, chunk) / (n * (n - 1))
    within_b = _sum_of_distances(b, b, chunk) / (m * (m - 1))
    return 2 * _sum_of_distances(a, b, chunk) / (n * m) - within_a - within_b


def _sum_of_distances(a: Tensor, b: Tensor, chunk: int) -> float:
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product form cancels for close points
    return sum(
        torch.cdist(rows, b.double(), compute_mode=exact).sum().item() for rows in a.double().split(chunk)
    )


@dataclass(frozen=True)
class ModeStatistics:
    """How samples fill the modes of a mixture; each belongs to the mode with the least Mahalanobis distance.

    Attributes:
        num_samples: n.
        masses: (K,) share of all samples in each mode, outliers included.
        total_variation: ½ Σ |masses − weights|. Its floor for a perfect sampler is about Σ √(w(1 − w)/(2πn)).
        std_ratio: within-mode spread relative to the truth, from interquartile ranges along each mode's
            principal axes (IQR / 1.349, the standard deviation of a normal law): up to a quarter of outliers
            on either side cannot move it far, no cut-off has to be chosen, and the centre of the mode does
            not matter. Root mean square over axes and occupied modes.
        std_ratio_all: the same from plain standard deviations about each mode's own mean, no sample left
            out: between this and `std_ratio` lies what is due to tails and outliers.
        mode_std_ratios: (K,) `std_ratio` of each mode alone, NaN for a mode of fewer than 4 samples.
        share_within_3_sigma: share of samples at Mahalanobis distance below 3 from the true centre of their
            mode.
        true_share_within_3_sigma: what a single Gaussian has there, P(χ²_D < 9); 0.9889 in the plane.
    """

    num_samples: int
    masses: Tensor
    total_variation: float
    std_ratio: float
    std_ratio_all: float
    mode_std_ratios: Tensor
    share_within_3_sigma: float
    true_share_within_3_sigma: float


def mode_statistics(samples: Tensor, mixture: GaussianMixture) -> ModeStatistics:
    """Compare samples (n, D) with the modes of `mixture`; see `ModeStatistics` for the definitions."""
    centred = samples.double().cpu()[:, None] - mixture.means.cpu()
    # Coordinates along each mode's axes, in units of its standard deviation: (n, K, D).
    whitened = torch.einsum("nkd,kde->nke", centred, mixture.axes.cpu()) / mixture.variances.cpu().sqrt()
    distance, mode = whitened.norm(dim=2).min(dim=1)
    masses = torch.bincount(mode, minlength=len(mixture.weights)) / len(samples)
    robust, plain = [], []
    for k in range(len(mixture.weights)):
        own = whitened[mode == k, k]
        enough = len(own) >= 4
        robust.append(_interquartile_std(own).square().mean() if enough else torch.tensor(torch.nan))
        plain.append(own.var(dim=0).mean() if enough else torch.tensor(torch.nan))
    robust_variance, plain_variance = torch.stack(robust), torch.stack(plain)
    return ModeStatistics(
        num_samples=len(samples),
        masses=masses,
        total_variation=0.5 * (masses - mixture.weights.cpu()).abs().sum().item(),
        std_ratio=robust_variance.nanmean().sqrt().item(),
        std_ratio_all=plain_variance.nanmean().sqrt().item(),
        mode_std_ratios=robust_variance.sqrt(),
        share_within_3_sigma=(distance < 3).double().mean().item(),
        true_share_within_3_sigma=_chi2_cdf(9.0, mixture.dim),
    )


def _interquartile_std(values: Tensor) -> Tensor:
    """Standard deviation of each column, (n, D) → (D,), if it were normal with this interquartile range."""
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype), dim=0)
    return (high - low) / NORMAL_IQR


def _chi2_cdf(value: float, dim: int) -> float:
    shape, half = torch.tensor([dim / 2, value / 2], dtype=torch.float64)
    return torch.special.gammainc(shape, half).item()
