"""RMMD against closed forms: where it comes to rest, what it leaves alone, which samples it learns from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from momatch.diffusion import schedules
from momatch.methods.base import Batch
from momatch.methods.reward import Reward
from momatch.methods.transition import Transition

SCHEDULE = schedules.cosine(logsnr_min=-12.0, logsnr_max=6.0)
MEAN, V = 0.5, 2.0
C = 0.4  # of the linear reward R(x) = C · x


class Affine(nn.Module):
    """The denoiser of Gaussian data, mean + a (z − α mean), and a shift that can learn."""

    def __init__(self, mean: float = MEAN, wrong: float = 0.0):
        super().__init__()
        self.mean, self.wrong = mean, wrong
        self.shift = nn.Parameter(torch.zeros(()).double())

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        alpha2 = torch.sigmoid(logsnr)[:, None]
        slope = (alpha2.sqrt() * V / (alpha2 * V + 1 - alpha2)) * (1 + self.wrong)
        return self.mean + slope * (z - alpha2.sqrt() * self.mean) + self.shift


def linear(x: Tensor, cond, rows) -> Tensor:
    return C * x.sum(1)


def make(steps=2, reward=linear, wrong=0.0, **options) -> Reward:
    networks = Affine(), Affine(), Affine(wrong=wrong)
    return Reward(*networks, reward, Transition(SCHEDULE, steps), **options)  # type: ignore (not Denoisers)


def batch(n=2000, seed=0) -> Batch:
    return Batch(torch.zeros(n, 1).double(), None, torch.Generator().manual_seed(seed), torch.arange(n))


def trained(method: Reward, steps=150, rate=0.2) -> float:
    for step in range(steps):
        loss = method.step(step, batch(200, step)).losses["student"]
        (gradient,) = torch.autograd.grad(loss, [method.student.shift])
        method.student.shift.data -= rate * gradient
    return float(method.student.shift.detach())


@pytest.mark.parametrize(("scale", "anchor"), [(1.0, 1.0), (0.5, 1.0), (1.0, 4.0)])
def test_on_gaussians_a_linear_reward_shifts_the_mean_by_what_is_known(scale, anchor):
    """φ and θ agree, so that (λ/μ) C is what the anchor allows each estimate; the samples' mean follows."""
    method = make(scale=scale, anchor=anchor)
    shift = trained(method)
    assert shift == pytest.approx(scale * C / anchor, abs=1e-3)
    logsnr = SCHEDULE(torch.tensor([0.5, 1.0], dtype=torch.float64))
    (alpha, alpha_1), (s2, s2_1) = logsnr.sigmoid().sqrt().tolist(), (-logsnr).sigmoid().tolist()
    # mean of z at the half, from z_1 ~ N(0, 1): the posterior's weights, then the second call
    slope_1, slope = alpha_1 * V / (alpha_1**2 * V + s2_1), alpha * V / (alpha**2 * V + s2)
    of_z = s2 * alpha_1 / alpha / s2_1
    x = MEAN + slope_1 * (0 - alpha_1 * MEAN) + shift
    z = (alpha - of_z * alpha_1) * x
    wanted = MEAN + slope * (z - alpha * MEAN) + shift
    found = method.sample(batch(200_000))
    assert float(found.mean()) == pytest.approx(wanted, abs=5 * float(found.std()) / math.sqrt(200_000))


def gradients(method: Reward, count=100) -> Tensor:
    found = []
    for step in range(count):
        loss = method.step(step, batch(200, step)).losses["student"]
        found.append(torch.autograd.grad(loss, [method.student.shift])[0])
    return torch.stack(found)


def test_without_a_reward_nothing_moves_on_average_at_the_fixed_point():
    """φ is as training leaves it: with errors that no sample of the student's feels on average."""
    for wrong in (0.0, 0.3):  # a wrong slope errs to both sides of the mean alike
        found = gradients(make(steps=4, scale=0.0, wrong=wrong))
        error = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean())) <= 4 * error + 1e-12, wrong
    moved = gradients(make(steps=4, scale=1.0, wrong=0.3))
    assert float(moved.mean()) == pytest.approx(-C, abs=0.02)


def test_a_student_that_has_moved_is_pulled_back_by_the_anchor():
    method = make(scale=0.0, anchor=2.0)
    method.student.shift.data += 0.3
    assert float(gradients(method).mean()) == pytest.approx(2 * 0.3, abs=1e-9)


def test_it_learns_from_its_own_samples_in_all_its_steps_and_only_the_student_learns():
    method = make(steps=3)
    seen: list[Tensor] = []
    method.student.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    update = method.step(0, batch(500))
    calls = [SCHEDULE.inverse(logsnr) for logsnr in seen]
    for t, wanted in zip(calls[:3], (1, 2 / 3, 1 / 3), strict=True):
        torch.testing.assert_close(t, torch.full_like(t, wanted), atol=1e-6, rtol=1e-6)
    assert len(calls) == 4 and calls[3].std() > 0.2  # the call with a gradient, at times of its own
    update.losses["student"].backward()
    assert method.student.shift.grad is not None
    for other in (method.teacher, method.auxiliary, method.former):
        assert all(p.grad is None and not p.requires_grad for p in other.parameters())


def test_z_t_is_the_student_s_sample_diffused_not_the_data():
    method = make(steps=1)
    data = batch(50_000)
    far = Batch(data.x + 100, None, data.generator, data.rows)
    shown: list[tuple[Tensor, Tensor]] = []
    method.student.register_forward_hook(lambda module, args, output: shown.append(args[:2]))
    method.step(0, far)
    z, logsnr = shown[-1]
    clean = z[(logsnr > 4)]
    assert float(clean.mean()) == pytest.approx(MEAN, abs=0.1)


def test_rewards_are_told_the_condition_and_the_rows():
    told = []

    def reward(x, cond, rows):
        told.append((cond, rows))
        return rows.to(x.dtype) * x.sum(1)

    method = make(reward=reward, anchor=0.0)
    given = batch(4)
    labelled = Batch(given.x, {"label": torch.arange(4)}, given.generator, given.rows)
    loss = method.step(0, labelled).losses["student"]
    (gradient,) = torch.autograd.grad(loss, [method.student.shift])
    assert float(gradient) == pytest.approx(-(0 + 1 + 2 + 3) / 4)  # each sample's own reward
    assert all(torch.equal(rows, torch.arange(4)) and "label" in cond for cond, rows in told)


def test_metrics_tell_the_reward_of_whole_samples_and_the_drift_relative_to_their_length():
    method = make(steps=1)
    update = method.step(0, batch(50_000))
    metrics = update.metrics()
    assert float(metrics["drift"]) == 0
    said: list[Tensor] = []
    method.former.register_forward_hook(lambda module, args, output: said.append(output))
    method.student.shift.data += 0.25
    metrics = method.step(0, batch(50_000)).metrics()
    sample = method.sample(batch(50_000))
    assert float(metrics["reward"]) == pytest.approx(C * float(sample.mean()), abs=0.02)
    assert float(metrics["drift"]) == pytest.approx(float((0.25 / said[0].abs()).mean()))
