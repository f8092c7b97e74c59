"""Noise schedules: time t ∈ [0, 1] (0 clean, 1 noise) to logSNR λ, and back.

Every Gaussian process in use is the variance-preserving one after rescaling z, so a schedule is nothing but a
decreasing function λ(t). All schedules here are strictly monotone and end at finite λ, so `inverse` is exact
and a network can be evaluated anywhere in [0, 1]. `process` itself also accepts infinite λ.

| function         | λ(t)                                          | used by                                 |
|------------------|-----------------------------------------------|-----------------------------------------|
| `cosine`         | −2 log tan(πt/2) + shift                      | improved DDPM, simple diffusion         |
| `interpolated`   | (1 − t) λ_low(t) + t λ_high(t), both cosine   | simple diffusion, later moment matching |
| `edm`            | −2 log σ(t), the ρ-grid                       | EDM                                     |
| `geometric`      | −2 log σ(t), log σ linear                     | score SDE (VE)                          |
| `rectified_flow` | 2 log((1 − t′)/t′), t′ shifted                | rectified flow, SD3, Flux               |
| `tabulated`      | linear between the table's points             | DDPM, DDIM: any list of betas           |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGSNR_MIN, LOGSNR_MAX = -15.0, 15.0
TABLE_LOGSNR_MIN = -30.0  # stands for α = 0: 3e-7, which float32 cannot tell from it


@dataclass(frozen=True)
class NoiseSchedule:
    """A decreasing function `schedule(t) -> logsnr` on [0, 1] with its inverse.

    Attributes:
        name: the function of this module that made it.
        options: that function's arguments, JSON types only, so that `build(name, **options)` makes it again.
        to_logsnr: t of any shape → λ of that shape, in t's dtype.
        to_time: the inverse of `to_logsnr`.
    """

    name: str
    options: dict[str, Any]
    to_logsnr: Callable[[Tensor], Tensor]
    to_time: Callable[[Tensor], Tensor]

    def __call__(self, t: Tensor) -> Tensor:
        """λ(t), same shape and dtype as t ∈ [0, 1]."""
        return self.to_logsnr(t)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The t with λ(t) = logsnr; values outside the schedule's range are clipped to its ends."""
        return self.to_time(logsnr).clamp(0.0, 1.0)


def cosine(
    shift: float = 0.0, logsnr_min: float = LOGSNR_MIN, logsnr_max: float = LOGSNR_MAX
) -> NoiseSchedule:
    """Cosine schedule, α = cos(πt/2), with its ends cut to [logsnr_min, logsnr_max], then shifted.

    Args:
        shift: added to λ; `2 * math.log(32 / resolution)` is simple diffusion's rule (negative: more noise).
        logsnr_min: λ(1) before the shift.
        logsnr_max: λ(0) before the shift.

    Source: Nichol & Dhariwal 2021; Hoogeboom et al., "simple diffusion", 2023, eq. 4.
    """
    start, end = math.atan(math.exp(-logsnr_max / 2)), math.atan(math.exp(-logsnr_min / 2))

    def to_logsnr(t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(start + t * (end - start))) + shift

    def to_time(logsnr: Tensor) -> Tensor:
        return (torch.atan(torch.exp((shift - logsnr) / 2)) - start) / (end - start)

    return NoiseSchedule(
        "cosine", dict(shift=shift, logsnr_min=logsnr_min, logsnr_max=logsnr_max), to_logsnr, to_time
    )


def shifted_cosine(resolution: int, reference: int = 32) -> NoiseSchedule:
    """Cosine schedule shifted by 2 log(reference / resolution): larger pictures get more noise."""
    return cosine(shift=2 * math.log(reference / resolution))


