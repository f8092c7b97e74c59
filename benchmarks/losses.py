"""That a refactor leaves losses bit-identical: short runs by the command line, every logged number kept.

python benchmarks/losses.py --save FILE.json       # before
python benchmarks/losses.py --compare FILE.json    # after: exits 1 and names the first difference

Trains 20 steps of digits-8, digits-instant-8 and emoji16-8 (after 2 steps of its teacher; both with small
minibatches) on the CPU, with one thread and seed 0. Kept are all numbers of metrics.jsonl but the seconds, as
Python's exact repr of a float, and a hash over the names, shapes and bytes of the final weights. Numbers are
exact only between runs on one machine with one version of torch: a comparison elsewhere is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from timing import processor

STEPS = 20
COMMON = ("--train.seed", "0", "--train.log-every", "1", "--monitor.every", "0", "--device", "cpu")
SMALL = ("--train.batch-size", "16")  # the emoji's networks are slow on a CPU
COMMANDS = {
    "emoji16-teacher": ("train-teacher", "--train.num-steps", "2", *SMALL),
    "digits-8": ("distill", "--train.num-steps", str(STEPS)),
    "digits-instant-8": ("distill", "--train.num-steps", str(STEPS)),
    "emoji16-8": ("distill", "--train.num-steps", str(STEPS), *SMALL, "--teacher", "emoji16-teacher"),
}


def train(recipe: str, folder: Path) -> None:
    """Run the recipe's command, in a folder that holds the runs of all."""
    command, *options = COMMANDS[recipe]
    words = [sys.executable, "-m", "momatch", command, recipe, "--out", recipe, *options, *COMMON]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[1:])} failed:\n{done.stdout}{done.stderr}")


def logged(run: Path) -> list[dict[str, str]]:
    """Every line of metrics.jsonl, numbers as exact reprs, without the seconds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in rows]


def weights_hash(run: Path) -> str:
    """SHA-256 over the model's weights: name, type, shape and bytes of each, in the order of names."""
    (path,) = (run / role / "model.safetensors" for role in ("student", "teacher") if (run / role).is_dir())
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure() -> dict[str, Any]:
    """Train everything anew; returns what is kept of each recipe."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in COMMANDS:
            start = time.monotonic()
            train(recipe, Path(folder))
            run = Path(folder, recipe)
            found[recipe] = {"metrics": logged(run), "weights": weights_hash(run)}
            print(f"{recipe}: {time.monotonic() - start:.0f} s")
            for row in found[recipe]["metrics"]:
                print("  " + "  ".join(f"{name} {value}" for name, value in row.items()))
            print(f"  weights {found[recipe]['weights']}", flush=True)
    return found


def machine() -> dict[str, str]:
    """What exact numbers depend on besides the code."""
    return {"processor": processor(), "torch": torch.__version__}


def differences(before: Any, after: Any, place: str) -> Iterator[str]:
    """The places at which two outcomes differ, in the order of training."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            yield from differences(before.get(name), after.get(name), f"{place} {name}".strip())
    elif isinstance(before, list) and isinstance(after, list):
        for i, (a, b) in enumerate(zip(before, after, strict=False)):
            yield from differences(a, b, f"{place}[{i}]")
        if len(before) != len(after):
            yield f"{place}: {len(before)} lines before, {len(after)} now"
    elif before != after:
        yield f"{place}: {before} before, {after} now"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the outcome there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare it with an earlier one")
    arguments = parser.parse_args()
    earlier = json.loads(arguments.compare.read_text()) if arguments.compare else None
    if earlier and earlier["machine"] != machine():
        sys.exit(f"{arguments.compare} was made with {earlier['machine']}, this is {machine()}")
    found = measure()
    if arguments.save:
        contents = {"date": date.today().isoformat(), "machine": machine(), "recipes": found}
        arguments.save.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"written to {arguments.save}")
    if earlier:
        first = next(differences(earlier["recipes"], found, ""), None)
        if first:
            sys.exit(f"not identical: {first}")
        print(f"bit-identical to {arguments.compare}")


if __name__ == "__main__":
    main()
