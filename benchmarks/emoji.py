"""Text to image on the built-in emoji, 16×16 or 32×32 (--size): section 9 of docs/numbers.md.

    momatch train-teacher emoji16-teacher --out runs/emoji16-teacher
    momatch distill emoji16-8 --out runs/emoji16-8                      # and 4, 2, 1, instant-8
    momatch distill emoji16-8 --guidance.scale 0 --out runs/emoji16-8-w0
    python benchmarks/emoji.py measure teacher --steps 256 --scale 1    # a line at a time, into results/
    python benchmarks/emoji.py measure teacher --steps 8 --scale 1 --shift 4
    python benchmarks/emoji.py measure runs/emoji16-8 --seed 1 2 3          # other noise
    python benchmarks/emoji.py measure runs/emoji16-8 --seed 11 12          # to confirm, see below
    python benchmarks/emoji.py compare                                  # of the confirming draws, intervals
    python benchmarks/emoji.py picture runs/emoji16-8 runs/emoji16-4 runs/emoji16-2 runs/emoji16-1
    python benchmarks/emoji.py time runs/emoji16-8
    python benchmarks/emoji.py table
    python benchmarks/emoji.py curve --file benchmarks/results/2026-11-26-emoji16-h200.json

The same prompts and noise for every line: the captions of 300 training pictures, evenly spread, and of
all 191 held-out ones, a picture each. FD, precision and recall (k = 3): features of EfficientNet-Lite0,
against all 1,911 pictures, or as many as there are samples. Retrieval: the share of 191 held-out captions
whose picture fits them better than any other of these captions; the same of the training captions, of 300.
Nearest: the distance to the nearest training picture, over that of held-out pictures.

Settings were chosen by what seeds 1 to 3 gave. Seeds above 10 confirm: other noise and 300 other training
prompts (the held-out ones are all there are), looked at when nothing was chosen any more. Their features are
kept, in runs/emoji16-features, so that `compare` can pool them.

Another training of a student lies in a folder named after its seed, runs/emoji16-8-seed1; the rows of a line
are then draws from several trainings, each with noise of its own.

Rows go to --file, or to the newest of results/*-emoji.json (*-emoji32.json). Each says by fingerprints which
weights drew it and which teacher those came from; a table of two teachers, or of two trainings of one seed in
a line, is refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor

from momatch.config.schema import GuidanceConfig
from momatch.data.emoji import load_emoji
from momatch.data.images import ImageSet, Split
from momatch.data.rows import spread
from momatch.diffusion.schedules import cosine
from momatch.evaluation.efficientnet import EfficientNetFeatures
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_bootstrap, frechet_distance
from momatch.evaluation.neighbours import compare_distances, nearest_distances
from momatch.evaluation.precision_recall import precision_recall
from momatch.evaluation.report.plots import COLOURS, image_grid, save_png
from momatch.evaluation.retrieval import CaptionRetrieval
from momatch.evaluation.statistics import FeatureStatistics
from momatch.interop.load import load_any
from momatch.interop.text_encoders import text_encoder_of
from momatch.models.model import Model
from momatch.utils import devices

RESULTS = Path(__file__).parent / "results"
WHAT = ("measure", "real", "picture", "time", "table", "curve", "compare")
CLIP = "static"
TRAINING_PROMPTS, HELD_OUT_PROMPTS = 300, 191
CONFIRMING = 11  # seeds from here on
LEAST_SHARE = 0.05  # half the range of shares that a plot shows at least
PROMPTS = (  # the first half are captions or nearly so, the others were never in training
    "red heart", "grinning cat face", "pizza slice", "green apple", "palm tree", "italy flag",
    "green heart with arrow", "blue apple", "cat face with sunglasses", "purple car", "crying sun",
    "pink cat",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Size of the pictures, and where networks run."""

    size: int
    device: torch.device

    @property
    def data(self) -> Split:
        """Pictures and captions."""
        return load_emoji(self.size)

    @property
    def teacher(self) -> str:
        """The teacher's run."""
        return f"runs/emoji{self.size}-teacher"

    @property
    def features(self) -> Path:
        """Where features of the samples are kept."""
        return Path(f"runs/emoji{self.size}-features")

    @property
    def name(self) -> str:
        """Of files with results and pictures."""
        return "emoji" if self.size == 16 else f"emoji{self.size}"

    def seconds(self) -> float:
        """CPU time; on a GPU the clock on the wall."""
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


