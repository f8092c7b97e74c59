"""What `momatch evaluate` costs on three rows, against the same command of another version of momatch.

git worktree add /tmp/before REVISION
python benchmarks/evaluate_cost.py /tmp/before/src
python benchmarks/evaluate_cost.py /tmp/before/src --num 20000 --repeats 3

Processes in turn, one thread each; CPU time, start of the program and sampling included. Results are added to
today's file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from timing import RESULTS, processor

HERE = Path(__file__).parent.parent / "src"


def cpu_seconds(source: Path, command: list[str]) -> tuple[float, str]:
    """CPU time of `momatch COMMAND` with the code in `source`, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "momatch", *command],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def without_speed(table: str) -> list[list[str]]:
    """The printed rows less their last column, samples a second: what must not differ."""
    return [line.split()[:-1] for line in table.splitlines() if line.startswith(" teacher")]


def main() -> None:
    """Compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, help="src folder of the other version")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--steps", default="2,4,8")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    command = ["evaluate", "digits", "--steps", given.steps, "--num", str(given.num), "--device", "cpu"]
    seconds, rows = {"before": [], "now": []}, []
    for _ in range(given.repeats):
        for name, source in (("before", given.before.resolve()), ("now", HERE)):
            used, table = cpu_seconds(source, command)
            seconds[name].append(round(used, 2))
            rows.append(without_speed(table))
            print(f"{name:<7} {used:6.2f} s", flush=True)
    if not rows[0] or any(each != rows[0] for each in rows):
        sys.exit("the printed rows differ")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        "command": "momatch " + " ".join(command),
        "cpu_seconds": seconds,
        "median": medians,
        "ratio": round(medians["now"] / medians["before"], 3),
    }
    path = RESULTS / f"{date.today().isoformat()}-evaluate-cost.json"
    report = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()} {processor()}, {os.cpu_count()} cores, 1 thread, "
        f"torch {torch.__version__}",
        "method": "CPU time of the whole process, interleaved; printed rows equal but for samples a second",
        "runs": [run for run in report["runs"] if run["command"] != found["command"]] + [found],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"medians {medians}, ratio {found['ratio']}; written to {path}")


if __name__ == "__main__":
    main()
