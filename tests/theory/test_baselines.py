"""Other distillation methods against what they must converge to, known in closed form for Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from momatch.diffusion import process, sampling, schedules
from momatch.methods.base import Batch
from momatch.methods.consistency import Consistency
from momatch.methods.dmd import DistributionMatching
from momatch.methods.progressive import Progressive
from momatch.methods.regression import Regression
from momatch.utils.seeding import generator

SCHEDULE = schedules.cosine()
MEAN, VARIANCE = 0.6, 0.25


class Exact(nn.Module):
    """E[x | z] of N(MEAN, VARIANCE), written out."""

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        alpha, sigma2 = torch.sigmoid(logsnr).sqrt()[:, None], torch.sigmoid(-logsnr)[:, None]
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma2)
        return MEAN + gain * (z - alpha * MEAN)


class Table(nn.Module):
    """x = a z + b with a and b of its own at each of `size` + 1 times; it begins as the teacher."""

    def __init__(self, size: int):
        super().__init__()
        logsnr = SCHEDULE(torch.arange(size + 1).double() / size)
        zero, one = (Exact()(torch.full((size + 1, 1), v).double(), logsnr)[:, 0] for v in (0.0, 1.0))
        self.size = size
        self.a, self.b = nn.Parameter(one - zero), nn.Parameter(zero)

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        place = (SCHEDULE.inverse(logsnr) * self.size).round().long()
        return self.a[place, None] * z + self.b[place, None]


def teacher_map(z: Tensor, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Where `steps` DDIM steps of the exact teacher lead from z at `start`; every step written out."""
    levels = SCHEDULE(torch.linspace(start, end, steps + 1, dtype=torch.float64))
    alpha, sigma = torch.sigmoid(levels).sqrt().tolist(), torch.sigmoid(-levels).sqrt().tolist()
    for i in range(steps):
        x = Exact()(z, levels[i].expand(len(z)))
        z = alpha[i + 1] * x + sigma[i + 1] / sigma[i] * (z - alpha[i] * x)
    return z


def student_map(student: nn.Module, z: Tensor, steps: int) -> Tensor:
    """The same of a student, in its own steps."""
    levels = SCHEDULE(sampling.time_grid(steps))
    alpha, sigma = torch.sigmoid(levels).sqrt().tolist(), torch.sigmoid(-levels).sqrt().tolist()
    for i in range(steps):
        x = student(z, levels[i].expand(len(z)))
        z = alpha[i + 1] * x + sigma[i + 1] / sigma[i] * (z - alpha[i] * x)
    return z


def learn(method, steps: int, rate=0.05, size=32) -> None:
    """Adam for each role, as the training loop has it; the rate falls to 0."""
    optimizers = {
        role: torch.optim.Adam(net.parameters(), rate, (0.0, 0.99)) for role, net in method.trainable.items()
    }
    for step in range(steps):
        rng = generator(0, "train", step)
        x = MEAN + math.sqrt(VARIANCE) * torch.randn(size, 1, generator=rng, dtype=torch.float64)
        for role, loss in method.step(step, Batch(x, None, rng)).losses.items():
            optimizers[role].param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizers[role].zero_grad()
            loss.backward()
            optimizers[role].step()
        method.after_update(step)


NOISE = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]


def distance(student: nn.Module, steps: int, teacher_steps: int) -> float:
    return float((student_map(student, NOISE, steps) - teacher_map(NOISE, teacher_steps)).abs().max())


def test_one_ddim_step_is_what_it_says_and_its_estimate_inverts_it():
    z, x = NOISE, NOISE.flip(0).sin()
    logsnr_s, logsnr_t = torch.full((11,), 1.5).double(), torch.full((11,), -0.5).double()
    eps = (z - torch.sigmoid(logsnr_t).sqrt()[:, None] * x) / torch.sigmoid(-logsnr_t).sqrt()[:, None]
    want = torch.sigmoid(logsnr_s).sqrt()[:, None] * x + torch.sigmoid(-logsnr_s).sqrt()[:, None] * eps
    found = process.ddim_step(z, x, logsnr_s, logsnr_t)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(process.ddim_estimate(found, z, logsnr_s, logsnr_t), x)
    assert torch.equal(process.ddim_step(z, x, logsnr_t, logsnr_t), z)  # a step of no length


