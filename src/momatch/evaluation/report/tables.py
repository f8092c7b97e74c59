"""Evaluation rows: a table for the terminal, one for Markdown, and the verdict on student and teacher."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from momatch.evaluation.evaluate import Row
from momatch.evaluation.metrics import Measurement
from momatch.utils.text import count_of

if TYPE_CHECKING:
    from rich.console import RenderableType
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
VECTOR_METRICS = (
    "sliced_wasserstein",
    "sliced_wasserstein_floor",
    "energy_distance",
    "conditional_sliced_wasserstein",
    "conditional_energy_distance",
    "conditional_mean_error",
    "conditional_std_error",
)
VECTOR_COLUMNS = (
    "model",
    "steps",
    "sliced W2",
    "its floor",
    "energy distance",
    "sliced W2, x and condition",
    "energy distance, x and condition",
    "error of means by condition",
    "error of standard deviations by condition",
    "FD [95 % interval]",
    "samples / s",
)
SHORT_VECTOR_COLUMNS = (
    "model", "steps", "SW2", "floor", "energy", "SW2|c", "energy|c", "mean|c", "std|c", "FD [95 %]", "1/s"
)  # fmt: skip
VECTOR_LEGEND = (
    "SW2, energy: distances to held-out rows in units of their spread, lower is better; |c: of samples "
    "together with what was asked, or by condition. Floor: SW2 of as many training rows."
)
TOKEN_METRICS = (
    "ngram_divergence_2",
    "ngram_divergence_3",
    "ngram_divergence_4",
    "ngram_divergence_5",
    "word_share",
    "row_entropy",
    "copied_share",
    "two_sample_accuracy",
)
TOKEN_COLUMNS = (
    "model",
    "steps",
    "divergence of 2-grams",
    "3-grams",
    "4-grams",
    "5-grams",
    "words known",
    "entropy of a row",
    "rows copied",
    "told from data",
    "FD of bigrams [95 % interval]",
    "samples / s",
)
SHORT_TOKEN_COLUMNS = (
    "model", "steps", "JS 2", "JS 3", "JS 4", "JS 5", "words", "entropy", "copied", "C2ST", "FD [95 %]", "1/s"
)  # fmt: skip
TOKEN_LEGEND = (
    "JS n: Jensen-Shannon divergence of n-grams in bits, lower is better. Words: share that occurs in the "
    "data. Entropy: of the tokens in a row, bits. Copied: rows of which half or more stands in a training "
    "row. C2ST: how often a network tells samples from held-out rows, 0.5 is best."
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


def evaluation_table(rows: Sequence[Row | Mapping[str, Any]], width: int | None = 80) -> RenderableType:
    """The evaluation for a terminal, by rich; rows as such or as evaluation.json has them. Nothing is cut.

    Where it is too wide, columns without any number go, which the caption says; if it is still too wide it is
    turned, a column for each model and step count, as many beside each other as fit.

    Args:
        rows: at least one.
        width: of the terminal; None for output that goes elsewhere, as wide as it is.
    """
    from rich.console import Group
    from rich.text import Text

    rows = _as_rows(rows)
    names, lines = list(_short(rows)), [cells(row) for row in rows]
    words = f"{caption(rows)} {_legend(rows)}"
    table, said = _table(names, lines), ""
    if not _fits(table, width):
        empty = [i for i in range(len(names)) if all(line[i] == MISSING for line in lines)]
        kept = [i for i in range(len(names)) if i not in empty]
        said = f" Not measured, so left out: {', '.join(names[i] for i in empty)}." if empty else ""
        names, lines = [names[i] for i in kept], [[line[i] for i in kept] for line in lines]
        table = _table(names, lines)
    tables = [table] if _fits(table, width) else _turned(names, lines, width)
    return Group(*tables, Text(words + said, overflow="fold"))


def evaluation_text(rows: Sequence[Row | Mapping[str, Any]]) -> str:
    """The same for a file or another program: plain, and as wide as it is."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=10_000, color_system=None).print(evaluation_table(rows, None))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _turned(names: Sequence[str], lines: Sequence[Sequence[str]], width: int | None) -> list[Table]:
    """Tables whose columns are the lines, as many in each as fit, one at least."""
    found, group = [], list(lines)
    while group:
        for count in range(len(group), 0, -1):
            part = group[:count]
            heads = [f"{line[0]}, {line[1]}" for line in part]  # model and steps
            entries = [[names[i], *(line[i] for line in part)] for i in range(2, len(names))]
            table = _table([f"{names[0]}, {names[1]}", *heads], entries)
            if count == 1 or _fits(table, width):
                break
        found.append(table)
        group = group[count:]
    return found


