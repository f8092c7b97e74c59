"""Gradient moment: what a model of the data would still learn from generated samples, and not from data.

    (1)  ‖ E_generated ∇_ψ ℓ(x) − E_data ∇_ψ ℓ(x) ‖²_Λ

with ψ and ℓ the parameters and the training loss of a reference model: a denoiser, a classifier, an
autoregressive model. It is 0 where the reference cannot tell generated samples from data, and needs no
feature network, so it serves for every kind of data. Unlike a likelihood it is not fooled by samples of low
entropy. Λ, diagonal, is 1 in the paper; Adam's 1/√v̂, as in Algorithm 3, gives small gradients their say, and
sees more (docs/beyond.md). It is the loss of Algorithm 3, centred, with another network as judge: the teacher
itself will not do, since its students are trained to make this number small for it.

**Estimate.** Both sides are cut into G groups. With d_i the difference of the mean gradients of the i-th two,

    (2)  mean over i ≠ j of d_iᵀ Λ d_j

is unbiased, so that it may be negative, and compares across different n. Where ℓ draws noise, both sides of a
pair are given the same, which leaves pairs independent of each other. The standard error is a delete-one
jackknife over pairs. Where both sides are of one distribution it comes out about 1.5 times too large, since
(2) is then a degenerate U-statistic: tests by it are too timid there, not too bold.

Memory: G times the parameters of the reference.

Source: Salimans et al. 2026, arXiv 2603.20155.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from momatch.data.images import Split
from momatch.data.rows import Rows, sample_of
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Process
from momatch.diffusion.process import GAUSSIAN, per_sample
from momatch.diffusion.schedules import NoiseSchedule
from momatch.evaluation.metrics import Measurement
from momatch.methods.instant import adam_preconditioner
from momatch.models.model import Model

Loss = Callable[[Tensor, torch.Generator], Tensor]  # (x (B, …), generator of noise) → (B,) losses
MIN_GROUP = 2
MOST_JUDGED = 2000
LAMBDA_EPS = 0.1  # of Λ, as in Algorithm 3


@dataclass(frozen=True)
class GradientMoment:
    """A gradient moment.

    Attributes:
        value: unbiased estimate of (1); may be negative.
        standard_error: of the sampling noise of both sides.
        n_generated: samples on the one side …
        n_real: … and on the other.
    """

    value: float
    standard_error: float
    n_generated: int
    n_real: int


def gradient_moment(
    loss: Loss,
    reference: nn.Module,
    generated: Tensor,
    real: Tensor | Rows,
    generator: torch.Generator,
    groups: int = 16,
    batch_size: int = 128,
    preconditioner: Mapping[str, Tensor] | None = None,
) -> GradientMoment:
    """Equation (2).

    Args:
        loss: of the reference, for each sample.
        reference: whose parameters ψ are; all that `loss` depends on. It is left as it is.
        generated: (N, …).
        real: (M, …) data, which the reference was best not trained on. Data on both sides give the floor.
        generator: on the reference's device: shuffles both sides into groups, and draws the noise of ℓ.
        groups: G.
        batch_size: samples at a time.
        preconditioner: Λ for each parameter of the reference by name, see `methods.instant`; 1 if None.

    Raises:
        ValueError: if a side has fewer than two samples for each group, or groups is below 3.
    """
    if groups < 3:
        raise ValueError(f"groups is {groups}; use 3 or more")
    for name, side in (("generated", generated), ("real", real)):
        if len(side) < MIN_GROUP * groups:
            raise ValueError(
                f"{len(side)} {name} samples are too few for {groups} groups; give {MIN_GROUP * groups}"
            )
    named = dict(reference.named_parameters())
    parameters = list(named.values())
    learned = [p.requires_grad for p in parameters]
    device = parameters[0].device
    scales = [torch.ones(p.shape) if preconditioner is None else preconditioner[n] for n, p in named.items()]
    root = torch.cat([scale.flatten().double().cpu() for scale in scales]).sqrt()
    ours, theirs = (_shuffled(len(side), groups, generator) for side in (generated, real))
    was_training = reference.training
    reference.eval()
    for p in parameters:
        p.requires_grad_(True)
    try:
        rows = []
        for first, second in zip(ours, theirs, strict=True):
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            sides = ((generated, first), (real, second))
            a, b = (
                _gradient(loss, parameters, side, index, device, seed, batch_size) for side, index in sides
            )
            rows.append((a - b) * root)
    finally:
        reference.train(was_training)
        for p, learns in zip(parameters, learned, strict=True):
            p.requires_grad_(learns)
    value, error = _unbiased(torch.stack(rows))
    return GradientMoment(value, error, len(generated), len(real))


def denoising_loss(
    denoiser: Denoiser, schedule: NoiseSchedule, process: Process = GAUSSIAN, draws: int = 4
) -> Loss:
    """The loss that a denoiser is trained with, a mean square in v, at times spread evenly over each batch.

    Args:
        denoiser: the reference; asked for nothing in particular.
        schedule: λ(t).
        process: how data are noised.
        draws: of noise for each sample; more make the error smaller, down to what the samples leave.
    """

    def loss(x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([once(x, generator) for _ in range(draws)]).mean(0)

    def once(x: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand((), generator=generator, device=generator.device).to(x)
        order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
        logsnr = schedule((order + u) / len(x))
        z = process.corrupt(x, logsnr, generator)
        weight = per_sample(1 + torch.exp(logsnr), x)
        return (weight * (x - denoiser(z, logsnr, None)).square()).flatten(1).mean(1)

    return loss


@dataclass(frozen=True)
class GradientJudge:
    """A model of the same data that judges samples by their gradient moment, held-out rows against them.

    Attributes:
        model: a diffusion model, best not the teacher of the student that is judged.
        name: what tables call it.
        most: samples of either side that are looked at.
    """

    model: Model
    name: str
    most: int = MOST_JUDGED

    def judge(self, generated: Tensor, data: Split, seed: int) -> list[Measurement]:
        """The moment of generated samples (N, …), and of training rows: the floor of who learns from them.

        Λ is Adam's where the model has kept its second moments, else 1.
        """
        real = sample_of(data.heldout.images, max_rows=self.most)
        sides = {"gradient_moment": generated[: self.most], "gradient_moment_floor": None}
        found = []
        for metric, side in sides.items():
            rows = sample_of(data.train.images, max_rows=self.most) if side is None else side
            m = self._moment(rows, real, seed)
            half = 1.96 * m.standard_error
            found.append(
                Measurement(
                    *(metric, m.value, m.standard_error, m.value - half, m.value + half),
                    *(self.name, data.heldout.name, m.n_generated, m.n_real, seed),
                    note="unbiased, may be negative; 0 where the judge would learn nothing",
                )
            )
        return found

    def _moment(self, generated: Tensor, real: Tensor, seed: int) -> GradientMoment:
        denoiser, moments = self.model.denoiser, self.model.second_moments()
        rng = torch.Generator(self.model.device).manual_seed(seed)
        scale = None if moments is None else adam_preconditioner(moments, LAMBDA_EPS)
        loss = denoising_loss(denoiser, self.model.schedule, self.model.process)
        groups = max(3, min(16, min(len(generated), len(real)) // MIN_GROUP))
        return gradient_moment(loss, denoiser, generated, real, rng, groups, preconditioner=scale)


def _shuffled(count: int, groups: int, generator: torch.Generator) -> list[Tensor]:
    """All of so many rows in groups whose sizes differ by one at most."""
    order = torch.randperm(count, generator=generator, device=generator.device).cpu()
    return list(torch.tensor_split(order, groups))


def _gradient(
    loss: Loss,
    parameters: Sequence[Tensor],
    side: Tensor | Rows,
    index: Tensor,
    device: torch.device,
    seed: int,
    batch_size: int,
) -> Tensor:
    """The gradient of the mean loss of some rows, all parameters in one float64 vector on the CPU."""
    noise = torch.Generator(device).manual_seed(seed)
    total = None
    with torch.enable_grad():
        for part in index.split(batch_size):
            value = loss(side[part].to(device), noise).sum() / len(index)
            found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            flat = torch.cat([g.detach().flatten().double().cpu() for g in found])
            total = flat if total is None else total + flat
    assert total is not None
    return total


def _unbiased(rows: Tensor) -> tuple[float, float]:
    """Equation (2) from d (G, parameters), and its jackknife error; both from the Gram matrix of d."""
    gram = rows @ rows.T
    groups = len(gram)
    off = gram.sum() - gram.trace()
    value = off / (groups * (groups - 1))
    left_out = (off - 2 * (gram.sum(1) - gram.diagonal())) / ((groups - 1) * (groups - 2))
    variance = (groups - 1) / groups * (left_out - left_out.mean()).square().sum()
    return float(value), float(variance.sqrt())
