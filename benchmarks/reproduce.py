"""Make recorded figures again, from scratch and unattended, and say which lie outside their intervals.

    make reproduce-digits      # 4 students and the shipped teacher: about 15 minutes of one core
    make reproduce-fashion     # a teacher and 6 students: about an hour and a half of one core
    python benchmarks/reproduce.py fashion --quick        # to see that it runs

The same command again goes on where it was stopped. digits: FD of 20,000 samples; the interval is where 95 %
of new trainings (of the teacher: new samples) should lie, by Student's t from the three that were recorded.
fashion: the recorded 95 % interval of FD, which is of samples alone, and seed 0 is trained again: the same
machine and versions give the same numbers, others rounding differences. The exit code is 1 if a figure lies
outside.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from scipy.stats import t as student_t

import digits
import fashion
from momatch.data.digits import load_digits
from momatch.evaluation import builtin
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.statistics import FeatureStatistics

RESULTS = Path(__file__).parent / "results"
DIGITS, FASHION = RESULTS / "2026-11-23-digits.json", RESULTS / "2026-11-27-fashion14.json"
TEACHER_STEPS, STUDENT_STEPS = (8, 64), (1, 2, 4, 8)


@dataclass(frozen=True)
class Figure:
    """A figure made again, and what it should be.

    Attributes:
        name: of the row.
        found: FD today.
        low: lower end of the recorded interval.
        high: its upper end.
    """

    name: str
    found: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        """Whether it is as recorded."""
        return self.low <= self.found <= self.high


def expected(values: list[float]) -> tuple[float, float]:
    """Where 95 % of further values should lie."""
    n, mean, spread = len(values), statistics.mean(values), statistics.stdev(values)
    half = float(student_t.ppf(0.975, n - 1)) * spread * math.sqrt(1 + 1 / n)
    return mean - half, mean + half


def digits_again(out: Path, quick: bool) -> Iterator[Figure]:
    """Section 1 of docs/numbers.md, seed 0."""
    digits.FOLDER = out / "digits"
    if quick:
        digits.NUM_SAMPLES = 500
    recorded = json.loads(DIGITS.read_text())["rows"]
    data, judge = load_digits(), builtin.digits_classifier()
    reference = FeatureStatistics.from_features(extract(judge, data.heldout.images))
    short = ["train.num_steps=20"] if quick else []
    common = {"seeds": [0], "label": "", "set": short}
    work = [("teacher", k) for k in TEACHER_STEPS] + [("student", k) for k in STUDENT_STEPS]
    for kind, k in work:
        if kind == "teacher":
            digits.teacher(argparse.Namespace(model="digits", steps=[k], **common))
        else:
            digits.student(argparse.Namespace(recipe=f"digits-{k}", **common))
        images = load_file(digits.FOLDER / f"{kind}-{k}-seed0.safetensors")["images"]
        found = frechet_distance(FeatureStatistics.from_features(extract(judge, images)), reference)
        known = [row["fd"] for row in recorded if row["name"] == f"{kind}-{k}"]
        yield Figure(f"{kind}, {k} steps", found, *expected(known))


def fashion_again(out: Path, quick: bool) -> Iterator[Figure]:
    """Section 12 of docs/numbers.md, seed 0."""
    recorded = json.loads(FASHION.read_text())
    students = [f"{r['name']}-{r['steps']}" for r in recorded["rows"] if not r["name"].startswith("teacher")]
    file = out / "fashion14.json"
    arguments = argparse.Namespace(
        size=14,
        runs=out / "fashion14",
        file=file,
        seeds=[0],
        only=students[:1] if quick else students,
        num=500 if quick else 10_000,
        efficientnet=0,
        budget=70 if quick else recorded["budget"],
        batch=recorded["batch"],
        teacher_steps=10 if quick else 0,
        device="cpu",
    )
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if quick:
        fashion.TEACHER_STEPS = {"ancestral": (8,)}
    fashion.everything(arguments)
    known = {(row["name"], row["steps"]): row["fd"] for row in recorded["rows"] if row["seed"] == 0}
    for row in json.loads(file.read_text())["rows"]:
        if (row["name"], row["steps"]) in known:
            _, low, high = known[row["name"], row["steps"]]
            yield Figure(f"{row['name']}, {row['steps']} steps", row["fd"][0], low, high)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("digits", "fashion"))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--quick", action="store_true", help="tiny: to see that it runs, figures are wrong")
    arguments = parser.parse_args()
    out = arguments.out / ("quick" if arguments.quick else "")
    out.mkdir(parents=True, exist_ok=True)
    again = {"digits": digits_again, "fashion": fashion_again}[arguments.what]
    figures = []
    for figure in again(out, arguments.quick):
        figures.append(figure)
        verdict = "as recorded" if figure.inside else "OUTSIDE"
        interval = f"[{figure.low:.3f}, {figure.high:.3f}]"
        print(f"{figure.name:<24} FD {figure.found:7.3f}   recorded {interval}   {verdict}", flush=True)
    outside = sum(not figure.inside for figure in figures)
    print(f"{len(figures) - outside} of {len(figures)} figures are as recorded")
    return int(bool(outside))


if __name__ == "__main__":
    sys.exit(main())
