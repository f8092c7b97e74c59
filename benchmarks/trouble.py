"""A run on a disk that fills, that may not be written, or whose folder goes; with damaged checkpoints; twice.

    python benchmarks/trouble.py --out benchmarks/results/DATE-trouble.json      # as root: it mounts a tmpfs

Each case ends with one sentence and an exit code that is not 0, or goes on from what is whole; after the
trouble is over, the same command ends with the weights and the log of a run that had none, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crash import COMMAND, outcome

MORE_ROOM = 64  # MiB
PLACES = 100  # at which checkpoints are cut short, and as many at which a bit is flipped


def run(folder: Path, code: str = "") -> tuple[int, str]:
    """The command to its end in a process of its own; returns its exit code and what it says last."""
    arguments = [*COMMAND, "--out", str(folder)]
    start = f"{code}\nimport sys\nfrom momatch.cli import main\nsys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=600)
    said = done.stderr.strip().splitlines()
    if "Traceback" in done.stderr:
        sys.exit(f"a traceback:\n{done.stderr}")
    return done.returncode, said[-1] if said else ""


@contextlib.contextmanager
def mounted(folder: Path, kib: int) -> Iterator[None]:
    """A small disk there."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change the disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def full_disk(work: Path, wanted: dict, rng: random.Random) -> list[dict[str, Any]]:
    """Disks of many sizes, from nothing to nearly enough; then with room."""
    found = []
    for _ in range(12):
        kib, disk = rng.randrange(16, 9000), work / "disk"
        with mounted(disk, kib):
            code, said = run(disk / "run")
            whole = code == 0
            remount(disk, f"size={MORE_ROOM}m")
            again, _ = run(disk / "run")
            same = outcome(disk / "run") == wanted
        found.append({"kib": kib, "fitted": whole, "code": code, "said": said, "again": again, "same": same})
    return found


def lock_soon(disk: Path) -> None:
    """Forbid writing once the run has a checkpoint, at the first moment at which it has no file open."""
    end = time.monotonic() + 60
    while not any((disk / "run").glob("checkpoints/step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode:
        time.sleep(0.01)


def read_only(work: Path, wanted: dict) -> list[dict[str, Any]]:
    """A disk that may not be written from the start, or from the middle of a run on."""
    disk, found = work / "ro", []
    with mounted(disk, MORE_ROOM * 1024):
        remount(disk, "ro")
        code, said = run(disk / "run")
        remount(disk, "rw")
        found.append({"when": "start", "code": code, "said": said})
        locker = threading.Thread(target=lock_soon, args=(disk,))
        locker.start()
        code, said = run(disk / "run")
        locker.join()
        remount(disk, "rw")
        again, _ = run(disk / "run")
        same = outcome(disk / "run") == wanted
        found.append({"when": "under way", "code": code, "said": said, "again": again, "same": same})
    return found


def remove_soon(folder: Path, after: float) -> None:
    """Remove the run's folder so long after its first checkpoint."""
    end = time.monotonic() + 60
    while not any(folder.glob("checkpoints/step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(after)
    while folder.exists():  # once is not enough where the run writes at the same moment
        shutil.rmtree(folder, ignore_errors=True)


def folder_gone(work: Path, wanted: dict, rng: random.Random) -> list[dict[str, Any]]:
    """The run's folder is removed under way."""
    found = []
    for i in range(5):
        folder = work / f"gone-{i}"
        remover = threading.Thread(target=remove_soon, args=(folder, rng.uniform(0, 1)))
        remover.start()
        code, said = run(folder)
        remover.join()
        again, _ = run(folder)
        found.append({"code": code, "said": said, "again": again, "same": outcome(folder) == wanted})
        shutil.rmtree(folder)
    return found


def damaged(work: Path, wanted: dict, rng: random.Random) -> dict[str, int]:
    """The newest checkpoint of a stopped run, cut short or with a flipped bit at a hundred places each.

    Each must be noticed; with every twentieth the run goes on, from the checkpoint before, to its end.
    """
    from momatch.training.checkpoint import _newest_whole

    stopped = work / "stopped"
    half = "import momatch.training.checkpoint as c, os; s = c.save\n"
    half += "def save(d, p, *a):\n    s(d, p, *a)\n    if p.step == 12: os._exit(9)\nc.save = save"
    assert run(stopped, half)[0] == 9
    newest = max((stopped / "checkpoints").glob("step-*.safetensors"))
    contents, counts = newest.read_bytes(), {"cases": 0, "noticed": 0, "run on": 0, "same": 0}
    for i in range(2 * PLACES):
        copy = work / "copy"
        shutil.copytree(stopped, copy)
        place = rng.randrange(len(contents))
        data = bytearray(contents)
        data[place] ^= 1 << rng.randrange(8)
        (copy / "checkpoints" / newest.name).write_bytes(contents[:place] if i % 2 else bytes(data))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            (taken,) = _newest_whole(copy / "checkpoints")
        counts["cases"] += 1
        counts["noticed"] += taken.path.name < newest.name and "is damaged" in str(said[0].message)
        if i % 21 == 0:
            counts["run on"] += 1
            counts["same"] += run(copy)[0] == 0 and outcome(copy) == wanted
        shutil.rmtree(copy)
    return counts


def two_at_once(work: Path, wanted: dict) -> dict[str, Any]:
    """Two processes on one folder: one of them is refused."""
    folder, found = work / "both", {}

    def second() -> None:
        time.sleep(5)
        found["code"], found["said"] = run(folder)

    other = threading.Thread(target=second)
    other.start()
    first, _ = run(folder)
    other.join()
    return {"first": first, "second": found["code"], "said": found["said"], "same": outcome(folder) == wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="cases; all if left out")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        assert run(work / "unbroken")[0] == 0
        wanted = outcome(work / "unbroken")
        result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(COMMAND)}
        for name, case in {
            "two at once": lambda: two_at_once(work, wanted),
            "full disk": lambda: full_disk(work, wanted, rng),
            "read only": lambda: read_only(work, wanted),
            "folder gone": lambda: folder_gone(work, wanted, rng),
            "damaged": lambda: damaged(work, wanted, rng),
        }.items():
            if arguments.only and name not in arguments.only:
                continue
            result[name] = case()
            print(name, json.dumps(result[name], indent=1), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
