"""Students and baselines on Fashion-MNIST, from scratch, unattended: section 11 of docs/numbers.md.

    python benchmarks/fashion.py all --runs runs/fashion14            # teacher, students, baselines, all rows
    python benchmarks/fashion.py all --runs runs/fashion14 --seeds 0 1 2
    python benchmarks/fashion.py verdict --runs runs/fashion14        # students against the teacher's best
    python benchmarks/fashion.py table
    python benchmarks/fashion.py all --size 28 --runs runs/fashion28 --batch 256 --budget 21000   # a GPU

The same command again goes on where it was stopped: runs resume, rows that are there stay. Every student has
the same budget, counted in forward passes of the network on a minibatch (a backward pass is two): 7,000,
which are 1,000 pairs of joint updates; "joint x4" has four times as much. Every method has the settings that
it has by itself and the optimizer of the recipe `fashion14-8`; none was tuned here.

Rows: --num samples, labels in equal numbers, against the 10,000 test images, which chose nothing: FD and KID
with intervals, precision, recall, density, coverage, an inception-style score, class accuracy, nearest
neighbours, on the shipped classifier's features; FD on EfficientNet-Lite0 (--efficientnet) and on pixels;
C2ST.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from momatch.config.recipes import recipe
from momatch.config.schema import DistillConfig, EmaConfig, MonitorConfig
from momatch.data.fashion import load_fashion
from momatch.data.images import Split
from momatch.evaluation.efficientnet import EfficientNetFeatures
from momatch.evaluation.evaluate import Judge, Pair, Row
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_bootstrap
from momatch.evaluation.two_sample import classifier_two_sample_test
from momatch.interop.load import load_any
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.base import MethodConfig
from momatch.methods.consistency import ConsistencyConfig
from momatch.methods.dmd import DistributionMatchingConfig
from momatch.methods.instant import InstantConfig
from momatch.methods.progressive import ProgressiveConfig
from momatch.methods.regression import RegressionConfig
from momatch.methods.transition import Source
from momatch.models.model import Model
from momatch.training.build import distillation, teacher_of, teacher_training
from momatch.training.run import Run
from momatch.utils import devices
from momatch.utils.files import write_atomically

RESULTS = Path(__file__).parent / "results"
BUDGET = 7000  # forward passes of a student's training
TEACHER_STEPS = {"ancestral": (8, 16, 32, 64, 256), **dict.fromkeys(("ddim", "dpm++", "unipc"), (8, 16, 32))}
C2ST_IMAGES = 5000  # of each side


@dataclass(frozen=True)
class Line:
    """A student of the table.

    Attributes:
        method: its algorithm.
        steps: network calls, each a student of its own.
        source: see `DistillConfig`.
        length: times the budget.
        ema: decay of the average of weights; 0 keeps none.
    """

    method: MethodConfig
    steps: tuple[int, ...]
    source: Source = "data"
    length: int = 1
    ema: float = 0.0


def lines(budget: int) -> dict[str, Line]:
    """What is compared; progressive distillation divides the budget evenly among its rounds."""
    rounds = 4
    progressive = budget // ProgressiveConfig().forward_units(False) // rounds
    return {
        "joint": Line(AlternatingConfig("joint"), (8, 4, 2, 1, 16)),
        "alternating": Line(AlternatingConfig(), (8, 4)),
        "dmd": Line(DistributionMatchingConfig(), (8, 4, 1), "rollout"),
        "consistency": Line(ConsistencyConfig(), (8, 4, 1)),
        "progressive": Line(ProgressiveConfig(rounds, progressive), (8, 4, 1)),
        "regression": Line(RegressionConfig("ode", 8), (8, 4)),
        "draws": Line(RegressionConfig("ancestral", 8), (8,)),
        "instant": Line(InstantConfig(), (8, 4)),
        # Does it go on falling?
        "joint x4": Line(AlternatingConfig("joint"), (8, 4), length=4),
        "joint x16": Line(AlternatingConfig("joint"), (8,), length=16),
        "joint x16 ema": Line(AlternatingConfig("joint"), (8,), length=16, ema=0.999),
    }


def train(run: Run, label: str) -> float:
    """Run to the end, or as far as it was not yet; returns the seconds of this process."""
    start, done = time.perf_counter(), False
    for event in run:
        if event.record.step % 250 == 0:
            print(f"{label}: step {event.record.step}", flush=True)
        done = True
    run.finish()
    return time.perf_counter() - start if done else 0.0


def teacher_run(arguments: argparse.Namespace, seed: int) -> Path:
    """The teacher of that seed, trained if it is not there."""
    folder = arguments.runs / f"teacher-seed{seed}"
    if not (folder / "teacher" / "model.json").exists():
        config = recipe(f"fashion{arguments.size}-teacher")
        settings = replace(config.train, seed=seed)
        if arguments.teacher_steps:
            settings = replace(settings, num_steps=arguments.teacher_steps)
        config = replace(config, train=settings, device=arguments.device)
        train(teacher_training(data(arguments), config, folder), folder.name)  # type: ignore[arg-type]
    return folder


def student_run(arguments: argparse.Namespace, name: str, line: Line, steps: int, seed: int) -> Path:
    """The student of that line, trained if it is not there."""
    folder = arguments.runs / f"{name}-{steps}-seed{seed}".replace(" ", "-")
    if (folder / "student" / "model.json").exists():
        return folder
    base = recipe(f"fashion{arguments.size}-8")
    assert isinstance(base, DistillConfig)
    num_steps = line.length * arguments.budget // line.method.forward_units(False)
    config = replace(
        base,
        teacher=str(teacher_run(arguments, seed)),
        steps=steps,
        method=line.method,
        source=line.source,
        train=replace(base.train, num_steps=num_steps, batch_size=arguments.batch, seed=seed),
        monitor=MonitorConfig(every=0),
        ema=EmaConfig(line.ema),
        device=arguments.device,
    )
    seconds = train(distillation(teacher_of(config), data(arguments), config, folder), folder.name)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return folder


def data(arguments: argparse.Namespace) -> Split:
    """Training and test images."""
    return load_fashion(arguments.size)


def heldout_loss(model: Model, images: Tensor, labels: Tensor) -> float:
    """Mean square in v (weight 1/σ²) at uniform t, by fixed noise."""
    rng = torch.Generator().manual_seed(0)
    total = 0.0
    for x, label in zip(images.split(500), labels.split(500), strict=True):
        logsnr = model.schedule(torch.rand(len(x), generator=rng))
        alpha, sigma = (torch.sigmoid(side * logsnr).sqrt()[:, None, None, None] for side in (1, -1))
        z = alpha * x + sigma * torch.randn(x.shape, generator=rng)
        with torch.no_grad():
            found = model.denoiser(
                z.to(model.device), logsnr.to(model.device), {"label": label.to(model.device)}
            )
        total += float(((found.cpu() - x).square() / sigma**2).mean()) * len(x)
    return total / len(images)


class Table:
    """The rows of a results file, each written as it is found."""

    def __init__(self, path: Path):
        self.path = path
        self.contents: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these entries."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.contents["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Append and save."""
        self.contents["rows"].append(row)
        self.save()

    def save(self) -> None:
        """Write the file whole."""
        text = json.dumps(self.contents, indent=1) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text))


