"""Distil a mixture of eight Gaussians, where every number has an exact reference.

The teacher is the exact denoiser. Student and auxiliary start as one MLP trained by plain denoising and are
matched for `steps` network calls. Beside the student stand real samples against real samples (the sampling
floor) and the exact teacher at the student's number of steps and at 256.

    python benchmarks/mixture.py                     # three seeds
    python benchmarks/mixture.py --seeds 0 --pairs 5 # one seed

Every sliced W2 is the mean over pairs of fresh samples of `num_samples` each, ± its standard error, so all
rows share one floor; the other columns use all pairs together. A table goes to the terminal, a dated JSON
file to benchmarks/results/.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, cast

import torch
import tyro
from torch import Tensor, nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.distances import mode_statistics, sliced_wasserstein2
from momatch.diffusion.gaussian_mixture import GaussianMixture, ring_of_gaussians
from momatch.diffusion.sampling import ancestral
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods import weighting
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.denoising import Denoising
from momatch.methods.transition import Transition
from momatch.networks.configs import MLPConfig
from momatch.networks.mlp import MLP
from momatch.training.batches import Batches
from momatch.training.loop import train
from momatch.utils.seeding import generator

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result.

    Attributes:
        seeds: one distillation each.
        steps: network calls of the student.
        width: of the MLP.
        depth: of the MLP.
        pretrain_steps: optimizer steps of denoising before distillation.
        pretrain_rate: their peak learning rate.
        num_steps: optimizer steps of distillation, of both networks together.
        batch_size: for both.
        learning_rate: peak rate of distillation.
        beta1: Adam's first-moment decay in distillation.
        beta2: Adam's second-moment decay in distillation.
        ema: decay of the average of the student's weights that is evaluated; 0 evaluates the last weights.
        logsnr_min: λ(1) of the cosine schedule.
        logsnr_max: λ(0).
        shift: of the schedule.
        density: exponent a of s = u^a.
        delta: exponent b of δ = u^b / k.
        weight: w(s).
        weight_maximum: bound of w where it has one.
        update: order of updates.
        teacher_term: factor of the auxiliary's second target.
        num_samples: n of each sliced W2.
        pairs: pairs of samples that floor and students are averaged over; the ratio to the floor needs many.
        teacher_pairs: the same for the exact teacher, whose 256 steps take minutes.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 8
    width: int = 128
    depth: int = 3
    pretrain_steps: int = 4000
    pretrain_rate: float = 1e-3
    num_steps: int = 4000
    batch_size: int = 512
    learning_rate: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.99
    ema: float = 0.998
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0
    shift: float = 0.0
    density: float = 1.0
    delta: float = 0.6
    weight: Literal["flat", "snr", "adaptive"] = "snr"
    weight_maximum: float = 100.0
    update: Literal["alternating", "joint"] = "alternating"
    teacher_term: float = 1.0
    num_samples: int = 10_000
    pairs: int = 40
    teacher_pairs: int = 10


@dataclass(frozen=True)
class Row:
    """One sampler's figures; `sliced_w2` with the standard deviation over pairs."""

    name: str
    sliced_w2: float
    sliced_w2_spread: float
    pairs: int
    mode_mass_tv: float
    std_ratio: float
    std_ratio_all: float
    share_within_3_sigma: float


def mixture_batches(mixture: GaussianMixture, batch_size: int, seed: int) -> Batches:
    """Step → fresh data, never seen before."""

    def batch(step: int) -> Batch:
        rng = generator(seed, "train", step)
        return Batch(mixture.sample(batch_size, rng), None, rng)

    return batch


def pretrain(mixture: GaussianMixture, schedule: NoiseSchedule, settings: Settings, seed: int) -> Denoiser:
    """An MLP that learned E[x | z] from samples alone."""
    torch.manual_seed(seed)
    denoiser = Denoiser(MLP(MLPConfig(2, settings.width, settings.depth)), "v")
    config = TrainConfig(settings.pretrain_steps, settings.batch_size, seed)
    optim = OptimConfig(settings.pretrain_rate, beta1=0.9, beta2=0.999, eps=1e-8)
    batches = mixture_batches(mixture, settings.batch_size, seed)
    for _ in train(Denoising(denoiser, schedule), batches, config, optim):
        pass
    return denoiser


