"""What a training algorithm is, and what goes in and out of one step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from momatch.diffusion.interface import Cond, cond_rows
from momatch.diffusion.process import per_sample

__all__ = ["Batch", "Method", "Update", "per_sample", "sample_statistics", "saturation"]


@dataclass(frozen=True)
class Batch:
    """A minibatch and the source of all randomness spent on it.

    Attributes:
        x: (B, …) clean data.
        cond: condition of each sample, or None.
        generator: on x's device; seeded by the run's seed and the step, so a step can be repeated exactly.
    """

    x: Tensor
    cond: Cond | None
    generator: torch.Generator

    def halves(self) -> tuple[Batch, Batch]:
        """Two independent minibatches of half the size, drawing from the same generator."""
        size = len(self.x) // 2
        cut = slice(size), slice(size, 2 * size)
        first, second = (Batch(self.x[p], cond_rows(self.cond, p), self.generator) for p in cut)
        return first, second

    def normal(self) -> Tensor:
        """ε ~ N(0, I) in the shape of x."""
        return torch.randn(self.x.shape, generator=self.generator, device=self.x.device, dtype=self.x.dtype)

    def uniform(self, rows: int = 1) -> Tensor:
        """(rows, B) numbers from U[0, 1)."""
        shape = (rows, len(self.x))
        return torch.rand(shape, generator=self.generator, device=self.x.device, dtype=self.x.dtype)


@dataclass(frozen=True)
class Update:
    """What one step wants done.

    Attributes:
        losses: for each role that learns in this step, the scalar to descend. Each reaches its own role's
            parameters only.
        metrics: computes the numbers worth logging; called at logging steps alone, since it costs time.
    """

    losses: dict[str, Tensor]
    metrics: Callable[[], dict[str, Tensor]]


class Method(Protocol):
    """A training algorithm."""

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The networks that learn, by role ("student", "auxiliary", …). Each gets an optimizer of its own."""
        ...

    def step(self, step: int, batch: Batch) -> Update:
        """Iteration `step` of the algorithm: a pure function of (step, batch, weights), no hidden counter."""
        ...


def sample_statistics(x_tilde: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation and share of saturated values (|x̃| > 1.1) of what the student makes."""
    return {
        "student_mean": x_tilde.mean(),
        "student_std": x_tilde.std(),
        "student_saturation": saturation(x_tilde),
    }


def saturation(values: Tensor) -> Tensor:
    """Share of the values that lie outside ±1.1: none of pictures, more than a quarter of latents."""
    return (values.abs() > 1.1).float().mean()
