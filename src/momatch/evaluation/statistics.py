"""The first two moments of a set of features: all that the Fréchet distance looks at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from momatch.evaluation.features import check_features


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of n feature vectors.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased (divided by n − 1).
        n: number of samples behind them.
    """

    mean: Tensor
    covariance: Tensor
    n: int

    def __post_init__(self) -> None:
        """Refuse shapes that do not belong together."""
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and covariance {tuple(self.covariance.shape)} do not belong "
                "together; give (D,) and (D, D)"
            )

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (N, D), N ≥ 2.

        Raises:
            ValueError: if there are fewer than 2 samples, or some are not finite.
        """
        features = check_features(features, "given").detach().double().cpu()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {"mean": self.mean, "covariance": self.covariance, "n": torch.tensor(self.n)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        from safetensors.torch import load_file

        tensors = load_file(str(path))
        if set(tensors) != {"mean", "covariance", "n"}:
            raise ValueError(f"{path} holds {sorted(tensors)}, not feature statistics; write it with save()")
        return cls(tensors["mean"].double(), tensors["covariance"].double(), int(tensors["n"]))
