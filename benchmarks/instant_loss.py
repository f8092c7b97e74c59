"""Does the loss of Algorithm 3 fall as the student gets better? Section 6 of docs/numbers.md.

    python benchmarks/instant_loss.py measure --steps 8 --rate 1e-4 --seeds 0 1
    python benchmarks/instant_loss.py measure --steps 8 --rate 3e-4 --averages 0.98
    python benchmarks/instant_loss.py summarise
    python benchmarks/instant_loss.py figure

Digits students of the recipe digits-instant-8, at other numbers of steps and other peak rates. Training stops
for a look at updates spaced by √2, since most happens early. A look estimates the loss of the weights as they
are then, over 64 minibatches, and the student's distance to the training pictures; minibatches and sampling
noise are the same at every look. A line of results is one training.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import momatch
from digits import override
from momatch.config.schema import DistillConfig
from momatch.data.digits import load_digits
from momatch.evaluation import builtin
from momatch.evaluation.features import PixelFeatures, extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.kid import kid
from momatch.evaluation.statistics import FeatureStatistics
from momatch.methods.instant import Instant
from momatch.models.model import Model
from momatch.training.batches import Batches, image_batches
from momatch.training.build import distillation

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
LOOKS = (0, 5, 10, 14, 20, 28, 40, 57, 80, 113, 160, 226, 320, 453, 640, 750)
MINIBATCHES, LOOK_SEED = 64, 1_000_003  # a seed that no training has
KID_SAMPLES = 4000
QUALITIES, TITLES = ("fd", "fd_pixels", "kid"), ("FD", "FD, pixels", "KID")


def measure(arguments: argparse.Namespace) -> None:
    """Train students and look at them; the results are written after each, beside other seeds of today."""
    out = RESULTS / f"{date.today().isoformat()}-instant-loss-{arguments.steps}-rate-{arguments.rate}.json"
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "recipe": f"digits-instant-8 with {arguments.steps} steps, peak rate {arguments.rate}",
        "num_samples": arguments.samples,
        "reference": "training digits",
        "runs": kept(out, arguments),
    }
    for seed in arguments.seeds:
        points = []
        for point in look_along(arguments.steps, float(arguments.rate), seed, arguments):
            print(point, flush=True)
            points.append(point)
        names = sorted({point["weights"] for point in points})
        correlations = {name: correlate([p for p in points if p["weights"] == name]) for name in names}
        report["runs"].append({"seed": seed, "correlations": correlations, "points": points})
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"seed {seed}: {correlations}\nwritten to {out}", flush=True)


def kept(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of other seeds that a record of today holds already."""
    old = json.loads(path.read_text()) if path.exists() else {"runs": []}
    if old.get("num_samples") != arguments.samples:
        return []
    return [run for run in old["runs"] if run["seed"] not in arguments.seeds]


