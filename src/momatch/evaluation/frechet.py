"""Fréchet distance between feature distributions, and how far to trust it.

    (1)  FD = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½

With Inception features it is called FID. It is the squared 2-Wasserstein distance of two Gaussians.

**Bias.** FD of samples exceeds FD of populations by about c₁/n₁ + c₂/n₂. For standard normal features in D
dimensions c is D + D(D + 1)/4: at D = 64 and a reference of 600 that is 1.8, often more than the distance
itself. So an FD means something only next to its two n, and compares only with FDs at the same n and the same
reference.

**Bootstrap.** Each resample draws both sides again with replacement. It adds the bias a second time (the
resampled sets are noisy copies of sets that are noisy already), so percentiles of the resampled FDs are not
an interval for anything. What the bootstrap does tell is how the FDs spread around *their own* mean, and how
far that mean moved. Hence:

- one FD: value ± 1.96 × the resamples' standard deviation, an interval for what FD at these n is on average
  over fresh samples and fresh references. It does *not* cover the FD of populations. `corrected` = 2 value −
  mean(resamples) takes the first-order bias off.
- difference of two FDs to one reference: the same resampled reference serves both, so its noise mostly
  cancels. The bias does not quite: it differs where the n or the covariances of the two sets do. So the
  interval is centred at 2 difference − mean(resamples), and is for the difference of populations.

The spread is overestimated where FD is mostly bias: FD is quadratic there, and resampled noise multiplies the
noise of the sample. Measured on normal features (D = 64, 20,000 generated, 600 reference, 60 repeats),
standard error over true spread: 1.9 at population FD 0 (FD of samples 1.9), 1.6 at 0.8, 1.1 at 8.6; for
differences 1.7, 1.1 and 0.9. Nominal 95 % intervals held the truth in 92 to 100 % of the repeats; intervals
for a difference that were not centred so, in 57 to 72 % wherever the covariances differed.

Sources: Heusel et al. 2017 (FID); Dowson & Landau 1982 (equation 1); Chong & Forsyth 2020 (bias); Davison &
Hinkley 1997, chapters 2 and 5 (bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from momatch.evaluation.features import check_pair
from momatch.evaluation.memo import Memo, circumstances
from momatch.evaluation.statistics import FeatureStatistics

NORMAL_95 = 1.959964
# Sets up to this size are resampled sample by sample, larger ones block by block.
EXACT_BELOW = 2000
# Block moments take blocks × D² numbers; 2²⁷ of them are 1 GiB in float64.
MOMENT_BUDGET = 2**27
# A reference's resamples are kept for the next set up to resamples × D² numbers: 2²⁵ are 256 MiB.
KEPT_BUDGET = 2**25


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Equation (1), in float64; singular covariances are fine.

    Raises:
        ValueError: if the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {a.mean.numel()} and {b.mean.numel()} dimensions cannot be compared; "
            "extract both with the same extractor"
        )
    return _distance(_Gaussian.of(a), _Gaussian.of(b))


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: as computed from the samples.
        low: lower end of the 95 % interval; the module's docstring says of what.
        high: upper end.
        standard_error: standard deviation of the sampling noise.
        corrected: value with its first-order bias taken off.
    """

    value: float
    low: float
    high: float
    standard_error: float
    corrected: float


@dataclass(frozen=True)
class FrechetBootstrap:
    """Fréchet distances of K generated sets to one reference, and their resamples.

    Attributes:
        values: (K,) float64, the distances of the samples as they are.
        resampled: (R, K) float64; the sets of a row share one resampled reference.
    """

    values: Tensor
    resampled: Tensor

    def interval(self, index: int = 0) -> Estimate:
        """One distance, with the interval for its average over fresh samples of the same sizes."""
        value, resampled = self.values[index], self.resampled[:, index]
        return _estimate(value, resampled, centre=value)

    def difference(self, first: int = 0, second: int = 1) -> Estimate:
        """Distance of `first` minus distance of `second`, with the paired interval for populations."""
        value = self.values[first] - self.values[second]
        resampled = self.resampled[:, first] - self.resampled[:, second]
        return _estimate(value, resampled, centre=2 * value - resampled.mean())


