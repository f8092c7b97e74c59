"""Training a teacher: the plain denoising loss."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond, Process
from momatch.diffusion.process import GAUSSIAN
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Batch, Method, MethodConfig, Update, per_sample
from momatch.methods.weighting import TimeDensity, Weighting, power, v_weight
from momatch.utils.settings import settings


class Denoising(Method):
    """Minimise w(t) ‖x − g(z_t)‖² over one denoiser, the condition dropped now and then.

    Args:
        denoiser: the network that learns; its role is "teacher".
        schedule: λ(t).
        weighting: w(t); 1/σ² by default, which is the mean square in v.
        density: p(t).
        cond_dropout: probability with which a sample is trained on the null condition, so that the network
            also learns E[x | z] without one.
        process: how data are noised.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        weighting: Weighting | None = None,
        density: TimeDensity | None = None,
        cond_dropout: float = 0.1,
        process: Process = GAUSSIAN,
    ):
        self.denoiser = denoiser
        self.schedule = schedule
        self.weighting = weighting or v_weight()
        self.density = density or power(1.0)
        self.cond_dropout = cond_dropout
        self.process = process

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch of denoising; the same at every step."""
        u, drop = batch.uniform(rows=2).unbind()
        logsnr = self.schedule(self.density(u))
        z = self.process.corrupt(batch.x, logsnr, batch.generator)
        x = self.denoiser(z, logsnr, self._drop(batch.cond, drop < self.cond_dropout))
        w = per_sample(self.weighting(logsnr, batch.x, x), x)
        loss = (w * (batch.x - x).square()).mean()
        return Update({"teacher": loss}, lambda: {"loss": loss.detach()})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"teacher": the denoiser}."""
        return {"teacher": self.denoiser}

    def variant(self, step: int) -> Hashable | None:
        """All alike."""
        return "denoising"

    def _drop(self, cond: Cond | None, drop: Tensor) -> Cond | None:
        if not cond or self.cond_dropout == 0:
            return cond
        null = self.denoiser.null_cond(cond)
        return {k: torch.where(per_sample(drop, v), null[k], v) for k, v in cond.items()}


@settings()
class DenoisingConfig(MethodConfig):
    """What others must know of training a teacher; without a name, since it distils nothing."""

    learning = ("teacher",)
    label = "denoising loss"
    caption = "The denoising loss."

    def forward_units(self, guided: bool) -> int:
        """Forward and backward."""
        return 3
