"""Time of a step with and without prefetching its minibatch, on a folder of 10,000 PNG files.

    python benchmarks/prefetch.py --device cuda --out benchmarks/results/DATE-prefetch.json

Trains a U-Net at 28×28 by denoising, alternately with and without, and checks that the losses are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from momatch.config import MonitorConfig, TeacherConfig, TrainConfig
from momatch.data.sources import load_data
from momatch.networks.configs import UNetConfig
from momatch.training.build import teacher_training
from momatch.training.loop import train


def write_images(folder: Path, count: int, side: int) -> None:
    """Smooth random images, so that they compress like real ones."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (7, 7), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")


def measure(config: TeacherConfig, data, skipped: int) -> tuple[list[float], list[float]]:
    """Seconds of each step after the first ones, and the losses."""
    run, seconds, losses = teacher_training(data, config), [], []
    last = time.perf_counter()
    for record in train(run.method, run.batches, config.train, config.optim, prefetch=config.train.prefetch):
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        losses.append(record.metrics["loss"])
    return seconds[skipped:], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.backends.cudnn.deterministic = True  # or two runs differ in their last digits, with and without
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.images, 28)
        begun = time.perf_counter()
        data = load_data(folder)
        reading = time.perf_counter() - begun
        train = TrainConfig(num_steps=arguments.steps, batch_size=arguments.batch_size, log_every=1)
        network = UNetConfig(channels=tuple(arguments.channels), blocks_per_level=2)
        base = TeacherConfig(
            network=network, train=train, monitor=MonitorConfig(every=0), device=arguments.device
        )
        times: dict[str, list[float]] = {"without": [], "with": []}
        losses: dict[str, list[float]] = {}
        for _ in range(arguments.repeats):
            for name, prefetch in (("without", False), ("with", True)):
                found, losses[name] = measure(replace(base, train=replace(train, prefetch=prefetch)), data, 5)
                times[name] += found
        assert losses["with"] == losses["without"], "prefetching changes numbers"
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    card = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{card}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "images": arguments.images,
        "seconds_to_read_the_folder": round(reading, 2),
        "batch_size": arguments.batch_size,
        "channels": arguments.channels,
        "steps_timed": len(times["with"]),
        "milliseconds_a_step": {name: round(value, 2) for name, value in medians.items()},
        "ratio": round(medians["with"] / medians["without"], 3),
        "losses_equal": True,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
