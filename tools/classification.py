"""Training the small classifier whose features and verdicts the built-in evaluation uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import nn

from momatch.methods.base import Batch, Method, Update


class Classification(Method):
    """Cross-entropy of a classifier: pictures with a little noise → labels.

    Args:
        classifier: images → logits; its role is "classifier".
        noise_std: standard deviation of the Gaussian noise added to each picture, against overfitting.
    """

    def __init__(self, classifier: nn.Module, noise_std: float = 0.1):
        self.classifier = classifier
        self.noise_std = noise_std

    def step(self, step: int, batch: Batch) -> Update:
        """One minibatch of cross-entropy; the same at every step."""
        if batch.cond is None:
            raise ValueError("a classifier needs labels")
        logits = self.classifier(batch.x + self.noise_std * batch.normal())
        loss = F.cross_entropy(logits, batch.cond["label"])
        accuracy = (logits.argmax(1) == batch.cond["label"]).float().mean()
        return Update({"classifier": loss}, lambda: {"loss": loss.detach(), "accuracy": accuracy})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"classifier": the network}."""
        return {"classifier": self.classifier}