def measure(
    arguments: argparse.Namespace, table: Table, judge: Judge, model: Model, name: str, steps: int, seed: int
) -> None:
    """One row, unless it is there."""
    key = {"name": name, "steps": steps, "seed": seed}
    if table.has(**key):
        return
    made: list[Tensor] = []

    def watch(pairs: Iterable[Pair]) -> Iterator[Pair]:
        for images, labels in pairs:
            made.append(images)
            yield images, labels

    row = judge.row(model, name, steps, arguments.num, watch)
    images = torch.cat(made)
    real = judge.data.heldout.images[:]
    found = numbers(row)
    names = [m.features for m in row.result.measurements if m.metric == "frechet"]
    features = {"classifier": extract(judge._reference.extractors[0], images)}
    if arguments.efficientnet:
        telling = EfficientNetFeatures(model.device)
        few = images[: arguments.efficientnet]
        features["efficientnet"] = extract(telling, few)
        reference = cached_efficientnet(arguments, telling, real)
        rng = torch.Generator().manual_seed(seed)
        estimate = frechet_bootstrap(features["efficientnet"], reference, rng, 50).interval(0)
        found["fd_efficientnet"] = [estimate.value, estimate.low, estimate.high]
    test = classifier_two_sample_test(images[:C2ST_IMAGES], real[:C2ST_IMAGES], seed)
    found["c2st"] = [test.accuracy, test.standard_error]
    folder = arguments.runs / "features"
    folder.mkdir(exist_ok=True)
    save_file(features, folder / f"{name}-{steps}-seed{seed}.safetensors")
    table.add(
        {
            **key,
            **found,
            "n": arguments.num,
            "features": names[0],
            "samples_per_second": row.samples_per_second,
            "weights": model.fingerprint(),
        }
    )
    print(json.dumps({**key, "fd": found["fd"], "c2st": found["c2st"]}), flush=True)


