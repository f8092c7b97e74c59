"""Kernel distance (KID): the squared maximum mean discrepancy of features, unbiased, with its standard error.

    (1)  KID = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{i,j} k(x_i, y_j)

with k(x, y) = (x·y/D + 1)³.

All pairs of all samples enter, not random subsets of 1,000 as in other implementations: less noise, nothing
to tune. Being unbiased it may be negative, and compares across different n, which a Fréchet distance does
not. (This is the *kernel* MMD; it has nothing to do with moment matching distillation.)

The standard error is a two-sample delete-a-group jackknife: leave out one group of x at a time, then one
group of y at a time, and add the two variances. All leave-out values follow from block sums of the kernel
matrix, which is computed once. Where both sides follow one law, KID is degenerate and the error is
overestimated, by about √2.

Sources: Gretton et al. 2012, lemma 6; Bińkowski et al. 2018 (KID); Shao & Tu 1995, section 2.3 (delete-d
jackknife).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momatch.evaluation.features import check_pair
from momatch.evaluation.memo import Memo, circumstances


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance, or a difference of two.

    Attributes:
        value: unbiased estimate; may be negative.
        standard_error: of both sides' sampling noise.
    """

    value: float
    standard_error: float


def kid(
    generated: Tensor,
    reference: Tensor,
    generator: torch.Generator,
    groups: int = 100,
    memo: Memo | None = None,
) -> KernelDistance:
    """Equation (1) with its jackknife error.

    Args:
        generated: (N, D).
        reference: (M, D).
        generator: shuffles the samples into groups; it moves the error a little, the value not at all.
        groups: groups on each side; a side with fewer than twice as many samples has groups of about 2.
        memo: of this reference: the mean over its own pairs is computed once.

    Raises:
        ValueError: if a side is unusable (fewer than 4 samples), the dimensions differ, or groups is below 2.
    """
    key = (circumstances(generated, generator), groups)
    x, y = (
        _prepare(generated, reference, groups, generator),
        _prepare(reference, generated, groups, generator),
    )
    within_x, between = _within(x), _between(x, y)
    within_y = (memo or Memo()).recall("kid", key, lambda: _within(y))
    value = within_x.mean + within_y.mean - 2 * between.mean
    variance = _jackknife(within_x.without - 2 * between.without_first)
    variance += _jackknife(within_y.without - 2 * between.without_second)
    return KernelDistance(value, variance**0.5)


def kid_difference(
    first: Tensor, second: Tensor, reference: Tensor, generator: torch.Generator, groups: int = 100
) -> KernelDistance:
    """KID of `first` minus KID of `second`, both to one reference, with the paired error.

    The noise of the shared reference counts only as far as it does not cancel. The two generated sets count
    as independent of each other.

    Args:
        first: (N, D).
        second: (N′, D).
        reference: (M, D).
        generator: as in `kid`.
        groups: as in `kid`.

    Raises:
        ValueError: as `kid`.
    """
    a, b = _prepare(first, reference, groups, generator), _prepare(second, reference, groups, generator)
    y = _prepare(reference, first, groups, generator)
    within_a, within_b, between_a, between_b = _within(a), _within(b), _between(a, y), _between(b, y)
    value = within_a.mean - within_b.mean - 2 * (between_a.mean - between_b.mean)
    variance = _jackknife(within_a.without - 2 * between_a.without_first)
    variance += _jackknife(within_b.without - 2 * between_b.without_first)
    variance += _jackknife(2 * (between_a.without_second - between_b.without_second))
    return KernelDistance(value, variance**0.5)


@dataclass(frozen=True)
class _Within:
    """Mean kernel over pairs i ≠ j of one set, and the same without each group in turn (G,)."""

    mean: float
    without: Tensor


@dataclass(frozen=True)
class _Between:
    """Mean kernel over all pairs of two sets, and the same without each group of either."""

    mean: float
    without_first: Tensor
    without_second: Tensor


def _prepare(features: Tensor, other: Tensor, groups: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffle features into groups of nearly equal size, scaled so that k(x, y) = (x·y + 1)³."""
    if groups < 2:
        raise ValueError(f"groups must be at least 2, got {groups}; 100 is usual")
    check_pair(features, other, minimum=4)
    n, d = features.shape
    shuffled = features.detach().float()[torch.randperm(n, generator=generator).to(features.device)] * d**-0.5
    return shuffled.tensor_split(min(groups, n // 2))


def _within(x: tuple[Tensor, ...]) -> _Within:
    sizes = torch.tensor([len(group) for group in x]).double()
    sums = torch.zeros(len(x), len(x), dtype=torch.float64)
    rest = torch.cat(x)
    for g, group in enumerate(x):
        kernel = _kernel(group, rest)
        kernel.diagonal().zero_()
        sums[g, g:] = _group_sums(kernel, sizes[g:])
        rest = rest[len(group) :]
    sums = sums + sums.triu(1).T
    pairs = sizes.sum() * (sizes.sum() - 1)
    left = sizes.sum() - sizes
    without = (sums.sum() - 2 * sums.sum(1) + sums.diagonal()) / (left * (left - 1))
    return _Within(float(sums.sum() / pairs), without)


def _between(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> _Between:
    sizes_x, sizes_y = (torch.tensor([len(group) for group in side]).double() for side in (x, y))
    everything = torch.cat(y)
    sums = torch.stack([_group_sums(_kernel(group, everything), sizes_y) for group in x])
    total, n, m = sums.sum(), sizes_x.sum(), sizes_y.sum()
    return _Between(
        float(total / (n * m)),
        (total - sums.sum(1)) / ((n - sizes_x) * m),
        (total - sums.sum(0)) / (n * (m - sizes_y)),
    )


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(B, M) float32 kernel matrix."""
    inner = torch.addmm(x.new_ones(1), x, y.T)
    return inner.square().mul_(inner)


def _group_sums(kernel: Tensor, sizes: Tensor) -> Tensor:
    """Sums over all rows, and over the columns of each group: (G,) float64."""
    owner = torch.arange(len(sizes)).repeat_interleave(sizes.long())
    return torch.zeros_like(sizes).index_add(0, owner, kernel.sum(0).double().cpu())


def _jackknife(without: Tensor) -> float:
    """Variance of a statistic from its values with one of G groups left out, (G,)."""
    groups = len(without)
    return float((groups - 1) / groups * (without - without.mean()).square().sum())
