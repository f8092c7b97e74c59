"""Timing two things against each other: interleaved, one thread, CPU time, medians, ratios pair by pair."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """How much CPU time one thing takes compared with another, timed in turn.

    Attributes:
        name: what is compared.
        ours_ms: median of ours.
        bare_ms: median of the other.
        ratio: median over the pairs of ours/bare.
        low: lower quartile of that ratio.
        high: upper quartile.
        pairs: how many.
        limit: what the ratio should stay below.
    """

    name: str
    ours_ms: float
    bare_ms: float
    ratio: float
    low: float
    high: float
    pairs: int
    limit: float


def compare(
    name: str,
    ours: Callable[[], object],
    bare: Callable[[], object],
    limit: float,
    pairs: int = 41,
    repeat: int = 1,
) -> Ratio:
    """Time `repeat` calls of ours, then of bare, then of bare, then of ours, …, after a warm-up of both."""
    for _ in range(2):
        _milliseconds(ours, repeat)
        _milliseconds(bare, repeat)
    a, b = [], []
    for i in range(pairs):
        if i % 2:
            a.append(_milliseconds(ours, repeat))
            b.append(_milliseconds(bare, repeat))
        else:
            b.append(_milliseconds(bare, repeat))
            a.append(_milliseconds(ours, repeat))
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = Ratio(name, statistics.median(a), statistics.median(b), middle, low, high, pairs, limit)
    print(
        f"{name:<52} ours {result.ours_ms:9.3f} ms  bare {result.bare_ms:9.3f} ms  ratio {middle:.3f} "
        f"(quartiles {low:.3f} to {high:.3f}; limit {limit})",
        flush=True,
    )
    return result


def record(name: str, ratios: list[Ratio]) -> None:
    """Write a dated JSON with the hardware into benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today().isoformat()}-{name}.json"
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()} {processor()}, 1 thread, torch {torch.__version__}",
        "method": "CPU time, interleaved, median over pairs; ms for one call",
        "ratios": [asdict(ratio) for ratio in ratios],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def _milliseconds(function: Callable[[], object], repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        function()
    return 1000 * (time.process_time() - start) / repeat
