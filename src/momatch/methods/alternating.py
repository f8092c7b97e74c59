"""Alternating moment matching: Algorithm 2 of the paper.

Teacher θ is frozen; student η and auxiliary φ start as its copies. The student's output x̃ is a *sample*; the
auxiliary learns its mean, E_g[x̃ | z_s]; the student descends the difference of the two conditional means
until, at every noise level, the data that it makes denoise as the teacher says they should.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample, sample_statistics
from momatch.methods.context import Context
from momatch.methods.transition import Transition
from momatch.methods.weighting import Weighting, flat
from momatch.utils.settings import settings


class Alternating(Method):
    """Algorithm 2 ("Multistep Distillation of Diffusion Models via Moment Matching", NeurIPS 2024).

    Args:
        teacher: θ, may be guided; never trained.
        student: η.
        auxiliary: φ, of the teacher's architecture.
        transition: how t, z_t, x̃, s and z_s are drawn.
        weighting: w(s).
        update: "alternating" is the paper: even steps train φ, odd steps η, each on a fresh batch. "joint"
            trains both from the same draw: 7 forward-units for a pair of updates instead of 10, at the price
            of an auxiliary that is one update older when the student uses it.
        teacher_term: factor of ‖g_θ − g_φ‖² in the auxiliary's loss; 1 in the paper.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        auxiliary: Denoiser,
        transition: Transition,
        weighting: Weighting | None = None,
        update: Literal["alternating", "joint"] = "alternating",
        teacher_term: float = 1.0,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.auxiliary = auxiliary
        self.transition = transition
        self.weighting = weighting or flat()
        self.update = update
        self.teacher_term = teacher_term

    def step(self, step: int, batch: Batch) -> Update:
        """Iteration n of Algorithm 2 (in the joint variant: both of its halves)."""
        train_auxiliary = self.update == "joint" or step % 2 == 0
        train_student = self.update == "joint" or step % 2 == 1

        # s ~ p(s),  δ ~ U[0, 1/k],  t = min(s + δ, 1),  z_t = α_t x + σ_t ε
        # x̃ = g_η(z_t),  z_s ~ q(z_s | z_t, stop_grad(x̃))
        draw = self.transition.draw(self.student, batch, with_grad=train_student)
        z_s, logsnr_s, x_tilde = draw.z_s, draw.logsnr_s, draw.x_tilde
        x_sample = x_tilde.detach()

        with torch.no_grad():
            x_teacher = self.teacher(z_s, logsnr_s, batch.cond)
        with torch.set_grad_enabled(train_auxiliary):
            x_auxiliary = self.auxiliary(z_s, logsnr_s, draw.cond)
        gap = x_auxiliary.detach() - x_teacher
        w = per_sample(self.weighting(logsnr_s, x_sample, x_teacher), z_s)

        losses: dict[str, Tensor] = {}
        if train_auxiliary:  # w(s) { ‖x̃ − g_φ(z_s)‖² + ‖g_θ(z_s) − g_φ(z_s)‖² }
            to_sample, to_teacher = (x_sample - x_auxiliary).square(), (x_teacher - x_auxiliary).square()
            losses["auxiliary"] = (w * to_sample.add(to_teacher, alpha=self.teacher_term)).mean()
        if train_student:  # w(s) x̃ᵀ stop_grad[ g_φ(z_s) − g_θ(z_s) ]
            losses["student"] = (w * gap * x_tilde).mean()

        return Update(losses, lambda: {"gap": (w * gap.square()).mean(), **sample_statistics(x_sample)})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η, "auxiliary": φ}."""
        return {"student": self.student, "auxiliary": self.auxiliary}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """{"teacher": θ}."""
        return {"teacher": self.teacher}

    def variant(self, step: int) -> Hashable | None:
        """Whose turn it is. Rollouts run on as many samples as the dice say: never twice the same.

        Nor an elastic student's steps, whose numbers come from the host.
        """
        if self.transition.source == "rollout" or not isinstance(self.transition.steps, int):
            return None
        return "both" if self.update == "joint" else step % 2


@settings("method")
class AlternatingConfig(MethodConfig):
    """Algorithm 2: a student and an auxiliary network take turns.

    Attributes:
        update: "alternating", as the paper, or "joint" (both networks from one draw, 0.7 of the cost).
        teacher_term: factor of the auxiliary's pull towards the teacher; 1 in the paper.
        auxiliary_steps: of an elastic student: "told" tells the auxiliary the number of steps too, so that
            the moments of each are matched; "mixture" does not, and matches those of all together.
    """

    name: ClassVar[str] = "alternating"
    learning: ClassVar[tuple[str, ...]] = ("student", "auxiliary")
    headline: ClassVar[str] = "gap"
    label: ClassVar[str] = "gap ‖x_auxiliary − x_teacher‖²"
    elastic: ClassVar[bool] = True
    caption: ClassVar[str] = (
        "How far the auxiliary model, which follows the student, is from the teacher (weighted)."
    )

    update: Literal["alternating", "joint"] = "alternating"
    teacher_term: Annotated[float, Field(ge=0)] = 1.0
    auxiliary_steps: Literal["told", "mixture"] = "told"

    def forward_units(self, guided: bool) -> int:
        """Three forwards and the backward of what learns: 10 for a pair; joint, both backwards: 7."""
        return (7 if self.update == "joint" else 5) + (1 if guided else 0)

    @property
    def title(self) -> str:
        """As in the paper."""
        return f"{self.update} (Algorithm 2)"

    @property
    def learning_at_once(self) -> int:
        """Both networks, if they learn from one draw."""
        return 2 if self.update == "joint" else 1

    def build(self, context: Context) -> Alternating:
        """φ is another copy of the teacher."""
        return Alternating(
            context.teacher,
            context.student,
            context.auxiliary(self.auxiliary_steps == "told"),
            context.transition,
            context.weighting,
            self.update,
            self.teacher_term,
        )
