"""The studies behind docs/numbers.md run, start to end, on budgets on which nothing is learned, and go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *options: str, code: int = 0) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.slow
def test_figures_made_again_on_a_tiny_budget_lie_outside_what_is_recorded(tmp_path):
    """A check that could not fail would say that all is as recorded."""
    for _ in range(2):  # the second one goes on, and measures what is there
        said = run("reproduce", "digits", "--quick", "--out", str(tmp_path), code=1)
    lines = [line for line in said.splitlines() if "recorded [" in line]
    assert len(lines) == 6 and all("OUTSIDE" in line for line in lines if line.startswith("student"))


@pytest.mark.slow
@pytest.mark.parametrize("study", ["elastic", "reward"])
def test_what_is_beyond_the_paper(study, tmp_path):
    file = tmp_path / "rows.json"
    options = ("--runs", str(tmp_path), "--file", str(file), "--num", "500", "--shorter", "20")
    run("beyond", study, *options)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == {"elastic": 16, "reward": 20}[study]
    assert run("beyond", study, *options) == "", "nothing is measured twice"


@pytest.mark.slow
def test_a_law_that_is_known(tmp_path):
    file = tmp_path / "rows.json"
    options = ("--runs", str(tmp_path), "--file", str(file), "--num", "5000")
    run("wide", "all", *options, "--teacher-steps", "20", "--pairs", "2", "--no-exact")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 1 + 2 * (5 + 7 + 4)
    real = rows[0]
    assert real["frechet"] < 0.05 and abs(real["energy"]) < 0.01, "real samples are those of the law"
    assert all(row["frechet"] > 10 * real["frechet"] for row in rows[1:])
    assert "| narrow | student | 8 |" in run("wide", "table", "--file", str(file))
