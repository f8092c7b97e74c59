"""Training the small network that tells which caption a picture belongs to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.data.emoji import MASK, TOKENS
from momatch.methods.base import Batch, Method, Update
from momatch.networks.matcher import Matcher


class Contrastive(Method):
    """Cross-entropy of the right caption among a minibatch's, and of the right picture (Radford et al. 2021).

    Args:
        matcher: the network; its role is "matcher".
        noise_std: standard deviation of the Gaussian noise added to each picture, against overfitting.
        shift: pictures are moved by up to so many pixels each way, white coming in from the edge.
    """

    def __init__(self, matcher: Matcher, noise_std: float = 0.1, shift: int = 1):
        self.matcher, self.noise_std, self.shift = matcher, noise_std, shift

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch; the same at every step."""
        if batch.cond is None:
            raise ValueError("a matcher needs captions")
        dx, dy = (batch.uniform(rows=2)[:, 0] * (2 * self.shift + 1)).long().sub(self.shift).tolist()
        x = moved(batch.x, dx, dy) + self.noise_std * batch.normal()
        pictures, captions = self.matcher(x, batch.cond[TOKENS], batch.cond[MASK])
        logits = pictures @ captions.T * self.matcher.scale.exp()
        right = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        accuracy = (logits.argmax(1) == right).float().mean()
        return Update({"matcher": loss}, lambda: {"loss": loss.detach(), "accuracy": accuracy})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"matcher": the network}."""
        return {"matcher": self.matcher}


def moved(x: Tensor, dx: int, dy: int) -> Tensor:
    """Pictures (B, C, H, W) moved by (dx, dy) pixels; 1, which is white, comes in from the edge."""
    return F.pad(x, (dx, -dx, dy, -dy), value=1.0)