def _fits(table: Table, width: int | None) -> bool:
    from rich.console import Console

    return width is None or Console(width=10_000).measure(table).maximum <= width


def evaluation_csv(rows: Sequence[Row]) -> str:
    """Every measurement of every row, one a line, under a line of names."""
    stream = io.StringIO()
    names = ["name", "steps", "samples_per_second", *(field.name for field in fields(Measurement))]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for m in row.result.to_dict()["measurements"]:
            speed = round(row.samples_per_second, 3)
            writer.writerow({"name": row.name, "steps": row.steps, "samples_per_second": speed, **m})
    return stream.getvalue()


def evaluation_markdown(rows: Sequence[Row | Mapping[str, Any]]) -> str:
    """The evaluation as a Markdown table, its caption below; rows as in `evaluation_table`."""
    rows = _as_rows(rows)
    names = columns(rows)
    lines = [list(names), ["---"] + ["--:"] * (len(names) - 1), *(cells(row) for row in rows)]
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


def of_vectors(row: Row) -> bool:
    """Whether the row is of samples that are no pictures."""
    return any(m.metric == "sliced_wasserstein" for m in row.result.measurements)


def of_tokens(row: Row) -> bool:
    """Whether the row is of samples that are tokens."""
    return any(m.metric == "row_entropy" for m in row.result.measurements)


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the entries of `cells`."""
    if any(map(of_tokens, rows)):
        return TOKEN_COLUMNS
    return VECTOR_COLUMNS if any(map(of_vectors, rows)) else COLUMNS


def _short(rows: Sequence[Row]) -> tuple[str, ...]:
    if any(map(of_tokens, rows)):
        return SHORT_TOKEN_COLUMNS
    return SHORT_VECTOR_COLUMNS if any(map(of_vectors, rows)) else SHORT_COLUMNS


def _legend(rows: Sequence[Row]) -> str:
    if any(map(of_tokens, rows)):
        return TOKEN_LEGEND
    return VECTOR_LEGEND if any(map(of_vectors, rows)) else LEGEND


def cells(row: Row) -> list[str]:
    """A row's entries in the order of `columns`."""
    if of_vectors(row) or of_tokens(row):
        found = [find(row, metric) for metric in (TOKEN_METRICS if of_tokens(row) else VECTOR_METRICS)]
        frechet = find(row, "frechet")
        return [
            row.name,
            str(row.steps),
            *(number(m.value) if m else MISSING for m in found),
            with_interval(frechet) if frechet else MISSING,
            number(row.samples_per_second),
        ]
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
    floors = _token_references(rows[0]) if rows and of_tokens(rows[0]) else ""
    judged = f" Accuracy of real pictures: {' / '.join(ceilings)}." if ceilings else ""
    judged += _gradient_moments(rows)
    return (
        "FD = Fréchet distance, biased by n. "
        f"n_generated = {each('n_generated')}, n_reference = {each('n_reference')}, "
        f"features = {each('features')}, reference = {each('reference')}, seed = {each('seed')}."
        f"{judged}{floors}{differ}"
    )


def _gradient_moments(rows: Sequence[Row]) -> str:
    """What a judge by gradients found, where there was one."""
    found = [(row, m) for row in rows if (m := find(row, "gradient_moment"))]
    if not found:
        return ""
    said = "; ".join(f"{row.name} {row.steps} {with_error(m)}" for row, m in found)
    floor = find(found[0][0], "gradient_moment_floor")
    real = f"; real training rows {with_error(floor)}" if floor else ""
    return f" Gradient moment by {found[0][1].features}, lower is better: {said}{real}."


def _token_references(row: Row) -> str:
    """What training rows score against held-out ones, and held-out rows themselves."""

    def of(metric: str) -> str:
        return number(found.value) if (found := find(row, metric)) else MISSING

    floors = " / ".join(of(f"ngram_divergence_floor_{n}") for n in (2, 3, 4, 5))
    return (
        f" Floor: JS {floors} of as many training rows. Held-out rows: words {of('word_share_reference')}, "
        f"entropy {of('row_entropy_reference')}, copied {of('copied_share_reference')}."
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
