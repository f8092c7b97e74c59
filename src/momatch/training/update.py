"""One update: the losses of a step, their gradients, and what the optimizers make of them.

`Updater` runs it as PyTorch does, operation by operation. It waits for no device, so that
`momatch.training.capture` can record it once and replay it. What must not happen is left to a `Guard`: a
gradient that is not finite must not reach any weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momatch.methods.base import Average, Batch, Deviation, Method, Metric, alone
from momatch.training.optim import RoleOptimizer
from momatch.utils.errors import RunError


class NonFiniteLossError(RunError):
    """A loss or gradient was not finite; the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class Failure:
    """The first update whose gradient was not finite.

    Attributes:
        role: whose gradient.
        step: which update, from 0.
        loss: that role's loss.
    """

    role: str
    step: int
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What an update leaves behind.

    Attributes:
        norms: of the gradient of each role that learned, before the clip; scalars on the device.
        metrics: computes the numbers worth logging.
    """

    norms: dict[str, Tensor]
    metrics: Callable[[], Mapping[str, Metric]]


class Guard(ABC):
    """Keeps gradients that are not finite from the weights, and remembers the first."""

    def begin(self, step: int) -> None:  # noqa: B027 (one that looks at once need not remember)
        """The next update is number `step`."""

    @abstractmethod
    def see(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> bool:
        """Look at an update before its optimizers act. Returns whether they may, as far as is known."""

    @abstractmethod
    def failure(self) -> Failure | None:
        """The first failure so far; waits for the device."""


class Immediate(Guard):
    """Looks at every gradient at once: right where looking costs nothing, as on a CPU."""

    def __init__(self) -> None:
        self.step = 0
        self.found: Failure | None = None

    def begin(self, step: int) -> None:
        """The next update is number `step`."""
        self.step = step

    def see(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> bool:
        """Whether all norms are finite."""
        for role, norm in norms.items():
            if not norm.item() < float("inf"):
                self.found = Failure(role, self.step, losses[role].item())
                return False
        return True

    def failure(self) -> Failure | None:
        """What `see` found."""
        return self.found


class Deferred(Guard):
    """Leaves the judgement to the device: from the first failure on, no optimizer changes a weight.

    Whoever wants to know asks `failure`, now and then: a look at every step would make the GPU wait for
    Python, and Python for the GPU.

    Args:
        optimizers: of each role; they are told to step nowhere once something failed.
        device: where the networks are.
    """

    def __init__(self, optimizers: Mapping[str, RoleOptimizer], device: torch.device):
        self.roles = list(optimizers)
        self.failed = torch.zeros((), device=device)
        self.step = torch.zeros((), dtype=torch.float64, device=device)
        self.first = torch.zeros(3, dtype=torch.float64, device=device)  # number of the role, step, loss
        for optimizer in optimizers.values():
            optimizer.skip_where(self.failed)

    def begin(self, step: int) -> None:
        """The next update is number `step`."""
        self.step.fill_(step)

    def see(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> bool:
        """Always True: what may happen is not known here."""
        for role, norm in norms.items():
            bad = ~norm.isfinite()
            number = torch.full_like(self.step, self.roles.index(role))
            seen = torch.stack([number, self.step, losses[role].detach().double()])
            self.first.copy_(torch.where(bad & (self.failed == 0), seen, self.first))
            self.failed.copy_(torch.maximum(self.failed, bad.to(self.failed.dtype)))
        return True

    def failure(self) -> Failure | None:
        """Read from the device."""
        if not self.failed.item():
            return None
        number, step, loss = self.first.tolist()
        return Failure(self.roles[int(number)], int(step), loss)


class Updater:
    """Runs updates of a method, operation by operation.

    Args:
        method: the algorithm.
        optimizers: one for each role that it trains.
        guard: looks at the gradients.
        average: of the gradients over processes that share each batch.
        parts: into which each batch is cut, to hold the activations of one part at a time; their gradients
            add up to the batch's.
    """

    def __init__(
        self,
        method: Method,
        optimizers: Mapping[str, RoleOptimizer],
        guard: Guard,
        average: Average = alone,
        parts: int = 1,
    ):
        self.method, self.optimizers, self.guard = method, optimizers, guard
        self.average, self.parts = average, parts

    def __call__(self, step: int, batch: Batch) -> Outcome:
        """Update `step`, on its batch; the learning rates have been set."""
        losses: dict[str, Tensor] = {}
        metrics = []
        for part in batch.parts(self.parts) if self.parts > 1 else [batch]:
            update = self.method.step(step, part)
            for role, loss in update.losses.items():
                share = loss / self.parts if self.parts > 1 else loss
                if role not in losses:
                    self.optimizers[role].zero_grad()
                share.backward()
                losses[role] = losses[role] + share.detach() if role in losses else share.detach()
            metrics.append(update.metrics)
        norms: dict[str, Tensor] = {}
        for role in losses:
            self.average(self.optimizers[role].gradients)
            norms[role] = self.optimizers[role].clip()
        if self.guard.see(losses, norms):
            for role in losses:
                self.optimizers[role].step()
        return Outcome(norms, metrics[0] if self.parts == 1 else lambda: _of_all(metrics))


def _of_all(parts: Sequence[Callable[[], Mapping[str, Metric]]]) -> dict[str, Metric]:
    """The metrics of a batch from those of its parts."""
    found = [metrics() for metrics in parts]
    whole: dict[str, Metric] = {}
    for name, first in found[0].items():
        values = [each[name] for each in found]
        if isinstance(first, Deviation):
            whole[name] = Deviation(torch.cat([v.values for v in values if isinstance(v, Deviation)]))
        else:
            whole[name] = torch.stack([torch.as_tensor(v) for v in values]).mean()
    return whole
