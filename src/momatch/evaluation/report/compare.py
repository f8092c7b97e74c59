"""Evaluations of several runs as one table: in a terminal, as Markdown, CSV or a page."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from momatch.evaluation.evaluate import Row
from momatch.evaluation.report.tables import caption, find, number, with_error, with_interval
from momatch.utils.errors import UsageError
from momatch.utils.run_folder import RunFolder

HEADER = (
    "run",
    "model",
    "calls",
    "FD [95 % interval]",
    "KID ± error",
    "precision",
    "recall",
    "density",
    "coverage",
    "accuracy",
    "samples / s",
)
SHARES = ("precision", "recall", "density", "coverage")
ACCURACIES = ("class_accuracy", "retrieval_accuracy")
NUMBERS = ("frechet", "kid", *SHARES, *ACCURACIES, "inception_score", "neighbour_ratio")
MISSING = "–"


@dataclass(frozen=True)
class Entry:
    """A row of one run's evaluation.

    Attributes:
        run: its folder's name; "" for a teacher's row that several runs have alike.
        row: what was measured.
    """

    run: str
    row: Row


def entries(runs: Sequence[Path]) -> list[Entry]:
    """The rows of all runs, in their order; a row that several have, of one teacher, comes once, and first.

    Raises:
        UsageError: if a run has not been evaluated, or its evaluation cannot be read.
    """
    found = [Entry(run.resolve().name, row) for run in runs for row in _evaluation(run)]
    # Not by the time that sampling took, which differs however alike two rows are.
    keys = [json.dumps([e.row.name, e.row.steps, e.row.result.to_dict()], sort_keys=True) for e in found]
    times = Counter(keys)
    shared = {key: Entry("", e.row) for key, e in zip(keys, found, strict=True) if times[key] > 1}
    return [*shared.values(), *(e for key, e in zip(keys, found, strict=True) if times[key] == 1)]


def _evaluation(run: Path) -> list[Row]:
    path = RunFolder(run).evaluation
    if not path.is_file():
        raise UsageError(f"{run} has no evaluation.json; evaluate it first: momatch evaluate {run}")
    try:
        return [Row.from_dict(row) for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); evaluate again: momatch evaluate {run}"
        ) from None


def cells(entry: Entry) -> list[str]:
    """An entry's texts in the order of `HEADER`."""
    row = entry.row
    frechet, kid = find(row, "frechet"), find(row, "kid")
    accuracy = find(row, "class_accuracy") or find(row, "retrieval_accuracy")
    return [
        entry.run,
        row.name,
        str(row.steps),
        with_interval(frechet) if frechet else MISSING,
        with_error(kid) if kid else MISSING,
        *(f"{m.value:.3f}" if (m := find(row, name)) else MISSING for name in SHARES),
        f"{accuracy.value:.1%}" if accuracy else MISSING,
        number(row.samples_per_second),
    ]


def markdown(found: Sequence[Entry]) -> str:
    """A Markdown table, its caption below."""
    lines = [list(HEADER), ["---", "---"] + ["--:"] * (len(HEADER) - 2), *map(cells, found)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{caption([entry.row for entry in found])}\n"


def comma_separated(found: Sequence[Entry]) -> str:
    """CSV for programs: every number as it is, with error and interval; empty where there is none."""
    file = io.StringIO()
    circumstances = ["n_generated", "n_reference", "features", "reference", "seed"]
    parts = [f"{name}{part}" for name in NUMBERS for part in ("", "_error", "_low", "_high")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "model", "calls", "samples_per_second", *circumstances, *parts])
    for entry in found:
        row, frechet = entry.row, find(entry.row, "frechet")
        used = [getattr(frechet, name, None) for name in circumstances]
        numbers: list[float | None] = []
        for m in (find(row, name) for name in NUMBERS):
            numbers += [m.value, m.standard_error, m.low, m.high] if m else [None] * 4
        writer.writerow([entry.run, row.name, row.steps, row.samples_per_second, *used, *numbers])
    return file.getvalue()


def page(found: Sequence[Entry]) -> str:
    """An HTML page of its own: the table, for light and dark, narrow windows and paper."""
    from jinja2 import Environment

    template = Path(__file__).with_name("compare.html.jinja").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    best = min((m.value for entry in found if (m := find(entry.row, "frechet"))), default=None)
    rows = []
    for entry in found:
        frechet = find(entry.row, "frechet")
        rows.append((cells(entry), frechet is not None and frechet.value == best))
    return environment.from_string(template).render(
        header=HEADER, rows=rows, caption=caption([entry.row for entry in found])
    )


FORMATS = {".md": markdown, ".csv": comma_separated, ".html": page}
