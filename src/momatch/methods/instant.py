"""Instant moment matching: Algorithm 3 of the paper, in parameter space, without an auxiliary network.

Take the auxiliary of Algorithm 2 to be one infinitesimal, preconditioned gradient step away from the teacher:
φ = θ + ν. Then g_φ(z_s) − g_θ(z_s) = (∂g_θ(z_s)/∂θ) ν, and nothing but the student has to be trained. Where
the student's samples give the teacher no gradient on average, the teacher has nothing to learn from them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from momatch.diffusion.denoiser import Denoiser
from momatch.methods.base import (
    Average,
    Batch,
    Method,
    MethodConfig,
    Metric,
    Update,
    alone,
    per_sample,
    sample_statistics,
)
from momatch.methods.context import Context
from momatch.methods.denoising import Denoising
from momatch.methods.jvp import Product, choose_product, forward_product, norm, shifting_product
from momatch.methods.transition import Draw, Transition
from momatch.methods.weighting import Weighting, flat
from momatch.utils.errors import ConfigError
from momatch.utils.settings import settings


class Instant(Method):
    """Algorithm 3 ("Multistep Distillation of Diffusion Models via Moment Matching", NeurIPS 2024).

    Its student gradient is that of ¼ GᵀΛG with z_s held fixed, where G = E ∇_θ w(s) ‖x̃ − g_θ(z_s)‖² is the
    gradient that the teacher gets from the student's samples; the loss that it logs is ½ GᵀΛG. It equals
    Algorithm 2's for an auxiliary that made one infinitesimal Λ-step from the teacher (without Algorithm 2's
    pull of the auxiliary towards the teacher).

    Args:
        teacher: θ, may be guided; never trained.
        student: η.
        transition: how t, z_t, x̃, s and z_s are drawn.
        preconditioner: Λ, the diagonal by parameter name of `teacher`; see `adam_preconditioner`.
        weighting: w(s).
        product: how (∂g_θ/∂θ) ν is computed; see `momatch.methods.jvp`.
        centre: subtract the gradient that the teacher gets from real data, which a teacher that has not
            converged still has. The student is then matched to the data where the teacher is wrong.
        average: of the teacher's gradient over all processes: ν is that of the whole minibatch A.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        transition: Transition,
        preconditioner: Mapping[str, Tensor],
        weighting: Weighting | None = None,
        product: Product = forward_product,
        centre: bool = False,
        average: Average = alone,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.transition = transition
        self.preconditioner = dict(preconditioner)
        self.weighting = weighting or flat()
        self.product = product
        self.centre = centre
        self.average = average
        # The teacher's parameters as leaves that can be differentiated; they share its memory.
        self.theta = {
            name: parameter.detach().requires_grad_()
            for name, parameter in teacher.named_parameters()
            if name in self.preconditioner
        }

    def step(self, step: int, batch: Batch) -> Update:
        """One iteration of Algorithm 3: the same at every step. Half the batch is A, the other half B."""
        a, b = batch.halves()

        # ν = −Λ ∇_θ E_A[ w(s) ‖stop_grad(x̃) − g_θ(z_s)‖² ]
        gradient = self.teacher_gradient(self.transition.draw(self.student, a, with_grad=False), a)
        if self.centre:
            data_gradient = self.teacher_gradient(self._real(a), a)
            gradient = {name: g - data_gradient[name] for name, g in gradient.items()}
        self.average(gradient.values())
        nu = {name: -self.preconditioner[name] * g for name, g in gradient.items()}

        # minimise over η   E_B[ w(s) x̃ᵀ stop_grad{ (∂g_θ(z_s)/∂θ) ν } ]
        draw = self.transition.draw(self.student, b, with_grad=True)
        x_teacher, change = self.product(self.teacher, nu, draw.z_s, draw.logsnr_s, b.cond)
        x_sample = draw.x_tilde.detach()
        w = per_sample(self.weighting(draw.logsnr_s, x_sample, x_teacher), x_sample)
        loss = (w * change * draw.x_tilde).mean()

        def metrics() -> dict[str, Metric]:
            # E_B w (x̃ − g_θ)ᵀ(Jν): the same gradient in x̃, and mean ½ E[G]ᵀΛE[G] ≥ 0.
            value = (w * change * (x_sample - x_teacher)).mean()
            if self.centre:
                value = value - self._data_value(nu, b)
            return {"instant_loss": value, "nu_norm": self._norm(nu), **sample_statistics(x_sample)}

        return Update({"student": loss}, metrics)

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η}."""
        return {"student": self.student}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """{"teacher": θ}."""
        return {"teacher": self.teacher}

    def variant(self, step: int) -> Hashable | None:
        """All alike, unless rollouts run on as many samples as the dice say."""
        return None if self.transition.source == "rollout" else "instant"

    def teacher_gradient(self, draw: Draw, batch: Batch) -> dict[str, Tensor]:
        """∇_θ of the mean of w(s) ‖stop_grad(x̃) − g_θ(z_s)‖² over the draw, by parameter name."""
        x_sample = draw.x_tilde.detach()
        with torch.enable_grad():
            x_teacher = functional_call(self.teacher, self.theta, (draw.z_s, draw.logsnr_s, batch.cond))
            w = per_sample(self.weighting(draw.logsnr_s, x_sample, x_teacher), x_sample)
            loss = (w * (x_sample - x_teacher).square()).mean()
            gradients = torch.autograd.grad(loss, list(self.theta.values()), allow_unused=True)
        pairs = zip(self.theta.items(), gradients, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    def _norm(self, nu: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([v.square().sum() for v in nu.values()]).sum().sqrt()

    def _real(self, batch: Batch) -> Draw:
        """Real data in place of the student's samples, at noise levels from the same density."""
        s = self.transition.density(batch.uniform().squeeze(0))
        logsnr_s = self.transition.schedule(s)
        z_s = self.transition.process.corrupt(batch.x, logsnr_s, batch.generator)
        return Draw(z_s, logsnr_s, batch.x)

    def _data_value(self, nu: Mapping[str, Tensor], batch: Batch) -> Tensor:
        real = self._real(batch)
        x_teacher, change = self.product(self.teacher, nu, real.z_s, real.logsnr_s, batch.cond)
        w = per_sample(self.weighting(real.logsnr_s, batch.x, x_teacher), batch.x)
        return (w * change * (batch.x - x_teacher)).mean()


