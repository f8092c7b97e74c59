import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from momatch.evaluation.kid import kid, kid_difference


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force(x, y):
    """Equation (1), pair by pair, in float64."""
    x, y = x.double(), y.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within_x = (kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (n * (n - 1))
    within_y = (kernel(y, y).sum() - kernel(y, y).diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * kernel(x, y).mean())


def jackknife(statistic, x, y, groups):
    """Two-sample delete-a-group jackknife by leaving out for real; groups are every `groups`-th sample."""
    without_x = [statistic(x[torch.arange(len(x)) % groups != g], y) for g in range(groups)]
    without_y = [statistic(x, y[torch.arange(len(y)) % groups != g]) for g in range(groups)]
    variance = sum(
        torch.tensor(v).double().var() * (groups - 1) ** 2 / groups for v in (without_x, without_y)
    )
    return float(variance) ** 0.5


@pytest.mark.parametrize(("n", "m"), [(40, 40), (57, 23), (4, 9)])
@pytest.mark.parametrize("groups", [2, 7, 100])
def test_equals_brute_force(n, m, groups):
    x, y = torch.randn(n, 5, generator=rng()), torch.randn(m, 5, generator=rng(1)) + 0.5
    result = kid(x, y, rng(), groups)
    assert result.value == pytest.approx(brute_force(x, y), abs=2e-6)
    assert result.standard_error > 0


def test_equals_torchmetrics_on_equal_sizes():
    x, y = torch.randn(30, 5, generator=rng()), torch.randn(30, 5, generator=rng(1)) * 1.5
    assert kid(x, y, rng()).value == pytest.approx(float(poly_mmd(x, y)), abs=1e-5)


def test_block_sums_give_the_jackknife_of_leaving_out(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n).view(-1, 8).T.flatten())
    x, y = torch.randn(64, 3, generator=rng()) + 1, torch.randn(40, 3, generator=rng(1))
    assert kid(x, y, rng(), 8).standard_error == pytest.approx(jackknife(brute_force, x, y, 8), rel=1e-4)


def test_difference_is_paired():
    a, b = torch.randn(300, 4, generator=rng()) + 0.8, torch.randn(250, 4, generator=rng(1)) + 0.8
    reference = torch.randn(30, 4, generator=rng(2))
    difference = kid_difference(a, b, reference, rng(), 30)
    one, two = kid(a, reference, rng(), 30), kid(b, reference, rng(), 30)
    expected = brute_force(a, reference) - brute_force(b, reference)
    assert difference.value == pytest.approx(expected, abs=1e-5)
    assert difference.standard_error < 0.8 * (one.standard_error**2 + two.standard_error**2) ** 0.5
    itself = kid_difference(a, a, reference, rng(), 30)
    assert itself.value == pytest.approx(0, abs=1e-6)


def test_two_halves_of_one_gaussian_are_at_distance_zero():
    """Unbiased: over 40 repeats the mean is 0 within its error, and values within their jackknife error."""
    results = []
    for seed in range(40):
        both = torch.randn(300, 6, generator=rng(seed))
        results.append(kid(both[:150], both[150:], rng(), 30))
    values = torch.tensor([result.value for result in results])
    errors = torch.tensor([result.standard_error for result in results])
    assert abs(values.mean()) < 2.5 * values.std() / 40**0.5
    assert (values.abs() < 2 * errors).float().mean() >= 0.9
    assert (values < 0).any()


def test_jackknife_error_matches_monte_carlo():
    values, errors, differences, difference_errors = [], [], [], []
    for seed in range(60):
        generator = rng(seed)
        x, y = torch.randn(200, 4, generator=generator) + 0.4, torch.randn(100, 4, generator=generator)
        z = torch.randn(150, 4, generator=generator) * 1.2
        one, two = kid(x, y, generator, 25), kid_difference(x, z, y, generator, 25)
        values.append(one.value)
        errors.append(one.standard_error)
        differences.append(two.value)
        difference_errors.append(two.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.25)
    assert np.mean(difference_errors) == pytest.approx(np.std(differences, ddof=1), rel=0.25)


def test_bad_input_is_refused():
    x = torch.randn(20, 3)
    with pytest.raises(ValueError, match="3 reference samples are too few; give at least 4"):
        kid(x, x[:3], rng())
    with pytest.raises(ValueError, match="3 dimensions, the reference 2"):
        kid(x, x[:, :2], rng())
    with pytest.raises(ValueError, match="1 of 20 generated samples have NaN"):
        kid(x.index_fill(0, torch.tensor(4), float("nan")), x, rng())
    with pytest.raises(ValueError, match="groups must be at least 2, got 1"):
        kid(x, x, rng(), 1)
