"""Runs from outside: a list of those in a folder, and one watched while it goes on."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from momatch.cli.parsing import RunPath, parse
from momatch.utils.errors import UsageError
from momatch.utils.run_folder import LOCK, Row, RunFolder
from momatch.utils.text import format_seconds

DEEP = 3  # folders below the one that is listed
EVERY_SECONDS = 2.0
WHOLE = 1000  # columns of a table that nobody sees in a terminal
RECENT = 50  # logged rows that the pace is taken from
State = Literal["running", "finished", "stopped", "not begun"]


@dataclass(frozen=True)
class Summary:
    """A run, as its folder tells it.

    Attributes:
        run: the folder.
        kind: "distill" or "train-teacher"; "" where the config is damaged.
        method: the algorithm; "denoising" of a teacher.
        calls: network calls of the student; "" of a teacher.
        state: running, finished, stopped (the same command goes on), or not begun.
        step: that was logged last.
        of: steps in all; 0 where the config is damaged.
        frechet: of the last evaluation the lowest, else of the last preview; None if there is none.
        judged: "evaluation" or "preview".
        changed: when the log was written to, seconds since 1970.
    """

    run: Path
    kind: str
    method: str
    calls: str
    state: State
    step: int
    of: int
    frechet: float | None
    judged: str
    changed: float


def summary(path: Path) -> Summary:
    """What the folder of a run says."""
    folder, config = RunFolder(path), _json(RunFolder(path).config)
    rows, method, train = folder.rows(), config.get("method"), config.get("train")
    kind = str(config.get("kind", ""))
    name = method.get("name", "") if isinstance(method, dict) else method or ""
    calls = config.get("steps", "") if kind == "distill" else ""
    of = train.get("num_steps", 0) if isinstance(train, dict) else 0
    step = max((row["step"] for row in rows), default=0)
    if _held(folder):
        state: State = "running"
    elif (folder.model(folder.role) / "model.json").is_file() and (_stopped(rows) or step >= of):
        state = "finished"
    else:
        state = "stopped" if rows else "not begun"
    frechet, judged = _frechet(folder, rows)
    newest = folder.metrics if folder.metrics.exists() else folder.config
    return Summary(
        path,
        kind,
        str(name) if kind == "distill" else "denoising",
        ",".join(map(str, calls)) if isinstance(calls, list) else str(calls),
        state,
        step,
        of if isinstance(of, int) else 0,
        frechet,
        judged,
        newest.stat().st_mtime,
    )


def find(folder: Path, deep: int = DEEP) -> Iterator[Path]:
    """The folders of runs in a folder, and below it; not those inside of runs."""
    if RunFolder(folder).exists and "kind" in _json(RunFolder(folder).config):
        yield folder
        return
    if deep:
        for each in sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."):
            try:
                yield from find(each, deep - 1)
            except PermissionError:
                continue


@dataclass(frozen=True)
class RunsArguments:
    """List the runs in a folder: what each is, how far, and how good.

    Attributes:
        folder: where runs are, up to three folders deep.
        format: "table" for reading; "csv" and "json" print nothing else.
    """

    folder: Annotated[Positional[Path], arg(metavar="[FOLDER]")] = Path("runs")
    format: Literal["table", "csv", "json"] = "table"


def runs(arguments: list[str], console: Console) -> None:
    """`momatch runs [FOLDER]`."""
    parsed = parse(RunsArguments, arguments, "runs")
    if not parsed.folder.is_dir():
        raise UsageError(f"there is no folder {parsed.folder}; name the one that your runs are in")
    found = [summary(path) for path in find(parsed.folder)]
    if parsed.format == "json":
        rows = [{**asdict(each), "run": str(each.run)} for each in found]
        console.out(json.dumps(rows, indent=1), highlight=False)
    elif parsed.format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Summary.__annotations__)
        writer.writerows([*asdict(each).values()] for each in found)
        console.out(text.getvalue(), end="", highlight=False)
    elif not found:
        console.print(f"no runs in {parsed.folder}", soft_wrap=True, markup=False)
    else:
        whole = console if console.is_terminal else Console(width=WHOLE, file=console.file, highlight=False)
        whole.print(_table(found, parsed.folder))


def _table(found: list[Summary], folder: Path) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("run", "method", "calls", "state", "step", "FD", "by", "changed")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in ("step", "FD") else "left")
    for each in found:
        where = each.run.relative_to(folder) if each.run != folder else each.run
        fd = "" if each.frechet is None else f"{each.frechet:.3g}"
        steps = f"{each.step:,} / {each.of:,}"
        when = f"{datetime.fromtimestamp(each.changed):%Y-%m-%d %H:%M}"
        cells = (str(where), each.method, each.calls, each.state, steps, fd, each.judged, when)
        table.add_row(*map(Text, cells))  # names are not markup
    return table


@dataclass(frozen=True)
class WatchArguments:
    """Follow a run from another terminal, until it ends or Ctrl-C; the run does not notice.

    Attributes:
        run: the run's folder.
        every: seconds between two looks into its log.
    """

    run: RunPath
    every: float = EVERY_SECONDS


def watch(arguments: list[str], console: Console) -> None:
    """`momatch watch RUN`."""
    parsed = parse(WatchArguments, arguments, "watch")
    if not RunFolder(parsed.run).exists:
        raise UsageError(f"{parsed.run} is not the folder of a run (no config.json)")
    if not 0.05 <= parsed.every <= 3600:
        raise UsageError(f"--every is {parsed.every}; give seconds, 0.05 to 3600")
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            said = ""
            while True:
                now = summary(parsed.run)
                text = "\n".join(lines(now, RunFolder(parsed.run).rows()))
                if console.is_terminal:
                    live.update(Text(text), refresh=True)
                elif text != said:
                    console.out(text, highlight=False)
                said = text
                if now.state != "running":
                    return
                time.sleep(parsed.every)
    except KeyboardInterrupt:
        console.print("no longer watched; the run goes on")


def lines(now: Summary, rows: list[Row]) -> list[str]:
    """What is shown of a run."""
    found = [f"{now.run}: {now.method}{f', {now.calls} calls' if now.calls else ''}, {now.state}"]
    records = [row for row in rows if "event" not in row][-RECENT:]
    if records:
        first, last = records[0], records[-1]
        pace, seconds = "", last.get("seconds", 0) - first.get("seconds", 0)
        if seconds > 0:  # after a resume the clock begins anew
            speed = (last["step"] - first["step"]) / seconds
            left = (
                f", {format_seconds((now.of - last['step']) / speed)} left" if now.state == "running" else ""
            )
            pace = f"  {speed:.3g} steps/s{left}"
        found.append(f"step {last['step']:,} of {now.of:,}{pace}")
        numbers = [
            (key, value) for key, value in last.items() if key not in ("step", "images_seen", "seconds")
        ]
        found += [f"  {key.replace('_', ' ')}: {value:.4g}" for key, value in numbers if _is_number(value)]
    if now.frechet is not None:
        found.append(f"FD {now.frechet:.4g} ({now.judged})")
    events = [row for row in rows if row.get("event") in ("alarm", "stop", "extended")]
    found += [
        f"{row['event']} at step {row['step']}: {row.get('message', row.get('reason', ''))}"
        for row in events[-3:]
    ]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stopped(rows: list[Row]) -> bool:
    return any(row.get("event") == "stop" for row in rows)


def _held(folder: RunFolder) -> bool:
    """Whether a process works in it."""
    if not (folder.path / LOCK).is_file():
        return False
    try:
        with FileLock(folder.path / LOCK, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _frechet(folder: RunFolder, rows: list[Row]) -> tuple[float | None, str]:
    try:
        measured = [
            m["value"]
            for row in _json(folder.evaluation).get("rows", [])
            if row["name"] == folder.role
            for m in row["result"]["measurements"][:1]
            if m["metric"] == "frechet"
        ]
    except (KeyError, TypeError, AttributeError):
        measured = []
    if measured:
        return min(measured), "evaluation"
    looks = [row["frechet"] for row in rows if row.get("event") == "look" and "frechet" in row]
    return (looks[-1], "preview") if looks else (None, "")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
