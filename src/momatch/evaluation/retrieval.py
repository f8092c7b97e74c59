"""Do pictures show what was asked for? The share whose own caption fits them best, among all captions asked.

Judged by a small network that ships with the package, trained on the training emoji and their captions. Its
score on real held-out pictures, which it has never seen, is a scale to read others by, not their ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from momatch.data.emoji import FOLDER, MASK, TOKENS
from momatch.data.rows import Rows
from momatch.networks.matcher import Matcher
from momatch.utils import files

WEIGHTS = FOLDER / "matcher.safetensors"
SIDE = 16  # that the network was trained at; larger pictures are averaged down


class CaptionRetrieval:
    """A classifier whose classes are captions: it names the one that fits a picture best.

    Args:
        conditions: encoder_hidden_states (M, L, 128) and encoder_attention_mask (M, L) of the captions.
        weights: of the network.
    """

    name = "emoji-matcher"
    metric = "retrieval_accuracy"

    def __init__(self, conditions: Mapping[str, Tensor | Rows], weights: Path = WEIGHTS):
        self._matcher = load_matcher(weights)
        with torch.no_grad():
            self._captions = self._matcher.captions(conditions[TOKENS][:], conditions[MASK][:])

    def predict(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] → which caption, (B,)."""
        return self.scores(images).argmax(1)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] → how well each caption fits, (B, M), −1 to 1."""
        side = min(SIDE, images.shape[-1])
        return self._matcher.pictures(F.adaptive_avg_pool2d(images.float().cpu(), side)) @ self._captions.T


def load_matcher(weights: Path = WEIGHTS) -> Matcher:
    """The network that ships with the package."""
    with torch.random.fork_rng(devices=[]):
        matcher = Matcher()
    matcher.load_state_dict(files.shipped_tensors(weights))
    return matcher.eval()
