"""Evaluating a model at a given number of steps: sampling, timing, measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momatch.data.images import Split
from momatch.data.rows import Rows, sample_of, spread, take
from momatch.evaluation import builtin
from momatch.evaluation.conditions import fixed_cond, fixed_rows
from momatch.evaluation.metrics import EvaluationResult, evaluate
from momatch.interop.autoencoder import decoder_of
from momatch.models.model import Model

MOST_REFERENCE, MOST_DECODED = 50_000, 10_000  # rows of large data that samples are compared with
Pair = tuple[Tensor, Tensor | None]  # pictures and labels asked for
SAMPLE_SEED_OFFSET = 10_000  # evaluation noise is never the noise that monitoring looked at


@dataclass(frozen=True)
class Row:
    """One line of an evaluation.

    Attributes:
        name: "teacher" or "student".
        steps: network calls a sample.
        samples_per_second: wall-clock, sampling alone.
        result: the measurements.
    """

    name: str
    steps: int
    samples_per_second: float
    result: EvaluationResult

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "name": self.name,
            "steps": self.steps,
            "samples_per_second": self.samples_per_second,
            "result": self.result.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        return cls(
            fields["name"],
            fields["steps"],
            fields["samples_per_second"],
            EvaluationResult.from_dict(fields["result"]),
        )


def evaluate_at(
    model: Model,
    name: str,
    data: Split,
    steps: int,
    num_samples: int,
    seed: int = 0,
    resamples: int = 200,
    watch: Callable[[Iterable[Pair]], Iterable[Pair]] = iter,
    batch_size: int | None = None,
) -> Row:
    """Sample `num_samples` pictures in `steps` network calls each; measure them against the held-out ones.

    Labels are asked for in equal numbers, other conditions as the held-out pictures have them. Features:
    those of the data's built-in network (if any) and pixels; of a latent model those of decoded pictures,
    if its pipeline is there. Of data in shards at most 50,000 pictures (10,000 to decode), evenly spread, are
    compared with. `watch` gets the samples, a chunk at a time, and passes them on: for progress.
    """
    cond, decoder = fixed_cond(model, data.heldout, num_samples), decoder_of(model)
    extractors, judge = builtin.judges(data.heldout, decoder, model.device)
    labels, real_labels = cond.get("label") if cond else None, data.heldout.labels
    if judge is not None and judge.metric == "retrieval_accuracy":  # what is asked for is a caption's place
        real_labels = torch.arange(len(data.heldout))
        labels = fixed_rows(data.heldout, num_samples) if model.cond_shapes else None
    seconds = 0.0

    def samples() -> Iterator[Pair]:
        nonlocal seconds
        done = 0
        noise_seed = seed + SAMPLE_SEED_OFFSET
        chunks = model.sample_chunks(num_samples, steps, cond, noise_seed, batch_size=batch_size)
        while True:
            start = time.monotonic()
            made = next(chunks, None)
            chunk = None if made is None else made.cpu()  # a GPU is waited for
            seconds += time.monotonic() - start
            if chunk is None:
                return
            yield chunk, None if labels is None else labels[done : done + len(chunk)]
            done += len(chunk)

    most = MOST_DECODED if decoder else MOST_REFERENCE
    heldout = data.heldout.images
    if isinstance(heldout, Rows) and len(heldout) > most:
        kept = spread(len(heldout), most)
        heldout, real_labels = take(heldout, kept), real_labels[kept]
    result = evaluate(
        watch(samples()),
        (heldout, real_labels),
        extractors,
        judge,
        sample_of(data.train.images, max_rows=None if isinstance(data.train.images, Tensor) else most),
        reference_name=data.heldout.name,
        seed=seed,
        resamples=resamples,
        space=data.heldout.space,
    )
    return Row(name, steps, num_samples / seconds, result)
