"""One student for several numbers of steps: it begins as its teacher, and learns what each of them wants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from momatch.diffusion import schedules
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.transition import Transition
from momatch.networks import registry
from momatch.networks.configs import MLPConfig, UNetConfig, UViTConfig

SCHEDULE = schedules.cosine(logsnr_min=-6.0, logsnr_max=6.0)
COUNTS = (1, 2, 4, 16)


def noised_weights(network: nn.Module) -> nn.Module:
    """Fresh networks end in zeros, and would agree whatever they are told."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (UNetConfig(channels=(8, 16), num_classes=3, embedding_dim=16), (1, 8, 8)),
        (UViTConfig(channels=(8,), width=16, depth=1, embedding_dim=16), (1, 8, 8)),
        (MLPConfig(dim=2, width=16, depth=2, embedding_dim=16), (2,)),
    ],
)
def test_a_student_begins_as_its_teacher_at_every_count_and_can_tell_them_apart(shape, size):
    teacher = noised_weights(registry.build(shape))
    student = registry.build(registry.with_step_counts(shape, COUNTS))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == ["conditioning.steps.weight", "conditioning.steps.bias"] and not unexpected
    z, logsnr = torch.randn(3, *size), torch.randn(3)
    for k in COUNTS:
        assert torch.equal(student(z, logsnr, {"steps": torch.full((3,), float(k))}), teacher(z, logsnr))
    noised_weights(student.conditioning.steps)
    said = [student(z, logsnr, {"steps": torch.full((3,), float(k))}) for k in range(1, 17)]
    for first, second in zip(said, said[1:], strict=False):
        assert float((first - second).detach().abs().max()) > 1e-3


def test_counts_are_drawn_alike_often_and_each_has_its_own_longest_step():
    told = []

    def student(z, logsnr, cond):
        told.append((cond["steps"], logsnr))
        return torch.zeros_like(z)

    generator = torch.Generator().manual_seed(0)
    n = 40_000
    batch = Batch(torch.zeros(n, 1).double(), None, generator)
    transition = Transition(SCHEDULE, COUNTS, lambda u: 0 * u)  # s = 0, so t = δ
    draw = transition.draw(student, batch, with_grad=False)
    k, logsnr_t = told[0]
    assert draw.cond is not None and torch.equal(draw.cond["steps"], k)
    for count in COUNTS:
        delta = SCHEDULE.inverse(logsnr_t[k == count])
        share = len(delta) / n
        assert abs(share - 1 / 4) < 5 * math.sqrt(3 / 16 / n)
        assert float(delta.max()) <= 1 / count + 1e-9
        assert abs(float(delta.mean()) * count - 0.5) < 5 / math.sqrt(12 * len(delta))


def test_a_rollout_gives_every_sample_the_grid_of_its_own_count():
    calls: dict[int, set[float]] = {k: set() for k in COUNTS}

    def student(z, logsnr, cond):
        for t, k in zip(SCHEDULE.inverse(logsnr).tolist(), cond["steps"].tolist(), strict=True):
            calls[int(k)].add(round(t * k, 4))
        return z

    batch = Batch(torch.zeros(2000, 1).double(), None, torch.Generator().manual_seed(0))
    Transition(SCHEDULE, COUNTS, source="rollout").draw(student, batch, with_grad=False)
    assert calls == {k: set(map(float, range(1, k + 1))) for k in COUNTS}


# Data N(0, V) in one dimension. Let s be fixed and δ = 1/k, so that t is fixed for each k. A linear student
# x̃ = a z_t makes z_s = (A + B a) z_t + noise of variance C; its moment at z_s is (Cov(x̃, z_s)/Var(z_s)) z_s.
# It is right where that is the teacher's, α_s V/V_s: one quadratic equation in a for each k.
V, S = 2.0, 0.45


def parts(k: int) -> tuple[float, float, float, float, float]:
    """(A, B, C, V_t, the teacher's slope at s), from the joint Gaussian of (x, z_s, z_t)."""
    logsnr = SCHEDULE(torch.tensor([S, min(S + 1 / k, 1.0)], dtype=torch.float64))
    (a_s, a_t), (s2_s, s2_t) = logsnr.sigmoid().sqrt().tolist(), (-logsnr).sigmoid().tolist()
    bridge = s2_s * a_t / a_s / s2_t
    return (
        bridge,
        a_s - bridge * a_t,
        s2_s - bridge**2 * s2_t,
        a_t**2 * V + s2_t,
        a_s * V / (a_s**2 * V + s2_s),
    )


def slope(k: int, a: float) -> float:
    """Of E[x̃ | z_s] for a student of slope a."""
    of_z, of_x, noise, v_t, _ = parts(k)
    return a * v_t * (of_z + of_x * a) / ((of_z + of_x * a) ** 2 * v_t + noise)


