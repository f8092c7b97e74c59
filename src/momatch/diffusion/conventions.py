"""How a network from outside is told the noise level: its own clock, and its own scale of z.

Inside momatch, noise is λ and z = α x + σ ε. A network that was trained elsewhere has a time of its own and
perhaps another scale of z; both are functions of λ alone:

| convention  | time                    | sees z times           | networks                     |
|-------------|-------------------------|------------------------|------------------------------|
| `logsnr`    | λ                       | 1                      | momatch's own                |
| `timesteps` | index of a beta, 0 … T−1 | 1                     | DDPM, Stable Diffusion, DiT  |
| `flow`      | m·σ/(α + σ)             | 1/(α + σ)              | rectified flow: SD3, Flux    |
| `edm`       | ¼ log(σ/α)              | 1/√(σ² + α² ς_d²)      | EDM                          |
| `exploding` | r σ/α                   | r/α, plus c            | score SDE (VE)               |

What the network's output stands for is another question: `process.Prediction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momatch.diffusion import schedules
from momatch.diffusion.process import SIGMA_DATA, alpha_sigma


@dataclass(frozen=True)
class TimeConvention:
    """A network's clock and scale.

    Attributes:
        name: the function of this module that made it.
        options: that function's arguments, JSON types only, so that `build(name, **options)` makes it again.
        to_time: λ (B,) → the network's time (B,).
        input_scale: λ (B,) → factor (B,) between momatch's z and what the network sees; None for 1.
        input_shift: added to that.
    """

    name: str
    options: dict[str, Any]
    to_time: Callable[[Tensor], Tensor]
    input_scale: Callable[[Tensor], Tensor] | None = None
    input_shift: float = 0.0


def logsnr() -> TimeConvention:
    """The network takes λ and z as they are."""
    return TimeConvention("logsnr", {}, lambda value: value)


def timesteps(betas: Sequence[float]) -> TimeConvention:
    """The index into a table of betas, as in DDPM; between two entries a fraction, linear in λ.

    Cleaner than the table's first entry is said to be index 0: the network knows nothing below.

    Args:
        betas: the T numbers that the network was trained with; see `schedules.tabulated`.
    """
    table = schedules.tabulated(betas)

    def to_time(value: Tensor) -> Tensor:
        return (table.inverse(value.double()) * len(betas) - 1).clamp(min=0).to(value.dtype)

    return TimeConvention("timesteps", {"betas": [float(b) for b in betas]}, to_time)


def flow(multiplier: float = 1000.0) -> TimeConvention:
    """Rectified flow: z′ = (1 − t′) x + t′ ε, and the network is told multiplier · t′."""

    def to_time(value: Tensor) -> Tensor:
        return multiplier * torch.sigmoid(-value / 2)

    def input_scale(value: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(value)
        return 1 / (alpha + sigma)

    return TimeConvention("flow", {"multiplier": multiplier}, to_time, input_scale)


def edm(sigma_data: float = SIGMA_DATA) -> TimeConvention:
    """EDM's c_noise and c_in (Karras et al. 2022, table 1).

    Args:
        sigma_data: standard deviation of the data that the network was trained with.
    """

    def input_scale(value: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(value)
        return (sigma**2 + (alpha * sigma_data) ** 2).rsqrt()

    return TimeConvention("edm", {"sigma_data": sigma_data}, lambda value: -value / 8, input_scale)


def exploding(low: float = 0.0, high: float = 1.0) -> TimeConvention:
    """A variance-exploding process: the network is told ς and sees y + ς ε, where y lies in [low, high].

    momatch's x lies in [−1, 1], so y = r x + c with r = (high − low)/2 and c the middle, and ς = r σ/α.

    Args:
        low: least value of the data that the network was trained with.
        high: greatest.
    """
    radius = (high - low) / 2

    def to_time(value: Tensor) -> Tensor:
        return radius * torch.exp(-value / 2)

    def input_scale(value: Tensor) -> Tensor:
        return radius / alpha_sigma(value)[0]

    options = {"low": float(low), "high": float(high)}
    return TimeConvention("exploding", options, to_time, input_scale, (low + high) / 2)


CONVENTIONS: dict[str, Callable[..., TimeConvention]] = {
    "logsnr": logsnr,
    "timesteps": timesteps,
    "flow": flow,
    "edm": edm,
    "exploding": exploding,
}


def build(name: str, **options: Any) -> TimeConvention:
    """Make a convention by name; the inverse of (`convention.name`, `convention.options`).

    Raises:
        ValueError: if the name is unknown or an option does not belong to it.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"unknown time convention {name!r}; choose one of {', '.join(CONVENTIONS)}")
    try:
        return CONVENTIONS[name](**options)
    except TypeError as error:
        raise ValueError(f"time convention {name!r} does not take {options}: {error}") from None
