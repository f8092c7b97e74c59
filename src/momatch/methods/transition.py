"""What Algorithms 2 and 3 share: the student's sample x̃, and the less noisy z_s at which it is judged.

s ~ p(s);  δ ~ U[0, 1/k];  t = min(s + δ, 1);  z_t = α_t x + σ_t ε
x̃ = g_η(z_t);  z_s ~ q(z_s | z_t, stop_grad(x̃))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond, DenoiserFunction, Process, cond_rows
from momatch.diffusion.process import GAUSSIAN
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Batch
from momatch.methods.weighting import TimeDensity, power

Posterior = Literal["conditional", "fresh"]
Source = Literal["data", "rollout"]


@dataclass(frozen=True)
class Draw:
    """Samples, and where they are judged.

    Attributes:
        z_s: (B, …) noisy data at λ_s; carries no gradient.
        logsnr_s: (B,) λ_s.
        x_tilde: (B, …) the student's output, from which z_s was made; may carry a gradient.
    """

    z_s: Tensor
    logsnr_s: Tensor
    x_tilde: Tensor


@dataclass(frozen=True)
class StudentDraw(Draw):
    """One minibatch of transitions.

    Attributes:
        x_sample: (B, …) x̃ without its gradient; of a discrete process tokens drawn from x̃.
        z_t: (B, …) what the student was shown.
        logsnr_t: (B,) λ_t.
        cond: what the student was asked: the batch's condition and, of an elastic one, the number of steps.
    """

    x_sample: Tensor
    z_t: Tensor
    logsnr_t: Tensor
    cond: Cond | None


@dataclass(frozen=True)
class Transition:
    """How transitions t → s are drawn.

    Attributes:
        schedule: λ(t) of the student's sampler.
        steps: k, the number of network calls the student will sample with; several for an elastic student,
            which is told as cond["steps"] (B,) which of them, drawn anew for each sample, all alike likely.
        density: p(s); uniform by default.
        delta_density: law of k·δ on [0, 1]; uniform in the paper. Small δ pull the student towards the mean.
        posterior: "conditional" is q(z_s | z_t, x̃), the paper; "fresh" is q(z_s | x̃), which forgets z_t and
            costs diversity: the paper's ablation.
        source: "data" diffuses real data to z_t, the paper; "rollout" lets the student itself make z_t, by
            its own sampler from noise, at t = i/k with i uniform. No data are needed then: of the batch only
            shape and condition are used, and p(s) follows from t and δ.
        process: of z_t and z_s.
    """

    schedule: NoiseSchedule
    steps: int | tuple[int, ...]
    density: TimeDensity = power(1.0)
    delta_density: TimeDensity = power(1.0)
    posterior: Posterior = "conditional"
    source: Source = "data"
    process: Process = GAUSSIAN

    def draw(self, student: DenoiserFunction, batch: Batch, with_grad: bool) -> StudentDraw:
        """A transition for each sample of the batch; `with_grad` records x̃ for the student's gradient."""
        u, v = batch.uniform(rows=2).unbind()
        k, cond = self._counts(batch)
        delta = self.delta_density(v) / k
        if self.source == "data":
            # s ~ p(s),  δ ~ U[0, 1/k],  t = min(s + δ, 1)
            s = self.density(u)
            t = (s + delta).clamp(max=1)
        else:
            calls_left = (u * k).long() + 1
            t = calls_left.to(u.dtype) / k
            s = t - delta
        logsnr_s, logsnr_t = self.schedule(torch.stack([s, t])).unbind()

        # z_t = α_t x + σ_t ε,  x̃ = g_η(z_t),  z_s ~ q(z_s | z_t, stop_grad(x̃))
        if self.source == "data":
            z_t = self.process.corrupt(batch.x, logsnr_t, batch.generator)
        else:
            z_t = self.roll_out(student, batch, calls_left, k, cond)
        with torch.set_grad_enabled(with_grad):
            x_tilde = student(z_t, logsnr_t, cond)
        x_sample = self.process.draw(x_tilde.detach(), batch.generator)
        if self.posterior == "fresh":
            z_s = self.process.corrupt(x_sample, logsnr_s, batch.generator)
        else:
            z_s = self.process.posterior_sample(z_t, x_sample, logsnr_s, logsnr_t, batch.generator)
        return StudentDraw(z_s, logsnr_s, x_tilde, x_sample, z_t, logsnr_t, cond)

    def _counts(self, batch: Batch) -> tuple[int | Tensor, Cond | None]:
        """K of each sample, one number if it is the same of all, and the student's condition."""
        if isinstance(self.steps, int):
            return self.steps, batch.cond
        counts = torch.tensor(self.steps, device=batch.x.device, dtype=batch.x.dtype)
        k = counts[(batch.uniform().squeeze(0) * len(counts)).long()]
        return k, {**(batch.cond or {}), "steps": k}

    @torch.no_grad()
    def roll_out(
        self,
        student: DenoiserFunction,
        batch: Batch,
        calls_left: Tensor,
        k: int | Tensor,
        cond: Cond | None,
    ) -> Tensor:
        """Run Algorithm 1 from noise until each sample has `calls_left` (1 … k) of its k calls to go.

        Args:
            student: g_η.
            batch: of which shape, device and generator are used.
            calls_left: (B,).
            k: the number of calls, or (B,) that of each sample.
            cond: the student's condition.

        Returns:
            (B, …) z_t at t = calls_left/k.
        """
        z = self.process.prior(batch.x, batch.generator)
        of_each = torch.as_tensor(k, device=z.device, dtype=z.dtype).expand(len(z))
        most = self.steps if isinstance(self.steps, int) else max(self.steps)
        for left in range(most, 1, -1):
            going = ((calls_left < left) & (left <= of_each)).nonzero().squeeze(1)
            if len(going) == 0 and isinstance(batch.generator, torch.Generator):
                continue
            times = torch.tensor([[left], [left - 1]], device=z.device, dtype=z.dtype)
            times = times / (k[going] if isinstance(k, Tensor) else k)
            logsnr_t, logsnr_s = self.schedule(times).expand(2, len(going)).unbind()
            x = student(z[going], logsnr_t, cond_rows(cond, going)) if len(going) else z[going]
            noise = batch.generator_of(going)  # drawn even if for no row: other parts may need some
            z[going] = self.process.posterior_sample(z[going], x, logsnr_s, logsnr_t, noise)
        return z
