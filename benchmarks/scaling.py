"""Weak scaling: two processes that train as one, each on a core, beside two runs that know nothing of it.

    python benchmarks/scaling.py            # two idle cores, some minutes

Each process works on the same number of images a step in both cases, on the joint update of a U-Net of about
a million parameters at 16×16. What the two have to do more is one all-reduce of each network's gradient
(gloo), and to wait for the slower of them. Rounds of both cases in turn; medians over steps, then rounds.
Where it goes: seconds of a step in the all-reduce, waiting included, and of one when nobody waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from momatch.config.schema import DistillConfig, MonitorConfig, TrainConfig
from momatch.data.images import ImageSet, Split
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.methods.alternating import AlternatingConfig
from momatch.models.model import Model
from momatch.networks import registry
from momatch.networks.configs import UNetConfig
from momatch.training import distributed
from momatch.training.build import distillation

RESULTS = Path(__file__).parent / "results"
NETWORK = UNetConfig(channels=(48, 96, 128), blocks_per_level=1, attention_levels=(2,), num_classes=10)
SIZE = sum(p.numel() for p in registry.build(NETWORK).parameters())
EACH, WARM = 32, 3  # images of a process a step, steps left out


def steps(processes: int, count: int) -> tuple[list[float], float]:
    """Seconds of each step in this process, and the mean a step of those in the all-reduce."""
    torch.manual_seed(0)
    denoiser = Denoiser(registry.build(NETWORK), "v", {"label": 10})
    teacher = Model(denoiser, NETWORK, schedules.cosine(), (1, 16, 16), 8, 10, {"role": "teacher"})
    images = ImageSet(torch.rand(500, 1, 16, 16) * 2 - 1, torch.arange(500) % 10, 10, "random")
    settings = TrainConfig(num_steps=count + WARM, batch_size=EACH * processes, log_every=10**6)
    config = DistillConfig(
        steps=8,
        method=AlternatingConfig("joint"),
        train=settings,
        monitor=MonitorConfig(every=0),
        device="cpu",
    )
    found, inside, plain = [], [], dist.all_reduce

    def timed(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        done = plain(tensor, *arguments, **options)
        inside.append(time.perf_counter() - begun)
        return done

    dist.all_reduce = timed
    last = time.perf_counter()
    for _ in distillation(teacher, Split(images, images), replace(config, parallel="ddp")):
        now = time.perf_counter()
        found.append(now - last)
        last = now
    per_step = len(inside) // len(found)
    return found[WARM:], sum(inside[WARM * per_step :]) / count


def all_reduce(size: int, count: int) -> float:
    """Median seconds of an all-reduce of that many numbers, both processes at it."""
    numbers, found = torch.zeros(size), []
    for _ in range(count):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(numbers)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def of_two(together: bool, count: int, folder: Path) -> list[dict[str, float]]:
    """Of two processes, each on its own core: the median step, and the all-reduce's part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.sched_setaffinity(0, {rank})
        torch.set_num_threads(1)
        if together:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with distributed.joined():
                seconds, inside = steps(2, count)
                found = {"all_reduce": inside, "all_reduce_alone": all_reduce(SIZE, count)}
        else:
            (seconds, _), found = steps(1, count), {}
        found["step"] = statistics.median(seconds)
        (folder / str(rank)).write_text(json.dumps(found))
        os._exit(0)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(arguments.rounds):
            alone = of_two(False, arguments.steps, Path(temporary))
            both = of_two(True, arguments.steps, Path(temporary))
            slower = [max(each["step"] for each in pair) for pair in (alone, both)]
            rows.append({"alone": alone, "together": both, "ratio": slower[1] / slower[0]})
            print(rows[-1], flush=True)
    found = {
        "date": f"{date.today()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo",
        "parameters": SIZE,
        "images_a_process": EACH,
        "rounds": rows,
        "ratio": statistics.median(row["ratio"] for row in rows),
    }
    print(json.dumps(found["ratio"]))
    (RESULTS / f"{date.today()}-weak-scaling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
