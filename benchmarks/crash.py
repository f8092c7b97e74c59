"""Kill a run at random moments of its whole life, again and again, and see what it ends with.

    python benchmarks/crash.py --kills 120 --out benchmarks/results/DATE-crash.json
    python benchmarks/crash.py --kills 20 --processes 2 --flip

With --processes several train as one, and one of them is killed, any; the others end by themselves, with exit
code 1, or, where they had not met yet, are killed after 20 s, as torchrun would do. With --flip every other
kill is followed by a flipped byte in the newest checkpoint.

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
import socket
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


def start(folder: Path, count: int) -> list[int]:
    """Run the command in `count` children that work together; returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [_start(folder, rank, count, port) for rank in range(count)]


def _start(folder: Path, rank: int, count: int, port: str) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(momatch([*COMMAND, "--out", str(folder)]))


def run_for(folder: Path, seconds: float | None, count: int, victim: int = 0) -> bool:
    """Let the run go on for so long, or to its end. Returns whether it ended by itself.

    Args:
        folder: of the run.
        seconds: until the kill; None never kills.
        count: processes.
        victim: which of them is killed.
    """
    children, begun = start(folder, count), time.monotonic()
    while seconds is None or time.monotonic() - begun < seconds:
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            statuses = [status, *(os.waitpid(child, 0)[1] for child in children[1:])]
            if any(statuses):
                sys.exit(f"the run failed with statuses {statuses} after a kill; its folder is {folder}")
            return True
        time.sleep(0.002)
    os.kill(children[victim], signal.SIGKILL)
    others = [child for i, child in enumerate(children) if i != victim]
    os.waitpid(children[victim], 0)
    codes = [_end(child) for child in others]
    # A kill as a process ends may find the others done; before they have met, they wait for a meeting place.
    if any(code not in (0, 1, -signal.SIGKILL) for code in codes):
        sys.exit(f"exit codes {codes} after process {victim} was killed; its folder is {folder}")
    return False


def _end(child: int) -> int:
    """The exit code of a process that is to end by itself; after a while it is killed, as torchrun does."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def flip(folder: Path, rng: random.Random) -> bool:
    """Flip a bit in the second half of the newest checkpoint, if there is one before it to go on from."""
    found = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    if len(found) < 2:
        return False
    with found[-1].open("rb+") as file:
        place = rng.randrange(found[-1].stat().st_size // 2, found[-1].stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return True


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
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        count = arguments.processes
        run_for(Path(temporary, "warm"), None, count)
        begun = time.monotonic()
        run_for(Path(temporary, "unbroken"), None, count)
        life = time.monotonic() - begun
        wanted = outcome(Path(temporary, "unbroken"))
        assert wanted["steps"] == list(range(1, STEPS + 1)), wanted["steps"]
        kills, flips, runs, bad = 0, 0, 0, []
        while kills < arguments.kills:
            folder = Path(temporary, f"run-{runs}")
            while not run_for(folder, rng.uniform(0, life), count, rng.randrange(count)):
                kills += 1
                flips += arguments.flip and kills % 2 == 0 and flip(folder, rng)
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
        "processes": count,
        "kills": kills,
        "flipped_bytes": flips,
        "runs": runs,
        "runs_that_differ": len(bad),
        "differences": bad,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
