import json
import math

import pytest
import torch

from momatch.evaluation.features import PixelFeatures
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.metrics import EvaluationResult, evaluate
from momatch.evaluation.statistics import FeatureStatistics


class Sign:
    """Label 1 for pictures that are bright on average; its feature is the brightness of each half."""

    name, metric = "sign", "class_accuracy"

    def __call__(self, images):
        return images.flatten(1).view(len(images), 2, -1).mean(2)

    def predict(self, images):
        return (images.flatten(1).mean(1) > 0).long()


def labelled(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    noise = 0.1 * torch.randn(n, 1, 2, 2, generator=generator)
    return noise + (labels * 2.0 - 1)[:, None, None, None], labels


@pytest.fixture(scope="module")
def result():
    images, labels = labelled(300, 0)
    labels[:30] = 1 - labels[:30]
    batches = ((images[i : i + 70], labels[i : i + 70]) for i in range(0, 300, 70))
    extractors = [PixelFeatures(), Sign()]
    training = labelled(120, 2)[0]
    return evaluate(
        batches,
        labelled(80, 1),
        extractors,
        Sign(),
        training,
        reference_name="toy-test",
        seed=3,
        resamples=20,
    )


def test_every_number_says_what_it_is(result):
    metrics = [(m.metric, m.features) for m in result.measurements]
    assert len(set(metrics)) == len(metrics) == 9 * 2 + 2 + 4
    assert {m.reference for m in result.measurements} == {"toy-test"}
    assert {m.seed for m in result.measurements} == {3}
    frechet, precision = result.get("frechet", "pixels"), result.get("precision", "sign")
    assert (frechet.n_generated, frechet.n_reference) == (300, 80)
    assert (precision.n_generated, precision.n_reference) == (80, 80)
    assert "120 distinct training pictures" in result.get("frechet_floor", "sign").note


def test_numbers_are_right(result):
    features, real = labelled(300, 0)[0].flatten(1), labelled(80, 1)[0].flatten(1)
    statistics = FeatureStatistics.from_features
    frechet = result.get("frechet", "pixels")
    assert frechet.value == pytest.approx(frechet_distance(statistics(features), statistics(real)), rel=1e-6)
    assert frechet.low < frechet.value < frechet.high
    accuracy = result.get("class_accuracy")
    assert accuracy.value == pytest.approx(0.9)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.09 / 300))
    assert accuracy.low < 0.9 < accuracy.high
    ceiling = result.get("class_accuracy_reference")
    assert ceiling.value == 1.0 and ceiling.low < 1.0 == ceiling.high
    assert result.get("neighbour_ratio").value == pytest.approx(1, abs=0.15)
    above = result.get("frechet_above_floor", "pixels")
    assert above.low < 0 < above.high


def test_batches_one_tensor_and_pairs_give_the_same(result):
    samples, reference = labelled(60, 0), labelled(50, 1)
    whole = evaluate(samples, reference, Sign(), Sign(), batch_size=7, resamples=5)
    pulled = evaluate(
        [(x, y) for x, y in zip(*(t.split(11) for t in samples), strict=True)],
        reference,
        Sign(),
        Sign(),
        resamples=5,
    )
    assert whole == pulled
    unlabelled = evaluate(samples[0], reference[0], Sign(), Sign(), resamples=5)
    assert unlabelled.get("kid") == whole.get("kid")
    with pytest.raises(KeyError, match="0 measurements of 'class_accuracy'"):
        unlabelled.get("class_accuracy")


def test_goes_through_json(result):
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert EvaluationResult.from_dict(json.loads(text)) == result
    with pytest.raises(ValueError, match="extra"):
        EvaluationResult.from_dict({"measurements": [{"extra": 1}]})


def test_ambiguous_get_is_refused(result):
    with pytest.raises(KeyError, match="2 measurements of 'frechet'"):
        result.get("frechet")


def test_bad_input_is_refused():
    images, labels = labelled(20, 0)
    reference = labelled(20, 1)
    with pytest.raises(ValueError, match="1 generated samples are too few"):
        evaluate(images[:1], reference, Sign())
    with pytest.raises(ValueError, match="3 of 20 generated samples have NaN"):
        evaluate(images.index_fill(0, torch.arange(3), float("nan")), reference, PixelFeatures())
    with pytest.raises(ValueError, match="3 reference samples are too few; give at least 4"):
        evaluate(images, images[:3], Sign(), resamples=2)
    with pytest.raises(ValueError, match="16 dimensions, the reference 4"):
        evaluate(torch.zeros(20, 1, 4, 4), images, PixelFeatures())
    with pytest.raises(ValueError, match="only 10 of 20 samples come with the label"):
        evaluate([(images[:10], labels[:10]), (images[10:], None)], reference, Sign(), Sign())
    with pytest.raises(ValueError, match=r"labels have shape \(7,\) for 20 pictures"):
        evaluate((images, labels[:7]), reference, Sign(), Sign())
    with pytest.raises(ValueError, match="0 generated samples"):
        evaluate([], reference, Sign())
