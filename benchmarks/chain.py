"""D-MMD where everything is known: a Markov chain of four tokens, whose exact teacher needs no training.

    python benchmarks/chain.py
    python benchmarks/chain.py --seeds 0 1 2
    python benchmarks/chain.py table

Eight tokens in a row; each is the one before with probability 0.9, the next one in a circle with 0.08, either
other with 0.01. The teacher of masked diffusion is exact: sums over the chain between the nearest tokens that
show. Student and auxiliary are small transformers, trained first as a teacher would be. For every sampler:
total variation of the law of two neighbours from the exact one, and of the number of changes in a row, on
--num samples; the same of as many rows of the chain itself. The same command again goes on where it was
stopped, row by row.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.diffusion import sampling, schedules
from momatch.diffusion.categorical import CategoricalDenoiser, CategoricalProcess, with_noise
from momatch.diffusion.interface import Cond
from momatch.methods.base import Batch
from momatch.methods.discrete import DiscreteDenoising, DiscreteMatching
from momatch.methods.transition import Transition
from momatch.networks.configs import TokenTransformerConfig
from momatch.networks.registry import build
from momatch.training.loop import train
from momatch.utils.files import write_atomically
from momatch.utils.seeding import generator
from timing import processor

RESULTS = Path(__file__).parent / "results"
KINDS, LENGTH, STAY, NOISE = 4, 8, 0.9, 8
STEPS = 1, 2, 4, 8
SCHEDULE, PROCESS = schedules.cosine(), CategoricalProcess("mask")


def transitions() -> Tensor:
    """(4, 4) float64: probabilities of the next token given one."""
    row = torch.tensor([STAY, 0.08, 0.01, 0.01], dtype=torch.float64)
    return torch.stack([row.roll(i) for i in range(KINDS)])


def chain(count: int, rng: torch.Generator) -> Tensor:
    """Rows of the chain (count, 8) int64; its first token is uniform."""
    rows = [torch.randint(KINDS, (count,), generator=rng)]
    for _ in range(LENGTH - 1):
        rows.append(torch.multinomial(transitions()[rows[-1]], 1, generator=rng).squeeze(1))
    return torch.stack(rows, 1)


class Exact(CategoricalDenoiser):
    """E[x | z] of the chain under masked diffusion, by forward and backward sums."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "mask")
        self.network.weight = nn.Parameter(torch.zeros(1))  # a device to look at

    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Z (B, 8, 5) one-hot → (B, 8, 5)."""
        shown = z[..., :-1].double()
        fits = torch.where(z[..., -1:] > 0.5, torch.ones_like(shown), shown)
        a, move = fits, transitions()
        before, after = [torch.ones_like(a[:, 0])], [torch.ones_like(a[:, 0])]
        for i in range(LENGTH - 1):
            before.append((before[-1] * a[:, i]) @ move)
            after.append((after[-1] * a[:, LENGTH - 1 - i]) @ move.T)
        joint = a * torch.stack(before, 1) * torch.stack(after[::-1], 1)
        x = joint / joint.sum(-1, keepdim=True)
        return torch.cat([x, torch.zeros_like(x[..., :1])], -1).to(z.dtype)


def one_hot(rows: Tensor) -> Tensor:
    """(B, 8) → (B, 8, 5) float32, the mask's entry empty."""
    return torch.nn.functional.one_hot(rows, KINDS + 1).float()


def batches(seed: int, size: int):
    """Step → fresh rows of the chain."""

    def batch(step: int) -> Batch:
        rng = generator(seed, "chain", step)
        return Batch(one_hot(chain(size, rng)), None, rng)

    return batch


def figures(rows: Tensor) -> dict[str, float]:
    """Total variation from the exact laws: of two neighbours, and of the number of changes in a row."""
    pairs = torch.bincount((rows[:, :-1] * KINDS + rows[:, 1:]).flatten(), minlength=KINDS**2).double()
    exact = (transitions() / KINDS).flatten()
    changes = torch.bincount((rows[:, 1:] != rows[:, :-1]).sum(1), minlength=LENGTH).double()
    law = torch.distributions.Binomial(LENGTH - 1, torch.tensor(1 - STAY).double())
    binomial = law.log_prob(torch.arange(LENGTH).double()).exp()
    return {
        "pairs": float((pairs / pairs.sum() - exact).abs().sum() / 2),
        "changes": float((changes / changes.sum() - binomial).abs().sum() / 2),
    }