def distil(
    mixture: GaussianMixture, schedule: NoiseSchedule, start: Denoiser, settings: Settings, seed: int
) -> Denoiser:
    """Moment matching from `start` against the exact teacher."""
    student = copy.deepcopy(start)
    weights = {
        "flat": weighting.flat(),
        "snr": weighting.snr_clipped(settings.weight_maximum),
        "adaptive": weighting.adaptive(),
    }
    method = Alternating(
        cast(Denoiser, mixture.denoiser()),
        student,
        copy.deepcopy(start),
        Transition(
            schedule, settings.steps, weighting.power(settings.density), weighting.power(settings.delta)
        ),
        weights[settings.weight],
        settings.update,
        settings.teacher_term,
    )
    config = TrainConfig(settings.num_steps, settings.batch_size, seed)
    optim = OptimConfig(settings.learning_rate, beta1=settings.beta1, beta2=settings.beta2)
    average = copy.deepcopy(student)
    # A seed of its own, so that the student does not meet the samples that it was pre-trained on.
    for _ in train(method, mixture_batches(mixture, settings.batch_size, seed + 1_000_000), config, optim):
        update_average(average, student, settings.ema)
    return average.eval()


@torch.no_grad()
def update_average(average: nn.Module, student: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights; decay 0 copies them."""
    for mean, weight in zip(average.parameters(), student.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def evaluate(
    name: str, sampler: Callable[[int, torch.Generator], Tensor], n: int, pairs: int, seed: int = 0
) -> Row:
    """Compare `sampler(n, generator)` with the mixture; all rows meet the same real samples."""
    mixture = ring_of_gaussians()
    distances, made = [], []
    for pair in range(pairs):
        real = mixture.sample(n, generator(seed, "real", pair))
        made.append(sampler(n, generator(seed, "made", pair)))
        distances.append(sliced_wasserstein2(made[-1], real, 64, generator(seed, "directions")))
    modes = mode_statistics(torch.cat(made), mixture)
    return Row(
        name,
        statistics.mean(distances),
        statistics.stdev(distances) if pairs > 1 else 0.0,
        pairs,
        modes.total_variation,
        modes.std_ratio,
        modes.std_ratio_all,
        modes.share_within_3_sigma,
    )


def sampler_of(denoiser, schedule: NoiseSchedule, steps: int) -> Callable[[int, torch.Generator], Tensor]:
    """Algorithm 1 with this denoiser."""

    def sampler(n: int, rng: torch.Generator) -> Tensor:
        return ancestral(denoiser, torch.randn(n, 2, generator=rng), steps, schedule, generator=rng)

    return sampler


def table(rows: list[Row]) -> str:
    """The rows as text."""
    floor = rows[0].sliced_w2
    lines = [f"{'':24}{'sliced W2':>18}{'× floor':>9}{'mass TV':>9}{'std IQR':>9}{'std all':>9}{'in 3σ':>8}"]
    for row in rows:
        distance = f"{row.sliced_w2:.4f} ± {row.sliced_w2_spread / row.pairs**0.5:.4f}"
        lines.append(
            f"{row.name:24}{distance:>18}{row.sliced_w2 / floor:9.2f}{row.mode_mass_tv:9.4f}"
            f"{row.std_ratio:9.3f}{row.std_ratio_all:9.3f}{row.share_within_3_sigma:8.4f}"
        )
    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Run everything, print the table, write the JSON file."""
    mixture = ring_of_gaussians()
    schedule = schedules.cosine(settings.shift, settings.logsnr_min, settings.logsnr_max)
    exact = mixture.denoiser()
    n, pairs = settings.num_samples, settings.pairs
    rows = [evaluate("real (floor)", mixture.sample, n, pairs)]
    for steps in sorted({settings.steps, 256}):
        sampler = sampler_of(exact, schedule, steps)
        rows.append(evaluate(f"exact teacher, {steps} steps", sampler, n, settings.teacher_pairs))
    seconds = []
    for seed in settings.seeds:
        start = time.monotonic()
        student = distil(mixture, schedule, pretrain(mixture, schedule, settings, seed), settings, seed)
        seconds.append(round(time.monotonic() - start, 1))
        name = f"student, {settings.steps} steps, seed {seed}"
        rows.append(evaluate(name, sampler_of(student, schedule, settings.steps), n, pairs))
        print(table(rows), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today().isoformat()}-mixture.json"
    record = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "training_seconds": seconds,
        "settings": dataclasses.asdict(settings),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
