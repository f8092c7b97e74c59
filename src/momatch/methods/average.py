"""An average of the student's weights (EMA): what is sampled and saved in the student's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from momatch.diffusion.denoiser import Denoiser
from momatch.methods.base import Batch, Method, Update, Wrapper


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Torch's moving average, of lists with weights cut over processes beside buffers that are not."""
    move = get_ema_multi_avg_fn(decay)

    def move_each_kind(averages: list[Tensor], current: list[Tensor], count: Any) -> None:
        for kind in {type(average) for average in averages}:
            some = [i for i, average in enumerate(averages) if type(average) is kind]
            move([averages[i] for i in some], [current[i] for i in some], count)

    return move_each_kind


class Averaged(Wrapper):
    """Another method, whose student's weights are averaged after every step.

    Args:
        method: trains `role`.
        decay: of the exponential moving average, β in average ← β average + (1 − β) weights. The first step
            copies the weights.
        role: whose weights.
    """

    def __init__(self, method: Method, decay: float, role: str = "student"):
        super().__init__(method)
        self.role = role
        student = method.trainable[role]
        self.average = AveragedModel(student, multi_avg_fn=moving_average(decay), use_buffers=True)
        self.average.eval().requires_grad_(False)

    @property
    def denoiser(self) -> Denoiser:
        """The student with averaged weights."""
        found = self.average.module
        assert isinstance(found, Denoiser)
        return found

    def step(self, step: int, batch: Batch) -> Update:
        """The method's own."""
        return self.method.step(step, batch)

    def after_update(self, step: int) -> None:
        """Move the average."""
        self.method.after_update(step)
        self.average.update_parameters(self.method.trainable[self.role])

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """The method's own, and the average."""
        return {**self.method.kept, f"average of the {self.role}": self.average}
