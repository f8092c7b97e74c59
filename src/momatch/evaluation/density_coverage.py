"""Density and coverage: precision and recall made robust to outliers.

Every reference point has a ball that reaches to its k-th nearest neighbour among them. **Density** counts in
how many of these balls a generated point lies, over k: 1 for samples of the reference's law, above 1 where
they crowd into its dense parts. **Coverage** is the share of balls that hold a generated point. Recall is
built on the shape of the *generated* set, in which one outlier covers much; these two never are.

Source: Naeem et al. 2020, section 3; k = 5 as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momatch.evaluation.memo import Memo
from momatch.evaluation.precision_recall import distances, with_balls


@dataclass(frozen=True)
class DensityCoverage:
    """Density and coverage.

    Attributes:
        density: mean number of reference balls around a generated sample, over k.
        coverage: share of the reference's balls that hold a generated sample.
        n: samples used of each side; coverage depends on it.
    """

    density: float
    coverage: float
    n: int


def density_coverage(
    generated: Tensor,
    reference: Tensor,
    generator: torch.Generator,
    k: int = 5,
    chunk: int = 1000,
    memo: Memo | None = None,
) -> DensityCoverage:
    """Density and coverage on equally many samples from both sides.

    Args:
        generated: (N, D).
        reference: (M, D).
        generator: picks min(N, M) of the larger side, without replacement.
        k: which neighbour sets the radius.
        chunk: rows of the distance matrix held at a time.
        memo: of this reference: its balls are computed once.

    Raises:
        ValueError: if k is below 1, a side has k samples or fewer, or the features are unusable.
    """
    x, y, radii = with_balls(generated, reference, generator, k, chunk, memo)
    n = len(x)
    inside, covered = 0, torch.zeros(n, dtype=torch.bool, device=y.device)
    for part in x.split(chunk):
        within = distances(part, y) <= radii
        inside += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(inside / (k * n), float(covered.double().mean()), n)
