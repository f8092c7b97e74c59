"""A law of 64 dimensions that is known exactly, and teachers that are not: where can a student be better?

    python benchmarks/wide.py all --runs runs/wide --seeds 0 1 2
    python benchmarks/wide.py table

The data are a mixture of 100 Gaussians fitted to the 8×8 digits: means and leading 8 directions of clusters,
and a little round noise. Every training batch is fresh, so nothing can be memorised. Teachers are MLPs,
narrow and wide, trained by denoising until their loss has stopped falling, and the exact denoiser. Students
of the joint variant start from the MLP (of the exact teacher: from the wide one).

Rows: n samples against the law itself, by the Fréchet distance of mean and covariance (those of the law are
exact), the total variation of the masses of the modes, the mean log density (of real samples it is −H), and
the energy distance to other real samples. "real" is the floor at that n. Written after every row; the same
command goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.data.digits import load_digits
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.distances import energy_distance
from momatch.diffusion.gaussian_mixture import GaussianMixture
from momatch.diffusion.sampling import ancestral
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.statistics import FeatureStatistics
from momatch.methods import weighting
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.denoising import Denoising
from momatch.methods.transition import Transition
from momatch.networks.configs import MLPConfig
from momatch.networks.mlp import MLP
from momatch.training.batches import Batches
from momatch.training.loop import train
from momatch.utils.files import read_tensors, write_atomically, write_tensors
from momatch.utils.seeding import generator

RESULTS = Path(__file__).parent / "results"
MODES, RANK, ROUND = 100, 8, 0.05  # standard deviation of the round part, in units of [−1, 1]
WIDTHS = {"narrow": 96, "wide": 256}
TEACHER_STEPS, STUDENT_STEPS = (4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16)
DDIM_STEPS = (8, 16, 64, 256)
EXACT_TEACHER_STEPS, EXACT_STUDENT_STEPS = (4, 8, 16, 32), (4, 8)
SCHEDULE = schedules.cosine()
FEW = 4000  # samples of either side of an energy distance
FEW_AT_ONCE = 250  # rows times modes times dimensions in float64 are 13 MB


@cache
def law() -> GaussianMixture:
    """The mixture; the same at every call."""
    data = load_digits()
    images = torch.cat([part.images[:] for part in (data.train, data.heldout)]).double().flatten(1)
    found = KMeans(MODES, random_state=0).fit(images.numpy())
    labels, eye = torch.tensor(found.labels_), torch.eye(64, dtype=torch.float64)
    means, covariances, counts = [], [], []
    for mode in range(MODES):
        x = images[labels == mode]
        means.append(x.mean(0))
        variances, axes = torch.linalg.eigh(torch.cov(x.T) if len(x) > 1 else 0 * eye)
        low = (axes[:, -RANK:] * variances[-RANK:].clamp(min=0)) @ axes[:, -RANK:].T
        covariances.append((low + low.T) / 2 + ROUND**2 * eye)
        counts.append(float(len(x)))
    return GaussianMixture(torch.tensor(counts), torch.stack(means), torch.stack(covariances))


@cache
def moments() -> FeatureStatistics:
    """Mean and covariance of the law, exactly."""
    mixture = law()
    w, means = mixture.weights, mixture.means
    mean = w @ means
    second = torch.einsum("k,kde->de", w, mixture.covariances) + (w[:, None] * means).T @ means
    return FeatureStatistics(mean, second - torch.outer(mean, mean), 10**9)


def measured(x: Tensor, seed: int) -> dict[str, float]:
    """The figures of samples (n, 64)."""
    mixture = law()
    log_density, modes = [], torch.zeros(MODES, dtype=torch.float64)
    for part in x.split(FEW_AT_ONCE):
        given = mixture._condition(part, torch.full((len(part),), torch.inf, dtype=torch.float64))
        log_density.append(torch.logsumexp(given.log_joint, 1))
        modes += given.responsibilities.sum(0)
    real = mixture.sample(FEW, generator(seed, "energy"))
    return {
        "frechet": frechet_distance(FeatureStatistics.from_features(x), moments()),
        "mass_tv": float((modes / len(x) - mixture.weights).abs().sum() / 2),
        "log_density": float(torch.cat(log_density).mean()),
        "energy": energy_distance(x[:FEW], real),
    }


def batches(size: int, seed: int, what: str) -> Batches:
    """Step → fresh data, never seen before."""

    def batch(step: int) -> Batch:
        rng = generator(seed, what, step)
        return Batch(law().sample(size, rng), None, rng)

    return batch


@dataclass
class Study:
    """What is trained where, and the rows so far."""

    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        path = self.arguments.file
        self.contents: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}

    def add(self, key: dict[str, Any], samples: Callable[[], Tensor]) -> None:
        """Measure, unless it was."""
        if any(key.items() <= row.items() for row in self.contents["rows"]):
            return
        start = time.perf_counter()
        row = {**key, **measured(samples(), key["seed"])}
        self.contents |= {"date": f"{date.today()}", "machine": f"{platform.machine()}, one core"}
        self.contents["num"] = self.arguments.num
        self.contents["rows"].append(row)
        text = json.dumps(self.contents, indent=1) + "\n"
        write_atomically(self.arguments.file, lambda temporary: temporary.write_text(text))
        print(json.dumps(row), f"{time.perf_counter() - start:.0f} s", flush=True)

    def kept(self, name: str, width: int, make: Callable[[], Denoiser]) -> Denoiser:
        """A network from its file, or made and written."""
        path = self.arguments.runs / f"{name}.safetensors"
        if path.exists():
            found = network(width, 0)
            found.load_state_dict(read_tensors(path)[0])
            return found.eval()
        start = time.perf_counter()
        found = make().eval()
        write_tensors(path, found.state_dict())
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return found

    def draw(self, denoiser: Denoiser, steps: int, seed: int, eta: float = 1.0) -> Callable[[], Tensor]:
        """Samples by Algorithm 1, or DDIM (eta 0), 5,000 at a time."""

        def samples() -> Tensor:
            found = []
            for i in range(self.arguments.num // 5000):
                rng = generator(seed, "samples", i)
                z = torch.randn(5000, 64, generator=rng)
                found.append(ancestral(denoiser, z, steps, SCHEDULE, eta=eta, generator=rng))
            return torch.cat(found)

        return samples


def network(width: int, seed: int) -> Denoiser:
    """An MLP of three layers, that predicts v."""
    torch.manual_seed(seed)
    return Denoiser(MLP(MLPConfig(64, width, 3)), "v")


def taught(width: int, steps: int, seed: int) -> Denoiser:
    """A teacher: plain denoising, constant rate and then down to 0."""
    denoiser = network(width, seed)
    for count, rate in ((steps, 1e-3), (steps // 4, 1e-4)):
        optim = OptimConfig(rate, beta1=0.9, beta2=0.999, eps=1e-8)
        method = Denoising(denoiser, SCHEDULE)
        for record in train(method, batches(512, seed, f"teacher {rate}"), TrainConfig(count, 512), optim):
            if record.step % 2000 == 0:
                print(f"teacher {width}: step {record.step}", flush=True)
    return denoiser


def matched(teacher: Denoiser, start: Denoiser, k: int, seed: int, arguments: argparse.Namespace) -> Denoiser:
    """A student of k steps."""
    student = copy.deepcopy(start).train().requires_grad_(True)
    auxiliary = copy.deepcopy(student)
    transition = Transition(SCHEDULE, k, delta_density=weighting.power(arguments.delta))
    weights = weighting.snr_clipped(arguments.clip) if arguments.clip else weighting.flat()
    method = Alternating(copy.deepcopy(teacher), student, auxiliary, transition, weights, "joint")
    settings = TrainConfig(arguments.pairs, 256, seed)
    for _ in train(method, batches(256, seed, "student"), settings, OptimConfig(arguments.rate)):
        pass
    return student


def everything(arguments: argparse.Namespace) -> None:
    """All teachers and students, seed after seed."""
    study = Study(arguments)
    for seed in arguments.seeds:
        real = partial(law().sample, arguments.num, generator(seed, "real"))
        study.add({"teacher": "", "kind": "real", "steps": 0, "seed": seed}, real)
        starts = {}
        for name in arguments.widths:
            width = WIDTHS[name]
            make = partial(taught, width, arguments.teacher_steps, seed)
            made = study.kept(f"{name}-seed{seed}", width, make)
            starts[name] = made
            students(study, name, made, made, width, STUDENT_STEPS, seed)
            for steps in TEACHER_STEPS:
                key = {"teacher": name, "kind": "teacher", "steps": steps, "seed": seed}
                study.add(key, study.draw(made, steps, seed))
            for steps in DDIM_STEPS:
                key = {"teacher": name, "kind": "teacher, DDIM", "steps": steps, "seed": seed}
                study.add(key, study.draw(made, steps, seed, eta=0.0))
        if arguments.exact and "wide" in starts:
            exact = cast(Denoiser, law().denoiser())
            students(study, "exact", exact, starts["wide"], WIDTHS["wide"], EXACT_STUDENT_STEPS, seed)
            for steps in EXACT_TEACHER_STEPS:
                key = {"teacher": "exact", "kind": "teacher", "steps": steps, "seed": seed}
                study.add(key, study.draw(exact, steps, seed))


def students(
    study: Study,
    name: str,
    teacher: Denoiser,
    start: Denoiser,
    width: int,
    counts: tuple[int, ...],
    seed: int,
) -> None:
    """Those of one teacher."""
    for k in counts:
        make = partial(matched, teacher, start, k, seed, study.arguments)
        made = study.kept(f"{name}-{k}-seed{seed}", width, make)
        key = {"teacher": name, "kind": "student", "steps": k, "seed": seed}
        study.add(key, study.draw(made, k, seed))


def markdown(contents: dict[str, Any]) -> str:
    """Means over seeds, ± their standard deviation."""
    columns = ("teacher", "", "calls", "Fréchet", "mass TV", "log density", "energy")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in contents["rows"]:
        groups.setdefault((row["teacher"], row["kind"], row["steps"]), []).append(row)
    for (teacher, kind, steps), rows in groups.items():
        cells = []
        for name, digits in (("frechet", 4), ("mass_tv", 4), ("log_density", 1), ("energy", 4)):
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append("| " + " | ".join([teacher, kind, str(steps or ""), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("all", "table"))
    parser.add_argument("--runs", type=Path, default=Path("runs/wide"))
    parser.add_argument("--file", type=Path, default=RESULTS / f"{date.today()}-wide.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--widths", nargs="+", choices=tuple(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--teacher-steps", type=int, default=8000)
    parser.add_argument("--pairs", type=int, default=3000, help="joint updates of a student")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--delta", type=float, default=0.6, help="exponent of δ")
    parser.add_argument("--clip", type=float, default=0, help="w = min(1/σ², this); 0 is flat")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if arguments.command == "table":
        print(markdown(json.loads(arguments.file.read_text())))
    else:
        everything(arguments)


if __name__ == "__main__":
    main()
