"""A small transformer for rows of tokens, conditioned on the noise level.

Before each block every token is given some of its neighbours, by a convolution of its own for each channel.
Without it a small network stays for thousands of steps at what single tokens say (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momatch.networks.configs import TokenTransformerConfig
from momatch.networks.embedding import Conditioning, zero_init
from momatch.networks.uvit import TransformerBlock, positions

REACH = 5  # tokens, itself in the middle


class TokenTransformer(nn.Module):
    """(z, logsnr, cond) → logits of z's shape. The output layer starts at zero: all tokens alike.

    So does that of a source of noise: a student that is given one begins as its teacher.
    """

    def __init__(self, config: TokenTransformerConfig):
        super().__init__()
        self.config = config
        self.conditioning = Conditioning(config.embedding_dim, config.num_classes, config.step_counts)
        self.tokens = nn.Linear(config.num_tokens, config.width, bias=False)
        self.positions = nn.Parameter(positions(config.length, 1, config.width, torch.zeros(())))
        self.noise = (
            zero_init(nn.Linear(config.noise_dim, config.width, bias=False)) if config.noise_dim else None
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.embedding_dim, config.dropout) for _ in range(config.depth)
        )
        self.neighbours = nn.ModuleList(
            nn.Conv1d(config.width, config.width, REACH, padding=REACH // 2, groups=config.width)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.logits = zero_init(nn.Linear(config.width, config.num_tokens))
        nn.init.normal_(self.tokens.weight)  # its inputs are one-hot

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, L, C) one-hot.
            logsnr: (B,).
            cond: {"label": (B,) int64} for a class-conditional network; {"noise": (B, L, noise_dim)} for one
                with a source of noise, which counts as 0 if it is left out.
        """
        h = self.tokens(z) + self.positions
        if self.noise is not None and cond is not None and "noise" in cond:
            h = h + self.noise(cond["noise"])
        embedding = self.conditioning(logsnr, cond)
        for neighbours, block in zip(self.neighbours, self.blocks, strict=True):
            h = block(h + neighbours(h.transpose(1, 2)).transpose(1, 2), embedding)
        return self.logits(self.norm(h))
