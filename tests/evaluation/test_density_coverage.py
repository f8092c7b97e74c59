"""Density and coverage, the score on classifier probabilities, and the two-sample test, on known answers."""

import math

import pytest
import torch
from torch import nn

from momatch.evaluation.density_coverage import density_coverage
from momatch.evaluation.features import ClassifierFeatures, PixelFeatures
from momatch.evaluation.metrics import evaluate, inception_score
from momatch.evaluation.precision_recall import precision_recall
from momatch.evaluation.two_sample import classifier_two_sample_test


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def line(*positions):
    return torch.tensor(positions, dtype=torch.float32)[:, None]


def test_known_answer_on_a_line():
    """k = 1: reference balls 0 ± 1, 1 ± 1, 10 ± 2, 12 ± 2."""
    found = density_coverage(line(0.5, 0.6, 11, 50), line(0, 1, 10, 12), rng(), k=1)
    assert found.density == 6 / 4  # 0.5, 0.6 and 11 lie in two balls each, 50 in none
    assert found.coverage == 1.0
    found = density_coverage(line(0.5, 0.6, 0.7, 0.4), line(0, 1, 10, 12), rng(), k=1)
    assert (found.density, found.coverage) == (2.0, 0.5)


def test_samples_of_the_same_law_have_density_1_and_the_expected_coverage():
    """Coverage of the same law is 1 − C(2n−k−1 choose n)/…, about 1 − 2^−k (Naeem et al., lemma 2)."""
    x, y = (torch.randn(3000, 8, generator=rng(seed)) for seed in (1, 2))
    found = density_coverage(x, y, rng(), k=5)
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.015)


def test_an_outlier_deceives_recall_and_not_coverage():
    """A generated set on one side of the data, and four points far out, whose balls cover all of it."""
    generator = rng()
    reference = torch.randn(400, 2, generator=generator)
    narrow = 0.05 * torch.randn(396, 2, generator=generator)
    far = torch.tensor([[30.0, 0], [0, 30], [-30, 0], [0, -30]])
    generated = torch.cat([narrow, far])
    assert precision_recall(generated, reference, rng()).recall > 0.95
    assert density_coverage(generated, reference, rng()).coverage < 0.1


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_matter(chunk):
    x, y = torch.randn(60, 3, generator=rng()), torch.randn(31, 3, generator=rng(1))
    assert density_coverage(x, y, rng(5), chunk=chunk) == density_coverage(x, y, rng(5))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        density_coverage(x, y, rng(), k=0)


def test_the_score_on_probabilities():
    """Sure and even over c classes: c; always the same answer, or never an answer: 1."""
    assert float(inception_score(torch.eye(4).repeat(5, 1))) == pytest.approx(4)
    assert float(inception_score(torch.eye(4)[:1].repeat(5, 1))) == pytest.approx(1)
    assert float(inception_score(torch.full((6, 4), 0.25))) == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    mean = p.mean(0)
    want = math.exp(sum(float(row[j] * (row[j] / mean[j]).log()) for row in p for j in range(2)) / 2)
    assert float(inception_score(p)) == pytest.approx(want, rel=1e-6)


class Says(nn.Module):
    """Class 1 where the picture is bright."""

    def features(self, images):
        return images.flatten(1)

    def forward(self, images):
        return 50 * torch.stack([-images.flatten(1).mean(1), images.flatten(1).mean(1)], 1)


def test_an_evaluation_has_them_all():
    images = torch.cat([torch.rand(100, 1, 4, 4, generator=rng(i)) + i - 1.0 for i in range(2)])
    images = images[torch.randperm(200, generator=rng())]
    found = evaluate(images, images + 0.0, PixelFeatures(), ClassifierFeatures(Says(), "says"), resamples=5)
    assert found.get("coverage").value == 1.0 and found.get("density").value >= 1.0
    score = found.get("inception_score")
    assert 1.9 < score.value <= 2.0 and score.features == "says" and score.standard_error is not None


def test_a_fresh_network_tells_what_differs_and_not_what_does_not():
    real = torch.rand(300, 1, 8, 8, generator=rng(1)) * 2 - 1
    same = torch.rand(300, 1, 8, 8, generator=rng(2)) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(same, 3, 1, 1)
    result = classifier_two_sample_test(same, real)
    assert result.n == 300 and abs(result.accuracy - 0.5) < 4 * 0.5 / math.sqrt(300)
    assert classifier_two_sample_test(blurred, real).accuracy > 0.9
    assert classifier_two_sample_test(same, real) == result  # a function of its seed
    beyond = torch.where(same > 0.9, 1.5, same.clamp(max=1.0))  # only the clip's place would tell
    assert classifier_two_sample_test(beyond, torch.where(real > 0.9, 1.0, real)).accuracy < 0.655
    with pytest.raises(ValueError, match="of one shape"):
        classifier_two_sample_test(same[:, :, :4], real)
