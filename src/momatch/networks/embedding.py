"""What every network here shares: the embedding of (logSNR, label), and layers that start at zero."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Conditioning(nn.Module):
    """Embeds (logSNR, label) into one activated vector of width `dim` per sample.

    Label `num_classes` is the null label; a call without `cond` means the null label for the whole batch.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        # Half-periods from about 60 (wider than any range of logSNR in use) down to about 0.5.
        self.register_buffer(
            "frequencies", torch.logspace(math.log10(0.05), math.log10(6.0), dim // 2), persistent=False
        )
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None

    def forward(self, logsnr: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """(logsnr (B,), cond {"label": (B,)} or None) → (B, dim)."""
        angles = logsnr[:, None] * self.frequencies
        h = self.linear2(F.silu(self.linear1(torch.cat([angles.sin(), angles.cos()], dim=1))))
        if self.label is not None:
            label = (
                cond["label"] if cond else torch.full(logsnr.shape, self.num_classes, device=logsnr.device)
            )
            h = h + self.label(label)
        return F.silu(h)


def zero_init(layer: Layer) -> Layer:
    """Zero a layer's weights and bias, so that its branch starts as a no-op."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
