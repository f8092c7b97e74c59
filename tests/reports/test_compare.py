"""`momatch compare`: what several runs' evaluations become in one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from momatch.cli import main
from momatch.evaluation.evaluate import Row
from momatch.evaluation.metrics import EvaluationResult, Measurement


def row(name: str, steps: int, fd: float, n: int = 2000) -> Row:
    def number(metric: str, value: float, error: float | None = None) -> Measurement:
        low, high = (None, None) if error is None else (value - 2 * error, value + 2 * error)
        return Measurement(metric, value, error, low, high, "a-classifier", "a-test", n, 500, 0)

    found = [number("frechet", fd, 0.02), number("kid", fd / 10, 0.001), number("coverage", 0.876)]
    return Row(name, steps, 1234.5, EvaluationResult([*found, number("class_accuracy", 0.95, 0.01)]))


def evaluated(folder: Path, *rows: Row) -> str:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"data": "a", "rows": [r.to_dict() for r in rows]}))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    teacher = row("teacher", 64, 1.5)
    first = evaluated(tmp_path / "eight", teacher, row("student", 8, 1.25))
    return [first, evaluated(tmp_path / "<four>", teacher, row("student", 4, 1.75))]


def test_rows_come_in_order_and_a_shared_teacher_once(runs, capsys):
    assert main(["compare", *runs]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| ", "teacher", "64"],
        ["| eight", "student", "8"],
        ["| <four>", "student", "4"],
    ]
    assert "1.250 [1.210, 1.290]" in lines[1] and "0.876" in lines[1] and "95.0%" in lines[1]


def test_files_say_the_same(runs, tmp_path, capsys):
    for suffix in ("md", "csv", "html"):
        assert main(["compare", *runs, "--out", str(tmp_path / f"table.{suffix}")]) == 0
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(each["run"], each["calls"], float(each["frechet"])) for each in read] == [
        ("", "64", 1.5),
        ("eight", "8", 1.25),
        ("<four>", "4", 1.75),
    ]
    assert float(read[1]["frechet_low"]) == pytest.approx(1.21) and read[1]["recall"] == ""
    page = (tmp_path / "table.html").read_text()
    assert "&lt;four&gt;" in page and "<four>" not in page
    (best,) = [line for line in page.splitlines() if 'class="best"' in line]
    assert "<td>eight</td>" in best


def test_what_cannot_be_compared_is_said(runs, tmp_path, capsys):
    other = evaluated(tmp_path / "other", row("student", 8, 1.0, n=300))
    assert main(["compare", *runs, other]) == 0
    assert "compare only like with like" in capsys.readouterr().out
    (tmp_path / "never").mkdir()
    broken = evaluated(tmp_path / "broken")
    Path(broken, "evaluation.json").write_text("{")
    for command, message in (
        ([], "name what to compare"),
        ([str(tmp_path / "never")], "has no evaluation.json; evaluate it first: momatch evaluate"),
        ([broken], "cannot be read (JSONDecodeError"),
        ([*runs, "--out", "table.xlsx"], "table.xlsx"),
    ):
        assert main(["compare", *command]) == 2
        assert message in capsys.readouterr().err