def optimum(k: int) -> float:
    """The slope at which the student's moment is the teacher's, by bisection."""
    low, high = 0.0, 3.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(k, middle) < parts(k)[4] else (low, middle)
    return low


class Slopes(nn.Module):
    """One slope for each count that it is told, or for all together."""

    def __init__(self, told: bool):
        super().__init__()
        self.slopes = nn.Parameter(torch.full((17 if told else 1,), 0.5).double())

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        rows = cond["steps"].long() if len(self.slopes) > 1 else torch.zeros(len(z), dtype=torch.long)
        return self.slopes[rows][:, None] * z


class Exact(nn.Module):
    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        alpha2 = torch.sigmoid(logsnr)[:, None]
        return alpha2.sqrt() * V / (alpha2 * V + 1 - alpha2) * z


def trained() -> list[float]:
    """Slopes of a student of 1, 2 and 4 steps after training on exact Gaussians; its last half averaged."""
    counts, generator = (1, 2, 4), torch.Generator().manual_seed(0)
    transition = Transition(SCHEDULE, counts, lambda u: torch.full_like(u, S), torch.ones_like)
    student, auxiliary = Slopes(True), Slopes(True)
    method = Alternating(Exact(), student, auxiliary, transition, update="joint")  # type: ignore (not Denoisers)
    parameters = {"student": student.slopes, "auxiliary": auxiliary.slopes}
    rates = {"student": 0.5, "auxiliary": 0.3}
    mean, half = torch.zeros(17).double(), 500
    for step in range(2 * half):
        x = math.sqrt(V) * torch.randn(1000, 1, generator=generator).double()
        for role, loss in method.step(step, Batch(x, None, generator)).losses.items():
            (gradient,) = torch.autograd.grad(loss, [parameters[role]])
            parameters[role].data -= (1.0 if step < half else 0.3) * rates[role] * gradient
        if step >= half:
            mean += student.slopes.detach() / half
    return [float(mean[k]) for k in counts]


def test_on_gaussians_students_of_all_counts_reach_their_known_optimum():
    found = trained()
    for k, a in zip((1, 2, 4), found, strict=True):
        assert a == pytest.approx(optimum(k), abs=0.015), k
    assert [round(optimum(k), 2) for k in (1, 2, 4)] == [1.44, 1.47, 1.32]  # three different ones


def moments(k: int, a: float) -> tuple[float, float]:
    """Cov(x̃, z_s) and Var(z_s) for a student of slope a."""
    of_z, of_x, noise, v_t, _ = parts(k)
    return a * v_t * (of_z + of_x * a), (of_z + of_x * a) ** 2 * v_t + noise


def test_an_auxiliary_that_is_not_told_the_count_comes_to_rest_where_errors_cancel():
    """It knows the moment of the mixture alone: one count too bold and another too timid look right to it."""
    target, bold = parts(1)[4], optimum(1) + 0.3
    low, high = 0.0, optimum(4)
    for _ in range(80):  # the slope at 4 steps that makes up for it
        timid = (low + high) / 2
        (cov_1, var_1), (cov_4, var_4) = moments(1, bold), moments(4, timid)
        low, high = (timid, high) if (cov_1 + cov_4) / (var_1 + var_4) < target else (low, timid)
    assert optimum(4) - timid > 0.1

    def pull(told: bool) -> list[float]:
        """The student's gradient at 1 and 4 steps, the auxiliary at its optimum, in standard errors."""
        student, auxiliary = Slopes(True), Slopes(told)
        student.slopes.data[[1, 4]] = torch.tensor([bold, timid]).double()
        auxiliary.slopes.data[:] = target
        if told:  # the mean of its two targets
            for k, a in ((1, bold), (4, timid)):
                auxiliary.slopes.data[k] = (slope(k, a) + target) / 2
        transition = Transition(SCHEDULE, (1, 4), lambda u: torch.full_like(u, S), torch.ones_like)
        method = Alternating(Exact(), student, auxiliary, transition, update="joint")  # type: ignore
        generator, found = torch.Generator().manual_seed(1), []
        for step in range(100):
            batch = Batch(math.sqrt(V) * torch.randn(1000, 1, generator=generator).double(), None, generator)
            losses = method.step(step, batch).losses
            of_student = torch.autograd.grad(losses["student"], student.slopes)[0][[1, 4]]
            of_auxiliary = torch.autograd.grad(losses["auxiliary"], auxiliary.slopes)[0].sum()
            found.append(torch.stack([*of_student, of_auxiliary]))
        values = torch.stack(found)
        return (values.mean(0) / (values.std(0) + 1e-12) * 10).tolist()  # without a gap all are 0

    assert max(map(abs, pull(told=False))) < 4
    too_bold, too_timid, at_rest = pull(told=True)
    assert too_bold > 8 and too_timid < -8 and abs(at_rest) < 4
