"""Reward fine-tuning of a finished student: moment matching on its own samples, with a reward (RMMD).

The first training left a student η₀ and an auxiliary φ that knows the moments of what it makes. Now θ and φ
are frozen, and the student learns on policy, from its own samples in place of data:

    x̃₀ = its own sample in all k steps;  t as in Algorithm 2;  z_t = α_t x̃₀ + σ_t ε
    x̂ = g_η(z_t);  z_s ~ q(z_s | z_t, stop_grad(x̂))
    minimise over η   x̂ᵀ stop_grad[ g_φ(z_s) − g_θ(z_s) − λ ∇R(x̂) ]  +  (μ/2) ‖x̂ − g_η₀(z_t)‖²

One network call carries a gradient, so memory is that of one step of Algorithm 2; what comes on top is the
sample x̃₀. φ is frozen too, so it knows the moments of η₀, not those of what η has become: what keeps η near
η₀ is the last term. Where φ and θ agree, η comes to rest at x̂ = g_η₀ + (λ/μ) ∇R.

Source: RMMD, arXiv 2606.30414, where μ = λ; here μ is a setting of its own, so λ scales the reward alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond
from momatch.methods.base import Batch, Method, MethodConfig, Metric, Update, sample_statistics
from momatch.methods.context import Context
from momatch.methods.transition import Transition
from momatch.utils.errors import ConfigError
from momatch.utils.settings import settings

RewardFunction = Callable[[Tensor, Cond | None, Tensor | None], Tensor]
"""(x (B, …), its condition, (B,) the rows of the data that it comes from) → (B,), higher is better.