class ShardedInstant(Instant):
    """Algorithm 3 with a teacher that is cut over processes (FSDP2) after this was made.

    An ordinary backward pass gives each process its part of the gradient, averaged over all of them; Λ and ν
    are cut alike, and the product is a central difference, for which each process shifts its own part.
    """

    def step(self, step: int, batch: Batch) -> Update:
        """As Instant's; cuts Λ before the first one."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        self.theta = {k: p for k, p in self.teacher.named_parameters() if k in self.preconditioner}
        for name, parameter in self.theta.items():
            scale = self.preconditioner[name]
            if isinstance(parameter, DTensor) and not isinstance(scale, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                self.preconditioner[name] = distribute_tensor(scale, mesh, placements, src_data_rank=None)
        return super().step(step, batch)

    def teacher_gradient(self, draw: Draw, batch: Batch) -> dict[str, Tensor]:
        """As Instant's, in parts."""
        x_sample = draw.x_tilde.detach()
        for parameter in self.theta.values():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
        with torch.enable_grad():
            x_teacher = self.teacher(draw.z_s, draw.logsnr_s, batch.cond)
            w = per_sample(self.weighting(draw.logsnr_s, x_sample, x_teacher), x_sample)
            (w * (x_sample - x_teacher).square()).mean().backward()
        gradients = {k: p.grad for k, p in self.theta.items() if p.grad is not None}
        for parameter in self.theta.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        return gradients

    def _norm(self, nu: Mapping[str, Tensor]) -> Tensor:
        return norm(nu)


