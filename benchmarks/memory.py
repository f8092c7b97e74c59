"""Memory of a step of training: what `momatch plan` says, and what torch's allocator gives out.

    python benchmarks/memory.py

Writes a dated JSON into benchmarks/results/ and prints the table of docs/numbers.md.
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import time
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import momatch
from momatch.config import AlternatingConfig
from momatch.config.schema import DistillConfig
from momatch.training import plan as planning
from momatch.training.build import distillation
from momatch.training.loop import train

RESULTS = Path(__file__).parent / "results"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "alternating": ("digits-8", {}),
    "joint": ("digits-8", {"method": AlternatingConfig("joint")}),
    "instant": ("digits-instant-8", {}),
}
BATCH_SIZES = (1, 16, 128)


def allocated(config: DistillConfig) -> int:
    """Peak bytes of a step of each kind by the allocator's own account; pictures are not in it."""
    teacher = momatch.load_teacher(config.teacher)
    run = distillation(teacher, momatch.load_data(config.data), config)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        records = train(run.method, run.batches, config.train, config.optim)
        for _ in range(2):
            next(records)
        gc.collect()
        begun = time.time_ns()
        for _ in range(2):
            next(records)
        records.close()
    assert recording.profiler is not None and recording.profiler.kineto_results is not None
    events = [e for e in recording.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = itertools.accumulate(e.nbytes() for e in events)  # type: ignore (missing from torch's stubs)
    peak = max(size for size, event in zip(held, events, strict=True) if event.start_ns() >= begun)
    weights = planning.network_cost("teacher", teacher.denoiser).weights
    return peak + weights * (2 if config.method.name == "instant" else 1)  # θ, and Λ, were there before


def measure(name: str, batch_size: int) -> dict[str, Any]:
    """One line of the table, in bytes."""
    torch.set_num_threads(1)
    recipe, options = RUNS[name]
    config = replace(momatch.recipe(recipe), **options)
    assert isinstance(config, DistillConfig)
    config = replace(config, train=replace(config.train, batch_size=batch_size))
    plan = planning.plan(config, probe_seconds=0)
    return {
        "name": name,
        "batch_size": batch_size,
        "networks": sum(cost.memory for cost in plan.networks),
        "activations": plan.activations,
        "workspace": plan.workspace,
        "planned": plan.memory - plan.data,
        "allocated": allocated(config),
    }


def main() -> None:
    torch.set_num_threads(1)
    # A process each: the allocator's account goes astray where an earlier recording knew the same addresses.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        cases = [(name, size) for size in BATCH_SIZES for name in RUNS]
        rows = pool.starmap(measure, cases, chunksize=1)
    hardware = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    out = RESULTS / f"{date.today().isoformat()}-memory.json"
    out.write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"written to {out}")


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/numbers.md, in MB (10⁶ bytes)."""
    columns = ("networks", "activations", "workspace", "planned", "allocated")
    lines = ["| | batch | " + " | ".join(columns) + " | planned / allocated |", "|---" * 8 + "|"]
    for row in rows:
        cells = " | ".join(f"{row[key] / 1e6:.2f}" for key in columns)
        ratio = row["planned"] / row["allocated"]
        lines.append(f"| {row['name']} | {row['batch_size']} | {cells} | {ratio:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
