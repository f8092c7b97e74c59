"""A residual network for vectors, conditioned on the log signal-to-noise ratio and on a class label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.networks.configs import MLPConfig
from momatch.networks.embedding import Conditioning, zero_init
from momatch.utils.errors import UsageError


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
        width = config.embedding_dim
        self.asked = (
            nn.Sequential(nn.Linear(config.cond_dim, width), nn.SiLU(), nn.Linear(width, width))
            if config.conditions
            else None
        )

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, D), or (B, …) of D numbers.
            logsnr: (B,).
            cond: {"label": (B,) int64} for a class-conditional network, None meaning the null label; of
                further conditions (B, …) each.

        Returns:
            As z.

        Raises:
            UsageError: if a condition is missing.
        """
        embedding = self.conditioning(logsnr, cond)
        if self.asked is not None:
            missing = [name for name in self.config.conditions if not cond or name not in cond]
            if missing or not cond:
                raise UsageError(f"this network must be given {' and '.join(missing)} in cond")
            given = [cond[name].to(z).flatten(1) for name in self.config.conditions]
            embedding = embedding + self.asked(torch.cat(given, dim=1))
        h = self.stem(z.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.linear_out(F.silu(h)).view(z.shape)


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
