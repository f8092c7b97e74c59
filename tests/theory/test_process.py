"""The posterior and the prediction types against conditioning of a joint Gaussian."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momatch.diffusion import process
from momatch.diffusion.distances import energy_distance
from momatch.diffusion.gaussian_mixture import GaussianMixture

LOGSNR = st.floats(-15, 15)
VALUE = st.floats(-3, 3)
KINDS: tuple[process.Prediction, ...] = ("x", "eps", "v", "flow")


def column(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@given(logsnr=LOGSNR)
def test_variance_preserving(logsnr: float) -> None:
    alpha, sigma = process.alpha_sigma(column(logsnr))
    assert (alpha**2 + sigma**2).item() == pytest.approx(1, abs=1e-14)
    assert 2 * torch.log(alpha / sigma).item() == pytest.approx(logsnr, abs=1e-9)


@given(ends=st.tuples(LOGSNR, LOGSNR), z=VALUE, x=VALUE)
def test_posterior_is_the_conditional_of_the_joint_gaussian(
    ends: tuple[float, float], z: float, x: float
) -> None:
    """Given x: z_s ~ N(α_s x, σ_s²) and z_t | z_s ~ N(a z_s, ·), a = α_t/α_s, so that Var z_t = σ_t²."""
    low, high = sorted(ends)
    alpha_t, sigma2_t = math.sqrt(1 / (1 + math.exp(-low))), 1 / (1 + math.exp(low))
    alpha_s, sigma2_s = math.sqrt(1 / (1 + math.exp(-high))), 1 / (1 + math.exp(high))
    covariance = alpha_t / alpha_s * sigma2_s
    expected_mean = alpha_s * x + covariance / sigma2_t * (z - alpha_t * x)
    expected_variance = sigma2_s - covariance**2 / sigma2_t
    mean, variance = process.posterior(column(z)[:, None], column(x)[:, None], column(high), column(low))
    assert mean.item() == pytest.approx(expected_mean, abs=1e-12)
    assert variance.item() == pytest.approx(expected_variance, rel=1e-9, abs=1e-14)


@given(middle=LOGSNR, up=st.floats(0, 10), down=st.floats(0, 10), z=VALUE, x=VALUE)
def test_two_small_steps_are_one_large_step(
    middle: float, up: float, down: float, z: float, x: float
) -> None:
    """With x fixed the reverse chain is Markov: t → u → s has the law of t → s."""
    coefficients = [
        process.posterior_coefficients(column(s), column(t))
        for s, t in ((middle, middle - down), (middle + up, middle), (middle + up, middle - down))
    ]
    (z_1, x_1, v_1), (z_2, x_2, v_2), (z_12, x_12, v_12) = coefficients
    torch.testing.assert_close(z_2 * z_1, z_12, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(z_2 * x_1 + x_2, x_12, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(z_2**2 * v_1 + v_2, v_12, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logsnr_t", [-math.inf, -80.0, -15.0, 0.0, 15.0, 80.0])
def test_clean_end_returns_x(dtype: torch.dtype, logsnr_t: float) -> None:
    z_t, x = torch.tensor([[5.0]], dtype=dtype), torch.tensor([[0.3]], dtype=dtype)
    clean = column(math.inf, dtype=dtype)
    mean, variance = process.posterior(z_t, x, clean, column(logsnr_t, dtype=dtype))
    assert mean.item() == x.item() and variance.item() == 0
    assert process.sample_posterior(z_t, x, clean, column(logsnr_t, dtype=dtype)).item() == x.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logsnr_s", [-15.0, 0.0, 15.0, 80.0, math.inf])
def test_noisy_end_forgets_z(dtype: torch.dtype, logsnr_s: float) -> None:
    x, logsnr = torch.tensor([[0.3]], dtype=dtype), column(logsnr_s, dtype=dtype)
    noisy = column(-math.inf, dtype=dtype)
    (mean, variance), (other, _) = (
        process.posterior(torch.full_like(x, z), x, logsnr, noisy) for z in (5.0, -5.0)
    )
    alpha, sigma = process.alpha_sigma(logsnr)
    assert mean.item() == other.item() == (alpha * x).item()
    torch.testing.assert_close(variance[0], sigma**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(logsnr=LOGSNR, z=VALUE)
def test_no_step_changes_nothing(dtype: torch.dtype, logsnr: float, z: float) -> None:
    z_t, at = torch.tensor([[z]], dtype=dtype), column(logsnr, dtype=dtype)
    mean, variance = process.posterior(z_t, torch.full_like(z_t, 7.0), at, at)
    torch.testing.assert_close(mean, z_t)
    assert variance.item() == 0


@given(ends=st.tuples(LOGSNR, LOGSNR))
def test_single_precision_is_good_to_its_last_digits(ends: tuple[float, float]) -> None:
    """Also where s is close to t, and at either end."""
    low, high = (column(v, dtype=torch.float32) for v in sorted(ends))
    single = process.posterior_coefficients(high, low)
    double = process.posterior_coefficients(high.double(), low.double())
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=1e-12)


@pytest.mark.parametrize(("logsnr_s", "logsnr_t"), [(1.0, -1.0), (6.0, 5.5), (8.0, -8.0)])
def test_exact_posterior_draws_keep_the_marginal(logsnr_s: float, logsnr_t: float) -> None:
    """x ~ p(x | z_t), then z_s ~ q(z_s | z_t, x): z_s must follow the forward marginal at s."""
    n, rng = 100_000, torch.Generator().manual_seed(3)
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-1.0, 0.5], [0.8, 0.0]]),
        torch.tensor([[[0.05, 0.02], [0.02, 0.03]], [[0.2, -0.1], [-0.1, 0.1]]]),
    )
    at_s, at_t = (torch.full((n,), v, dtype=torch.float64) for v in (logsnr_s, logsnr_t))

    def forward(logsnr: torch.Tensor) -> torch.Tensor:
        x = mixture.sample(n, rng, torch.float64)
        return process.diffuse(x, logsnr, torch.randn(n, 2, generator=rng, dtype=torch.float64))

    z_t, z_s = forward(at_t), forward(at_s)
    x = mixture.posterior_sample(z_t, at_t, rng)
    drawn = process.sample_posterior(z_t, x, at_s, at_t, rng)

    # Means, second and third moments: each a mean over n, so 5 standard errors of the difference.
    for moment in (lambda z: z, lambda z: z.square(), lambda z: z[:, :1] * z[:, 1:], lambda z: z.pow(3)):
        a, b = moment(drawn), moment(z_s)
        standard_error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 5 * standard_error).all())

    m = 2000
    null = torch.tensor([energy_distance(forward(at_s)[:m], z_s[m : 2 * m]) for _ in range(6)])
    assert energy_distance(drawn[:m], z_s[:m]) < null.mean() + 6 * null.std()
    # The test has teeth: the mean in place of a draw is seen.
    shrunk = process.sample_posterior(z_t, mixture.mean(z_t, at_t), at_s, at_t, rng)
    if logsnr_s - logsnr_t > 1:
        assert energy_distance(shrunk[:m], z_s[:m]) > null.mean() + 6 * null.std()


@settings(max_examples=50)
@given(logsnr=st.floats(-10, 10), x=VALUE, eps=VALUE)
def test_predictions_mean_what_they_say(logsnr: float, x: float, eps: float) -> None:
    clean, noise, at = column(x)[:, None], column(eps)[:, None], column(logsnr)
    alpha, sigma = (v.item() for v in process.alpha_sigma(at))
    z = process.diffuse(clean, at, noise)
    assert z.item() == pytest.approx(alpha * x + sigma * eps, abs=1e-14)
    meaning = {"x": x, "eps": eps, "v": alpha * eps - sigma * x, "flow": eps - x}
    for kind in KINDS:
        assert process.from_x(clean, z, at, kind).item() == pytest.approx(meaning[kind], abs=1e-10)
        output = column(meaning[kind])[:, None]
        assert process.to_x(output, z, at, kind).item() == pytest.approx(x, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_round_trip_in_batches(kind: process.Prediction) -> None:
    rng = torch.Generator().manual_seed(0)
    output, z = torch.randn(2, 64, 3, 4, 4, generator=rng, dtype=torch.float64)
    logsnr = torch.linspace(-10, 10, 64, dtype=torch.float64)
    x = process.to_x(output, z, logsnr, kind)
    torch.testing.assert_close(process.from_x(x, z, logsnr, kind), output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convert", [process.to_x, process.from_x])
def test_unknown_prediction_is_refused(convert) -> None:
    z = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="'score'.*x, eps, v, flow"):
        convert(z, z, torch.zeros(1), "score")
