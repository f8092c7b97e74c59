"""A residual network for vectors, conditioned on the log signal-to-noise ratio and on a class label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.networks.configs import MLPConfig
from momatch.networks.embedding import Conditioning, zero_init


class MLP(nn.Module):
    """(z, logsnr, cond) → tensor of z's shape. The output layer starts at zero."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        self.conditioning = Conditioning(config.embedding_dim, config.num_classes, config.step_counts)
        self.stem = nn.Linear(config.dim, config.width)
        self.blocks = nn.ModuleList(
            ResidualBlock(config.width, config.embedding_dim) for _ in range(config.depth)
        )
        self.linear_out = zero_init(nn.Linear(config.width, config.dim))

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, D).
            logsnr: (B,).
            cond: {"label": (B,) int64} for a class-conditional network; None means the null label.
        """
        embedding = self.conditioning(logsnr, cond)
        h = self.stem(z)
        for block in self.blocks:
            h = block(h, embedding)
        return self.linear_out(F.silu(h))


class ResidualBlock(nn.Module):
    """SiLU–linear twice, what lies between scaled and shifted by the embedding."""

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.modulation = nn.Linear(embedding_dim, 2 * width)
        self.linear2 = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width), (B, embedding_dim) → (B, width)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        h = torch.addcmul(shift, self.linear1(F.silu(x)), 1 + scale)
        return x + self.linear2(F.silu(h))
