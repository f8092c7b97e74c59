"""Labelled pictures in memory, split into what training may see and what it may not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momatch.files import fingerprint


@dataclass(frozen=True, repr=False)
class ImageSet:
    """Pictures with labels.

    Attributes:
        images: (N, C, H, W) float32 in [−1, 1].
        labels: (N,) int64 in 0 … num_classes − 1.
        num_classes: how many labels there are.
        name: how tables and reports call this set.
        classifier: the built-in classifier that was trained on these very pictures, by name; None if none.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str
    classifier: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        """One line instead of all pixels."""
        shape = tuple(self.images.shape[1:])
        return f"ImageSet({self.name!r}, {len(self)} pictures of shape {shape}, {self.num_classes} classes)"

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these pictures and labels from others."""
        return fingerprint({"images": self.images, "labels": self.labels})

    def subset(self, indices: Tensor, name: str) -> ImageSet:
        """The pictures at `indices` (M,) int64, under another name."""
        return replace(self, images=self.images[indices], labels=self.labels[indices], name=name)


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
    return _split(images, torch.cat(train), torch.cat(heldout))


def random_split(images: ImageSet, heldout_fraction: float, seed: int) -> Split:
    """Hold out a fraction of all pictures, whatever their class, chosen by `seed`."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = round(len(images) * heldout_fraction)
    return _split(images, order[count:], order[:count])


def _split(images: ImageSet, train: Tensor, heldout: Tensor) -> Split:
    return Split(
        images.subset(train.sort().values, f"{images.name}-train"),
        images.subset(heldout.sort().values, f"{images.name}-heldout"),
    )
