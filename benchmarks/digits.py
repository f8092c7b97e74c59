"""The digits study behind docs/numbers.md: teachers and students at all step counts, several seeds.

    python benchmarks/digits.py teacher --steps 8 64 256 --seeds 0 1 2
    python benchmarks/digits.py student --recipe digits-8 --seeds 0 1 2 [--label joint --set …]
    python benchmarks/digits.py summarise
    python benchmarks/digits.py merge --only student joint instant --from FILE.json … --out digits-methods
    python benchmarks/digits.py figure

Every line of the study is 20,000 generated pictures, labels in equal numbers, against the same 599 held-out
pictures. Samples are kept under runs/numbers/ so that lines can be compared in pairs; `summarise` writes a
dated JSON into benchmarks/results/ and prints the table. Interrupted work goes on where it stopped. Slow
lines are drawn in parts with seeds of their own, which processes started alike share out among themselves
(delete the .taken file that a killed one left behind).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import momatch
from momatch.config.schema import DistillConfig
from momatch.data.digits import load_digits
from momatch.evaluation import builtin
from momatch.evaluation.evaluate import SAMPLE_SEED_OFFSET
from momatch.evaluation.features import PixelFeatures, extract
from momatch.evaluation.frechet import frechet_bootstrap, frechet_distance
from momatch.evaluation.metrics import evaluate
from momatch.evaluation.statistics import FeatureStatistics
from momatch.models.model import Model
from momatch.training.build import distill
from momatch.utils.files import write_tensors

FOLDER = Path("runs/numbers")
RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = 20_000
CLASSES = 10
FIGURE_COLUMNS = 20
SLOW_ABOVE, SLOW_PARTS = 500, 8


def teacher(arguments: argparse.Namespace) -> None:
    """Samples of the shipped teacher."""
    model = momatch.load_teacher(arguments.model)
    for steps in arguments.steps:
        for seed in arguments.seeds:
            sample(model, f"{arguments.label or 'teacher'}-{steps}", steps, seed, seed)


def student(arguments: argparse.Namespace) -> None:
    """Train students of one recipe, and sample them."""
    for seed in arguments.seeds:
        config = momatch.recipe(arguments.recipe)
        assert isinstance(config, DistillConfig)
        config = override(config, ["train.seed=" + str(seed), "monitor.every=0", *arguments.set])
        name = f"{arguments.label or 'student'}-{config.steps}"
        start = time.process_time()
        model = distill(
            momatch.load_teacher(config.teacher), load_digits(), config, FOLDER / f"run-{name}-seed{seed}"
        )
        print(f"{name} seed {seed}: trained in {time.process_time() - start:.0f} CPU s", flush=True)
        note = FOLDER / f"run-{name}-seed{seed}" / "cpu_seconds.txt"
        if not note.exists():
            note.write_text(f"{time.process_time() - start:.0f}\n")
        sample(model, name, config.steps, seed, seed)


def override(config: Any, settings: list[str]) -> Any:
    """Apply "a.b=value" settings to nested frozen dataclasses; values are JSON or plain words."""
    for setting in settings:
        path, _, text = setting.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        config = replace_at(config, path.split("."), value)
    return config


def replace_at(config: Any, path: list[str], value: Any) -> Any:
    """`dataclasses.replace` along a path."""
    inner = value if len(path) == 1 else replace_at(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


def sample(model: Model, name: str, steps: int, seed: int, sample_seed: int) -> None:
    """Draw NUM_SAMPLES pictures and keep them, with the CPU time they took."""
    path = FOLDER / f"{name}-seed{seed}.safetensors"
    if path.exists():
        return
    (FOLDER / "parts").mkdir(parents=True, exist_ok=True)
    parts = SLOW_PARTS if steps > SLOW_ABOVE else 1
    for part in range(parts):
        part_path = FOLDER / "parts" / f"{path.stem}-{part}of{parts}.safetensors"
        if not part_path.exists() and not part_path.with_suffix(".taken").exists():
            part_path.with_suffix(".taken").touch()
            seed_of_part = sample_seed + SAMPLE_SEED_OFFSET + 1000 * part
            draw(part_path, model, NUM_SAMPLES // parts, steps, seed_of_part)
    found = sorted((FOLDER / "parts").glob(f"{path.stem}-*of{parts}.safetensors"))
    if len(found) == parts:
        tensors = [load_file(part) for part in found]
        write_tensors(path, {key: torch.cat([t[key] for t in tensors]) for key in tensors[0]})


def draw(path: Path, model: Model, num_samples: int, steps: int, seed: int) -> None:
    """Draw pictures with labels 0 to 9 in turn, and keep them with the CPU time they took."""
    labels = torch.arange(num_samples) % CLASSES
    start = time.process_time()
    images = model.sample(num_samples, steps, {"label": labels}, seed)
    seconds = time.process_time() - start
    write_tensors(path, {"images": images, "cpu_seconds": torch.tensor([seconds])})
    print(f"{path}: {num_samples / seconds:.0f} images/s of one core", flush=True)


def summarise(arguments: argparse.Namespace) -> None:
    """Measure all samples there are, compare pairs, write the results."""
    data, judge = load_digits(), builtin.digits_classifier()
    extractors = (judge, PixelFeatures())
    reference = (data.heldout.images, data.heldout.labels)
    rows, features = [], {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        name, seed = path.stem.rsplit("-seed", 1)
        if arguments.only and name not in arguments.only:
            continue
        images = load_file(path)["images"]
        features[name, int(seed)] = [extract(each, images) for each in extractors]
        labels = torch.arange(len(images)) % CLASSES
        result = evaluate(
            (images, labels), reference, list(extractors), judge, data.train.images[:], seed=int(seed)
        )
        rows.append({"name": name, "seed": int(seed), **numbers(result)})
        rows[-1]["fd_train"] = distance(features[name, int(seed)][0], extract(judge, data.train.images))
        note = FOLDER / f"run-{path.stem}" / "cpu_seconds.txt"
        if note.exists():
            rows[-1]["train_cpu_seconds"] = float(note.read_text())
        print(rows[-1], flush=True)
    heldout = [extract(each, data.heldout.images) for each in extractors]
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "num_samples": NUM_SAMPLES,
        "reference": f"{data.heldout.name}, {len(data.heldout)} pictures",
        "features": judge.name,
        "rows": rows,
        "differences": compare(features, heldout, arguments.against),
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{date.today().isoformat()}-{arguments.out}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(report)}\n\n{difference_table(report)}\n\nwritten to {out}")


def merge(arguments: argparse.Namespace) -> None:
    """One file of the lines that several results hold, those of the given kinds; prints their table."""
    reports = [json.loads(Path(path).read_text()) for path in arguments.files]
    found = {}
    for report in reports:
        for row in report["rows"]:
            if row["name"].rsplit("-", 1)[0] in arguments.only:
                found.setdefault((row["name"], row["seed"]), {}).update(row)
    rows = [found[key] for key in sorted(found, key=lambda key: (order(key[0]), key[1]))]
    kept = {key: reports[0][key] for key in ("hardware", "num_samples", "reference", "features")}
    merged = {"date": date.today().isoformat(), "from": [Path(f).name for f in arguments.files], **kept}
    out = RESULTS / f"{date.today().isoformat()}-{arguments.out}.json"
    out.write_text(json.dumps({**merged, "rows": rows}, indent=1) + "\n")
    print(f"{methods_table({'rows': rows})}\n\nwritten to {out}")


def figure(arguments: argparse.Namespace) -> None:
    """docs/images/digits.png: held-out digits, teacher, students; the same noise down each column."""
    from matplotlib.figure import Figure

    from momatch.evaluation.report.plots import image_grid

    heldout = load_digits().heldout
    real = torch.stack(
        [heldout.images[heldout.labels == i % CLASSES][i // CLASSES] for i in range(FIGURE_COLUMNS)]
    )
    rows = {"real, held out": real}
    for name in ("teacher-256", "teacher-8", "student-8", "student-4", "student-2", "student-1"):
        kind, steps = name.split("-")
        label = f"{kind}, {steps} step{'s' if steps != '1' else ''}"
        rows[label] = load_file(FOLDER / f"{name}-seed0.safetensors")["images"][:FIGURE_COLUMNS]
    canvas = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (label, images) in zip(canvas.subplots(len(rows), 1), rows.items(), strict=True):
        axes.imshow(image_grid(images, FIGURE_COLUMNS), cmap="gray", interpolation="nearest")
        axes.set_yticks([])
        axes.set_xticks([])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    path = Path(__file__).parent.parent / "docs" / "images" / "digits.png"
    path.parent.mkdir(exist_ok=True)
    canvas.savefig(path, dpi=110)
    print(path)


def numbers(result: Any) -> dict[str, float]:
    """The few numbers of an evaluation that the tables show."""
    wanted = {
        "fd": ("frechet", "digits-classifier"),
        "fd_corrected": ("frechet_corrected", "digits-classifier"),
        "floor": ("frechet_floor", "digits-classifier"),
        "fd_pixels": ("frechet", "pixels"),
        "floor_pixels": ("frechet_floor", "pixels"),
        "kid": ("kid", "digits-classifier"),
        "precision": ("precision", "digits-classifier"),
        "recall": ("recall", "digits-classifier"),
        "accuracy": ("class_accuracy", None),
        "accuracy_real": ("class_accuracy_reference", None),
        "neighbour_ratio": ("neighbour_ratio", None),
        "neighbour_share_close": ("neighbour_share_close", None),
    }
    found = {key: result.get(*where).value for key, where in wanted.items()}
    return found | {"kid_error": result.get("kid", "digits-classifier").standard_error}


def distance(generated: Tensor, reference: Tensor) -> float:
    """Plain FD of two sets of features."""
    return frechet_distance(
        FeatureStatistics.from_features(generated), FeatureStatistics.from_features(reference)
    )


def compare(
    features: dict[tuple[str, int], list[Tensor]], reference: list[Tensor], against: str
) -> list[dict[str, Any]]:
    """FD of every line less that of `against` (same seed if any), bias-corrected, paired 95 % intervals.

    On the classifier's features ("fd") and on pixels ("pixels").
    """
    baselines = {seed: f for (name, seed), f in features.items() if name == against}
    found = []
    for (name, seed), generated in features.items():
        if name == against or not baselines:
            continue
        base = baselines.get(seed, next(iter(baselines.values())))
        row: dict[str, Any] = {"name": name, "seed": seed, "against": against}
        for i, key in enumerate(("fd", "pixels")):
            generator = torch.Generator().manual_seed(seed)
            estimate = frechet_bootstrap([generated[i], base[i]], reference[i], generator).difference()
            row[key] = [estimate.corrected, estimate.low, estimate.high]
        found.append(row)
    return found


def table(report: dict[str, Any]) -> str:
    """One line per model: mean over seeds ± half their range, rounded once from the recorded values."""
    columns = {
        "FD": ("fd", 2),
        "FD, training": ("fd_train", 2),
        "FD, pixels": ("fd_pixels", 2),
        "KID ± error": ("kid", 2),
        "precision": ("precision", 2),
        "recall": ("recall", 2),
        "class accuracy": ("accuracy", 3),
        "neighbour ratio": ("neighbour_ratio", 2),
    }
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in sorted({row["name"] for row in report["rows"]}, key=order):
        chosen = [row for row in report["rows"] if row["name"] == name]
        cells = [show([row[key] for row in chosen], digits) for key, digits in columns.values()]
        cells[3] = f"{mean_of(chosen, 'kid'):.2f} ± {mean_of(chosen, 'kid_error'):.2f}"
        lines.append(f"| {title(name)} | {len(chosen)} | " + " | ".join(cells) + " |")
    first = report["rows"][0]
    floors = f"{first['floor']:.2f} | | {first['floor_pixels']:.2f} | | | | {first['accuracy_real']:.3f} |"
    return "\n".join([*lines, f"| real training pictures (floor) | | {floors} |"])


def methods_table(report: dict[str, Any]) -> str:
    """As `table`, with what training took: mean CPU seconds, where they were noted."""
    columns = {
        "FD": ("fd", 2),
        "FD, training": ("fd_train", 2),
        "FD, pixels": ("fd_pixels", 2),
        "precision": ("precision", 2),
        "recall": ("recall", 2),
        "class accuracy": ("accuracy", 3),
    }
    lines = ["| | seeds | " + " | ".join(columns) + " | CPU min |", "|---" * (len(columns) + 3) + "|"]
    for name in sorted({row["name"] for row in report["rows"]}, key=order):
        chosen = [row for row in report["rows"] if row["name"] == name]
        cells = [show([row[key] for row in chosen], digits) for key, digits in columns.values()]
        timed = [row["train_cpu_seconds"] / 60 for row in chosen if "train_cpu_seconds" in row]
        cells.append(f"{sum(timed) / len(timed):.1f}" if timed else "–")
        lines.append(f"| {title(name)} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(report: dict[str, Any]) -> str:
    """Students less the line compared with, per seed."""
    lines = [
        "| | seed | difference of FD | on pixels |",
        "|---|---|---|---|",
    ]
    for row in sorted(report["differences"], key=lambda row: (order(row["name"]), row["seed"])):
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[key]) for key in ("fd", "pixels")]
        lines.append(f"| {title(row['name'])} | {row['seed']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def readme_table(report: dict[str, Any], names: list[str]) -> str:
    """The lines that README shows."""
    lines = ["| | network calls | FD | recall | class accuracy |", "|---|---|---|---|---|"]
    for name in names:
        chosen = [row for row in report["rows"] if row["name"] == name]
        cells = [show([row[key] for row in chosen], 2) for key in ("fd", "recall")]
        accuracy = f"{100 * mean_of(chosen, 'accuracy'):.1f} %"
        kind, steps = name.rsplit("-", 1)
        lines.append(f"| {kind} | {steps} | {cells[0]} | {cells[1]} | {accuracy} |")
    first = report["rows"][0]
    real = f"{first['floor']:.2f} | – | {100 * first['accuracy_real']:.1f} % (held-out) |"
    return "\n".join([*lines, f"| real training digits | – | {real}"])


def show(values: list[float], digits: int) -> str:
    """'0.58 ± 0.04': mean ± half the range; the value alone if there is one."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def order(name: str) -> tuple[bool, str, int]:
    kind, steps = name.rsplit("-", 1)
    return (kind != "teacher", kind, int(steps))


def title(name: str) -> str:
    """'student, 8 steps'."""
    kind, steps = name.rsplit("-", 1)
    return f"{kind}, {steps} step{'' if steps == '1' else 's'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (
        ("teacher", teacher),
        ("student", student),
        ("summarise", summarise),
        ("merge", merge),
        ("figure", figure),
    ):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--label", help="name of the line instead of teacher or student")
        command.add_argument("--seeds", type=int, nargs="+", default=[0])
        command.add_argument("--steps", type=int, nargs="+", default=[8])
        command.add_argument("--model", default="digits", help="teacher to sample")
        command.add_argument("--recipe", default="digits-8")
        command.add_argument(
            "--set", nargs="*", default=[], help="overrides such as optim.learning_rate=1e-3"
        )
        command.add_argument("--only", nargs="*", help="lines to summarise, or kinds of lines to merge")
        command.add_argument("--from", dest="files", nargs="*", default=[], help="results to merge")
        command.add_argument("--against", default="teacher-256", help="line to compare with")
        command.add_argument("--out", default="digits", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
