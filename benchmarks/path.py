"""How many files of the package a command goes through: what a reader has to open to follow it.

python benchmarks/path.py [--list] [--save FILE.json]

Counted with sys.setprofile are the calls of Python functions that the package's files define, from the call
of momatch.cli.main on; resuming a generator counts as a call.

- Files: how many hold at least one function called.
- Switches: in the sequence of functions in the order of their first calls, how often the next one is in
  another file than the one before.
- Jumps: the same over all calls, repeated ones too; most of them are a network's or a sampler's.

What runs because a module is imported (its body, class bodies and all that these call) does not count; nor do
`__init__.py` files, whose functions only import, calls of other packages, and what dataclasses generate.

`distill digits-8` is counted to its first student update: the second step of an optimizer, as the first one
is the auxiliary network's. The other commands are counted to their end. Each runs in a process of its own, so
that nothing is cached by another.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = "momatch"
COMMANDS = {
    "distill": ["distill", "digits-8", "--out", "counted", "--train.num-steps", "2", "--device", "cpu"],
    "sample --prompt": ["sample", "emoji", "--prompt", "a red heart", "--num", "2", "--device", "cpu"],
    "evaluate": ["evaluate", "measured", "--num", "200", "--device", "cpu"],
}
UPDATES = {"distill": 2}  # steps of optimizers after which counting ends
SHORT = ["--train.num-steps", "2", "--monitor.every", "0", "--train.batch-size", "4", "--device", "cpu"]
PREPARATIONS = {  # runs that barely trained, for the commands that need one
    "sample --prompt": [
        ["train-teacher", "emoji16-teacher", "--out", "emoji-teacher", *SHORT],
        ["distill", "emoji16-8", "--teacher", "emoji-teacher", "--out", "emoji", *SHORT],
    ],
    "evaluate": [["distill", "digits-8", "--out", "measured", *SHORT]],
}


@dataclass
class Route:
    """What a command went through.

    Attributes:
        command: its words.
        files: in the order of first calls, relative to the package.
        switches: see above.
        jumps: see above.
    """

    command: str
    files: list[str] = field(default_factory=list)
    switches: int = 0
    jumps: int = 0


class Counter:
    """Counts from `start` to `stop`."""

    def __init__(self, package: Path, found: Route):
        self.package, self.found = f"{package}{os.sep}", found
        self.seen: set[CodeType] = set()
        self.last = self.last_new = ""
        self.importing = 0  # module bodies under way

    def start(self) -> None:
        """Begin to count, in this thread."""
        sys.setprofile(self._see)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_name == "<module>":
            self.importing += {"call": 1, "return": -1}.get(event, 0)
        if event != "call" or self.importing or not code.co_filename.startswith(self.package):
            return
        if not code.co_flags & inspect.CO_OPTIMIZED:  # the body of a class
            return
        if code.co_filename.endswith("__init__.py"):
            return
        file = code.co_filename.removeprefix(self.package)
        self.found.jumps += bool(self.last) and file != self.last
        self.last = file
        if code in self.seen:
            return
        self.seen.add(code)
        self.found.switches += bool(self.last_new) and file != self.last_new
        self.last_new = file
        if file not in self.found.files:
            self.found.files.append(file)


def count(name: str, folder: str) -> Route:
    """Run the command of that name in the folder; to be called in a fresh process."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import momatch
    from momatch.cli import main

    os.chdir(folder)
    torch.set_num_threads(1)
    found = Route(" ".join(COMMANDS[name]))
    counter = Counter(Path(str(momatch.__file__)).parent, found)
    updates = 0

    def updated(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == UPDATES.get(name):
            counter.stop()

    register_optimizer_step_post_hook(updated)
    with contextlib.redirect_stdout(sys.stderr):
        counter.start()
        code = main(COMMANDS[name])
        counter.stop()
    if code or updates < UPDATES.get(name, 0):
        raise RuntimeError(f"momatch {found.command} failed")
    return found


def measure(name: str) -> Route:
    """Count a command, after the runs that it needs."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        for words in PREPARATIONS.get(name, []):
            command = [sys.executable, "-m", PACKAGE, *words]
            subprocess.run(command, cwd=folder, env=quiet, check=True, stdout=sys.stderr)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(count, name, folder).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the files, in the order of first calls")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    found = {name: measure(name) for name in COMMANDS}
    print(f"{'command':<20}{'files':>8}{'switches':>10}{'jumps':>8}")
    for name, path in found.items():
        print(f"{name:<20}{len(path.files):>8}{path.switches:>10}{path.jumps:>8}")
        if arguments.list:
            print("".join(f"    {file}\n" for file in path.files), end="")
    if arguments.save:
        rows = {name: {"num_files": len(path.files), **asdict(path)} for name, path in found.items()}
        contents = {"date": date.today().isoformat(), "commands": rows}
        arguments.save.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"written to {arguments.save}")


if __name__ == "__main__":
    main()
