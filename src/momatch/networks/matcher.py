"""Pictures and captions to one space: how well does a picture fit what it was asked to be?"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.networks.classifier import Classifier

FEATURE_DIM = 128


class Matcher(nn.Module):
    """Unit vectors of pictures, and of captions: their inner product says how well they fit.

    Args:
        token_dim: width of encoded captions.
        dim: of the common space.
        width: channels of the first convolutions.
    """

    def __init__(self, token_dim: int = 128, dim: int = 64, width: int = 32):
        super().__init__()
        self.vision = Classifier(3, dim, width, FEATURE_DIM)
        self.text = nn.Linear(token_dim, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def pictures(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] → (B, dim) of length 1."""
        return F.normalize(self.vision(images), dim=1)

    def captions(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token vectors (B, L, token_dim) and mask (B, L) → (B, dim) of length 1."""
        present = mask.to(tokens.dtype)[:, :, None]
        mean = (tokens * present).sum(1) / present.sum(1).clamp(min=1)
        return F.normalize(self.text(mean), dim=1)

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both, see `pictures` and `captions`."""
        return self.pictures(images), self.captions(tokens, mask)
