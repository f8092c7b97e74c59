"""What is measured of samples that are no pictures: on the numbers themselves, each in units of its spread.

- sliced_wasserstein, energy_distance: between samples and held-out rows; sliced_wasserstein_floor: of as many
  training rows.
- conditional_…: the same of pairs (x, c) of a sample and what it was asked with, each side with its own.
  These are far apart where samples are right on the whole, but not for what was asked.
- conditional_mean_error, conditional_std_error: root mean square over labels, or over conditions that occur
  in many held-out rows, of the difference of means, and of standard deviations.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from momatch.data.images import ImageSet, Split
from momatch.data.rows import Rows, spread, take
from momatch.diffusion.distances import energy_distance, sliced_wasserstein2
from momatch.diffusion.interface import Cond
from momatch.evaluation.metrics import Measurement
from momatch.utils.seeding import generator

MOST = 5000  # rows compared; energy distances take the square of that
MIN_GROUP = 10  # rows of a condition, for moments of their own
PROJECTIONS = 256
CONSTANT = 0.01  # of the spread of all: a column below that, the start of all paths say, is no unit


class FlatFeatures:
    """The numbers themselves."""

    name = "x"

    def __call__(self, images: Tensor) -> Tensor:
        """(B, …) → (B, D)."""
        return images.float().flatten(1)


class _Used(TypedDict):
    reference: str
    n_generated: int
    n_reference: int
    seed: int


def measure(samples: Tensor, cond: Cond | None, data: Split, seed: int) -> list[Measurement]:
    """All of the above.

    Args:
        samples: (N, …).
        cond: what they were asked with, (N, …) each; None if nothing.
        data: held-out rows to compare with, and training rows for the floor.
        seed: of directions and subsets.
    """
    real, count = _flat(data.heldout.images), min(len(samples), len(data.heldout), MOST)
    centre, scale = real.mean(0), _scale(real)

    def scaled(x: Tensor | Rows) -> Tensor:
        return (_flat(x) - centre) / scale

    ours, theirs = scaled(samples), scaled(data.heldout.images)
    training = scaled(take(data.train.images, spread(len(data.train), count)))
    used = _Used(
        reference=data.heldout.name, n_generated=len(samples), n_reference=len(data.heldout), seed=seed
    )
    rows = _distances(ours, theirs, count, "", used)
    if len(training) == count:
        value = _sliced(training, theirs[spread(len(theirs), count)], seed)
        rows.append(_row("sliced_wasserstein_floor", value, "x", used, f"{count} training rows"))
    if cond:
        asked, known = _conditions(cond, data.heldout)
        pairs = torch.cat([ours, asked], 1), torch.cat([theirs, known], 1)
        rows += _distances(*pairs, count, "conditional_", used)
        rows += _moments(ours, asked, theirs, known, used)
    return rows


def _distances(a: Tensor, b: Tensor, count: int, prefix: str, used: _Used) -> list[Measurement]:
    a, b = a[spread(len(a), count)], b[spread(len(b), count)]
    features = "x and what it was asked with" if prefix else "x"
    found = {
        "sliced_wasserstein": _sliced(a, b, used["seed"]),
        "energy_distance": energy_distance(a, b),
    }
    return [_row(prefix + name, v, features, used, f"{count} rows a side") for name, v in found.items()]


def _sliced(a: Tensor, b: Tensor, seed: int) -> float:
    return sliced_wasserstein2(a, b, PROJECTIONS, generator(seed, "directions"))


def _moments(ours: Tensor, asked: Tensor, theirs: Tensor, known: Tensor, used: _Used) -> list[Measurement]:
    """Of each condition that occurs often on both sides; none if there are no such."""
    means, stds = [], []
    values, counts = known.unique(dim=0, return_counts=True)
    for value in values[counts >= MIN_GROUP]:
        a, b = ours[(asked == value).all(1)], theirs[(known == value).all(1)]
        if len(a) >= MIN_GROUP:
            means.append(a.mean(0) - b.mean(0))
            stds.append(a.std(0) - b.std(0))
    if not means:
        return []
    note = f"{len(means)} conditions, in units of the held-out rows' standard deviation"
    found = {"conditional_mean_error": means, "conditional_std_error": stds}
    return [
        _row(name, float(torch.stack(each).square().mean().sqrt()), "x", used, note)
        for name, each in found.items()
    ]


def _conditions(cond: Cond, data: ImageSet) -> tuple[Tensor, Tensor]:
    """Of samples and of held-out rows: (N, C) and (M, C), in units of the latter's spread."""
    asked, known = [], []
    for name, rows in cond.items():
        if name == "label":  # a distance between labels means nothing: one column for each
            classes = max(int(rows.max()), int(data.labels.max())) + 1
            asked.append(torch.nn.functional.one_hot(rows, classes).double())
            known.append(torch.nn.functional.one_hot(data.labels, classes).double())
        else:
            asked.append(_flat(rows))
            known.append(_flat(data.conditions[name]))
    a, b = torch.cat(asked, 1), torch.cat(known, 1)
    centre, scale = b.mean(0), _scale(b)
    return (a - centre) / scale, (b - centre) / scale


def _scale(real: Tensor) -> Tensor:
    """Standard deviation of each column (M, D) → (D,); of all together for columns that hardly vary."""
    own, whole = real.std(0), real.std().clamp(min=1e-12)
    return torch.where(own < CONSTANT * whole, whole, own)


def _flat(rows: Tensor | Rows) -> Tensor:
    return rows[:].double().flatten(1).cpu()


def _row(metric: str, value: float, features: str, used: _Used, note: str) -> Measurement:
    return Measurement(metric, value, None, None, None, features, **used, note=note)
