"""A short denoising fine-tune first: a student learns its own schedule before it is matched."""

from __future__ import annotations

from collections.abc import Hashable

from momatch.methods.base import Batch, Method, Update, Wrapper
from momatch.methods.denoising import Denoising


class WarmStart(Wrapper):
    """`denoising` trains one role for the first steps, then `method` takes over, counting from 0.

    Args:
        denoising: trains the denoiser that `role` names in `method.trainable`.
        method: what follows.
        num_steps: of denoising.
        role: whose optimizer the denoising loss goes to.
    """

    def __init__(self, denoising: Denoising, method: Method, num_steps: int, role: str = "student"):
        super().__init__(method)
        self.denoising, self.num_steps, self.role = denoising, num_steps, role

    def step(self, step: int, batch: Batch) -> Update:
        """Denoising before `num_steps`, the method's own step after."""
        if step >= self.num_steps:
            return self.method.step(step - self.num_steps, batch)
        update = self.denoising.step(step, batch)
        (loss,) = update.losses.values()
        return Update({self.role: loss}, update.metrics)

    def variant(self, step: int) -> Hashable | None:
        """Which of the two it is, and which of its own."""
        if step < self.num_steps:
            return "warm start", self.denoising.variant(step)
        own = self.method.variant(step - self.num_steps)
        return None if own is None else ("after", own)

    def after_update(self, step: int) -> None:
        """The method's own, from its first step on."""
        if step >= self.num_steps:
            self.method.after_update(step - self.num_steps)
