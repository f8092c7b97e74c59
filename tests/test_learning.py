"""Does it learn? Short real trainings on the digits; minutes, so not part of the daily suite."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import momatch
from momatch.config import AlternatingConfig
from momatch.evaluation.builtin import digits_classifier
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.statistics import FeatureStatistics
from momatch.methods.denoising import Denoising
from momatch.training.batches import image_batches

NUM_SAMPLES = 2000


@pytest.fixture(scope="module")
def heldout():
    images = momatch.load_data("digits").heldout.images
    return FeatureStatistics.from_features(extract(digits_classifier(), images))


def distance(model, steps: int, heldout) -> float:
    labels = {"label": torch.arange(NUM_SAMPLES) % 10}
    samples = model.sample(NUM_SAMPLES, steps, labels, seed=1)
    features = extract(digits_classifier(), samples)
    return frechet_distance(FeatureStatistics.from_features(features), heldout)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["alternating", "joint"])
def test_a_short_distillation_halves_the_distance_at_two_steps(update, heldout):
    """The teacher at 2 steps has 3.5; a student of the full recipe ends at 0.63 (docs/numbers.md)."""
    teacher, data = momatch.load_teacher("digits"), momatch.load_data("digits")
    config = momatch.recipe("digits-2")
    pairs = 150
    num_steps = pairs if update == "joint" else 2 * pairs
    config = dataclasses.replace(
        config,
        method=AlternatingConfig(update),
        train=dataclasses.replace(config.train, num_steps=num_steps),
        optim=dataclasses.replace(config.optim, warmup_steps=num_steps // 10),
        monitor=dataclasses.replace(config.monitor, every=0),
    )
    student = momatch.distill(teacher, data, config)
    assert distance(student, 2, heldout) < 0.5 * distance(teacher, 2, heldout)


@pytest.mark.slow
def test_the_shipped_teacher_denoises_held_out_digits_better_with_their_label_than_without():
    teacher, data = momatch.load_teacher("digits"), momatch.load_data("digits").heldout
    losses = []
    for labels in (data.labels, torch.full_like(data.labels, 10)):
        method = Denoising(teacher.denoiser, teacher.schedule, cond_dropout=0.0)
        batches = image_batches(data.images, labels, 512, seed=3)
        with torch.no_grad():
            losses.append(sum(float(method.step(n, batches(n)).losses["teacher"]) for n in range(20)) / 20)
    assert losses[0] < losses[1] < 0.5