def test_progressive_distillation_reproduces_the_path_of_four_times_the_steps():
    """A student of k steps after R rounds goes where its teacher goes in k 2^R, not where it goes in k."""
    k = 2
    rounds = 2
    method = Progressive(Exact(), Table(k * 2**rounds), SCHEDULE, k, rounds, 200)
    before = distance(method.student, k, k * 2**rounds)
    learn(method, 200 * rounds)
    assert distance(method.student, k, k * 2**rounds) < 2e-3 < 0.1 < before


def test_the_rounds_change_when_their_time_has_come():
    method = Progressive(Exact(), Table(8), SCHEDULE, 2, 2, 3)
    seen = []
    for step in range(8):
        with torch.no_grad():
            method.student.a += 1.0
        method.after_update(step)
        seen.append(float(method.kept["student of the round before"].a[0] - method.student.a[0]))
    # Copied after the update of step 2, the last of the first round; never again, as there are two rounds.
    assert [round(value) for value in seen] == [-1, -2, 0, -1, -2, -3, -4, -5]
    assert not any(p.requires_grad for p in method.before.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_consistency_distillation_goes_to_the_end_of_the_teacher_s_path(decay):
    """At its fixed point each of the k pieces leads where the teacher's `intervals` steps lead."""
    for k, intervals in ((1, 4), (2, 3)):
        method = Consistency(Exact(), Table(k * intervals), SCHEDULE, k, intervals, decay)
        before = distance(method.student, k, k * intervals)
        learn(method, 400)
        assert distance(method.student, k, k * intervals) < 5e-3 < 0.1 < before
        # From everywhere on the path within the last piece the student says the same end of it.
        n = intervals
        z = teacher_map(NOISE, 4 * n, 1.0, 1 / k) if k > 1 else NOISE
        ends = []
        for j in range(n, 0, -1):
            t, s = (torch.full((11,), v / (k * n)).double() for v in (j, 0))
            x = method.student(z, SCHEDULE(t))
            ends.append(process.ddim_step(z, x, SCHEDULE(s), SCHEDULE(t)))
            z = teacher_map(z, 1, j / (k * n), (j - 1) / (k * n))
        for end in ends:
            torch.testing.assert_close(end, z, atol=1e-2, rtol=0)


def test_the_target_of_consistency_is_an_average_of_the_student():
    method = Consistency(Exact(), Table(4), SCHEDULE, 1, 4, 0.75)
    expected = None
    for step in range(4):
        with torch.no_grad():
            method.student.a += 1.0
        method.after_update(step)
        now = method.student.a.detach().clone()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(dict(method.kept["target"].named_parameters())["module.a"], expected)


def test_regression_on_the_ode_reproduces_it_and_regression_on_draws_learns_the_mean():
    k, m = 2, 4
    method = Regression(Exact(), Table(k), SCHEDULE, k, m, "ode")
    before = distance(method.student, k, k * m)
    learn(method, 200)
    assert distance(method.student, k, k * m) < 2e-3 < 0.1 < before

    method = Regression(Exact(), Table(k), SCHEDULE, k, 3, "ancestral")
    with torch.no_grad():
        method.student.a += 0.3
        method.student.b -= 0.2
    learn(method, 300, size=1024)
    wanted = Table(k)  # E[x | z_t]: with a linear denoiser the mean of the draws is exactly that
    torch.testing.assert_close(method.student.a[1:], wanted.a[1:], atol=0.02, rtol=0)
    torch.testing.assert_close(method.student.b[1:], wanted.b[1:], atol=0.02, rtol=0)
    # So in one step all samples would be the mean of the data: their variance is lost.
    assert float(method.student.a[-1].abs()) < 0.02


class Gaussian(nn.Module):
    """The denoiser of N(mean, variance), both of which are learnt: φ can follow any Gaussian student."""

    def __init__(self):
        super().__init__()
        self.mean, self.log = nn.Parameter(torch.zeros(()).double()), nn.Parameter(torch.zeros(()).double())

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        alpha, sigma2 = torch.sigmoid(logsnr).sqrt()[:, None], torch.sigmoid(-logsnr)[:, None]
        gain = alpha * self.log.exp() / (alpha**2 * self.log.exp() + sigma2)
        return self.mean + gain * (z - alpha * self.mean)


class Affine(nn.Module):
    """x̃ = a z + b."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a).double()), nn.Parameter(torch.tensor(b).double())

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        return self.a * z + self.b


def test_distribution_matching_finds_the_data_s_law():
    """One step: x̃ = a ε + b has the law of the data where a² is their variance and b their mean."""
    method = DistributionMatching(Exact(), Affine(1.2, -0.5), Gaussian(), SCHEDULE, 1, updates=5)
    learn(method, 900, rate=0.05, size=256)
    student, fake = method.student, method.auxiliary
    assert float(student.a.abs()) == pytest.approx(math.sqrt(VARIANCE), abs=0.03)
    assert float(student.b) == pytest.approx(MEAN, abs=0.03)
    assert float(fake.mean) == pytest.approx(MEAN, abs=0.05)
    assert float(fake.log.exp()) == pytest.approx(VARIANCE, abs=0.05)


def test_distribution_matching_s_two_losses_are_the_paper_s():
    seen = {}

    class Spy(nn.Module):
        def __init__(self, name: str, value: float):
            super().__init__()
            self.name, self.value = name, nn.Parameter(torch.tensor(value).double())

        def forward(self, z, logsnr, cond=None):
            seen[self.name] = z.detach(), logsnr
            return self.value * z

    method = DistributionMatching(Spy("real", 0.2), Spy("student", 0.9), Spy("fake", 0.5), SCHEDULE, 1, 2)
    x = torch.randn(20_000, 3, generator=generator(1, "x", 0), dtype=torch.float64)
    updates = [method.step(n, Batch(x, None, generator(1, "train", n))) for n in range(6)]
    assert [[*each.losses] for each in updates] == [["auxiliary"], ["auxiliary"], ["student"]] * 2
    assert method.teacher.value.requires_grad is False

    (z_1, _), (z, logsnr) = seen["student"], seen["real"]
    x_tilde = 0.9 * z_1
    real, fake = 0.2 * z, 0.5 * z
    w = 1 / (x_tilde - real).abs().mean(1, keepdim=True)
    loss = updates[-1].losses["student"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), (w * (fake - real) * x_tilde).mean())
    torch.testing.assert_close(method.student.value.grad, (w * (fake - real) * z_1).mean())
    assert method.auxiliary.value.grad is None
    # z_τ is x̃ and fresh noise, independent of all before; τ is uniform on the paper's interval.
    alpha, sigma = torch.sigmoid(logsnr).sqrt()[:, None], torch.sigmoid(-logsnr).sqrt()[:, None]
    noise = (z - alpha * x_tilde) / sigma
    assert abs(float(noise.var()) - 1) < 0.03 and abs(float((noise * z_1).mean())) < 0.03
    time = SCHEDULE.inverse(logsnr)
    assert 0.0199 < float(time.min()) < 0.021 and 0.979 < float(time.max()) < 0.9801

    loss = updates[0].losses["auxiliary"]
    loss.backward()
    assert method.auxiliary.value.grad is not None


def test_rollouts_of_distribution_matching_are_its_sampler_s():
    """z_t with i calls to go is what the sampler that takes all noise anew has there, in law."""
    k, student = 3, Affine(0.5, 0.4)
    calls = []

    class Watched(nn.Module):
        def forward(self, z, logsnr, cond=None):
            calls.append((z, logsnr))
            return student(z, logsnr)

    method = DistributionMatching(Exact(), Watched(), Gaussian(), SCHEDULE, k, 5, "rollout")
    x = torch.zeros(60_000, 1, dtype=torch.float64)
    method.step(0, Batch(x, None, generator(2, "train", 0)))
    z_t, logsnr_t = calls[-1]
    mean, variance = 0.0, 1.0  # of z_1
    for row in SCHEDULE(sampling.time_grid(k))[:k]:
        alpha2, group = float(torch.sigmoid(row)), z_t[(logsnr_t - row).abs() < 1e-6]
        if row > SCHEDULE(sampling.time_grid(k))[0]:  # x̃ = 0.5 z + 0.4 of the level before, noisy afresh
            mean, variance = 0.5 * mean + 0.4, 0.25 * variance
            mean, variance = math.sqrt(alpha2) * mean, alpha2 * variance + 1 - alpha2
        assert len(group) > 15_000
        assert float(group.mean()) == pytest.approx(mean, abs=0.04)
        assert float(group.var()) == pytest.approx(variance, abs=0.04)


def test_taking_all_noise_anew_forgets_where_it_came_from():
    logsnr = torch.tensor([-20.0, -1.0, 1.0], dtype=torch.float64)
    of_z, of_x, std = process.step_coefficients(logsnr[1:], logsnr[:-1], math.inf)
    assert bool((of_z.abs() < 1e-7).all())
    torch.testing.assert_close(of_x, torch.sigmoid(logsnr[1:]).sqrt())
    torch.testing.assert_close(std, torch.sigmoid(-logsnr[1:]).sqrt())
