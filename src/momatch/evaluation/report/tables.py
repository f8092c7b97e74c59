"""Evaluation rows: a table for the terminal, one for Markdown, and the verdict on student and teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from momatch.evaluation.evaluate import Row
from momatch.evaluation.metrics import Measurement
from momatch.utils.text import count_of

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "model",
    "steps",
    "FD [95 % interval]",
    "floor",
    "KID ± error",
    "precision",
    "recall",
    "accuracy",
    "neighbour ratio",
    "samples / s",
)
SHORT_COLUMNS = ("model", "steps", "FD [95 %]", "floor", "KID", "prec.", "recall", "acc.", "near", "1/s")
LEGEND = (
    "FD, KID: distances to real pictures, lower is better. Floor: real training pictures. "
    "Near: distance to the nearest of these, over that of held-out pictures."
)
MISSING = "–"


@dataclass(frozen=True)
class Verdict:
    """Where the student's Fréchet distance stands against the teacher's best.

    Attributes:
        outcome: "below" (better), "level", "above", or "none" if the numbers do not allow a comparison.
        sentence: the same in words, with the numbers.
    """

    outcome: Literal["below", "level", "above", "none"]
    sentence: str


def verdict(rows: Sequence[Row], steps: int | None = None) -> Verdict:
    """Compare the student with the teacher at whichever steps the teacher is best.

    Below or above is said only if the two 95 % intervals do not overlap. That is cautious: both distances are
    to the same reference, so their difference is known better than either. Distances compare only at equal
    sample sizes and on the same features and reference; otherwise there is no verdict.

    Args:
        rows: of student and teacher.
        steps: which student; its largest number of steps if None.
    """
    students = [row for row in rows if row.name == "student" and steps in (None, row.steps)]
    teachers = [row for row in rows if row.name == "teacher" and find(row, "frechet")]
    student = max(students, key=lambda row: row.steps, default=None)
    ours = find(student, "frechet") if student else None
    if student is None or ours is None or not teachers:
        return Verdict("none", "No verdict: a student and a teacher must both be evaluated.")
    teacher = min(teachers, key=lambda row: _value(row, "frechet"))
    theirs = find(teacher, "frechet")
    assert theirs is not None
    if _circumstances(ours) != _circumstances(theirs):
        return Verdict(
            "none",
            "No verdict: student and teacher differ in sample size, features or reference.",
        )
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return Verdict("none", "No verdict: the distances came without intervals.")
    numbers = (
        f"FD {with_interval(ours)} for the student at {count_of(student.steps, 'step')}, "
        f"{with_interval(theirs)} for the teacher at its best, {count_of(teacher.steps, 'step')}"
    )
    if ours.high < theirs.low:
        return Verdict("below", f"The student is below (better than) its teacher: {numbers}.")
    if ours.low > theirs.high:
        return Verdict("above", f"The student is above (worse than) its teacher: {numbers}.")
    return Verdict(
        "level",
        f"Student and teacher cannot be told apart with {ours.n_reference} held-out pictures, their 95 % "
        f"intervals overlap: {numbers}.",
    )


def evaluation_table(rows: Sequence[Row | Mapping[str, Any]]) -> Table:
    """The evaluation for a terminal of 80 columns, by rich; rows as such or as evaluation.json has them."""
    from rich import box
    from rich.table import Table

    rows = _as_rows(rows)
    table = Table(
        caption=f"{caption(rows)} {LEGEND}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    for i, column in enumerate(SHORT_COLUMNS):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def evaluation_markdown(rows: Sequence[Row | Mapping[str, Any]]) -> str:
    """The evaluation as a Markdown table, its caption below; rows as in `evaluation_table`."""
    rows = _as_rows(rows)
    lines = [list(COLUMNS), ["---"] + ["--:"] * (len(COLUMNS) - 1), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption(rows)}\n"


def find(row: Row, metric: str) -> Measurement | None:
    """A row's measurement, if finite: the one on `shown_features`, or the only one there is."""
    found = [m for m in row.result.measurements if m.metric == metric and math.isfinite(m.value)]
    shown = shown_features(row)
    return next((m for m in found if m.features == shown), found[0] if len(found) == 1 else None)


