"""Regression on where the teacher ends: the plainest distillation there is, and what it cannot do.

From z_t at t = i/k the teacher runs on, and the student learns its end by a mean square:

- "ode": by DDIM to the next grid point (i − 1)/k, as the x with which one step leads there (knowledge
  distillation, Luhman & Luhman 2021, for k = 1). A map from z_t: a large enough student gets it right.
- "ancestral": by Algorithm 1 to the data. A draw, of which a mean square learns the mean, E[x | z_t]: the
  student of few steps is blurred, however large it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.process import GAUSSIAN, ddim_estimate, ddim_step
from momatch.diffusion.sampling import SamplerName
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample, sample_statistics
from momatch.methods.context import Context
from momatch.methods.weighting import Weighting, flat
from momatch.utils.settings import settings

Endpoint = Literal["ode", "ancestral"]


class Regression(Method):
    """w(t) ‖x_end − g_η(z_t)‖², x_end where the teacher's sampler ends.

    Args:
        teacher: θ, may be guided; never trained.
        student: η.
        schedule: λ(t) of the sampler.
        steps: k, network calls of the student's sampler.
        teacher_steps: of the teacher for each training sample.
        endpoint: which sampler of the teacher, and where it ends.
        weighting: w(t).
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        schedule: NoiseSchedule,
        steps: int,
        teacher_steps: int,
        endpoint: Endpoint = "ode",
        weighting: Weighting | None = None,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.schedule, self.steps = schedule, steps
        self.teacher_steps, self.endpoint = teacher_steps, endpoint
        self.weighting = weighting or flat()

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch; the same at every step."""
        # t = i/k, i ~ U{1, …, k};  z_t = α_t x + σ_t ε
        i = (batch.uniform().squeeze(0) * self.steps).long() + 1
        start = i.double() / self.steps
        logsnr_t = self.schedule(start)
        clock = logsnr_t.to(batch.x.dtype)
        z_t = GAUSSIAN.corrupt(batch.x, clock, batch.generator)
        with torch.no_grad():
            target = self._ode(z_t, start, batch) if self.endpoint == "ode" else self._draw(z_t, start, batch)
        x = self.student(z_t, clock, batch.cond)
        w = per_sample(self.weighting(clock, x.detach(), target), x)
        loss = (w * (target - x).square()).mean()
        return Update({"student": loss}, lambda: {"loss": loss.detach(), **sample_statistics(x.detach())})

    def _ode(self, z_t: Tensor, start: Tensor, batch: Batch) -> Tensor:
        """The x that leads from z_t (B, …) at start (B,) in one step to where `teacher_steps` lead."""
        end = start - 1 / self.steps
        logsnr = self._grid(start, end.clamp(min=0))
        z = z_t
        for now, then in zip(logsnr[:-1], logsnr[1:], strict=True):
            z = ddim_step(z, self.teacher(z, now.to(z.dtype), batch.cond), then, now)
        return ddim_estimate(z, z_t, logsnr[-1], logsnr[0])

    def _draw(self, z_t: Tensor, start: Tensor, batch: Batch) -> Tensor:
        """The last estimate of Algorithm 1 from z_t to the data."""
        logsnr, z, x = self._grid(start, torch.zeros_like(start)).to(z_t.dtype), z_t, z_t
        for now, then in zip(logsnr[:-1], logsnr[1:], strict=True):
            x = self.teacher(z, now, batch.cond)
            z = GAUSSIAN.posterior_sample(z, x, then, now, batch.generator)
        return x

    def _grid(self, start: Tensor, end: Tensor) -> Tensor:
        """λ at `teacher_steps` + 1 evenly spaced times: (teacher_steps + 1, B) float64."""
        share = torch.linspace(0, 1, self.teacher_steps + 1, dtype=torch.float64, device=start.device)
        return self.schedule(start + share[:, None] * (end - start))

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η}."""
        return {"student": self.student}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """{"teacher": θ}."""
        return {"teacher": self.teacher}

    def variant(self, step: int) -> Hashable | None:
        """All alike."""
        return "regression"


@settings("method")
class RegressionConfig(MethodConfig):
    """Mean square to where the teacher's sampler ends.

    Attributes:
        endpoint: "ode": the teacher's DDIM to the student's next step; "ancestral": a draw of its ancestral
            sampler, whose mean the student learns.
        teacher_steps: of the teacher for each training sample.
    """

    name: ClassVar[str] = "regression"
    caption: ClassVar[str] = "How far the student is from where its teacher's sampler ends (weighted)."
    draws_posterior: ClassVar[bool] = False

    endpoint: Endpoint = "ode"
    teacher_steps: Annotated[int, Field(ge=1)] = 8

    def forward_units(self, guided: bool) -> int:
        """The teacher's steps, and the student with its backward pass."""
        return self.teacher_steps * (2 if guided else 1) + 3

    @property
    def title(self) -> str:
        """What it regresses on."""
        return f"regression on the teacher's {self.endpoint} endpoint"

    @property
    def needs_data(self) -> bool:
        """z_t are real data made noisy."""
        return True

    @property
    def sampler(self) -> SamplerName:
        """That of the teacher which it learnt from."""
        return "ddim" if self.endpoint == "ode" else "ancestral"

    def build(self, context: Context) -> Regression:
        """Nothing but the two networks."""
        networks, steps = (context.teacher, context.student), context.steps
        return Regression(
            *networks, context.schedule, steps, self.teacher_steps, self.endpoint, context.weighting
        )