def interpolated(
    shift_low: float = 0.0,
    shift_high: float = 0.0,
    logsnr_min: float = LOGSNR_MIN,
    logsnr_max: float = LOGSNR_MAX,
) -> NoiseSchedule:
    """Moves linearly in t from one cosine shift at the clean end to another at the noisy end.

    λ(t) = cosine(t) + (1 − t) shift_low + t shift_high; `shift_low` rules fine detail, `shift_high` layout.

    Source: Hoogeboom et al., "simple diffusion", 2023, section 3.1 (interpolated schedule).

    Raises:
        ValueError: if the shifts would make λ increase somewhere.
    """
    base = cosine(0.0, logsnr_min, logsnr_max)

    def to_logsnr(t: Tensor) -> Tensor:
        return base(t) + (1 - t) * shift_low + t * shift_high

    probe = to_logsnr(torch.linspace(0, 1, 2001, dtype=torch.float64))
    if not bool((probe.diff() < 0).all()):
        raise ValueError(
            f"interpolated schedule with shift_low={shift_low}, shift_high={shift_high} is not decreasing; "
            "bring the two shifts closer (shift_high − shift_low below about 2π)"
        )
    options = dict(shift_low=shift_low, shift_high=shift_high, logsnr_min=logsnr_min, logsnr_max=logsnr_max)
    return NoiseSchedule("interpolated", options, to_logsnr, _bisect(to_logsnr))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> NoiseSchedule:
    """EDM's sampling grid: σ(t)^(1/ρ) linear in t, λ = −2 log σ.

    Args:
        sigma_min: noise-to-signal ratio σ/α at t = 0.
        sigma_max: the same at t = 1.
        rho: how much the grid dwells on low noise; 7 in EDM.

    Source: Karras et al. 2022, eq. 5.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def to_logsnr(t: Tensor) -> Tensor:
        return -2 * rho * torch.log(low + t * (high - low))

    def to_time(logsnr: Tensor) -> Tensor:
        return (torch.exp(-logsnr / (2 * rho)) - low) / (high - low)

    return NoiseSchedule("edm", dict(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho), to_logsnr, to_time)


def geometric(sigma_min: float = 0.01, sigma_max: float = 1348.0) -> NoiseSchedule:
    """σ(t) = σ_min (σ_max/σ_min)^t of the variance-exploding process x + σ ε.

    Args:
        sigma_min: σ(0).
        sigma_max: σ(1).

    Source: Song et al. 2021 ("Score-based generative modeling through SDEs"), appendix C.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    first, last = -2 * math.log(sigma_min), -2 * math.log(sigma_max)
    return NoiseSchedule(
        "geometric",
        {"sigma_min": sigma_min, "sigma_max": sigma_max},
        lambda t: first + (last - first) * t,
        lambda logsnr: (logsnr - first) / (last - first),
    )


def rectified_flow(
    shift: float = 1.0, logsnr_min: float = LOGSNR_MIN, logsnr_max: float = LOGSNR_MAX
) -> NoiseSchedule:
    """Rectified flow, z ∝ (1 − t′) x + t′ ε with t′ = shift·t / (1 + (shift − 1) t), ends cut as in `cosine`.

    Args:
        shift: SD3's time shift; above 1 means more noise.
        logsnr_min: λ(1) before the shift.
        logsnr_max: λ(0) before the shift.

    Source: Liu et al. 2022; Esser et al. 2024, eq. 23. The time shift only subtracts 2 log(shift) from λ.
    """
    start, end = 1 / (1 + math.exp(logsnr_max / 2)), 1 / (1 + math.exp(logsnr_min / 2))
    offset = 2 * math.log(shift)

    def to_logsnr(t: Tensor) -> Tensor:
        time = start + t * (end - start)
        return 2 * torch.log((1 - time) / time) - offset

    def to_time(logsnr: Tensor) -> Tensor:
        return (torch.sigmoid(-(logsnr + offset) / 2) - start) / (end - start)

    options = dict(shift=shift, logsnr_min=logsnr_min, logsnr_max=logsnr_max)
    return NoiseSchedule("rectified_flow", options, to_logsnr, to_time)


