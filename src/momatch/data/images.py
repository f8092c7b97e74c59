"""Pictures, or latents of pictures, with what can be asked of them; split into training set and held-out set.

Pictures, latents and conditions are tensors, or `Rows` where they are too many to hold as float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from momatch.data.captions import take_captions
from momatch.data.rows import Rows, Shards, take
from momatch.utils.files import fingerprint

KINDS = {
    "pixels": "pictures",
    "latents": "latents",
    "vectors": "vectors",
    "tokens": "tokens",
}  # what sentences call them


@dataclass(frozen=True, repr=False)
class ImageSet:
    """Pictures with labels, and with further conditions if there are any.

    Attributes:
        images: (N, C, H, W) float32: pictures in [−1, 1], or latents; (N, …) vectors or trajectories.
        labels: (N,) int64 in 0 … num_classes − 1.
        num_classes: how many labels there are; 1 for pictures without classes.
        name: how tables and reports call this set.
        classifier: the built-in classifier that was trained on these very pictures, by name; None if none.
        conditions: (N, …) each: what else a model can be asked, under diffusers' own argument names, such as
            encoder_hidden_states.
        null_condition: the part of one sample of each condition, when nothing is asked for.
        captions: N texts, or None.
        space: what `images` are: "pixels", "latents", "vectors" (whatever is no picture) or "tokens".
        origin: of prepared data: the pipeline and the settings that they were made with; JSON types only.
        class_names: the classes in the order of their labels; empty if they have no names.
        vocabulary: what each token stands for, see `momatch.data.tokens`; empty if that is not known.
    """

    images: Tensor | Rows
    labels: Tensor
    num_classes: int
    name: str
    classifier: str | None = None
    conditions: Mapping[str, Tensor | Rows] = field(default_factory=dict)
    null_condition: Mapping[str, Tensor] = field(default_factory=dict)
    captions: Sequence[str] | None = None
    space: Literal["pixels", "latents", "vectors", "tokens"] = "pixels"
    origin: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        """One line instead of all pixels."""
        shape, what = tuple(self.images.shape[1:]), KINDS[self.space]
        asked = ", ".join([f"{self.num_classes} classes", *self.conditions])
        return f"ImageSet({self.name!r}, {len(self)} {what} of shape {shape}, {asked})"

    @property
    def on_disk(self) -> bool:
        """Whether rows are read from files when they are asked for, not held in memory."""
        return any(isinstance(table, Shards) for table in (self.images, *self.conditions.values()))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these pictures, labels and conditions from others.

        Of pictures and latents in shards a sample is read, see `Shards.evidence`.
        """
        nulls = {f"null {name}": row for name, row in self.null_condition.items()}
        tables = {"images": self.images, "labels": self.labels, **self.conditions, **nulls}
        return fingerprint({k: v.evidence() if isinstance(v, Rows) else v for k, v in tables.items()})

    def subset(self, indices: Tensor, name: str) -> ImageSet:
        """The pictures at `indices` (M,) int64, under another name."""
        return replace(
            self,
            images=take(self.images, indices),
            labels=self.labels[indices],
            conditions={key: take(rows, indices) for key, rows in self.conditions.items()},
            captions=take_captions(self.captions, indices),
            name=name,
        )


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
