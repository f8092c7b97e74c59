"""Discrete diffusion: tokens that are masked, or replaced by random ones, instead of blurred by noise.

Each position is a one-hot vector of C entries, x or z (B, …, C), and on its own

    (1)  z_t ~ Cat(α_t x + (1 − α_t) π),    α_t = sigmoid(λ_t)

where the prior π is the mask token, which data never hold ("mask"; it is the last of the C), or the uniform
distribution ("uniform"). (In a Gaussian process α² is the sigmoid; here there is no square.)

**Posterior.** With α_{t|s} = α_t/α_s, Bayes' rule gives for s < t

    (2)  q(z_s | z_t, x) ∝ [α_{t|s} z_t + (1 − α_{t|s}) (πᵀz_t) 1] ⊙ [α_s x + (1 − α_s) π]

Of masked diffusion: a token that shows stays; a masked one shows x with probability (α_s − α_t)/(1 − α_t).

A denoiser's estimate is a vector of probabilities. From it a token is drawn first, and then z_s given that
token: the mixture of (2) over x. Of masked diffusion it is the same to put the estimate into (2) itself; of
uniform diffusion it is not.

Source: Austin et al. 2021 (D3PM); Sahoo et al. 2024 (masked); Salimans et al. 2026, arXiv 2603.20155.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond, DenoiserFunction, Process, Step
from momatch.diffusion.process import per_sample
from momatch.utils.seeding import Generator, RowsGenerator, normal

Prior = Literal["mask", "uniform"]
TOP_P_STEP = 2.0  # by how much logits outside the nucleus are lowered; −∞ would make gradients explode
TINY = 1e-20  # of what a logarithm is taken


class CategoricalProcess(Process):
    """Equations (1) and (2).

    Args:
        kind: "mask" or "uniform".
    """

    def __init__(self, kind: Prior):
        if kind not in ("mask", "uniform"):
            raise ValueError(f"a discrete process of kind {kind!r} is unknown; use mask or uniform")
        self.kind: Prior = kind

    def prior_probabilities(self, like: Tensor) -> Tensor:
        """π (C,) for tokens like those (B, …, C)."""
        size = like.shape[-1]
        if self.kind == "uniform":
            return torch.full((size,), 1 / size, dtype=like.dtype, device=like.device)
        return F.one_hot(torch.tensor(size - 1, device=like.device), size).to(like.dtype)

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Tokens (B, …, C), one-hot, from probabilities of that shape."""
        below = x.double().cumsum(-1)  # so that a u below 1 stays below the sum
        u = _uniform(x[..., 0], generator).double()[..., None] * below[..., -1:]
        return F.one_hot((below <= u).sum(-1), x.shape[-1]).to(x.dtype)

    def finished(self, x: Tensor) -> Tensor:
        """One-hot (B, …, C) → tokens (B, …) int64."""
        return x.argmax(-1)

    def prior(self, like: Tensor, generator: Generator | None = None) -> Tensor:
        """z_1: all masked, or uniform."""
        probabilities = self.prior_probabilities(like).expand(like.shape)
        return probabilities.clone() if self.kind == "mask" else self.draw(probabilities, generator)

    def noised(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Probabilities (B, …, C) of z_t given x, equation (1)."""
        alpha, rest = (per_sample(torch.sigmoid(value).to(x.dtype), x) for value in (logsnr, -logsnr))
        return alpha * x + rest * self.prior_probabilities(x)

    def corrupt(self, x: Tensor, logsnr: Tensor, generator: Generator | None = None) -> Tensor:
        """z_t, equation (1)."""
        return self.draw(self.noised(x, logsnr), generator)

    def posterior(self, z_t: Tensor, x: Tensor, logsnr_s: Tensor, logsnr_t: Tensor) -> Tensor:
        """Probabilities (B, …, C) of z_s given z_t and tokens x, equation (2)."""
        if self.kind == "mask":  # in a form for any x, also one that a token which shows contradicts
            masked = z_t[..., -1:]
            stays = torch.exp(F.logsigmoid(-logsnr_s) - F.logsigmoid(-logsnr_t)).clamp(max=1)
            stays = per_sample(stays.to(x.dtype), x)
            return z_t + masked * (1 - stays) * (x - z_t)
        log_ratio = (F.logsigmoid(logsnr_t) - F.logsigmoid(logsnr_s)).clamp(max=0)
        ratio, rest = (
            per_sample(value.to(x.dtype), x) for value in (log_ratio.exp(), -torch.expm1(log_ratio))
        )
        likelihood = ratio * z_t + rest / z_t.shape[-1]
        joint = likelihood * self.noised(x, logsnr_s)
        return joint / joint.sum(-1, keepdim=True)

    def posterior_sample(
        self,
        z_t: Tensor,
        x: Tensor,
        logsnr_s: Tensor,
        logsnr_t: Tensor,
        generator: Generator | None = None,
    ) -> Tensor:
        """z_s: tokens are drawn from the estimate x, then z_s given them."""
        tokens = self.draw(x, generator)
        return self.draw(self.posterior(z_t, tokens, logsnr_s, logsnr_t), generator)

    def stepper(self, logsnr: Tensor, eta: float) -> Step:
        """Steps of the posterior; there is no other stochasticity.

        Raises:
            ValueError: if eta is not 1.
        """
        if eta != 1:
            raise ValueError(f"a discrete process has no steps at eta {eta}; use 1")

        def step(i: int, z: Tensor, x: Tensor, generator: Generator | None) -> Tensor:
            levels = logsnr[i + 1], logsnr[i]
            logsnr_s, logsnr_t = (value.to(z.dtype).expand(len(z)) for value in levels)
            return self.posterior_sample(z, x, logsnr_s, logsnr_t, generator)

        return step


class CategoricalDenoiser(Denoiser):
    """A network of logits read as a denoiser: its estimate is a vector of probabilities at each position.

    Of masked diffusion no probability goes to the mask, and a token that shows is certain.

    Attributes:
        kind: of the process.
        temperature: logits are divided by it; a teacher's, in the place of guidance.
        top_p: logits outside the smallest set of tokens with this probability together are lowered by 2.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: Prior,
        null_values: Mapping[str, float | Tensor] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ):
        super().__init__(network, "x", null_values)
        self.kind: Prior = kind
        self.temperature, self.top_p = temperature, top_p

    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Probabilities of x: z (B, …, C) one-hot, logsnr (B,) → (B, …, C)."""
        low = self.precision == "bfloat16"
        with torch.autocast(z.device.type, torch.bfloat16) if low else nullcontext():
            output = self.network(z, logsnr, cond)
        logits = output.to(z.dtype) / self.temperature
        if self.kind == "mask":
            logits = torch.cat([logits[..., :-1], torch.full_like(logits[..., :1], -torch.inf)], dim=-1)
        if self.top_p < 1:
            logits = logits - TOP_P_STEP * (1 - nucleus(logits.softmax(-1), self.top_p))
        x = logits.softmax(-1)
        return x if self.kind == "uniform" else torch.where(z[..., -1:] > 0.5, x, z)


def _uniform(like: Tensor, source: Generator | None) -> Tensor:
    """Numbers from U[0, 1), in the shape (B, …), dtype and device of `like`."""
    if isinstance(source, RowsGenerator):
        return source.draw(torch.rand, like.shape, like.dtype, dim=0)
    return torch.rand(like.shape, generator=source, device=like.device, dtype=like.dtype)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """1 for the likeliest tokens that have `top_p` together, at least one, else 0; (…, C)."""
    ordered, index = probabilities.sort(-1, descending=True)
    inside = (ordered.cumsum(-1) - ordered < top_p).to(probabilities.dtype)
    return torch.zeros_like(probabilities).scatter(-1, index, inside)


def log_probabilities(x: Tensor) -> Tensor:
    """The logarithm of an estimate (…, C), finite where it is 0."""
    return x.clamp(min=TINY).log()


def with_noise(denoiser: DenoiserFunction, size: int, generator: Generator | None) -> DenoiserFunction:
    """A student whose network is given fresh noise at every call, as cond["noise"] (B, positions, size).

    Its outputs are independent of each other given z. What z does not decide, it can decide by this noise,
    for all positions together, in soft samples of low entropy. Masked diffusion needs it: its z_1 is empty.
    """

    def call(z: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        shape = (*z.shape[:-1], size)
        noise = normal(z.new_empty(shape), generator)
        return denoiser(z, logsnr, {**(cond or {}), "noise": noise})

    return call