def cached_efficientnet(arguments: argparse.Namespace, telling: EfficientNetFeatures, real: Tensor) -> Tensor:
    """Of the test images, once for all rows."""
    path = arguments.runs / "features" / "real-efficientnet.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save_file({"features": extract(telling, real)}, path)
    return load_file(path)["features"]


def numbers(row: Row) -> dict[str, Any]:
    """The measurements by short names: [value, low, high] where there is an interval."""
    telling = next(m.features for m in row.result.measurements if m.metric == "frechet")
    found: dict[str, Any] = {}
    for m in row.result.measurements:
        key = {"frechet": "fd", "class_accuracy": "accuracy"}.get(m.metric, m.metric)
        if m.features not in (telling, "pixels") and not m.metric.startswith("frechet"):
            continue
        if m.features != telling:
            key = f"{key}_pixels"
        whole = m.low is not None
        found[key] = [m.value, m.low, m.high] if whole else m.value
    return found


def everything(arguments: argparse.Namespace) -> None:
    """Teacher, students, baselines and all rows, seed after seed."""
    table = Table(arguments.file)
    table.contents.setdefault("date", f"{date.today()}")
    table.contents |= {
        "size": arguments.size,
        "budget": arguments.budget,
        "batch": arguments.batch,
        "device": str(devices.resolve(arguments.device)),
    }
    split = data(arguments)
    device = devices.resolve(arguments.device)
    for seed in arguments.seeds:
        judge = Judge(split, device=device, seed=seed)
        folder = teacher_run(arguments, seed)
        teacher = load_any(str(folder)).to(device)
        losses = table.contents.setdefault("denoising_loss", {})
        if str(seed) not in losses:
            count = len(split.heldout)
            losses[str(seed)] = {
                "training": heldout_loss(teacher, split.train.images[:count], split.train.labels[:count]),
                "test": heldout_loss(teacher, split.heldout.images[:], split.heldout.labels),
            }
            table.save()
        for steps in (8, 32):
            measure(arguments, table, judge, teacher, "teacher ancestral", steps, seed)
        for name, line in lines(arguments.budget).items():
            for steps in line.steps:
                if arguments.only and f"{name}-{steps}" not in arguments.only:
                    continue
                run = student_run(arguments, name, line, steps, seed)
                measure(arguments, table, judge, load_any(str(run)).to(device), name, steps, seed)
        for sampler, counts in TEACHER_STEPS.items():
            for steps in counts:
                model = replace(teacher, sampler=sampler)
                measure(arguments, table, judge, model, f"teacher {sampler}", steps, seed)


