"""U-ViT: convolutions where the picture is large, a transformer at the bottom; without the former, a DiT.

Tokens of encoded text, if the network takes any, stand in the transformer's sequence beside the picture's.

Source: Hoogeboom et al., "simple diffusion", 2023 (U-ViT); Peebles & Xie 2023 (DiT, adaLN-zero). The network
of the moment-matching paper is of this family.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.networks.configs import UViTConfig
from momatch.networks.embedding import Conditioning, zero_init
from momatch.networks.unet import ResidualBlock

HEAD_DIM = 64


class UViT(nn.Module):
    """(z, logsnr, cond) → tensor of z's shape. The output convolution starts at zero."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        widths, n, dim = config.channels, config.blocks_per_level, config.embedding_dim
        self.conditioning = Conditioning(dim, config.num_classes, config.step_counts)
        self.text = TextInput(config.text_dim, config.width, dim) if config.text_dim else None
        top = widths[0] if widths else config.width

        def level(width_in: int, width: int) -> nn.ModuleList:
            inputs = [width_in] + [width] * (n - 1)
            return nn.ModuleList(ResidualBlock(w, width, dim, config.dropout) for w in inputs)

        self.stem = nn.Conv2d(config.image_channels, top, 3, padding=1)
        self.down_levels = nn.ModuleList(
            level(widths[max(i - 1, 0)], width) for i, width in enumerate(widths)
        )
        bottom_in = widths[-1] if widths else top
        self.to_tokens = nn.Conv2d(bottom_in, config.width, config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, dim, config.dropout) for _ in range(config.depth)
        )
        self.norm_tokens = nn.LayerNorm(config.width)
        self.from_tokens = nn.ConvTranspose2d(
            config.width, bottom_in, config.patch_size, stride=config.patch_size
        )
        below = (*widths[1:], bottom_in)
        self.up_levels = nn.ModuleList(
            level(width + width_below, width) for width, width_below in zip(widths, below, strict=False)
        )
        self.norm_out = nn.GroupNorm(8, top)
        self.conv_out = zero_init(nn.Conv2d(top, config.image_channels, 3, padding=1))
        for parameter in self.parameters():  # faster convolutions, as in UNet
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, C, H, W), H and W divisible by patch_size · 2 ** len(channels).
            logsnr: (B,).
            cond: {"label": (B,) int64} for a class-conditional network, {"encoder_hidden_states":
                (B, L, text_dim), "encoder_attention_mask": (B, L), 1 for a token and 0 for padding, or no
                mask} for one that takes text, all of them for both; None means the null label, and no text.
        """
        embedding = self.conditioning(logsnr, cond)
        text = seen = None
        if self.text is not None and cond is not None and "encoder_hidden_states" in cond:
            encoded = cond["encoder_hidden_states"]
            seen = cond.get("encoder_attention_mask", encoded.new_ones(encoded.shape[:2])).bool()
            text, summary = self.text(encoded, seen)
            embedding = embedding + summary
        h = self.stem(z)
        skips: list[Tensor] = []
        for blocks in self.down_levels:
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
            skips.append(h)
            h = F.avg_pool2d(h, 2)

        tokens = self.to_tokens(h)
        batch, width, height, breadth = tokens.shape
        x = tokens.flatten(2).transpose(1, 2) + positions(height, breadth, width, tokens)
        if text is not None and seen is not None:
            x = torch.cat([x, text], dim=1)
            seen = F.pad(seen, (height * breadth, 0), value=True)
        for block in self.blocks:
            x = block(x, embedding, seen)
        x = self.norm_tokens(x[:, : height * breadth]).transpose(1, 2).reshape(batch, width, height, breadth)
        h = h + self.from_tokens(x)

        for blocks in reversed(self.up_levels):
            h = torch.cat([skips.pop(), F.interpolate(h, scale_factor=2.0, mode="nearest")], dim=1)
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


class TextInput(nn.Module):
    """Brings tokens of text to the transformer's width, and their mean to the embedding's."""

    def __init__(self, text_dim: int, width: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.to_tokens = nn.Linear(text_dim, width)
        self.to_summary = nn.Linear(text_dim, embedding_dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, text_dim), (B, L) → (B, L, width), (B, embedding_dim); no token at all gives a zero mean."""
        tokens = self.norm(tokens)
        present = mask.to(tokens.dtype)[:, :, None]
        mean = (tokens * present).sum(1) / present.sum(1).clamp(min=1)
        return self.to_tokens(tokens), self.to_summary(mean)


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each scaled, shifted and gated by the embedding; starts as the identity."""

    def __init__(self, width: int, embedding_dim: int, dropout: float):
        super().__init__()
        self.num_heads = max(width // HEAD_DIM, 1)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_q = nn.LayerNorm(width // self.num_heads)  # normed queries and keys keep attention stable
        self.norm_k = nn.LayerNorm(width // self.num_heads)
        self.modulation = zero_init(nn.Linear(embedding_dim, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor, seen: Tensor | None = None) -> Tensor:
        """(x (B, N, width), embedding (B, embedding_dim), tokens to attend to (B, N) bool) → x's shape."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1), seen)
        h = F.gelu(self.mlp_in(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))
        return x + gate2 * self.mlp_out(self.dropout(h))

    def attention(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Multi-head self-attention over tokens (B, N, width); `seen` (B, N) says to which, all if None."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mask = None if seen is None else seen[:, None, None]
        h = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, mask)
        return self.project(h.transpose(1, 2).reshape(batch, count, width))


def positions(height: int, breadth: int, width: int, like: Tensor) -> Tensor:
    """(height·breadth, width) sines and cosines of row and column, in `like`'s dtype and device."""
    quarter = width // 4
    frequencies = 10_000 ** (-torch.arange(quarter, device=like.device, dtype=like.dtype) / quarter)
    rows, columns = (
        torch.arange(n, device=like.device, dtype=like.dtype)[:, None] * frequencies
        for n in (height, breadth)
    )
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in (rows, columns))
    shape = (height, breadth, 2 * quarter)
    return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=2).flatten(0, 1)
