"""Progressive distillation (Salimans & Ho 2022, algorithm 2): each round makes two steps into one.

Round r = 0, 1, …, R − 1 has a student of K = k 2^(R−1−r) DDIM steps, and a teacher of twice as many: θ in the
first round, afterwards what the student was at the end of the round before. So the last round's student takes
k steps where θ takes k 2^R.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.process import GAUSSIAN, ddim_estimate, ddim_step
from momatch.diffusion.sampling import SamplerName
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample, sample_statistics
from momatch.methods.context import Context
from momatch.methods.weighting import Weighting, flat
from momatch.utils.settings import settings


class Progressive(Method):
    """Algorithm 2 of "Progressive Distillation for Fast Sampling of Diffusion Models" (ICLR 2022).

    Args:
        teacher: θ, may be guided; never trained.
        student: η.
        schedule: λ(t) of the sampler.
        steps: k, of the last round's student.
        rounds: R.
        round_steps: training steps of each round; the last one goes on to the end.
        weighting: w(t).
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        schedule: NoiseSchedule,
        steps: int,
        rounds: int,
        round_steps: int,
        weighting: Weighting | None = None,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.before = copy.deepcopy(student).eval().requires_grad_(False)  # the student a round ago
        self.schedule, self.steps = schedule, steps
        self.rounds, self.round_steps = rounds, round_steps
        self.weighting = weighting or flat()

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch of the round that `step` belongs to."""
        this = self._round(step)
        teacher = self.teacher if this == 0 else self.before
        steps = self.steps * 2 ** (self.rounds - 1 - this)  # K

        # t = i/K, i ~ U{1, …, K};  t' = t − 0.5/K,  t'' = t − 1/K;  z_t = α_t x + σ_t ε
        i = (batch.uniform().squeeze(0) * steps).long() + 1
        times = torch.stack([i, i - 0.5, i - 1]).double() / steps
        logsnr_t, logsnr_half, logsnr_s = self.schedule(times).unbind()
        clock = [logsnr.to(batch.x.dtype) for logsnr in (logsnr_t, logsnr_half)]
        z_t = GAUSSIAN.corrupt(batch.x, clock[0], batch.generator)

        # Two DDIM steps of the teacher, and the x̃ with which one step leads to the same z_t''.
        with torch.no_grad():
            z_half = ddim_step(z_t, teacher(z_t, clock[0], batch.cond), logsnr_half, logsnr_t)
            z_s = ddim_step(z_half, teacher(z_half, clock[1], batch.cond), logsnr_s, logsnr_half)
            target = ddim_estimate(z_s, z_t, logsnr_s, logsnr_t)

        x = self.student(z_t, clock[0], batch.cond)
        w = per_sample(self.weighting(clock[0], x.detach(), target), x)
        loss = (w * (target - x).square()).mean()
        return Update({"student": loss}, lambda: {"loss": loss.detach(), **sample_statistics(x.detach())})

    def after_update(self, step: int) -> None:
        """At the end of a round the student becomes the teacher of the next."""
        if self._round(step + 1) > self._round(step):
            self.before.load_state_dict(self.student.state_dict())

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η}."""
        return {"student": self.student}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """θ, and the teacher of the rounds after the first."""
        return {"teacher": self.teacher, **self.kept}

    def variant(self, step: int) -> Hashable | None:
        """The round."""
        return self._round(step)

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """The teacher of the present round, without which a resumed run could not go on."""
        return {"student of the round before": self.before}

    def _round(self, step: int) -> int:
        return min(step // self.round_steps, self.rounds - 1)


@settings("method")
class ProgressiveConfig(MethodConfig):
    """Progressive distillation: every round halves the steps of a deterministic sampler.

    Attributes:
        rounds: R; the teacher's part is k · 2^R DDIM steps.
        round_steps: training steps of each round; train.num_steps should be rounds times as many, or more for
            a longer last round.
    """

    name: ClassVar[str] = "progressive"
    caption: ClassVar[str] = "How far the student is from two steps of its present teacher (weighted)."
    draws_posterior: ClassVar[bool] = False

    rounds: Annotated[int, Field(ge=1, le=10)] = 4
    round_steps: Annotated[int, Field(ge=1)] = 500

    def forward_units(self, guided: bool) -> int:
        """Twice the teacher, once the student with its backward pass; guided is the first round alone."""
        return 5 + (2 if guided and self.rounds == 1 else 0)

    @property
    def title(self) -> str:
        """After its paper."""
        return f"progressive distillation, {self.rounds} rounds"

    @property
    def needs_data(self) -> bool:
        """z_t are real data made noisy."""
        return True

    @property
    def sampler(self) -> SamplerName:
        """Deterministic."""
        return "ddim"

    def build(self, context: Context) -> Progressive:
        """A copy of the student holds the round before."""
        steps = context.steps
        networks = context.teacher, context.student
        return Progressive(
            *networks, context.schedule, steps, self.rounds, self.round_steps, context.weighting
        )