def verdict(arguments: argparse.Namespace) -> None:
    """FD of each student less that of the teacher's best, bias-corrected, paired 95 % intervals.

    The teacher's best is its lowest FD over all samplers and numbers of calls, chosen on these very test
    images, which favours the teacher.
    """
    table, found = Table(arguments.file), []
    judge = Judge(data(arguments))
    reference = extract(judge._reference.extractors[0], judge.data.heldout.images)
    for seed in arguments.seeds:
        rows = [row for row in table.contents["rows"] if row["seed"] == seed]
        teachers = [row for row in rows if row["name"].startswith("teacher")]
        best = min(teachers, key=lambda row: row["fd"][0])
        base = features_of(arguments, best)
        for row in rows:
            if row in teachers:
                continue
            rng = torch.Generator().manual_seed(seed)
            pair = frechet_bootstrap([features_of(arguments, row), base], reference, rng).difference()
            outcome = "below" if pair.high < 0 else "above" if pair.low > 0 else "level"
            found.append(
                {
                    **{key: row[key] for key in ("name", "steps", "seed")},
                    "against": [best["name"], best["steps"]],
                    "difference": [pair.corrected, pair.low, pair.high],
                    "outcome": outcome,
                }
            )
            print(found[-1])
    table.contents["verdicts"] = found
    table.save()


def features_of(arguments: argparse.Namespace, row: dict[str, Any]) -> Tensor:
    """As `measure` kept them."""
    name = f"{row['name']}-{row['steps']}-seed{row['seed']}.safetensors"
    return load_file(arguments.runs / "features" / name)["classifier"]


def markdown(contents: dict[str, Any]) -> str:
    """All rows, best FD first within teacher and students, means over seeds; with the verdicts."""
    columns = [
        "",
        "calls",
        "FD [95 %]",
        "KID",
        "recall",
        "coverage",
        "density",
        "accuracy",
        "C2ST",
        "against teacher",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    keys = dict.fromkeys((row["name"], row["steps"]) for row in contents["rows"])
    for name, steps in sorted(keys, key=lambda key: (not key[0].startswith("teacher"), key[0], key[1])):
        rows = [row for row in contents["rows"] if (row["name"], row["steps"]) == (name, steps)]

        def mean(key: str, place: int | None = None, rows: list[dict[str, Any]] = rows) -> float:
            values = [row[key] if place is None else row[key][place] for row in rows]
            return sum(values) / len(values)

        told = [v for v in contents.get("verdicts", []) if (v["name"], v["steps"]) == (name, steps)]
        cells = [
            name,
            str(steps),
            "{:.3f} [{:.3f}, {:.3f}]".format(*(mean("fd", i) for i in range(3))),
            f"{mean('kid', 0):.4f}",
            *(f"{mean(key):.3f}" for key in ("recall", "coverage", "density")),
            f"{mean('accuracy', 0):.3f}",
            f"{mean('c2st', 0):.3f}",
            "; ".join("{} {:+.3f} [{:+.3f}, {:+.3f}]".format(v["outcome"], *v["difference"]) for v in told),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("all", "verdict", "table"))
    parser.add_argument("--size", type=int, choices=(14, 28), default=14)
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion14"))
    parser.add_argument("--file", type=Path, help="results; results/DATE-fashionSIZE.json if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=[], help="students such as joint-8; all if left out")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--efficientnet", type=int, default=0, help="samples for it; 0 does not measure")
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--teacher-steps", type=int, default=0, help="of training; 0: the recipe's")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.file = arguments.file or RESULTS / f"{date.today()}-fashion{arguments.size}.json"
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if arguments.command == "all":
        everything(arguments)
    elif arguments.command == "verdict":
        verdict(arguments)
    else:
        print(markdown(json.loads(arguments.file.read_text())))


if __name__ == "__main__":
    main()
