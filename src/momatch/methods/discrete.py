"""Moment matching of discrete diffusion (D-MMD), and the training of its teachers.

Moment matching is one method over many losses. With L(a, b) the loss of a diffusion model that says b where a
is true, it is

    min over η, max over φ of   E[ L(x̃, g_θ(z_s)) − L(x̃, g_φ(z_s)) − L(g_θ(z_s), g_φ(z_s)) ]

With a mean square L it is Algorithm 2. With the cross entropy L(a, b) = −Σ_c a_c log b_c it is D-MMD. The
student's output x̃ = g_η(z_t) is a soft vector; a hard x ~ Cat(x̃) is drawn from it, and z_s ~ q(z_s | z_t, x):

    student      minimise  Σ_c x̃_c stop_grad[ log g_φ(z_s) − log g_θ(z_s) ]_c
    auxiliary    minimise  −Σ_c (x + g_θ(z_s))_c log g_φ(z_s)_c

The gradient reaches the student through the soft vector alone. In the auxiliary's target the soft x̃ may stand
for the hard x with masked diffusion, where a masked z_s says nothing of x. With uniform diffusion z_s is made
of x, and the soft vector would be a biased target.

Source: Salimans et al. 2026, arXiv 2603.20155.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from momatch.diffusion.categorical import (
    CategoricalDenoiser,
    CategoricalProcess,
    log_probabilities,
    with_noise,
)
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import DenoiserFunction
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample
from momatch.methods.context import Context
from momatch.methods.transition import Transition
from momatch.methods.weighting import TimeDensity, Weighting, flat, power
from momatch.utils.errors import ConfigError
from momatch.utils.seeding import Generator
from momatch.utils.settings import Remedy, settings


class DiscreteDenoising(Method):
    """Training a teacher: minimise −Σ_c x_c log g(z_t)_c at t ~ p(t), whose optimum is E[x | z_t].

    Args:
        denoiser: the network that learns, as probabilities; its role is "teacher".
        schedule: λ(t).
        process: masked or uniform.
        density: p(t).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        process: CategoricalProcess,
        density: TimeDensity | None = None,
    ):
        self.denoiser, self.schedule, self.process = denoiser, schedule, process
        self.density = density or power(1.0)

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch of denoising; the same at every step."""
        logsnr = self.schedule(self.density(batch.uniform().squeeze(0)))
        z = self.process.corrupt(batch.x, logsnr, batch.generator)
        x = self.denoiser(z, logsnr, batch.cond)
        loss = -(batch.x * log_probabilities(x)).sum(-1).mean()
        return Update({"teacher": loss}, lambda: {"loss": loss.detach()})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"teacher": the denoiser}."""
        return {"teacher": self.denoiser}


class DiscreteMatching(Method):
    """D-MMD; and Algorithm 2 on one-hot vectors, for comparison.

    Args:
        teacher: θ, as probabilities, perhaps at another temperature; never trained.
        student: η.
        auxiliary: φ, of the teacher's architecture.
        transition: how t, z_t, x̃, s and z_s are drawn; its process is a `CategoricalProcess`.
        weighting: w(s).
        update: "alternating": even steps train φ, odd steps η; "joint": both from one draw.
        target: of the auxiliary: the "hard" token, or, of masked diffusion, the "soft" vector.
        loss: L, "cross_entropy" or "square".
        noise_dim: numbers of noise that the student's network is given at each position; 0 for none.

    Raises:
        ValueError: if the target is soft and the process uniform.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        auxiliary: Denoiser,
        transition: Transition,
        weighting: Weighting | None = None,
        update: Literal["alternating", "joint"] = "alternating",
        target: Literal["hard", "soft"] = "hard",
        loss: Literal["cross_entropy", "square"] = "cross_entropy",
        noise_dim: int = 0,
    ):
        process = transition.process
        if target == "soft" and not (isinstance(process, CategoricalProcess) and process.kind == "mask"):
            raise ValueError("target is 'soft', which is biased unless diffusion is masked; use 'hard'")
        self.teacher = teacher.eval().requires_grad_(False)
        self.student, self.auxiliary = student, auxiliary
        self.transition, self.weighting = transition, weighting or flat()
        self.update, self.target, self.loss, self.noise_dim = update, target, loss, noise_dim

    def step(self, step: int, batch: Batch) -> Update:
        """Iteration n (in the joint variant: both of its halves)."""
        train_auxiliary = self.update == "joint" or step % 2 == 0
        train_student = self.update == "joint" or step % 2 == 1

        # z_t ~ q(z_t | x_data),  x̃ = g_η(z_t),  x ~ Cat(x̃),  z_s ~ q(z_s | z_t, x)
        draw = self.transition.draw(self.sampled(batch.generator), batch, with_grad=train_student)
        z_s, logsnr_s = draw.z_s, draw.logsnr_s
        with torch.no_grad():
            x_teacher = self.teacher(z_s, logsnr_s, batch.cond)
        with torch.set_grad_enabled(train_auxiliary):
            x_auxiliary = self.auxiliary(z_s, logsnr_s, batch.cond)
        w = per_sample(self.weighting(logsnr_s, draw.x_sample, x_teacher), z_s)

        losses: dict[str, Tensor] = {}
        if train_auxiliary:  # L(x, g_φ) + L(g_θ, g_φ)
            target = draw.x_sample if self.target == "hard" else draw.x_tilde.detach()
            both = self._loss(target, x_auxiliary) + self._loss(x_teacher, x_auxiliary)
            losses["auxiliary"] = (w * both).sum(-1).mean()
        if train_student:  # L(x̃, g_θ) − L(x̃, g_φ), whose gradient in x̃ is that of x̃ᵀ direction
            direction = self._direction(x_teacher, x_auxiliary.detach())
            losses["student"] = (w * draw.x_tilde * direction).sum(-1).mean()

        def metrics() -> dict[str, Tensor]:
            logs = log_probabilities(x_teacher) - log_probabilities(x_auxiliary.detach())
            entropy = -(draw.x_tilde.detach() * log_probabilities(draw.x_tilde.detach())).sum(-1)
            return {"gap": (x_teacher * logs).sum(-1).mean(), "student_entropy": entropy.mean()}

        return Update(losses, metrics)

    def sampled(self, generator: Generator | None) -> DenoiserFunction:
        """The student as a sampler calls it, with its noise from `generator`."""
        return with_noise(self.student, self.noise_dim, generator) if self.noise_dim else self.student

    def _loss(self, truth: Tensor, said: Tensor) -> Tensor:
        """L by entries, (B, …, C)."""
        if self.loss == "square":
            return (truth - said).square()
        return -truth * log_probabilities(said)

    def _direction(self, x_teacher: Tensor, x_auxiliary: Tensor) -> Tensor:
        """The derivative of L(x̃, g_θ) − L(x̃, g_φ) in x̃; of the square half of it, as in Algorithm 2."""
        if self.loss == "square":
            return x_auxiliary - x_teacher
        return log_probabilities(x_auxiliary) - log_probabilities(x_teacher)

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η, "auxiliary": φ}."""
        return {"student": self.student, "auxiliary": self.auxiliary}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """{"teacher": θ}."""
        return {"teacher": self.teacher}


