"""A training step of the ImageNet 64×64 teacher on a GPU: float32 beside bfloat16, and what plan foretold.

    python benchmarks/gpu.py            # 52 GiB of GPU memory, a minute

Random pictures: time and memory do not depend on what they show. Time: mean of 8 steps after 4. Memory: the
peak of torch's allocator over the run, beside `momatch plan` of the same config.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from momatch.config.recipes import recipe
from momatch.config.schema import TeacherConfig
from momatch.data.images import ImageSet, Split
from momatch.training import plan as planning
from momatch.training.build import teacher_training

RESULTS = Path(__file__).parent / "results"
WARMUP, TIMED, BATCH = 4, 8, 64


def config_of(precision: Any) -> TeacherConfig:
    config = recipe("imagenet64-teacher")
    assert isinstance(config, TeacherConfig)
    settings = replace(config.train, batch_size=BATCH, num_steps=WARMUP + TIMED, log_every=1)
    quiet = replace(config.monitor, every=0)
    return replace(config, precision=precision, device="cuda", train=settings, monitor=quiet)


def measured(config: TeacherConfig, data: Split) -> dict[str, float]:
    """Seconds a step, and the allocator's peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = teacher_training(data, config)
    start, loss = 0.0, float("nan")
    for event in run:
        loss = event.record.metrics["loss"]
        if event.record.step == WARMUP:
            torch.cuda.synchronize()
            start = time.perf_counter()
    torch.cuda.synchronize()
    return {
        "seconds_a_step": (time.perf_counter() - start) / TIMED,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": loss,
    }


def main() -> None:
    images = torch.rand(256, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    random = ImageSet(images, torch.arange(256) % 1000, 1000, "random")
    data, rows = Split(random, random), {}
    for precision in ("float32", "bfloat16"):
        config = config_of(precision)
        row = measured(config, data)
        found = planning.plan(config, None, data, 1.0)
        row |= {"plan_gib": found.memory / 2**30, "plan_seconds_a_step": found.seconds_per_step}
        rows[precision] = row
        print(precision, row)
    report = {
        "hardware": f"{torch.cuda.get_device_name()}; torch {torch.__version__}",
        "network": "imagenet64-teacher, U-ViT of 391,464,195 parameters",
        "batch_size": BATCH,
        "rows": rows,
    }
    path = RESULTS / f"{date.today().isoformat()}-gpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
