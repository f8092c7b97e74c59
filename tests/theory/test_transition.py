"""How transitions are drawn: ablation, student rollouts, warm start, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from momatch.config.schema import GuidanceConfig
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser, Thresholded
from momatch.diffusion.gaussian_mixture import GaussianMixture
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.denoising import Denoising
from momatch.methods.instant import estimate_second_moments
from momatch.methods.transition import Transition
from momatch.methods.warm_start import WarmStart
from momatch.methods.weighting import power

SCHEDULE = schedules.cosine()


class Recorder(nn.Module):
    """A student that answers with a constant times z, and remembers what it was asked."""

    def __init__(self, factor: float = 0.5):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor).double())
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        self.seen.append((z.detach().clone(), logsnr.clone()))
        return self.factor * z


def batch(n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 2, generator=generator).double(), None, generator)


def sigma(logsnr: Tensor) -> Tensor:
    return (1 / (1 + torch.exp(logsnr))).sqrt()[:, None]


def test_fresh_noise_forgets_z_t():
    """z_s = α_s x̃ + σ_s ε with ε independent of z_t: the ablation; the posterior's residual is correlated."""
    correlation = {}
    for posterior in ("fresh", "conditional"):
        student = Recorder()
        draw = Transition(SCHEDULE, 4, posterior=posterior).draw(student, batch(20_000), False)
        z_t, logsnr_t = student.seen[0]
        alpha_s = (1 - sigma(draw.logsnr_s) ** 2).sqrt()
        noise = (draw.z_s - alpha_s * draw.x_tilde) / sigma(draw.logsnr_s)
        inside = (logsnr_t > -10) & (draw.logsnr_s < 10)
        noise, shown = noise[inside], z_t[inside]
        n = noise.numel()
        assert abs(float(noise.mean())) < 4 * float(noise.std()) / math.sqrt(n)
        if posterior == "fresh":
            assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / n)
        correlation[posterior] = float((noise * shown).mean())
    assert abs(correlation["fresh"]) < 4 / math.sqrt(n) < 0.1 < correlation["conditional"]


@pytest.mark.parametrize("steps", [1, 4])
def test_rollouts_stand_on_the_sampler_s_grid(steps):
    """t is one of 1/k … 1, all equally often; s lies within 1/k below; z_1 is pure noise."""
    student = Recorder()
    draw = Transition(SCHEDULE, steps, source="rollout").draw(student, batch(8000), False)
    z_t, logsnr_t = student.seen[-1]
    t, s = SCHEDULE.inverse(logsnr_t), SCHEDULE.inverse(draw.logsnr_s)
    index = (t * steps).round()
    torch.testing.assert_close(t * steps, index, rtol=0, atol=1e-6)
    shares = torch.bincount(index.long(), minlength=steps + 1)[1:] / len(t)
    assert bool(((shares - 1 / steps).abs() < 4 * math.sqrt(1 / steps / len(t)) + 1e-9).all())
    assert bool(((t - s) > -1e-6).all()) and float((t - s).max()) <= 1 / steps + 1e-6
    start = z_t[index == steps]
    assert abs(float(start.var()) - 1) < 4 * math.sqrt(2 / start.numel())
    calls = [len(z) for z, _ in student.seen]
    assert len(calls) == steps and calls[:-1] == sorted(calls[:-1], reverse=True)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("source", ["data", "rollout"])
def test_steps_are_as_long_as_the_law_of_delta_says(source, exponent):
    """k (t − s) = u^exponent with u uniform, by the distance of Kolmogorov and Smirnov."""
    transition = Transition(SCHEDULE, 4, delta_density=power(exponent), source=source)
    student = Recorder()
    draw = transition.draw(student, batch(40_000), False)
    s, t = (2 / math.pi * torch.atan(torch.exp(-0.5 * each)) for each in (draw.logsnr_s, student.seen[-1][1]))
    chosen = (t - 0.5).abs() < 1e-6 if source == "rollout" else (0.3 < s) & (s < 0.6)  # none is clamped
    u = (4 * (t - s)[chosen]).clamp(min=0).pow(1 / exponent).sort().values
    n = len(u)
    assert n > 8000
    assert float((u - (torch.arange(n) + 0.5) / n).abs().max()) < 1.95 / math.sqrt(n)  # p = 0.001


