"""D-MMD on the characters of a text: a teacher, students of 4, 8 and 16 steps, and how all of them write.

    apt-get install bible-kjv
    bible -l9000 gen1:1-rev22:21 | sed -nE 's/^ +[0-9]+ //p' > kjv.txt
    python benchmarks/text.py --data kjv.txt --runs runs/text
    python benchmarks/text.py --data kjv.txt --runs runs/text --seeds 0 1 2 --process uniform
    python benchmarks/text.py table

The same command again goes on where it was stopped: runs resume, rows that are there stay. The recipes are
text-teacher and text-4, text-8, text-16, but for rows of 32 characters and what else is given. The teacher is
measured at 4 to 256 steps, every model on --num samples against held-out rows, by
`momatch.evaluation.tokens`. Rows and a few texts of each go to benchmarks/results/DATE-text-PROCESS.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from momatch.config.recipes import recipe
from momatch.config.schema import DistillConfig, TeacherConfig
from momatch.data.images import Split
from momatch.data.reading import Reading
from momatch.data.sources import load_data
from momatch.evaluation.evaluate import Judge, Row
from momatch.evaluation.report.tables import evaluation_text
from momatch.interop.compatibility import in_space_of
from momatch.interop.load import load_any
from momatch.training.build import distillation, teacher_of, teacher_training
from momatch.training.run import Run
from momatch.utils.files import write_atomically
from timing import processor

RESULTS = Path(__file__).parent / "results"
TEACHER_STEPS = 4, 8, 16, 64, 256
SHOWN = 8  # texts of each model that are kept


def train(run: Run, label: str) -> None:
    """Run to the end, or as far as it was not yet."""
    for event in run:
        if event.record.step % 250 == 0:
            print(f"{label}: step {event.record.step}, {event.record.seconds:.0f} s", flush=True)
    run.finish()


def teacher_run(arguments: argparse.Namespace, data: Split, seed: int) -> Path:
    """The teacher of that seed, trained if it is not there."""
    folder = arguments.runs / f"{arguments.process}-teacher-seed{seed}"
    if not (folder / "teacher" / "model.json").exists():
        base = recipe("text-teacher")
        assert isinstance(base, TeacherConfig)
        settings = replace(base.train, seed=seed, num_steps=arguments.teacher_updates)
        config = replace(
            base,
            data=str(arguments.data),
            reading=Reading(row_length=arguments.row_length),
            process=arguments.process,
            network=replace(base.network, width=arguments.width, depth=arguments.depth),
            train=settings,
            device=arguments.device,
        )
        train(teacher_training(data, config, folder), folder.name)
    return folder


def student_run(arguments: argparse.Namespace, data: Split, steps: int, seed: int) -> Path:
    """The student of so many steps, trained if it is not there."""
    folder = arguments.runs / f"{arguments.process}-{steps}-seed{seed}"
    if not (folder / "student" / "model.json").exists():
        base = recipe(f"text-{steps}")
        assert isinstance(base, DistillConfig)
        config = replace(
            base,
            teacher=str(teacher_run(arguments, data, seed)),
            data=str(arguments.data),
            reading=Reading(row_length=arguments.row_length),
            train=replace(base.train, seed=seed, num_steps=arguments.student_updates),
            device=arguments.device,
        )
        train(distillation(teacher_of(config), data, config, folder), folder.name)
    return folder


def measured(
    arguments: argparse.Namespace, data: Split, folder: Path, name: str, steps: int, seed: int
) -> None:
    """Add the row of a model, if it is not there."""
    path = results(arguments)
    kept = read(path)
    if any((each["name"], each["steps"], each["training_seed"]) == (name, steps, seed) for each in kept):
        return
    model = load_any(folder).to(arguments.device)
    judge = Judge(in_space_of(model, data), device=model.device, seed=seed)
    row = judge.row(model, name, steps, arguments.num)
    seconds = sum(part["seconds"] for part in last_records(folder))
    texts = model.texts(model.sample(SHOWN, steps, seed=seed))
    print(evaluation_text([row]), *texts, sep="\n", flush=True)
    entry = {**row.to_dict(), "training_seed": seed, "training_seconds": round(seconds), "texts": texts}
    contents = {**about(arguments), "rows": [*kept, entry]}
    write_atomically(path, lambda file: file.write_text(json.dumps(contents, indent=1) + "\n"))


def last_records(folder: Path) -> list[dict[str, Any]]:
    """The last record of each process that trained in a run's folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "seconds" in row]
    following = [*rows[1:], {"seconds": 0.0}]
    return [row for row, other in zip(rows, following, strict=True) if other["seconds"] < row["seconds"]]


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    gpu = torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else None
    return {
        "date": date.today().isoformat(),
        "hardware": gpu or f"{processor()}, {torch.get_num_threads()} thread, shared",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "data": arguments.data.name,
        "row_length": arguments.row_length,
        "process": arguments.process,
        "width": arguments.width,
        "depth": arguments.depth,
        "teacher_updates": arguments.teacher_updates,
        "student_updates": arguments.student_updates,
    }


def results(arguments: argparse.Namespace) -> Path:
    """The newest file of this process of noise, or today's."""
    found = sorted(RESULTS.glob(f"*-text-{arguments.process}.json"))
    return found[-1] if found else RESULTS / f"{date.today().isoformat()}-text-{arguments.process}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def table(arguments: argparse.Namespace) -> None:
    """Print what is there."""
    rows = read(results(arguments))
    for seed in sorted({each["training_seed"] for each in rows}):
        own = [each for each in rows if each["training_seed"] == seed]
        own.sort(key=lambda each: (each["name"] != "teacher", each["steps"]))
        names = ("name", "steps", "samples_per_second", "result")
        parts = [Row.from_dict({name: each[name] for name in names}) for each in own]
        print(f"seed {seed}\n{evaluation_text(parts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("all", "table"), default="all")
    parser.add_argument("--data", type=Path, help="a text in UTF-8")
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--process", choices=("mask", "uniform"), default="mask")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 16], help="of students")
    parser.add_argument("--row-length", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--teacher-updates", type=int, default=6000)
    parser.add_argument("--student-updates", type=int, default=1000)
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.what == "table":
        table(arguments)
        return
    if arguments.data is None:
        parser.error("name the text: --data FILE.txt")
    data = load_data(arguments.data, 0, Reading(row_length=arguments.row_length))
    start = time.monotonic()
    for seed in arguments.seeds:
        teacher = teacher_run(arguments, data, seed)
        for steps in (16, 64):
            measured(arguments, data, teacher, "teacher", steps, seed)
        for steps in arguments.steps:
            measured(arguments, data, student_run(arguments, data, steps, seed), "student", steps, seed)
        for steps in TEACHER_STEPS:
            measured(arguments, data, teacher, "teacher", steps, seed)
    print(f"done in {time.monotonic() - start:.0f} s")
    table(arguments)


if __name__ == "__main__":
    main()