def frechet_bootstrap(
    generated: Tensor | Sequence[Tensor],
    reference: Tensor,
    generator: torch.Generator,
    resamples: int = 200,
    blocks: int = 200,
    groups: Tensor | None = None,
    memo: Memo | None = None,
) -> FrechetBootstrap:
    """Fréchet distances of one or more generated sets to a reference, resampled.

    Sets of up to 2,000 samples are resampled exactly. Larger ones are shuffled, cut into `blocks` blocks
    whose moments are summed once, and resampled by blocks: the same spread, at a cost that does not depend on
    n. Where blocks × D² would exceed 1 GiB (D = 2048), fewer blocks are used, and the error bars are rougher.
    A resample costs a few D³ operations: take fewer of them for D in the thousands.

    Args:
        generated: (N, D), or several such sets, not necessarily of one size; drawn independently of one
            another unless `groups` says otherwise.
        reference: (M, D).
        generator: source of the resampling, on the CPU.
        resamples: R.
        blocks: for sets above 2,000 samples.
        groups: (N,) int64 from 0, which samples belong together, in all sets alike: those of one prompt, say,
            or of one noise. Groups are resampled whole, the same ones in every set; sets must be of size N.
        memo: of the reference and of all sets but the first, which must be the same whenever it is given:
            their part is computed once, if 256 MiB hold it (D = 400 at 200 resamples). Not with groups.

    Raises:
        ValueError: if a set is unusable, the dimensions differ, sizes do not fit the groups, or fewer than 2
            resamples or blocks are asked for.
    """
    if resamples < 2 or blocks < 2:
        raise ValueError(
            f"resamples and blocks must be at least 2, got {resamples} and {blocks}; 200 is usual"
        )
    sets = [generated] if isinstance(generated, Tensor) else list(generated)
    for features in sets:
        check_pair(features, reference)
    if groups is not None and {len(groups)} != {len(s) for s in sets}:
        raise ValueError(f"{len(groups)} samples are in groups, the sets have {[len(s) for s in sets]}")
    kept: list[tuple[_Gaussian, list[float]]] = []
    keep = memo is not None and groups is None and resamples * reference.shape[1] ** 2 <= KEPT_BUDGET
    if keep and memo is not None:
        key = (circumstances(sets[0], generator), resamples, blocks, len(sets))
        kept = memo.recall("frechet", key, list)
    origin = reference.double().cpu().mean(0)
    real, *others = [s.detach().double().cpu() - origin for s in [reference, *sets]]
    whole = _BlockMoments(real, blocks, generator)
    if groups is None:
        moments = [_BlockMoments(s, blocks, generator) for s in others]
    else:
        moments = [_GroupMoments(s, groups.cpu()) for s in others]

    def weights() -> Iterator[list[Tensor]]:
        yield [m.once() for m in [whole, *moments]]
        for _ in range(resamples):
            first = whole.draw(generator)
            shared = None if groups is None else moments[0].draw(generator)
            yield [first, *(m.draw(generator) if shared is None else shared for m in moments)]

    def distances(place: int, of_reference: Tensor, of_sample: Tensor, *of_others: Tensor) -> list[float]:
        if place < len(kept):  # the weights above are drawn all the same, for the sake of the generator
            real, known = kept[place]
        else:
            real = _Gaussian.of(whole.weighted(of_reference))
            constant = zip(moments[1:], of_others, strict=True)
            known = [_distance(_Gaussian.of(m.weighted(w)), real) for m, w in constant]
            if keep:
                kept.append((real, known))
        return [_distance(_Gaussian.of(moments[0].weighted(of_sample)), real), *known]

    found = [distances(place, *each) for place, each in enumerate(weights())]
    values = torch.tensor(found, dtype=torch.float64)
    return FrechetBootstrap(values[0], values[1:])


class _Gaussian(NamedTuple):
    """Mean (D,) and a root (D, D) of the covariance: what equation (1) needs of a set."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> _Gaussian:
        return cls(statistics.mean, _root(statistics.covariance))


class _BlockMoments:
    """Sums of x and x xᵀ over random blocks of a set; any weighting of the blocks has its statistics."""

    def __init__(self, features: Tensor, blocks: int, generator: torch.Generator):
        n, d = features.shape
        count = min(n if n <= EXACT_BELOW else blocks, max(2, MOMENT_BUDGET // d**2))
        parts = features[torch.randperm(n, generator=generator)].tensor_split(count)
        self.parts = parts
        self.sizes = torch.tensor([len(part) for part in parts]).double()

    @cached_property
    def sums(self) -> Tensor:
        return torch.stack([part.sum(0) for part in self.parts])

    @cached_property
    def products(self) -> Tensor:
        return torch.stack([(part.T @ part).flatten() for part in self.parts])

    def once(self) -> Tensor:
        return torch.ones_like(self.sizes)

    def draw(self, generator: torch.Generator) -> Tensor:
        count = len(self.sizes)
        drawn = torch.randint(count, (count,), generator=generator)
        return drawn.bincount(minlength=count).double()

    def weighted(self, weights: Tensor) -> FeatureStatistics:
        n = float(weights @ self.sizes)
        mean = weights @ self.sums / n
        products = (weights @ self.products).view(len(mean), len(mean))
        covariance = (products - n * torch.outer(mean, mean)) / (n - 1)
        return FeatureStatistics(mean, covariance, round(n))


class _GroupMoments(_BlockMoments):
    """The same for groups that are given: too many for their products to be kept."""

    def __init__(self, features: Tensor, groups: Tensor):
        self.features, self.groups = features, groups
        self.sizes = groups.bincount().double()

    def weighted(self, weights: Tensor) -> FeatureStatistics:
        each = weights[self.groups]
        n = float(each.sum())
        mean = each @ self.features / n
        products = (self.features * each[:, None]).T @ self.features
        return FeatureStatistics(mean, (products - n * torch.outer(mean, mean)) / (n - 1), round(n))


def _distance(a: _Gaussian, b: _Gaussian) -> float:
    """Equation (1) from Σ = R Rᵀ: tr (Σ₁^½ Σ₂ Σ₁^½)^½ is the sum of the singular values of R₁ᵀ R₂.

    No square root is taken of a small difference, so singular covariances cost no accuracy.
    """
    overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = Σ, by symmetric eigen-decomposition; eigenvalues that are rounding errors become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return vectors * torch.where(values > floor, values, 0.0).clamp(min=0).sqrt()


def _estimate(value: Tensor, resampled: Tensor, centre: Tensor) -> Estimate:
    error = resampled.std()
    low, high = centre - NORMAL_95 * error, centre + NORMAL_95 * error
    corrected = 2 * value - resampled.mean()
    return Estimate(*(float(number) for number in (value, low, high, error, corrected)))
