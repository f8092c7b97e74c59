"""A small convolutional classifier: the feature network of the built-in evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Logits, and the features one layer before them, for small pictures.

    Args:
        image_channels: channels of the picture.
        num_classes: number of logits.
        width: channels of the first convolutions.
        feature_dim: width of the penultimate layer, whose activations serve as features.
        dropout: rate before the last layer, in training.
    """

    def __init__(
        self,
        image_channels: int = 1,
        num_classes: int = 10,
        width: int = 32,
        feature_dim: int = 64,
        dropout: float = 0.3,
    ):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.hidden = nn.Linear(8 * width, feature_dim)
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [−1, 1] → (B, feature_dim)."""
        return F.silu(self.hidden(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [−1, 1] → (B, num_classes) logits."""
        return self.logits(self.dropout(self.features(images)))


class TokenClassifier(nn.Module):
    """Rows of tokens to logits: two convolutions, then mean and maximum over the row.

    Args:
        num_tokens: kinds of token.
        num_classes: number of classes.
        width: channels.
    """

    def __init__(self, num_tokens: int, num_classes: int, width: int = 48):
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width)
        self.conv1 = nn.Conv1d(width, width, 5, padding=2)
        self.conv2 = nn.Conv1d(width, width, 5, padding=2)
        self.logits = nn.Linear(2 * width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 → (B, num_classes)."""
        h = F.relu(self.conv2(F.relu(self.conv1(self.tokens(tokens).transpose(1, 2)))))
        return self.logits(torch.cat([h.mean(-1), h.amax(-1)], dim=1))