def model_of(setting: Setting, name: str, scale: float, shift: float = 0.0) -> Model:
    """A student's folder, or "teacher" under guidance, on its own schedule or a shifted one."""
    if name != "teacher":
        if shift:
            raise SystemExit(f"--shift {shift:g} is of the teacher's schedule, {name} is a student")
        return load_any(name).to(setting.device)
    teacher = load_any(setting.teacher).to(setting.device)
    denoiser = GuidanceConfig(scale=scale, clip=CLIP).apply(teacher.denoiser)
    return replace(teacher, denoiser=denoiser, schedule=cosine(shift))


def weights_of(setting: Setting, name: str) -> dict[str, str]:
    """Fingerprints of a model and of the teacher that it comes from."""
    model = load_any(setting.teacher if name == "teacher" else name)
    own = model.fingerprint()
    return {"weights": own, "teacher": model.info["inputs"]["teacher"] if name != "teacher" else own}


def prompts_of(setting: Setting, seed: int) -> tuple[ImageSet, ImageSet]:
    """The pictures whose captions are asked for: of training, and held out."""
    data = setting.data
    chosen = spread(len(data.train), TRAINING_PROMPTS) + (3 if seed >= CONFIRMING else 0)
    return data.train.subset(chosen, "prompts"), data.heldout


@cache
def real_features(setting: Setting) -> Tensor:
    """Of all 1,911 pictures, (1911, 320)."""
    images = torch.cat([setting.data.train.images[:], setting.data.heldout.images[:]])
    return extract(EfficientNetFeatures(setting.device), images)


def measure(
    setting: Setting, name: str, steps: int, scale: float, seed: int, shift: float, path: Path
) -> None:
    """One line of the table."""
    data, (trained, held) = setting.data, prompts_of(setting, seed)
    model = model_of(setting, name, scale, shift)
    steps = steps or model.steps
    start = setting.seconds()
    asked = [{k: v[:] for k, v in part.conditions.items()} for part in (trained, held)]
    cond = {k: torch.cat([part[k] for part in asked]) for k in asked[0]}
    samples = model.sample(len(cond["encoder_hidden_states"]), steps, cond, seed).cpu()
    seconds = setting.seconds() - start
    theirs, ours = real_features(setting), extract(EfficientNetFeatures(setting.device), samples)
    shape = precision_recall(ours, theirs, torch.Generator().manual_seed(0))
    unseen = nearest_distances(held.images, data.train.images[:])
    nearest = nearest_distances(samples, data.train.images[:])
    known, new = samples[:TRAINING_PROMPTS], samples[TRAINING_PROMPTS:]
    config = model.info.get("config", {})
    row = {
        "name": f"teacher, shift {shift:g}" if shift else Path(name).name.partition("-seed")[0],
        "steps": steps,
        "scale": scale if name == "teacher" else config["guidance"]["scale"],
        "seed": seed,
        "num_samples": len(samples),
        "frechet": frechet_distance(*(FeatureStatistics.from_features(f) for f in (ours, theirs))),
        "precision": shape.precision,
        "recall": shape.recall,
        "retrieval_held_out": share(new, held.conditions),
        "retrieval_training": share(known, trained.conditions),
        "neighbour_ratio": compare_distances(nearest, unseen).ratio,
        "neighbour_ratio_held_out": compare_distances(nearest[TRAINING_PROMPTS:], unseen).ratio,
        "neighbour_ratio_training": compare_distances(nearest[:TRAINING_PROMPTS], unseen).ratio,
        f"{'cpu_' * (setting.device.type == 'cpu')}seconds_a_picture": seconds / len(samples),
        **weights_of(setting, name),
    }
    if name != "teacher":
        row |= {"delta_exponent": config["weighting"]["delta_exponent"], "training": config["train"]["seed"]}
    setting.features.mkdir(parents=True, exist_ok=True)
    save_file({"features": ours}, setting.features / f"{key_of(row)}.safetensors")
    keep(setting, row, path)
    print(row)


def key_of(row: dict[str, Any]) -> str:
    words = (str(row[k]) for k in ("name", "steps", "scale", "seed", "weights"))
    return "-".join(words).replace(", ", "-").replace(" ", "-")


def real_pictures(setting: Setting, path: Path) -> None:
    """What real pictures score: the scale of retrieval, and what the distance comes to at the very best."""
    data, (chosen, _) = setting.data, prompts_of(setting, 1)
    images = torch.cat([chosen.images[:], data.heldout.images[:]])
    theirs, ours = real_features(setting), extract(EfficientNetFeatures(setting.device), images)
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
    keep(setting, row, path)
    print(row)


