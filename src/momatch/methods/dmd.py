"""Distribution matching distillation (Yin et al. 2024, DMD2), without its GAN.

The student's samples are made noisy afresh; on them two denoisers are compared: the teacher's, of the data,
and a fake one φ that learns to denoise what the student makes. Their difference is the gradient of the
reverse KL divergence between the two laws, at that noise. Moment matching differs in what z is given (z_t
too, not x̃ alone), in φ's loss (a pull towards θ), in the weight, and in how often φ learns.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.process import GAUSSIAN
from momatch.diffusion.sampling import SamplerName
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample, sample_statistics
from momatch.methods.context import Context
from momatch.methods.transition import Source
from momatch.methods.weighting import Weighting, adaptive, flat
from momatch.utils.settings import settings

LEAST_TIME, MOST_TIME = 0.02, 0.98  # of the noise at which the two are compared, as in the paper's code


class DistributionMatching(Method):
    """DMD2 ("Improved Distribution Matching Distillation for Fast Image Synthesis", 2024), sections 4.2, 4.4.

    Args:
        teacher: θ, the real denoiser; may be guided; never trained.
        student: η.
        auxiliary: φ, the fake denoiser, of the teacher's architecture.
        schedule: λ(t).
        steps: k, network calls of the sampler, which takes all noise anew at each.
        updates: of φ for each of the student.
        source: z_t from "data", or from a "rollout" of the student (backward simulation, section 4.5).
        weighting: w(τ) of φ's denoising loss; the student's is the paper's (`weighting.adaptive`).
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        auxiliary: Denoiser,
        schedule: NoiseSchedule,
        steps: int,
        updates: int = 5,
        source: Source = "rollout",
        weighting: Weighting | None = None,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.student, self.auxiliary = student, auxiliary
        self.schedule, self.steps, self.updates, self.source = schedule, steps, updates, source
        self.weighting, self.normalisation = weighting or flat(), adaptive()

    def step(self, step: int, batch: Batch) -> Update:
        """`updates` steps of φ, then one of the student."""
        train_student = self._is_students(step)
        u, v = batch.uniform(rows=2).unbind()

        # t = i/k;  x̃ = g_η(z_t);  z_τ = α_τ x̃ + σ_τ ε, which forgets z_t
        calls_left = (u * self.steps).long() + 1
        logsnr_t = self.schedule(calls_left.to(u.dtype) / self.steps)
        z_t = self._start(batch, calls_left, logsnr_t)
        with torch.set_grad_enabled(train_student):
            x_tilde = self.student(z_t, logsnr_t, batch.cond)
        x_sample = x_tilde.detach()
        logsnr = self.schedule(LEAST_TIME + (MOST_TIME - LEAST_TIME) * v)
        z = GAUSSIAN.corrupt(x_sample, logsnr, batch.generator)

        if not train_student:  # w(τ) ‖x̃ − g_φ(z_τ)‖²
            x_fake = self.auxiliary(z, logsnr, batch.cond)
            w = per_sample(self.weighting(logsnr, x_sample, x_fake.detach()), z)
            loss = (w * (x_sample - x_fake).square()).mean()
            return Update({"auxiliary": loss}, lambda: {"denoising": loss.detach()})

        # x̃ᵀ stop_grad[ g_φ(z_τ) − g_θ(z_τ) ] / mean|x̃ − g_θ(z_τ)|, equations 7 and 8 of DMD
        with torch.no_grad():
            x_real = self.teacher(z, logsnr, batch.cond)
            gap = self.auxiliary(z, logsnr, batch.cond) - x_real
        w = per_sample(self.normalisation(logsnr, x_sample, x_real), z)
        loss = (w * gap * x_tilde).mean()
        return Update({"student": loss}, lambda: {"gap": gap.square().mean(), **sample_statistics(x_sample)})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η, "auxiliary": φ}."""
        return {"student": self.student, "auxiliary": self.auxiliary}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """{"teacher": θ}."""
        return {"teacher": self.teacher}

    def variant(self, step: int) -> Hashable | None:
        """Whose turn it is; rollouts run all samples through all calls, so they are alike too."""
        return self._is_students(step)

    def _is_students(self, step: int) -> bool:
        return step % (self.updates + 1) == self.updates

    @torch.no_grad()
    def _start(self, batch: Batch, calls_left: Tensor, logsnr_t: Tensor) -> Tensor:
        """z_t where `calls_left` (B,) of the k calls are to go."""
        if self.source == "data":
            return GAUSSIAN.corrupt(batch.x, logsnr_t, batch.generator)
        z = GAUSSIAN.prior(batch.x, batch.generator)
        levels = self.schedule(torch.arange(self.steps + 1, device=z.device, dtype=z.dtype) / self.steps)
        for left in range(self.steps, 1, -1):
            now, then = levels[left].expand(len(z)), levels[left - 1].expand(len(z))
            again = GAUSSIAN.corrupt(self.student(z, now, batch.cond), then, batch.generator)
            z = torch.where(per_sample(calls_left < left, z), again, z)
        return z


@settings("method")
class DistributionMatchingConfig(MethodConfig):
    """DMD2 without its GAN: distribution matching with fresh noise and two time scales.

    Attributes:
        updates: of the fake denoiser for each of the student.
    """

    name: ClassVar[str] = "dmd"
    learning: ClassVar[tuple[str, ...]] = ("student", "auxiliary")
    headline: ClassVar[str] = "gap"
    label: ClassVar[str] = "gap ‖x_fake − x_teacher‖²"
    caption: ClassVar[str] = (
        "How far the denoiser that follows the student is from the teacher, on the student's samples."
    )
    draws_posterior: ClassVar[bool] = False

    updates: Annotated[int, Field(ge=1)] = 5

    def forward_units(self, guided: bool) -> int:
        """Of φ 4 (the student's forward pass included), of the student 5, in their proportion.

        Rollouts come on top, k/2 forward passes a step.
        """
        return round((4 * self.updates + 5 + guided) / (self.updates + 1))

    @property
    def title(self) -> str:
        """After its paper."""
        return "distribution matching (DMD2 without its GAN)"

    @property
    def sampler(self) -> SamplerName:
        """All noise is taken anew at each step."""
        return "renoise"

    def build(self, context: Context) -> DistributionMatching:
        """φ is another copy of the teacher."""
        transition = context.transition
        return DistributionMatching(
            context.teacher,
            context.student,
            context.auxiliary(False),
            context.schedule,
            context.steps,
            self.updates,
            transition.source,
            context.weighting,
        )
