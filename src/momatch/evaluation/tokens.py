"""What is measured of rows of tokens, samples (N, L) against held-out rows.

- ngram_divergence_2 … _5: Jensen-Shannon divergence in bits of the n-grams of samples and of as many held-out
  rows: 0 if alike, 1 if they share none. It is biased upwards by the number of rows, the more the longer the
  n-grams; ngram_divergence_floor_… has the same bias: as many training rows against the held-out ones.
- word_share: of the words in samples, how many occur in the data (training or held-out); those at a row's
  ends, which may be cut, do not count. word_share_reference: of the words in held-out rows, how many occur
  in training rows. Texts only.
- row_entropy: mean over rows of the entropy in bits of the tokens in a row; low where a sampler repeats
  itself. row_entropy_reference: of held-out rows.
- copied_share: rows with a run of half their length, or more, that stands in a training row;
  copied_share_reference: of held-out rows.
- two_sample_accuracy: how often a small convolutional network, trained on half of both, tells samples from
  held-out rows; 0.5 if it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from momatch.data.images import ImageSet, Split
from momatch.data.rows import spread
from momatch.data.tokens import Tokens, decode
from momatch.evaluation.frechet import NORMAL_95
from momatch.evaluation.metrics import Measurement
from momatch.evaluation.two_sample import token_two_sample_test
from momatch.utils.seeding import generator

LENGTHS = (2, 3, 4, 5)  # of n-grams
WORD = re.compile(r"[^\W\d_]+")
FACTOR = 6364136223846793005  # of a rolling hash, modulo 2⁶⁴
MOST_RUNS_ROWS = 200_000  # training rows whose runs are looked at
PAIRS = 8191  # of tokens, told apart by their hash
TEST_ROWS = 2000  # of each side of the two-sample test


class BigramFeatures:
    """How often pairs of neighbouring tokens occur in a row, in 64 random directions."""

    name = "bigrams in 64 random directions"

    def __init__(self) -> None:
        self._directions = torch.randn(PAIRS, 64, generator=generator(0, "bigrams"))

    def __call__(self, images: Tensor) -> Tensor:
        """Rows (B, L), or (B, L, C) one-hot, → (B, 64)."""
        tokens = images.argmax(-1) if images.ndim == 3 else images.long()
        pairs = _runs(tokens, 2) % PAIRS
        return self._directions[pairs].sum(1) / pairs.shape[1] ** 0.5


class _Used(TypedDict):
    reference: str
    n_generated: int
    n_reference: int
    seed: int


def integers(images: ImageSet) -> Tensor:
    """The rows of a set of tokens, (N, L) int64."""
    assert isinstance(images.images, Tokens)
    return images.images.integers()


def measure(samples: Tensor, data: Split, seed: int) -> list[Measurement]:
    """All of the above.

    Args:
        samples: (N, L) int64.
        data: held-out rows to compare with, and training rows.
        seed: of the two-sample test.
    """
    train, heldout = integers(data.train), integers(data.heldout)
    count = min(len(samples), len(heldout), len(train))
    ours, theirs, training = (rows[spread(len(rows), count)] for rows in (samples, heldout, train))
    used = _Used(reference=data.heldout.name, n_generated=len(samples), n_reference=len(heldout), seed=seed)
    found: list[tuple[str, float, str]] = []
    for n in LENGTHS:
        if n <= samples.shape[1]:
            note = f"bits, {count} rows a side"
            found.append((f"ngram_divergence_{n}", ngram_divergence(ours, theirs, n), note))
            found.append((f"ngram_divergence_floor_{n}", ngram_divergence(training, theirs, n), note))
    if data.train.vocabulary:
        words = [words_of(decode(rows, data.train.vocabulary)) for rows in (train, heldout, samples)]
        known = {*words[0], *words[1]}
        found.append(("word_share", _share_in(words[2], known), f"{len(known):,} words in the data"))
        found.append(("word_share_reference", _share_in(words[1], {*words[0]}), "held-out, in training rows"))
    found.append(("row_entropy", row_entropy(samples), "bits a token"))
    found.append(("row_entropy_reference", row_entropy(heldout), "bits a token"))
    half = max(samples.shape[1] // 2, 2)
    runs = _runs(train[spread(len(train), min(len(train), MOST_RUNS_ROWS))], half).unique()
    for name, rows in (("copied_share", samples), ("copied_share_reference", heldout)):
        copied = torch.isin(_runs(rows, half), runs).any(1).double().mean()
        found.append((name, float(copied), f"runs of {half} tokens"))
    rows = [_row(*each, used) for each in found]
    tried = spread(count, min(count, TEST_ROWS))
    told = token_two_sample_test(ours[tried], theirs[tried], seed)
    low, high = (told.accuracy + side * NORMAL_95 * told.standard_error for side in (-1, 1))
    note = f"{told.n} rows to learn from, as many to tell"
    rows.append(
        Measurement(
            "two_sample_accuracy", told.accuracy, told.standard_error, low, high, "tokens", **used, note=note
        )
    )
    return rows


def ngram_divergence(a: Tensor, b: Tensor, n: int) -> float:
    """Jensen-Shannon divergence in bits of the n-grams of rows a (N, L) and b (M, L)."""
    grams = [_ngrams(rows, n) for rows in (a, b)]
    kinds, index = torch.cat(grams).unique(return_inverse=True)
    p, q = (
        torch.bincount(part, minlength=len(kinds)).double() / len(part)
        for part in index.split([len(gram) for gram in grams])
    )
    return float(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def row_entropy(rows: Tensor) -> float:
    """Mean entropy in bits of the tokens in a row, rows (N, L)."""
    total = torch.zeros((), dtype=torch.float64)
    for part in rows.split(1000):
        share = (part[:, :, None] == part[:, None]).double().mean(-1)  # of each token in its row
        total -= share.log2().mean(1).sum()
    return float(total / len(rows))


def words_of(texts: Sequence[str]) -> list[str]:
    """The words of texts, without those at their ends."""
    found = []
    for text in texts:
        words = [match for match in WORD.finditer(text)]
        found += [match[0] for match in words if match.start() > 0 and match.end() < len(text)]
    return found


def listed(texts: Sequence[str]) -> str:
    """Samples one after the other, each a paragraph under a line that tells where it begins."""
    return "".join(f"--- {i}\n{text}\n" for i, text in enumerate(texts, 1))


def _share_in(words: Sequence[str], known: set[str]) -> float:
    return sum(word in known for word in words) / max(len(words), 1)


def _ngrams(rows: Tensor, n: int) -> Tensor:
    """A hash of each n-gram, all in one row."""
    return _runs(rows, n).flatten()


def _runs(rows: Tensor, n: int) -> Tensor:
    """A hash modulo 2⁶⁴ of each run of n tokens: (N, L) → (N, L − n + 1)."""
    width = rows.shape[1] - n + 1
    found = torch.zeros(len(rows), width, dtype=torch.int64)
    for i in range(n):
        found = found * FACTOR + rows[:, i : i + width] + 1
    return found


def _entropy(p: Tensor) -> Tensor:
    """In bits."""
    return -(p * p.clamp(min=1e-300).log2()).sum()


def _row(metric: str, value: float, note: str, used: _Used) -> Measurement:
    return Measurement(metric, value, None, None, None, "tokens", **used, note=note)
