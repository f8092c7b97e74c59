"""Elastic students and rewards on digits, recorded: docs/beyond.md.

    python benchmarks/beyond.py elastic --runs runs/beyond --seeds 0 1 2
    python benchmarks/beyond.py reward --runs runs/beyond --seeds 0 1 2
    python benchmarks/beyond.py table

The same command again goes on where it was stopped; every row is written as it is found, to
results/DATE-beyond.json. Rows are of --num samples, labels in equal numbers, against the 599 held-out digits.

elastic: one student of 1, 2, 4 and 8 steps (the recipe digits-elastic, 3,000 steps; its auxiliary told the
number of steps, or not) beside students of one number each (1,500 steps each, 6,000 together; and 750 each,
which together are the elastic one's 3,000).

reward: a finished student of 4 steps learns a reward by RMMD at several scales (500 updates), and by plain
descent on the reward of its own samples, through the last network call alone (DRaFT-1, Clark et al. 2023), as
it goes: a number of updates there is what the scale is here. An update of RMMD takes 10 forward passes of the
network, of DRaFT-1 6.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import momatch
from momatch.config.recipes import recipe, rewarding
from momatch.config.schema import DistillConfig, MonitorConfig, OptimConfig, TrainConfig
from momatch.data.digits import load_digits
from momatch.evaluation.evaluate import Judge, Row
from momatch.evaluation.rewards import reward_function
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.base import Batch, Method, Update
from momatch.methods.reward import RewardConfig, RewardFunction
from momatch.methods.transition import Transition
from momatch.models.model import Model
from momatch.training.batches import image_batches
from momatch.training.build import distillation
from momatch.training.loop import train
from momatch.utils.files import write_atomically

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 2, 4, 8)
REWARDS = ("classifier", "brightness")
SCALES = (0.0, 3.0, 10.0, 30.0, 100.0)
UPDATES, DRAFT_UPDATES = 500, (20, 60, 200, 600)


class Draft1(Method):
    """Descent on −R of the student's own samples; the gradient goes through the last network call alone."""

    def __init__(self, student: nn.Module, reward: RewardFunction, transition: Transition):
        self.student, self.reward, self.transition = student, reward, transition

    def step(self, step: int, batch: Batch) -> Update:
        """One update; the same at every step."""
        k = self.transition.steps
        assert isinstance(k, int)
        last = torch.ones(len(batch.x), dtype=torch.long)
        with torch.no_grad():
            z = self.transition.roll_out(self.student, batch, last, k, batch.cond)  # type: ignore[arg-type]
        x = self.student(z, self.transition.schedule(last.to(z.dtype) / k), batch.cond)
        values = self.reward(x, batch.cond, batch.rows)
        return Update({"student": -values.mean()}, lambda: {"reward": values.detach().mean()})

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """{"student": η}."""
        return {"student": self.student}


class Rows:
    """The rows of the results, each written as it is found."""

    def __init__(self, path: Path):
        self.path = path
        self.contents: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}

    def has(self, key: dict[str, Any]) -> bool:
        """Whether it was measured."""
        return any(key.items() <= row.items() for row in self.contents["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Append and save."""
        self.contents |= {"date": f"{date.today()}", "machine": f"{platform.machine()}, one core"}
        self.contents["rows"].append(row)
        text = json.dumps(self.contents, indent=1) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text))
        print(json.dumps(row), flush=True)


def numbers(row: Row) -> dict[str, float]:
    """What the tables show."""
    telling = row.result.measurements[0].features
    names = {"frechet": "fd", "recall": "recall", "class_accuracy": "accuracy"}
    return {
        names[m.metric]: m.value
        for m in row.result.measurements
        if m.metric in names and (m.features == telling or m.metric == "class_accuracy")
    }


