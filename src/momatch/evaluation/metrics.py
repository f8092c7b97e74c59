"""Everything that is measured of a set of samples, in one pass over them.

Evaluation pulls: samples (any iterable) → features → statistics → metric. Pictures are looked at once and let
go; only their features stay. Every number says on how many samples, on which features, against which
reference and with which seed it was computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from momatch.data.rows import Rows
from momatch.evaluation.density_coverage import density_coverage
from momatch.evaluation.features import (
    Classifier,
    ClassifierFeatures,
    FeatureExtractor,
    batches,
    check_pair,
    extract,
)
from momatch.evaluation.frechet import NORMAL_95, frechet_bootstrap, frechet_distance
from momatch.evaluation.kid import kid
from momatch.evaluation.memo import Memo, circumstances
from momatch.evaluation.neighbours import Neighbours, compare_distances
from momatch.evaluation.precision_recall import precision_recall
from momatch.evaluation.statistics import FeatureStatistics

INCEPTION_PARTS = 10
LabelledImages = tuple[Tensor, Tensor | None]
Samples = Tensor | LabelledImages | Iterable[LabelledImages]


@dataclass(frozen=True)
class Measurement:
    """One number and what it takes to read it. JSON types only.

    Attributes:
        metric: e.g. "frechet"; `evaluate` lists them.
        value: the number.
        standard_error: of sampling noise, where known.
        low: lower end of the 95 % interval, where known.
        high: upper end.
        features: name of the feature extractor (or classifier).
        reference: name of the reference set.
        n_generated: samples used.
        n_reference: reference pictures used; 0 if the metric needs none.
        seed: of subsampling and resampling.
        note: what else a reader has to know.
    """

    metric: str
    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    features: str
    reference: str
    n_generated: int
    n_reference: int
    seed: int
    note: str = ""


@dataclass(frozen=True)
class EvaluationResult:
    """All measurements of one set of samples."""

    measurements: list[Measurement]

    def get(self, metric: str, features: str | None = None) -> Measurement:
        """The measurement of that metric, on those features if there are several.

        Raises:
            KeyError: if there is none, or more than one.
        """
        found = [m for m in self.measurements if m.metric == metric and features in (None, m.features)]
        if len(found) != 1:
            known = ", ".join(f"{m.metric} on {m.features}" for m in self.measurements)
            raise KeyError(
                f"{len(found)} measurements of {metric!r} on {features or 'any features'}; there are: {known}"
            )
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; numbers that are not finite become None."""
        rows = [asdict(m) for m in self.measurements]
        return {"measurements": [{key: _json(value) for key, value in row.items()} for row in rows]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a measurement has unknown or missing entries.
        """
        names = {each.name for each in fields(Measurement)}
        rows = []
        for row in data["measurements"]:
            if set(row) != names:
                raise ValueError(f"a measurement has the entries {sorted(row)}, expected {sorted(names)}")
            rows.append(
                Measurement(**row | {"value": float("nan") if row["value"] is None else row["value"]})
            )
        return cls(rows)


def evaluate(
    samples: Samples,
    reference: Tensor | Rows | tuple[Tensor | Rows, Tensor | None],
    extractors: FeatureExtractor | Sequence[FeatureExtractor],
    classifier: Classifier | None = None,
    training_images: Tensor | None = None,
    *,
    reference_name: str = "held-out",
    seed: int = 0,
    resamples: int = 200,
    batch_size: int = 500,
    space: str = "pixels",
) -> EvaluationResult:
    """Measure samples against real pictures that the model never saw.

    On each extractor:

    - frechet: Fréchet distance with its bootstrap interval
    - frechet_corrected: the same less its estimated bias
    - frechet_floor: FD of real training pictures, see below; needs training_images
    - frechet_above_floor: FD minus that of the training pictures, bias-corrected, paired interval; likewise
    - kid: kernel distance with its jackknife error
    - precision, recall: k = 3, min(n_generated, n_reference) of each side
    - density, coverage: k = 5, likewise

    On the classifier, under the name of its `metric`, "class_accuracy" say:

    - class_accuracy: share given the label asked for, Wilson interval; needs labels of the samples
    - class_accuracy_reference: the same of real pictures, the ceiling; needs labels of the reference
    - inception_score: exp of the mean KL divergence from p(label) to p(label | image), mean over 10 parts;
      needs a classifier with probabilities

    On pixels (or latents, see `space`), with training_images (see `neighbours`):

    - neighbour_ratio, neighbour_share_close, neighbour_median_generated, neighbour_median_held_out

    **The floor** is real training pictures, resampled with replacement to n_generated, against the same
    reference. With fewer distinct training pictures than samples it keeps the bias of their number, so a good
    model can fall below it; `frechet_above_floor` takes that bias off both.

    Args:
        samples: pictures (N, C, H, W); or (pictures, labels (N,) asked for); or an iterable of such pairs,
            one per batch, labels None if there were none. Read once.
        reference: real pictures (M, C, H, W), or (pictures, labels).
        extractors: one or several.
        classifier: assigns labels, e.g. `ClassifierFeatures`.
        training_images: (K, C, H, W) what the model was trained on.
        reference_name: what to call the reference in reports.
        seed: of subsampling and resampling; each metric starts from it afresh.
        resamples: bootstrap resamples of the Fréchet distance.
        batch_size: pictures per call of extractors and classifier.
        space: what samples and reference are, "pixels" or "latents": in it the nearest neighbours are sought.

    Raises:
        ValueError: if there are too few pictures, their features are not finite, or some batches have labels
            and others not.
    """
    measured_against = Reference(
        reference,
        extractors,
        classifier,
        training_images,
        name=reference_name,
        seed=seed,
        resamples=resamples,
        batch_size=batch_size,
        space=space,
    )
    return measured_against.measure(samples)


class Reference:
    """Real images that any number of sample sets are measured against, one after the other.

    What does not depend on the samples is computed when the first set needs it, and kept for the next: the
    features of reference and training images, what the classifier makes of the reference, how near it lies to
    the training images, and the share of both in the bootstrap. The numbers are those of `evaluate`.

    Args:
        images: as the reference of `evaluate`, as are all others.
        extractors: see there.
        classifier: see there.
        training_images: see there.
        name: what to call the reference in reports.
        seed: see there.
        resamples: see there.
        batch_size: see there.
        space: see there.
    """

    def __init__(
        self,
        images: Tensor | Rows | tuple[Tensor | Rows, Tensor | None],
        extractors: FeatureExtractor | Sequence[FeatureExtractor],
        classifier: Classifier | None = None,
        training_images: Tensor | None = None,
        *,
        name: str = "held-out",
        seed: int = 0,
        resamples: int = 200,
        batch_size: int = 500,
        space: str = "pixels",
    ):
        self.images, self.labels = images if isinstance(images, tuple) else (images, None)
        self.extractors = list(extractors) if isinstance(extractors, Sequence) else [extractors]
        self.classifier, self.training_images = classifier, training_images
        self._neighbours = None if training_images is None else Neighbours(training_images)
        self.name, self.seed, self.resamples = name, seed, resamples
        self.batch_size, self.space = batch_size, space

    def measure(self, samples: Samples) -> EvaluationResult:
        """All measurements of a set of samples, which is read once; see `evaluate`.

        Raises:
            ValueError: as `evaluate`.
        """
        pulled = _pull(samples, self.extractors, self.classifier, self._neighbours, self.batch_size)
        counts = _Counts(
            reference=self.name, n_generated=pulled.n, n_reference=len(self.images), seed=self.seed
        )
        rows: list[Measurement] = []
        for generated, real in zip(pulled.features, self._features, strict=True):
            check_pair(generated, real.reference)
            rows += _frechet(generated, real, self.resamples, counts)
            rows += _kid_precision_recall(generated, real, counts)
        if self.classifier is not None:
            rows += _accuracy(pulled.hits, self._hits, self.classifier, counts)
            rows += _inception_score(pulled.probabilities, self.classifier, counts)
        if self.training_images is not None:
            rows += _neighbours(pulled.nearest, self._nearest, len(self.training_images), self.space, counts)
        return EvaluationResult(rows)

    # Cached, not computed in __init__: errors about samples come first, and progress shows from the start.
    @cached_property
    def _features(self) -> list[_RealFeatures]:
        def of(extractor: FeatureExtractor, images: Tensor | Rows | None) -> Tensor | None:
            return None if images is None else extract(extractor, images, self.batch_size)

        return [
            _RealFeatures(
                each.name, extract(each, self.images, self.batch_size), of(each, self.training_images)
            )
            for each in self.extractors
        ]

    @cached_property
    def _hits(self) -> Tensor:
        assert self.classifier is not None
        return _hits(self.classifier, self.images, self.labels, self.batch_size)

    @cached_property
    def _nearest(self) -> Tensor:
        assert self._neighbours is not None
        return self._neighbours.distances(self.images)


@dataclass(frozen=True)
class _RealFeatures:
    """Features (M, D) and (K, D) of reference and training images, and what was computed from them alone."""

    name: str
    reference: Tensor
    training: Tensor | None
    memo: Memo = field(default_factory=Memo)


class _Counts(TypedDict):
    """What every measurement carries."""

    reference: str
    n_generated: int
    n_reference: int
    seed: int


@dataclass(frozen=True)
class _Pulled:
    """What is kept of the samples: features of each extractor (N, D), hits (N,), nearest distances (N,), the
    classifier's probabilities (N, classes).
    """

    n: int
    features: list[Tensor]
    hits: Tensor
    nearest: Tensor
    probabilities: Tensor


def _pull(
    samples: Samples,
    extractors: list[FeatureExtractor],
    classifier: Classifier | None,
    neighbours: Neighbours | None,
    batch_size: int,
) -> _Pulled:
    n, features, hits, nearest, sure = 0, [[] for _ in extractors], [], [], []
    for images, labels in _pairs(samples):
        if not len(images):
            continue
        n += len(images)
        for collected, extractor in zip(features, extractors, strict=True):
            collected.append(extract(extractor, images, batch_size))
        if classifier is not None and labels is not None:
            hits.append(_hits(classifier, images, labels, batch_size))
        if isinstance(classifier, ClassifierFeatures):
            sure += [classifier.probabilities(part).cpu() for part in batches(images, batch_size)]
        if neighbours is not None:
            nearest.append(neighbours.distances(images))
    if n < 2:
        raise ValueError(f"{n} generated samples are too few; give at least 2")
    known = sum(len(part) for part in hits)
    if known not in (0, n):
        raise ValueError(
            f"only {known} of {n} samples come with the label asked for; give labels for all or none"
        )
    empty = torch.empty(0)
    return _Pulled(
        n,
        [torch.cat(f) for f in features],
        torch.cat([empty, *hits]),
        torch.cat([empty, *nearest]),
        torch.cat(sure) if sure else empty,
    )


def _pairs(samples: Samples) -> Iterator[LabelledImages]:
    if isinstance(samples, Tensor):
        yield samples, None
    elif isinstance(samples, tuple) and len(samples) == 2 and isinstance(samples[0], Tensor):
        yield cast(LabelledImages, samples)
    else:
        yield from cast(Iterable[LabelledImages], samples)


def _hits(classifier: Classifier, images: Tensor | Rows, labels: Tensor | None, batch_size: int) -> Tensor:
    """1.0 where the classifier gives the label asked for, else 0.0: (N,), or (0,) without labels."""
    if labels is None:
        return torch.empty(0)
    if labels.shape != tuple(images.shape[:1]):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {len(images)} pictures; give one for each"
        )
    predicted = torch.cat([classifier.predict(part).cpu() for part in batches(images, batch_size)])
    return (predicted == labels.cpu()).float()


def _frechet(generated: Tensor, real: _RealFeatures, resamples: int, counts: _Counts) -> list[Measurement]:
    rng = torch.Generator().manual_seed(counts["seed"])
    name, training = real.name, real.training
    sets = [generated] if training is None else [generated, training]
    bootstrap = frechet_bootstrap(sets, real.reference, rng, resamples, memo=real.memo)
    one = bootstrap.interval(0)
    error = one.standard_error
    rows = [
        Measurement(
            "frechet", one.value, error, max(one.low, 0.0), one.high, name, **counts, note=_AT_THESE_N
        ),
        _with_error(
            "frechet_corrected", one.corrected, error, name, counts, "for n → ∞; first-order bias off"
        ),
    ]
    if training is None:
        return rows
    distinct = f"{len(training)} distinct training pictures"
    key = circumstances(generated, rng)
    floor = real.memo.recall("floor", key, lambda: _floor(training, real.reference, len(generated), rng))
    note = f"{distinct}, resampled with replacement to n_generated; {_AT_THESE_N}"
    rows.append(_with_error("frechet_floor", floor, bootstrap.interval(1).standard_error, name, counts, note))
    above = bootstrap.difference(0, 1)
    note = f"frechet_corrected minus the same of {distinct}; paired"
    rows.append(_with_error("frechet_above_floor", above.corrected, above.standard_error, name, counts, note))
    return rows


_AT_THESE_N = "biased upwards by finite n; interval for the average at these n"


def _floor(training: Tensor, reference: Tensor, n: int, rng: torch.Generator) -> float:
    drawn = training[torch.randint(len(training), (n,), generator=rng)]
    statistics = FeatureStatistics.from_features
    return frechet_distance(statistics(drawn), statistics(reference))


def _kid_precision_recall(generated: Tensor, real: _RealFeatures, counts: _Counts) -> list[Measurement]:
    name = real.name
    kernel = kid(generated, real.reference, torch.Generator().manual_seed(counts["seed"]), memo=real.memo)
    shape = precision_recall(
        generated, real.reference, torch.Generator().manual_seed(counts["seed"]), memo=real.memo
    )
    balls = density_coverage(
        generated, real.reference, torch.Generator().manual_seed(counts["seed"]), memo=real.memo
    )
    used = _Counts({**counts, "n_generated": shape.n, "n_reference": shape.n})
    return [
        _with_error("kid", kernel.value, kernel.standard_error, name, counts, "unbiased, may be negative"),
        Measurement("precision", shape.precision, None, None, None, name, **used, note="k = 3"),
        Measurement("recall", shape.recall, None, None, None, name, **used, note="k = 3"),
        Measurement("density", balls.density, None, None, None, name, **used, note="k = 5"),
        Measurement("coverage", balls.coverage, None, None, None, name, **used, note="k = 5"),
    ]


def _accuracy(generated: Tensor, real: Tensor, judge: Classifier, counts: _Counts) -> list[Measurement]:
    rows, name, metric = [], judge.name, judge.metric
    if len(generated):
        used = _Counts({**counts, "n_reference": 0})
        rows.append(_share(metric, generated, name, used, "against what was asked for"))
    if len(real):
        used = _Counts({**counts, "n_generated": 0})
        rows.append(_share(f"{metric}_reference", real, name, used, "of real pictures"))
    return rows


def _inception_score(probabilities: Tensor, judge: Classifier, counts: _Counts) -> list[Measurement]:
    """Salimans et al. 2016, on our classifier; of ten parts of equal size the mean and its standard error."""
    if len(probabilities) < 2 * INCEPTION_PARTS:
        return []
    size = len(probabilities) // INCEPTION_PARTS
    scores = torch.stack(
        [inception_score(part) for part in probabilities[: INCEPTION_PARTS * size].split(size)]
    )
    error = float(scores.std()) / INCEPTION_PARTS**0.5
    used = _Counts({**counts, "n_reference": 0})
    note = f"mean over {INCEPTION_PARTS} parts; on this classifier, not on Inception"
    return [_with_error("inception_score", float(scores.mean()), error, judge.name, used, note)]


def inception_score(probabilities: Tensor) -> Tensor:
    """Exp E KL(p(y | x) ‖ p(y)) of probabilities (N, classes): 1 to classes, a scalar in float64."""
    p = probabilities.double()
    return torch.special.xlogy(p, p / p.mean(0)).nan_to_num(0.0).sum(1).mean().exp()


def _share(metric: str, hits: Tensor, name: str, counts: _Counts, note: str) -> Measurement:
    """A share with its binomial standard error and Wilson interval, which does not collapse at 0 or 1."""
    n, p = len(hits), float(hits.double().mean())
    shrink = 1 + NORMAL_95**2 / n
    centre = (p + NORMAL_95**2 / (2 * n)) / shrink
    reach = NORMAL_95 * math.sqrt(p * (1 - p) / n + NORMAL_95**2 / (4 * n**2)) / shrink
    low, high = min(max(centre - reach, 0.0), p), max(min(centre + reach, 1.0), p)
    return Measurement(metric, p, math.sqrt(p * (1 - p) / n), low, high, name, **counts, note=note)


def _neighbours(
    nearest: Tensor, held_out: Tensor, n_training: int, space: str, counts: _Counts
) -> list[Measurement]:
    check = compare_distances(nearest, held_out)
    note = f"nearest of {n_training} training pictures, {space.removesuffix('s')} L2"
    numbers = {
        "neighbour_ratio": check.ratio,
        "neighbour_share_close": check.share_close,
        "neighbour_median_generated": check.median_generated,
        "neighbour_median_held_out": check.median_held_out,
    }
    return [
        Measurement(m, value, None, None, None, space, **counts, note=note) for m, value in numbers.items()
    ]


def _with_error(
    metric: str, value: float, error: float, name: str, counts: _Counts, note: str
) -> Measurement:
    low, high = value - NORMAL_95 * error, value + NORMAL_95 * error
    return Measurement(metric, value, error, low, high, name, **counts, note=note)


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
