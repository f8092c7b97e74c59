"""A short denoising fine-tune first: a student learns its own schedule before it is matched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from momatch.methods.base import Batch, Method, Update
from momatch.methods.denoising import Denoising


class WarmStart(Method):
    """`denoising` trains one role for the first steps, then `method` takes over, counting from 0.

    Args:
        denoising: trains the denoiser that `role` names in `method.trainable`.
        method: what follows.
        num_steps: of denoising.
        role: whose optimizer the denoising loss goes to.
    """

    def __init__(self, denoising: Denoising, method: Method, num_steps: int, role: str = "student"):
        self.denoising, self.method, self.num_steps, self.role = denoising, method, num_steps, role

    def step(self, step: int, batch: Batch) -> Update:
        """Denoising before `num_steps`, the method's own step after."""
        if step >= self.num_steps:
            return self.method.step(step - self.num_steps, batch)
        update = self.denoising.step(step, batch)
        (loss,) = update.losses.values()
        return Update({self.role: loss}, update.metrics)

    def after_update(self, step: int) -> None:
        """The method's own, from its first step on."""
        if step >= self.num_steps:
            self.method.after_update(step - self.num_steps)

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """The method's own."""
        return self.method.kept

    @property
    def optimizer_overrides(self) -> Mapping[str, Mapping[str, Any]]:
        """The method's own."""
        return self.method.optimizer_overrides

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The method's own."""
        return self.method.trainable
