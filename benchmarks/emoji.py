"""Text to image on the built-in emoji, 16×16: section 9 of docs/numbers.md.

    momatch train-teacher emoji16-teacher --out runs/emoji16-teacher
    momatch distill emoji16-8 --out runs/emoji16-8                      # and 4, 2, 1, instant-8
    momatch distill emoji16-8 --guidance.scale 0 --out runs/emoji16-8-w0
    python benchmarks/emoji.py measure teacher --steps 256 --scale 1    # a line at a time, into results/
    python benchmarks/emoji.py measure teacher --steps 8 --scale 1 --shift 4
    python benchmarks/emoji.py measure runs/emoji16-8 --seed 1              # and 2, 3: other noise
    python benchmarks/emoji.py picture runs/emoji16-8 runs/emoji16-4 runs/emoji16-2 runs/emoji16-1
    python benchmarks/emoji.py time runs/emoji16-8
    python benchmarks/emoji.py table
    python benchmarks/emoji.py curve                                    # docs/images/emoji-guidance.png

The same prompts and noise for every line: the captions of 300 training pictures, evenly spread, and of
all 191 held-out ones, a picture each. FD, precision and recall (k = 3): features of EfficientNet-Lite0,
against all 1,911 pictures, or as many as there are samples. Retrieval: the share of 191 held-out captions
whose picture fits them better than any other of these captions; the same of the training captions, of 300.
Nearest: the distance to the nearest training picture, over that of held-out pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from momatch.config import GuidanceConfig
from momatch.data.emoji import load_emoji
from momatch.data.rows import spread
from momatch.evaluation.efficientnet import EfficientNetFeatures
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.neighbours import compare_distances, nearest_distances
from momatch.evaluation.precision_recall import precision_recall
from momatch.evaluation.retrieval import CaptionRetrieval
from momatch.evaluation.statistics import FeatureStatistics
from momatch.model import Model
from momatch.reports.plots import COLOURS, OTHER_COLOUR, image_grid, save_png
from momatch.schedules import cosine
from momatch.teachers.load import load_any
from momatch.text import text_encoder_of

RESULTS = Path(__file__).parent / "results"
TEACHER, CLIP = "runs/emoji16-teacher", "static"
TRAINING_PROMPTS, HELD_OUT_PROMPTS = 300, 191
PROMPTS = (  # the first half are captions or nearly so, the others were never in training
    "red heart", "grinning cat face", "pizza slice", "green apple", "palm tree", "italy flag",
    "green heart with arrow", "blue apple", "cat face with sunglasses", "purple car", "crying sun",
    "pink cat",
)  # fmt: skip


def model_of(name: str, scale: float, shift: float = 0.0) -> Model:
    """A student's folder, or "teacher" under guidance, on its own schedule or a shifted one."""
    if name != "teacher":
        return load_any(name)
    teacher = load_any(TEACHER)
    denoiser = GuidanceConfig(scale=scale, clip=CLIP).apply(teacher.denoiser)
    return replace(teacher, denoiser=denoiser, schedule=cosine(shift))


def measure(name: str, steps: int, scale: float, seed: int, shift: float) -> None:
    """One line of the table, appended to the day's file."""
    data = load_emoji(16)
    chosen = data.train.subset(spread(len(data.train), TRAINING_PROMPTS), "prompts")
    model = model_of(name, scale, shift)
    steps = steps or model.steps
    start = time.process_time()
    asked = [{k: v[:] for k, v in part.conditions.items()} for part in (chosen, data.heldout)]
    cond = {k: torch.cat([part[k] for part in asked]) for k in asked[0]}
    samples = model.sample(len(cond["encoder_hidden_states"]), steps, cond, seed)
    seconds = time.process_time() - start
    real = torch.cat([data.train.images[:], data.heldout.images[:]])
    features = EfficientNetFeatures()
    theirs, ours = extract(features, real), extract(features, samples)
    shape = precision_recall(ours, theirs, torch.Generator().manual_seed(0))
    held, trained = data.heldout, chosen
    unseen = nearest_distances(held.images, data.train.images[:])
    known = samples[:TRAINING_PROMPTS]
    row = {
        "name": f"teacher, shift {shift:g}" if shift else Path(name).name,
        "steps": steps,
        "scale": scale if name == "teacher" else model.info["config"]["guidance"]["scale"],
        "seed": seed,
        "num_samples": len(samples),
        "frechet": frechet_distance(*(FeatureStatistics.from_features(f) for f in (ours, theirs))),
        "precision": shape.precision,
        "recall": shape.recall,
        "retrieval_held_out": share(samples[TRAINING_PROMPTS:], held.conditions),
        "retrieval_training": share(known, trained.conditions),
        "neighbour_ratio": compare_distances(nearest_distances(samples, data.train.images[:]), unseen).ratio,
        "cpu_seconds_a_picture": seconds / len(samples),
    }
    keep(row)
    print(row)