It must be differentiable in x. Rows let it look up what a tensor cannot hold, such as a prompt's own words;
they are None where conditions come from no table.
"""


class Reward(Method):
    """RMMD.

    Args:
        teacher: θ, may be guided; never trained.
        student: η, with the weights of η₀.
        auxiliary: φ as the first training left it; frozen.
        reward: R.
        transition: how t, z_t, x̂, s and z_s are drawn, from "data": of those the condition alone is used.
        scale: λ.
        anchor: μ.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        auxiliary: Denoiser,
        reward: RewardFunction,
        transition: Transition,
        scale: float = 1.0,
        anchor: float = 1.0,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.auxiliary = auxiliary.eval().requires_grad_(False)
        self.student = student
        self.former = copy.deepcopy(student).eval().requires_grad_(False)  # η₀
        self.reward = reward
        self.transition = replace(transition, source="data")
        self.scale, self.anchor = scale, anchor

    def step(self, step: int, batch: Batch) -> Update:
        """One update of the student; the same at every step."""
        x_0 = self.sample(batch)
        draw = self.transition.draw(self.student, replace(batch, x=x_0), with_grad=True)
        x_hat = draw.x_tilde
        with torch.no_grad():
            gap = self.auxiliary(draw.z_s, draw.logsnr_s, batch.cond) - self.teacher(
                draw.z_s, draw.logsnr_s, batch.cond
            )
            x_former = self.former(draw.z_t, draw.logsnr_t, batch.cond)
        direction = gap - self.scale * self._gradient(x_hat.detach(), batch)
        loss = (x_hat * direction).mean() + self.anchor / 2 * (x_hat - x_former).square().mean()

        def metrics() -> dict[str, Metric]:
            with torch.no_grad():
                values = self.reward(x_0, batch.cond, batch.rows)
                far, long = (each.flatten(1).norm(dim=1) for each in (x_hat - x_former, x_former))
            found = {
                "reward": values.mean(),
                "drift": (far / long.clamp(min=1e-12)).mean(),
                "gap": gap.square().mean(),
            }
            return {**found, **sample_statistics(x_0)}

        return Update({"student": loss}, metrics)

    @torch.no_grad()
    def sample(self, batch: Batch) -> Tensor:
        """X̃₀ (B, …): the student's own samples in its k steps, for the batch's condition."""
        k = self.transition.steps
        assert isinstance(k, int)
        last = torch.ones(len(batch.x), dtype=torch.long, device=batch.x.device)
        z = self.transition.roll_out(self.student, batch, last, k, batch.cond)
        return self.student(z, self.transition.schedule(last.to(z.dtype) / k), batch.cond)

    def _gradient(self, x: Tensor, batch: Batch) -> Tensor:
        """∇R(x) (B, …): of each sample's own reward."""
        if not self.scale:
            return torch.zeros_like(x)
        with torch.enable_grad():
            x = x.requires_grad_(True)
            return torch.autograd.grad(self.reward(x, batch.cond, batch.rows).sum(), x)[0]

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η}."""
        return {"student": self.student}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """{"teacher": θ, "auxiliary": φ, "former student": η₀}."""
        return {"teacher": self.teacher, "auxiliary": self.auxiliary, "former student": self.former}


@settings("method")
class RewardConfig(MethodConfig):
    """RMMD: a reward for the student of a finished run (momatch reward RUN).

    Attributes:
        run: folder of the finished run, alternating or joint, whose student and auxiliary it starts from.
        reward: what is to become larger: "classifier:7", "classifier" (the label that was asked for),
            "colour:red", "brightness", "similarity" (of image and text), or your own as
            package.module:function.
        scale: λ, how much the reward counts.
        anchor: μ, how much the distance from the first student counts; 0 leaves nothing that holds it.
        most_drift: the mean distance from the first student's outputs, relative to their length, above which
            there is an alarm.
    """

    name: ClassVar[str] = "reward"
    headline: ClassVar[str] = "reward"
    label: ClassVar[str] = "reward of the student's samples"
    caption: ClassVar[str] = "Mean reward of the samples that the student makes in all its steps."
    signed: ClassVar[bool] = True
    teacher_copies: ClassVar[int] = 2  # φ and η₀
    full_rollouts: ClassVar[int] = 1

    run: str = ""
    reward: str = ""
    scale: Annotated[float, Field(ge=0)] = 1.0
    anchor: Annotated[float, Field(ge=0)] = 1.0
    most_drift: Annotated[float, Field(gt=0)] = 0.5

    @property
    def bounds(self) -> Mapping[str, tuple[float, str]]:
        """The drift."""
        remedy = "the student leaves what it was taught: lower method.scale, or raise method.anchor"
        return {"drift": (self.most_drift, remedy)}

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"reward {self.reward} (RMMD)"

    def forward_units(self, guided: bool) -> int:
        """Student forward and backward, and three forwards; the sample comes on top."""
        return 6 + (1 if guided else 0)

    def build(self, context: Context) -> Reward:
        """η and φ from the finished run.

        Raises:
            ConfigError: if there is no such run or reward, or the reward is not one number for each sample.
        """
        for key in ("run", "reward"):
            if not getattr(self, key):
                raise ConfigError(f"method.{key} is empty; use momatch reward RUN --reward NAME")
        student, auxiliary = context.finished(self.run)
        reward = context.reward(self.reward)
        _check(self.reward, reward, context.minibatch(2))
        context.student.network.load_state_dict(student)
        frozen = context.auxiliary(False)
        frozen.network.load_state_dict(auxiliary)
        networks = context.teacher, context.student, frozen
        return Reward(*networks, reward, context.transition, self.scale, self.anchor)


def _check(name: str, reward: RewardFunction, batch: Batch) -> None:
    """Try the reward on a small batch of data.

    Raises:
        ConfigError: if it is not one differentiable number for each sample.
    """
    x = batch.x.clone().requires_grad_(True)
    value: object = reward(x, batch.cond, batch.rows)
    if not isinstance(value, Tensor) or value.shape != (len(x),):
        found = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ConfigError(
            f"method.reward is {name!r}, which gives {found} for {len(x)} samples; it must give a tensor (B,)"
        )
    if not value.requires_grad:
        raise ConfigError(f"method.reward is {name!r}, which is not differentiable in x; write it in torch")
