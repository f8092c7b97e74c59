"""A diffusion policy for a made-up task, and students of it that act in 1, 2 and 4 network calls.

    python examples/policy.py --out runs/policy

A point reaches a goal around a block that stands between: left or right of it, both are right, and
the mean of both runs into it. Demonstrations are smooth paths of 16 points with some noise. A teacher learns
them by denoising, conditioned on the goal, as in "Diffusion Policy" (Chi et al. 2023); students are distilled
from it by moment matching. Each policy is asked for paths to goals it has not seen. Written are the share of
paths that end at the goal and never touch the block, the share that passes on the rarer side (half is even),
and the time of one decision, a batch of one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import momatch
from momatch.config.schema import DistillConfig, MonitorConfig, TeacherConfig
from momatch.models.model import Model
from momatch.training.build import teacher_training

POINTS = 16  # of a path, two numbers each
BLOCK, REACH = 0.35, 0.2  # radius of the block at the origin; how near the end must be to the goal
SCALE = 0.8  # of the paths, to about unit spread; the network sees them divided by it
TEACHER_STEPS, STUDENT_STEPS = 100, (1, 2, 4)


def demonstrations(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Paths (n, 16, 2) and goals (n, 2), float32, from (0, −1) past either side of the block."""
    rng = np.random.default_rng(seed)
    goals = np.stack([rng.uniform(-0.4, 0.4, n), rng.uniform(0.8, 1.2, n)], 1)
    t = np.linspace(0, 1, POINTS)[None, :, None]
    straight = (1 - t) * np.array([0.0, -1.0]) + t * goals[:, None]
    side = rng.choice([-1.0, 1.0], (n, 1))
    bend = side * rng.uniform(0.6, 0.9, (n, 1)) * np.sin(np.pi * t[..., 0])
    paths = straight + np.stack([bend, 0.02 * rng.normal(size=bend.shape)], 2)
    return paths.astype(np.float32), goals.astype(np.float32)


@dataclass(frozen=True)
class Outcome:
    """What a policy did.

    Attributes:
        steps: network calls for a path.
        success: share of paths that end within 0.2 of the goal and keep out of the block.
        rarer_side: share of paths on the side that fewer take; 0.5 at best.
        milliseconds: for one decision, a batch of one; the median of a round, the best of five rounds.
    """

    steps: int
    success: float
    rarer_side: float
    milliseconds: float


def judge(paths: Tensor, goals: Tensor) -> tuple[float, float]:
    """(success, rarer side) of paths (N, 16, 2) to goals (N, 2)."""
    ends = (paths[:, -1] - goals).norm(dim=1) < REACH
    between = torch.nn.functional.interpolate(paths.transpose(1, 2), size=8 * POINTS, mode="linear")
    clear = between.norm(dim=1).min(dim=1).values > BLOCK
    left = float((paths[:, POINTS // 2, 0] < 0).float().mean())
    return float((ends & clear).float().mean()), min(left, 1 - left)


def outcome(model: Model, steps: int, goals: Tensor, rounds: int = 5, decisions: int = 10) -> Outcome:
    """Ask for a path to every goal, and for some one by one, against the clock."""
    paths = SCALE * model.sample(len(goals), steps, {"obs": goals}, seed=1)
    medians = []
    for _ in range(rounds):  # other work on the machine can only make a round slower
        times = []
        for i in range(decisions):
            began = time.perf_counter()
            model.sample(1, steps, {"obs": goals[i : i + 1]}, seed=i)
            times.append(time.perf_counter() - began)
        medians.append(float(np.median(times)))
    return Outcome(steps, *judge(paths, goals), 1000 * min(medians))


def train(out: Path, quick: bool, seed: int, counts: Sequence[int]) -> dict[str, list[Outcome]]:
    """Teacher and students; their outcomes."""
    paths, goals = demonstrations(1000 if quick else 10_000, seed)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "demonstrations.npz"
    np.savez(file, x=paths / SCALE, obs=goals, group=np.arange(len(paths)) // 10)
    data = momatch.load_data(str(file))
    config = momatch.recipe("vectors-teacher")
    assert isinstance(config, TeacherConfig)
    quiet = MonitorConfig(every=0)
    short = {"batch_size": 64} if quick else {}
    length = replace(config.train, num_steps=1000 if quick else 10_000, seed=seed, **short)
    run = teacher_training(
        data, replace(config, data=str(file), train=length, monitor=quiet), out / "teacher"
    )
    for _ in run:
        pass
    run.finish()
    teacher = momatch.load_teacher(out / "teacher")
    unseen = torch.from_numpy(demonstrations(200 if quick else 1000, seed + 1)[1])
    found = {"teacher": [outcome(teacher, TEACHER_STEPS, unseen)], "students": []}
    for steps in counts:
        student_config = momatch.recipe(f"vectors-{steps}")
        assert isinstance(student_config, DistillConfig)
        length = replace(student_config.train, num_steps=400 if quick else 4000, seed=seed, **short)
        student_config = replace(
            student_config, teacher=str(out / "teacher"), data=str(file), train=length, monitor=quiet
        )
        student = momatch.distill(teacher, data, student_config, out / f"student-{steps}")
        found["students"].append(outcome(student, steps, unseen))
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[Outcome]]:
    """Train, print, and write OUT/policy.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/policy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=STUDENT_STEPS, help="of the students")
    parser.add_argument("--quick", action="store_true", help="shorter: to see that it runs")
    parsed = parser.parse_args(arguments)
    found = train(parsed.out, parsed.quick, parsed.seed, parsed.steps)
    rows = [(name, row) for name, group in found.items() for row in group]
    print(f"{'policy':<10}{'calls':>6}{'success':>9}{'rarer side':>12}{'ms/decision':>13}")
    for name, row in rows:
        line = f"{row.success:>9.1%}{row.rarer_side:>12.1%}{row.milliseconds:>13.2f}"
        print(f"{name.removesuffix('s'):<10}{row.steps:>6}{line}")
    contents = [{"policy": name.removesuffix("s"), **row.__dict__} for name, row in rows]
    (parsed.out / "policy.json").write_text(json.dumps(contents, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
