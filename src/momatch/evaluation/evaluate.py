"""Evaluating models at several step counts: sampling, timing, measuring, and keeping what was found.

What does not depend on the samples is done once for all rows: see `Judge` and `metrics.Reference`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from momatch.data.images import Split
from momatch.data.rows import Rows, sample_of, spread, take
from momatch.evaluation import builtin
from momatch.evaluation.conditions import fixed_cond, fixed_rows
from momatch.evaluation.gradient_moment import GradientJudge
from momatch.evaluation.metrics import EvaluationResult, Reference
from momatch.evaluation.tokens import integers, listed
from momatch.evaluation.tokens import measure as measure_tokens
from momatch.evaluation.vectors import measure as measure_vectors
from momatch.interop.autoencoder import Decoder, decoder_of, to_pictures
from momatch.models.model import Model
from momatch.utils.files import write_atomically
from momatch.utils.run_folder import RunFolder
from momatch.utils.text import count_of

MOST_REFERENCE, MOST_DECODED = 50_000, 10_000  # rows of large data that samples are compared with
SAMPLE_SEED_OFFSET = 10_000  # evaluation noise is never the noise that monitoring looked at
GRID_SAMPLES, GRID_COLUMNS = 60, 10
Pair = tuple[Tensor, Tensor | None]  # images and the labels they are conditioned on
Watch = Callable[[Iterable[Pair], str, int], Iterable[Pair]]


@dataclass(frozen=True)
class Row:
    """One row of an evaluation.

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


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: "teacher" or "student".
        model: what to sample.
        steps: network calls, one row each.
    """

    name: str
    model: Model
    steps: tuple[int, ...]


class Judge:
    """Measures samples of any number of models against the held-out images.

    Features are those of the data's built-in network (if any) and pixels; of latents, with a decoder, those
    of decoded images. Of data in shards at most 50,000 images (10,000 to decode), evenly spread, are compared
    with. Networks are loaded here; features of real images are extracted when the first row needs them, and
    kept.

    Args:
        data: held-out images to compare with, and training images for the floor.
        decoder: latents → images, for latent models whose pipeline is there.
        device: where extractors and classifier run.
        seed: of samples and resampling.
        resamples: bootstrap resamples of the Fréchet distance.
        batch_size: samples that a network is given at a time; see `Model.sample`.
        gradients: also judges the samples, by their gradient moment.
    """

    def __init__(
        self,
        data: Split,
        decoder: Decoder | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        resamples: int = 200,
        batch_size: int | None = None,
        gradients: GradientJudge | None = None,
    ):
        self.gradients = gradients
        self.data, self.decoder, self.seed, self.batch_size = data, decoder, seed, batch_size
        extractors, classifier = builtin.judges(data.heldout, decoder, device)
        self._retrieves = classifier is not None and classifier.metric == "retrieval_accuracy"
        images, labels = data.heldout.images, data.heldout.labels
        if self._retrieves:  # a picture's label is the place of its caption
            labels = torch.arange(len(data.heldout))
        training = data.train.images
        tokens = data.heldout.space == "tokens"
        if tokens:
            images, training = integers(data.heldout), integers(data.train)
        most = MOST_DECODED if decoder else MOST_REFERENCE
        if isinstance(images, Rows) and len(images) > most:
            kept = spread(len(images), most)
            images, labels = take(images, kept), labels[kept]
        self._reference = Reference(
            (images, labels),
            extractors,
            classifier,
            None if tokens else sample_of(training, max_rows=None if isinstance(training, Tensor) else most),
            name=data.heldout.name,
            seed=seed,
            resamples=resamples,
            space=data.heldout.space,
        )

    def row(
        self,
        model: Model,
        name: str,
        steps: int,
        num_samples: int,
        watch: Callable[[Iterable[Pair]], Iterable[Pair]] = iter,
    ) -> Row:
        """Draw `num_samples` samples in `steps` network calls each, and measure them.

        Labels are asked for in equal numbers, other conditions as the held-out images have them. `watch` gets
        the samples, a chunk at a time, and passes them on: for progress.
        """
        cond = fixed_cond(model, self.data.heldout, num_samples)
        labels = cond.get("label") if cond else None
        if self._retrieves:
            labels = fixed_rows(self.data.heldout, num_samples) if model.cond_shapes else None
        seconds = 0.0
        space = self.data.heldout.space
        kept: list[Tensor] = []

        def samples() -> Iterator[Pair]:
            nonlocal seconds
            done = 0
            noise_seed = self.seed + SAMPLE_SEED_OFFSET
            chunks = model.sample_chunks(num_samples, steps, cond, noise_seed, batch_size=self.batch_size)
            while True:
                start = time.monotonic()
                made = next(chunks, None)
                chunk = None if made is None else made.cpu()  # a GPU is waited for
                seconds += time.monotonic() - start
                if chunk is None:
                    return
                few = self.gradients is not None and done < self.gradients.most
                if space in ("vectors", "tokens") or few:
                    kept.append(chunk)
                yield chunk, None if labels is None else labels[done : done + len(chunk)]
                done += len(chunk)

        result = self._reference.measure(watch(samples()))
        if kept:
            made, more = torch.cat(kept), []
            if space == "tokens":
                more = measure_tokens(made, self.data, self.seed)
            elif space == "vectors":
                more = measure_vectors(made, cond, self.data, self.seed)
            if self.gradients is not None:
                more = [*more, *self.gradients.judge(made, self.data, self.seed)]
            result = EvaluationResult([*result.measurements, *more])
        return Row(name, steps, num_samples / seconds, result)

    def draw(self, path: Path, model: Model, steps: int) -> None:
        """Write a picture of a few samples; of tokens a text.

        They are drawn anew, not taken from those that were measured: their noise is that of `momatch sample`
        with this seed, which looks at the model as a user would.
        """
        from momatch.evaluation.report.plots import image_grid, save_png, vector_plot

        path.parent.mkdir(exist_ok=True)
        cond = fixed_cond(model, self.data.heldout, GRID_SAMPLES)
        samples = model.sample(GRID_SAMPLES, steps, cond, self.seed, batch_size=self.batch_size).cpu()
        if model.of_tokens:
            path.with_suffix(".txt").write_text(listed(model.texts(samples[:GRID_COLUMNS])), encoding="utf-8")
            return
        if self.data.heldout.space == "vectors":
            vector_plot(samples, sample_of(self.data.heldout.images, max_rows=GRID_SAMPLES)).savefig(path)
            return
        save_png(image_grid(to_pictures(samples, self.decoder), GRID_COLUMNS), path)


def evaluate_at(
    model: Model,
    name: str,
    data: Split,
    steps: int,
    num_samples: int,
    seed: int = 0,
    resamples: int = 200,
    watch: Callable[[Iterable[Pair]], Iterable[Pair]] = iter,
) -> Row:
    """One row by a `Judge` of its own; for several rows make one, and ask it for each."""
    judge = Judge(data, decoder_of(model), model.device, seed, resamples=resamples)
    return judge.row(model, name, steps, num_samples, watch)


def assess(
    directory: Path | None,
    candidates: Sequence[Candidate],
    data: Split,
    num_samples: int,
    seed: int,
    watch: Watch | None = None,
    batch_size: int | None = None,
    gradients: GradientJudge | None = None,
) -> Iterator[Row]:
    """Measure every candidate at every step count; with a folder, keep rows and pictures there as they come.

    Rows that evaluation.json holds already stay, unless they are measured anew, or were measured on another
    number of samples, seed or data, so that all rows of a file compare.

    Args:
        directory: a run's folder, or None to keep nothing.
        candidates: what to measure.
        data: held-out images to compare with, and training images for the floor.
        num_samples: samples for each row.
        seed: of samples and resampling.
        watch: passes samples on as they are pulled: (samples, title of the row, how many); for progress.
        batch_size: samples that a network is given at a time; see `Model.sample`.
        gradients: also judges the samples, by their gradient moment.

    Yields:
        One row at a time.
    """
    judges: dict[tuple[str, str], Judge] = {}
    for candidate in candidates:
        model = candidate.model
        known = str(model.provenance.pipeline), str(model.device)  # all that a judge depends on of a model
        if known not in judges:
            decoder = decoder_of(model)
            judges[known] = Judge(
                data, decoder, model.device, seed, batch_size=batch_size, gradients=gradients
            )
        judge = judges[known]
        for steps in candidate.steps:
            title = f"{candidate.name}, {count_of(steps, 'step')}"
            watched = (lambda pairs, title=title: watch(pairs, title, num_samples)) if watch else iter
            row = judge.row(model, candidate.name, steps, num_samples, watched)
            if directory:
                _keep(RunFolder(directory).evaluation, row, data.train.name)
                judge.draw(RunFolder(directory).samples / f"final-{row.name}-{steps}.png", model, steps)
            yield row


def help_to_sample(
    directory: Path | None,
    candidates: Sequence[Candidate],
    data: Split,
    num_samples: int,
    seed: int,
    watch: Watch | None = None,
    batch_size: int | None = None,
    gradients: GradientJudge | None = None,
) -> None:
    """Draw what `assess` draws, and drop it: in a process that shares the sampling with one that measures.

    Arguments as there.
    """
    for candidate in candidates:
        model = candidate.model
        for steps in candidate.steps:
            cond = fixed_cond(model, data.heldout, num_samples)
            noise_seed = seed + SAMPLE_SEED_OFFSET
            for _ in model.sample_chunks(num_samples, steps, cond, noise_seed, batch_size=batch_size):
                pass
            if directory:
                cond = fixed_cond(model, data.heldout, GRID_SAMPLES)
                model.sample(GRID_SAMPLES, steps, cond, seed, batch_size=batch_size)


def _keep(path: Path, row: Row, data_name: str) -> None:
    rows = [old for old in _rows(path, data_name) if _comparable(old, row)]
    rows = [old for old in rows if (old.name, old.steps) != (row.name, row.steps)] + [row]
    rows.sort(key=lambda each: (each.name != "teacher", each.steps))
    contents = json.dumps({"data": data_name, "rows": [each.to_dict() for each in rows]}, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(contents))


def _rows(path: Path, data_name: str) -> list[Row]:
    """What the file holds by now; a file that cannot be read, or of other data, counts as empty."""
    try:
        contents = json.loads(path.read_text())
        return [Row.from_dict(row) for row in contents["rows"]] if contents["data"] == data_name else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _comparable(old: Row, new: Row) -> bool:
    def circumstances(row: Row) -> set[tuple[int, str, int]]:
        found = [m for m in row.result.measurements if m.metric == "frechet"]
        return {(m.n_generated, m.reference, m.seed) for m in found}

    return circumstances(old) == circumstances(new)
