"""A run's folder: the names of its files, the lock that one process holds, and its log, read and written.

config.json           all settings, and fingerprints of what the run started from
config.yaml           the settings for people, each with what it is; for --config of another run
metrics.jsonl         the log: a row for every logged step, and for every event (start, look, alarm, stop)
checkpoints/          the newest two
best.safetensors      with a stopping rule: the best weights that a preview has seen
second-moments.safetensors   of the teacher, where the run has estimated them
auxiliary.safetensors if asked for: the auxiliary's weights, for momatch reward
samples/              previews, and images of evaluations
student/, teacher/    the finished model; student/lora/ beside merged weights
evaluation.json, report.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from momatch.utils.errors import ConfigError, RunError
from momatch.utils.files import write_atomically

LOCK = ".lock"
SECOND_MOMENTS = "second-moments.safetensors"
Row = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which need not be there yet.

    Attributes:
        path: where.
    """

    path: Path

    @property
    def config(self) -> Path:
        """config.json; a folder without it is no run's."""
        return self.path / "config.json"

    @property
    def settings(self) -> Path:
        """config.yaml; nothing of the run depends on it."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl, the log."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """best.safetensors."""
        return self.path / "best.safetensors"

    @property
    def second_moments(self) -> Path:
        """second-moments.safetensors."""
        return self.path / SECOND_MOMENTS

    @property
    def auxiliary(self) -> Path:
        """auxiliary.safetensors."""
        return self.path / "auxiliary.safetensors"

    @property
    def samples(self) -> Path:
        """Folder of previews and images of evaluations."""
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        """evaluation.json."""
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        """report.html."""
        return self.path / "report.html"

    def model(self, role: Literal["student", "teacher"]) -> Path:
        """Folder of the finished model."""
        return self.path / role

    @property
    def exists(self) -> bool:
        """Whether it is the folder of a run."""
        return self.config.is_file()

    def check_is_there(self) -> None:
        """Refuse to write on where somebody has taken the folder away: half a run would be left.

        Raises:
            RunError: saying so.
        """
        if not self.exists:
            raise _gone(self.path)

    @property
    def role(self) -> Literal["student", "teacher"]:
        """What the run makes, by the kind that its config names; a teacher if that cannot be read."""
        try:
            fields = json.loads(self.config.read_text())
        except (OSError, ValueError):
            fields = None
        distils = isinstance(fields, dict) and fields.get("kind") == "distill"
        return "student" if distils else "teacher"

    @property
    def is_empty(self) -> bool:
        """Whether nothing but a lock is in it; also if it is not there."""
        return not self.path.is_dir() or all(file.name == LOCK for file in self.path.iterdir())

    @property
    def begun(self) -> bool:
        """Whether any step of the run was done."""
        return any(self.checkpoints.glob("step-*.safetensors")) or self.metrics.exists()

    def rows(self) -> list[Row]:
        """The log; lines that a crash has cut short, or that are damaged, are passed over."""
        try:
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return []
        return [row for line in lines if (row := _row(line)) is not None]

    def append(self, rows: Iterable[Row]) -> None:
        """Add to the log, on disk when this returns: what a later checkpoint covers has then been logged.

        Raises:
            OSError: if it cannot be written.
            RunError: if the folder was taken away.
        """
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if text:
            self.check_is_there()
            with self.metrics.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def forget_from(self, step: int) -> None:
        """Drop what the log says of `step` and later: a crash took these steps back, they are done again."""
        if self.metrics.exists():
            text = "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] < step)
            write_atomically(self.metrics, lambda temporary: temporary.write_text(text))


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def make_inside(folder: Path) -> None:
    """Make a folder in a run's folder, which must be there.

    Raises:
        RunError: if it was taken away.
    """
    if not folder.parent.is_dir():
        raise _gone(folder.parent)
    folder.mkdir(exist_ok=True)


def _gone(path: Path) -> RunError:
    if path.is_dir():
        return RunError(
            f"config.json of {path} was removed while the run went on; put it back, or delete the folder, "
            "and run the same command again"
        )
    return RunError(f"{path} was removed while the run went on; the same command begins it anew")


@contextmanager
def exclusive(folder: Path, doing: str) -> Iterator[None]:
    """Make `folder` and hold its lock, so that no two processes work in it; freed if the process dies.

    Args:
        folder: where.
        doing: what is done there, for the other process to be told: "training in".

    Raises:
        ConfigError: if another process holds it, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another process is {doing} {folder}; wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot write into {folder}: {error.strerror or error}; choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
