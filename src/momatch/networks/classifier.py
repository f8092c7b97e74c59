"""A small convolutional classifier: the feature network of the built-in evaluation."""

from __future__ import annotations

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
