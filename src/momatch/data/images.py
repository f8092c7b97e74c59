"""Labelled pictures in memory, split into what training may see and what it may not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Pictures with labels.

    Attributes:
        images: (N, C, H, W) float32 in [−1, 1].
        labels: (N,) int64 in 0 … num_classes − 1.
        num_classes: how many labels there are.
        name: how tables and reports call this set.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor, name: str) -> ImageSet:
        """The pictures at `indices` (M,) int64, under another name."""
        return ImageSet(self.images[indices], self.labels[indices], self.num_classes, name)


@dataclass(frozen=True)
class Split:
    """A training set and a held-out set that no training sees (neither teacher, student nor classifier)."""

    train: ImageSet
    heldout: ImageSet


def stratified_split(images: ImageSet, heldout_fraction: float, seed: int) -> Split:
    """Hold out the same fraction of every class, chosen by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    train, heldout = [], []
    for label in range(images.num_classes):
        members = (images.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(len(members) * heldout_fraction)
        heldout.append(members[:count])
        train.append(members[count:])
    return Split(
        images.subset(torch.cat(train).sort().values, f"{images.name}-train"),
        images.subset(torch.cat(heldout).sort().values, f"{images.name}-heldout"),
    )
