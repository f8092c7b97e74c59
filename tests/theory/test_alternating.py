"""Algorithm 2 against closed forms: what each network sees, what each loss is, where each gradient goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from momatch.config.schema import WeightingConfig
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.gaussian_mixture import GaussianMixture
from momatch.methods import weighting
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.transition import Transition
from momatch.training.batches import image_batches

SCHEDULE = schedules.cosine()


class Linear(nn.Module):
    """A denoiser a·z + b with a and b learnt, which remembers what it was shown."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a).double()), nn.Parameter(torch.tensor(b).double())
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        self.seen.append((z.detach().clone(), logsnr.clone()))
        return self.a * z + self.b


def make(update="alternating", steps=4, weight=None, teacher_term=1.0) -> Alternating:
    teacher, student, auxiliary = Linear(0.3, 0.1), Linear(0.5, -0.2), Linear(0.4, 0.3)
    return Alternating(teacher, student, auxiliary, Transition(SCHEDULE, steps), weight, update, teacher_term)


def make_batch(n=20_000, seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 2, generator=generator).double(), None, generator)


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Written from the definition, not taken from the package."""
    snr = torch.exp(logsnr)[:, None]
    return (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()


def gaussian_conditional(z_t: Tensor, x: Tensor, logsnr_s: Tensor, logsnr_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_s given (z_t, x), by conditioning the joint Gaussian of (z_s, z_t) given x.

    z_t = (α_t/α_s) z_s + noise, so Cov(z_s, z_t | x) = (α_t/α_s) σ_s².
    """
    (a_s, s_s), (a_t, s_t) = alpha_sigma(logsnr_s), alpha_sigma(logsnr_t)
    covariance = a_t / a_s * s_s**2
    return a_s * x + covariance / s_t**2 * (z_t - a_t * x), s_s**2 - covariance**2 / s_t**2


def test_even_steps_train_the_auxiliary_and_odd_steps_the_student():
    method = make()
    assert [set(method.step(n, make_batch(8)).losses) for n in range(4)] == [
        {"auxiliary"},
        {"student"},
        {"auxiliary"},
        {"student"},
    ]
    assert set(make("joint").step(0, make_batch(8)).losses) == {"auxiliary", "student"}


@pytest.mark.parametrize("steps", [1, 4])
def test_times_are_those_of_the_paper(steps):
    """s uniform, t − s uniform on [0, 1/k], cut at 1."""
    method = make(steps=steps)
    method.step(0, make_batch())
    t, s = (SCHEDULE.inverse(net.seen[0][1]) for net in (method.student, method.teacher))
    assert float((s - 0.5).mean().abs()) < 4 / math.sqrt(12 * len(s))
    inside = t < 1 - 1e-9
    delta = (t - s)[(s < 1 - 1 / steps)] if steps > 1 else (t - s)[inside]
    assert bool((delta >= -1e-6).all()) and float((t - s).max()) <= 1 / steps + 1e-6
    if steps > 1:
        assert abs(float(delta.mean()) * steps - 0.5) < 4 / math.sqrt(12 * len(delta))
    assert bool((t[~inside] - 1).abs().max() < 1e-6)


def test_z_t_is_the_data_diffused_and_z_s_comes_from_the_posterior_given_z_t():
    """Fresh noise in z_s, or a wrong variance, would spoil the normalised residual."""
    method, batch = make(), make_batch()
    method.step(1, batch)
    (z_t, logsnr_t), (z_s, logsnr_s) = method.student.seen[0], method.teacher.seen[0]
    assert torch.equal(z_s, method.auxiliary.seen[0][0]) and torch.equal(
        logsnr_s, method.auxiliary.seen[0][1]
    )

    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    epsilon = (z_t - alpha_t * batch.x) / sigma_t
    x_tilde = method.student.a.detach() * z_t + method.student.b.detach()
    mean, variance = gaussian_conditional(z_t, x_tilde, logsnr_s, logsnr_t)
    usable = (variance > 1e-9).all(1)
    residual = ((z_s - mean) / variance.sqrt())[usable]
    for noise in (epsilon, residual):
        n = noise.numel()
        assert abs(float(noise.mean())) < 4 / math.sqrt(n)
        assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / n)
    correlation = float((residual * epsilon[usable]).mean())
    assert abs(correlation) < 4 / math.sqrt(residual.numel())


