"""Following a run on the terminal: progress, speed, time left, a number that means something; and Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from momatch.evaluation.evaluate import Pair, Watch
from momatch.interop.prepare import Done
from momatch.methods.base import MethodConfig
from momatch.training import distributed
from momatch.training.run import Event, Run
from momatch.training.trackers import tracked
from momatch.utils.errors import Interrupted
from momatch.utils.text import format_seconds

PLAIN_EVERY_SECONDS = 15.0


def follow(run: Run, title: str, console: Console, track: Sequence[str] = ()) -> None:
    """Train `run` to its end, showing how it goes; trackers of these names are told too.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the checkpoint is saved by then.
    """
    total = run.config.train.num_steps
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[number]}"),
    )
    events, status = run.events(), _Status(run.config.method)
    quiet = not console.is_terminal
    with (
        tracked(track, run) as tell,
        stop_requests() as stop,
        Progress(*columns, console=console, disable=quiet) as bar,
    ):
        task = bar.add_task(title, total=total, speed=0.0, number="")
        try:
            for event in events:
                status.update(event)
                tell(event)
                bar.update(task, completed=event.record.step, speed=status.speed, number=status.number)
                for message in event.alarms:
                    console.print(f"[bold red]alarm[/] step {event.record.step}: {message}")
                if not console.is_terminal and status.due():
                    console.print(f"{title}: {status.line(total)}", highlight=False, soft_wrap=True)
                if event.stopped:
                    console.print(f"ended at step {event.record.step}: {event.stopped}", soft_wrap=True)
                if distributed.any_of(stop.is_set()) and event.record.step < total:
                    stop.set()  # in all processes, at the same step
                    stop.preempted = distributed.any_of(stop.preempted)
                    break
        finally:
            events.close()
    if stop.is_set() and 0 < status.step < total and not status.ended:
        raise Interrupted(
            f"stopped at step {status.step} of {total} and saved; run the same command again to go on",
            preempted=stop.preempted,
        )


def follow_preparation(steps: Generator[Done, None, None], console: Console) -> None:
    """Prepare data to the end, showing how far it is, its speed and the time left.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; finished shards are kept.
    """
    columns = (
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
    )
    shown, quiet = time.monotonic(), not console.is_terminal
    with closing(steps), stop_requests() as stop, Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("preparing", total=None, line="")
        for done in steps:
            line = _preparation_line(done)
            bar.update(task, total=done.total, completed=done.samples, line=line)
            if done.new == 0 and done.samples:
                console.print(f"{done.samples} of {done.total} samples are there already", soft_wrap=True)
            elif not console.is_terminal and time.monotonic() - shown >= PLAIN_EVERY_SECONDS:
                console.print(f"preparing: {done.samples}/{done.total}  {line}", soft_wrap=True)
                shown = time.monotonic()
            if stop.is_set() and done.samples < done.total:
                raise Interrupted(
                    f"stopped at about {done.samples} of {done.total} samples; finished shards are kept, run "
                    "the same command again to go on",
                    preempted=stop.preempted,
                )


@contextmanager
def follow_samples(console: Console) -> Iterator[Watch]:
    """Gives what passes samples on as they are pulled, and shows how far they are."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
    )
    quiet = not console.is_terminal
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("", total=None, line="")

        def watch(samples: Iterable[Pair], title: str, total: int) -> Iterator[Pair]:
            bar.reset(task, total=total, description=f"sampling: {title}", line="")
            done, start = 0, time.monotonic()
            shown = start
            for images, asked in samples:
                yield images, asked
                done, now = done + len(images), time.monotonic()
                line = _pace(done, total - done, now - start)
                bar.update(task, completed=done, line=line)
                if quiet and now - shown >= PLAIN_EVERY_SECONDS:
                    console.print(f"sampling: {title}: {done}/{total}  {line}", soft_wrap=True)
                    shown = now
            bar.update(task, description=f"measuring: {title}", line="")

        yield watch


def _preparation_line(done: Done) -> str:
    return _pace(done.new, done.total - done.samples, done.seconds)


def _pace(done: int, left: int, seconds: float) -> str:
    if not done or not seconds:
        return ""
    speed = done / seconds
    return f"{speed:.3g} pictures/s  {format_seconds(left / speed)} left"


class StopRequest(threading.Event):
    """Set when the run is to stop; `preempted` if by SIGTERM, as machines are taken away, not by the user."""

    preempted = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """An event that the first SIGINT or SIGTERM sets; the second one interrupts as usual.

    Outside the main thread, where Python takes no signals, the event is never set.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: object) -> None:
        if stop.is_set():
            if distributed.size() > 1:  # torchrun passes on a signal that the process group got as well
                return
            raise KeyboardInterrupt
        stop.preempted = signum == signal.SIGTERM
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Status:
    """Speed of this process, and the latest numbers worth showing."""

    def __init__(self, method: MethodConfig) -> None:
        self.names = [method.headline, f"{method.vanishing}_mean"]
        self.step, self.speed, self.headline, self.frechet = 0, 0.0, "", ""
        self.ended = False
        self.steps_per_second, self.first_step = 0.0, 0
        self.first: tuple[int, float] | None = None
        self.last_line = time.monotonic()

    @property
    def number(self) -> str:
        return "  ".join(part for part in (self.frechet, self.headline) if part)

    def update(self, event: Event) -> None:
        record = event.record
        self.step, self.ended = record.step, event.stopped is not None
        if self.first is None:
            self.first, self.first_step = (record.images_seen, record.seconds), record.step
        elif record.seconds > self.first[1]:
            self.speed = (record.images_seen - self.first[0]) / (record.seconds - self.first[1])
            self.steps_per_second = (record.step - self.first_step) / (record.seconds - self.first[1])
        for name in self.names:
            if name in record.metrics:
                self.headline = f"{name.replace('_', ' ')} {record.metrics[name]:.2e}"
        if event.look:
            self.frechet = f"FD {event.look.frechet:.2f} (n={event.look.num_samples}, {event.look.reference})"

    def due(self) -> bool:
        if time.monotonic() - self.last_line < PLAIN_EVERY_SECONDS:
            return False
        self.last_line = time.monotonic()
        return True

    def line(self, total: int) -> str:
        left = ""
        if self.steps_per_second > 0:
            left = f"{format_seconds((total - self.step) / self.steps_per_second)} left  "
        return f"step {self.step}/{total}  {self.speed:.0f} images/s  {left}{self.number}"