@settings("method")
class DiscreteConfig(MethodConfig):
    """D-MMD: Algorithm 2 for tokens, with the cross entropy in place of the square.

    Attributes:
        update: "alternating", or "joint" (both networks from one draw, 0.7 of the cost).
        target: of the auxiliary: the "hard" token that was drawn, or, of masked diffusion alone, the
            student's "soft" vector.
        loss: "cross_entropy", or "square", which is Algorithm 2 on one-hot vectors.
        temperature: the teacher's logits are divided by it; below 1 it is surer, in the place of guidance.
        top_p: the teacher's logits outside the likeliest tokens that have this probability together are
            lowered by 2; 1 lowers none.
        noise_dim: numbers of noise that the student is given at each position. Masked diffusion needs some:
            its z_1 is always the same.
    """

    name: ClassVar[str] = "discrete"
    learning: ClassVar[tuple[str, ...]] = ("student", "auxiliary")
    headline: ClassVar[str] = "gap"
    label: ClassVar[str] = "gap KL(x_teacher ‖ x_auxiliary)"
    caption: ClassVar[str] = (
        "How far the auxiliary model, which follows the student, is from the teacher (nats)."
    )
    of_tokens: ClassVar[bool] = True
    most_steps: ClassVar[int] = 64  # as models/request.py allows

    update: Literal["alternating", "joint"] = "alternating"
    target: Literal["hard", "soft"] = "hard"
    loss: Literal["cross_entropy", "square"] = "cross_entropy"
    temperature: Annotated[float, Field(gt=0), Remedy("it must be above 0; 1 changes nothing")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), Remedy("it must lie in (0, 1]; 1 changes nothing")] = 1.0
    noise_dim: Annotated[int, Field(ge=0, le=4096), Remedy("use 0 (none) to 4096")] = 16

    def forward_units(self, guided: bool) -> int:
        """As Algorithm 2."""
        return 7 if self.update == "joint" else 5

    @property
    def title(self) -> str:
        """As in its paper."""
        return f"{self.update} (D-MMD)"

    @property
    def student_noise(self) -> int:
        """As set."""
        return self.noise_dim

    @property
    def learning_at_once(self) -> int:
        """Both networks, if they learn from one draw."""
        return 2 if self.update == "joint" else 1

    def build(self, context: Context) -> DiscreteMatching:
        """φ is another copy of the teacher.

        Raises:
            ConfigError: if the target is soft and the teacher's process uniform.
        """
        teacher = copy.copy(context.teacher)  # the same weights
        assert isinstance(teacher, CategoricalDenoiser)
        if self.target == "soft" and teacher.kind != "mask":
            raise ConfigError("method.target is 'soft', and the teacher's process uniform; use hard")
        teacher.temperature, teacher.top_p = self.temperature, self.top_p
        return DiscreteMatching(
            teacher,
            context.student,
            context.auxiliary(True),
            context.transition,
            context.weighting,
            self.update,
            self.target,
            self.loss,
            self.noise_dim,
        )
