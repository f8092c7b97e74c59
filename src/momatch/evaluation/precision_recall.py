"""Improved precision and recall: are samples realistic, and do they cover the data?

Each set is given a shape: the union of balls around its points, each reaching to the point's k-th nearest
neighbour in the set. Precision is the share of generated points inside the reference's shape, recall the
share of reference points inside the generated shape.

Source: Kynkäänniemi et al. 2019, section 2; k = 3 as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momatch.evaluation.features import check_pair
from momatch.evaluation.memo import Memo, circumstances


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall.

    Attributes:
        precision: share of generated samples inside the reference's shape.
        recall: share of reference samples inside the generated shape.
        n: samples used of each side; both numbers depend on it.
    """

    precision: float
    recall: float
    n: int


def precision_recall(
    generated: Tensor,
    reference: Tensor,
    generator: torch.Generator,
    k: int = 3,
    chunk: int = 1000,
    memo: Memo | None = None,
) -> PrecisionRecall:
    """Improved precision and recall on equally many samples from both sides.

    Args:
        generated: (N, D).
        reference: (M, D).
        generator: picks min(N, M) of the larger side, without replacement.
        k: which neighbour sets the radius.
        chunk: rows of the distance matrix held at a time.
        memo: of this reference: its shape is computed once.

    Raises:
        ValueError: if k is below 1, a side has k samples or fewer, or the features are unusable.
    """
    x, y, radii = with_balls(generated, reference, generator, k, chunk, memo)
    inside_y = _covered(x, y, radii, chunk)
    inside_x = _covered(y, x, _radii(x, k, chunk), chunk)
    return PrecisionRecall(float(inside_y.double().mean()), float(inside_x.double().mean()), len(x))


def with_balls(
    generated: Tensor, reference: Tensor, generator: torch.Generator, k: int, chunk: int, memo: Memo | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Equally many samples (n, D) of both sides, and the radii (n,) of the reference's balls.

    Arguments and errors as of `precision_recall`.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; 3 or 5 is usual")
    check_pair(generated, reference, minimum=k + 1)
    n = min(len(generated), len(reference))
    key = circumstances(generated, generator)
    x, y = _subset(generated, n, generator), _subset(reference, n, generator)
    return x, y, (memo or Memo()).recall(f"radii {k}", key, lambda: _radii(y, k, chunk))


def _subset(features: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` of the features (N, D), in random order, float32."""
    chosen = torch.randperm(len(features), generator=generator)[:n]
    return features.detach().float()[chosen.to(features.device)]


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour, itself not counted: (N,)."""
    radii = []
    for start in range(0, len(features), chunk):
        found = distances(features[start : start + chunk], features)
        found.diagonal(offset=start).fill_(float("inf"))
        radii.append(found.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _covered(query: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> Tensor:
    """Whether each query point lies in some ball: (N,) bool."""
    return torch.cat([(distances(part, centres) <= radii).any(1) for part in query.split(chunk)])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances without the matrix-multiplication shortcut: its rounding moves balls' edges."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
