import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from momatch.evaluation.frechet import _GroupMoments, frechet_bootstrap, frechet_distance
from momatch.evaluation.statistics import FeatureStatistics


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=rng(seed), dtype=torch.float64) * scale + shift


def distance(a, b):
    return frechet_distance(FeatureStatistics.from_features(a), FeatureStatistics.from_features(b))


class Identity(nn.Module):
    """What torchmetrics takes for a feature network."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_torchmetrics_and_with_sqrtm(seed):
    mixing = normal(6, 6, 10 + seed)
    a, b = normal(80, 6, seed) @ mixing, normal(50, 6, 20 + seed, 1.3, 0.4)
    oracle = FrechetInceptionDistance(Identity(6), input_img_size=(1, 2, 3), normalize=True)
    oracle.set_dtype(torch.float64)
    oracle.update(a, real=True)
    oracle.update(b, real=False)
    assert distance(a, b) == pytest.approx(float(oracle.compute()), rel=1e-9)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    by_hand = gap + np.trace(cov_a + cov_b - 2 * np.real(scipy.linalg.sqrtm(cov_a @ cov_b)))
    assert distance(a, b) == pytest.approx(by_hand, rel=1e-9)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)


def test_closed_form_for_commuting_gaussians():
    q = torch.linalg.qr(normal(5, 5)).Q
    std_a, std_b = torch.tensor([1.0, 2, 0, 3, 0.5]).double(), torch.tensor([2.0, 0, 0, 1, 0.5]).double()
    mean_a, mean_b = normal(1, 5, 1)[0], normal(1, 5, 2)[0]
    a = FeatureStatistics(mean_a, q @ (std_a**2).diag() @ q.T, 10)
    b = FeatureStatistics(mean_b, q @ (std_b**2).diag() @ q.T, 10)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("n", [3, 10, 100])
def test_same_statistics_are_at_distance_zero_even_if_singular(n):
    features = normal(n, 10, scale=5)
    features[:, 3] = 1.0
    assert distance(features, features) == pytest.approx(0, abs=1e-10)
    assert distance(features, features + 2) == pytest.approx(40, rel=1e-9)


def test_disjoint_singular_covariances_add_up():
    a, b = normal(30, 6), normal(30, 6, 1)
    a[:, :3], b[:, 3:] = 0, 0
    gap = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert distance(a, b) == pytest.approx(float(gap), rel=1e-7)


def test_different_dimensions_are_refused():
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        distance(normal(9, 4), normal(9, 3))
    with pytest.raises(ValueError, match="4 dimensions, the reference 3"):
        frechet_bootstrap(normal(9, 4), normal(9, 3), rng())
    with pytest.raises(ValueError, match="got 1 and 200"):
        frechet_bootstrap(normal(9, 4), normal(9, 4), rng(), resamples=1)


@pytest.mark.parametrize("n", [50, 5000])
def test_bootstrap_values_are_the_distances_themselves(n):
    a, b, reference = normal(n, 4, 0, 1.2), normal(40, 4, 1), normal(60, 4, 2, shift=10)
    bootstrap = frechet_bootstrap([a, b], reference, rng(), resamples=5)
    assert bootstrap.resampled.shape == (5, 2)
    assert bootstrap.values.tolist() == pytest.approx(
        [distance(a, reference), distance(b, reference)], rel=1e-9
    )
    assert bootstrap.interval(1).value == pytest.approx(distance(b, reference), rel=1e-9)
    assert bootstrap.difference().value == pytest.approx(
        distance(a, reference) - distance(b, reference), rel=1e-6
    )


def test_bootstrap_depends_on_its_generator_alone():
    a, reference = normal(60, 3), normal(50, 3, 1)
    first, second = (frechet_bootstrap(a, reference, rng(7), resamples=5).resampled for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, frechet_bootstrap(a, reference, rng(8), resamples=5).resampled)


def test_blocks_have_the_spread_of_single_samples(monkeypatch):
    a, reference = normal(1500, 3, 0, 1.3), normal(300, 3, 1)
    exact = frechet_bootstrap(a, reference, rng(), resamples=200).interval()
    monkeypatch.setattr("momatch.evaluation.frechet.EXACT_BELOW", 500)
    blocks = frechet_bootstrap(a, reference, rng(), resamples=200).interval()
    assert blocks.value == pytest.approx(exact.value, rel=1e-9)
    assert blocks.standard_error == pytest.approx(exact.standard_error, rel=0.2)
    assert blocks.corrected == pytest.approx(exact.corrected, abs=0.3 * exact.standard_error)


def test_intervals_match_monte_carlo():
    """Spread, bias correction and paired difference against 50 repeats of the experiment."""
    d, close, far = 4, 1.1, 1.5
    truth_close, truth_far = d * (close - 1) ** 2, d * (far - 1) ** 2
    generator, rows = rng(3), []

    def draw(n, scale):
        return torch.randn(n, d, generator=generator) * scale

    for _ in range(50):
        bootstrap = frechet_bootstrap(
            [draw(400, far), draw(400, close)], draw(200, 1.0), generator, resamples=60
        )
        one, difference = bootstrap.interval(0), bootstrap.difference()
        covered = difference.low <= truth_far - truth_close <= difference.high
        row = [one.value, one.standard_error, one.corrected]
        rows.append([*row, difference.value, difference.standard_error, covered])
    value, error, corrected, difference, difference_error, covered = torch.tensor(rows).double().T
    assert float(error.mean()) == pytest.approx(float(value.std()), rel=0.25)
    assert float(difference_error.mean()) == pytest.approx(float(difference.std()), rel=0.25)
    assert value.mean() > truth_far
    assert abs(corrected.mean() - truth_far) < 2.5 * corrected.std() / 50**0.5
    assert covered.mean() >= 0.88


def test_groups_are_resampled_whole_and_alike_in_every_set():
    """Two models asked the same prompts: the interval of their difference is that of fresh prompts."""
    groups = torch.arange(100).repeat(2)
    reference = normal(400, 3, 1)

    def sets(seed):
        prompts = normal(100, 3, seed)[groups]
        return [prompts + normal(200, 3, 1000 + seed, 0.3), 1.1 * prompts + normal(200, 3, 2000 + seed, 0.3)]

    def error(seed, groups):
        found = frechet_bootstrap(sets(seed), reference, rng(seed), 60, groups=groups)
        return found.difference(1, 0).standard_error

    drawn = [[distance(s, reference) for s in sets(seed)] for seed in range(200)]
    spread = float(torch.tensor([b - a for a, b in drawn]).std())
    told, alone = (sum(error(seed, each) for seed in range(20)) / 20 for each in (groups, None))
    assert 0.8 * spread < told < 1.35 * spread  # the reference is resampled too
    assert alone > 1.5 * told


def test_groups_of_one_give_every_set_the_same_resample():
    groups, a = torch.arange(50), normal(50, 3)
    found = frechet_bootstrap([a, a], normal(70, 3, 1), rng(), 20, groups=groups)
    assert torch.equal(found.resampled[:, 0], found.resampled[:, 1]) and found.resampled[:, 0].std() > 0
    with pytest.raises(ValueError, match="50 samples are in groups, the sets have \\[50, 40\\]"):
        frechet_bootstrap([a, a[:40]], normal(70, 3, 1), rng(), groups=groups)


def test_a_group_drawn_twice_counts_all_its_samples_twice():
    groups, features = torch.tensor([0, 0, 1, 2, 2, 2]), normal(6, 3)
    told = _GroupMoments(features, groups).weighted(torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))
    rows = FeatureStatistics.from_features(features[[0, 1, 0, 1, 3, 4, 5]])
    torch.testing.assert_close(told.mean, rows.mean)
    torch.testing.assert_close(told.covariance, rows.covariance)
    assert told.n == 7
