"""Is what `make dist` built what a user can install? A fresh environment, away from the checkout.

python tools/check_dist.py dist constraints.txt

The wheel is installed there with its pinned dependencies, and used: help, recipes, a short distillation,
samples of it, the table of runs. Nothing of the checkout is on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MOST_BYTES = 10 * 2**20  # of the wheel
COMMANDS = [
    ["--version"],
    ["--help"],
    ["recipes"],
    [
        *("distill", "digits-8", "--train.num-steps", "20", "--train.batch-size", "16"),
        *("--monitor.every", "0", "--device", "cpu", "--out", "runs/eight"),
    ],
    ["sample", "runs/eight", "--num", "4", "--device", "cpu", "--out", "grid.png"],
    ["runs"],
]


def main(dist: Path, constraints: Path) -> None:
    """Raises if anything fails."""
    (wheel,) = dist.glob("*.whl")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"{wheel.name} has {size / 2**20:.1f} MiB; it must stay below {MOST_BYTES >> 20}")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "venv"), with_pip=True)
        bin_ = Path(folder, "venv", "bin")
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        quiet.pop("PYTHONPATH", None)
        install = [str(bin_ / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*install, "-c", str(constraints.resolve()), str(wheel.resolve())], check=True, env=quiet
        )
        for words in COMMANDS:
            done = subprocess.run(
                [str(bin_ / "momatch"), *words],
                cwd=folder,
                env=quiet,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"momatch {' '.join(words)}: {done.stderr}")
            print(f"momatch {' '.join(words)}: {(done.stdout.strip().splitlines() or [''])[-1]}")
        where = "import momatch, pathlib; print(pathlib.Path(momatch.__file__).parent)"
        asked = [str(bin_ / "python"), "-c", where]
        found = subprocess.run(asked, cwd=folder, env=quiet, capture_output=True, text=True, check=True)
        home = found.stdout.strip()
        if not Path(home, "py.typed").is_file() or not home.startswith(folder):
            sys.exit(f"{home} has no py.typed, or is not what was installed")
    print(f"{wheel.name}, {size / 2**20:.1f} MiB: installed and used in a fresh environment")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