def drawn(denoiser: Any, steps: int, num: int, seed: int) -> Tensor:
    """Samples (num, 8)."""
    rng = generator(seed, "samples", steps)
    z = PROCESS.prior(torch.zeros(num, LENGTH, KINDS + 1))
    with torch.no_grad():
        x = sampling.ancestral(denoiser(rng), z, steps, SCHEDULE, generator=rng, process=PROCESS)
    return x.argmax(-1)


def network(noise: int, seed: int) -> CategoricalDenoiser:
    """A transformer of 0.1 M parameters."""
    shape = TokenTransformerConfig(KINDS + 1, LENGTH, 64, 2, embedding_dim=32, noise_dim=noise)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CategoricalDenoiser(build(shape), "mask")


def student(steps: int, arguments: argparse.Namespace, seed: int, begin: CategoricalDenoiser):
    """The student of so many steps, from the exact teacher."""
    learner = network(NOISE, seed)
    learner.network.load_state_dict(begin.network.state_dict(), strict=False)
    method = DiscreteMatching(
        Exact(),
        learner,
        copy.deepcopy(begin),
        Transition(SCHEDULE, steps, process=PROCESS),
        update="joint",
        noise_dim=NOISE,
    )
    settings = TrainConfig(arguments.updates, 256, seed, checkpoint_every=10**9)
    for _ in train(method, batches(seed, 256), settings, OptimConfig(1e-3)):
        pass
    return learner


def measure(arguments: argparse.Namespace, seed: int) -> None:
    """All rows of a seed that are not there yet."""

    def note(name: str, steps: int, make: Any) -> None:
        kept = read()
        if any((row["name"], row["steps"], row["seed"]) == (name, steps, seed) for row in kept):
            return
        start = time.monotonic()
        row = {"name": name, "steps": steps, "seed": seed, **figures(make())}
        row["seconds"] = round(time.monotonic() - start)
        print(row, flush=True)
        about = {"date": date.today().isoformat(), "hardware": f"{processor()}, one thread, shared"}
        about |= {"torch": torch.__version__, "num": arguments.num, "updates": arguments.updates}
        contents = json.dumps({**about, "rows": [*kept, row]}, indent=1) + "\n"
        write_atomically(results(), lambda path: path.write_text(contents))

    note("chain", 0, lambda: chain(arguments.num, generator(seed, "floor")))
    for steps in (*STEPS, 64):
        note("teacher", steps, lambda: drawn(lambda rng: Exact(), steps, arguments.num, seed))  # noqa: B023
    if all(any((r["name"], r["steps"], r["seed"]) == ("student", k, seed) for r in read()) for k in STEPS):
        return
    begin = network(0, seed)
    settings = TrainConfig(arguments.updates // 2, 256, seed, checkpoint_every=10**9)
    denoising = DiscreteDenoising(begin, SCHEDULE, PROCESS)
    for _ in train(denoising, batches(seed, 256), settings, OptimConfig(2e-3, beta1=0.9, eps=1e-8)):
        pass
    for steps in STEPS:

        def made(steps: int = steps) -> Tensor:
            learner = student(steps, arguments, seed, begin).eval()
            return drawn(lambda rng: with_noise(learner, NOISE, rng), steps, arguments.num, seed)

        note("student", steps, made)


def results() -> Path:
    """The newest file, or today's."""
    found = sorted(RESULTS.glob("*-chain.json"))
    return found[-1] if found else RESULTS / f"{date.today().isoformat()}-chain.json"


def read() -> list[dict[str, Any]]:
    """The rows that are there."""
    return json.loads(results().read_text())["rows"] if results().exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("all", "table"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--num", type=int, default=20_000)
    arguments = parser.parse_args()
    for seed in arguments.seeds if arguments.what == "all" else ():
        measure(arguments, seed)
    for row in sorted(read(), key=lambda row: (row["name"], row["steps"], row["seed"])):
        print(f"{row['name']:8} {row['steps']:3}  pairs {row['pairs']:.4f}  changes {row['changes']:.4f}")


if __name__ == "__main__":
    main()
