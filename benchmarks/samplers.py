"""Samplers without distillation on a teacher: ancestral, DDIM, DPM-Solver++(2M), UniPC at the same calls.

    python benchmarks/samplers.py --out benchmarks/results/2026-11-27-digits-samplers.json

What a student has to beat at its number of network calls. Rows as they come; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from momatch.data.sources import load_data
from momatch.evaluation.evaluate import Judge
from momatch.evaluation.report.tables import find, with_interval
from momatch.interop.load import load_any
from momatch.models.model import Model
from momatch.utils.files import write_atomically

SAMPLERS = ("ancestral", "ddim", "dpm++", "unipc")


def measured(model: Model, judge: Judge, steps: int, num: int) -> dict[str, object]:
    """A row: [value, low, high] of the telling features' FD, and what else a table shows."""
    row = judge.row(model, "teacher", steps, num)
    fd, accuracy = find(row, "frechet"), find(row, "class_accuracy")
    assert fd is not None and accuracy is not None
    shares = {name: m.value for name in ("recall", "coverage", "density") if (m := find(row, name))}
    print(model.sampler, steps, with_interval(fd), flush=True)
    return {
        "sampler": model.sampler,
        "steps": steps,
        "fd": [fd.value, fd.low, fd.high],
        **shares,
        "accuracy": accuracy.value,
        "n": num,
        "features": fd.features,
        "reference": fd.reference,
        "seed": fd.seed,
    }


def table(report: dict[str, Any]) -> str:
    """The table of docs/numbers.md: samplers in columns."""
    lines = ["| calls | " + " | ".join(SAMPLERS) + " |", "|---" * (len(SAMPLERS) + 1) + "|"]
    for steps in sorted({row["steps"] for row in report["rows"]}):
        found = {row["sampler"]: row["fd"] for row in report["rows"] if row["steps"] == steps}
        shown = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*found[name]) if name in found else "–" for name in SAMPLERS
        ]
        lines.append(f"| {steps} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, judge = load_any(arguments.model), Judge(load_data(arguments.data))
    report = {"date": str(date.today()), "model": arguments.model, "rows": []}
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else report
    rows = report["rows"]
    for steps in arguments.steps:
        for sampler in SAMPLERS:
            if any((row["sampler"], row["steps"]) == (sampler, steps) for row in rows):
                continue
            rows.append(measured(replace(model, sampler=sampler), judge, steps, arguments.num))
            text = json.dumps(report, indent=1) + "\n"
            write_atomically(arguments.out, lambda path, text=text: path.write_text(text))


if __name__ == "__main__":
    main()