def share(images: Tensor, conditions: Any) -> float:
    """Of pictures, one for each caption, that fit their own best."""
    found = CaptionRetrieval(conditions).predict(images)
    return float((found == torch.arange(len(images))).float().mean())


def keep(setting: Setting, row: dict[str, Any], path: Path) -> None:
    report = (
        json.loads(path.read_text())
        if path.exists()
        else {"reference": f"emoji{setting.size}, 1,911 pictures", "rows": []}
    )
    same = ("name", "steps", "scale", "seed")
    report["rows"] = [old for old in report["rows"] if any(old[k] != row[k] for k in same)] + [row]
    report["hardware"] = f"{hardware(setting)}; torch {torch.__version__}"
    report["features"] = EfficientNetFeatures.name
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def hardware(setting: Setting) -> str:
    """What it ran on."""
    if setting.device.type == "cuda":
        return torch.cuda.get_device_name(setting.device)
    return "x86-64, 1 thread, shared"


def picture(setting: Setting, students: list[str], scale: float) -> None:
    """Prompts in columns; rows: the teacher at 256 steps, then each student, from the same noise."""
    rows = []
    for name in ("teacher", *students):
        model = model_of(setting, name, scale)
        encoder = text_encoder_of(model)
        assert encoder is not None
        rows.append(model.sample(len(PROMPTS), model.steps, encoder.encode(PROMPTS), seed=3).cpu())
    grid = image_grid(torch.cat(rows), len(PROMPTS))
    path = Path(__file__).parent.parent / f"docs/images/{setting.name}.png"
    save_png(grid, path)
    print(path)


