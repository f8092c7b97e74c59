"""What the parts of the house call each other by: a condition, a denoiser, a noising process.

A discrete process (tokens) is a second class with the methods of `Process`; neither the sampler nor a
method that draws transitions has to know which one it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from momatch.utils.seeding import Generator

Cond = dict[str, Tensor]  # what is asked for: by name, with a row for each sample
DenoiserFunction = Callable[[Tensor, Tensor, Cond | None], Tensor]  # (z, logsnr, cond) → estimate of x
Step = Callable[[int, Tensor, Tensor, Generator | None], Tensor]  # (i, z, x, generator) → the next z


class Process(Protocol):
    """A noising process: x becomes z, less and less of it as λ falls.

    z and x (B, …) are floating point and of one shape (tokens: one-hot), logsnr (B,). All noise comes from
    `generator`.
    """

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """A sample from what a denoiser says: its estimate x itself, or tokens from their probabilities."""
        return x

    def finished(self, x: Tensor) -> Tensor:
        """What the user of a sampler gets for its last x: x itself, or tokens as integers."""
        return x

    def prior(self, like: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw z_1, of like's shape, dtype and device."""
        ...

    def corrupt(self, x: Tensor, logsnr: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw z_t ~ q(z_t | x)."""
        ...

    def posterior_sample(
        self,
        z_t: Tensor,
        x: Tensor,
        logsnr_s: Tensor,
        logsnr_t: Tensor,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draw z_s ~ q(z_s | z_t, x) for λ_s ≥ λ_t; x may be an estimate."""
        ...

    def stepper(self, logsnr: Tensor, eta: float) -> Step:
        """The sampler's steps along logsnr (k + 1,), the i-th from entry i to i + 1, the same for all rows.

        Raises:
            ValueError: if there is no such step at stochasticity eta (1 is the posterior).
        """
        ...


def cond_rows(cond: Cond | None, rows: slice | Tensor) -> Cond | None:
    """The condition of some of the samples; None of none."""
    return {key: value[rows] for key, value in cond.items()} if cond else None