def student(arguments: argparse.Namespace, name: str, config: DistillConfig, seed: int) -> Model:
    """Trained, or as it was."""
    folder = arguments.runs / f"{name}-seed{seed}"
    settings = replace(config.train, seed=seed, num_steps=config.train.num_steps // arguments.shorter)
    config = replace(config, train=settings, monitor=MonitorConfig(every=0), device="cpu")
    run = distillation(momatch.load_teacher(config.teacher), load_digits(), config, folder)
    if not (folder / "student" / "model.json").exists():
        for _ in run:
            pass
        run.finish()
    return momatch.load_student(folder)


def elastic(arguments: argparse.Namespace) -> None:
    """One for all against one for each."""
    base = recipe("digits-elastic")
    assert isinstance(base, DistillConfig) and isinstance(base.method, AlternatingConfig)
    mixture = replace(base, method=replace(base.method, auxiliary_steps="mixture"))
    kinds = {"elastic": base, "elastic, auxiliary not told": mixture}
    for seed in arguments.seeds:
        judge = Judge(load_digits(), seed=seed)
        for name, config in kinds.items():
            for k in COUNTS:
                measure(arguments, judge, {"kind": name, "steps": k, "seed": seed}, config, name, k)
        for length in (1500, 750):
            for k in COUNTS:
                config = recipe(f"digits-{k}")
                assert isinstance(config, DistillConfig)
                config = replace(config, train=replace(config.train, num_steps=length))
                key = {"kind": f"one number, {length:,} steps", "steps": k, "seed": seed}
                measure(arguments, judge, key, config, f"one-{length}-{k}", k)


def measure(
    arguments: argparse.Namespace,
    judge: Judge,
    key: dict[str, Any],
    config: DistillConfig,
    name: str,
    k: int,
) -> None:
    """A row, unless it is there."""
    rows = Rows(arguments.file)
    if not rows.has(key):
        model = student(arguments, name.replace(", ", "-").replace(" ", "-"), config, key["seed"])
        rows.add({**key, **numbers(judge.row(model, "student", k, arguments.num))})


def reward(arguments: argparse.Namespace) -> None:
    """RMMD at several scales, and DRaFT-1 at several lengths."""
    for seed in arguments.seeds:
        rewards_of_seed(arguments, seed)


def rewards_of_seed(arguments: argparse.Namespace, seed: int) -> None:
    """All rewards on the finished student of that seed."""
    base = recipe("digits-4")
    assert isinstance(base, DistillConfig)
    data, rows = load_digits(), Rows(arguments.file)
    judge = Judge(data, seed=seed)
    before = student(arguments, "four", replace(base, keep_auxiliary=True), seed)
    finished = arguments.runs / f"four-seed{seed}"

    def row(kind: str, amount: float, name: str, function: RewardFunction, model: Model) -> None:
        key = {"kind": kind, "reward": name, "amount": amount, "seed": seed}
        if not rows.has(key):
            found = numbers(judge.row(model, "student", 4, arguments.num))
            rows.add({**key, **found, "value": value_of(model, function, arguments.num, seed)})

    for name in REWARDS:
        function = reward_function(name, data.train)
        row("before", 0.0, name, function, before)
        for scale in SCALES:
            config = rewarding(finished)
            config = replace(
                config,
                method=RewardConfig(run=str(finished), reward=name, scale=scale, most_drift=10.0),
                train=replace(config.train, num_steps=UPDATES),
            )
            row("RMMD", scale, name, function, student(arguments, f"{name}-{scale:g}", config, seed))
        last = max(DRAFT_UPDATES) // arguments.shorter
        if not rows.has({"kind": "DRaFT-1", "reward": name, "amount": last, "seed": seed}):
            for length, model in draft(arguments, finished, function, seed):
                row("DRaFT-1", length, name, function, model)


def draft(arguments: argparse.Namespace, finished: Path, reward: RewardFunction, seed: int) -> Any:
    """(updates, model) at several lengths of one training with the settings of RMMD's."""
    config, data = rewarding(finished), load_digits().train
    model = momatch.load_student(finished)
    model.denoiser.requires_grad_(True)
    transition = Transition(model.schedule, 4)
    method = Draft1(model.denoiser, reward, transition)
    lengths = [length // arguments.shorter for length in DRAFT_UPDATES]
    optim = OptimConfig(learning_rate=config.optim.learning_rate, warmup_steps=config.optim.warmup_steps)
    settings = TrainConfig(num_steps=max(lengths), batch_size=config.train.batch_size, seed=seed)
    batches = image_batches(data.images, data.labels, settings.batch_size, seed)
    for record in train(method, batches, settings, optim):
        if record.step in lengths:
            model.denoiser.eval()
            yield record.step, model
            model.denoiser.train()


def value_of(model: Model, reward: RewardFunction, num: int, seed: int) -> float:
    """The mean reward of samples, labels in equal numbers."""
    cond = {"label": torch.arange(num) % 10}
    with torch.no_grad():
        return float(reward(model.sample(num, 4, cond, seed=20_000 + seed), cond, None).mean())


def markdown(contents: dict[str, Any]) -> str:
    """Means over seeds, with the standard deviation of FD."""
    columns = ("", "reward", "amount or steps", "FD (± over seeds)", "recall", "accuracy", "reward's value")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in contents["rows"]:
        key = (row["kind"], row.get("reward", ""), row.get("amount", row.get("steps")))
        groups.setdefault(key, []).append(row)
    for (kind, name, amount), rows in groups.items():
        fds = [row["fd"] for row in rows]
        spread = f" ± {statistics.stdev(fds):.2f}" if len(fds) > 1 else ""
        recall, accuracy = (statistics.mean(row[key] for row in rows) for key in ("recall", "accuracy"))
        value = f"{statistics.mean(row['value'] for row in rows):.3f}" if name else ""
        cells = [kind, name, f"{amount:g}", f"{statistics.mean(fds):.2f}{spread}"]
        lines.append("| " + " | ".join([*cells, f"{recall:.2f}", f"{accuracy:.3f}", value]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("elastic", "reward", "table"))
    parser.add_argument("--runs", type=Path, default=Path("runs/beyond"))
    parser.add_argument("--file", type=Path, default=RESULTS / f"{date.today()}-beyond.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--shorter", type=int, default=1, help="divide all lengths, to see that it runs")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if arguments.command == "table":
        print(markdown(json.loads(arguments.file.read_text())))
    else:
        {"elastic": elastic, "reward": reward}[arguments.command](arguments)


if __name__ == "__main__":
    main()