def expected(method: Alternating, teacher_term: float = 1.0) -> dict[str, Tensor]:
    """Both losses and the student's gradient from the paper's formulas, with w(s) = 2 + λ_s² as weight."""
    (z_t, _), (z_s, logsnr_s) = method.student.seen[-1], method.teacher.seen[-1]
    x_tilde, x_teacher, x_auxiliary = (
        net.a * z + net.b
        for net, z in ((method.student, z_t), (method.teacher, z_s), (method.auxiliary, z_s))
    )
    w = (2 + logsnr_s**2)[:, None]
    gap = (x_auxiliary - x_teacher).detach()
    auxiliary = w * ((x_tilde.detach() - x_auxiliary) ** 2 + teacher_term * (x_teacher - x_auxiliary) ** 2)
    return {
        "auxiliary": auxiliary.mean(),
        "student": (w * x_tilde * gap).mean(),
        "student.a": (w * gap * z_t).mean(),
        "student.b": (w * gap).mean(),
        "gap": (w * gap**2).mean(),
    }


@pytest.mark.parametrize("update", ["alternating", "joint"])
@pytest.mark.parametrize("teacher_term", [1.0, 0.25])
def test_losses_and_gradients_are_those_of_the_paper_with_the_weight_at_s(update, teacher_term):
    method = make(update, weight=lambda logsnr, x_tilde, x_teacher: 2 + logsnr**2, teacher_term=teacher_term)
    for n in (0, 1):
        update_ = method.step(n, make_batch(512, seed=n))
        want = expected(method, teacher_term)
        for role, loss in update_.losses.items():
            torch.testing.assert_close(loss, want[role])
        torch.testing.assert_close(update_.metrics()["gap"], want["gap"])
        method.student.zero_grad()
        if "student" in update_.losses:
            update_.losses["student"].backward()
            # No path through z_s: exactly the gradient of w x̃ᵀ gap with the gap held fixed.
            torch.testing.assert_close(method.student.a.grad, want["student.a"])
            torch.testing.assert_close(method.student.b.grad, want["student.b"])
            assert method.auxiliary.a.grad is None
        if "auxiliary" in update_.losses:
            update_.losses["auxiliary"].backward()
            assert method.auxiliary.a.grad is not None
            method.auxiliary.zero_grad(set_to_none=True)
        assert method.teacher.a.grad is None


def test_the_auxiliary_s_optimum_is_the_mean_of_its_two_targets():
    """One output per sample, at the mean of x̃ and g_θ(z_s): the auxiliary's loss has zero gradient there."""
    method, batch = make(), make_batch(64)
    method.step(0, batch)
    x_tilde = method.student(*method.student.seen[0]).detach()
    x_teacher = method.teacher(*method.teacher.seen[0]).detach()

    class Table(nn.Module):
        def __init__(self, values: Tensor):
            super().__init__()
            self.values = nn.Parameter(values)

        def forward(self, z, logsnr, cond=None):
            return self.values

    for values, vanishes in (((x_tilde + x_teacher) / 2, True), (x_tilde, False)):
        method.auxiliary = Table(values)
        method.step(0, make_batch(64)).losses["auxiliary"].backward()
        assert bool(method.auxiliary.values.grad.abs().max() < 1e-12) is vanishes


@pytest.mark.parametrize("exact", [True, False])
def test_a_student_that_samples_the_exact_posterior_has_the_teacher_s_conditional_mean(exact):
    """If x̃ ~ p(x | z_t), then E[x̃ | z_s] = g_θ(z_s): x̃ − g_θ(z_s) is uncorrelated with every function of z_s.

    So the auxiliary learns the teacher and the student's gradient vanishes. A student that returns E[x | z_t]
    instead of a sample must fail the same test.
    """
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-1.0, 0.5], [0.8, -0.2]]),
        torch.eye(2).repeat(2, 1, 1) * 0.05,
    )
    generator = torch.Generator().manual_seed(5)
    x = mixture.sample(60_000, generator).double()
    exact_mean = mixture.denoiser()

    class Student(nn.Module):
        def forward(self, z, logsnr, cond=None):
            return mixture.posterior_sample(z, logsnr, generator) if exact else exact_mean(z, logsnr)

    seen = {}

    class Spy(nn.Module):
        def forward(self, z, logsnr, cond=None):
            seen["z_s"], seen["x_teacher"] = z, exact_mean(z, logsnr)
            return seen["x_teacher"]

    class Weight:
        def __call__(self, logsnr, x_tilde, x_teacher):
            seen["x_tilde"] = x_tilde
            return torch.ones_like(logsnr)

    method = Alternating(Spy(), Student(), Spy(), Transition(SCHEDULE, 4), Weight())
    method.step(0, Batch(x, None, generator))
    error = seen["x_tilde"] - seen["x_teacher"]
    scores = []
    for function in (torch.ones_like, lambda z: z, lambda z: z.sign(), torch.sin, lambda z: z**2):
        product = error * function(seen["z_s"])
        scores.append(product.mean(0) / (product.std(0) / math.sqrt(len(product))))
    worst = float(torch.stack(scores).abs().max())
    assert worst < 4.5 if exact else worst > 10


