"""The sampler and Transition serve a process that is not Gaussian: one token of two states, enumerated."""

import pytest
import torch

from momatch.diffusion import sampling, schedules
from momatch.diffusion.interface import Process
from momatch.methods.base import Batch
from momatch.methods.transition import Transition

SCHEDULE, N, EYE = schedules.cosine(logsnr_min=-3.0, logsnr_max=3.0), 100_000, torch.eye(2)
PRIOR, DATA = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
TABLE = torch.tensor([[0.9, 0.1], [0.3, 0.7]])  # what the denoiser says of x given each z


def denoiser(z, logsnr, cond=None):
    return z @ TABLE


def noised(x, alpha):  # the chances of z ~ Cat(α x + (1 − α)/2), x (…, 2) one-hot
    return alpha * x + (1 - alpha) / 2


class Uniform(Process):
    """α = sigmoid(λ), noise is the uniform distribution; from an estimate, x itself is drawn first."""

    def draw(self, p, generator):
        return EYE[torch.multinomial(p, 1, generator=generator)[:, 0]]

    def prior(self, like, generator=None):
        return self.draw(PRIOR.expand(like.shape), generator)

    def corrupt(self, x, logsnr, generator=None):
        return self.draw(noised(x, logsnr.sigmoid()[:, None]), generator)

    def posterior_sample(self, z_t, x, logsnr_s, logsnr_t, generator=None):
        alpha_s, alpha_t = logsnr_s.sigmoid()[..., None], logsnr_t.sigmoid()[..., None]
        return self.draw(noised(z_t, alpha_t / alpha_s) * noised(self.draw(x, generator), alpha_s), generator)

    def stepper(self, logsnr, eta):
        return lambda i, z, x, rng: self.posterior_sample(z, x, logsnr[i + 1].float(), logsnr[i].float(), rng)


def step(law, t, s):
    """The distribution of z_s from that of z_t: Bayes' rule for each z_t and x, weighted by x̂."""
    alpha_s, alpha_t = SCHEDULE(torch.tensor([s, t])).sigmoid()
    bridge = noised(EYE, alpha_t / alpha_s)[:, None] * noised(EYE, alpha_s)
    return torch.einsum("z,zx,zxs->s", law, TABLE, bridge / bridge.sum(-1, keepdim=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_has_the_distribution_of_enumeration(steps):
    rng, process, law = torch.Generator().manual_seed(0), Uniform(), PRIOR
    noise = process.prior(torch.zeros(N, 2), rng)
    x = sampling.ancestral(denoiser, noise, steps, SCHEDULE, generator=rng, process=process)
    for i in range(steps, 1, -1):
        law = step(law, i / steps, (i - 1) / steps)
    assert (x.mean(0) - law @ TABLE).abs().max() < 5 * 0.5 / N**0.5


@pytest.mark.parametrize("source", ["data", "rollout"])
def test_transitions_have_the_distribution_of_enumeration(source):
    rng, s, delta = torch.Generator().manual_seed(1), 0.3, 0.2
    batch = Batch(EYE[torch.multinomial(DATA, N, True, generator=rng)], None, rng)
    at = (lambda u: torch.full_like(u, s)), (lambda u: torch.full_like(u, 2 * delta))
    z_s = Transition(SCHEDULE, 2, *at, source=source, process=Uniform()).draw(denoiser, batch, False).z_s
    if source == "data":
        law = step(DATA @ noised(EYE, SCHEDULE(torch.tensor(s + delta)).sigmoid()), s + delta, s)
    else:  # a half has both calls left, a half has made one
        law = (step(PRIOR, 1.0, 1 - delta) + step(step(PRIOR, 1.0, 0.5), 0.5, 0.5 - delta)) / 2
    assert (z_s.mean(0) - law).abs().max() < 5 * 0.5 / N**0.5