def test_rollouts_of_an_exact_student_have_the_marginals_of_diffused_data():
    """If x̃ ~ p(x | z_t) exactly, rolling out from noise leaves z_t distributed as diffused data."""
    mixture = GaussianMixture(
        torch.tensor([0.4, 0.6]), torch.tensor([[-1.0, 0.5], [0.8, -0.2]]), torch.eye(2).repeat(2, 1, 1) * 0.1
    )
    generator = torch.Generator().manual_seed(1)
    seen = []

    def student(z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        seen.append((z, logsnr))
        return mixture.posterior_sample(z, logsnr, generator)

    n = 40_000
    Transition(SCHEDULE, 4, source="rollout").draw(student, batch(n), False)
    z_t, logsnr_t = seen[-1]
    x = mixture.sample(n, generator).double()
    for level in logsnr_t.unique():
        rolled = z_t[logsnr_t == level]
        s = sigma(level[None])
        wanted = (1 - s**2).sqrt() * x + s * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for order in (1, 2, 3):
            a, b = rolled**order, wanted**order
            error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
            assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 4.5


def test_a_rollout_needs_nothing_of_the_data_but_their_shape():
    transition = Transition(SCHEDULE, 3, source="rollout")
    a, b = batch(32), batch(32)
    b.x.fill_(float("nan"))
    draws = [transition.draw(Recorder(), each, False) for each in (a, b)]
    assert torch.equal(draws[0].z_s, draws[1].z_s)


def test_warm_start_denoises_first_then_counts_from_0():
    student = Recorder()
    matching = Alternating(Recorder(), student, Recorder(), Transition(SCHEDULE, 2))
    method = WarmStart(Denoising(student, SCHEDULE), matching, 3)
    assert [set(method.step(n, batch(8)).losses) for n in range(6)] == [{"student"}] * 3 + [
        {"auxiliary"},
        {"student"},
        {"auxiliary"},
    ]
    want = Denoising(student, SCHEDULE).step(0, batch(8)).losses["teacher"]
    assert torch.equal(method.step(0, batch(8)).losses["student"], want)
    assert method.trainable.keys() == {"student", "auxiliary"}


def test_estimated_second_moments_are_the_mean_square_of_the_loss_s_gradient():
    """One parameter, one noise level: g = 0 has gradient −2 w x·z̄, known in closed form for one sample."""

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(()).double())

        def forward(self, z, logsnr, cond=None):
            return self.a * z

    half = lambda u: torch.full_like(u, 0.5)  # noqa: E731
    flat = lambda logsnr, x_tilde, x_teacher: torch.ones_like(logsnr)  # noqa: E731
    teacher = Denoiser(Slope(), "x")
    loss = Denoising(teacher, SCHEDULE, flat, half, 0.0)
    batches = lambda step: Batch(  # noqa: E731
        torch.ones(1, 1).double(), None, torch.Generator().manual_seed(step)
    )
    found = estimate_second_moments(loss, batches, 4000)["network.a"]
    # x = 1, z = √½ (1 + ε): gradient −2 z, so E = 4 · ½ · 2.
    assert abs(float(found) - 4) < 0.4
    assert teacher.network.a.grad is None and float(teacher.network.a.detach()) == 0


def test_clipping_keeps_the_teacher_in_range():
    class Fixed(nn.Module):
        def forward(self, z, logsnr, cond=None):
            return torch.cat([torch.linspace(-0.5, 0.5, 100)[None], torch.linspace(-4, 4, 100)[None]])

    x = Fixed()(None, None)
    z, logsnr = torch.zeros(2, 100), torch.zeros(2)
    plain = Denoiser(Fixed(), "x")
    static = GuidanceConfig(clip="static").apply(plain)
    torch.testing.assert_close(static(z, logsnr), x.clamp(-1, 1))
    assert static.unwrapped.clip == 1 and plain.clip is None
    endless = torch.tensor([torch.inf, -torch.inf, 3.0], requires_grad=True)
    kept = static.in_range(endless)
    assert kept.tolist() == [1, -1, 1]
    assert torch.autograd.grad(kept.sum(), endless)[0].tolist() == [0, 0, 1]
    dynamic = Thresholded(plain, 0.9)(z, logsnr)
    torch.testing.assert_close(dynamic[0], x[0])  # in range already: left alone
    reach = float(x[1].abs().quantile(0.9))
    torch.testing.assert_close(dynamic[1], x[1].clamp(-reach, reach) / reach)