def look_along(steps: int, rate: float, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train one student; at each look measure its weights, and their averages if there are any to keep."""
    settings = [f"steps={steps}", f"optim.learning_rate={rate}", f"train.seed={seed}", "monitor.every=0"]
    config = override(momatch.recipe("digits-instant-8"), settings)
    assert isinstance(config, DistillConfig)
    run, data = distillation(momatch.load_teacher(config.teacher), load_digits(), config), load_digits().train
    method = run.method
    assert isinstance(method, Instant)
    network = run.model.denoiser.network
    batches = image_batches(data.images, data.labels, config.train.batch_size, LOOK_SEED)
    averages = {decay: Average(network, decay) for decay in arguments.averages}

    def look(update: int) -> Iterator[dict[str, Any]]:
        yield {"update": update, "weights": "last"} | judge(run.model, method, batches, arguments.samples)
        for decay, average in averages.items():
            with average.in_place_of(network):
                found = judge(run.model, method, batches, arguments.samples)
            yield {"update": update, "weights": f"averaged, {decay:g}"} | found

    yield from look(0)
    for event in run:
        for average in averages.values():
            average.update(network)
        if event.record.step in LOOKS:
            yield from look(event.record.step)


class Average:
    """Exponential average of a network's weights; young ones are plain averages."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.weights = copy_of(network)

    def update(self, network: nn.Module) -> None:
        """Take the network's weights in."""
        self.count += 1
        keep = min(self.decay, self.count / (self.count + 1))
        for key, value in network.state_dict().items():
            self.weights[key].lerp_(value, 1 - keep)

    @contextmanager
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """The network has the averaged weights for a while."""
        own = copy_of(network)
        network.load_state_dict(self.weights)
        try:
            yield
        finally:
            network.load_state_dict(own)


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def judge(model: Model, method: Instant, batches: Batches, num_samples: int) -> dict[str, float]:
    """One look: the loss, and three distances to the training pictures."""
    loss, error = instant_loss(method, batches)
    cond = {"label": torch.arange(num_samples) % model.num_classes}
    samples, real = model.sample(num_samples, cond=cond, seed=LOOK_SEED), load_digits().train.images
    found = {"loss": loss, "loss_error": error}
    for key, extractor in (("fd", builtin.digits_classifier()), ("fd_pixels", PixelFeatures())):
        features, reference = extract(extractor, samples), extract(extractor, real)
        found[key] = frechet_distance(
            FeatureStatistics.from_features(features), FeatureStatistics.from_features(reference)
        )
        if key == "fd":
            found["kid"] = kid(features[:KID_SAMPLES], reference, torch.Generator().manual_seed(0)).value
    return found


def instant_loss(method: Instant, batches: Batches) -> tuple[float, float]:
    """½ E[G]ᵀΛE[G], what the logged `instant_loss` estimates, and its jackknife error.

    All pairs of different minibatches take the parts of A and B: the mean over i ≠ j of ½ G_iᵀΛG_j, with G_i
    the teacher's gradient from minibatch i.
    """
    rows = []
    for i in range(MINIBATCHES):
        batch = batches(i)
        draw = method.transition.draw(method.student, batch, with_grad=False)
        gradient = method.teacher_gradient(draw, batch)
        rows.append(torch.cat([(g * method.preconditioner[k].sqrt()).flatten() for k, g in gradient.items()]))
    vectors, n = torch.stack(rows).double(), MINIBATCHES
    products = vectors @ vectors.T
    products.fill_diagonal_(0)
    total, of_each = products.sum(), products.sum(1)
    without = 0.5 * (total - 2 * of_each) / ((n - 1) * (n - 2))
    error = ((without - without.mean()).square().sum() * (n - 1) / n).sqrt()
    return float(0.5 * total / (n * (n - 1))), float(error)


def correlate(points: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Rank correlations of the loss with each quality: over all looks, and from the loss's peak on."""
    from scipy.stats import spearmanr

    losses = [point["loss"] for point in points]
    peak = losses.index(max(losses))
    found: dict[str, list[float]] = {}
    for key in QUALITIES:
        values = [point[key] for point in points]
        pairs = ((losses, values), (losses[peak:], values[peak:]))
        found[key] = [float(spearmanr(a, b)[0]) for a, b in pairs]  # type: ignore (scipy is untyped)
    return found


def reports() -> list[dict[str, Any]]:
    """The latest record of every number of steps and rate, most steps and lowest rate first."""
    newest = {path.name[11:]: path for path in sorted(RESULTS.glob("*-instant-loss-*-rate-*.json"))}
    found = [json.loads(path.read_text()) for path in newest.values()]
    for report in found:
        words = report["recipe"].split()
        report["steps"], report["rate"] = int(words[2]), words[-1]
    return sorted(found, key=lambda report: (-report["steps"], float(report["rate"])))


def summarise(arguments: argparse.Namespace) -> None:
    """Print the table of docs/numbers.md."""
    print(table(reports()))


def table(found: list[dict[str, Any]]) -> str:
    """One line per student: its loss and FD, and their rank correlations (from the loss's peak on)."""
    titles = ("", "rate", "weights", "seed", "loss: first, highest, last", "FD: first, last", *TITLES)
    lines = [
        "| " + " | ".join(titles) + " |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in found:
        for run in report["runs"]:
            for name, correlations in run["correlations"].items():
                points = [point for point in run["points"] if point["weights"] == name]
                losses = [point["loss"] for point in points]
                cells = [
                    f"{report['steps']} steps",
                    report["rate"],
                    name,
                    str(run["seed"]),
                    f"{losses[0]:.2f}, {max(losses):.2f}, {losses[-1]:.3f}",
                    f"{points[0]['fd']:.2f}, {points[-1]['fd']:.2f}",
                    *("{:.2f} ({:.2f})".format(*correlations[key]) for key in QUALITIES),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(arguments: argparse.Namespace) -> None:
    """docs/images/instant-loss.png: loss and FD against the update, for every number of steps."""
    from matplotlib.figure import Figure

    found = reports()
    columns = sorted({report["steps"] for report in found}, reverse=True)
    canvas = Figure(figsize=(3.4 * len(columns), 5.2), layout="constrained")
    grid = canvas.subplots(2, len(columns), sharex=True, squeeze=False)
    styles = {"1e-4": "#3b82f6", "3e-4": "#e0782f", "3e-5": "#2f9e6e"}
    for report in found:
        for run in report["runs"]:
            for name in run["correlations"]:
                points = [point for point in run["points"] if point["weights"] == name]
                label = f"rate {report['rate']}, {name}" if run["seed"] == 0 else None
                for axes, key in zip(grid[:, columns.index(report["steps"])], ("loss", "fd"), strict=True):
                    axes.plot(
                        [point["update"] for point in points],
                        [point[key] for point in points],
                        color=styles.get(report["rate"], "#7d8590"),
                        linestyle="-" if name == "last" else "--",
                        marker="." if run["seed"] == 0 else None,
                        label=label,
                    )
    for column, steps in enumerate(columns):
        for axes, what in zip(grid[:, column], ("loss of Algorithm 3", "FD, training digits"), strict=True):
            axes.set_xscale("symlog", linthresh=5)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(what)
        grid[0, column].set_title(f"{steps} steps")
        grid[1, column].set_xlabel("update")
    grid[0, -1].legend(fontsize=8)
    canvas.savefig(IMAGES / "instant-loss.png", dpi=110)
    print(IMAGES / "instant-loss.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for function in (measure, summarise, figure):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
    command = commands.choices["measure"]
    command.add_argument("--steps", type=int, default=8)
    command.add_argument("--rate", default="1e-4", help="peak learning rate; the recipe's is 3e-4")
    command.add_argument("--seeds", type=int, nargs="+", default=[0])
    command.add_argument("--samples", type=int, default=10_000, help="pictures a look")
    command.add_argument("--averages", type=float, nargs="*", default=[], help="decays of averaged weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