def real_pictures() -> None:
    """What real pictures score: the ceilings of retrieval, and a floor of the distance."""
    data = load_emoji(16)
    chosen = data.train.subset(spread(len(data.train), TRAINING_PROMPTS), "prompts")
    images = torch.cat([chosen.images[:], data.heldout.images[:]])
    real = torch.cat([data.train.images[:], data.heldout.images[:]])
    theirs, ours = (extract(EfficientNetFeatures(), x) for x in (real, images))
    row = {
        "name": "real pictures of these prompts",
        "steps": 0,
        "scale": 0.0,
        "seed": 0,
        "num_samples": len(images),
        "frechet": frechet_distance(*(FeatureStatistics.from_features(f) for f in (ours, theirs))),
        "retrieval_held_out": share(data.heldout.images[:], data.heldout.conditions),
        "retrieval_training": share(chosen.images[:], chosen.conditions),
    }
    keep(row)
    print(row)


def share(images: Tensor, conditions: Any) -> float:
    """Of pictures, one for each caption, that fit their own best."""
    found = CaptionRetrieval(conditions).predict(images)
    return float((found == torch.arange(len(images))).float().mean())


def keep(row: dict[str, Any]) -> None:
    path = RESULTS / f"{date.today().isoformat()}-emoji.json"
    report = (
        json.loads(path.read_text())
        if path.exists()
        else {"reference": "emoji16, 1,911 pictures", "rows": []}
    )
    same = ("name", "steps", "scale", "seed")
    report["rows"] = [old for old in report["rows"] if any(old[k] != row[k] for k in same)] + [row]
    report["hardware"] = f"x86-64, 1 thread, shared; torch {torch.__version__}"
    report["features"] = EfficientNetFeatures.name
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def picture(students: list[str], scale: float) -> None:
    """Prompts in columns; rows: the teacher at 256 steps, then each student, from the same noise."""
    rows = []
    for name in ("teacher", *students):
        model = model_of(name, scale)
        encoder = text_encoder_of(model)
        assert encoder is not None
        rows.append(model.sample(len(PROMPTS), model.steps, encoder.encode(PROMPTS), seed=3))
    grid = image_grid(torch.cat(rows), len(PROMPTS))
    path = Path(__file__).parent.parent / "docs/images/emoji.png"
    save_png(grid, path)
    print(path)


