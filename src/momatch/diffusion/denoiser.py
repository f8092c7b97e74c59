"""A denoiser is anything that maps (z, logsnr, cond) to an estimate of E[x | z].

Plain networks, adapted pretrained models, guided models and exact mixtures are all `Denoiser`s, and no
algorithm can tell them apart. `cond` is a dict of tensors whose first dimension is the batch, or None; a
denoiser knows its own null condition, the one that stands for "nothing asked for".
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from momatch.diffusion import conventions, process
from momatch.diffusion.conventions import TimeConvention
from momatch.diffusion.interface import Cond
from momatch.diffusion.precision import Precision
from momatch.diffusion.process import per_sample


class Denoiser(nn.Module):
    """A network read as a denoiser.

    Attributes:
        network: (z (B, …), time (B,), cond) → tensor of z's shape.
        prediction: what the network's output stands for: x, eps, v, flow or edm.
        null_values: what each entry of cond holds when nothing is asked for: a number, e.g. {"label": 10}, or
            the tensor of one sample, such as the embedding of an empty prompt. Empty if the network takes no
            condition, or knows none that means nothing.
        time: the network's clock and scale of z; λ and momatch's own by default.
        sigma_data: of prediction "edm".
        clip: the estimate is kept in ± this, as many samplers of pixels do: where α is small, an ε-network's
            errors are amplified 1/α-fold. Derivatives pass as if nothing were clipped, or the network could
            not find its way back. None does not clip.
        precision: of the network's arithmetic: "bfloat16" is torch's autocast, from float32 weights and back
            to float32; "tf32" is for whoever drives it to allow (`precision.tf32`), since a backward pass
            needs it, too. What stands around the network is float32 in any case.
    """

    precision: Precision = "float32"

    def __init__(
        self,
        network: nn.Module,
        prediction: process.Prediction = "v",
        null_values: Mapping[str, float | Tensor] | None = None,
        time: TimeConvention | None = None,
        sigma_data: float = process.SIGMA_DATA,
        clip: float | None = None,
    ):
        super().__init__()
        self.network = network
        self.prediction: process.Prediction = prediction
        self.null_values = dict(null_values or {})
        self.time = time or conventions.logsnr()
        self.sigma_data = sigma_data
        self.clip = clip

    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Estimate x: z (B, …), logsnr (B,), cond or None (nothing asked for) → (B, …)."""
        return self.in_range(self.estimate(z, logsnr, self.time.to_time(logsnr), cond))

    def estimate(self, z: Tensor, logsnr: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        """`forward` without the clip, for a caller that has read the network's clock already: time (B,)."""
        if cond is None and self.null_values:
            cond = self.null_batch(len(z), z.device)
        seen = z
        if self.time.input_scale is not None:
            seen = z * per_sample(self.time.input_scale(logsnr).to(z.dtype), z)
        if self.time.input_shift:
            seen = seen + self.time.input_shift
        low = self.precision == "bfloat16"
        with torch.autocast(z.device.type, torch.bfloat16) if low else nullcontext():
            output = self.network(seen, time, cond)
        return process.to_x(output.to(z.dtype), z, logsnr, self.prediction, self.sigma_data)

    def in_range(self, x: Tensor) -> Tensor:
        """X (B, …) kept in ± clip, with the derivatives of x itself, forward and backward."""
        if self.clip is None:
            return x
        # an infinite x less itself is nan, hence nan_to_num; everywhere else that difference is 0
        return x.detach().clamp(-self.clip, self.clip) + (x - x.detach()).nan_to_num()

    def in_precision(self, precision: Precision) -> Denoiser:
        """The same weights, used in another precision; this denoiser stays as it is."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def fitting(self, count: int) -> int:
        """Samples that a call may take, where `count` fit into the memory that is free here."""
        return count

    @property
    def unwrapped(self) -> Denoiser:
        """The denoiser without guidance or clipping around it; this one, if there is none."""
        return self

    def null_cond(self, cond: Cond) -> Cond:
        """The null condition, in the shapes of `cond`.

        Raises:
            ValueError: if `cond` has an entry for which this denoiser knows no null value, or one of another
                shape.
        """
        unknown = sorted(set(cond) - set(self.null_values))
        if unknown:
            raise ValueError(
                f"this model has no null condition for {unknown}; it knows {sorted(self.null_values)}"
            )
        return {key: _null_like(key, self.null_values[key], value) for key, value in cond.items()}

    def null_batch(self, size: int, device: torch.device) -> Cond:
        """The null condition for `size` samples."""
        values = {key: _on(device, value) for key, value in self.null_values.items()}
        return {key: value.expand(size, *value.shape) for key, value in values.items()}


def _on(device: torch.device, value: float | Tensor) -> Tensor:
    """A value on a device; a number gets there without a copy, which would wait for the GPU."""
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


def _null_like(name: str, null: float | Tensor, value: Tensor) -> Tensor:
    if isinstance(null, Tensor):
        if null.shape != value.shape[1:]:
            raise ValueError(
                f"{name} has shape (B, *{tuple(value.shape[1:])}), its null condition {tuple(null.shape)}; "
                "guidance needs both alike"
            )
        return null.to(value).expand(value.shape)
    return torch.full_like(value, null)


class Wrapper(Denoiser):
    """A denoiser that changes what another one says; knows its null condition and prediction type."""

    def __init__(self, denoiser: Denoiser):
        # Not Denoiser's own __init__: the network must be registered once, or torch.func.functional_call,
        # which swaps parameters module by module, would leave it changed.
        nn.Module.__init__(self)
        self.denoiser = denoiser
        self.prediction: process.Prediction = denoiser.prediction
        self.null_values = denoiser.null_values
        self.time, self.sigma_data, self.clip = denoiser.time, denoiser.sigma_data, denoiser.clip

    def in_precision(self, precision: Precision) -> Denoiser:
        """As Denoiser's own, through all wrappers."""
        other = copy.copy(self)
        other._modules = {"denoiser": self.denoiser.in_precision(precision)}  # a copy shares its modules
        other.precision = precision
        return other

    @property
    def unwrapped(self) -> Denoiser:
        """The denoiser at the core."""
        return self.denoiser.unwrapped


class Guided(Wrapper):
    """Classifier-free guidance: (1 + scale) g(z, c) − scale g(z, ∅), inside an interval of logSNR.

    One call of the wrapped network, on a batch of twice the size.

    Attributes:
        scale: 0 means no guidance.
        interval: (lowest, highest) λ at which guidance acts; outside, the conditional estimate is returned.

    Source: Ho & Salimans 2022; interval: Kynkäänniemi et al. 2024.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        if interval is not None and interval[0] >= interval[1]:
            raise ValueError(f"guidance interval {interval} is empty; give (lowest, highest) logSNR")
        super().__init__(denoiser)
        self.scale, self.interval = scale, interval

    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Guided estimate of x; without a condition there is nothing to guide towards."""
        if not cond:
            return self.denoiser(z, logsnr, cond)
        null = self.denoiser.null_cond(cond)
        both = {key: torch.cat([value, null[key]]) for key, value in cond.items()}
        zs, logsnrs = torch.cat([z, z]), torch.cat([logsnr, logsnr])
        if self.clip is None:
            x_cond, x_null = self.denoiser(zs, logsnrs, both).chunk(2)
        else:  # the clip comes last, as in samplers
            times = self.time.to_time(logsnrs)
            x_cond, x_null = self.denoiser.estimate(zs, logsnrs, times, both).chunk(2)
        scale = torch.full_like(logsnr, self.scale)
        if self.interval is not None:
            scale = scale * ((logsnr >= self.interval[0]) & (logsnr <= self.interval[1]))
        factor = per_sample(1 + scale, z).to(z.dtype)
        return self.in_range(torch.lerp(x_null, x_cond, factor))


class Thresholded(Wrapper):
    """Dynamic thresholding of another denoiser's estimates, which strong guidance drives out of range.

    Each sample is clipped to the given percentile of |x| and divided by it, where that exceeds 1: contrast is
    kept rather than saturated. (Static thresholding is `Denoiser.clip`.)

    Source: Saharia et al. 2022 (Imagen), section 2.3.
    """

    def __init__(self, denoiser: Denoiser, percentile: float = 0.995):
        super().__init__(denoiser)
        self.percentile = percentile

    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """The other's estimate, in [−1, 1]."""
        x = self.denoiser(z, logsnr, cond)
        reach = torch.quantile(x.detach().abs().flatten(1).float(), self.percentile, dim=1).clamp(min=1)
        reach = per_sample(reach.to(x.dtype), x)
        return torch.minimum(torch.maximum(x, -reach), reach) / reach


def denoisers(modules: Iterable[nn.Module]) -> Iterator[Denoiser]:
    """All denoisers in these modules, wrapped ones too."""
    return (part for module in modules for part in module.modules() if isinstance(part, Denoiser))
