"""Minibatches as a function of the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from momatch.methods.base import Batch
from momatch.training.seeding import generator

Batches = Callable[[int], Batch]


def image_batches(images: Tensor, labels: Tensor | None, batch_size: int, seed: int) -> Batches:
    """Step → `batch_size` pictures drawn with replacement, and the generator for that step's noise.

    Args:
        images: (N, …) all pictures, on the device to train on.
        labels: (N,) their labels, given as cond["label"]; None for an unconditional model.
        batch_size: size of the whole batch.
        seed: the run's seed.
    """

    def batch(step: int) -> Batch:
        rng = generator(seed, "train", step, device=images.device)
        index = torch.randint(len(images), (batch_size,), generator=rng, device=images.device)
        return Batch(images[index], None if labels is None else {"label": labels[index]}, rng)

    return batch