def tabulated(
    betas: Sequence[float], logsnr_min: float = TABLE_LOGSNR_MIN, logsnr_max: float = LOGSNR_MAX
) -> NoiseSchedule:
    """A discrete DDPM schedule made continuous: t = (i + 1)/T is the table's step i, linear in λ in between.

    So k equal steps from t = 1 land on diffusers' "trailing" timesteps, and t = 0 is clean data
    (`logsnr_max`, or a little above the table's cleanest entry if that is higher).

    Args:
        betas: T numbers in [0, 1]; a last 1 (zero terminal SNR) becomes `logsnr_min`.
        logsnr_min: floor of λ.
        logsnr_max: λ(0).

    Raises:
        ValueError: if betas is empty or leaves [0, 1], or the resulting λ does not decrease.
    """
    beta = torch.as_tensor(betas, dtype=torch.float64)
    if beta.ndim != 1 or len(beta) == 0 or not bool(((beta >= 0) & (beta <= 1)).all()):
        raise ValueError(f"betas must be a non-empty list of numbers in [0, 1], got {list(betas)[:5]}…")
    alpha_bar = torch.cumprod(1 - beta, 0)
    logsnr = (alpha_bar.log() - torch.log1p(-alpha_bar)).clamp(min=logsnr_min)
    table = torch.cat([logsnr[:1].add(1e-3).clamp(min=logsnr_max), logsnr])
    if not bool((table.diff() < 0).all()):
        raise ValueError(
            f"betas give a logSNR that does not decrease everywhere (or sinks below {logsnr_min} early)"
        )
    times = torch.linspace(0, 1, len(table), dtype=torch.float64)

    @functools.cache  # a copy to a GPU waits for it
    def on(device: torch.device) -> tuple[Tensor, Tensor]:
        return times.to(device), table.to(device)

    def interpolate(query: Tensor, grid: Tensor, values: Tensor) -> Tensor:
        query64 = query.double().contiguous()
        right = torch.searchsorted(grid, query64).clamp(1, len(grid) - 1)
        left = right - 1
        fraction = (query64 - grid[left]) / (grid[right] - grid[left])
        return torch.lerp(values[left], values[right], fraction).to(query.dtype)

    def to_logsnr(t: Tensor) -> Tensor:
        return interpolate(t, *on(t.device))

    def to_time(logsnr: Tensor) -> Tensor:
        times, table = on(logsnr.device)
        return interpolate(logsnr, table.flip(0), times.flip(0))

    options = dict(betas=[float(b) for b in beta], logsnr_min=logsnr_min, logsnr_max=logsnr_max)
    return NoiseSchedule("tabulated", options, to_logsnr, to_time)


def cut(schedule: NoiseSchedule, logsnr_min: float, multiple: int = 1) -> NoiseSchedule:
    """The same schedule without what lies below `logsnr_min`: λ(t · t_cut), t_cut the time of that λ.

    A sampler then begins at λ = logsnr_min, with noise of variance 1 for z. Where that λ is low enough for
    the size of the pictures, nothing is lost, and no steps are spent where z tells nothing of x.

    Args:
        schedule: any but `interpolated`; returned as it is if it does not reach below.
        logsnr_min: the new λ(1). A table ends with its last entry that is not below.
        multiple: a table keeps a multiple of so many entries, so that as many steps still land on entries.

    Raises:
        ValueError: if nothing would be left, or the schedule cannot be cut.
    """
    first, last = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    if logsnr_min <= last:
        return schedule
    options = dict(schedule.options)
    if schedule.name == "tabulated":
        betas = options["betas"]
        times = torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas)
        kept = int((schedule(times) >= logsnr_min).sum())
        options["betas"] = betas[: kept - kept % multiple]
    elif schedule.name == "edm":
        options["sigma_max"] = math.exp(-logsnr_min / 2)
    elif schedule.name in ("cosine", "rectified_flow"):
        offset = options["shift"] if schedule.name == "cosine" else -2 * math.log(options["shift"])
        options["logsnr_min"] = logsnr_min - offset
    else:
        raise ValueError(f"the schedule {schedule.name} cannot be cut at logSNR {logsnr_min}")
    if logsnr_min >= first or options.get("betas") == []:
        raise ValueError(f"nothing of the schedule {schedule.name} lies above logSNR {logsnr_min}")
    return build(schedule.name, **options)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "cosine": cosine,
    "interpolated": interpolated,
    "edm": edm,
    "geometric": geometric,
    "rectified_flow": rectified_flow,
    "tabulated": tabulated,
}


def build(name: str, **options: Any) -> NoiseSchedule:
    """Make a schedule by name; the inverse of (`schedule.name`, `schedule.options`).

    Raises:
        ValueError: if the name is unknown or an option does not belong to it.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**options)
    except TypeError as error:
        raise ValueError(f"noise schedule {name!r} does not take {options}: {error}") from None


def _bisect(to_logsnr: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Invert a decreasing function on [0, 1] by 60 halvings in float64."""

    def to_time(logsnr: Tensor) -> Tensor:
        target = logsnr.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            too_clean = to_logsnr(middle) > target
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return ((low + high) / 2).to(logsnr.dtype)

    return to_time
