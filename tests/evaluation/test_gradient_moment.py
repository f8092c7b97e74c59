"""The gradient moment against closed forms, and on known cases of real digits."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from momatch.cli import main
from momatch.data.sources import load_data
from momatch.evaluation.gradient_moment import denoising_loss, gradient_moment
from momatch.interop.load import load_teacher
from momatch.methods.instant import adam_preconditioner


class Mean(nn.Module):
    """ℓ(x) = ½ ‖x − m‖², whose gradient in m is m − x: the moment is the squared distance of means."""

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.tensor([0.3, -0.2]))

    def loss(self, x, generator):
        return (x - self.m).square().sum(1) / 2


def normal(n: int, mean: float, seed: int) -> torch.Tensor:
    return mean + torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def measure(generated, real, seed=0, groups=8):
    model = Mean()
    return gradient_moment(
        model.loss, model, generated, real, torch.Generator().manual_seed(seed), groups, batch_size=50
    )


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_it_is_unbiased_and_its_error_is_the_spread_over_repetitions(shift):
    """‖shift (1, 1)‖² = 2 shift², also of few samples, where the plug-in estimate is 2/n + 2/m too high."""
    found = [measure(normal(40, shift, 2 * i), normal(64, 0.0, 2 * i + 1)) for i in range(150)]
    values = torch.tensor([each.value for each in found])
    assert float(values.mean()) == pytest.approx(2 * shift**2, abs=4 * float(values.std()) / math.sqrt(150))
    errors = torch.tensor([each.standard_error for each in found])
    # where both sides follow one law the estimate is degenerate, and the jackknife too large by about √2
    ratio = float(errors.square().mean().sqrt() / values.std())
    assert 0.85 < ratio < 1.15 if shift else 1 < ratio < 1.8
    assert found[0].n_generated == 40 and found[0].n_real == 64


def test_every_sample_counts_once_whatever_the_batches_and_groups_cost_nothing_but_noise():
    """With as many groups and one row more, all rows are in; the reference is left as it was."""
    generated, real = normal(41, 1.0, 0), normal(37, 0.0, 1)
    model = Mean().train()
    model.m.requires_grad_(False)
    options = {"groups": 6, "batch_size": 3}
    first = gradient_moment(model.loss, model, generated, real, torch.Generator().manual_seed(3), **options)
    options["batch_size"] = 100
    again = gradient_moment(model.loss, model, generated, real, torch.Generator().manual_seed(3), **options)
    assert first.value == pytest.approx(again.value, rel=1e-5)
    assert model.training and not model.m.requires_grad and model.m.grad is None


def test_both_sides_of_a_pair_are_given_the_same_noise():
    """ℓ is noise alone: differences of equal groups vanish."""
    model = Mean()

    def loss(x, generator):
        return model.m[0] * torch.randn(len(x), generator=generator) + 0 * x.sum(1)

    found = gradient_moment(
        loss, model, normal(24, 0, 0), normal(24, 5, 1), torch.Generator().manual_seed(0), 4
    )
    assert found.value == 0 and found.standard_error == 0


def test_too_few_samples_or_groups_are_refused():
    with pytest.raises(ValueError, match="10 generated samples are too few for 8 groups; give 16"):
        measure(normal(10, 0, 0), normal(40, 0, 1))
    with pytest.raises(ValueError, match="groups is 2; use 3 or more"):
        measure(normal(10, 0, 0), normal(40, 0, 1), groups=2)


def test_a_denoiser_s_loss_spreads_its_times_evenly_and_is_the_mean_square_in_v():
    seen = []

    class Zero(nn.Module):
        def forward(self, z, logsnr, cond):
            seen.append(logsnr)
            return torch.zeros_like(z)

    schedule = load_teacher("digits").schedule
    x = torch.ones(50, 1, 2, 2)
    value = denoising_loss(Zero(), schedule, draws=1)(x, torch.Generator().manual_seed(0))  # type: ignore (a denoiser)
    times = schedule.inverse(seen[0].double()).sort().values
    assert float((times.diff() - 1 / 50).abs().max()) < 1e-3
    torch.testing.assert_close(value, 1 + seen[0].exp())


def test_a_preconditioner_weighs_each_parameter_s_difference():
    """Means that differ by (1, 2): 3 · 1² + 0.5 · 2²."""
    model = Mean()
    generated = normal(4000, 0.0, 0) + torch.tensor([1.0, 2.0])
    found = gradient_moment(
        model.loss, model, generated, normal(4000, 0.0, 1), torch.Generator().manual_seed(0),
        preconditioner={"m": torch.tensor([3.0, 0.5])},
    )  # fmt: skip
    assert found.value == pytest.approx(5, abs=4 * found.standard_error) and found.standard_error < 0.2


def test_another_model_judges_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Noise is far from data, its judge knows; the student's own teacher is refused."""
    monkeypatch.chdir(tmp_path)
    short = ["--train.num-steps", "2", "--train.batch-size", "4", "--monitor.every", "0", "--device", "cpu"]
    assert main(["distill", "digits-4", "--steps", "1", *short, "--out", "student"]) == 0
    assert main(["train-teacher", "digits-teacher", *short, "--out", "judge"]) == 0
    words = ["evaluate", "student", "--num", "100", "--device", "cpu", "--judge"]
    assert main([*words, "digits"]) == 2
    assert "is the model that is judged, or its teacher" in capsys.readouterr().err
    assert main([*words, "judge", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    found = {m["metric"]: m for m in row["result"]["measurements"]}
    moment, floor = found["gradient_moment"], found["gradient_moment_floor"]
    assert moment["features"] == "judge" and moment["n_generated"] == 100
    assert moment["low"] < moment["value"] < moment["high"]
    assert abs(floor["value"]) < 4 * floor["standard_error"] + 1e-9 < moment["value"]
    assert main([*words, "judge"]) == 0
    assert "Gradient moment by judge, lower is better: student 1 " in capsys.readouterr().out


@pytest.mark.slow
def test_known_faults_of_digits_are_ordered_right():
    """600 images a side, judged by a denoiser that was trained on the training digits alone.

    Held-out digits against each other are the right distribution: 0. Training digits are not quite, since the
    judge has learned from them: that is the floor of what a student trained on them can show. Half of the
    classes, one class alone, blur and noise lie above it, and more of a fault above less.
    """
    data, model = load_data("digits"), load_teacher("digits")
    order = data.heldout.labels.argsort(stable=True)
    half, real = data.heldout.images[order[::2]], data.heldout.images
    train, labels = data.train.images, data.train.labels
    noise = torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(F.pad(train, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moments = model.second_moments()
    assert moments is not None
    scale = adam_preconditioner(moments, 0.1)
    loss = denoising_loss(model.denoiser, model.schedule)

    def judged(generated, real):
        rng = torch.Generator().manual_seed(0)
        return gradient_moment(loss, model.denoiser, generated, real, rng, preconditioner=scale)

    right = judged(half, data.heldout.images[order[1::2]])
    floor = judged(train[:600], real)
    assert abs(right.value) < 3 * right.standard_error
    worse = [
        [labels < 5, labels == 1],
        [0.9 * train + 0.1 * blurred, 0.75 * train + 0.25 * blurred],
        [train + 0.05 * noise, train + 0.1 * noise],
    ]
    for little, much in worse:
        a, b = (train[each] if each.dtype == torch.bool else each[:600] for each in (little, much))
        less, more = judged(a, real), judged(b, real)
        print(less, more)
        assert less.value > floor.value + 2 * floor.standard_error
        assert more.value > less.value + 2 * less.standard_error
