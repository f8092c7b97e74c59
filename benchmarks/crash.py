"""Kill a run at random moments of its whole life, again and again, and see what it ends with.

    python benchmarks/crash.py --kills 120 --out benchmarks/results/DATE-crash.json

A process forked from one that has imported everything runs `momatch distill`, and gets SIGKILL after a
random time: while it loads, trains, logs, writes a checkpoint, makes a preview, or saves the student. The
same command goes on. When a run has come to its end, its weights must be those of a run that nobody killed,
bit for bit; its log must have every step once; no temporary file may be left. Then the next run begins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from momatch.cli import main as momatch

STEPS = 24
COMMAND = ["distill", "digits-8", "--train.num-steps", str(STEPS), "--train.batch-size", "16"]
COMMAND += ["--train.log-every", "1", "--train.checkpoint-every", "2"]
COMMAND += ["--monitor.every", "6", "--monitor.num-samples", "100"]


def start(folder: Path) -> int:
    """Run the command in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(momatch([*COMMAND, "--out", str(folder)]))


def run_for(folder: Path, seconds: float | None) -> bool:
    """Let the run go on for so long, or to its end. Returns whether it ended by itself."""
    child, begun = start(folder), time.monotonic()
    while seconds is None or time.monotonic() - begun < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                sys.exit(f"the run failed with status {status} after a kill; its folder is {folder}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def outcome(folder: Path) -> dict[str, object]:
    """What must not depend on kills."""
    weights = (folder / "student" / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = {row["step"]: row for row in rows if "gap" in row}
    for row in numbers.values():
        row.pop("seconds")
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "steps": [row["step"] for row in rows if "gap" in row],
        "numbers": hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest(),
        "previews": [(row["step"], row["frechet"]) for row in rows if row.get("event") == "look"],
        "left over": sorted(path.name for path in folder.rglob("*.tmp")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        run_for(Path(temporary, "warm"), None)
        begun = time.monotonic()
        run_for(Path(temporary, "unbroken"), None)
        life = time.monotonic() - begun
        wanted = outcome(Path(temporary, "unbroken"))
        assert wanted["steps"] == list(range(1, STEPS + 1)), wanted["steps"]
        kills, runs, bad = 0, 0, []
        while kills < arguments.kills:
            folder = Path(temporary, f"run-{runs}")
            while not run_for(folder, rng.uniform(0, life)):
                kills += 1
            found, runs = outcome(folder), runs + 1
            if found != wanted:
                bad.append({key: found[key] for key in found if found[key] != wanted[key]})
            print(f"{kills} kills, {runs} runs, {len(bad)} of them other than the unbroken one", flush=True)
            shutil.rmtree(folder)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "command": " ".join(COMMAND),
        "life_seconds": round(life, 2),
        "kills": kills,
        "runs": runs,
        "runs_that_differ": len(bad),
        "differences": bad,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
