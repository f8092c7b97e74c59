"""Multistep consistency distillation (Heek, Hoogeboom & Salimans 2024, algorithm 1): k consistency models,
one for each piece of the path from noise to data. k = 1 is consistency distillation (Song et al. 2023).

From anywhere on the teacher's deterministic path within a piece, the student says the same end of that piece:

    t in the piece [a, b], s = t − 1/(k·intervals);   z_s = DDIM step of the teacher from z_t
    z_a = DDIM step from z_s to a by the target network's x;   x̃: the x with which z_t leads to that z_a

Left out of the paper: aDDIM, the teacher's step that adds back the variance that DDIM loses, and the growth
of `intervals` in training.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import AveragedModel

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.process import GAUSSIAN, ddim_estimate, ddim_step
from momatch.diffusion.sampling import SamplerName
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.average import moving_average
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample, sample_statistics
from momatch.methods.context import Context
from momatch.methods.weighting import Weighting, flat
from momatch.utils.settings import settings


class Consistency(Method):
    """Algorithm 1 of "Multistep Consistency Models" (2024), with an exponential moving average as target.

    Args:
        teacher: θ, may be guided; never trained.
        student: η.
        schedule: λ(t) of the sampler.
        steps: k pieces, and as many network calls of the sampler.
        intervals: steps of the teacher in each piece.
        target_decay: β of the target network η⁻ ← β η⁻ + (1 − β) η; 0: the student of the step before.
        weighting: w(t).
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        schedule: NoiseSchedule,
        steps: int,
        intervals: int,
        target_decay: float,
        weighting: Weighting | None = None,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.target = AveragedModel(student, multi_avg_fn=moving_average(target_decay), use_buffers=True)
        self.target.eval().requires_grad_(False)
        self.schedule, self.steps, self.intervals = schedule, steps, intervals
        self.weighting = weighting or flat()

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch; the same at every step."""
        # t = n/(k·intervals), n ~ U{1, …, k·intervals};  s one grid point before;  a the end of the piece
        n = (batch.uniform().squeeze(0) * self.steps * self.intervals).long() + 1
        end = (n - 1) // self.intervals * self.intervals
        times = torch.stack([n, n - 1, end]).double() / (self.steps * self.intervals)
        logsnr_t, logsnr_s, logsnr_a = self.schedule(times).unbind()
        clock_t, clock_s = (logsnr.to(batch.x.dtype) for logsnr in (logsnr_t, logsnr_s))
        z_t = GAUSSIAN.corrupt(batch.x, clock_t, batch.generator)

        with torch.no_grad():
            z_s = ddim_step(z_t, self.teacher(z_t, clock_t, batch.cond), logsnr_s, logsnr_t)
            # Where s = a the step has no length, and the target network no say: the path ends at z_s itself.
            z_a = ddim_step(z_s, self.target(z_s, clock_s, batch.cond), logsnr_a, logsnr_s)
            target = ddim_estimate(z_a, z_t, logsnr_a, logsnr_t)

        x = self.student(z_t, clock_t, batch.cond)
        w = per_sample(self.weighting(clock_t, x.detach(), target), x)
        loss = (w * (target - x).square()).mean()
        return Update({"student": loss}, lambda: {"loss": loss.detach(), **sample_statistics(x.detach())})

    def after_update(self, step: int) -> None:
        """Move the target."""
        self.target.update_parameters(self.student)

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η}."""
        return {"student": self.student}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """θ; and η⁻ is a copy that is averaged after each step."""
        return {"teacher": self.teacher, **self.kept}

    def variant(self, step: int) -> Hashable | None:
        """All alike."""
        return "consistency"

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """{"target": η⁻}."""
        return {"target": self.target}


@settings("method")
class ConsistencyConfig(MethodConfig):
    """Multistep consistency distillation; with one step, consistency distillation.

    Attributes:
        intervals: steps of the teacher's deterministic path in each of the k pieces.
        target_decay: of the exponential moving average that the student is compared with; 0 compares it with
            itself.
    """

    name: ClassVar[str] = "consistency"
    caption: ClassVar[str] = "How far the student is from what it says one small step of the teacher later."
    draws_posterior: ClassVar[bool] = False

    intervals: Annotated[int, Field(ge=1)] = 32
    target_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95

    def forward_units(self, guided: bool) -> int:
        """Teacher, target, and the student with its backward pass."""
        return 5 + (1 if guided else 0)

    @property
    def title(self) -> str:
        """After its paper."""
        return "multistep consistency distillation"

    @property
    def needs_data(self) -> bool:
        """z_t are real data made noisy."""
        return True

    @property
    def sampler(self) -> SamplerName:
        """Deterministic."""
        return "ddim"

    def build(self, context: Context) -> Consistency:
        """The target is a copy of the student."""
        steps = context.steps
        networks = context.teacher, context.student
        return Consistency(
            *networks, context.schedule, steps, self.intervals, self.target_decay, context.weighting
        )