def adam_preconditioner(second_moments: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Λ = 1/(√v̂ + ε·m) with m the root mean square of √v̂ over all parameters.

    Args:
        second_moments: v̂, by parameter name.
        eps: relative to the typical √v̂. Adam's own ε (1e-8 and less) would give a parameter that the
            teacher's loss hardly touches a step that dwarfs all others.

    Raises:
        ValueError: if the moments are all zero or not finite.
    """
    total = sum(float(v.double().sum()) for v in second_moments.values())
    count = sum(v.numel() for v in second_moments.values())
    if not 0 < total < float("inf"):
        raise ValueError(f"the second moments sum to {total}; they must be finite and not all zero")
    floor = eps * (total / count) ** 0.5
    # Contiguous, so that moments read from a file and moments just estimated give the same to the last bit.
    return {name: 1 / (v.sqrt() + floor).contiguous() for name, v in second_moments.items()}


def estimate_second_moments(
    teacher: Denoising, batches: Callable[[int], Batch], steps: int, average: Average = alone
) -> dict[str, Tensor]:
    """v̂ of a teacher whose optimizer state is lost: the mean square of its loss's gradient over minibatches.

    Args:
        teacher: the teacher's training loss; its denoiser is left as it is.
        batches: step → minibatch of real data.
        steps: how many minibatches; some hundreds.
        average: of gradients over the processes that share each minibatch.
    """
    network = copy.deepcopy(teacher.denoiser).requires_grad_(True)
    loss = Denoising(
        network, teacher.schedule, teacher.weighting, teacher.density, teacher.cond_dropout, teacher.process
    )
    names, parameters = zip(*network.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for step in range(steps):
        value = loss.step(step, batches(step)).losses["teacher"]
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        average(gradient for gradient in gradients if gradient is not None)
        for sum_of_squares, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                sum_of_squares.addcmul_(gradient, gradient)
    return {name: value / steps for name, value in zip(names, total, strict=True)}


@settings("method")
class InstantConfig(MethodConfig):
    """Algorithm 3: no auxiliary network; the teacher's own gradient takes its place.

    Attributes:
        product: how (∂g_θ/∂θ) ν is computed: "forward" mode, central "difference", or "auto": forward where
            the network can.
        lambda_steps: minibatches of the teacher's loss on real data from which Λ is estimated; 0 takes the
            second moments saved with the teacher.
        lambda_eps: ε of Λ = 1/(√v̂ + ε·rms √v̂).
        centre: subtract the gradient that real data give the teacher.
    """

    name: ClassVar[str] = "instant"
    minibatches: ClassVar[int] = 2
    headline: ClassVar[str] = "instant_loss"
    label: ClassVar[str] = "instant loss"
    caption: ClassVar[str] = (
        "What the teacher could still learn from the student's samples: it falls towards 0 as they get "
        "better. Single values are noisy and may be negative (left out here)."
    )
    vanishing: ClassVar[str | None] = "instant_loss"
    whole_batch: ClassVar[bool] = True  # ν is a mean over half of it, and the other half needs it
    teacher_copies: ClassVar[int] = 2  # ∇_θ, which becomes ν, and Λ

    product: Literal["auto", "forward", "difference"] = "auto"
    lambda_steps: Annotated[int, Field(ge=0)] = 0
    lambda_eps: Annotated[float, Field(ge=0)] = 0.1
    centre: bool = False

    @property
    def needs_data(self) -> bool:
        """To centre on them."""
        return self.centre

    @property
    def title(self) -> str:
        """As in the paper."""
        return "instant (Algorithm 3)"

    def forward_units(self, guided: bool) -> int:
        """One minibatch: student forward, teacher forward and backward, 4.

        The other: student forward and backward, and the product of the teacher's Jacobian, about 3.
        """
        return 10 + (6 if guided else 0)

    def build(self, context: Context) -> Instant:
        """Λ from second moments of the teacher; forward mode where the network can."""
        scale = adam_preconditioner(context.second_moments(self.lambda_steps), self.lambda_eps)
        if context.sharded:
            return self._build_sharded(context, scale)
        probe = context.minibatch(2)
        logsnr = context.schedule(torch.full((len(probe.x),), 0.5))
        _, product = choose_product(self.product, context.teacher, probe.x, logsnr, probe.cond)
        return self._made(Instant, context, scale, product)

    def _build_sharded(self, context: Context, scale: Mapping[str, Tensor]) -> Instant:
        if self.product == "forward":
            raise ConfigError(
                "method.product is 'forward', which cannot pass weights that are cut over processes; use "
                "method.product=difference, or parallel=ddp"
            )
        context = replace(context, average=alone)  # backward does it
        return self._made(ShardedInstant, context, scale, shifting_product)

    def _made(
        self, kind: type[Instant], context: Context, scale: Mapping[str, Tensor], product: Product
    ) -> Instant:
        return kind(
            context.teacher,
            context.student,
            context.transition,
            scale,
            context.weighting,
            product,
            self.centre,
            context.average,
        )