def times(setting: Setting, student: str, scale: float) -> None:
    """Seconds from prompt to picture, one thread: encoder and sampler, interleaved, medians of 5."""
    models = {"teacher": model_of(setting, "teacher", scale), "student": model_of(setting, student, 0.0)}
    encoder = text_encoder_of(models["student"])
    assert encoder is not None
    taken: dict[str, list[float]] = {name: [] for name in models}
    for i in range(6):
        for name, model in models.items():
            start = setting.seconds()
            model.sample(1, model.steps, encoder.encode(["red heart"]), seed=i).cpu()
            taken[name].append(setting.seconds() - start)
    seconds = {name: statistics.median(each[1:]) for name, each in taken.items()}
    path = RESULTS / f"{date.today().isoformat()}-{setting.name}-time.json"
    clock = "1 thread, CPU time" if setting.device.type == "cpu" else f"{hardware(setting)}, wall clock"
    report = {
        "hardware": f"x86-64, {clock}, median of 5, interleaved; torch {torch.__version__}",
        "steps": {name: model.steps for name, model in models.items()},
        "seconds_from_prompt_to_picture": seconds,
        "ratio": seconds["teacher"] / seconds["student"],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(report)


def table(report: dict[str, Any]) -> str:
    """The tables of docs/numbers.md: real pictures, the teacher, the students; then the confirming draws."""
    check_weights(report)
    head = "| | steps | w | FD | precision | recall | retrieval, held out | retrieval, training |"
    parts = []
    for confirming, more in (
        (False, (" nearest |",)),
        (True, (" nearest, held out |", " nearest, training |")),
    ):
        rows = [row for row in report["rows"] if (row["seed"] >= CONFIRMING) == confirming]
        titles = head + "".join(more)
        parts.append("\n".join([titles, "|---" * (8 + len(more)) + "|", *(line(d) for d in lines_of(rows))]))
    return "\n\n".join(parts)


def lines_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Draws of each line, in the order of the table."""
    kinds = ("real pictures of these prompts", "teacher", "teacher, shift")
    draws: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        draws.setdefault((row["name"], row["steps"], row["scale"]), []).append(row)

    def place(key: tuple[str, int, float]) -> tuple[int, bool, bool, int, float]:
        name, steps, scale = key
        kind = name.rstrip(" .0123456789")
        known = kinds.index(kind) if kind in kinds else len(kinds)
        return known, name.count("-") > 1, scale != 1, -steps, scale

    return [draws[key] for key in sorted(draws, key=place)]


def check_weights(report: dict[str, Any]) -> None:
    """Refuse a report that more than one teacher, or more than one training of a student, has rows in."""
    drawn = [row for row in report["rows"] if row["steps"]]
    teachers = {row["teacher"] for row in drawn}
    mixed = [
        draws[0]["name"]
        for draws in lines_of(drawn)
        if len({row["weights"] for row in draws}) > len({row.get("training", 0) for row in draws})
    ]
    if len(teachers) > 1 or mixed:
        raise SystemExit(
            f"rows of {len(teachers)} teachers, of several trainings: {mixed}; measure them anew"
        )


def compare(setting: Setting, report: dict[str, Any], path: Path) -> None:
    """Of the confirming draws that every line has, so that all are of one size and of the same prompts:
    bias-corrected FD, and differences to the teacher at 256 steps, w = 1. Prompts are resampled, the same
    ones for every line: the intervals are for other prompts and pictures, not for another training.
    """
    check_weights(report)
    lines = lines_of([row for row in report["rows"] if row["seed"] >= CONFIRMING])
    shared = set.intersection(*({row["seed"] for row in draws} for draws in lines))
    lines = [[row for row in draws if row["seed"] in shared] for draws in lines]
    pooled = [
        torch.cat([load_file(setting.features / f"{key_of(r)}.safetensors")["features"] for r in draws])
        for draws in lines
    ]
    prompts = torch.arange(TRAINING_PROMPTS + HELD_OUT_PROMPTS).repeat(len(shared))
    random = torch.Generator().manual_seed(0)
    found = frechet_bootstrap(pooled, real_features(setting), random, groups=prompts)
    first = next(i for i, d in enumerate(lines) if (d[0]["name"], d[0]["steps"]) == ("teacher", 256))
    report["confirmation"] = []
    for i, draws in enumerate(lines):
        own, difference = found.interval(i), found.difference(i, first)
        entry = {k: draws[0][k] for k in ("name", "steps", "scale")} | {"num_samples": len(pooled[i])}
        entry |= {"frechet": own.value, "corrected": own.corrected}
        if i != first:
            entry |= {"difference": difference.corrected, "low": difference.low, "high": difference.high}
        report["confirmation"].append(entry)
        print(entry)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def curve(setting: Setting, report: dict[str, Any]) -> None:
    """The trade-off of guidance: FD against w, and against the share of pictures that fit their prompt."""
    check_weights(report)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = (("teacher", "teacher", 256), ("student", f"emoji{setting.size}-8", 8))
    for role, name, steps in lines:
        title, colour = f"{role}, {steps} steps", COLOURS[role]
        rows = [r for r in report["rows"] if r["seed"] < CONFIRMING and r["steps"] == steps]
        rows = [r for r in rows if r["name"].partition("-w")[0] == name]
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
    low, high = axes[1].get_xlim()
    if high - low < 2 * LEAST_SHARE:  # a standard error of a share is 2 points: no zooming into noise
        axes[1].set_xlim((low + high) / 2 - LEAST_SHARE, (low + high) / 2 + LEAST_SHARE)
    axes[0].legend(frameon=False)
    path = Path(__file__).parent.parent / f"docs/images/{setting.name}-guidance.png"
    figure.savefig(path, dpi=150, transparent=False, facecolor="white")
    print(path)


def mean_of(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of all numbers over draws."""
    numbers = [k for k, v in draws[0].items() if not isinstance(v, str) and all(k in each for each in draws)]
    return {k: statistics.mean(each[k] for each in draws) for k in numbers}


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
    parts = ("_held_out", "_training") if row["seed"] >= CONFIRMING else ("",)
    shares += [f"{row[k]:.2f}" if (k := f"neighbour_ratio{part}") in row else "–" for part in parts]
    steps, scale = (row["steps"], f"{row['scale']:g}") if row["steps"] else ("–", "–")
    return " | ".join([f"| {row['name']}", str(steps), scale, frechet, *shares]) + " |"


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--shift", type=float, default=0.0, help="of the teacher's schedule, in logSNR")
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--file", type=Path, help="of the rows; the newest, if left out")
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    setting = Setting(asked.size, devices.resolve(asked.device))
    path = asked.file or max(RESULTS.glob(f"*-{setting.name}.json"))
    report = json.loads(path.read_text()) if path.exists() else {}
    if asked.what == "measure":
        for name in asked.models:
            for seed in asked.seed:
                measure(setting, name, asked.steps, asked.scale, seed, asked.shift, path)
    elif asked.what == "picture":
        picture(setting, asked.models, asked.scale)
    elif asked.what == "time":
        times(setting, asked.models[0], asked.scale)
    elif asked.what == "real":
        real_pictures(setting, path)
    elif asked.what == "curve":
        curve(setting, report)
    elif asked.what == "compare":
        compare(setting, report, path)
    else:
        print(table(report))


if __name__ == "__main__":
    main()
