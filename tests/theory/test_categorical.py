"""Masked and uniform diffusion of tokens against Bayes' rule, and D-MMD against what is known of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.diffusion import sampling, schedules
from momatch.diffusion.categorical import (
    CategoricalDenoiser,
    CategoricalProcess,
    log_probabilities,
    nucleus,
    with_noise,
)
from momatch.diffusion.denoiser import Denoiser
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.discrete import DiscreteDenoising, DiscreteMatching
from momatch.methods.transition import Transition
from momatch.networks.configs import TokenTransformerConfig
from momatch.networks.registry import build

SCHEDULE = schedules.cosine(logsnr_min=-8.0, logsnr_max=8.0)
KINDS = ("mask", "uniform")
C = 4  # tokens, the mask included where there is one


def prior(kind: str) -> Tensor:
    return (
        torch.full((C,), 1 / C).double() if kind == "uniform" else F.one_hot(torch.tensor(C - 1), C).double()
    )


def chain(kind: str, ratio: float) -> Tensor:
    """The transition matrix (from, to) of keeping a token with probability `ratio`, else drawing from π."""
    return ratio * torch.eye(C).double() + (1 - ratio) * prior(kind).expand(C, C)


def levels(logsnr_s: float, logsnr_t: float) -> tuple[float, float]:
    return 1 / (1 + math.exp(-logsnr_s)), 1 / (1 + math.exp(-logsnr_t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("logsnr_s", "logsnr_t"), [(2.0, -1.0), (0.5, 0.4), (30.0, -30.0), (1.0, 1.0)])
def test_the_posterior_is_that_of_the_joint_distribution(kind, logsnr_s, logsnr_t):
    """P(z_s | z_t, x) from P(z_s | x) P(z_t | z_s), the Markov chain written as matrices."""
    alpha_s, alpha_t = levels(logsnr_s, logsnr_t)
    first, second = chain(kind, alpha_s), chain(kind, alpha_t / alpha_s)
    torch.testing.assert_close(first @ second, chain(kind, alpha_t))  # it is one process
    process, eye = CategoricalProcess(kind), torch.eye(C).double()
    for x, z in itertools.product(range(C if kind == "uniform" else C - 1), range(C)):
        joint = first[x] * second[:, z]
        if float(joint.sum()) < 1e-12:
            continue
        at = [torch.tensor([value]).double() for value in (logsnr_s, logsnr_t)]
        found = process.posterior(eye[z][None], eye[x][None], *at)[0]
        torch.testing.assert_close(found, joint / joint.sum(), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(process.noised(eye[x][None], at[1])[0], chain(kind, alpha_t)[x])


@pytest.mark.parametrize("kind", KINDS)
def test_true_posteriors_of_the_data_give_the_marginal_at_any_s(kind):
    """x ~ p(x | z_t), z_s ~ q(z_s | z_t, x): z_s has the distribution of noised data."""
    data = torch.tensor([0.6, 0.3, 0.1, 0.0]).double()
    alpha_s, alpha_t = levels(1.0, -1.5)
    generator, n = torch.Generator().manual_seed(0), 100_000
    process = CategoricalProcess(kind)
    x = process.draw(data.expand(n, 1, C), generator)
    z_t = process.corrupt(x, torch.full((n,), -1.5), generator)
    joint = data[:, None] * chain(kind, alpha_t)
    estimate = z_t @ (joint / joint.sum(0).clamp(min=1e-300)).T
    z_s = process.posterior_sample(z_t, estimate, torch.full((n,), 1.0), torch.full((n,), -1.5), generator)
    wanted = data @ chain(kind, alpha_s)
    assert float((z_s.mean((0, 1)) - wanted).abs().max()) < 5 * 0.5 / math.sqrt(n)
    start = process.prior(x, generator).mean((0, 1))
    assert float((start - prior(kind)).abs().max()) < 5 * 0.5 / math.sqrt(n)


def test_a_masked_denoiser_gives_the_mask_nothing_and_leaves_what_shows():
    denoiser = CategoricalDenoiser(build(TokenTransformerConfig(C, 3, 16, 1, embedding_dim=16)), "mask")
    z = F.one_hot(torch.tensor([[0, 3, 2], [3, 3, 3]]), C).float()
    x = denoiser(z, torch.zeros(2))
    assert torch.equal(x[0, 0], z[0, 0]) and torch.equal(x[0, 2], z[0, 2])
    torch.testing.assert_close(x[0, 1], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    assert bool(log_probabilities(x).isfinite().all())


def test_temperature_and_nucleus_sharpen_the_teacher():
    class Fixed(nn.Module):
        def forward(self, z, logsnr, cond=None):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(z.shape)

    z, logsnr = torch.zeros(1, 1, C), torch.zeros(1)
    cold = CategoricalDenoiser(Fixed(), "uniform", temperature=0.5)(z, logsnr)[0, 0]
    squares = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    torch.testing.assert_close(cold, squares / squares.sum())
    kept = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    assert nucleus(kept, 0.7).tolist() == [[0, 1, 0, 1]] and nucleus(kept, 0.1).tolist() == [[0, 1, 0, 0]]
    lowered = torch.tensor([0.5, 0.3, 0.15 * math.exp(-2), 0.05 * math.exp(-2)])
    found = CategoricalDenoiser(Fixed(), "uniform", top_p=0.7)(z, logsnr)[0, 0]
    torch.testing.assert_close(found, lowered / lowered.sum())


class Table(nn.Module):
    """Logits for each token that is seen, on its own: one position knows nothing of another."""

    def __init__(self, size: int = C, seed: int | None = None):
        super().__init__()
        start = torch.zeros(size, size).double()
        if seed is not None:
            start = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
        self.logits = nn.Parameter(start)

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        return z @ self.logits


def tables(kind="uniform", size=C) -> list[CategoricalDenoiser]:
    return [CategoricalDenoiser(Table(size, seed), kind) for seed in (1, 2, 3)]


def tokens(n: int, size=C, seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = F.one_hot(torch.randint(size, (n, 1), generator=generator), size).double()
    return Batch(x, None, generator)


def test_gradients_are_those_of_the_general_min_max_problem():
    """E[L(x̃, θ) − L(x̃, φ) − L(θ, φ)], by autograd, for η through x̃ alone and for φ with x for x̃."""
    teacher, student, auxiliary = tables()
    process = CategoricalProcess("uniform")
    transition = Transition(SCHEDULE, 3, process=process)
    method = DiscreteMatching(teacher, student, auxiliary, transition, update="joint")
    losses = method.step(0, tokens(64)).losses
    draw = method.transition.draw(student, tokens(64), with_grad=True)

    def loss(truth, said):
        return -(truth * said.log()).sum(-1).mean()

    said, theirs = teacher(draw.z_s, draw.logsnr_s), auxiliary(draw.z_s, draw.logsnr_s)
    low = loss(draw.x_tilde, said) - loss(draw.x_tilde, theirs.detach()) - loss(said, theirs.detach())
    high = -(loss(draw.x_sample, said) - loss(draw.x_sample, theirs) - loss(said, theirs))
    for role, network, value in (("student", student, low), ("auxiliary", auxiliary, high)):
        wanted = torch.autograd.grad(value, network.network.logits)[0]
        torch.testing.assert_close(torch.autograd.grad(losses[role], network.network.logits)[0], wanted)


def test_with_a_square_it_is_algorithm_2_on_one_hot_vectors():
    """The same draws, and gradients that differ by the number of entries that Algorithm 2 takes the mean of.

    The auxiliary's target is x̃ there: it is given a student so sure of itself that x̃ and x are one.
    """
    teacher, student, auxiliary = tables()
    student.network.logits.data *= 1000
    networks, transition = (
        (teacher, student, auxiliary),
        Transition(SCHEDULE, 3, process=CategoricalProcess("uniform")),
    )
    ours = DiscreteMatching(*networks, transition, update="joint", loss="square").step(0, tokens(64)).losses
    student_loss = Alternating(*networks, transition, update="joint").step(0, tokens(64)).losses
    for role, network in (("student", student), ("auxiliary", auxiliary)):
        found = torch.autograd.grad(ours[role], network.network.logits)[0]
        wanted = C * torch.autograd.grad(student_loss[role], network.network.logits)[0]
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(ours[role], C * student_loss[role])


def descend(method, rates, steps, batch, mean_from=None) -> dict[str, Tensor]:
    """Plain gradient descent on tables; the mean of the logits from `mean_from` on, by role."""
    total = {role: torch.zeros_like(network.network.logits) for role, network in method.trainable.items()}
    for step in range(steps):
        for role, loss in method.step(step, batch(step)).losses.items():
            logits = method.trainable[role].network.logits
            (gradient,) = torch.autograd.grad(loss, logits)
            logits.data -= rates[role] * gradient
        if mean_from is not None and step >= mean_from:
            for role, network in method.trainable.items():
                total[role] += network.network.logits.detach() / (steps - mean_from)
    return total


def test_a_teacher_of_one_position_learns_bayes_rule():
    """C = 2, one position, one noise level: P(x | z) by hand."""
    p, alpha = 0.8, levels(0.5, 0.5)[0]
    denoiser = CategoricalDenoiser(Table(2), "uniform")
    at = SCHEDULE.inverse(torch.tensor([0.5]).double())
    method = DiscreteDenoising(
        denoiser, SCHEDULE, CategoricalProcess("uniform"), lambda u: at.expand(u.shape)
    )

    def batch(step):
        generator = torch.Generator().manual_seed(step)
        x = F.one_hot((torch.rand(2000, 1, generator=generator) > p).long(), 2).double()
        return Batch(x, None, generator)

    logits = descend(method, {"teacher": 2.0}, 300, batch, 100)["teacher"]
    joint = torch.tensor([p, 1 - p])[:, None] * (alpha * torch.eye(2) + (1 - alpha) / 2)
    torch.testing.assert_close(logits.softmax(-1), (joint / joint.sum(0)).T.double(), atol=0.01, rtol=0)


def test_with_two_tokens_and_one_position_the_student_reaches_the_data():
    """One step from a uniform z_1, which tells nothing: x̃ must be the data's on average.

    The teacher is exact, the student a table of the two z_1.
    """
    p, s = 0.8, 0.4
    alpha = float(SCHEDULE(torch.tensor(s).double()).sigmoid())
    joint = torch.tensor([p, 1 - p]).double()[:, None] * (alpha * torch.eye(2) + (1 - alpha) / 2).double()
    teacher, student, auxiliary = (CategoricalDenoiser(Table(2), "uniform") for _ in range(3))
    teacher.network.logits.data = (joint / joint.sum(0)).T.log()
    auxiliary.network.logits.data = teacher.network.logits.data.clone()
    transition = Transition(
        SCHEDULE, 1, lambda u: torch.full_like(u, s), torch.ones_like, process=CategoricalProcess("uniform")
    )
    method = DiscreteMatching(teacher, student, auxiliary, transition, update="joint")
    descend(method, {"student": 3.0, "auxiliary": 3.0}, 150, lambda step: tokens(500, 2, step))
    mean = descend(
        method, {"student": 1.0, "auxiliary": 1.0}, 150, lambda step: tokens(500, 2, 999 + step), 0
    )
    assert float(mean["student"].softmax(-1)[:, 0].mean()) == pytest.approx(p, abs=0.015)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_targets_are_right_for_masked_and_biased_for_uniform_diffusion(kind):
    """E[x | z_s] and E[x̃ | z_s] by enumeration of z_t, x and z_s, for a student of soft outputs."""
    process, eye = CategoricalProcess(kind), torch.eye(C).double()
    data = torch.tensor([0.5, 0.3, 0.2, 0.0]).double()
    logsnr_s, logsnr_t = torch.tensor([1.0]).double(), torch.tensor([-1.0]).double()
    soft = torch.tensor([0.7, 0.2, 0.1, 0.0]).double().expand(C, C).clone()  # x̃ for each z_t
    if kind == "mask":
        soft[:-1] = eye[:-1]
    of_z_t = data @ chain(kind, float(logsnr_t.sigmoid()))
    weight, hard_mean, soft_mean = (torch.zeros(C, size).double() for size in (1, C, C))
    for z_t, x in itertools.product(range(C), range(C)):
        if (chance := float(of_z_t[z_t] * soft[z_t, x])) == 0:
            continue
        z_s = process.posterior(eye[z_t][None], eye[x][None], logsnr_s, logsnr_t)[0] * chance
        weight += z_s[:, None]
        hard_mean += z_s[:, None] * eye[x]
        soft_mean += z_s[:, None] * soft[z_t]
    seen = weight[:, 0] > 1e-12
    matters = seen & (torch.arange(C) == C - 1) if kind == "mask" else seen  # else nothing is asked
    far = float(((hard_mean - soft_mean) / weight.clamp(min=1e-12))[matters].abs().max())
    assert far < 1e-7 if kind == "mask" else far > 0.05
    networks, transition = tables(kind), Transition(SCHEDULE, 2, process=process)
    if kind == "mask":
        DiscreteMatching(*networks, transition, target="soft")
    else:
        with pytest.raises(ValueError, match="target is 'soft', which is biased unless diffusion is masked"):
            DiscreteMatching(*networks, transition, target="soft")


# Two tokens, masks besides. The first is 0 or 1, the second its copy with probability AGREE: XOR and a bit of
# noise (with none the teacher would be infinitely sure, and no loss finite).
AGREE = 0.95


class Pairs(Denoiser):
    """The exact teacher: the other of a token that shows is its copy with probability AGREE."""

    def __init__(self, agree: float = AGREE):
        super().__init__(nn.Identity(), "x")
        self.table = torch.tensor([[agree, 1 - agree, 0], [1 - agree, agree, 0], [0.5, 0.5, 0]])

    def forward(self, z, logsnr, cond=None):
        return torch.where(z[..., 2:] < 0.5, z, z.flip(1) @ self.table)


class Small(nn.Module):
    """Logits of both tokens from both, the noise level, and some noise."""

    def __init__(self, noise_dim: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = 7 + 2 * noise_dim, 48, 48, 6
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.layers = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        noise = [cond["noise"].flatten(1)] if cond else []
        return self.layers(torch.cat([z.flatten(1), logsnr[:, None] / 8, *noise], 1)).view(len(z), 2, 3)


def pairs(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(2, (n,), generator=generator)
    second = torch.where(torch.rand(n, generator=generator) < AGREE, first, 1 - first)
    return Batch(F.one_hot(torch.stack([first, second], 1), 3).float(), None, generator)


def agreement(sampled, steps: int) -> tuple[float, float]:
    """How often the two tokens agree, and the share of ones, in samples of so many steps."""
    generator, process = torch.Generator().manual_seed(5), CategoricalProcess("mask")
    noise = process.prior(torch.zeros(4000, 2, 3), generator)
    network, options = sampled(generator), {"generator": generator, "process": process}
    with torch.no_grad():
        x = sampling.ancestral(network, noise, steps, SCHEDULE, **options)
    first, second = x.argmax(-1).unbind(1)
    return float((first == second).float().mean()), float(first.float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4])
def test_xor_is_learned_in_few_steps_by_soft_samples_that_agree(steps):
    student, auxiliary = (CategoricalDenoiser(Small(*given), "mask") for given in ((2, 0), (0, 1)))
    transition = Transition(SCHEDULE, steps, process=CategoricalProcess("mask"))
    method = DiscreteMatching(Pairs(), student, auxiliary, transition, update="joint", noise_dim=2)
    rates = {"student": 2e-3, "auxiliary": 5e-3}
    adam = {
        role: torch.optim.Adam(network.parameters(), rates[role], (0.0, 0.99))
        for role, network in method.trainable.items()
    }
    for step in range(350):
        for role, loss in method.step(step, pairs(128, step)).losses.items():
            adam[role].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(method.trainable[role].parameters(), 1.0)
            adam[role].step()
    agree, ones = agreement(method.sampled, steps)
    assert agree > 0.9 and 0.3 < ones < 0.7
    assert agree > agreement(lambda generator: Pairs(), steps)[0] + 0.1  # than the exact teacher's in as many


def test_without_noise_no_student_learns_xor_in_one_step_and_the_teacher_needs_many():
    """Of two masks, an estimate is the same for all samples, and its tokens are independent.

    The exact teacher of k steps errs where both tokens show at once. A token shows in a step with the
    probability by which fewer are masked after it, the rest in the last.
    """
    assert agreement(lambda generator: Pairs(), 1)[0] == pytest.approx(0.5, abs=0.03)
    for k in (2, 8):
        masked = (-SCHEDULE(torch.arange(k + 1).double() / k)).sigmoid()
        masked[0] = 0  # after the last call none is
        together = float((masked.diff() / masked[-1]).square().sum())
        wanted = together / 2 + (1 - together) * AGREE
        assert agreement(lambda generator: Pairs(), k)[0] == pytest.approx(wanted, abs=0.03), k


def test_noise_is_fresh_at_every_call_and_comes_from_the_generator():
    seen = []

    def denoiser(z, logsnr, cond):
        seen.append(cond)
        return z

    z, label = torch.zeros(2, 3, C), {"label": torch.zeros(2)}
    for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)):
        call = with_noise(denoiser, 5, generator)
        call(z, torch.zeros(2), label)
        call(z, torch.zeros(2), None)
    assert seen[0]["noise"].shape == (2, 3, 5) and "label" in seen[0] and "label" not in seen[1]
    assert torch.equal(seen[0]["noise"], seen[2]["noise"])
    assert not torch.equal(seen[0]["noise"], seen[1]["noise"])
