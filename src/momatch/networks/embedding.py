"""What every network here shares: the embedding of (logSNR, label), and layers that start at zero."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Conditioning(nn.Module):
    """Embeds (logSNR, label, step count) into one activated vector of width `dim` per sample.

    Label `num_classes` is the null label; a call without labels means the null label for the whole batch. An
    elastic network, which has `step_counts`, also embeds log₂ of the count k that it is sampled with. That
    branch starts at zero, so with the weights of a network without it, it says the same at every k; a call
    without a count leaves it out.
    """

    frequencies: Tensor
    step_frequencies: Tensor

    def __init__(self, dim: int, num_classes: int, step_counts: tuple[int, ...] = ()):
        super().__init__()
        self.num_classes = num_classes
        # Half-periods from about 60 (wider than any range of logSNR in use) down to about 0.5.
        self.register_buffer(
            "frequencies", torch.logspace(math.log10(0.05), math.log10(6.0), dim // 2), persistent=False
        )
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.steps = zero_init(nn.Linear(dim, dim)) if step_counts else None
        # Half-periods from 6 (log₂ k is 0 to 4) down to 0.4: 15 and 16 differ by 0.09.
        spread = torch.logspace(math.log10(0.5), math.log10(8.0), dim // 2)
        self.register_buffer("step_frequencies", spread, persistent=False)

    def forward(self, logsnr: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """(logsnr (B,), cond with "label" and "steps", each (B,), or None) → (B, dim)."""
        cond = cond or {}
        h = self.linear1(_waves(logsnr, self.frequencies))
        if self.steps is not None and "steps" in cond:
            h = h + self.steps(_waves(cond["steps"].to(logsnr.dtype).log2(), self.step_frequencies))
        h = self.linear2(F.silu(h))
        if self.label is not None:
            label = cond.get("label")
            if label is None:
                label = torch.full(logsnr.shape, self.num_classes, device=logsnr.device)
            h = h + self.label(label)
        return F.silu(h)


def _waves(values: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines: (B,) → (B, 2 · frequencies)."""
    angles = values[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer: Layer) -> Layer:
    """Zero a layer's weights and bias, so that its branch starts as a no-op."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
