"""What does not depend on the samples is done once for any number of rows, and no number notices."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

import pytest
import torch

from momatch import load_data, load_teacher
from momatch.data.images import Split
from momatch.evaluation import builtin, evaluate, frechet
from momatch.evaluation.evaluate import GRID_SAMPLES, Candidate, Judge, assess, evaluate_at
from momatch.evaluation.metrics import Reference
from momatch.evaluation.metrics import evaluate as evaluate_samples


class Bright:
    """Brightness of each half, label 1 for bright images; counts the images it sees, by their first value."""

    name, metric = "bright", "class_accuracy"

    def __init__(self):
        self.seen, self.judged = Counter(), Counter()

    def __call__(self, images):
        self.seen.update(images[:, 0, 0, 0].tolist())
        return images.flatten(1).view(len(images), 2, -1).mean(2)

    def predict(self, images):
        self.judged.update(images[:, 0, 0, 0].tolist())
        return (images.flatten(1).mean(1) > 0).long()


def images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 2, 2, generator=generator), torch.arange(n) % 2


def times(counter, real):
    return {counter[value] for value in real[:, 0, 0, 0].tolist()}


@pytest.mark.parametrize("budget", [frechet.KEPT_BUDGET, 10])
def test_one_reference_gives_each_set_its_own_numbers_and_is_looked_at_once(budget, monkeypatch):
    monkeypatch.setattr(frechet, "KEPT_BUDGET", budget)  # beyond it resamples are drawn anew
    real, training = images(80, 1), images(120, 2)[0]
    options = {"seed": 3, "resamples": 5}
    spy = Bright()
    reference = Reference(real, spy, spy, training, **options)
    sets = [images(200, 10), images(70, 11), images(200, 12), images(200, 13), images(70, 11)]
    found = [reference.measure(each) for each in sets]
    assert times(spy.seen, real[0]) == times(spy.judged, real[0]) == times(spy.seen, training) == {1}
    assert found == [evaluate_samples(each, real, Bright(), Bright(), training, **options) for each in sets]
    assert len({result.get("frechet").value for result in found}) == 4


def test_the_real_side_of_a_bootstrap_is_computed_once_while_the_number_of_samples_stays(monkeypatch):
    computed = []
    original = frechet._BlockMoments.weighted

    def weighted(self, weights):
        computed.append(len(self.sizes))
        return original(self, weights)

    monkeypatch.setattr(frechet._BlockMoments, "weighted", weighted)
    reference = Reference(images(80, 1), Bright(), training_images=images(120, 2)[0], resamples=5)
    for seed in range(3):
        reference.measure(images(200, seed))
    assert Counter(computed) == {80: 6, 120: 6, 200: 3 * 6}
    reference.measure(images(70, 0))
    assert Counter(computed) == {80: 12, 120: 12, 200: 18, 70: 6}


def test_three_rows_load_one_decoder_and_one_classifier(tmp_path, monkeypatch):
    made, decoded, original = [], [], builtin.shipped_classifier
    monkeypatch.setattr(
        builtin, "shipped_classifier", lambda name: made.append("classifier") or original(name)
    )

    def decoder_of(model):
        made.append("decoder")
        return lambda latents: decoded.append(len(latents)) or latents

    monkeypatch.setattr(evaluate, "decoder_of", decoder_of)
    monkeypatch.setattr(evaluate, "Judge", partial(Judge, resamples=2))
    model, digits = load_teacher("digits"), load_data("digits")
    candidates = [Candidate("teacher", model, (1, 2)), Candidate("student", model, (1,))]
    rows = list(assess(tmp_path, candidates, digits, 100, 0))
    assert Counter(made) == {"decoder": 1, "classifier": 1}
    real = len(digits.heldout) + len(digits.train)
    assert sum(decoded) == 1 + real + 3 * (100 + GRID_SAMPLES)  # one to see what size images have
    assert len(list((tmp_path / "samples").iterdir())) == 3
    alone = evaluate_at(model, "student", digits, 1, 100, 0, 2)
    assert rows[2].result == rows[0].result == alone.result != rows[1].result


def test_models_of_different_pipelines_have_different_judges(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "decoder_of", lambda model: asked.append(model.provenance.pipeline))
    monkeypatch.setattr(evaluate, "Judge", partial(Judge, resamples=2))
    model, digits = load_teacher("digits"), load_data("digits")
    small = Split(*(dataclasses.replace(s, images=s.images[:50], labels=s.labels[:50])
                    for s in (digits.train, digits.heldout)))  # fmt: skip
    other = dataclasses.replace(model, provenance={**model.info, "pipeline": "another"})
    candidates = [Candidate("a", model, (1,)), Candidate("b", other, (1,)), Candidate("c", model, (1,))]
    assert [row.name for row in assess(None, candidates, small, 10, 0)] == ["a", "b", "c"]
    assert asked == [None, "another"]
