"""Gaussian mixtures: the data for which everything about diffusion is known in closed form.

With x ~ Σ_i w_i N(μ_i, Σ_i) and z = α x + σ ε, everything given z follows from one component at a time:

    (1)  z | i      ~ N(α μ_i, α² Σ_i + σ² I)
    (2)  x | z, i   ~ N(μ_i + α Σ_i V_i⁻¹ (z − α μ_i),  σ² Σ_i V_i⁻¹),    V_i = α² Σ_i + σ² I
    (3)  p(i | z)   ∝ w_i N(z; α μ_i, V_i)
    (4)  ∇ log p(z) = −Σ_i p(i | z) V_i⁻¹ (z − α μ_i)

Each Σ_i = Q_i diag(d_i) Q_iᵀ is factored once. In the axes Q_i all matrices above are diagonal at every
noise level, so a batch in which each sample has its own logSNR costs no more than one that shares it.
Calculations are in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from momatch.diffusion.interface import Cond


class GaussianMixture:
    """Σ_i w_i N(μ_i, Σ_i) over vectors, K components in D dimensions.

    Args:
        weights: (K,) positive; scaled to sum to 1.
        means: (K, D).
        covariances: (K, D, D) symmetric, positive definite.

    Raises:
        ValueError: if shapes disagree, a weight is not positive, or a covariance is not symmetric positive
            definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        weights, means, covariances = (torch.as_tensor(v).double() for v in (weights, means, covariances))
        if (
            means.ndim != 2
            or weights.shape != means.shape[:1]
            or covariances.shape != (*means.shape, means.shape[1])
        ):
            raise ValueError(
                "a mixture takes weights (K,), means (K, D), covariances (K, D, D), got "
                f"{tuple(weights.shape)}, {tuple(means.shape)}, {tuple(covariances.shape)}"
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, got {weights.tolist()}; leave out empty components")
        if not torch.allclose(covariances, covariances.mT):
            raise ValueError("covariances must be symmetric")
        self.weights, self.means, self.covariances = weights / weights.sum(), means, covariances
        self.variances, self.axes = torch.linalg.eigh(covariances)
        if not bool((self.variances > 0).all()):
            raise ValueError(
                f"covariances must be positive definite; least eigenvalue {self.variances.min().item():.3g}"
            )

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def sample(
        self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw n samples: (n, D)."""
        return self.sample_with_components(n, generator, dtype)[0]

    def sample_with_components(
        self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Draw n samples and say which component each came from: (n, D) and (n,) int64."""
        device = generator.device if generator is not None else self.weights.device
        component = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64, device=device)
        x = self.means.to(device)[component] + self._rotate(
            self._std().to(device)[component] * noise, component
        )
        return x.to(dtype), component

    def denoiser(self) -> MixtureDenoiser:
        """The exact denoiser, as a module: (z (B, D), logsnr (B,), cond) → E[x | z]."""
        return MixtureDenoiser(self)

    def log_prob(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """Log density of z at noise level λ: z (B, D), logsnr (B,) → (B,). Infinite λ: the density of x."""
        return torch.logsumexp(self._condition(z, logsnr).log_joint, dim=1).to(z.dtype)

    def mean(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """E[x | z], equations (2) and (3): z (B, D), logsnr (B,) → (B, D)."""
        given = self._condition(z, logsnr)
        return torch.einsum("bk,bkd->bd", given.responsibilities, given.means).to(z.dtype)

    def score(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """∇ log p(z) at noise level λ, equation (4): z (B, D), logsnr (B,) → (B, D)."""
        given = self._condition(z, logsnr)
        axes = self.axes.to(z.device)
        whitened = given.offsets / given.total_variances
        return -torch.einsum("bk,kde,bke->bd", given.responsibilities, axes, whitened).to(z.dtype)

    def posterior_sample(self, z: Tensor, logsnr: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x from the exact p(x | z): z (B, D), logsnr (B,) → (B, D)."""
        given = self._condition(z, logsnr)
        component = torch.multinomial(given.responsibilities, 1, generator=generator)[:, 0]
        rows = torch.arange(len(z), device=z.device)
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64, device=z.device)
        std = given.remaining_variances[rows, component].sqrt()
        return (given.means[rows, component] + self._rotate(std * noise, component)).to(z.dtype)

    def _condition(self, z: Tensor, logsnr: Tensor) -> _Conditioned:
        weights, means, variances, axes = (
            v.to(z.device) for v in (self.weights, self.means, self.variances, self.axes)
        )
        logsnr = logsnr.double().view(-1, 1, 1)
        alpha, sigma2 = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr)
        offsets = torch.einsum("bkd,kde->bke", z.double()[:, None] - alpha * means, axes)
        total = alpha.square() * variances + sigma2
        log_gaussian = -0.5 * (offsets.square() / total + total.log() + math.log(2 * math.pi)).sum(-1)
        return _Conditioned(
            log_joint=weights.log() + log_gaussian,
            offsets=offsets,
            total_variances=total,
            means=means + torch.einsum("kde,bke->bkd", axes, alpha * variances / total * offsets),
            remaining_variances=variances * sigma2 / total,
        )

    def _std(self) -> Tensor:
        return self.variances.sqrt()

    def _rotate(self, coordinates: Tensor, component: Tensor) -> Tensor:
        """From the axes of each row's component to data space: (B, D), (B,) → (B, D)."""
        return torch.einsum("bde,be->bd", self.axes.to(coordinates.device)[component], coordinates)


@dataclass(frozen=True)
class _Conditioned:
    """Each component given z, in the axes of that component where a vector is not in data space.

    Attributes:
        log_joint: (B, K) log w_i N(z; α μ_i, V_i).
        offsets: (B, K, D) z − α μ_i in the component's axes.
        total_variances: (B, K, D) eigenvalues of V_i.
        means: (B, K, D) E[x | z, i], in data space.
        remaining_variances: (B, K, D) eigenvalues of Cov[x | z, i].
    """

    log_joint: Tensor
    offsets: Tensor
    total_variances: Tensor
    means: Tensor
    remaining_variances: Tensor

    @property
    def responsibilities(self) -> Tensor:
        """(B, K) p(i | z)."""
        return torch.softmax(self.log_joint, dim=1)


class MixtureDenoiser(nn.Module):
    """E[x | z] of a mixture, where a trained denoiser could stand. It has no parameters and takes no
    condition.

    Attributes:
        mixture: the law of x.
    """

    def __init__(self, mixture: GaussianMixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """E[x | z]: z (B, D), logsnr (B,) → (B, D); `cond` is ignored."""
        return self.mixture.mean(z, logsnr)

    def null_cond(self, cond: Cond) -> Cond:
        """`cond` itself: with or without a condition, the law is the same."""
        return cond


def ring_of_gaussians(modes: int = 8, radius: float = 1.3, std: float = 0.1) -> GaussianMixture:
    """`modes` equal round Gaussians in the plane, evenly spaced on a circle.

    Args:
        modes: how many.
        radius: of the circle that their means lie on.
        std: standard deviation of each along both axes.

    Raises:
        ValueError: if modes is below 1 or std is not positive.
    """
    if modes < 1 or std <= 0:
        raise ValueError(f"a ring needs modes ≥ 1 and std > 0, got modes={modes}, std={std}")
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    covariances = std**2 * torch.eye(2, dtype=torch.float64).expand(modes, 2, 2)
    return GaussianMixture(torch.ones(modes, dtype=torch.float64), means, covariances)
