"""The exact mixture against numerical integration and differentiation; the distances against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momatch.diffusion import process
from momatch.diffusion.distances import energy_distance, mode_statistics, sliced_wasserstein2
from momatch.diffusion.gaussian_mixture import GaussianMixture, ring_of_gaussians

MIXTURE = GaussianMixture(
    torch.tensor([1.0, 3.0]),
    torch.tensor([[-1.0, 0.5], [0.8, 0.0]]),
    torch.tensor([[[0.05, 0.02], [0.02, 0.03]], [[0.2, -0.1], [-0.1, 0.1]]]),
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(logsnr=st.floats(-12, 10), z=st.floats(-2.5, 2.5))
def test_posterior_mean_is_the_integral(logsnr: float, z: float) -> None:
    """E[x | z] = ∫ x p(x) N(z; αx, σ²) dx / ∫ p(x) N(z; αx, σ²) dx, in one dimension, on a fine grid."""
    weights, means, variances = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.8], [-1.0, 0.6], [0.3, 0.05])
    )
    mixture = GaussianMixture(weights, means[:, None], variances[:, None, None])
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    log_p = (weights.log() - 0.5 * variances.log() - 0.5 * (x[:, None] - means) ** 2 / variances).logsumexp(1)
    alpha2, sigma2 = 1 / (1 + math.exp(-logsnr)), 1 / (1 + math.exp(logsnr))
    p = torch.softmax(log_p - 0.5 * (z - math.sqrt(alpha2) * x) ** 2 / sigma2, dim=0)
    args = torch.tensor([[z]], dtype=torch.float64), torch.tensor([logsnr], dtype=torch.float64)
    assert mixture.denoiser()(*args).item() == pytest.approx((p * x).sum().item(), abs=1e-6)

    draws = mixture.posterior_sample(args[0].expand(4000, 1), args[1].expand(4000), rng())
    mean, std = (p * x).sum().item(), math.sqrt((p * x**2).sum().item() - (p * x).sum().item() ** 2)
    assert draws.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(4000))


@given(logsnr=st.floats(-10, 10))
def test_score_is_the_gradient_and_tweedie_holds(logsnr: float) -> None:
    z = torch.randn(20, 2, generator=rng(), dtype=torch.float64).requires_grad_()
    at = torch.full((20,), logsnr, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(MIXTURE.log_prob(z, at).sum(), z)
    score = MIXTURE.score(z.detach(), at)
    torch.testing.assert_close(score, gradient)
    alpha, sigma = (v[:, None] for v in process.alpha_sigma(at))
    torch.testing.assert_close(MIXTURE.denoiser()(z.detach(), at), (z.detach() + sigma**2 * score) / alpha)


def test_every_sample_has_its_own_noise_level() -> None:
    z, logsnr = torch.randn(50, 2, generator=rng(), dtype=torch.float64), torch.linspace(-12, 12, 50).double()
    together = MIXTURE.denoiser()(z, logsnr)
    alone = torch.cat([MIXTURE.denoiser()(z[i : i + 1], logsnr[i : i + 1]) for i in range(50)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_the_process(dtype: torch.dtype) -> None:
    """At λ = ∞ the denoiser returns z, at −∞ the mean of the data; the dtype is that of z."""
    z = torch.randn(9, 2, generator=rng(), dtype=dtype)
    clean, noisy = (torch.full((9,), v, dtype=dtype) for v in (math.inf, -math.inf))
    denoiser = MIXTURE.denoiser()
    assert denoiser(z, clean).dtype == dtype
    torch.testing.assert_close(denoiser(z, clean), z)
    mean = (torch.tensor([0.25, 0.75], dtype=torch.float64) @ MIXTURE.means).to(dtype)
    torch.testing.assert_close(denoiser(z, noisy), mean.expand(9, 2))
    torch.testing.assert_close(MIXTURE.posterior_sample(z, clean, rng()), z)
    assert bool(MIXTURE.score(z, clean).isfinite().all())


def test_sample_has_the_moments_of_the_mixture() -> None:
    n = 200_000
    x, component = MIXTURE.sample_with_components(n, rng(), torch.float64)
    share = component.double().mean().item()
    assert share == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / n))
    for k in range(2):
        own = x[component == k]
        covariance = MIXTURE.covariances[k]
        error = 5 / math.sqrt(len(own))
        assert bool(((own.mean(0) - MIXTURE.means[k]).abs() < error * covariance.diag().sqrt()).all())
        # Var of a product of two normals is at most 2 Σ_ii Σ_jj.
        limit = error * math.sqrt(2) * covariance.diag().outer(covariance.diag()).sqrt()
        assert bool(((own.T.cov() - covariance).abs() < limit).all())


def test_posterior_sample_has_the_covariance_of_one_gaussian() -> None:
    """Linear Gaussian model: Cov[x | z] = Σ − αΣ (α²Σ + σ²)⁻¹ αΣ."""
    covariance = torch.tensor([[0.2, -0.1], [-0.1, 0.1]], dtype=torch.float64)
    gaussian, n, alpha2 = GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariance[None]), 100_000, 0.6
    logsnr = torch.full((n,), math.log(alpha2 / (1 - alpha2)), dtype=torch.float64)
    x = gaussian.posterior_sample(torch.ones(n, 2, dtype=torch.float64), logsnr, rng())
    total = alpha2 * covariance + (1 - alpha2) * torch.eye(2, dtype=torch.float64)
    expected = covariance - alpha2 * covariance @ torch.linalg.inv(total) @ covariance
    limit = 5 * math.sqrt(2 / n) * expected.diag().outer(expected.diag()).sqrt()
    assert bool(((x.T.cov() - expected).abs() < limit).all())


def test_denoiser_stands_where_a_denoiser_stands() -> None:
    denoiser = MIXTURE.denoiser()
    z, logsnr, cond = torch.zeros(3, 2), torch.zeros(3), {"label": torch.arange(3)}
    assert torch.equal(denoiser(z, logsnr, cond), denoiser(z, logsnr))
    assert denoiser.null_cond(cond) == cond
    assert list(denoiser.eval().requires_grad_(False).parameters()) == []


@pytest.mark.parametrize(
    ("weights", "covariance", "message"),
    [
        ([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], "positive"),
        ([1.0], [[1.0, 0.0], [0.0, 1.0]], "K, D"),
        ([1.0, 1.0], [[1.0, 0.5], [0.0, 1.0]], "symmetric"),
        ([1.0, 1.0], [[1.0, 2.0], [2.0, 1.0]], "positive definite"),
    ],
)
def test_impossible_mixtures_are_refused(
    weights: list[float], covariance: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(torch.tensor(weights), torch.zeros(2, 2), torch.tensor([covariance, covariance]))
    with pytest.raises(ValueError, match="std=0"):
        ring_of_gaussians(std=0)


def test_ring() -> None:
    ring = ring_of_gaussians(8, 1.3, 0.1)
    assert ring.means.norm(dim=1).tolist() == pytest.approx([1.3] * 8)
    assert ring.means.diff(dim=0).norm(dim=1).tolist() == pytest.approx([2 * 1.3 * math.sin(math.pi / 8)] * 7)
    x = ring.sample(50_000, rng())
    # E‖x‖² = radius² + 2 std²; the spread of ‖x‖² is about 2 · radius · std.
    assert x.square().sum(1).mean().item() == pytest.approx(1.71, abs=5 * 0.27 / math.sqrt(50_000))


def test_sliced_wasserstein_of_a_shift() -> None:
    """Every projection moves by θ·δ, and E(θ·δ)² = ‖δ‖²/D."""
    a, shift = torch.randn(500, 3, generator=rng()), torch.tensor([0.3, -0.4, 1.2])
    distance = sliced_wasserstein2(a, a + shift, 4000, rng(1))
    assert distance == pytest.approx(shift.norm().item() / math.sqrt(3), rel=0.05)
    assert sliced_wasserstein2(a, a[torch.randperm(500, generator=rng())], 16, rng()) < 1e-12
    with pytest.raises(ValueError, match="same shape"):
        sliced_wasserstein2(a, a[:400])


def test_sliced_wasserstein_of_a_scaling() -> None:
    """W2 between N(0, 1) and N(0, c²) is |c − 1|; scaling one sample shows it without sampling error."""
    a = torch.randn(4000, 2, generator=rng(), dtype=torch.float64)
    expected = 0.5 * a.square().mean().sqrt().item()
    assert sliced_wasserstein2(a, 1.5 * a, 1000, rng(1)) == pytest.approx(expected, rel=0.02)


def test_energy_distance_is_the_unbiased_statistic() -> None:
    a, b = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [4.0]])
    # mean |a − b| = (2+4+1+3+1+1)/6, mean |a − a′| = (1+3+2)/3, |b − b′| = 2
    assert energy_distance(a, b) == pytest.approx(2 * 2 - 2 - 2)
    assert energy_distance(a, b, chunk=1) == pytest.approx(energy_distance(a, b))
    with pytest.raises(ValueError, match="at least 2"):
        energy_distance(a, b[:1])


def test_energy_distance_is_centred_and_sees_a_shift() -> None:
    """In one dimension it is 2 ∫ (F − G)²; for N(0,1) against N(1,1) by quadrature."""

    def pair(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.randn(2, n, 1, generator=rng(seed), dtype=torch.float64)
        return a, b

    null = torch.tensor([energy_distance(*pair(400, seed)) for seed in range(60)])
    assert abs(null.mean().item()) < 4 * null.std().item() / math.sqrt(60)
    grid = torch.linspace(-10, 11, 21_001, dtype=torch.float64)
    normal_cdf = torch.special.ndtr
    expected = 2 * torch.trapezoid((normal_cdf(grid) - normal_cdf(grid - 1)) ** 2, grid).item()
    a, b = pair(4000, 0)
    assert energy_distance(a, b + 1) == pytest.approx(expected, rel=0.1)


def test_mode_statistics_of_exact_samples() -> None:
    n, ring = 40_000, ring_of_gaussians()
    result = mode_statistics(ring.sample(n, rng()), ring)
    assert result.num_samples == n and result.masses.sum().item() == pytest.approx(1)
    assert result.true_share_within_3_sigma == pytest.approx(1 - math.exp(-4.5))
    share_error = math.sqrt(math.exp(-4.5) / n)
    assert result.share_within_3_sigma == pytest.approx(1 - math.exp(-4.5), abs=5 * share_error)
    floor = 8 * math.sqrt(1 / 8 * 7 / 8 / (2 * math.pi * n))
    assert result.total_variation < 2.5 * floor
    # Relative error of a standard deviation from 2n normal coordinates: 1/√(4n); from quartiles 1.65 times
    # that.
    assert result.std_ratio_all == pytest.approx(1, abs=5 / math.sqrt(4 * n))
    assert result.std_ratio == pytest.approx(1, abs=5 * 1.65 / math.sqrt(4 * n))


def test_mode_statistics_sees_what_it_should() -> None:
    ring, n = ring_of_gaussians(), 40_000
    x, component = ring.sample_with_components(n, rng(), torch.float64)
    centres = ring.means[component]

    wide = mode_statistics(centres + 1.2 * (x - centres), ring)
    assert wide.std_ratio == pytest.approx(1.2, rel=0.03)

    lost = mode_statistics(x[component != 0], ring)
    assert lost.total_variation == pytest.approx(1 / 8, abs=0.01)
    assert math.isnan(lost.mode_std_ratios[0].item()) and lost.std_ratio == pytest.approx(1, rel=0.03)

    outliers = mode_statistics(torch.cat([x, torch.zeros(n // 50, 2)]), ring)  # 2 % at the centre of the ring
    assert outliers.std_ratio == pytest.approx(1, rel=0.05)
    assert outliers.std_ratio_all > 1.1
    assert outliers.share_within_3_sigma == pytest.approx(
        outliers.true_share_within_3_sigma / 1.02, abs=0.004
    )