def test_weights_are_those_of_the_papers():
    logsnr = torch.tensor([-8.0, 0.0, 3.0, 9.0], dtype=torch.float64)
    x = torch.zeros(4, 3, dtype=torch.float64)
    sigma2 = 1 / (1 + torch.exp(logsnr))
    edm_sigma = torch.exp(-logsnr / 2)
    sigma_data = 0.5
    edm = (edm_sigma**2 + sigma_data**2) / (edm_sigma * sigma_data) ** 2
    torch.testing.assert_close(weighting.flat()(logsnr, x, x), torch.ones(4).double())
    torch.testing.assert_close(weighting.v_weight()(logsnr, x, x), 1 / sigma2)
    torch.testing.assert_close(weighting.signal()(logsnr, x, x), 1 - sigma2)
    torch.testing.assert_close(weighting.eps_weight()(logsnr, x, x), (1 - sigma2) / sigma2)
    torch.testing.assert_close(weighting.edm_weight()(logsnr, x, x), edm)
    torch.testing.assert_close(weighting.snr_clipped(100)(logsnr, x, x), (1 / sigma2).clamp(max=100))
    torch.testing.assert_close(weighting.adaptive()(logsnr, x, x + 0.5), torch.full((4,), 2.0).double())


class SaysEpsilon(nn.Module):
    """An ε-network that says one learnt number everywhere."""

    def __init__(self, b: float):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(b).double())

    def forward(self, z: Tensor, time: Tensor, cond=None) -> Tensor:
        return self.b.expand(z.shape)


@pytest.mark.parametrize(("name", "factor"), [("flat", math.exp(8)), ("auto", 1.0)])
def test_one_error_in_epsilon_pulls_alike_at_all_high_noise(name, factor):
    """An error e in ε is σ/α e in x; a mean square in x pulls by w σ²/α² e: with w = α², by σ² e."""
    weight = WeightingConfig(name).build_weighting("eps")

    def pull(logsnr: float) -> tuple[float, float]:
        """Gradients of student and auxiliary, with t and s both at this noise."""
        time = SCHEDULE.inverse(torch.tensor(logsnr).double())
        transition = Transition(SCHEDULE, 10**6, lambda u: time.expand(u.shape))
        teacher, student, auxiliary = (Denoiser(SaysEpsilon(b), "eps") for b in (0.1, 0.2, 0.4))
        method = Alternating(teacher, student, auxiliary, transition, weight, "joint")
        batch = make_batch(64)
        for loss in method.step(0, batch).losses.values():
            loss.backward()
        found = [float(role.network.b.grad) for role in (student, auxiliary)]
        w = math.exp(logsnr) / (1 + math.exp(logsnr)) if name == "auto" else 1.0
        assert found[0] == pytest.approx(w * math.exp(-logsnr) * 0.3, rel=1e-3)
        return found[0], found[1]

    for noisy, less in zip(pull(-10.0), pull(-2.0), strict=True):
        assert noisy / less == pytest.approx(factor, rel=0.2)


def test_the_weight_chosen_by_itself_is_flat_unless_the_network_predicts_epsilon():
    logsnr = torch.tensor([-8.0, 0.0, 9.0])
    for prediction in ("x", "v", "flow", "edm"):
        w = WeightingConfig().build_weighting(prediction)(logsnr, logsnr, logsnr)
        assert torch.equal(w, torch.ones(3)), prediction
    w = WeightingConfig().build_weighting("eps")(logsnr, logsnr, logsnr)
    torch.testing.assert_close(w, torch.sigmoid(logsnr))


def test_densities_are_distributions_on_the_unit_interval():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(weighting.power(2.0)(u), u**2)
    s = weighting.rho_grid(SCHEDULE, rho=7.0)(u)
    assert bool(((s >= 0) & (s <= 1)).all()) and bool((s.diff() >= 0).all())
    sigma = torch.exp(-SCHEDULE(s) / 2)[1:-1]
    want = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7)))[1:-1] ** 7
    torch.testing.assert_close(sigma, want, rtol=1e-6, atol=1e-9)


def test_a_step_is_a_function_of_the_step_number_alone():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).double()
    batches = image_batches(x, None, 16, seed=3)
    first = make().step(7, batches(7)).losses["student"]
    again = make().step(7, batches(7)).losses["student"]
    other = make().step(9, batches(9)).losses["student"]
    assert torch.equal(first, again) and not torch.equal(first, other)