def shown_features(row: Row) -> str | None:
    """The features that tables show: the first that are not mere pixels, if there are any."""
    names = [m.features for m in row.result.measurements if m.metric == "frechet"]
    return next((name for name in names if not name.startswith("pixels")), names[0] if names else None)


def cells(row: Row) -> list[str]:
    """A row's entries in the order of `COLUMNS`."""
    frechet, floor, kid = (find(row, metric) for metric in ("frechet", "frechet_floor", "kid"))
    shares = [_fixed(find(row, metric), 2) for metric in ("precision", "recall")]
    return [
        row.name,
        str(row.steps),
        with_interval(frechet) if frechet else MISSING,
        number(floor.value) if floor else MISSING,
        with_error(kid) if kid else MISSING,
        *shares,
        _share(row),
        _fixed(find(row, "neighbour_ratio"), 2),
        number(row.samples_per_second),
    ]


def caption(rows: Sequence[Row]) -> str:
    """One line that says on what the numbers stand; several values where rows differ."""
    used = [m for row in rows if (m := find(row, "frechet"))]
    if not used:
        return "Nothing was measured."

    def each(name: str) -> str:
        values = dict.fromkeys(getattr(m, name) for m in used)
        return " / ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)

    differ = (
        " The rows differ in these: compare only like with like."
        if len(set(map(_circumstances, used))) > 1
        else ""
    )
    ceilings = dict.fromkeys(cell for row in rows if (cell := _share(row, "_reference")) != MISSING)
    judged = f" Accuracy of real pictures: {' / '.join(ceilings)}." if ceilings else ""
    return (
        "FD = Fréchet distance, biased by n. "
        f"n_generated = {each('n_generated')}, n_reference = {each('n_reference')}, "
        f"features = {each('features')}, reference = {each('reference')}, seed = {each('seed')}."
        f"{judged}{differ}"
    )


def number(value: float) -> str:
    """Three significant digits; from 100 up whole numbers with separators; an exponent only below 1e-4."""
    if not math.isfinite(value):
        return MISSING
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def with_interval(m: Measurement) -> str:
    """'value [low, high]', with as many digits as the error leaves meaning to."""
    if m.low is None or m.high is None:
        return number(m.value)
    digits = _digits(m.standard_error if m.standard_error else (m.high - m.low) / 4)
    return f"{m.value:,.{digits}f} [{m.low:,.{digits}f}, {m.high:,.{digits}f}]"


def with_error(m: Measurement) -> str:
    """'value ± standard error', likewise."""
    if not m.standard_error:
        return number(m.value)
    digits = _digits(m.standard_error)
    return f"{m.value:,.{digits}f} ± {m.standard_error:,.{digits}f}"


def _as_rows(rows: Sequence[Row | Mapping[str, Any]]) -> list[Row]:
    return [row if isinstance(row, Row) else Row.from_dict(dict(row)) for row in rows]


def _digits(error: float) -> int:
    """Decimals at which the error is worth 3 to 30 units of the last digit."""
    return min(max(-math.floor(math.log10(error / 3)), 0), 8) if error > 0 else 3


def _share(row: Row, of: str = "") -> str:
    """Class or retrieval accuracy: of the samples, or (`_reference`) of real pictures."""
    found = find(row, f"class_accuracy{of}") or find(row, f"retrieval_accuracy{of}")
    return f"{found.value:.1%}" if found else MISSING


def _fixed(m: Measurement | None, digits: int) -> str:
    return f"{m.value:.{digits}f}" if m else MISSING


def _value(row: Row, metric: str) -> float:
    m = find(row, metric)
    return m.value if m else math.inf


def _circumstances(m: Measurement) -> tuple[Any, ...]:
    return (m.features, m.reference, m.n_generated, m.n_reference)
