"""Two-sample test by a classifier (C2ST): how well can a fresh network tell generated images from real ones?

Half of both sides trains a small network to tell them apart; its accuracy on the other half is the statistic.
0.5 means that it found no difference, 1 that none is mistaken. Unlike distances of features it looks for
whatever difference there is, and nobody chose the features beforehand.

Source: Lopez-Paz & Oquab 2017. Under the null hypothesis the accuracy is binomial around 1/2, so its standard
error is 1/(2√n); the error given here is that of the accuracy found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.networks.classifier import Classifier, TokenClassifier


@dataclass(frozen=True)
class TwoSampleTest:
    """Held-out accuracy of a network that tells generated from real.

    Attributes:
        accuracy: share of held-out images that are told right; 0.5 is chance.
        standard_error: binomial.
        n: held-out images, half of them real.
    """

    accuracy: float
    standard_error: float
    n: int


def classifier_two_sample_test(
    generated: Tensor, real: Tensor, seed: int = 0, epochs: int = 4, batch_size: int = 128, width: int = 16
) -> TwoSampleTest:
    """Train on one half of both sides, count on the other.

    Args:
        generated: (N, C, H, W) in [−1, 1]; clipped to it, or values outside would give them away.
        real: (M, C, H, W), real images that the model was not trained on; min(N, M) of each side are used.
        seed: of the network, the halves and the order.
        epochs: over the training half.
        batch_size: of each step.
        width: of the network's first convolutions.

    Raises:
        ValueError: if a side has fewer than 2 images, or shapes differ.
    """
    if generated.shape[1:] != real.shape[1:] or min(len(generated), len(real)) < 2:
        raise ValueError(
            f"generated images are {tuple(generated.shape)}, real ones {tuple(real.shape)}; give 2 or more "
            "of each, of one shape"
        )
    rng = torch.Generator().manual_seed(seed)
    n = min(len(generated), len(real)) // 2
    chosen = [side[torch.randperm(len(side), generator=rng)[: 2 * n]].cpu() for side in (generated, real)]
    train, test = (
        torch.cat([side[part].clamp(-1, 1) for side in chosen]) for part in (slice(n), slice(n, 2 * n))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(train.shape[1], 2, width, dropout=0.0)
    return _learned(network, train, test, rng, epochs, batch_size)


def token_two_sample_test(
    generated: Tensor, real: Tensor, seed: int = 0, epochs: int = 6, batch_size: int = 64
) -> TwoSampleTest:
    """The same of rows of tokens.

    Args:
        generated: (N, L) int64.
        real: (M, L) rows that the model was not trained on; min(N, M) of each side are used, 2 or more.
        seed: of the network, the halves and the order.
        epochs: over the training half.
        batch_size: of each step.
    """
    rng = torch.Generator().manual_seed(seed)
    n = min(len(generated), len(real)) // 2
    chosen = [side[torch.randperm(len(side), generator=rng)[: 2 * n]] for side in (generated, real)]
    train, test = (torch.cat([side[part] for side in chosen]) for part in (slice(n), slice(n, 2 * n)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TokenClassifier(int(max(train.max(), test.max())) + 1, 2)
    return _learned(network, train, test, rng, epochs, batch_size)


def _learned(
    network: nn.Module, train: Tensor, test: Tensor, rng: torch.Generator, epochs: int, batch_size: int
) -> TwoSampleTest:
    """Train on one set and count on the other; of both the first half is generated."""
    n = len(train) // 2
    labels = torch.arange(2).repeat_interleave(n)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(2 * n, generator=rng).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(train[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        told = torch.cat([network(part).argmax(1) for part in test.split(500)])
    accuracy = float((told == labels).double().mean())
    share = (accuracy * 2 * n + 2) / (2 * n + 4)  # Agresti & Coull 1998: no error of 0 where none is mistaken
    return TwoSampleTest(accuracy, (share * (1 - share) / (2 * n + 4)) ** 0.5, 2 * n)
