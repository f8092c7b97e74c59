"""Measuring a run's models at several step counts, and keeping what was found in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from momatch.data.images import ImageSet, Split
from momatch.evaluation.conditions import fixed_cond
from momatch.evaluation.report.plots import image_grid, save_png
from momatch.evaluation.sweep import Pair, Row, evaluate_at
from momatch.interop.autoencoder import decoder_of, to_pictures
from momatch.models.model import Model
from momatch.utils.files import write_atomically
from momatch.utils.text import count_of

GRID_SAMPLES, GRID_COLUMNS = 60, 10
Watch = Callable[[Iterable[Pair], str, int], Iterable[Pair]]


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: "teacher" or "student".
        model: what to sample.
        steps: network calls, one line each.
    """

    name: str
    model: Model
    steps: tuple[int, ...]


def assess(
    directory: Path | None,
    candidates: Sequence[Candidate],
    data: Split,
    num_samples: int,
    seed: int,
    watch: Watch | None = None,
    batch_size: int | None = None,
) -> Iterator[Row]:
    """Measure every candidate at every step count; with a folder, keep rows and pictures there as they come.

    Rows that evaluation.json holds already stay, unless they are measured anew, or were measured on another
    number of samples, seed or data, so that all rows of a file compare.

    Args:
        directory: a run's folder, or None to keep nothing.
        candidates: what to measure.
        data: held-out pictures to compare with, and training pictures for the floor.
        num_samples: samples for each row.
        seed: of samples and resampling.
        watch: passes samples on as they are pulled: (samples, title of the row, how many); for progress.
        batch_size: samples that a network is given at a time; see `Model.sample`.

    Yields:
        One row at a time.
    """
    for candidate in candidates:
        for steps in candidate.steps:
            title = f"{candidate.name}, {count_of(steps, 'step')}"
            watched = (lambda pairs, title=title: watch(pairs, title, num_samples)) if watch else iter
            row = evaluate_at(
                candidate.model,
                candidate.name,
                data,
                steps,
                num_samples,
                seed,
                watch=watched,
                batch_size=batch_size,
            )
            if directory:
                _keep(directory / "evaluation.json", row, data.train.name)
                path = directory / "samples" / f"final-{row.name}-{steps}.png"
                _draw(path, candidate.model, steps, seed, data.heldout, batch_size)
            yield row


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


def _draw(path: Path, model: Model, steps: int, seed: int, data: ImageSet, batch_size: int | None) -> None:
    path.parent.mkdir(exist_ok=True)
    cond = fixed_cond(model, data, GRID_SAMPLES)
    samples = model.sample(GRID_SAMPLES, steps, cond, seed, batch_size=batch_size).cpu()
    images = to_pictures(samples, decoder_of(model))
    save_png(image_grid(images, GRID_COLUMNS), path)
