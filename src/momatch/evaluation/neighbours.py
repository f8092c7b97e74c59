"""Has the model learnt its training pictures by heart? Its nearest neighbours against those of held-out ones.

A model that copies makes pictures much nearer to the training set than fresh real pictures are. If generated
and held-out pictures follow one law, the ratio of the medians is 1 and the share below the held-out 1 %
quantile is 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from momatch.data.rows import Rows


@dataclass(frozen=True)
class NeighbourCheck:
    """Pixel distances (L2, in the pictures' own units) to the nearest training picture.

    Attributes:
        median_generated: median over generated pictures.
        median_held_out: median over held-out pictures.
        ratio: the first over the second; well below 1 means copying.
        share_close: share of generated pictures nearer than the 1 % quantile of held-out ones; 0.01 is par.
        close_distance: that quantile.
    """

    median_generated: float
    median_held_out: float
    ratio: float
    share_close: float
    close_distance: float


def neighbour_check(
    generated: Tensor, held_out: Tensor, training: Tensor, chunk: int = 1000
) -> NeighbourCheck:
    """Compare generated with held-out pictures by their distance to the training set.

    Args:
        generated: (N, C, H, W).
        held_out: (M, C, H, W) real pictures that the model never saw.
        training: (K, C, H, W) those it was trained on.
        chunk: pictures compared at a time.

    Raises:
        ValueError: if a set is empty, or the sizes of the pictures differ.
    """
    neighbours = Neighbours(training)
    return compare_distances(neighbours.distances(generated, chunk), neighbours.distances(held_out, chunk))


def compare_distances(generated: Tensor, held_out: Tensor) -> NeighbourCheck:
    """The check from distances already at hand: (N,) of generated and (M,) of held-out pictures."""
    generated, held_out = generated.double(), held_out.double()
    medians = float(generated.quantile(0.5)), float(held_out.quantile(0.5))
    close = float(held_out.quantile(0.01))
    ratio = medians[0] / medians[1] if medians[1] > 0 else float("nan")
    return NeighbourCheck(*medians, ratio, float((generated < close).double().mean()), close)


def nearest_distances(images: Tensor | Rows, training: Tensor, chunk: int = 1000) -> Tensor:
    """Distance from each picture to its nearest training picture, (N,) float64.

    The neighbour is found by matrix multiplication in float32, its distance computed exactly: 0 for a copy.

    Args:
        images: (N, …).
        training: (K, …).
        chunk: pictures compared at a time.

    Raises:
        ValueError: if a set is empty, or the sizes of the pictures differ.
    """
    return Neighbours(training).distances(images, chunk)


class Neighbours:
    """Training pictures (K, …), made ready once for any number of pictures to be compared with them."""

    def __init__(self, training: Tensor):
        self.training = training

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor]:
        """(K, D), and half the squared norm of each, (K,)."""
        flat = self.training.flatten(1).float()
        return flat, flat.square().sum(1) / 2

    def distances(self, images: Tensor | Rows, chunk: int = 1000) -> Tensor:
        """As `nearest_distances`."""
        if not len(images) or not len(self.training):
            raise ValueError(
                f"{len(images)} pictures and {len(self.training)} training pictures: neither may be empty"
            )
        if images.shape[1:] != self.training.shape[1:]:
            raise ValueError(
                f"pictures of shape {tuple(images.shape[1:])} cannot be compared with training pictures of "
                f"shape {tuple(self.training.shape[1:])}; give both at one size"
            )
        base, half_norms = self._flat
        found = []
        for part in images.split(chunk) if isinstance(images, Tensor) else images.chunks(chunk):
            part = part.flatten(1).float().to(base.device)
            nearest = base[torch.addmm(-half_norms, part, base.T).argmax(1)]
            found.append((part.double() - nearest.double()).square().sum(1).sqrt().cpu())
        return torch.cat(found)
