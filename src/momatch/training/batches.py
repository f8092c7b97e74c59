"""Minibatches as a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from momatch.data.paraphrases import Wordings
from momatch.data.rows import Rows
from momatch.methods.base import Batch
from momatch.utils.seeding import generator

Batches = Callable[[int], Batch]


def image_batches(
    images: Tensor | Rows,
    labels: Tensor | None,
    batch_size: int,
    seed: int,
    conditions: Mapping[str, Tensor | Rows] | None = None,
    device: torch.device | str = "cpu",
) -> Batches:
    """Step → `batch_size` pictures drawn with replacement, and the generator for that step's noise.

    Args:
        images: (N, …) all pictures or latents.
        labels: (N,) their labels, given as cond["label"]; None for a model without classes.
        batch_size: size of the whole batch.
        seed: the run's seed.
        conditions: (N, …) each, given in cond under their own names; of several wordings one is drawn.
        device: where to train. Which pictures are drawn is the same everywhere; noise is drawn there, and a
            GPU has other random numbers than the CPU.
    """
    asked: dict[str, Tensor | Rows] = {**({} if labels is None else {"label": labels}), **(conditions or {})}

    on_cpu = torch.device(device).type == "cpu"

    def batch(step: int) -> Batch:
        rng = generator(seed, "train", step)
        index = torch.randint(len(images), (batch_size,), generator=rng)
        cond = {key: rows[index] for key, rows in asked.items() if not isinstance(rows, Wordings)}
        worded = {key: rows for key, rows in asked.items() if isinstance(rows, Wordings)}
        if worded:
            u = torch.rand(batch_size, generator=rng)
            cond |= {key: rows.draw(index, u) for key, rows in worded.items()}
        if on_cpu:
            return Batch(images[index], cond or None, rng, index)
        there = {key: value.to(device) for key, value in cond.items()}
        noise = generator(seed, "train", step, device=device)
        return Batch(images[index].to(device), there or None, noise, index)

    return batch