def times(student: str, scale: float) -> None:
    """Seconds from prompt to picture, one thread: encoder and sampler, interleaved, medians of 5."""
    models = {"teacher": model_of("teacher", scale), "student": model_of(student, 0.0)}
    encoder = text_encoder_of(models["student"])
    assert encoder is not None
    taken: dict[str, list[float]] = {name: [] for name in models}
    for i in range(6):
        for name, model in models.items():
            start = time.process_time()
            model.sample(1, model.steps, encoder.encode(["red heart"]), seed=i)
            taken[name].append(time.process_time() - start)
    seconds = {name: statistics.median(each[1:]) for name, each in taken.items()}
    path = RESULTS / f"{date.today().isoformat()}-emoji-time.json"
    report = {
        "hardware": f"x86-64, 1 thread, CPU time, median of 5, interleaved; torch {torch.__version__}",
        "steps": {name: model.steps for name, model in models.items()},
        "seconds_from_prompt_to_picture": seconds,
        "ratio": seconds["teacher"] / seconds["student"],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(report)


def table(report: dict[str, Any]) -> str:
    """The table of docs/numbers.md: real pictures, the teacher, the students."""
    head = "| | steps | w | FD | precision | recall | retrieval, held out | retrieval, training | nearest |"
    names = ("real pictures of these prompts", "teacher", "teacher, shift 4")
    draws: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        draws.setdefault((row["name"], row["steps"], row["scale"]), []).append(row)

    def place(key: tuple[str, int, float]) -> tuple[int, bool, bool, int, float]:
        name, steps, scale = key
        known = names.index(name) if name in names else len(names)
        return known, "instant" in name, scale != 1, -steps, scale

    return "\n".join([head, "|---" * 9 + "|", *(line(draws[key]) for key in sorted(draws, key=place))])


def curve(report: dict[str, Any]) -> None:
    """The trade-off of guidance: FD against w, and against the share of pictures that fit their prompt."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = {"teacher, 256 steps": ("teacher", 256), "teacher, 8 steps, shift 4": ("teacher, shift 4", 8),
             "students, 8 steps": ("emoji16-8", 8)}  # fmt: skip
    colours = (COLOURS["teacher"], OTHER_COLOUR, COLOURS["student"])
    for (title, (name, steps)), colour in zip(lines.items(), colours, strict=True):
        rows = [r for r in report["rows"] if r["name"].partition("-w")[0] == name and r["steps"] == steps]
        points = []
        for scale in sorted({r["scale"] for r in rows}):
            mean = mean_of([r for r in rows if r["scale"] == scale])
            held, trained = mean["retrieval_held_out"], mean["retrieval_training"]
            fitting = (held * HELD_OUT_PROMPTS + trained * TRAINING_PROMPTS) / mean["num_samples"]
            points.append((scale, fitting, mean["frechet"]))
        scales, shares, distances = zip(*points, strict=True)
        axes[0].plot(scales, distances, color=colour, marker="o", label=title)
        axes[1].plot(shares, distances, color=colour, marker="o")
        for scale, share_, distance in points:
            axes[1].annotate(f"{scale:g}", (share_, distance), textcoords="offset points", xytext=(5, 5))
    for panel, label in zip(
        axes, ("guidance scale w", "share that fits its prompt best; w at the points"), strict=True
    ):
        panel.set(xlabel=label, ylabel="FD")
        panel.grid(True, alpha=0.3)
    axes[0].legend(frameon=False)
    path = Path(__file__).parent.parent / "docs/images/emoji-guidance.png"
    figure.savefig(path, dpi=150, transparent=False, facecolor="white")
    print(path)


def mean_of(draws: list[dict[str, Any]]) -> dict[str, Any]:
    return {k: statistics.mean(each[k] for each in draws) for k in draws[0] if k != "name"}


def line(draws: list[dict[str, Any]]) -> str:
    """A line of the table of docs/numbers.md: means over draws, of the distance with lowest and highest."""
    row = mean_of(draws)
    row["name"], row["steps"] = draws[0]["name"], draws[0]["steps"]
    distances = [f"{each['frechet']:.0f}" for each in draws]
    frechet = f"{row['frechet']:.0f}"
    if len(draws) > 1:
        frechet += f" ({min(distances)}–{max(distances)})"
    shares = [f"{row[k]:.2f}" if k in row else "–" for k in ("precision", "recall")]
    shares += [f"{row[f'retrieval_{part}']:.0%}".replace("%", " %") for part in ("held_out", "training")]
    shares.append(f"{row['neighbour_ratio']:.2f}" if "neighbour_ratio" in row else "–")
    steps, scale = (row["steps"], f"{row['scale']:g}") if row["steps"] else ("–", "–")
    return " | ".join([f"| {row['name']}", str(steps), scale, frechet, *shares]) + " |"


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["measure", "real", "picture", "time", "table", "curve"])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--shift", type=float, default=0.0, help="of the teacher's schedule, in logSNR")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if asked.what == "measure":
        for name in asked.models:
            measure(name, asked.steps, asked.scale, asked.seed, asked.shift)
    elif asked.what == "picture":
        picture(asked.models, asked.scale)
    elif asked.what == "time":
        times(asked.models[0], asked.scale)
    elif asked.what == "real":
        real_pictures()
    elif asked.what == "curve":
        curve(json.loads(max(RESULTS.glob("*-emoji.json")).read_text()))
    else:
        print(table(json.loads(max(RESULTS.glob("*-emoji.json")).read_text())))


if __name__ == "__main__":
    main()
